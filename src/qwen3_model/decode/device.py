"""Cycles without the host: length, root, end tokens and limit live on the device, and a cycle is one CUDA
graph from the tables of its passes to the commit.

The host launches cycle n + 1 before it reads what cycle n kept, so that the GPU does not wait for Python; a
cycle launched after the text has ended changes nothing (orthrus_kernels/advance_triton.py). A graph serves
all texts, lengths and settings of its key: rows of the cycle and form of the choice. The host's loop and
these cycles give the same tokens and log-probabilities; they differ in two things (one-pass:
one_pass_cycle.py). With one token left the loop does not draft, and a cycle here does. And the loop refuses
logits that are not numbers in any row, a cycle only those on the accepted path. Where the settings leave it
open, a `Budget` (budget.py) names the kind of each cycle, from the times of the cycles themselves; it knows
every cycle but the one that runs. On a CPU, under the interpreter, cycles run from the same fixed tensors,
uncaptured: a test of all but the capture."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import torch

from orthrus_kernels.choice_triton import bias_table, choice_form, choice_numbers
from orthrus_kernels.grow import MOST_DEPTH
from orthrus_kernels.layout import Settings, State

from ..errors import InputError
from .budget import CHAIN, KINDS, ONE_PASS, PLAIN, TWIN_COSTS, Budget, known_tokens
from .costs import measured_costs
from .cycle import Choice, Cycle, Read, Shared, Walk
from .one_pass import BLOCK, LEAST_BLOCK, Shape
from .one_pass_cycle import Draft, OnePassCycle
from .state import NOT_NUMBERS, Decoding, Run
from .two_pass_cycle import TwoPassCycle

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Qwen3

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
        self.budgets: dict[tuple, Budget] = {}
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
        self._one_pass = one_pass_shape(strategy, decoding)
        kinds, budget = self._kinds(strategy, decoding, form)
        kind, timed = next(kinds), budget is not None
        waiting = self._launch(kind, form, decoding, timed)
        while True:
            following_kind = next(kinds)
            following = self._launch(following_kind, form, decoding, timed)
            end = waiting()
            decoding.tokens += end.run.tokens
            self._cache.lengths[0] += len(end.run.tokens)
            if budget is not None:
                told = kind != ONE_PASS or end.run.nodes
                budget.observe(known_tokens(kind, end.run.path) if told else {})
                budget.time(kind, end.milliseconds)
            if end.run.tokens:
                yield end.run
            if end.damaged:
                raise InputError(NOT_NUMBERS)
            if end.finished:
                return
            kind, waiting = following_kind, following

    def _kinds(self, strategy: str, decoding: Decoding, form: tuple) -> tuple[Iterator[int], Budget | None]:
        """The kinds of the cycles to come (budget.py), and who chooses them."""
        if strategy == "autoregressive":
            return repeat(PLAIN), None
        if strategy == "one-pass":
            return repeat(ONE_PASS), None
        if decoding.tree_nodes != "auto":
            return repeat(decoding.tree_nodes), None
        kinds: tuple[int, ...] = KINDS if decoding.block_size <= MOST_DEPTH else (PLAIN, CHAIN)
        if strategy == "two-pass" or decoding.block_size < LEAST_BLOCK:
            kinds = tuple(kind for kind in kinds if kind != ONE_PASS)
        key = kinds, form, decoding.block_size
        if key not in self.budgets:
            self.budgets[key] = Budget(self._costs(kinds, form, decoding))
        budget = self.budgets[key]
        budget.begin()
        return iter(budget.next, None), budget

    def _costs(self, kinds: Sequence[int], form: tuple, decoding: Decoding) -> dict[int, float]:
        """ms of a cycle of each kind at the text's length, measured on cycles that change nothing; without a
        GPU, the twins'."""
        if self._pool is None:
            return TWIN_COSTS
        finished = self._state[State.FINISHED :][:1]
        finished.fill_(1)
        for kind in kinds:
            for _ in "01":  # the second is captured
                self._launch(kind, form, decoding)()
        costs = measured_costs(kinds, lambda kind: self._launch(kind, form, decoding, timed=True))
        finished.fill_(0)
        return costs

    def _launch(self, kind: int, form: tuple, decoding: Decoding, timed: bool = False) -> Read:
        """Launch a cycle; returns how to read it."""
        shape, block = None, 0 if kind == PLAIN else decoding.block_size
        if kind == ONE_PASS:
            shape = self._one_pass
        key = kind, form, shape or block, self._model.bigram
        if key not in self._cycles:
            self._cycles[key] = self._new_cycle(kind, decoding, block, shape)
            while len(self._cycles) > MOST_GRAPHS:
                self._cycles.popitem(last=False)
        self._cycles.move_to_end(key)
        return self._cycles[key].launch(self._pool, timed)

    def _new_cycle(self, kind: int, decoding: Decoding, block: int, shape: Shape | None) -> Cycle:
        bias = self._bias if decoding.sampling.logit_bias else None
        choice = Choice(decoding.sampling, self._numbers, bias)
        shared = Shared(self._model, self._cache, self._state, self._ends, choice)
        cycle: Cycle
        if shape is None:
            cycle = TwoPassCycle(shared, kind, block)
        else:
            of = shape, self._model.bigram
            if of not in self._drafts:
                self._drafts[of] = Draft(self._model, shape)
            cycle = OnePassCycle(shared, shape, self._drafts[of])
        if self.walk_of is not None:
            cycle.walk = self.walk_of(kind)
        return cycle


def one_pass_shape(strategy: str, decoding: Decoding) -> Shape:
    """Of a strategy's one-pass cycles: beside others, whose blocks are long, they have short ones."""
    if strategy == "one-pass":
        return Shape.of(decoding.block_size, decoding.tree_nodes)
    return Shape.of(min(max(decoding.block_size, LEAST_BLOCK), BLOCK), "auto")
