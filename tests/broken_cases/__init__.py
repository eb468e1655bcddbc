"""Benchmark cases that go wrong, one way each; what they cost is for ``tests/test_benchmarks_isolate.py`` to see."""
