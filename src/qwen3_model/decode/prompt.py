"""Prompts: chunks of rows through the AR view, each with its commit.

A chunk holds pieces of one or several texts, one behind the other. It has a fixed number of rows, so that one
CUDA graph serves every chunk of as many rows, whatever its tokens and wherever they stand. Where a chunk has
fewer tokens, the rows behind them are padding: they belong to no sequence, and nothing reads what they
compute. Any chunking gives the same bits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthrus_kernels import PassShape, Rows, put_down

from ..model import Network
from .controller import measured_times
from .cycle import captured
from .pace import SIZES, Span
from .scheduler import MOST_PARTS

if TYPE_CHECKING:
    from ..kv_cache import KVCache

LEAST_ROWS, STEP = 16, 128  # of a chunk that is captured: powers of two up to STEP, then its multiples


def rows_for(tokens: int) -> int:
    """Rows of a chunk that is captured and holds so many tokens."""
    if tokens <= STEP:
        return max(1 << (tokens - 1).bit_length(), LEAST_ROWS)
    return -(-tokens // STEP) * STEP


class Piece(NamedTuple):
    """Tokens of the text in a slot, behind `start` committed ones."""

    tokens: Sequence[int]
    start: int
    slot: int


class Chunk:
    """A pass of AR rows with the commit of their keys and values. Rows of a piece stand one above the other,
    and no two pieces of a launch are of one text."""

    def __init__(self, model: Network, cache: KVCache, rows: int, pieces: int) -> None:
        """rows, pieces: of a launch at most."""
        self.model, self.cache, device = model, cache, model.device
        start = torch.zeros(cache.sequences, dtype=torch.int32, device=device)
        last = torch.zeros(pieces, dtype=torch.int64, device=device)
        shape = PassShape(rows, rows, lines=pieces, depth=rows, sequences=cache.sequences)
        self.forward = model.new_pass(Rows.chain([0] * rows, 0), cache, start, shape, logits_of=last)
        self.each_row = torch.arange(rows, dtype=torch.int32, device=device)[:, None]  # [rows, 1]
        self.states: Tensor  # [pieces, E], of each one's last token, as the last launch or capture puts it
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Put tokens of texts down."""
        plan, last = self.forward.plan, self.forward.logits_of
        assert last is not None
        rows = len(plan.tokens)
        ids = torch.zeros(2, rows, dtype=torch.int64)  # tokens, positions
        owners = torch.full((2, rows), -1, dtype=torch.int32)  # sequences, parents
        start = torch.zeros(len(plan.start), dtype=torch.int32)
        wanted = torch.zeros(len(last), dtype=torch.int64)
        end = 0
        for nth, (tokens, begin, slot) in enumerate(pieces):
            first, end = end, end + len(tokens)
            ids[0, first:end] = torch.tensor(list(tokens))
            ids[1, first:end] = torch.arange(begin, begin + len(tokens))
            owners[0, first:end] = slot
            owners[1, first + 1 : end] = torch.arange(first, end - 1)
            start[slot], wanted[nth] = begin, end - 1
        for place, numbers in (
            (plan.tokens, ids[0]), (plan.positions, ids[1]), (plan.sequences, owners[0]),
            (plan.parents, owners[1]), (plan.start, start), (last, wanted),
        ):  # fmt: skip
            put_down(place, numbers)

    def run(self) -> None:
        """The launches: the pass, and the commit of every row at its own position."""
        model, cache, plan = self.model, self.cache, self.forward.plan
        model.ops.lay(plan, self.forward.tables)
        self.states, keys, values = model.states(self.forward, cache)
        model.ops.commit(
            cache.keys, cache.values, cache.pages, plan.sequences, keys, values, self.each_row,
            plan.positions.int(),
        )  # fmt: skip

    def launch(self, pool: Any) -> Tensor:
        """Run it; returns the states of the pieces' last tokens, [pieces, E]. pool: of CUDA graphs; None:
        nothing is captured."""
        if self.graph is not None:
            self.graph.replay()
            return self.states
        self.run()
        states = self.states
        if pool is not None:  # the kernels are compiled now: the next chunk of this shape is a replay
            self.graph = captured(self.run, pool)
        return states


class Prompts:
    """The chunks over one cache, with their graphs."""

    def __init__(self, model: Network, cache: KVCache, pool: Any) -> None:
        self.model, self.cache, self.pool = model, cache, pool
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self._timed: deque[tuple[int, Span]] = deque()  # chunks that were launched, by rows

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._chunks)

    def ready(self, rows: int) -> None:
        """Run chunks of so many rows that are nobody's, of one piece and of several where texts run beside
        others, and keep their graphs; nothing is committed."""
        for several in (False, True)[: self.cache.sequences]:
            chunk = self.chunk_of(rows, several)
            chunk.fill([Piece([0], 0, -1)])
            chunk.launch(self.pool)

    def measured(self, ready: Sequence[int]) -> dict[int, float]:
        """ms of the chunks of SIZES without context, by their rows. ready: rows of those that `ready` has
        captured; nothing is committed."""

        def launch(rows: int) -> Callable[[], float]:
            span = Span(self.model.device)
            self.chunk_of(rows, several=True).launch(self.pool)
            span.end()
            return span.milliseconds

        return measured_times([rows for rows in SIZES if rows in ready], launch)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Commit a chunk of MOST_PARTS pieces at most, of PREFILL_ROWS tokens together at most. Returns the
        states of the pieces' last tokens, [>= pieces, E]; those behind them mean nothing."""
        tokens = sum(len(piece.tokens) for piece in pieces)
        rows = tokens if self.pool is None else rows_for(tokens)
        chunk = self.chunk_of(rows, len(pieces) > 1)
        chunk.fill(pieces)
        span = Span(self.model.device)
        states = chunk.launch(self.pool)
        span.end()
        self._timed.append((rows, span))
        return states

    def times(self) -> Iterator[tuple[int, float]]:
        """Rows and ms of each chunk that has ended since it was last asked for."""
        while self._timed and self._timed[0][1].over:
            rows, span = self._timed.popleft()
            yield rows, span.milliseconds()

    def chunk_of(self, rows: int, several: bool) -> Chunk:
        """The chunk of so many rows for one piece or several; where nothing is captured, a new one."""
        key = rows, min(MOST_PARTS, self.cache.sequences) if several else 1
        chunk = self._chunks.get(key) or Chunk(self.model, self.cache, *key)
        if self.pool is not None:
            self._chunks[key] = chunk
        return chunk
