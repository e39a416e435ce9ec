"""The KV cache: preallocated once, written by commit alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthrus_kernels import Rows, commit

from .config import Qwen3Config
from .errors import InputError, size_of


class KVCache:
    """AR keys and values of committed tokens: two tensors [L, B, G, S, D] for L layers, B sequences, S
    positions.

    `lengths[s]` positions of sequence s are committed, where the host drives the passes (`Network.forward`);
    an engine's sequences know their own lengths. What lies behind is never read. `rope_table`: cosine and
    sine of every position, [2, positions, D/2] fp32, which a pass gathers in one launch.
    """

    rope_table: Tensor

    def __init__(
        self,
        config: Qwen3Config,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        sequences: int = 1,
        write: Callable[..., None] = commit,
        rope_table: Callable[[], Tensor] | None = None,
    ) -> None:
        """write: a backend's `commit`. rope_table: makes the table of that name."""
        shape = (config.num_hidden_layers, sequences, config.num_key_value_heads, capacity, config.head_dim)
        try:
            self.keys = torch.empty(shape, device=device, dtype=dtype)
            self.values = torch.empty(shape, device=device, dtype=dtype)
            if rope_table is not None:
                self.rope_table = rope_table()
        except RuntimeError:  # torch.OutOfMemoryError on a GPU is one
            size = size_of(2 * math.prod(shape) * dtype.itemsize)
            raise InputError(
                f"a cache for {capacity} positions takes {size}, which {device} does not have: "
                "ask for fewer new tokens, or shorten the prompt"
            ) from None
        self.lengths, self._write = [0] * sequences, write

    @property
    def capacity(self) -> int:
        """Positions a sequence may hold."""
        return self.keys.shape[3]

    def check_room(self, count: int, sequence: int = 0) -> None:
        """Raises ValueError when `count` more positions of a sequence do not fit."""
        end = self.lengths[sequence] + count
        if not 0 <= self.lengths[sequence] <= end <= self.capacity:
            raise ValueError(
                f"commit: positions {self.lengths[sequence]}..{end - 1} do not fit a cache of "
                f"{self.capacity} positions"
            )

    def check_positions(self, rows: Rows) -> None:
        """Raises ValueError when a row stands further behind the cache than `rope_table` goes."""
        furthest, end = max(rows.positions, default=0), self.rope_table.shape[1]
        if furthest >= end:
            raise ValueError(
                f"a row stands at position {furthest}; with a cache of {self.capacity} positions "
                f"rows may go to {end - 1}"
            )

    def commit(self, keys: Tensor, values: Tensor, accepted: Sequence[int], sequence: int = 0) -> None:
        """Append the accepted rows of a pass: keys, values [L, T, G, D]. Raises ValueError when they do not
        fit.
        """
        self.check_room(len(accepted), sequence)
        start = self.lengths[sequence]
        table = torch.tensor([[start, *accepted]], dtype=torch.int32, device=self.keys.device)
        mine = (cache[:, sequence : sequence + 1] for cache in (self.keys, self.values))
        self._write(*mine, keys, values, table[:, 1:].contiguous(), table[0, :1])
        self.lengths[sequence] += len(accepted)
