"""How long a user waits for the first token: milliseconds from `model.generate` to it, by the prompt's size.

Random weights at the shapes of Qwen3, bf16. The first call of a length compiles and captures and is not
timed; the median is of the calls behind it."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from qwen3_model import InputError, Qwen3

from . import report
from .command import Parser, fail, positive, run, writable
from .measure import free_memory, machine, machine_line
from .models import NAMES, WHOLE, random_model

COMMAND = "bench.first_token"
CALLS = 3  # that are timed


def first_token_ms(model: Qwen3, prompt: Sequence[int]) -> float:
    """Of one call, its prompt's passes and the choice of the token included."""
    ended: list[float] = []
    began = time.perf_counter()
    model.generate(
        prompt, "autoregressive", 1, on_tokens=lambda ids, text: ended.append(time.perf_counter())
    ).whole()
    return 1e3 * (ended[0] - began)


def measure(model: Qwen3, name: str, tokens: int) -> dict[str, Any]:
    """A row of the results, for a prompt of random tokens. Raises InputError where it does not fit."""
    rng = random.Random(0)
    prompt = [rng.randrange(model.config.vocab_size - 1) for _ in range(tokens)]
    _, *times = (round(first_token_ms(model, prompt), 3) for _ in range(1 + CALLS))
    return {"model": name, "prompt_tokens": tokens, "ms": median(times), "calls_ms": times}


def table(rows: Sequence[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """A line a model and prompt."""
    lines = [
        [r["model"], str(r["prompt_tokens"]), *(report.number(ms) for ms in (r["ms"], *ends)),
         f"{1e3 * r['prompt_tokens'] / r['ms']:.0f}"]
        for r in rows for ends in [(min(r["calls_ms"]), max(r["calls_ms"]))]
    ]  # fmt: skip
    head = ["model", "prompt", "ms", "least", "most", "prompt tokens/s"]
    return f"from generate to the first token, median of {CALLS} calls", head, lines


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog=f"example: python -m {COMMAND} --models 8B --prompts 1k 32k --json runs/first.json",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(WHOLE),
        default=["8B", "1.7B"],
        metavar="MODEL",
        help=f"{NAMES} (default: 8B 1.7B)",
    )
    parser.add_argument("--prompts", nargs="+", type=positive, default=[1024, 4096, 32768], metavar="N",
                        help="tokens of a prompt; default: 1k 4k 32k")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "times need a GPU, and there is none")
    began, rows = time.perf_counter(), list[dict[str, Any]]()
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    try:
        for name in dict.fromkeys(given.models):
            model = random_model(name)
            rows += [measure(model, name, tokens) for tokens in sorted(set(given.prompts))]
            del model
            free_memory()
    except InputError as error:
        fail(COMMAND, str(error))
    report.print_tables([table(rows)])
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        report.write_json(given.json, {"machine": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
