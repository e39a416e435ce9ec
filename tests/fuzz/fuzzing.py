"""What fuzzers share: a case is a function of (seed, index) alone, and a finding says how to see it again.

A fuzzer is a module `fuzz_NAME.py` with `COUNT` (cases of `make test-slow`), `KINDS` (what it finds, each
with the promise a finding breaks) and `case(rng, folder) -> findings`. `folder` is an empty folder of the
case's own. Run any number of cases with `python tests/fuzz/run.py NAME --seed S --count N`."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

LONGEST_LINE = 500  # characters that a message may have
HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py")))


@dataclass(frozen=True)
class Finding:
    """A broken promise. kind: of the fuzzer's KINDS."""

    kind: str
    detail: str
    case: str = ""  # "seed:index", filled in by `fuzz`


@dataclass
class Report:
    """What a run found. longest: seconds of the slowest case."""

    name: str
    seed: int
    cases: int = 0
    findings: list[Finding] = field(default_factory=list)
    longest: float = 0.0

    def by_kind(self) -> dict[str, int]:
        """Findings of each kind that the fuzzer looks for."""
        kinds = dict.fromkeys(fuzzer(self.name).KINDS, 0)
        for finding in self.findings:
            kinds[finding.kind] += 1
        return kinds


def fuzzer(name: str) -> Any:
    """The module of a fuzzer."""
    for folder in (HERE, HERE.parent / "helpers"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return import_module(f"fuzz_{name}")


def fuzz(
    name: str, seed: int, count: int, first: int = 0, on_case: Callable[[], None] | None = None
) -> Report:
    """Run `count` cases from number `first` on."""
    module, report = fuzzer(name), Report(name, seed)
    for index in range(first, first + count):
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        began = time.perf_counter()
        try:
            found = list(module.case(random.Random(f"{name}:{seed}:{index}"), folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        report.longest = max(report.longest, time.perf_counter() - began)
        report.cases += 1
        report.findings += [Finding(f.kind, f.detail, f"{seed}:{index}") for f in found]
        if on_case is not None:
            on_case()
    return report


@dataclass
class Said:
    """What a command line said and how it ended. error: an exception that came out of it, a traceback to who
    runs it in a shell."""

    code: int | None
    out: str
    err: str
    error: BaseException | None


def message_faults(said: Said) -> Iterator[Finding]:
    """What is wrong with how a command line said no: the kinds "traceback", "long line", "escape" and "not
    one line", which a fuzzer of command lines has among its KINDS."""
    if said.error is not None:
        yield Finding("traceback", f"{type(said.error).__name__}: {str(said.error)[:200]!r}")
        return
    if "Traceback" in said.err:
        yield Finding("traceback", said.err[-300:])
    if any(len(line) > LONGEST_LINE for line in said.err.splitlines()):
        yield Finding("long line", f"{max(map(len, said.err.splitlines()))} characters")
    if any(not c.isprintable() for c in said.err.replace("\n", "")):
        yield Finding("escape", ascii(said.err[:200]))
    if said.code == 2 and (said.err.count("\n") != 1 or said.out):
        yield Finding("not one line", ascii((said.err + said.out)[:200]))
