"""Plant known bugs, one at a time, and see each caught by the test that guards against it.

A bug is an exact replacement of text (mutation_table.py), made in a temporary copy of the repository. It is
caught when its test passes without it and fails with it by an assertion about values: an import that breaks
proves nothing. A bug that no longer applies is an error. Kernels are interpreted, so races and the order of
sums inside a compiled reduction or dot are not among the bugs: `make gpu-check` is for those."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qwen3_model.cli.output import write_atomically

from .command import Parser, fail, positive
from .mutation_run import Outcome, check_all, prove
from .mutation_table import BUGS, Bug
from .report import print_tables

COMMAND = "bench.mutations"
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/mutations.md"
PREFACE = """# Planted bugs

What shows that the tests can fail. `make mutations` plants each of these bugs in a copy of the repository,
one at a time, and runs the test beside it, which must pass without the bug and fail with it by an assertion
about values. Some bugs of the drafter leave the text alone: a test of the text must pass with them too. The
bugs are data, `bench/mutation_table.py`. With a rule and its test comes the bug that the test catches; then
`python -m bench.mutations --write` writes this page anew.

Kernels run in Triton's interpreter here. Races, and the order of sums inside compiled reductions and dots,
are for `make gpu-check`.
"""


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
        epilog="example: python -m bench.mutations --only 'a sibling is visible' --json (exit code 1: a bug "
        "was not caught)",
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
