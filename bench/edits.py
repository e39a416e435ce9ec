"""Tokens a cycle of draft trees with what lookup finds as a branch, and without: on texts that repeat, a
piece of a file and then its edit, and on others, the held-out prompts themselves.

An edit is made of a held-out prompt of the embedded checkpoint: the prompt, then its first two thirds once
more, in which its most frequent name is another one (`new_` before it). What the model writes behind that may
follow the piece above, with the other name. Texts are the same with and without; only the number of cycles
differs."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts

from . import report
from .acceptance import Measured, Setting, measure
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line

COMMAND = "bench.edits"
NAME = re.compile(r"\b[A-Za-z_]\w{3,}\b")
SETS = ("edits", "others")
LEAST = 3  # times that a name stands in a piece


def edit(piece: str) -> str | None:
    """A piece of a file and the begin of its edit; None where no name stands in it LEAST times.

    The end of the last line is left out: it is one token with the indentation that follows, and alone it
    would say that the piece is over."""
    names = Counter(name for name in NAME.findall(piece) if not keyword.iskeyword(name))
    name, times = max(names.items(), key=lambda item: item[1], default=("", 0))
    if times < LEAST:
        return None
    lines = piece.splitlines(keepends=True)
    begin = "".join(lines[: max(len(lines) * 2 // 3, 1)]).rstrip()
    return f"{piece}\n\n\n" + re.sub(rf"\b{name}\b", f"new_{name}", begin)


def prompts_of(name: str, count: int, split: str) -> list[str]:
    """So many edits, or as many held-out prompts."""
    held_out = read_prompts(EMBEDDED / "held_out.jsonl", split=split)
    edits = [made for made in map(edit, held_out) if made is not None]
    return (edits if name == "edits" else held_out)[:count]


def both(
    model: Qwen3, prompts: Sequence[Sequence[int]], setting: Setting, new_tokens: int
) -> Iterator[Measured]:
    """A setting with the branch and without."""
    whole = model.ops
    try:
        for ops in (whole, replace(whole, branch=lambda *_: None)):
            model.engine.forget()  # its cycles, captured with other operations
            model.ops = ops
            yield from measure(model, prompts, [setting], new_tokens, seed=0)
    finally:
        model.ops = whole


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --limit 20 --nodes 31 --json runs/edits.json",
    )  # fmt: skip
    parser.add_argument("--limit", type=positive, default=100, metavar="N", help="of each set (default: 100)")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="new ones (default: 256)")
    parser.add_argument("--nodes", type=positive, default=63, metavar="N", help="of a tree (default: 63)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="default: both")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="default: test")
    parser.add_argument("--device", help="cuda, cpu (default: CUDA if there)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures there")
    given = parser.parse_args(arguments)
    began, rows, lines = time.perf_counter(), list[dict[str, Any]](), list[list[str]]()
    try:
        model = Qwen3.from_pretrained(EMBEDDED, given.device, progress=False)
        assert model.text is not None
        for name in given.sets:
            prompts = [model.text.encode(text) for text in prompts_of(name, given.limit, given.split)]
            for temperature in (0.0, 0.8):
                found, without = both(model, prompts, Setting(temperature, given.nodes), given.tokens)
                gains = found.per_cycle / without.per_cycle, found.per_second / without.per_second
                rows.append({
                    "prompts": name, "with": found.to_dict(), "without": without.to_dict(),
                    "cycle": round(gains[0], 4), "second": round(gains[1], 4),
                })  # fmt: skip
                lines.append([
                    f"{name}, T {temperature:g}", str(len(prompts)), f"{found.per_cycle:.2f}",
                    f"{without.per_cycle:.2f}", f"{gains[0]:.3f}x", f"{gains[1]:.3f}x",
                ])  # fmt: skip
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    head = ["texts", "prompts", "tokens/cycle", "without lookup", "cycle", "second"]
    report.print_tables([(f"trees of {given.nodes} with lookup's branch", head, lines)])
    print(f"{model.dtype}, {model.backend}, {machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        report.write_json(given.json, {"machine": facts, "nodes": given.nodes, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
