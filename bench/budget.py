"""Does strategy "auto" find the fastest cycle? Tokens a second of every fixed kind of cycle and of auto, on
predictable, mixed and noisy prompts, with the embedded checkpoint. Larger models: bench.decode --replay."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table

from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli.terminal import new_console
from qwen3_model.decode.controller import CHAIN, LOOKUP, PLAIN
from qwen3_model.prompts import read_prompts

from . import report
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line
from .trace_file import ONE_PASS, TREES

COMMAND = "bench.budget"
ROUNDS = 5  # over all kinds, of which the median counts
FIXED = (PLAIN, LOOKUP, CHAIN, *TREES, ONE_PASS)
NAMES = {str(PLAIN): "plain", str(LOOKUP): "lookup", str(CHAIN): "chain", ONE_PASS: ONE_PASS, "auto": "auto"}
PROMPT_TOKENS = 64  # of noise
SEED = 1
SETS = ("predictable", "mixed", "noise")
_FIELDS = ("name", "size", "colour", "weight", "owner", "index", "label", "parent", "width", "height")


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are decoded with the same settings."""

    name: str
    prompts: list[list[int]]
    temperature: float


def prompt_sets(model: Qwen3, count: int) -> list[PromptSet]:
    """Predictable: classes of accessors, greedily; mixed: the held-out prompts, greedily; noise: random
    tokens at temperature 1.5."""
    assert model.text is not None
    rng = random.Random(0)
    accessors = []
    for _ in range(count):
        names = rng.sample(_FIELDS, 4)
        code = "".join(f"    def get_{n}(self):\n        return self._{n}\n\n" for n in names)
        accessors.append(model.text.encode(f"class Box:\n{code}    def get_"))
    held_out = [model.text.encode(p) for p in read_prompts(EMBEDDED / "held_out.jsonl", count, split="test")]
    noise = [[rng.randrange(model.config.vocab_size - 8) for _ in range(PROMPT_TOKENS)] for _ in range(count)]
    at = 0.0, 0.0, 1.5
    return [
        PromptSet(name, prompts, temperature)
        for name, prompts, temperature in zip(SETS, (accessors, held_out, noise), at, strict=True)
    ]


def decode(model: Qwen3, prompts: PromptSet, kind: int | str, new_tokens: int) -> dict[str, Any]:
    """Tokens a second of a whole set, tokens a cycle and how many cycles of each kind. kind: of
    qwen3_model/decode/controller.py, "one-pass" or "auto". Raises InputError for texts without a cycle."""
    of_kind = {
        PLAIN: ("autoregressive", 0), LOOKUP: ("lookup", 0), ONE_PASS: (ONE_PASS, "auto"),
        "auto": ("auto", "auto"),
    }  # fmt: skip
    strategy, tree = of_kind.get(kind, ("two-pass", kind))
    cycles_of: Counter[str] = Counter()
    tokens = cycles = kept = 0
    seconds = 0.0
    texts = []
    for prompt in prompts.prompts:
        result = model.generate(
            prompt, strategy, new_tokens, temperature=prompts.temperature, seed=SEED, tree_nodes=tree
        ).whole()
        s = result.stats
        tokens, seconds = tokens + s.tokens, seconds + s.seconds
        cycles, kept = cycles + s.cycles, kept + s.cycle_tokens
        cycles_of.update(s.cycles_of)
        texts.append(result.token_ids)
    if cycles == 0:
        raise InputError(f"the texts behind the {prompts.name} prompts end with their first token")
    return {
        "tokens_per_second": tokens / seconds, "tokens_per_cycle": kept / cycles, "texts": texts,
        "cycles_of": dict(cycles_of),
    }  # fmt: skip


def measure(model: Qwen3, prompts: PromptSet, new_tokens: int) -> dict[str, Any]:
    """Tokens a second by kind, in turn, as a share of the best fixed one: a row of the results."""
    kinds = [*FIXED, "auto"]
    # the first round compiles and captures
    rounds = [{str(k): decode(model, prompts, k, new_tokens) for k in kinds} for _ in range(1 + ROUNDS)]
    texts = rounds[0][str(PLAIN)]["texts"]
    rates = {k: median(found[k]["tokens_per_second"] for found in rounds[1:]) for k in rounds[0]}
    best = max((k for k in rates if k != "auto"), key=lambda k: rates[k])
    return {
        "model": "embedded", "prompts": prompts.name, "tokens_per_second": rates, "best": best,
        "auto_of_best": rates["auto"] / rates[best], "auto_of_plain": rates["auto"] / rates[str(PLAIN)],
        "identical": all(run["texts"] == texts for found in rounds for run in found.values()),
        "tokens_per_cycle": {k: run["tokens_per_cycle"] for k, run in rounds[-1].items()},
        "cycles_of": rounds[-1]["auto"]["cycles_of"],
    }  # fmt: skip


def _table(row: dict[str, Any]) -> Table:
    table = Table(title=f"{row['model']}, {row['prompts']}")
    for kind in row["tokens_per_second"]:
        table.add_column(NAMES.get(kind, f"tree {kind}"), justify="right")
    table.add_column("auto / best", justify="right")
    table.add_row(
        *(f"{rate:.0f}" for rate in row["tokens_per_second"].values()), f"{row['auto_of_best']:.3f}"
    )
    table.add_row(*(f"{n:.2f} a cycle" for n in row["tokens_per_cycle"].values()), "")
    return table


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
    facts = machine(f"python -m {COMMAND} --prompts {given.prompts} --tokens {given.tokens}")
    console, found = new_console(), list[dict[str, Any]]()
    try:
        model = Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)
        for prompts in prompt_sets(model, given.prompts):
            found.append(measure(model, prompts, given.tokens))
            console.print(_table(found[-1]))
    except InputError as error:
        fail(COMMAND, str(error))
    console.print(machine_line(facts), soft_wrap=True)
    if given.json:
        report.write_json(given.json, {"machine": facts, "sets": found})
    return 0 if all(row["identical"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
