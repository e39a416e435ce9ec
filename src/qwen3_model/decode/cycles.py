"""The cycles over one cache: which comes next, launched ahead of what the host knows.

On a GPU the host launches cycle n + 1 before it reads what cycle n kept, so that the GPU does not wait for
Python; a cycle launched after the text has ended changes nothing. A graph serves all texts, lengths and
settings of its key: what the cycle does, and the form of the choice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from .choice import Form
from .controller import PLAIN, TREES, TWIN_TIMES, Controller, Times, measured_times
from .cycle import Cycle, Read, Text, Walk
from .one_pass import Shape
from .sequence import Run, Sequence
from .two_pass import TwoPassCycle

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Network

MOST_GRAPHS = 64  # the one not used for longest goes first
NOT_NUMBERS = (
    "the model's logits are NaN or infinite: the checkpoint is damaged or overflows this dtype; try float32"
)


class Strategy(Protocol):
    """A kind of cycle of a strategy's own, hashable: all that its launches follow from."""

    def cycle(self, text: Text) -> Cycle:
        """A cycle of this kind."""


Kind = int | Strategy  # a number is a two-pass cycle's (controller.py)


class Cycles:
    """The cycles of one cache, with their graphs."""

    def __init__(self, model: Network, cache: KVCache, pool: Any) -> None:
        """pool: of CUDA graphs; None: every kernel is launched by the host."""
        self.model, self.text, self.pool = model, Text(model, cache), pool
        self.ahead = model.device.type == "cuda"  # whether cycles are launched before the last one is read
        self.walk_of: Callable[[Kind], Walk] | None = None  # by kind, in place of the target's choices
        self.controllers: dict[tuple, Controller] = {}  # of the last text of each form and block size
        self._cycles: OrderedDict[tuple, Cycle] = OrderedDict()

    def __len__(self) -> int:
        """How many cycles there are."""
        return len(self._cycles)

    def again(self, kind: Kind) -> None:
        """Launch the newest cycle of a kind once more; behind the end of a text that changes nothing."""
        next(self._cycles[key] for key in reversed(self._cycles) if key[0] == kind).launch(self.pool)

    def runs(self, sequence: Sequence) -> Iterator[Run]:
        """What each cycle adds to a text whose prompt is committed, until an end token or the limit. The
        caller adds a run to the sequence before it asks for the next one. Raises InputError when logits on
        the path are not numbers."""
        form = self.text.choice.begin(sequence.sampling, sequence.tokens)
        watched, ahead = sequence.on_run is not None, self.ahead and sequence.on_run is None
        for cycle in self._cycles.values():
            cycle.begin(sequence.tokens)
        fixed = self._fixed(sequence)
        controller = self._controller(sequence, form) if fixed is None else None
        self.text.begin(sequence.start, sequence.root, sequence.remaining)

        def launch() -> tuple[Kind, Cycle, Read]:
            kind = fixed if controller is None else controller.next()
            if kind is None or sequence.remaining <= 1:  # where one token is left there is nothing to propose
                kind = PLAIN
            cycle = self._cycle(kind, form, sequence, watched)
            return kind, cycle, cycle.launch(self.pool, timed=controller is not None)

        waiting = launch()
        while True:
            following = launch() if ahead else None
            kind, cycle, read = waiting
            end = read()
            if watched and kind != PLAIN:
                cycle.tell(end.run)
            if controller is not None and isinstance(kind, int):
                controller.observe(kind, end.run.path if end.run.nodes else None)
                controller.times.observe(kind, end.milliseconds)
            if end.run.tokens:
                yield end.run
            if end.damaged:
                raise InputError(NOT_NUMBERS)
            if end.finished:
                return
            waiting = following or launch()

    def _fixed(self, sequence: Sequence) -> Kind | None:
        """The kind of every cycle of a text; None where a controller says it."""
        request = sequence.request
        if request.strategy == "autoregressive":
            return PLAIN
        if request.strategy == "one-pass":
            return Shape.of(sequence.block_size, request.tree_nodes)
        return None if request.tree_nodes == "auto" else request.tree_nodes

    def _controller(self, sequence: Sequence, form: Form) -> Controller:
        """What says the kind of each cycle; it begins with what the last text has taught."""
        key = form, sequence.block_size
        before = self.controllers.get(key)
        times = self._times(form, sequence) if before is None else before.times
        self.controllers[key] = Controller(times, before)
        return self.controllers[key]

    def _cycle(self, kind: Kind, form: Form, sequence: Sequence, watched: bool) -> Cycle:
        """The cycle of a kind, made when it is first asked for."""
        block = 0 if kind == PLAIN else sequence.block_size
        key = kind, block, form, watched, self.model.bigram
        if key not in self._cycles:
            cycle: Cycle
            if isinstance(kind, int):
                cycle = TwoPassCycle(self.text, kind, block, watched)
            else:
                cycle = kind.cycle(self.text)
            cycle.begin(sequence.tokens)
            if self.walk_of is not None:
                cycle.walk = self.walk_of(kind)
            self._cycles[key] = cycle
            while len(self._cycles) > MOST_GRAPHS:
                self._cycles.popitem(last=False)
        self._cycles.move_to_end(key)
        return self._cycles[key]

    def _times(self, form: Form, sequence: Sequence) -> Times:
        """What a cycle of each kind takes at the text's length, measured on cycles that change nothing;
        without CUDA graphs, the twins'."""
        if self.pool is None:
            return Times(TWIN_TIMES)
        self.text.begin(sequence.start, sequence.root, 0, finished=True)
        cycles = {kind: self._cycle(kind, form, sequence, watched=False) for kind in (PLAIN, *TREES)}
        for cycle in cycles.values():
            for _ in range(2):  # the second is captured
                cycle.launch(self.pool)()

        def launch(kind: int) -> Callable[[], float]:
            read = cycles[kind].launch(self.pool, timed=True)

            def milliseconds() -> float:
                found = read().milliseconds
                assert found is not None, "of a captured cycle"
                return found

            return milliseconds

        return Times(measured_times(tuple(cycles), launch))
