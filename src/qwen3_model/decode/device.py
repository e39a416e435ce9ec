"""Cycles without the host: length, root, end tokens and limit live on the device, and a cycle is one CUDA
graph from the tables of its passes to the commit.

The host launches cycle n + 1 before it reads what cycle n kept, so that the GPU does not wait for Python; a
cycle launched after the text has ended changes nothing (orthrus_kernels/advance_triton.py). A graph serves
all texts, lengths and settings of its key: rows of the cycle, **room** (the passes' tables are laid out for
that many positions, which changes grids and never key cuts), and form of the choice. The host's loop and
these cycles give the same tokens and log-probabilities; they differ in two things (one-pass:
one_pass_cycle.py). With one token left the loop does not draft, and a cycle here does. And the loop refuses
logits that are not numbers in any row, a cycle only those on the accepted path. Where the settings leave it
open, a `Controller` (controller.py) names the kind of each cycle, from the times of the cycles themselves; it
knows every cycle but the one that runs. On a CPU, under the interpreter, cycles run from the same fixed
tensors, uncaptured: a test of all but the capture."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING

import torch

from orthrus_kernels.choice_triton import bias_table, choice_form, choice_numbers
from orthrus_kernels.grow_triton import MOST_DEPTH
from orthrus_kernels.layout import Settings, State

from ..errors import InputError
from .controller import CHAIN, ONE_PASS, PLAIN, TREES, TWIN_TIMES, Controller, Times, measured_times
from .cycle import Choice, Cycle, Read, Shared, Walk
from .one_pass import Shape
from .one_pass_cycle import Draft, OnePassCycle
from .state import NOT_NUMBERS, Decoding, Run
from .two_pass_cycle import TwoPassCycle

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Qwen3

LEAST_ROOM = 1024  # positions; each larger room is twice the one before
MOST_GRAPHS = 64  # the one not used for longest goes first
STRATEGIES = ("autoregressive", "two-pass", "one-pass", "auto")  # what has cycles here


def serves(strategy: str, decoding: Decoding) -> bool:
    """Whether a generation can run here: the kernels are Triton's. A repetition penalty makes each proposal
    depend on those before it, which the host follows; rejection sampling has no kernel; the kernel that grows
    trees takes blocks of 64 rows at most; a record does not tell the tree to one who watches."""
    model, coupled = decoding.model, decoding.verify == "coupled"
    if decoding.watched:
        return False
    if decoding.tree_nodes not in ("auto", 0) and decoding.block_size > MOST_DEPTH:
        return False
    able = model.backend == "triton" and coupled and decoding.sampling.repetition_penalty == 1.0
    return able and model.use_cycles and strategy in STRATEGIES


class DeviceCycles:
    """The cycles of one cache, with their graphs."""

    def __init__(self, model: Qwen3, cache: KVCache) -> None:
        # weak: the cache owns its cycles and the model the cache
        self._model, self._cache = weakref.proxy(model), weakref.proxy(cache)
        device = model.device
        self._state = torch.zeros(len(State), dtype=torch.int32, device=device)
        self._numbers = torch.zeros(len(Settings), dtype=torch.int32, device=device)
        self._bias = torch.zeros(model.config.vocab_size, dtype=torch.float32, device=device)
        self._ends = torch.tensor(model.config.eos_token_ids or (-1,), dtype=torch.int32, device=device)
        self._cycles: OrderedDict[tuple, Cycle] = OrderedDict()
        self._drafts: dict[tuple, Draft] = {}  # of one-pass cycles
        self.controllers: dict[tuple, Controller] = {}  # of the last text that was decoded so
        self.walk_of: Callable[[int], Walk] | None = None  # by kind, in place of the target's choices
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        """How many kinds of cycle there are."""
        return len(self._cycles)

    def again(self) -> None:
        """Launch the last cycle once more; behind the end of a text that changes nothing."""
        next(reversed(self._cycles.values())).launch(self._pool)

    def runs(self, strategy: str, decoding: Decoding) -> Iterator[Run]:
        """What each cycle adds to the text, until an end token or the limit. Raises InputError when logits
        are not numbers."""
        vocabulary, biases = self._model.config.vocab_size, decoding.sampling.logit_bias
        form = *choice_form(decoding.sampling, vocabulary), bool(biases)
        self._numbers.copy_(choice_numbers(decoding.sampling, vocabulary))
        if biases:
            self._bias.copy_(bias_table(tuple(biases.items()), vocabulary, self._bias.device))
        begin = {
            State.START: decoding.start, State.ROOT: decoding.root, State.LEFT: decoding.remaining,
            State.FINISHED: 0,
        }  # fmt: skip
        self._state.copy_(torch.tensor([begin[place] for place in State], dtype=torch.int32))
        for draft in self._drafts.values():
            draft.forget()
        kinds, controller = self._kinds(strategy, decoding, form)
        kind, timed = next(kinds), controller is not None
        waiting = self._launch(kind, form, decoding, unread=0, timed=timed)
        while True:
            following_kind = next(kinds)
            following = self._launch(following_kind, form, decoding, unread=1, timed=timed)
            end = waiting()
            decoding.tokens += end.run.tokens
            self._cache.lengths[0] += len(end.run.tokens)
            if controller is not None:
                controller.observe(kind, end.run.path if end.run.nodes else None)
                controller.times.observe(kind, end.milliseconds)
            if end.run.tokens:
                yield end.run
            if end.damaged:
                raise InputError(NOT_NUMBERS)
            if end.finished:
                return
            kind, waiting = following_kind, following

    def _kinds(
        self, strategy: str, decoding: Decoding, form: tuple
    ) -> tuple[Iterator[int], Controller | None]:
        """The kinds of the cycles to come (controller.py), and who chooses them."""
        if strategy == "autoregressive":
            return repeat(PLAIN), None
        if strategy == "one-pass":
            return repeat(ONE_PASS), None
        if decoding.tree_nodes != "auto":
            return repeat(decoding.tree_nodes), None
        key = form, decoding.block_size
        before = self.controllers.get(key)
        times = self._times(form, decoding) if before is None else before.times
        controller = self.controllers[key] = Controller(times, before)
        return iter(controller.next, None), controller

    def _times(self, form: tuple, decoding: Decoding) -> Times:
        """What a cycle of each kind takes at the text's length, measured on cycles that change nothing;
        without a GPU, the twins'. Kinds are trees, and chains for blocks of which no tree is searched."""
        if self._pool is None:
            return Times(TWIN_TIMES)
        kinds = PLAIN, *(TREES if decoding.block_size <= MOST_DEPTH else (CHAIN,))
        finished = self._state[State.FINISHED :][:1]
        finished.fill_(1)
        for kind in kinds:
            for _ in range(2):  # the second is captured
                self._launch(kind, form, decoding, unread=0)()

        def launch(kind: int) -> Callable[[], float]:
            read = self._launch(kind, form, decoding, unread=0, timed=True)

            def milliseconds() -> float:
                found = read().milliseconds
                assert found is not None, "of a captured cycle"
                return found

            return milliseconds

        times = Times(measured_times(kinds, launch))
        finished.fill_(0)
        return times

    def _launch(self, kind: int, form: tuple, decoding: Decoding, unread: int, timed: bool = False) -> Read:
        """Launch a cycle while `unread` others are not read; returns how to read it."""
        shape, block = None, 0 if kind == PLAIN else decoding.block_size
        if kind == ONE_PASS:
            shape = Shape.of(decoding.block_size, decoding.tree_nodes)
            block = 2 * shape.block  # rows stand so far behind the root: a block below the deepest node
        # tokens of a cycle, and how far behind the root its rows stand, at most
        most = max(decoding.block_size if decoding.tree_nodes == "auto" else block, block, 1)
        furthest = min(decoding.start + unread * most, decoding.limit - 1) + most
        room = LEAST_ROOM
        while room < furthest:
            room *= 2
        key = kind, room, form, shape or block, self._model.bigram
        if key not in self._cycles:
            self._cycles[key] = self._new_cycle(kind, room, decoding, block, shape)
            while len(self._cycles) > MOST_GRAPHS:
                self._cycles.popitem(last=False)
        self._cycles.move_to_end(key)
        return self._cycles[key].launch(self._pool, timed)

    def _new_cycle(self, kind: int, room: int, decoding: Decoding, block: int, shape: Shape | None) -> Cycle:
        bias = self._bias if decoding.sampling.logit_bias else None
        choice = Choice(decoding.sampling, self._numbers, bias)
        shared = Shared(self._model, self._cache, self._state, self._ends, choice)
        cycle: Cycle
        if shape is None:
            cycle = TwoPassCycle(shared, kind, room, block)
        else:
            of = shape, self._model.bigram
            if of not in self._drafts:
                self._drafts[of] = Draft(self._model, shape)
            cycle = OnePassCycle(shared, shape, room, self._drafts[of])
        if self.walk_of is not None:
            cycle.walk = self.walk_of(kind)
        return cycle
