"""The KV cache: preallocated once, written by commit alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels import Rows, commit
from orthrus_kernels.commit import check_room

from .config import Qwen3Config
from .errors import InputError, size_of

if TYPE_CHECKING:
    from .captured import CapturedPasses
    from .decode.device import DeviceCycles


class KVCache:
    """AR keys and values of committed tokens: two tensors [L, B, G, S, D] for L layers, B sequences, S
    positions.

    `lengths[s]` positions of sequence s are committed; what lies behind is never read. `turns`: cosine and
    sine of every position, [2, positions, D/2] fp32, which a pass gathers in one launch.
    """

    turns: Tensor

    def __init__(
        self,
        config: Qwen3Config,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        sequences: int = 1,
        write: Callable[..., None] = commit,
        turns: Callable[[], Tensor] | None = None,
    ) -> None:
        """write: a backend's `commit`. turns: makes the table of that name, which a model's passes read."""
        shape = (config.num_hidden_layers, sequences, config.num_key_value_heads, capacity, config.head_dim)
        try:
            self.keys = torch.empty(shape, device=device, dtype=dtype)
            self.values = torch.empty(shape, device=device, dtype=dtype)
            if turns is not None:
                self.turns = turns()
        except RuntimeError:  # torch.OutOfMemoryError on a GPU is one
            size = size_of(2 * math.prod(shape) * dtype.itemsize)
            raise InputError(
                f"a cache for {capacity} positions takes {size}, which {device} does not have: "
                "ask for fewer new tokens, or shorten the prompt"
            ) from None
        self.lengths, self._write = [0] * sequences, write
        self.passes: CapturedPasses | None = None  # replays passes over this cache
        self.cycles: DeviceCycles | None = None  # and whole cycles

    @property
    def capacity(self) -> int:
        """Positions a sequence may hold."""
        return self.keys.shape[3]

    def check_room(self, count: int, sequence: int = 0) -> None:
        """Raises ValueError when `count` more positions of a sequence do not fit."""
        check_room(self.keys, self.lengths[sequence], count)

    def check_positions(self, rows: Rows) -> None:
        """Raises ValueError when a row stands further behind the cache than `turns` goes."""
        furthest, end = max(rows.positions, default=0), self.turns.shape[1]
        if furthest >= end:
            raise ValueError(
                f"a row stands at position {furthest}; with a cache of {self.capacity} positions "
                f"rows may go to {end - 1}"
            )

    def commit(self, keys: Tensor, values: Tensor, accepted: Sequence[int], sequence: int = 0) -> None:
        """Append the accepted rows of a pass: keys, values [L, T, G, D]. Raises ValueError when they do not
        fit.
        """
        self._write(self.keys, self.values, keys, values, accepted, self.lengths[sequence], sequence)
        self.lengths[sequence] += len(accepted)
