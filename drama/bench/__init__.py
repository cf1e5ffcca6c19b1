"""Benchmarks: what the launchers `bench_*.py` run."""
