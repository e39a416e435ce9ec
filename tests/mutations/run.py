"""Plant known bugs, one at a time, and see each caught by the test that guards against it.

A bug is an exact replacement of text (table.py), made in a temporary copy of the repository. It is caught
when its test passes without it and fails with it by an assertion about values: an import that breaks proves
nothing. A bug that no longer applies is an error. Kernels are interpreted, so races and the order of sums
inside a compiled reduction or dot are not among the bugs: `make gpu-check` is for those."""

from __future__ import annotations

import importlib.util
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

from bench.command import Parser, fail, positive
from bench.report import print_tables
from qwen3_model.cli.output import write_atomically

from .table import BUGS, Bug

COMMAND = "tests.mutations.run"
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/mutations.md"
COPIED = ("src", "tests", "bench", "tools", "docs", "README.md", "pyproject.toml")
LIMIT = 900  # seconds of a process, on a busy machine: a bug may make a loop endless
PREFACE = """# Planted bugs

What shows that the tests can fail. `make mutations` plants each of these bugs in a copy of the repository,
one at a time, and runs the test beside it, which must pass without the bug and fail with it by an assertion
about values. Some bugs of the drafter leave the text alone: a test of the text must pass with them too. The
bugs are data, `tests/mutations/table.py`. With a rule and its test comes the bug that the test catches; then
`python -m tests.mutations.run --write` writes this page anew.

Kernels run in Triton's interpreter here. Races, and the order of sums inside compiled reductions and dots,
are for `make gpu-check`.
"""


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
    """What probe.py reports; of a process that left no report, what it said last."""
    nothing: Report = {"code": None, "passed": [], "failures": []}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.mutations.probe", str(report), *arguments], cwd=copy,
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


def page(bugs: Sequence[Bug]) -> str:
    """docs/mutations.md."""
    head = "bug", "why it matters", "in `src/`", "caught by, in `tests/`", "not seen by"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for bug in bugs:
        unseen = f"`{bug.unseen}`" if bug.unseen else ""
        lines.append(f"| {bug.name} | {bug.why} | `{bug.file}` | `{bug.test}` | {unseen} |")
    return PREFACE + "\n" + "\n".join(lines) + "\n"


def to_json(outcomes: Sequence[Outcome], seconds: float) -> dict[str, object]:
    """The whole run."""
    return {
        "bugs": [
            {"name": o.bug.name, "file": f"src/{o.bug.file}", "test": f"tests/{o.bug.test}",
             "caught": o.caught, "said": o.said, "seconds": round(o.seconds, 1)}
            for o in outcomes
        ],
        "caught": sum(o.caught for o in outcomes),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def parse(arguments: Sequence[str] | None):
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split()).replace("`", ""),
        epilog="example: python -m tests.mutations.run --only 'a sibling is visible' --json (exit code 1: a "
        "bug was not caught)",
    )
    parser.add_argument(
        "--only", metavar="NAME", action="append", help="this bug; may be given several times"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout in place of the table")
    parser.add_argument("--write", action="store_true", help="write docs/mutations.md and run nothing")
    parser.add_argument(
        "--processes",
        type=positive,
        default=min(4, os.cpu_count() or 1),
        help="tests run side by side; default: %(default)s",
    )
    given = parser.parse_args(arguments)
    if given.write and given.only:
        parser.error("--write lists every bug: leave out --only")
    return given


def chosen(names: Sequence[str] | None) -> list[Bug]:
    """The bugs of these names, or all. Raises ValueError for a name that no bug has."""
    known = {bug.name: bug for bug in BUGS}
    for name in names or ():
        if name not in known:
            raise ValueError(f"no bug is called {name!r}: docs/mutations.md lists them")
    return [known[name] for name in dict.fromkeys(names)] if names else list(BUGS)


def print_outcomes(outcomes: Sequence[Outcome], seconds: float) -> None:
    """The table, then what was not caught."""
    lines = []
    for o in outcomes:
        by = o.bug.test if o.caught else "NOT CAUGHT"
        lines.append([o.bug.name, o.bug.file, by, f"{o.seconds:.1f}"])
    print_tables([("Planted bugs", ["bug", "file", "caught by", "seconds"], lines)])
    for o in outcomes:
        if not o.caught:
            print(f"{o.bug.name}: {o.said}")
    print(f"{sum(o.caught for o in outcomes)} of {len(outcomes)} bugs caught; {seconds:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    try:
        bugs = chosen(given.only)
        check_all(ROOT, bugs)
        if given.write:
            write_atomically(PAGE, page(BUGS))
            print(f"wrote {PAGE}")
            return 0
    except (OSError, ValueError) as error:
        fail(COMMAND, str(error))
    missing = [n for n in ("pytest", "pytest_timeout", "hypothesis") if not importlib.util.find_spec(n)]
    if missing:
        fail(COMMAND, f"{', '.join(missing)} missing: pip install -e '.[test]'")
    began, outcomes = time.perf_counter(), list[Outcome]()
    for outcome in prove(ROOT, bugs, given.processes):
        outcomes.append(outcome)
        verdict = "caught" if outcome.caught else "NOT CAUGHT"
        print(
            f"{len(outcomes)}/{len(bugs)} {verdict}: {outcome.bug.name} ({outcome.seconds:.1f} s)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    outcomes.sort(key=lambda o: bugs.index(o.bug))
    seconds = time.perf_counter() - began
    if given.json:
        print(json.dumps(to_json(outcomes, seconds)))
    else:
        print_outcomes(outcomes, seconds)
    return 0 if all(o.caught for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
