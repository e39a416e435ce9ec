"""Does strategy "auto" find the fastest cycle? Tokens a second of every fixed kind of cycle and of auto, on
predictable, mixed and noisy prompts, with the embedded checkpoint. Larger models: bench.decode --replay."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.budget import CHAIN, ONE_PASS, PLAIN, TREES

from . import report
from .budget_run import decode, prompt_sets
from .command import Parser, fail, positive, writable
from .measure import machine, machine_line

COMMAND = "bench.budget"
ROUNDS = 5  # over all kinds, of which the median counts
FIXED = (PLAIN, CHAIN, *TREES, ONE_PASS)
NAMES = {str(PLAIN): "plain", str(CHAIN): "chain", str(ONE_PASS): "one-pass", "auto": "auto"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --prompts 20 --json runs/budget.json",
    )  # fmt: skip
    parser.add_argument("--prompts", type=positive, default=20, metavar="N", help="of each set (default: 20)")
    parser.add_argument("--tokens", type=positive, default=384, metavar="N", help="new ones (default: 384)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures there")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "times need a GPU, and there is none")
    try:
        found = measure(given.prompts, given.tokens)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(f"python -m {COMMAND} --prompts {given.prompts} --tokens {given.tokens}")
    console = Console(highlight=False)
    for row in found:
        console.print(_table(row))
    console.print(machine_line(facts), soft_wrap=True)
    if given.json:
        report.write_json(given.json, {"machine": facts, "sets": found})
    return 0 if all(row["identical"] for row in found) else 1


def measure(prompts: int, new_tokens: int) -> list[dict[str, Any]]:
    """One row a prompt set: tokens a second by kind, as a share of the best fixed one."""
    model = Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)
    rows = []
    for prompt_set in prompt_sets(model, prompts):
        kinds = [str(kind) for kind in FIXED] + ["auto"]
        rounds = []
        for _ in range(1 + ROUNDS):  # the first one compiles and captures
            rounds.append({
                kind: decode(model, prompt_set, kind if kind == "auto" else int(kind), new_tokens)
                for kind in kinds
            })  # fmt: skip
        texts = rounds[0][str(PLAIN)]["texts"]
        same = all(run["texts"] == texts for found in rounds for run in found.values())
        rates = {kind: median(found[kind]["tokens_per_second"] for found in rounds[1:]) for kind in kinds}
        rows.append(_row("embedded", prompt_set.name, rates, same))
        rows[-1]["tokens_per_cycle"] = {kind: run["tokens_per_cycle"] for kind, run in rounds[-1].items()}
        rows[-1]["cycles_of"] = rounds[-1]["auto"]["cycles_of"]
        print(f"  {prompt_set.name}: auto {rows[-1]['auto_of_best']:.3f} of the best", flush=True)
    return rows


def _row(model: str, set_name: str, rates: dict[str, float], identical: bool) -> dict[str, Any]:
    best = max((kind for kind in rates if kind != "auto"), key=lambda kind: rates[kind])
    return {
        "model": model, "prompts": set_name, "tokens_per_second": rates, "best": best,
        "auto_of_best": rates["auto"] / rates[best], "auto_of_plain": rates["auto"] / rates[str(PLAIN)],
        "identical": identical,
    }  # fmt: skip


def _table(row: dict[str, Any]) -> Table:
    table = Table(title=f"{row['model']}, {row['prompts']}")
    for kind in row["tokens_per_second"]:
        table.add_column(NAMES.get(kind, f"tree {kind}"), justify="right")
    table.add_column("auto / best", justify="right")
    table.add_row(
        *(f"{rate:.0f}" for rate in row["tokens_per_second"].values()), f"{row['auto_of_best']:.3f}"
    )
    if "tokens_per_cycle" in row:
        table.add_row(*(f"{n:.2f} a cycle" for n in row["tokens_per_cycle"].values()), "")
    return table


if __name__ == "__main__":
    sys.exit(main())
