"""A model whose logits are a pure function of the text, and whose drafter may be as wrong as a test likes."""

from __future__ import annotations

from functools import lru_cache

import torch

from orthrus_kernels import Rows, Weight
from qwen3_model import Engine, Qwen3Config, Request, Result
from qwen3_model.kv_cache import KVCache
from qwen3_model.model import Network
from qwen3_model.passes import Pass


@lru_cache(maxsize=1 << 14)
def noise(seed: int, size: int, skill: float | None = None) -> tuple[bool, torch.Tensor]:
    """Whether a drafter's row is skilled, and the normal numbers of a seed: asked for again and again."""
    g = torch.Generator().manual_seed(seed % 2**62)
    skilled = skill is not None and bool(torch.rand((), generator=g) < skill)
    return skilled, torch.randn(size, generator=g)


class ScriptedModel(Network):
    """`skill` is the chance that a diffusion row's logits are the target's own; else they are others.

    A row's state is its logits, and the 'key' of a row is its token."""

    def __init__(self, config: Qwen3Config, skill: float = 0.6, text=None, seed: int = 0) -> None:
        super().__init__(config, torch.device("cpu"), torch.float32, "reference", text)
        self.skill, self.seed = skill, seed
        self.head = Weight(torch.eye(config.vocab_size))
        self.passes: list[Rows] = []  # the prompt's first
        self.interrupt_after: int | None = None

    def new_cache(self, capacity: int, sequences: int = 1, pool: int | None = None) -> KVCache:
        cache = super().new_cache(capacity, sequences, pool)
        size = cache.keys.shape[1], 1, cache.keys.shape[3], 1  # one layer, one head of size 1
        cache.keys, cache.values = torch.full((2, 1, *size), float("nan"))
        return cache

    def generate(self, prompt, strategy="auto", max_new_tokens=None, on_tokens=None, on_run=None, **settings):
        request = Request(strategy=strategy, max_new_tokens=max_new_tokens, **settings)
        return self.run(prompt, request, on_tokens, on_run)

    def run(self, *given) -> Result:
        """A text by an engine of its own."""
        self.passes.clear()
        return Engine(self).generate(*given)

    def target(self, text: list[int]) -> torch.Tensor:
        """The target's logits after a text."""
        return noise(hash((self.seed, *text[-3:], len(text))), self.config.vocab_size)[1] * 2

    def states(self, given: Pass, cache: KVCache):
        plan, rows = given.plan, given.plan.rows()
        if self.interrupt_after is not None and len(self.passes) > self.interrupt_after:
            raise KeyboardInterrupt
        self.passes.append(rows)
        contexts = {s: self._context(cache, s, length) for s, length in rows.contexts.items()}
        used = {row: i for i, row in enumerate((plan.sequences >= 0).nonzero().flatten().tolist())}
        wanted = range(len(plan.tokens)) if given.logits_of is None else given.logits_of.tolist()
        keys = torch.where(plan.sequences >= 0, plan.tokens.float(), float("nan"))[: plan.shape.n_ar]
        keys = keys[None, :, None, None]
        nothing = torch.zeros(self.config.vocab_size)  # of a row of padding
        states = [
            self._row(rows, used[row], contexts[rows.sequences[used[row]]]) if row in used else nothing
            for row in wanted
        ]
        return torch.stack(states) if states else torch.zeros(0, self.config.vocab_size), keys, keys

    def _context(self, cache: KVCache, sequence: int, length: int) -> list[int]:
        """The committed tokens."""
        return [int(token) for token in cache.read(sequence, length)[0].flatten().tolist()]

    def _row(self, rows: Rows, i: int, context: list[int]) -> torch.Tensor:
        if rows.blocks[i] < 0:
            return self.target(context + [rows.tokens[j] for j in [*rows.ancestors(i), i]])
        anchor = rows.blocks.index(rows.blocks[i])
        # the drafter guesses along its own greedy guesses
        text = [*context, *(rows.tokens[j] for j in rows.ancestors(i)), rows.tokens[anchor]]
        for _ in range(i - anchor):
            text.append(int(self.target(text).argmax()))
        seed = hash((self.seed, i - anchor, *text[-2:]))
        skilled, others = noise(seed, self.config.vocab_size, self.skill)
        return self.target(text) if skilled else others.clone()


class Stutter(ScriptedModel):
    """Would say each token again and again: all but the last token's logits are noise."""

    def target(self, text):
        logits = super().target([len(text)])
        logits[text[-1]] = logits.max() + 1.0
        return logits
