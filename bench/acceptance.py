"""Tokens a cycle and a forward pass by draft: a chain, trees of several sizes, and what "auto" chooses, at
several temperatures. At temperatures above 0 also a chain verified by rejection sampling.

With --one-pass also cycles of one pass. Every prompt is decoded with each setting; texts never depend on it,
only the number of cycles does, but for rejection sampling, whose texts are other samples. The interval is a
bootstrap over prompts. Agreement at offset d: the share of cycles whose first d proposals were all the
target's own, or accepted."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts
from qwen3_model.request import MOST_NODES

from . import report
from .acceptance_run import Measured, Setting, measure, plot, table
from .command import Parser, fail, positive, writable
from .measure import machine, machine_line

COMMAND = "bench.acceptance"


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature, 0 or above")
    return value


def _nodes(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) > MOST_NODES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto or a number of nodes, 0 (a chain) to {MOST_NODES}"
        )
    return int(text)


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog=f"example: python -m {COMMAND} --limit 50 --nodes 0 64 --temperatures 0 --json runs/a.json",
    )
    parser.add_argument(
        "prompts", nargs="?", type=Path, metavar="PROMPTS.jsonl",
        help="a prompt a line (default: the embedded checkpoint's held-out ones)",
    )  # fmt: skip
    parser.add_argument("--model", default=EMBEDDED, help="an Orthrus-Qwen3: folder or hub id")
    parser.add_argument("--device", help="cuda, cpu (default: CUDA if there)")
    parser.add_argument("--dtype", help="float32, bfloat16 (default: the checkpoint's on CUDA)")
    parser.add_argument("--backend", default="auto", help="reference, triton, torch or auto")
    parser.add_argument("--field", help="field of a line that holds the prompt")
    parser.add_argument("--split", help="lines of this split only (default of the held-out ones: test)")
    parser.add_argument("--limit", type=positive, default=100, metavar="N", help="prompts (default: 100)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: 256")
    parser.add_argument("--nodes", nargs="+", type=_nodes, metavar="N",
                        default=[0, 16, 32, 64, 128, "auto"],
                        help="trees to try; 0 is the chain (default: 0 16 32 64 128 auto)")  # fmt: skip
    parser.add_argument("--one-pass", nargs="*", type=_nodes, default=[], metavar="N",
                        help="also one-pass cycles with such trees; auto: of their default size")  # fmt: skip
    parser.add_argument("--temperatures", nargs="+", type=_temperature, default=[0.0, 0.6, 1.0], metavar="T",
                        help="default: 0 0.6 1")  # fmt: skip
    parser.add_argument("--top-k", type=positive, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="prompt i takes S + i (default: 0)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=writable, metavar="FILE", help="draw both pictures into FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail(COMMAND, "--plot needs matplotlib: pip install -e '.[bench]'")
    began = time.perf_counter()
    settings = []
    for t in dict.fromkeys(given.temperatures):
        settings += [Setting(t, n) for n in dict.fromkeys(given.nodes)]
        settings += [Setting(t, 0, "rejection")] if t > 0 else []
        settings += [Setting(t, n, strategy="one-pass") for n in dict.fromkeys(given.one_pass)]
    found: list[Measured] = []
    try:
        held_out = given.prompts is None
        texts = read_prompts(
            EMBEDDED / "held_out.jsonl" if held_out else given.prompts, given.limit, given.field,
            given.split or ("test" if held_out else None),
        )  # fmt: skip
        model = Qwen3.from_pretrained(given.model, given.device, given.dtype, given.backend)
        if model.text is None:
            raise InputError("this checkpoint has no tokenizer.json, which prompts need")
        prompts = [model.text.encode(text) for text in texts]
        sampling = {"top_k": given.top_k or 0, "top_p": given.top_p}
        for measured in measure(
            model, prompts, settings, given.max_new_tokens, given.seed, _said, **sampling
        ):
            found.append(measured)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    report.print_tables([table(found)])
    line = f"{model.dtype}, {model.backend}, {machine_line(facts)}; {time.perf_counter() - began:.0f} s"
    print(line)
    if given.json:
        figures = {
            "machine": facts, "dtype": str(model.dtype).removeprefix("torch."), "backend": model.backend,
            "max_new_tokens": given.max_new_tokens, "settings": [m.to_dict() for m in found],
        }  # fmt: skip
        report.write_json(given.json, figures)
    if given.plot:
        on = f"{facts['gpu'] or 'CPU'}, {str(model.dtype).removeprefix('torch.')}, {facts['date']}"
        plot(given.plot, [m.to_dict() for m in found], f"{len(prompts)} prompts, {on}")
    return 0


def _said(setting: str, done: int, of: int) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(
            f"\r  {setting}: {done} of {of} prompts   ",
            end="" if done < of else "\n",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
