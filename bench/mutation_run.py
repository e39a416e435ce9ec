"""Plant a bug in a temporary copy of the repository, run the test that must catch it, judge how it failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mutation_table import Bug

COPIED = ("src", "tests", "bench", "pyproject.toml")
LIMIT = 900  # seconds of a process, on a busy machine: a bug may make a loop endless

Report = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a bug. said: the assertion that caught it, or why it does not count as caught."""

    bug: Bug
    caught: bool
    said: str
    seconds: float


def planted(bug: Bug, source: str) -> str:
    """The source with the bug in it. Raises ValueError unless the text to be replaced is there once."""
    count = source.count(bug.old)
    if count != 1:
        raise ValueError(
            f"{bug.name!r} does not apply: src/{bug.file} holds {bug.old!r} {count} times, not once"
        )
    return source.replace(bug.old, bug.new)


def check_all(root: Path, bugs: Sequence[Bug]) -> None:
    """Raises ValueError for the first bug that does not apply, OSError for a file that is not there."""
    for bug in bugs:
        planted(bug, (root / "src" / bug.file).read_text(encoding="utf-8"))


def prove(root: Path, bugs: Sequence[Bug], processes: int) -> Iterator[Outcome]:
    """Outcomes in the order in which they come. The tests run without a bug first; where one does not pass
    then, its bugs are not caught."""
    tests = sorted({test for bug in bugs for test in (bug.test, bug.unseen) if test})
    pool = ThreadPoolExecutor(processes)
    try:
        clean = pool.submit(run, root, tests)
        running = {pool.submit(run, root, [bug.unseen, bug.test], bug): bug for bug in bugs}
        for done in as_completed(running):
            report, seconds = done.result()
            wrong = before(running[done], clean.result()[0])
            caught, said = (False, wrong) if wrong else judge(running[done], report)
            yield Outcome(running[done], caught, said, seconds)
    finally:
        pool.shutdown(cancel_futures=True)


def run(root: Path, tests: Sequence[str], bug: Bug | None = None) -> tuple[Report, float]:
    """(the probe's report, seconds) of tests in a copy of the repository, up to the first that fails where a
    bug is planted."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy, report = Path(folder).resolve() / "copy", Path(folder) / "report.json"
        copy.mkdir()
        for name in COPIED:
            if (root / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", ".*")
                shutil.copytree(root / name, copy / name, ignore=ignored)
            else:
                shutil.copy(root / name, copy / name)
        if bug:
            file = copy / "src" / bug.file
            file.write_text(planted(bug, file.read_text(encoding="utf-8")), encoding="utf-8")
        named = [f"tests/{test}" for test in tests if test]
        found = _probe(copy, report, ["-x", *named] if bug else named)
    return found, time.perf_counter() - began


def _probe(copy: Path, report: Path, arguments: Sequence[str]) -> Report:
    """What mutation_probe reports; of a process that left no report, what it said last."""
    nothing: Report = {"code": None, "passed": [], "failures": []}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.mutation_probe", str(report), *arguments], cwd=copy,
            timeout=LIMIT, env=environment(copy), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return nothing | {"said": f"not done after {LIMIT} s"}
    last = " ".join(done.stdout.split())[-200:]
    if not report.exists():
        return nothing | {"said": f"exit code {done.returncode}: {last}"}
    found = json.loads(report.read_text(encoding="utf-8"))
    inside = str(copy / "src")
    for failure in found["failures"]:
        failure["in_src"] = failure["source"].startswith(inside)
    return found | {"said": f"exit code {found['code']}: {last}"}


def environment(copy: Path) -> dict[str, str]:
    """For a process in the copy: its sources before any installed ones, one thread, interpreted kernels,
    nothing of a pytest around this one."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    paths = [str(copy / "src"), str(copy), env.get("PYTHONPATH", "")]
    return env | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": "1",
        "ORTHRUS_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def is_of(node: str, test: str) -> bool:
    """Whether a node is the test, or one of its parameters."""
    return node == f"tests/{test}" or node.startswith(f"tests/{test}[")


def before(bug: Bug, clean: Report) -> str:
    """Why the tests of a bug prove nothing: they do not pass without it. Empty when they do."""
    for test in filter(None, (bug.test, bug.unseen)):
        broken = [f for f in clean["failures"] if is_of(f["test"], test)]
        if broken:
            return f"{test} fails without the bug: {broken[0]['said']}"
        if not any(is_of(node, test) for node in clean["passed"]):
            return f"{test} did not run without the bug: {clean['said']}"
    return ""


def judge(bug: Bug, report: Report) -> tuple[bool, str]:
    """(caught, what was said) with the bug planted."""
    if bug.unseen and not any(is_of(node, bug.unseen) for node in report["passed"]):
        return False, f"{bug.unseen} should not see it: {_why(report)}"
    if not report["failures"]:
        return False, f"{bug.test} does not see it: {report['said']}"
    failure = report["failures"][0]
    if failure["error"] != "AssertionError" or failure["in_src"] or not is_of(failure["test"], bug.test):
        return False, f"it failed, but not by an assertion of {bug.test}: {_why(report)}"
    return True, failure["said"]


def _why(report: Report) -> str:
    """The first failure, or how the process ended."""
    if not report["failures"]:
        return report["said"]
    failure = report["failures"][0]
    return f"{failure['test']}, {failure['error']}, {failure['said']}"
