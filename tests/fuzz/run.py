"""Fuzz: python tests/fuzz/run.py NAME --seed S --count N. Exit code 1 where anything was found.

example: python tests/fuzz/run.py config --seed 7 --count 50000"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing import NAMES, fuzz, fuzzer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

SHOWN = 5  # findings of a kind


def main() -> int:
    """Run one fuzzer and print what it found by kind."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=(__doc__ or "").splitlines()[-1]
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--count", type=int, help="cases (default: those of make test-slow)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    module = fuzzer(args.name)
    count = module.COUNT if args.count is None else args.count
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(args.name, total=count)
        report = fuzz(args.name, args.seed, count, args.first, lambda: progress.advance(task))
    if args.json:
        print(json.dumps(asdict(report) | {"by_kind": report.by_kind()}))
        return int(bool(report.findings))
    table = Table("kind", "found", "promise", title=f"{args.name}: {report.cases} cases, seed {args.seed}")
    for kind, found in report.by_kind().items():
        table.add_row(kind, str(found), module.KINDS[kind])
    Console().print(table)
    print(f"slowest case {report.longest:.1f} s")
    for kind in module.KINDS:
        for finding in [f for f in report.findings if f.kind == kind][:SHOWN]:
            print(f"{kind}, case {finding.case}: {finding.detail}")
    return int(bool(report.findings))


if __name__ == "__main__":
    sys.exit(main())
