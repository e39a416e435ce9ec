"""Fuzz: python tests/fuzz/run.py [NAME ...] --seed S --count N. Exit code 1 where anything was found.

example: python tests/fuzz/run.py config --seed 7 --count 50000"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing import NAMES, Report, fuzz, fuzzer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

SHOWN = 5  # findings of a kind


def main() -> int:
    """Run fuzzers and print what each found by kind."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=(__doc__ or "").splitlines()[-1]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--count", type=int, help="cases (default: those of make test-slow)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--json", action="store_true", help="one JSON object a fuzzer instead of tables")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(NAMES)):
        parser.error(f"unknown fuzzer {unknown[0]!r}: {', '.join(NAMES)} were expected")
    reports = [run(name, args) for name in args.names or NAMES]
    return int(any(report.findings for report in reports))


def run(name: str, args: argparse.Namespace) -> Report:
    """Run one fuzzer under a progress bar and print its report."""
    count = fuzzer(name).COUNT if args.count is None else args.count
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=count)
        report = fuzz(name, args.seed, count, args.first, lambda: progress.advance(task))
    if args.json:
        print(json.dumps(asdict(report) | {"by_kind": report.by_kind()}))
    else:
        show(report)
    return report


def show(report: Report) -> None:
    """A table of the kinds, and the first findings of each."""
    kinds = fuzzer(report.name).KINDS
    table = Table(
        "kind", "found", "promise", title=f"{report.name}: {report.cases} cases, seed {report.seed}"
    )
    for kind, found in report.by_kind().items():
        table.add_row(kind, str(found), kinds[kind])
    Console().print(table)
    print(f"slowest case {report.longest:.1f} s")
    for kind in kinds:
        for finding in [f for f in report.findings if f.kind == kind][:SHOWN]:
            print(f"{kind}, case {finding.case}: {finding.detail}")


if __name__ == "__main__":
    sys.exit(main())
