"""Benchmarks, tuning and checks on a GPU: `python -m bench.kernels`, `bench.tune`, `bench.check` (make bench,
tune, gpu-check)."""
