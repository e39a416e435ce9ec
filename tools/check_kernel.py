"""What an edit of one kernel did: its tests, what it compiles to for sm_90 and, on a GPU, its time, each
beside the same of a base commit.

Tests run in Triton's interpreter where there is no GPU. Registers, spills and shared memory are ptxas's and
need none. Times are taken only when all tests pass: base and new take turns in one run."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import kernels
from bench.cases import OPS
from bench.command import Parser, fail, positive, writable
from bench.measure import machine, machine_line
from bench.models import MODELS
from bench.report import number, print_tables, write_json

from . import trees
from .gpu_check import Outcome, need_pytest, run_tests

COMMAND = "tools.check_kernel"
ROOT = Path(__file__).resolve().parents[1]
NOISE = 0.01  # a difference below this share is called none, however often it is seen
FIGURES = {"registers": "registers", "spill_bytes": "B spilled", "shared": "B shared"}


@dataclass(frozen=True)
class Op:
    """Where an operation's tests and kernels are."""

    tests: tuple[str, ...]  # below tests/
    kernels: tuple[str, ...]


_ROWS = ("kernels/test_rowwise.py",)
_CHOICE = (
    "kernels/test_choice_kernels.py", "kernels/test_choice_edges.py", "kernels/test_mixed_choices.py",
    "test_choice.py",
)  # fmt: skip
_CHOOSE = Op(_CHOICE, (
    "_tile_best_kernel", "_row_best_kernel", "_group_best_kernel", "_choose_top_k_kernel",
    "_tops_kernel",
    "_count_kernel", "_bounds_kernel", "_list_kernel", "_edge_kernel", "_log_probabilities_kernel",
))  # fmt: skip
# Any other operation of the bench: tests/kernels/test_<op>.py and _<op>_kernel.
KNOWN = {
    "linear": Op(
        (
            "kernels/test_linear.py",
            "kernels/test_quantised_linears.py",
            "kernels/test_rounded_rows.py",
            "kernels/test_tables.py",
            "kernels/test_gluon_wide.py",
        ),
        (
            "_linear_kernel",
            "_linear_gluon_kernel",
            "_linear_gluon_wide_kernel",
            "_linear_gluon_codes_kernel",
            "_quantise_rows_kernel",
        ),
    ),
    "attention": Op(
        (
            "kernels/test_attention_kernels.py",
            "test_attention.py",
            "test_pass_tables.py",
            "kernels/test_gluon_attention.py",
        ),
        ("_partial_kernel", "_combine_kernel", "_path_kernel", "_whole_kernel", "_attention_gluon_kernel"),
    ),
    "head": Op(("kernels/test_head.py",), ("_head_kernel", "_merge_kernel")),
    "rms_norm": Op(_ROWS, ("_rms_norm_kernel",)),
    "add_rms_norm": Op(_ROWS, ("_rms_norm_kernel",)),
    "qk_norm_rope": Op(_ROWS, ("_qk_norm_rope_kernel",)),
    "swiglu": Op(_ROWS, ("_swiglu_kernel",)),
    "embedding": Op(_ROWS, ("_embedding_kernel",)),
    "choose": _CHOOSE,
    "candidates": _CHOOSE,
    "likeliest": Op(_CHOICE, ("_logits_kernel", "_merge_kernel")),
    "log_sum_exp": Op(_CHOICE, ("_logits_kernel", "_merge_kernel")),
    "commit": Op(("kernels/test_commit.py", "test_cache.py"), ("_commit_kernel",)),
    "blocks": Op(("kernels/test_grow.py", "test_anchors.py"), ("_place_kernel", "_follow_kernel")),
    "lay": Op(("kernels/test_lay.py", "test_pass_tables.py"), ("_lay_kernel",)),
    "rerank": Op(("kernels/test_rerank.py",), ("_rerank_kernel",)),
    "grow": Op(("kernels/test_grow.py", "test_draft_tree.py"), ("_grow_kernel", "_chain_kernel")),
    "allot": Op(("kernels/test_allot.py", "kernels/test_grow.py"), ("_allot_kernel",)),
    "branch": Op(("kernels/test_branch.py",), ("_branch_kernel",)),
    "lookup": Op(("kernels/test_lookup.py",), ("_lookup_kernel",)),
    "walk": Op(("kernels/test_walk.py",), ("_walk_kernel",)),
    "seen_rows": Op(("kernels/test_seen.py",), ("_texts_kernel", "_paths_kernel")),
    "permit": Op(("kernels/test_permit.py",), ("_permit_kernel",)),
}


def operations() -> dict[str, Op]:
    """Every operation that can be checked."""
    others = {op: Op((f"kernels/test_{op}.py",), (f"_{op}_kernel",)) for op in OPS if op not in KNOWN}
    return {**KNOWN, **others}


@dataclass(frozen=True)
class Compiled:
    """One launch of a kernel, compiled before and after; {}: not there, "error": did not compile."""

    kernel: str
    case: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        """It does not compile any more, or spills."""
        return "error" in self.after or bool(self.after.get("spill_bytes"))

    @property
    def verdict(self) -> str:
        if "error" in self.after:
            return "DOES NOT COMPILE"
        if not self.after:
            return "gone"
        if self.failed:
            return "SPILLS"
        if not self.before or "error" in self.before:
            return "new"
        changes = {what: self.after[name] - self.before[name] for name, what in FIGURES.items()}
        return ", ".join(f"{by:+d} {what}" for what, by in changes.items() if by) or "same"


@dataclass(frozen=True)
class Timed:
    """One case of the bench: microseconds of each round before and after, or why there are none."""

    case: str
    before: Sequence[float] | str
    after: Sequence[float] | str

    @property
    def ratios(self) -> list[float]:
        """Time after over before, a round each."""
        if isinstance(self.before, str) or isinstance(self.after, str):
            return []
        return [a / b for a, b in zip(self.after, self.before, strict=True)]

    @property
    def verdict(self) -> str:
        ratios = self.ratios
        if not ratios:
            return "-"
        low, high = min(ratios), max(ratios)
        slower = "slower" if low > 1 + NOISE else "no difference"
        word = "faster" if high < 1 - NOISE else slower
        return f"{word}: {statistics.median(ratios):.3f} of the time ({low:.3f} to {high:.3f})"


@dataclass
class Found:
    """All of a run."""

    op: str
    base: str
    tests: list[Outcome]
    compiled: list[Compiled] = field(default_factory=list)
    speed: list[Timed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of the base, or why there are no times
    failures: list[str] = field(default_factory=list)

    def lines(self) -> list[list[str]]:
        """(check, case, before, after, verdict); launches that compile as before share a line a kernel."""
        lines = [
            ["tests", t.what, "", f"{t.cases - t.failures} of {t.cases} pass", "FAIL" if t.failures else "ok"]
            for t in self.tests
        ]
        for kernel in dict.fromkeys(c.kernel for c in self.compiled):
            mine = [c for c in self.compiled if c.kernel == kernel]
            same = [c for c in mine if c.verdict == "same"]
            lines += [
                [kernel, c.case, figures([c.before]), figures([c.after]), c.verdict]
                for c in mine if c.verdict != "same"
            ]  # fmt: skip
            if same:
                both = figures([c.after for c in same])
                lines.append(
                    [kernel, same[0].case if len(same) == 1 else f"{len(same)} launches", both, both, "same"]
                )
        lines += [["µs", t.case, micros(t.before), micros(t.after), t.verdict] for t in self.speed]
        return lines

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "compiled": [asdict(c) | {"verdict": c.verdict} for c in self.compiled],
            "speed": [asdict(t) | {"verdict": t.verdict} for t in self.speed],
            "ok": not self.failures,
        }


def figures(lines: Sequence[Mapping[str, Any]]) -> str:
    """FIGURES of launches, each from the least to the most: "31 / 0 / 0 to 16384"."""
    if not lines[0]:
        return "-"
    if "error" in lines[0]:
        return lines[0]["error"][:40]
    ends = [(min(line[name] for line in lines), max(line[name] for line in lines)) for name in FIGURES]
    return " / ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in ends)


def micros(times: Sequence[float] | str) -> str:
    return times[:80] if isinstance(times, str) else number(statistics.median(times))


def compare_compiled(found: Found, base: Path, limit: float) -> None:
    """Both trees, one beside the other, into `found`."""
    wanted = operations()[found.op].kernels
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(lambda tree: trees.compiled(tree, wanted, limit), (base, ROOT))
    keys = dict.fromkeys([*after[0], *before[0]])
    found.compiled = [Compiled(*key, before[0].get(key, {}), after[0].get(key, {})) for key in keys]
    if before[1]:
        found.notes.append(f"{found.base} was not compiled: {before[1]}")
    if after[1] or not after[0]:
        found.failures.append(
            f"not compiled: {after[1] or 'no launch of it in tests/helpers/aot_launches.py'}"
        )
    found.failures += [f"{c.kernel}, {c.case}: {c.verdict} {c.after.get('error', '')}".strip()
                       for c in found.compiled if c.failed]  # fmt: skip


def compare_times(found: Found, base: Path, sizes: Mapping, rounds: int) -> None:
    """On this GPU, into `found`."""
    try:
        runs = trees.timed({found.base: base, "the new tree": ROOT}, found.op, sizes, rounds)
    except RuntimeError as error:
        found.failures.append(str(error))
        return
    before, after = runs.values()
    for case in dict.fromkeys([*after[0], *before[0]]):
        found.speed.append(Timed(case, _column(before, case), _column(after, case)))
    found.failures += [f"{t.case}: {t.after}" for t in found.speed if isinstance(t.after, str)]


def _column(rounds: Sequence[Mapping[str, float | str]], case: str) -> list[float] | str:
    values = [r.get(case, "-") for r in rounds]
    return next((v for v in values if isinstance(v, str)), None) or values  # type: ignore[return-value]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: make check-kernel OP=attention CHECK='--base HEAD~1 --rows 1 32 --json check.json'",
    )
    parser.add_argument(
        "op", metavar="OP", choices=sorted(operations()), help=", ".join(sorted(operations()))
    )
    parser.add_argument("--base", default="main", metavar="REF", help="commit to compare with; default: main")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=kernels.QUICK["models"],
                        help="shapes to measure; default: %(default)s")  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=positive, default=kernels.QUICK["rows"],
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--contexts", nargs="+", type=positive, default=kernels.QUICK["contexts"],
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=5, help="of base and new; default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=600,
                        help="for the tests, and again to compile; default: %(default)s")  # fmt: skip
    parser.add_argument("--processes", type=positive, default=min(8, os.cpu_count() or 1),
                        help="of pytest; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    return parser.parse_args(arguments)


def checked(given: Any, base: Path) -> Found:
    """Tests, then what is compiled, then times where nothing failed and there is a GPU."""
    gpu = torch.cuda.is_available()
    files = [ROOT / "tests" / file for file in operations()[given.op].tests]
    device = "cuda" if gpu else "cpu"
    outcomes = run_tests(given.op, files, given.processes, given.seconds, "--seconds", device)
    found = Found(given.op, given.base, outcomes)
    found.failures += [f"{t.what}: {t.said}" for t in outcomes if t.failures]
    compare_compiled(found, base, given.seconds)
    if found.failures:
        found.notes.append("no word on speed: first the above has to pass")
    elif not gpu:
        found.notes.append("no GPU here: nothing was timed, and the tests ran in Triton's interpreter")
    elif given.op not in OPS:
        found.notes.append(f"{given.op} has no case in bench/cases.py: nothing was timed")
    else:
        sizes = {"models": given.models, "rows": given.rows, "contexts": given.contexts}
        compare_times(found, base, sizes, given.rounds)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    given = parse(arguments)
    need_pytest(COMMAND)
    try:
        with trees.exported(given.base, ROOT) as base:
            found = checked(given, base)
    except trees.NoBase as error:
        fail(COMMAND, str(error))
    facts = machine(f"python -m {COMMAND} {given.op}")
    head = ["check", "case", f"before ({given.base})", "after", "verdict"]
    title = f"{given.op}: this tree against {given.base}; for sm_90 {' / '.join(FIGURES.values())}"
    print_tables([(title, head, found.lines())])
    print(*found.failures, *found.notes, sep="\n")
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        write_json(given.json, {"machine": facts} | found.to_dict())
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
