"""Benchmarks of a GPU: kernels against their floors, whole engine steps, sweeps of configurations.

`python -m bench.gpu` does it all; every part has a `--dry-run` that needs no GPU.
"""
