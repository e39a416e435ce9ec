"""How the distributions of lengths in bench/lengths were made: `python -m bench.lengths_made`.

None is recorded traffic. Lengths are drawn from log-normal distributions, from a seed, and cut at both ends,
so that a prompt and its text fit a context of 4,096. "chat" has short prompts and longer answers, "summarise"
long prompts and short answers. Prompts of "code" are as long as the held-out prompts of the embedded
checkpoint, in tokens of its own small vocabulary; the lengths of what completes them are drawn like the
others."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli.output import write_atomically
from qwen3_model.prompts import read_prompts
from qwen3_model.text import Text

from .command import Parser, run
from .lengths import HEAD, Job

COMMAND = "bench.lengths_made"
FOLDER = Path(__file__).parent / "lengths"
COUNT, SEED = 200, 0


def drawn(median: float, sigma: float, least: int, most: int, rng: random.Random) -> Iterator[int]:
    """Lengths, for ever. sigma: of their logarithms."""
    while True:
        yield min(max(round(rng.lognormvariate(math.log(median), sigma)), least), most)


def chat(rng: random.Random) -> list[Job]:
    """Prompts of 150 tokens in the middle, answers of 220."""
    return _pairs(drawn(150, 1.1, 8, 3000, rng), drawn(220, 0.8, 8, 1000, rng))


def summarise(rng: random.Random) -> list[Job]:
    """Prompts of 2,200 tokens in the middle, answers of 120."""
    return _pairs(drawn(2200, 0.45, 400, 3600, rng), drawn(120, 0.5, 24, 400, rng))


def code(rng: random.Random) -> list[Job]:
    """Held-out prompts, completions of 64 tokens in the middle."""
    text = Text(EMBEDDED)
    prompts = read_prompts(EMBEDDED / "held_out.jsonl", COUNT, split="test")
    return _pairs((len(text.encode(prompt)) for prompt in prompts), drawn(64, 0.8, 8, 500, rng))


MADE: dict[str, Callable[[random.Random], list[Job]]] = {"chat": chat, "code": code, "summarise": summarise}


def _pairs(prompts: Iterator[int], texts: Iterator[int]) -> list[Job]:
    return [pair for pair, _ in zip(zip(prompts, texts, strict=False), range(COUNT), strict=False)]


def written(name: str) -> str:
    """The file of a distribution."""
    jobs = MADE[name](random.Random(f"{name} {SEED}"))
    return "".join(",".join(map(str, row)) + "\n" for row in (HEAD, *jobs))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    Parser(prog=f"python -m {COMMAND}", description=str(__doc__)).parse_args(arguments)
    for name in MADE:
        write_atomically(FOLDER / f"{name}.csv", written(name))
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
