"""What every decoding strategy shares: the text so far, its cache, and the choice of tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from orthrus_kernels import DraftTree, Sampling

from ..errors import InputError

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Qwen3


NOT_NUMBERS = (
    "the model's logits are NaN or infinite: the checkpoint is damaged or overflows this dtype; try float32"
)


def check_finite(logits: Tensor) -> None:
    """Raises InputError when logits are not finite numbers."""
    if not torch.isfinite(logits).all():
        raise InputError(NOT_NUMBERS)


@dataclass
class Run:
    """What one cycle adds to the text: accepted proposals, then the bonus token."""

    tokens: list[int]
    logprobs: list[float]
    forwards: int
    kind: str = "plain"  # of the cycle: or "two-pass", "one-pass"
    nodes: int = 0  # proposals that were verified
    path: Sequence[int] = (0,)  # accepted nodes, the root first
    seconds: Sequence[float] = (0.0, 0.0, 0.0)  # of draft, tree and verification
    # for those who watch, not told by cycles on the device
    rows: Sequence[int] = (1,)  # of each forward pass
    tree: DraftTree | None = None  # what was verified
    choices: Sequence[int] = ()  # the target's token after each node


class Decoding:
    """One sequence being decoded. The last token, the root of the next cycle, is not in the cache yet: its
    pass will compute its keys.
    """

    def __init__(
        self,
        model: Qwen3,
        cache: KVCache,
        prompt: Sequence[int],
        budget: int,
        sampling: Sampling,
        block_size: int,
        tree_nodes: int | Literal["auto"] = 0,
        verify: str = "coupled",
    ) -> None:
        """tree_nodes: proposals of a draft tree; 0: a chain; "auto": what a `Controller` says, cycle by
        cycle. verify: "coupled" or "rejection"."""
        self.model, self.sampling, self.block_size = model, sampling, block_size
        self.tree_nodes, self.verify = tree_nodes, verify
        self.tokens = list(prompt)
        self.limit = len(prompt) + budget  # length of the finished text at most
        self.cache = cache
        self.watched = False  # whether someone reads what runs tell beside their tokens

    @property
    def root(self) -> int:
        """The last known token."""
        return self.tokens[-1]

    @property
    def start(self) -> int:
        """The root's position, which is also the committed length of the cache."""
        return len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """How many tokens may still be added."""
        return self.limit - len(self.tokens)

    def prefill(self) -> Run:
        """Run the prompt through the AR view and choose the first token."""
        logits = self.model.prefill(self.tokens, self.cache)[None]
        rows, tokens = len(self.tokens), self.choose(logits, [[]])
        run = self.extend(tokens, logits, forwards=1)
        run.rows = (rows,)
        return run

    def choose(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> list[int]:
        """Choose the token after each row of logits [T, V].

        paths[t] are the tokens between the text so far and the chosen token: they place it, and the
        repetition penalty sees them. Raises InputError when the logits are not finite numbers."""
        check_finite(logits)
        return self.model.ops.choose(logits, *self.placed(logits, paths)).tolist()

    def placed(
        self, logits: Tensor, paths: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Sampling, Tensor | None]:
        """What `choose` and `candidates` take behind logits [T, V]."""
        positions = torch.tensor([len(self.tokens) + len(path) for path in paths], device=logits.device)
        return positions, self.sampling, self._seen(logits, paths)

    def extend(self, tokens: list[int], logits: Tensor, forwards: int) -> Run:
        """Append tokens, each chosen from its row of logits, to the text."""
        ids = torch.tensor(tokens, device=logits.device)
        logprobs = self.model.ops.log_probability(logits, ids).tolist()
        self.tokens += tokens
        return Run(tokens, logprobs, forwards)

    def _seen(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor | None:
        """Tokens that the repetition penalty applies to in each row, bool [T, V]: the text so far and the
        row's own path.
        """
        if self.sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        seen[:, self.tokens] = True
        for row, path in zip(seen, paths, strict=True):
            row[list(path)] = True
        return seen
