"""The cycles over one cache: which comes next, launched ahead of what the host knows.

On a GPU the host launches cycle n + 1 before it reads what cycle n kept, so that the GPU does not wait for
Python; a cycle launched after the text has ended changes nothing. A graph serves all texts, lengths and
settings of its key: what the cycle does, and the form of the choice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence as Kinds
from itertools import repeat
from typing import TYPE_CHECKING, Any

from orthrus_kernels.layout import State

from ..errors import InputError
from .choice import Form
from .controller import KINDS, PLAIN, TWIN_TIMES, Controller, Times, measured_times
from .cycle import Cycle, Read, Text, Walk
from .one_pass import OnePassCycle, Shape
from .sequence import Run, Sequence
from .two_pass import TwoPassCycle

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Network

MOST_GRAPHS = 64  # the one not used for longest goes first
NOT_NUMBERS = (
    "the model's logits are NaN or infinite: the checkpoint is damaged or overflows this dtype; try float32"
)
Kind = int | Shape  # of a two-pass cycle (controller.py), or the shape of a one-pass cycle


class Cycles:
    """The cycles of one cache, with their graphs."""

    def __init__(self, model: Network, cache: KVCache, pool: Any) -> None:
        """pool: of CUDA graphs; None: every kernel is launched by the host."""
        self.model, self.text, self.pool = model, Text(model, cache), pool
        self.ahead = model.device.type == "cuda"  # whether cycles are launched before the last one is read
        self.walk_of: Callable[[Kind], Walk] | None = None  # by kind, in place of the target's choices
        self.times: dict[tuple, Times] = {}
        self._cycles: OrderedDict[tuple, Cycle] = OrderedDict()

    def __len__(self) -> int:
        """How many cycles there are."""
        return len(self._cycles)

    def again(self) -> None:
        """Launch the last cycle once more; behind the end of a text that changes nothing."""
        next(reversed(self._cycles.values())).launch(self.pool)

    def runs(self, sequence: Sequence) -> Iterator[Run]:
        """What each cycle adds to a text whose prompt is committed, until an end token or the limit. The
        caller adds a run to the sequence before it asks for the next one. Raises InputError when logits on
        the path are not numbers."""
        form = self.text.choice.begin(sequence.sampling, sequence.tokens)
        watched, ahead = sequence.on_run is not None, self.ahead and sequence.on_run is None
        for cycle in self._cycles.values():
            cycle.forget()
        chooser = self._chooser(sequence, form)
        self.text.begin(sequence.start, sequence.root, sequence.remaining)

        def launch(left: int) -> tuple[Kind, Cycle, Read]:
            # where one token is left there is nothing to propose
            kind = PLAIN if left <= 1 else chooser.next()
            cycle = self._cycle(kind, form, sequence, watched)
            return kind, cycle, cycle.launch(self.pool, timed=chooser.timed)

        waiting = launch(sequence.remaining)
        while True:
            following = launch(sequence.remaining) if ahead else None
            kind, cycle, read = waiting
            end = read()
            if watched:
                cycle.tell(end.run)
            chooser.observe(kind, end.run.path if end.run.nodes else None, end.milliseconds)
            if end.run.tokens:
                yield end.run
            if end.damaged:
                raise InputError(NOT_NUMBERS)
            if end.finished:
                return
            waiting = following or launch(sequence.remaining)

    def _chooser(self, sequence: Sequence, form: Form) -> Controller | Fixed:
        """What says the kind of each cycle to come."""
        request = sequence.request
        if request.strategy == "autoregressive":
            return Fixed(PLAIN)
        if request.strategy == "one-pass":
            return Fixed(Shape.of(sequence.block_size, request.tree_nodes))
        if request.tree_nodes != "auto":
            return Fixed(request.tree_nodes)
        key = form, sequence.block_size
        if key not in self.times:
            self.times[key] = Times(KINDS, lambda kinds: self._measured(kinds, form, sequence))
        return Controller(KINDS, self.times[key])

    def _cycle(self, kind: Kind, form: Form, sequence: Sequence, watched: bool) -> Cycle:
        """The cycle of a kind, made when it is first asked for."""
        block = 0 if kind == PLAIN else sequence.block_size
        key = kind, block, form, watched, self.model.bigram
        if key not in self._cycles:
            cycle: Cycle
            if isinstance(kind, Shape):
                cycle = OnePassCycle(self.text, kind)
            else:
                cycle = TwoPassCycle(self.text, kind, block, watched)
            if self.walk_of is not None:
                cycle.walk = self.walk_of(kind)
            self._cycles[key] = cycle
            while len(self._cycles) > MOST_GRAPHS:
                self._cycles.popitem(last=False)
        self._cycles.move_to_end(key)
        return self._cycles[key]

    def _measured(self, kinds: Kinds[int], form: Form, sequence: Sequence) -> dict[int, float]:
        """ms of a cycle of each kind at the text's length, measured on cycles that change nothing; without a
        GPU, the twins'."""
        if self.pool is None:
            return TWIN_TIMES
        self.text.begin(sequence.start, sequence.root, 0, finished=True)
        cycles = {kind: self._cycle(kind, form, sequence, watched=False) for kind in kinds}
        for cycle in cycles.values():
            for _ in range(2):  # the second is captured
                cycle.launch(self.pool)()
        return measured_times(kinds, lambda kind: cycles[kind].launch(self.pool, timed=True))


class Fixed:
    """One kind for every cycle."""

    timed = False

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def next(self) -> Kind:
        """The kind of the next cycle."""
        return self.kind

    def observe(self, kind: Kind, path: Kinds[int] | None, milliseconds: float | None) -> None:
        """Nothing to learn."""
