"""A model whose logits are a pure function of the text, and whose drafter may be as wrong as a test likes."""

from __future__ import annotations

import torch

from orthrus_kernels import Rows, backend_ops
from qwen3_model.config import Qwen3Config
from qwen3_model.generate import generate
from qwen3_model.model import Output


class TextCache:
    """Keeps the committed tokens; the 'keys' of a pass are its tokens."""

    cycles = None  # the host's loop

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def lengths(self) -> list[int]:
        return [len(self.tokens)]

    def commit(self, keys, values, accepted) -> None:
        self.tokens += [int(keys[i]) for i in accepted]


class ScriptedModel:
    """`skill` is the chance that a diffusion row's logits are the target's own; else they are others."""

    def __init__(self, config: Qwen3Config, skill: float = 0.6, text=None, seed: int = 0) -> None:
        self.config, self.skill, self.text, self.seed = config, skill, text, seed
        self.ops, self.use_graphs = backend_ops("reference"), False
        self.passes: list[Rows] = []
        self.bigram = None
        self.interrupt_after: int | None = None

    def new_cache(self, capacity: int) -> TextCache:
        return TextCache()

    def generate(self, prompt, **settings):
        return generate(self, prompt, **settings)

    def target(self, text: list[int]) -> torch.Tensor:
        """The target's logits after a text."""
        g = torch.Generator().manual_seed(hash((self.seed, *text[-3:], len(text))) % 2**62)
        return torch.randn(self.config.vocab_size, generator=g) * 2

    def prefill(self, tokens, cache) -> torch.Tensor:
        cache.tokens += tokens
        return self.target(cache.tokens)

    def forward(self, rows: Rows, cache: TextCache, logits_of=None, repeats=True) -> Output:
        if self.interrupt_after is not None and len(self.passes) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.passes.append(rows)
        assert rows.contexts[0] == len(cache.tokens)
        logits = [
            self._row(rows, i, cache.tokens) for i in (range(len(rows)) if logits_of is None else logits_of)
        ]
        return Output(torch.stack(logits), torch.tensor(rows.tokens), torch.tensor(rows.tokens))

    def _row(self, rows: Rows, i: int, context: list[int]) -> torch.Tensor:
        if rows.blocks[i] < 0:
            return self.target(context + [rows.tokens[j] for j in [*rows.ancestors(i), i]])
        anchor = rows.blocks.index(rows.blocks[i])
        # the drafter guesses along its own greedy guesses
        text = [*context, *(rows.tokens[j] for j in rows.ancestors(i)), rows.tokens[anchor]]
        for _ in range(i - anchor):
            text.append(int(self.target(text).argmax()))
        g = torch.Generator().manual_seed(hash((self.seed, i - anchor, *text[-2:])) % 2**62)
        skilled = torch.rand((), generator=g) < self.skill
        return self.target(text) if skilled else torch.randn(self.config.vocab_size, generator=g)
