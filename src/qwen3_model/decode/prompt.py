"""The prompt of a text: chunks of rows through the AR view, each with its commit.

A chunk has a fixed number of rows, so that one CUDA graph serves every chunk of as many rows, whatever its
tokens and wherever it stands. Where a chunk has fewer tokens, the rows behind them are padding: they belong
to no sequence, and nothing reads what they compute. Any chunking gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthrus_kernels import PassShape, Rows

from ..model import Network
from .cycle import captured

if TYPE_CHECKING:
    from ..kv_cache import KVCache

LEAST_ROWS, STEP = 16, 128  # of a chunk that is captured: powers of two up to STEP, then its multiples


def rows_for(tokens: int) -> int:
    """Rows of a chunk that is captured and holds so many tokens."""
    if tokens <= STEP:
        return max(1 << (tokens - 1).bit_length(), LEAST_ROWS)
    return -(-tokens // STEP) * STEP


class Chunk:
    """A pass of AR rows, one behind the other, with the commit of their keys and values."""

    def __init__(self, model: Network, cache: KVCache, rows: int) -> None:
        self.model, self.cache, device = model, cache, model.device
        start = torch.zeros(cache.sequences, dtype=torch.int32, device=device)
        last = torch.zeros(1, dtype=torch.int64, device=device)
        shape = PassShape(rows, rows, lines=1, depth=rows, sequences=cache.sequences)
        self.forward = model.new_pass(Rows.chain([0] * rows, 0), cache, start, shape, logits_of=last)
        self.slot = start.new_zeros(1)
        self.accepted = torch.zeros(1, rows, dtype=torch.int32, device=device)
        self.states: Tensor  # [1, E], of the last token, where the last launch or capture puts it
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, tokens: Sequence[int], start: int, slot: int) -> None:
        """Put tokens of the text in a slot down behind `start` committed ones."""
        plan, n = self.forward.plan, len(tokens)
        rows = len(plan.tokens)
        used = torch.arange(rows) < n
        ids = torch.zeros(2, rows, dtype=torch.int64)
        ids[0, :n] = torch.tensor(list(tokens))
        ids[1] = torch.where(used, start + torch.arange(rows), 0)
        places = torch.where(used, torch.stack([torch.full((rows,), slot), torch.arange(rows)]), -1).int()
        ids, places = ids.to(self.model.device), places.to(self.model.device)
        plan.tokens.copy_(ids[0])
        plan.positions.copy_(ids[1])
        plan.sequences.copy_(places[0])
        self.accepted[0] = places[1]
        plan.start.fill_(start)
        self.slot.fill_(slot)
        assert self.forward.logits_of is not None
        self.forward.logits_of.fill_(n - 1)

    def run(self) -> None:
        """The launches: the pass and the commit."""
        model, cache, plan = self.model, self.cache, self.forward.plan
        model.ops.lay(plan, self.forward.tables)
        self.states, keys, values = model.states(self.forward, cache)
        model.ops.commit(
            cache.keys, cache.values, cache.pages, self.slot, keys, values, self.accepted, plan.start[:1]
        )

    def launch(self, pool: Any) -> Tensor:
        """Run it; returns the last token's state [1, E]. pool: of CUDA graphs; None: nothing is captured."""
        if self.graph is not None:
            self.graph.replay()
            return self.states
        self.run()
        states = self.states
        if pool is not None:  # the kernels are compiled now: the next chunk of as many rows is a replay
            self.graph = captured(self.run, pool)
        return states


class Prompts:
    """The chunks over one cache, with their graphs."""

    def __init__(self, model: Network, cache: KVCache, pool: Any) -> None:
        self.model, self.cache, self.pool = model, cache, pool
        self._chunks: dict[int, Chunk] = {}

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    def ready(self, rows: int) -> None:
        """Run a chunk of so many rows that is nobody's, and keep its graph; nothing is committed."""
        chunk = self._chunk(rows)
        chunk.fill([0], 0, -1)
        chunk.launch(self.pool)

    def run(self, tokens: Sequence[int], start: int, slot: int) -> Tensor:
        """Commit a chunk of a prompt, of PREFILL_ROWS tokens at most, behind `start` tokens of the text in a
        slot; returns the last one's state [1, E]."""
        chunk = self._chunk(len(tokens) if self.pool is None else rows_for(len(tokens)))
        chunk.fill(tokens, start, slot)
        return chunk.launch(self.pool)

    def _chunk(self, rows: int) -> Chunk:
        chunk = self._chunks.get(rows) or Chunk(self.model, self.cache, rows)
        if self.pool is not None:
            self._chunks[rows] = chunk
        return chunk
