"""The KV cache, in pages: preallocated once, written by commit alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthrus_kernels import PAGE, Rows, commit, in_order, pages_for

from .config import Qwen3Config
from .errors import InputError, size_of


class KVCache:
    """AR keys and values of committed tokens: two pools of pages [L, P, G, PAGE, D] for L layers, and the
    table `pages` [S, N] int32 that says which pages hold a sequence's positions (orthrus_kernels/pages.py).

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
        pool: int | None = None,
    ) -> None:
        """capacity: positions that each of `sequences` sequences may hold. write: a backend's `commit`.
        rope_table: makes the table of that name. pool: how many pages there are, all free: the caller says in
        `pages` whose they are. None: every sequence owns the pages of its capacity, one behind the other."""
        each = pages_for(capacity)
        count = sequences * each if pool is None else pool
        shape = (config.num_hidden_layers, count, config.num_key_value_heads, PAGE, config.head_dim)
        try:
            self.keys = torch.empty(shape, device=device, dtype=dtype)
            self.values = torch.empty(shape, device=device, dtype=dtype)
            if rope_table is not None:
                self.rope_table = rope_table()
        except RuntimeError:  # torch.OutOfMemoryError on a GPU is one
            size = size_of(2 * math.prod(shape) * dtype.itemsize)
            advice = (
                "ask for fewer new tokens, or shorten the prompt" if pool is None else "lower cache_tokens"
            )
            positions = capacity if pool is None else pool * PAGE
            raise InputError(
                f"a cache for {positions} positions takes {size}, which {device} does not have: {advice}"
            ) from None
        owned = torch.arange(count) if pool is None else torch.full((sequences * each,), -1)
        self.pages = owned.view(sequences, each).to(device, torch.int32)
        self.capacity, self.lengths, self._write = capacity, [0] * sequences, write

    @property
    def sequences(self) -> int:
        """How many sequences it has room for."""
        return len(self.pages)

    @property
    def positions(self) -> int:
        """How many positions all of them together may hold."""
        return self.keys.shape[1] * PAGE

    def read(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of a sequence's first positions, each [L, G, length, D]."""
        keys, values = (in_order(of, self.pages[sequence], 0, length) for of in (self.keys, self.values))
        return keys, values

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
        slot = torch.tensor([sequence], dtype=torch.int32, device=self.keys.device)
        rows = table[:, 1:].contiguous()
        self._write(self.keys, self.values, self.pages, slot, keys, values, rows, table[0, :1])
        self.lengths[sequence] += len(accepted)
