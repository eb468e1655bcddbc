"""The run that makes the embedded model of ``qwen2vl.assets``: its shape, the plan of its training, its results."""
