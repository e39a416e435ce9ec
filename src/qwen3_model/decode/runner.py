"""What an engine runs on: the cache, and over it the prompts and cycles with their graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from orthrus_kernels import PAGE, pages_for

from ..errors import InputError
from .cycles import NOT_NUMBERS, Cycles
from .prompt import Prompts
from .scheduler import Grant, Prefill
from .sequence import Run, Sequence

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
        self.prompts = Prompts(model, self.cache, pool)
        self.cycles = Cycles(model, self.cache, slots, pool)
        self.ahead = model.device.type == "cuda"  # whether cycles are launched before the last one is read

    def grant(self, grants: Iterable[Grant]) -> None:
        """Write pages into the tables of slots, behind what was launched so far."""
        gpu = self.cache.pages.is_cuda
        for slot, place, pages in grants:
            numbers = torch.tensor(pages, dtype=torch.int32, pin_memory=gpu)
            self.cache.pages[slot, place : place + len(pages)].copy_(numbers, non_blocking=gpu)
            self.rooms[slot] = PAGE * (place + len(pages))
            self.cycles.slots.make_room(slot, self.rooms[slot])

    def prefill(self, text: Sequence, work: Prefill) -> Run | None:
        """Run a chunk of a text through the AR view. Returns the first token's run behind a whole prompt.

        A text that was preempted knows the token behind its last chunk already. Raises InputError for
        logits that are not numbers."""
        slot, end = work.slot, work.first + work.count
        states = self.prompts.run(text.tokens[work.first : end], work.first, slot)
        if work.last and end == len(text.tokens):
            return self._first_token(text, states, slot)
        if work.last:
            self.begin(text, slot)
        return None

    def begin(self, text: Sequence, slot: int) -> None:
        """A text whose prompt is committed runs in a slot from now on."""
        self.cycles.begin(text, slot, self.rooms[slot])

    def _first_token(self, text: Sequence, states: torch.Tensor, slot: int) -> Run:
        """The choice behind a prompt, of the last token's state [1, E]."""
        choice, device = self.cycles.slots.choice, self.model.device
        choice.put(slot, text.sampling, text.tokens)
        choice.form = choice.form_of([slot])
        root, position = (torch.tensor([x], device=device) for x in (text.root, len(text.tokens)))
        above, owner = (torch.tensor([x], dtype=torch.int32, device=device) for x in (-1, slot))
        chosen, logits, sums = choice.of_tree(states, position, root, above, owner)
        token, log_sum_exp = int(chosen), float(sums)
        if not abs(log_sum_exp) < float("inf"):
            raise InputError(NOT_NUMBERS)
        return Run([token], (logits - sums).tolist(), 1, "prompt", rows=(len(text.tokens),))
