"""Benchmark cases that go wrong, one way each; what they cost is for ``tests/benchmarks/test_isolate.py`` to see."""
