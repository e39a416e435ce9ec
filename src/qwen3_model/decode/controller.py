"""Strategy "auto": which kind of cycle comes next, so that a text gets the most tokens a second.

A **kind** is what a cycle does: `PLAIN` decodes without a draft, `CHAIN` verifies one token a position, n > 0
verifies a draft tree of n nodes, `LOOKUP` verifies a chain of what followed the text's last tokens before
(orthrus_kernels/lookup.py). A controller chooses among PLAIN, LOOKUP, and trees or CHAIN, as far as a model
has them; one-pass cycles run only where they are asked for by name.

The best kind keeps the most tokens for its time. What it keeps is a property of the text, and a `Controller`
learns it, one controller a text: the decayed mean of what the smallest draft keeps, and for a larger tree the
decayed ratio to it. Best-first trees are prefixes of each other, so every walk in a larger tree also tells
what the smallest one would have kept. What lookup would keep is known without a cycle of it (foreseen.py),
and its decayed mean counts. What a kind takes is a property of the model and the GPU, and all texts share one
`Times`. The text itself never depends on any of this.

The best kind alone would never learn better, so other kinds run at times. While plain decoding or lookup is
best, a tree or chain runs once for so many cycles that tries which keep one token cost at most LOSS of the
time. Any other kind that has not run for LOOK cycles runs: it may keep more by now, or its time may be wrong.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from statistics import median

from .cycle import IN_FLIGHT, LOOKUP_ROWS
from .foreseen import Foresees

LOOKUP, PLAIN, CHAIN = -2, -1, 0
# Nodes of the trees that a controller chooses among. With the root they fill the kernels' tiles of rows.
# With recorded acceptance trees of 15 and 127 nodes are always slower (bench/LOG.md, 2026-11-28).
TREES = (31, 63)
# Times on the plain twins, in plain cycles. Their attention takes a tree path by path, so a tree costs more
# than it brings. Embedded checkpoint, 2-core AMD EPYC, 2026-11-26; lookup's 16 rows 2026-11-29. They are
# constant: counts can be repeated.
TWIN_TIMES = {PLAIN: 1.0, LOOKUP: 1.2, CHAIN: 2.0}

# Of what is known of the text, a cycle, and of lookup a token: about the last 25 count. Lookup finds much for
# a while and then little, and while it finds much its cycles are long.
DECAY = 0.96
RATIO_DECAY = 0.99  # of a larger tree's ratio, a cycle of it: ratios are close to 1 and change slowly
FIRST_TOKENS, FIRST_CYCLES = 3.0, 4.0  # of the smallest draft before any text: it begins with some drafts
FIRST_RATIO, RATIO_TOKENS = 1.07, 200.0  # recorded ratios are 1.04 to 1.09; as if seen on so many tokens
FIRST_FOUND = 1.3  # tokens of lookup before any text, over FIRST_CYCLES too
# Drafts that are learnt from cycles of their own count as this much better: a few unlucky ones should not end
# drafting.
FAVOUR = 1.05
LOSS = 0.02  # of the time, at most, for trees and chains that are tried while none of them is best
LOOK = 256  # cycles of all texts until any other kind that has not run is tried
# Texts and tokens that `next` walks over for lookup, at most: many texts take turns, and a long prompt takes
# some cycles. A text takes 3 µs and a token 0.6, of 64 texts 1.6 (2-core AMD EPYC, 2026-11-30).
WALKS, WALKED = 8, 1024
LAST_TIMES = 5  # of a kind, of which the median counts: two cycles that were held up change nothing
ROUNDS = 5  # of first measurements that count: the last ones
AWAKE = 0.1  # seconds of work until an idle GPU runs at its speed, by far enough


class Times:
    """What a cycle of each kind takes, shared by all texts of one model and GPU."""

    def __init__(self, first: Mapping[int, float]) -> None:
        """first: of every kind that may be chosen, in any unit: `measured_times`, or TWIN_TIMES."""
        self._last = {kind: deque([cost] * LAST_TIMES, LAST_TIMES) for kind, cost in first.items()}
        self._cycles, self._ran_at = 0, dict.fromkeys(first, 0)
        self.kinds = tuple(first)

    def __getitem__(self, kind: int) -> float:
        """The median of the last LAST_TIMES cycles of a kind."""
        return median(self._last[kind])

    def observe(self, kind: int, cost: float | None) -> None:
        """A cycle of a kind ended, in the unit of the first times; None: its time was not measured."""
        self._cycles += 1
        self._ran_at[kind] = self._cycles
        if cost is not None:
            self._last[kind].append(cost)

    @property
    def cycles(self) -> int:
        """How many ended."""
        return self._cycles

    def unused(self, kind: int) -> int:
        """How many cycles ended since the last one of a kind."""
        return self._cycles - self._ran_at[kind]


class Controller:
    """Chooses the kind of each cycle of one text."""

    def __init__(
        self, times: Times, before: Controller | None = None, foresees: Foresees | None = None,
        rows: int = LOOKUP_ROWS,
    ) -> None:  # fmt: skip
        """times: of the kinds to choose from. before: the controller of the text before this one, with the
        same kinds; what it learnt is where this one begins. None: of the first text. foresees: what lookup
        would keep of the text, in cycles of so many rows; None: nobody says, and the text asks for none."""
        self.times, self._foresees, self._rows = times, foresees, rows
        self._smallest, *larger = sorted(kind for kind in times.kinds if kind > PLAIN) or [CHAIN]
        # decayed sums: cycles with a draft, and tokens that the smallest draft would have kept in them
        self._cycles, self._tokens = FIRST_CYCLES, FIRST_CYCLES * FIRST_TOKENS
        self._found = FIRST_CYCLES, FIRST_CYCLES * FIRST_FOUND  # the same of lookup
        # of each larger tree, over its own cycles: tokens of the smallest draft, and its own
        self._pairs = dict.fromkeys(larger, (RATIO_TOKENS, RATIO_TOKENS * FIRST_RATIO))
        self._since = 0  # cycles since the last tree or chain
        if before is not None:
            self._cycles, self._tokens, self._since = before._cycles, before._tokens, before._since
            self._pairs, self._found = dict(before._pairs), before._found
        self._of_lookup = self._found[1] / self._found[0]  # tokens that a cycle of it is expected to keep

    def end(self) -> None:
        """The text goes on without this controller, or has ended: what was learnt stays, and what foresees,
        which holds all of the text, goes."""
        self._foresees = None

    def tokens(self, kind: int) -> float:
        """Tokens that a cycle of a kind is expected to keep."""
        if kind == LOOKUP:
            return 1.0 if self._foresees is None else self._of_lookup  # every cycle keeps a token
        smallest, own = self._pairs.get(kind, (1.0, 1.0))
        return 1.0 if kind == PLAIN else self._tokens / self._cycles * own / smallest

    def next(self, *beside: Controller) -> int:
        """The kind of the next cycle. Cycles before it may be launched and not observed yet. beside: the
        controllers of the other texts in the cycle, with the same times."""
        texts = self, *beside
        _foresee(texts)
        looks = any(c._foresees is not None for c in texts)
        kinds = [kind for kind in self.times.kinds if looks or kind != LOOKUP]
        rates = {kind: sum(c.tokens(kind) for c in texts) / self.times[kind] for kind in kinds}
        best = max(rates, key=lambda kind: rates[kind] * (FAVOUR if kind > PLAIN else 1.0))
        kind = self._due(kinds, best, len(texts) / rates[best])
        self._since = self._since + 1 if kind <= PLAIN else 0
        return kind

    def _due(self, kinds: Sequence[int], best: int, usual: float) -> int:
        """One of these kinds that runs though another is the best, or that. usual: what a token of each text
        takes with the best."""
        times, drafts = self.times, [kind for kind in kinds if kind > PLAIN]
        if best <= PLAIN and drafts:
            draft = max(drafts, key=times.unused)
            if LOSS * self._since * times[best] >= times[draft] - usual:
                return draft
            kinds = [kind for kind in kinds if kind <= PLAIN]
        other = max((kind for kind in kinds if kind != best), key=times.unused, default=best)
        return other if times.unused(other) >= LOOK else best

    def observe(self, kind: int, path: Sequence[int] | None) -> None:
        """Learn from a cycle of a kind. path: numbers of the accepted nodes, the root's 0 first; a tree's are
        in the order of its growth. None: the cycle had no draft. One of lookup says nothing of other drafts.
        """
        self._cycles, self._tokens = DECAY * self._cycles, DECAY * self._tokens
        if path is None or kind <= PLAIN:
            return
        kept = len(path) if kind == CHAIN else sum(node <= self._smallest for node in path)
        self._cycles, self._tokens = self._cycles + 1, self._tokens + kept
        if kind in self._pairs:
            smallest, own = self._pairs[kind]
            self._pairs[kind] = RATIO_DECAY * smallest + kept, RATIO_DECAY * own + len(path)

    @property
    def unread(self) -> int:
        """Tokens of the text from which is still to be learnt what lookup would have kept."""
        return 0 if self._foresees is None else self._foresees.unread

    def _follow(self, most: int) -> int:
        """Learn what lookup would have kept, from tokens that are new; returns how many were walked over."""
        if self._foresees is None:
            return 0
        kept, at_least, walked = self._foresees.follow(self._rows, most)
        for tokens in kept:
            self._found = _aged(self._found, tokens)
        ways = self._found, _aged(self._found, at_least)
        self._of_lookup = max(tokens / cycles for cycles, tokens in ways)
        return walked


def _aged(sums: tuple[float, float], kept: int) -> tuple[float, float]:
    """Cycles and tokens with one more cycle."""
    aged = DECAY**kept
    return aged * sums[0] + 1, aged * sums[1] + kept


def _foresee(texts: Sequence[Controller]) -> None:
    """Have some texts of a cycle learn what lookup would have kept. Those with the fewest new tokens come
    first: a long prompt takes what they leave."""
    turns, left = -(-len(texts) // WALKS), WALKED
    for text in sorted(texts[texts[0].times.cycles % turns :: turns], key=attrgetter("unread")):
        left -= text._follow(left)


def measured_times(kinds: Sequence[int], launch: Callable[[int], Callable[[], float]]) -> dict[int, float]:
    """ms of a cycle of each kind, medians of the last ROUNDS of as many rounds as take AWAKE.

    Kinds are timed in turn, not one after another: a GPU that lay idle while a graph was captured is slow for
    a while, and what its clock does must meet all kinds alike. launch: starts a timed cycle of a kind that is
    captured already, one that changes nothing, and returns a function that waits for its milliseconds."""
    times: dict[int, list[float]] = {kind: [] for kind in kinds}
    unread: deque[tuple[int, Callable[[], float]]] = deque()

    def read_first() -> None:
        kind, read = unread.popleft()
        times[kind].append(read())

    began, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - began < AWAKE:
        for kind in kinds:
            unread.append((kind, launch(kind)))
            if len(unread) == IN_FLIGHT:  # so many that the GPU never waits for the host: times are its own
                read_first()
        rounds += 1
    while unread:
        read_first()
    return {kind: median(times[kind][-ROUNDS:]) for kind in kinds}
