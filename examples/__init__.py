"""A laboratory beside the packages, importable in a checkout and not installed.

small       the run that makes the embedded model of ``qwen2vl.assets``: ``python -m examples.small``
ablation    two ablations of the paper with tiny models: ``python -m examples.ablation``
demo        the embedded model on generated samples, and the path through a random one: ``python -m examples.demo``
"""
