"""What `bench.budget` measures: prompts, and tokens a second of a kind of cycle."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.budget import ONE_PASS, PLAIN
from qwen3_model.prompts import read_prompts

PROMPT_TOKENS = 64
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


def decode(model: Qwen3, prompts: PromptSet, nodes: int | str, new_tokens: int) -> dict[str, Any]:
    """Tokens a second of a whole set, tokens a cycle and how many cycles of each kind. nodes: a kind of
    qwen3_model/decode/budget.py, or "auto"."""
    of_kind = {PLAIN: ("autoregressive", 0), ONE_PASS: ("one-pass", "auto"), "auto": ("auto", "auto")}
    strategy, tree = of_kind.get(nodes, ("two-pass", nodes))
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
