"""What an engine runs on: the cache, and over it the prompts and cycles with their graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels import PAGE, pages_for, put_down

from .cycles import Cycles, Launched
from .first_tokens import FirstTokens
from .groups import Seated
from .prompt import Prompts
from .prompt_rows import Piece
from .scheduler import Grant, Part
from .sequence import Sequence

if TYPE_CHECKING:
    from ..model import Network


CAPACITY_STEP = 1024  # positions; a cache that grows with its texts has a multiple of it


def cache_size(model: Network, slots: int, tokens: int | None, limit: int) -> tuple[int, int]:
    """(positions of a text at most, pages of the pool) of an engine's cache. tokens: that it holds; None: one
    text of `limit` positions where there is one slot, else what memory does."""
    if tokens is None and slots == 1:
        capacity = -(-limit // CAPACITY_STEP) * CAPACITY_STEP
        return capacity, pages_for(capacity)
    context = pages_for(model.config.context_length) * PAGE
    pages = pages_for(max(tokens or model.positions_that_fit(context * slots), 1))
    return min(context, pages * PAGE), pages


def replays(model: Network) -> bool:
    """Whether what is launched for a model becomes CUDA graphs."""
    return model.use_graphs and model.device.type == "cuda"


class Runner:
    """A pool of pages with all that is captured over it. It does what a scheduler says (scheduler.py)."""

    def __init__(self, model: Network, slots: int, capacity: int, pages: int) -> None:
        """slots: texts that may run at once. capacity: positions of a text at most. pages: of the pool.
        Raises InputError where they do not fit into memory."""
        self.model, self.graphs = model, model.use_graphs
        self.warm = False  # whether all graphs of several slots are captured (warm.py)
        self.cache = model.new_cache(capacity, slots, pages)
        self.rooms = [0] * slots  # positions that the pages of each slot hold
        pool = torch.cuda.graph_pool_handle() if replays(model) else None
        self.cycles = Cycles(model, self.cache, slots, pool)
        self.prompts = Prompts(self.cycles.slots, pool)
        self.first_tokens: dict[int, FirstTokens] = {}  # by seats
        self.ahead = model.device.type == "cuda"  # whether cycles are launched before the last one is read

    def grant(self, grants: Iterable[Grant]) -> None:
        """Write pages into the tables of slots, behind what was launched so far."""
        for slot, place, pages in grants:
            numbers = torch.tensor(pages, dtype=torch.int32)
            put_down(self.cache.pages[slot, place : place + len(pages)], numbers)
            self.rooms[slot] = PAGE * (place + len(pages))
            self.cycles.slots.make_room(slot, self.rooms[slot])

    def prefill(self, parts: Iterable[Part[Sequence]]) -> tuple[Launched, ...]:
        """Run parts of prompts through the AR view in one pass. A text whose last part it was runs from now
        on. Returns the choice of the first tokens, launched and not read; nothing where no prompt ends.

        A text that was preempted knows the token behind its last part already."""
        parts = _in_order(parts)
        return self._begin(parts, self.prompts.run(_pieces(parts)))

    def cycle(self, seated: Seated, parts: Iterable[Part[Sequence]]) -> tuple[Launched, ...]:
        """Launch a cycle of texts in slots, and with it do what `prefill` does: in the cycle's own pass, or
        in a chunk behind it where that has no room. What is returned is read together."""
        parts = _in_order(parts)
        pieces = _pieces(parts)
        launched = self.cycles.launch(seated, pieces)
        if not pieces:
            return launched
        states = launched[-1].states
        if states is None:
            for piece in pieces:
                self.cycles.pace.read(len(piece.tokens), piece.start)
            states = self.prompts.run(pieces)
        return *launched, *self._begin(parts, states)

    def _begin(self, parts: list[Part[Sequence]], states: Tensor) -> tuple[Launched, ...]:
        """Texts whose last part was launched run from now on. states: of the parts' last tokens."""
        for part in parts:
            if part.last:
                self.cycles.begin(part.text, part.slot, self.rooms[part.slot])
        seated = [(part.text, part.slot) for part in parts if _ends_prompt(part)]
        if not seated:
            return ()
        seats = len(states)
        if seats not in self.first_tokens:
            self.first_tokens[seats] = FirstTokens(self.cycles.slots, seats)
        return (self.first_tokens[seats].launch_behind(states, seated),)


def _in_order(parts: Iterable[Part[Sequence]]) -> list[Part[Sequence]]:
    """Those first behind which a token is chosen: theirs are the first states."""
    return sorted(parts, key=lambda part: not _ends_prompt(part))


def _pieces(parts: Iterable[Part[Sequence]]) -> list[Piece]:
    return [Piece(part.text.tokens[part.first : part.end], part.first, part.slot) for part in parts]


def _ends_prompt(part: Part[Sequence]) -> bool:
    """Whether it is followed by a token that nobody knows."""
    return part.last and part.end == len(part.text.tokens)
