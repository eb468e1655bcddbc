"""Benchmarks: ours and every importable peer side by side in one process, after a parity gate.

``python -m benchmarks list | run <case...> | report``, from the root of the repository.
"""
