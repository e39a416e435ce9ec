"""What `bench.budget` measures: prompts, tokens a second, outcomes of every kind of cycle along a text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orthrus_kernels import Rows, Sampling, verify
from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode import Decoding
from qwen3_model.decode.budget import CHAIN, KINDS, PLAIN, TREES, Budget, first_children, known_tokens, told
from qwen3_model.decode.two_pass import grow
from qwen3_model.prompts import read_prompts

PROMPT_TOKENS = 64
SEED = 1
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
    return [
        PromptSet("predictable", accessors, 0.0), PromptSet("mixed", held_out, 0.0),
        PromptSet("noise", noise, 1.5),
    ]  # fmt: skip


def decode(model: Qwen3, prompts: PromptSet, nodes: int | str, new_tokens: int) -> dict[str, Any]:
    """Tokens a second of a whole set and tokens a cycle; nodes: PLAIN, or what `generate` takes."""
    strategy, tree = ("autoregressive", 0) if nodes == PLAIN else ("two-pass", nodes)
    tokens = cycles = kept = 0
    seconds = 0.0
    texts = []
    for prompt in prompts.prompts:
        result = model.generate(
            prompt, strategy, new_tokens, temperature=prompts.temperature, seed=SEED, tree_nodes=tree
        )
        s = result.stats
        tokens, seconds = tokens + s.tokens, seconds + s.seconds
        cycles, kept = cycles + s.cycles, kept + s.cycle_tokens
        texts.append(result.token_ids)
    if cycles == 0:
        raise InputError(f"the texts behind the {prompts.name} prompts end with their first token")
    return {"tokens_per_second": tokens / seconds, "tokens_per_cycle": kept / cycles, "texts": texts}


Outcomes = dict[int, int]  # kept tokens of a cycle by its kind


@torch.inference_mode()
def trace(model: Qwen3, prompt: Sequence[int], text: Sequence[int], temperature: float) -> list[Outcomes]:
    """What a cycle of every kind keeps whose root is text[i], for every i but the last; a text is the same
    whatever decodes it, so a cycle's end is where its draft leaves the text."""
    whole = [*prompt, *text]
    cache = model.new_cache(len(whole) + model.config.block_size)
    model.prefill(whole, cache)
    sampling = Sampling(temperature=temperature, seed=SEED)
    found = []
    for start in range(len(prompt), len(whole) - 1):
        cache.lengths[0] = start
        decoding = Decoding(model, cache, whole[: start + 1], len(text), sampling, model.config.block_size)
        count = model.config.block_size - 1
        block = Rows.block(whole[start], count + 1, start, model.config.mask_token_id)
        logits = model.forward(block, cache, logits_of=range(count)).logits
        placed = decoding.placed(logits, [[0] * i for i in range(count)])
        ahead = whole[start + 1 :] + [-1]
        chain = model.ops.choose(logits, *placed).tolist()
        tree = grow(decoding, logits, TREES[-1])
        path, _ = verify(tree.tokens, tree.parents, [ahead[min(d, len(ahead) - 1)] for d in tree.depths])
        agreed = next((i for i, (a, b) in enumerate(zip(chain, ahead, strict=False)) if a != b), count)
        known = known_tokens(TREES[-1], path, first_children(tree.parents, path))
        found.append({PLAIN: 1, **known, CHAIN: agreed + 1})
    return found


def replay(traces: Sequence[list[Outcomes]], costs: dict[int, float], choose: int | Budget) -> float:
    """Tokens a unit of cost over the texts of traces; a budget learns of a cycle when the next one has been
    launched, as on the device."""
    tokens, spent = 0, 0.0
    for outcomes in traces:
        if isinstance(choose, Budget):
            choose.begin()
        at, unread = 0, None
        while at < len(outcomes):
            kind = choose.next() if isinstance(choose, Budget) else choose
            if unread is not None and isinstance(choose, Budget):
                choose.observe(unread)
            left = len(outcomes) - at
            kept = {k: min(n, left) for k, n in outcomes[at].items()}
            unread = told(kind, kept)
            tokens, spent, at = tokens + kept[kind], spent + costs[kind], at + kept[kind]
        if unread is not None and isinstance(choose, Budget):
            choose.next()  # of the cycle that was launched behind the end
            choose.observe(unread)
    return tokens / spent


def replayed(traces: Sequence[list[Outcomes]], costs: dict[int, float]) -> dict[str, float]:
    """Tokens a unit of cost of every kind, and of "auto" on the second time through, as in a long run."""
    rates: dict[str, float] = {str(kind): replay(traces, costs, kind) for kind in KINDS}
    budget = Budget(costs)
    replay(traces, costs, budget)
    return rates | {"auto": replay(traces, costs, budget)}


def measured_costs(model: Qwen3, prompt: Sequence[int], temperature: float) -> dict[int, float]:
    """ms of a cycle of every kind, as `generate` measures them for its budget."""
    model.spare_cache = None
    model.generate(prompt, "two-pass", 2, temperature=temperature, tree_nodes="auto", seed=0)
    assert model.spare_cache is not None and model.spare_cache.cycles is not None
    (budget,) = model.spare_cache.cycles.budgets.values()
    return dict(budget.costs)
