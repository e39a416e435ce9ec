"""Benchmarks, tuning and checks on a GPU: `python -m bench.kernels`, `bench.decode`, `bench.tune`,
`bench.check` (make bench, bench-decode, tune, gpu-check)."""
