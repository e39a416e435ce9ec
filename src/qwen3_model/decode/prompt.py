"""Chunks: passes of their own over pieces of one or several prompts, through the AR view (prompt_rows.py).

A chunk has a fixed number of rows, for one CUDA graph. Any chunking gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import PassShape, Rows

from .controller import measured_times
from .cycle import Slots
from .graphs import captured
from .pace import CHUNKS, Span
from .prompt_rows import Piece, PromptRows
from .scheduler import MOST_PARTS

LEAST_ROWS, STEP = 16, 128  # of a chunk that is captured: powers of two up to STEP, then its multiples


def rows_for(tokens: int) -> int:
    """Rows of a chunk that is captured and holds so many tokens."""
    if tokens <= STEP:
        return max(1 << (tokens - 1).bit_length(), LEAST_ROWS)
    return -(-tokens // STEP) * STEP


class Chunk:
    """A pass of AR rows with the commit of their keys and values."""

    def __init__(self, slots: Slots, rows: int, pieces: int) -> None:
        """rows, pieces: of a launch at most."""
        self.slots, count = slots, len(slots.state)
        last = torch.zeros(pieces, dtype=torch.int64, device=slots.state.device)
        shape = PassShape(rows, rows, lines=pieces, depth=rows, sequences=count)
        chain = Rows.chain([0] * rows, 0)
        self.forward = slots.model.new_pass(chain, slots.cache, slots.start, shape, logits_of=last)
        self.rows = PromptRows(slots, self.forward, 0)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """The launches: the pass, and the commit of every row at its own position."""
        model = self.slots.model
        model.ops.lay(self.forward.plan, self.forward.tables)
        self.rows.take(*model.states(self.forward, self.slots.cache))

    def launch(self, pool: Any) -> Tensor:
        """Run it; returns the states of the pieces' last tokens, [pieces, E]. pool: of CUDA graphs; None:
        nothing is captured."""
        if self.graph is not None:
            self.graph.replay()
            return self.rows.states
        self.run()
        states = self.rows.states
        if pool is not None:  # the kernels are compiled now: the next chunk of this shape is a replay
            self.graph = captured(self.run, pool)
        return states


class Prompts:
    """The chunks over the cache of slots, with their graphs."""

    def __init__(self, slots: Slots, pool: Any) -> None:
        self.slots, self.pool = slots, pool
        self._chunks: dict[tuple[int, int], Chunk] = {}

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    def ready(self, rows: int) -> None:
        """Run chunks of so many rows that are nobody's, of one piece and of several where texts run beside
        others, and keep their graphs; nothing is committed."""
        for several in (False, True)[: len(self.slots.state)]:
            chunk = self._chunk(rows, several)
            chunk.rows.fill([Piece([0], 0, -1)])
            chunk.launch(self.pool)

    def measured(self, ready: Sequence[int]) -> dict[int, float]:
        """ms of the chunks of CHUNKS without a key of the cache, by their rows. ready: rows of those that
        `ready` has captured; nothing is committed."""

        def launch(rows: int) -> Callable[[], float]:
            span = Span(self.slots.state.device)
            self._chunk(rows, several=True).launch(self.pool)
            span.end()
            return span.milliseconds

        return measured_times([rows for rows in CHUNKS if rows in ready], launch)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Commit a chunk of MOST_PARTS pieces at most, of PREFILL_ROWS tokens together at most. Returns the
        states of the pieces' last tokens, [>= pieces, E]; those behind them mean nothing."""
        tokens = sum(len(piece.tokens) for piece in pieces)
        chunk = self._chunk(tokens if self.pool is None else rows_for(tokens), len(pieces) > 1)
        chunk.rows.fill(pieces)
        return chunk.launch(self.pool)

    def _chunk(self, rows: int, several: bool) -> Chunk:
        """The chunk of so many rows for one piece or several; where nothing is captured, a new one."""
        key = rows, min(MOST_PARTS, len(self.slots.state)) if several else 1
        chunk = self._chunks.get(key) or Chunk(self.slots, *key)
        if self.pool is not None:
            self._chunks[key] = chunk
        return chunk
