"""How much to draft, cycle by cycle: the kind of cycle that makes the most tokens a second.

A **kind** is what a cycle verifies: `PLAIN` decodes without a draft, `CHAIN` verifies one token a position,
n > 0 the draft tree of n nodes. Tokens of kinds are known from each other's cycles: best-first trees are
prefixes of each other, so a walk in a large tree tells what a smaller one would have kept, and how far it
went along first children what a chain would have (at least). So one number is estimated from few cycles, the
chain's tokens, and the others by their ratios to each other, which change slowly; all by decayed sums.

Costs are the measured times of the cycles (device.py), or `TWIN_COSTS` in the host's loop. Text never
depends on any of this."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

PLAIN, CHAIN = -1, 0
# Rows of the pass, root included, fill the kernels' tiles.
TREES = (15, 31, 63, 127)
KINDS = (PLAIN, CHAIN, *TREES)
# Of cycles on the plain twins, in plain ones: their attention takes a tree path by path. Embedded checkpoint,
# a 2-core AMD EPYC, 2026-11-26. Constant, so that counts can be repeated.
TWIN_COSTS = {PLAIN: 1.0, CHAIN: 2.0, 15: 4.8, 31: 6.5, 63: 10.0, 127: 16.0}

_DECAY = 0.97  # of what is known of the text, a cycle
_RATIO_DECAY = 0.98  # of ratios, an observation
_PRIOR_TOKENS, _PRIOR_CYCLES = 3.0, 2.0
_KEPT_CYCLES = 8.0  # as many of a text count for the next one
_HOPE = 0.5  # standard errors
_PRIOR_RATIO, _PRIOR_WEIGHT = 1.08, 6.0
_MARGIN = 1.02  # a kind must promise so much more than the one before it to be changed to
# Cycles until the next larger tree is tried: the first and the longest wait.
_LOOK, _LONGEST_LOOK = 2, 64
_CHANCE = 1.5  # a tree is tried if it would be the best with so many times the tokens expected
# Plain cycles until a draft is tried: the first and the longest wait. A draft that brings nothing costs about
# one plain token, so that waiting 64 loses under 2 %.
_WAIT, _LONGEST_WAIT = 8, 64
_NEW_WAIT = 16  # the longest at the beginning of a text
_FOLLOW = 0.1  # of a new cost


def known_tokens(kind: int, path: Sequence[int], leading: int) -> dict[int, int]:
    """What each kind would have kept in a cycle of `kind`, where that can be told.

    path: indices of the accepted nodes, the root's 0 first; a tree's are in the order of its growth. leading:
    how many of them, without the root, are first children all the way."""
    if kind <= CHAIN:
        return {kind: len(path)}
    smaller = {n: sum(node <= n for node in path) for n in TREES if n <= kind}
    return {CHAIN: 1 + leading, **smaller, kind: len(path)}


def first_children(parents: Sequence[int], path: Sequence[int]) -> int:
    """How many nodes of a path behind the root are first children all the way down."""
    count = 0
    for node in path[1:]:
        if parents.index(parents[node]) != node:
            break
        count += 1
    return count


def told(kind: int, kept: Mapping[int, int]) -> dict[int, int]:
    """What a cycle of `kind` lets know of what every kind would have kept."""
    if kind <= CHAIN:
        return {kind: kept[kind]}
    return {CHAIN: min(kept[CHAIN], kept[kind])} | {n: kept[n] for n in TREES if n <= kind}


class Budget:
    """Chooses kinds for one text after another. costs: of every kind it may choose, in any unit; may be
    changed while it runs."""

    def __init__(self, costs: Mapping[int, float]) -> None:
        self.costs = dict(costs)
        self._drafts = [kind for kind in KINDS if kind in self.costs and kind != PLAIN]
        # decayed sums over cycles: 1, the chain's tokens, their squares
        self._sums = [_PRIOR_CYCLES * n for n in (1.0, _PRIOR_TOKENS, 2 * _PRIOR_TOKENS**2)]
        self._above = {kind: [0.0, 0.0] for kind in self._drafts[1:]}  # sums of a kind and of the one below
        self._last: int | None = None
        self._since = 0  # cycles since something else was tried
        self._wait = _WAIT

    def tokens(self, kind: int) -> float:
        """Expected tokens of a cycle; of a draft, at the upper end of what its few cycles leave open, so that
        bad luck does not end drafting."""
        if kind == PLAIN:
            return 1.0
        cycles, mean, square = self._sums[0], self._sums[1] / self._sums[0], self._sums[2] / self._sums[0]
        expected = mean + _HOPE * math.sqrt(max(square - mean**2, 0.0) / cycles)
        for draft in self._drafts[1 : self._drafts.index(kind) + 1]:
            above, below = self._above[draft]
            expected *= (above + _PRIOR_WEIGHT * _PRIOR_RATIO) / (below + _PRIOR_WEIGHT)
        return expected

    def rate(self, kind: int) -> float:
        """Expected tokens for a unit of cost."""
        return self.tokens(kind) / self.costs[kind]

    def begin(self) -> None:
        """A new text: what was learnt of the last one counts less."""
        keep = min(1.0, _KEPT_CYCLES / self._sums[0])
        self._sums = [keep * x for x in self._sums]
        self._wait = min(self._wait, _NEW_WAIT)

    def next(self) -> int:
        """The kind of the next cycle: the best one; at times another, to learn what it brings now."""
        best = max(self.costs, key=self.rate)
        if self._last in self.costs and self.rate(best) < _MARGIN * self.rate(self._last):
            best = self._last
        if best != self._last:
            self._last, self._since = best, 0
            self._wait = _WAIT if best == PLAIN else _LOOK
        larger = self._drafts if best == PLAIN else self._drafts[self._drafts.index(best) + 1 :]
        other = max(larger, key=self.rate, default=best)
        self._since += 1
        if self._since < self._wait or (best != PLAIN and _CHANCE * self.rate(other) < self.rate(best)):
            return best
        self._since, self._wait = 0, min(2 * self._wait, _LONGEST_WAIT if best == PLAIN else _LONGEST_LOOK)
        return other

    def time(self, kind: int, cost: float | None) -> None:
        """Follow the cost of a kind as the text gets longer; None: not measured. A cycle that was held up
        counts as twice the cost at most: a kind that is not chosen for it would never be measured again."""
        if cost is not None:
            known = self.costs[kind]
            self.costs[kind] += _FOLLOW * (min(cost, 2 * known) - known)

    def observe(self, known: Mapping[int, int]) -> None:
        """Learn from a cycle, its `known_tokens`."""
        self._sums = [_DECAY * x for x in self._sums]
        if CHAIN in known:
            self._sums = [x + known[CHAIN] ** i for i, x in enumerate(self._sums)]
        for below, kind in zip(self._drafts, self._drafts[1:], strict=False):
            if below in known and kind in known:
                pair = self._above[kind]
                pair[0] = pair[0] * _RATIO_DECAY + known[kind]
                pair[1] = pair[1] * _RATIO_DECAY + known[below]
