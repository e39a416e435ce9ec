"""Benchmarks and tuning: `python -m bench.kernels`, `bench.decode`, `bench.acceptance`, `bench.budget`,
`bench.serve`, `bench.trace`, `bench.tune` (make bench, bench-decode, acceptance, bench-budget, bench-serve,
tune)."""

import sys

from qwen3_model.cli.interrupts import CtrlC

imports = CtrlC("bench", at_the_end=False)
if sys.argv[:1] == ["-m"]:  # `python -m bench.NAME`: from here to command.run, torch is imported
    imports.__enter__()
