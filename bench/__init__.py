"""Benchmarks and tuning: `python -m bench.kernels`, `bench.decode`, `bench.acceptance`, `bench.budget`,
`bench.trace`, `bench.tune` (make bench, bench-decode, acceptance, bench-budget, tune)."""
