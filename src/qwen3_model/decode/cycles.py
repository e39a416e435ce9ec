"""The cycles over one cache: which comes next, launched ahead of what the host knows.

On a GPU the host launches cycle n + 1 before it reads what cycle n kept, so that the GPU does not wait for
Python; a cycle launched after a text has ended changes nothing for it. A graph serves all texts, lengths and
settings of its key: what the cycle does, how many seats it has, and the form of the choice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from orthrus_kernels import FORMS, Form
from orthrus_kernels.layout import State

from .controller import CHAIN, LOOKUP, PLAIN, Controller, Times
from .cycle import Allot, Cycle, Outcome, Read, Slots, Walk, pairs_of
from .cycle_times import EVERY_NODE, capture, key_time, times_of
from .foreseen import Foreseen, Foresees
from .groups import Group, Kind, Seated, groups_of
from .kinds import ahead, block_of, kinds_of_auto, riders_of, seat_counts, twin_times, with_riders
from .pace import Pace
from .prompt import rows_for
from .prompt_rows import Piece
from .sequence import Sequence as Text
from .two_pass import TwoPassCycle

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Network

MOST_GRAPHS = 64  # beside those of `ready`; the one not used for longest goes first


class Walks(Protocol):
    """Says what cycles keep, in place of the target's choices (bench/forced_walk.py)."""

    looks: bool  # whether what cycles of lookup keep is known

    def begin(self, text: Text, slot: int) -> None:
        """A text runs in a slot from now on, in turn on the stream."""

    def walk(self, kind: Kind, block: int) -> Walk:
        """Called as `walk` of walk.py is, by cycles of a kind with draft blocks of so many rows."""

    def allot(self, by_scores: Allot) -> Allot:
        """Called in place of `by_scores`, which is `allot` of allot.py."""

    def foresees(self, text: Text) -> Foresees:
        """Of a text that has begun; asked where it `looks`."""


class Launched(NamedTuple):
    """A cycle that was launched and not read yet."""

    kind: Kind
    cycle: Cycle
    seated: Seated
    epochs: tuple[int, ...]  # of the texts: one that was preempted since takes nothing
    controllers: tuple[Controller | None, ...]  # that learn from it
    read: Read
    added: float = 0.0  # ms that it takes for prompts
    states: Tensor | None = None  # of the last tokens of the pieces that it carries, [pieces, E]


class Cycles:
    """The cycles of one cache, with their graphs."""

    def __init__(self, model: Network, cache: KVCache, slots: int, pool: Any) -> None:
        """slots: texts that may run at once. pool: of CUDA graphs; None: every kernel is launched by the
        host."""
        self.model, self.slots, self.pool = model, Slots(model, cache, slots), pool
        self.walks: Walks | None = None
        self.pace = Pace()  # of prompts beside these cycles
        self.controllers: dict[tuple, Controller] = {}  # of the last text of each form, block size and seats
        self._of: dict[Text, tuple[tuple, Controller]] = {}  # the controller of each text that runs
        self._foresees: dict[Text, Foresees] = {}  # of those that run
        self._cycles: OrderedDict[tuple, Cycle] = OrderedDict()
        self._seated: Seated = ()  # of the last launch
        self._groups: list[Group] = []
        self._times_of: dict[tuple, Times] = {}  # by form, block size and seats
        self._measured: dict[tuple, dict[int, float]] = {}  # ms of kinds, by block size and seats
        self._added: dict[tuple, float] = {}  # ms of rows for prompts, by kind, block size and seats
        block = model.config.block_size or 0
        made = [ahead(kinds_of_auto(seats, block), block, seats, slots) for seats in seat_counts(slots)]
        self.most = MOST_GRAPHS + (len(FORMS) * sum(map(len, made)) if slots > 1 else 0)

    def force(self, walks: Walks) -> None:
        """What cycles keep is `walks`' to say from now on; before the first text."""
        self.walks = walks
        self._cycles.clear()

    def __len__(self) -> int:
        """How many cycles there are."""
        return len(self._cycles)

    def ready(self, form: Form, block: int, seats: int) -> None:
        """Capture and time the cycles that texts of a form take in so many seats, where nobody asks for other
        ones. block: rows of a draft block; 0: the model has none. Texts in the slots keep what they have.
        Without CUDA graphs nothing is launched."""
        self.slots.choice.form = form
        self._times(form, block, seats)

    def rehearse(self, kinds: Sequence[Kind], form: Form, block: int, seats: int) -> None:
        """Launch cycles once, for a recording that runs none of their kernels (compile_ahead.py)."""
        self.slots.choice.form = form
        for kind, riders in ahead(kinds, block, seats, len(self.slots.state)):
            cycle = self._cycle(kind, block, form, seats, riders=riders)
            cycle.seat(range(min(seats, len(self.slots.state))))
            for _ in cycle.run():
                pass

    def again(self, kind: Kind) -> None:
        """Launch the newest cycle of a kind once more; behind the end of a text that changes nothing."""
        next(self._cycles[key] for key in reversed(self._cycles) if key[0] == kind).launch(self.pool)

    def begin(self, text: Text, slot: int, room: int) -> None:
        """A text whose prompt is committed runs in a slot from now on. room: positions that its pages
        hold."""
        ends, likeliest = text.stream.end_tokens, text.request.top_logprobs > 0
        settings = slot, text.sampling, text.tokens, text.prompt, ends, text.least, likeliest
        self.slots.choice.put(*settings, masked=text.request.grammar is not None)
        if text.matcher is not None:
            text.matcher.begin(text.tokens, text.prompt)
        self.slots.standing.matchers[slot] = text.matcher
        columns = {
            State.START: text.start, State.ROOT: text.root, State.LEFT: text.remaining, State.FINISHED: 0,
            State.ROOM: room, State.NODES: _most_nodes(text),
        }  # fmt: skip
        self.slots.put(slot, columns, text.tokens)
        if self.walks is not None:
            self.walks.begin(text, slot)

    def end(self, text: Text) -> None:
        """A text runs no longer."""
        self._leave(text)
        self._foresees.pop(text, None)

    def launch(self, seated: Seated, pieces: Sequence[Piece] = ()) -> tuple[Launched, ...]:
        """Launch a cycle of the texts that draft in one pass and one of the others, or either alone; what
        they add to each text, `read` finds out. pieces: of other texts' prompts, MOST_PARTS at most, which
        the last one carries if its verify pass has rows for them."""
        *first, last = self._groups_of(seated)
        return (*map(self._launch, first), self._launch(last, pieces))

    def _groups_of(self, seated: Seated) -> list[Group]:
        if seated != self._seated:
            self._seated, self._groups = seated, groups_of(seated, self.slots.choice.form_of)
        return self._groups

    def _launch(self, group: Group, pieces: Sequence[Piece] = ()) -> Launched:
        """Launch one cycle."""
        self.slots.choice.form = group.form
        kind, timed = self._kind(group)
        carrier, tokens = _carrier(group, kind), sum(len(piece.tokens) for piece in pieces)
        self.pace.riders = room = riders_of(carrier, group.block, group.seats)
        riders, added = 0, 0.0
        if 0 < tokens <= room:
            kind, timed = carrier, False
            riders = rows_for(tokens) if self.pool is None else room  # a graph has one number of them
        cycle = self._cycle(kind, group.block, group.form, group.seats, riders)
        cycle.seat(group.slots)
        carried = cycle.riders if isinstance(cycle, TwoPassCycle) else None
        if carried is not None:
            carried.fill(pieces)
            added = self._added.get((kind, block_of(kind, group.block, group.seats), group.seats), 0.0)
            added += sum(self.pace.read(len(of.tokens), of.start) for of in pieces)
        read = cycle.launch(self.pool, timed=timed)
        states = None if carried is None else carried.states
        return Launched(kind, cycle, group.seated, group.epochs, group.controllers, read, added, states)

    def read(self, step: Sequence[Launched]) -> list[tuple[Text, Outcome]]:
        """What the cycles of one `launch` have added to the texts that still run, and learn from it."""
        outcomes = [launched.read() for launched in step]
        took = 1e3 * sum(sum(of_cycle[0].run.seconds) for of_cycle in outcomes)
        self.pace.cycle(took - sum(launched.added for launched in step))
        return [found for of in zip(step, outcomes, strict=True) for found in self._found(*of)]

    def _found(self, launched: Launched, outcomes: list[Outcome]) -> list[tuple[Text, Outcome]]:
        kind, cycle = launched.kind, launched.cycle
        of, found = zip(launched.seated, launched.epochs, launched.controllers, outcomes, strict=False), []
        timed: set[Times] = set()
        for seat, ((text, _), epoch, controller, end) in enumerate(of):
            if text.finished or text.epoch != epoch:
                continue
            if text.on_run is not None and kind != PLAIN:
                cycle.tell(seat, end.run)
            if controller is not None and isinstance(kind, int):
                controller.observe(kind, end.run.path if end.run.nodes else None)
                timed.add(controller.times)
            if text.request.top_logprobs and end.likeliest is not None:
                told = end.likeliest[: len(end.run.tokens)]
                end.run.top_logprobs = pairs_of(told, text.request.top_logprobs)
            found.append((text, end))
        for times in timed:  # several texts share one
            assert isinstance(kind, int)
            times.observe(kind, outcomes[0].milliseconds)
        return found

    def _kind(self, group: Group) -> tuple[Kind, bool]:
        """The kind of the next cycle, and whether it is to be timed."""
        # where one token is left there is nothing to propose
        if all(text.remaining <= 1 for text in group.drafted):
            return PLAIN, False
        if group.shape is not None:
            return group.shape, False
        if not group.led:
            return group.kind, False
        if not any(group.controllers):
            key = group.form, group.block, group.seats
            of = {text: self._controller(text, key) for text in group.led}
            group.controllers = tuple(of.get(text) for text in group.texts)
        first, *beside = filter(None, group.controllers)
        return first.next(*beside), True

    def _controller(self, text: Text, key: tuple[Form, int, int]) -> Controller:
        """What says the kinds that suit a text in cycles of a form, block size and number of seats; it begins
        with what the last text of such cycles has taught."""
        if text not in self._of or self._of[text][0] != key:
            self._leave(text)
            rows = block_of(LOOKUP, *key[1:])
            learnt = self._times(*key), self.controllers.get(key)
            self.controllers[key] = Controller(*learnt, self._foresees_of(text), rows)
            self._of[text] = key, self.controllers[key]
        return self._of[text][1]

    def _leave(self, text: Text) -> None:
        """A text's controller leads it no longer; others begin with what it has learnt."""
        if text in self._of:
            self._of.pop(text)[1].end()

    def _foresees_of(self, text: Text) -> Foresees | None:
        """What lookup would keep of a text; None where none of its cycles looks up."""
        if text.request.strategy != "auto" or not self._looks:
            return None
        if text not in self._foresees:
            known = Foreseen(text.tokens) if self.walks is None else self.walks.foresees(text)
            self._foresees[text] = known
        return self._foresees[text]

    @property
    def _looks(self) -> bool:
        """Whether "auto" may choose lookup."""
        return self.walks is None or self.walks.looks

    def _cycle(self, kind: Kind, block: int, form: Form, seats: int, riders: int = 0) -> Cycle:
        """The cycle of a kind with so many rows for prompts, made when it is first asked for."""
        block = block_of(kind, block, seats)
        key = kind, block, form, seats, self.model.bigram, riders
        if key not in self._cycles:
            cycle: Cycle
            if isinstance(kind, int):
                cycle = TwoPassCycle(self.slots, seats, kind, block, riders)
            else:
                cycle = kind.cycle(self.slots, seats)
            if self.walks is not None:
                cycle.walk, cycle.allot = self.walks.walk(kind, block), self.walks.allot(cycle.allot)
            self._cycles[key] = cycle
            while len(self._cycles) > self.most:
                self._cycles.popitem(last=False)
        self._cycles.move_to_end(key)
        return self._cycles[key]

    def _times(self, form: Form, block: int, seats: int) -> Times:
        """What a cycle of each kind that "auto" chooses among takes. At first, measured on cycles that change
        nothing, for texts as long as those that run then; without CUDA graphs, the twins'."""
        key = form, block, seats
        if key not in self._times_of:
            twins = self.pool is None
            self._times_of[key] = Times(twin_times(block, self._looks)) if twins else self._first_times(*key)
        return self._times_of[key]

    def _first_times(self, form: Form, block: int, seats: int) -> Times:
        """Captured for each form, measured with the first one that is asked for: another form's choice takes
        microseconds more, and what cycles take is learnt as they run."""
        kinds = kinds_of_auto(seats, block, self._looks)
        keys = ahead(kinds, block, seats, len(self.slots.state))
        cycles = [self._cycle(kind, block, form, seats, riders=riders) for kind, riders in keys]
        capture(cycles, self.slots, self.pool)
        if (block, seats) not in self._measured:
            took = dict(zip(keys, times_of(cycles, self.slots, self.pool), strict=True))
            self._measured[block, seats] = {kind: took[kind, 0] for kind in kinds}
            for kind, rows in keys[len(kinds) :]:
                added = max(took[kind, rows] - took[kind, 0], 0.0)
                self._added[kind, block_of(kind, block, seats), seats] = added
        return Times(self._measured[block, seats])

    def time_keys(self) -> None:
        """Measure what a row of a prompt takes for each key that it sees, in the cycle of `ready` for one
        text without a draft."""
        self.slots.choice.form = FORMS[0]
        cycle = self._cycle(PLAIN, 0, FORMS[0], seats=1, riders=riders_of(PLAIN, 0, 1))
        assert isinstance(cycle, TwoPassCycle)
        self.pace.key = key_time(cycle, self.slots, self.pool)


def _carrier(group: Group, kind: Kind) -> Kind:
    """The kind of cycle that carries prompts where one of a kind would come next. Of the drafts that "auto"
    chooses among, one is captured with rows for prompts."""
    if kind == PLAIN or not isinstance(kind, int) or not group.led:
        return kind
    kinds = next(filter(None, group.controllers)).times.kinds
    return with_riders(kinds)[-1]


def _most_nodes(text: Text) -> int:
    """Nodes of a text's tree at most, its root one of them."""
    if text.request.strategy == "autoregressive":
        return 1
    nodes = text.request.tree_nodes
    return nodes + 1 if isinstance(nodes, int) and nodes > CHAIN else EVERY_NODE
