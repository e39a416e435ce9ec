"""How to draft, cycle by cycle: the kind of cycle that makes the most tokens a second.

A **kind** is what a cycle does: `PLAIN` decodes without a draft, `CHAIN` verifies one token a position, n > 0
the draft tree of n nodes; `ONE_PASS` drafts in the pass that verifies. Tokens of trees are known from each
other's cycles: best-first trees are prefixes of each other, so a walk in a large tree tells what a smaller
one would have kept. So one number is estimated from few cycles, the tokens of the smallest draft, and the
others by their ratios to each other, which change slowly; all by decayed sums. A one-pass cycle's draft comes
of the cycle before, so this kind is tried a few cycles in a row, drafts in turn likewise, and its ratio
known from those.

Costs are the measured times of the cycles (costs.py), or `TWIN_COSTS` in the host's loop. Only what runs can
be timed, and a cost that is too high would keep a kind away for ever: so beside a tree the others take turns
in being tried, and in the end what seems too dear too. Text never depends on any of this."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

ONE_PASS, PLAIN, CHAIN = -2, -1, 0
# Rows of the pass, root included, fill the kernels' tiles.
TREES = (15, 31, 63, 127)
# What a budget on the device may choose. No chain: a tree of as many rows holds it where the drafter is sure,
# and keeps more where it is not.
KINDS = (PLAIN, *TREES, ONE_PASS)
# Of cycles on the plain twins, in plain ones; their attention takes a tree path by path, and one costs more
# than it brings. Embedded checkpoint, 2-core AMD EPYC, 2026-11-26. Constant, so that counts can be repeated.
TWIN_COSTS = {PLAIN: 1.0, CHAIN: 2.0}

_DECAY = 0.97  # of what is known of the text, a cycle
_RATIO_DECAY = 0.995  # of ratios, an observation
_PRIOR_TOKENS, _PRIOR_CYCLES = 3.0, 2.0
_KEPT_CYCLES = 8.0  # as many of a text count for the next one
_HOPE = 0.5  # standard errors
_PRIOR_RATIO, _PRIOR_WEIGHT = 1.12, 40.0
_MARGIN = 1.02  # a kind must promise so much more than the one before it to be changed to
# Cycles until something else is tried beside a tree: the first and the longest wait, and how many times
# longer each is. By replaying traces of the embedded checkpoint and of simulated strong ones (bench/LOG.md,
# 2026-11-26).
_LOOK, _LONGEST_LOOK, _LONGER = 2.0, 96.0, 1.3
_CHANCE = 1.5  # a tree is tried if it would be the best with so many times the rate expected
# Plain cycles until a draft is tried: the first and the longest wait. A draft that brings nothing costs about
# one plain token, so that waiting 64 loses under 2 %.
_WAIT, _LONGEST_WAIT = 12, 64
_NEW_WAIT = 32  # the longest at the beginning of a text
# Of a new cost, compounded over the timed cycles since the last one of its kind; how many times of a kind
# count, by their median; and how many timed cycles pass until a kind is tried, however dear it seems: a cost
# that is wrong is mended when the median is, after three tries.
_FOLLOW, _TIMES, _OLD = 0.1, 5, 1000
# One-pass: its tokens a cycle in those of the smallest draft, how many cycles a try has (the first is without
# a draft), when one is worth it, and cycles until it: the first and the longest wait, and the wait for one
# that is not worth it. One-pass cycles in turn give way to a few drafts. Waits grow slowly: only cycles side
# by side tell which of the two is better, and a try tells little (bench/LOG.md, 2026-11-27): both by _LONGER,
# that until drafts up to _LONGEST_LOOK.
_PRIOR_SHARE, _SHARE_WEIGHT = 0.7, 96.0  # tokens of the smallest draft, about four tries
_TRY, _TRY_CHANCE = 7, 1.15
_TRY_WAIT, _LONGEST_TRY_WAIT, _WORSE_TRY_WAIT = 32, 256, 1024
_DRAFT_TRY, _DRAFT_WAIT = 4, 16
_KEPT_SHARE = 300.0  # as many tokens of the smallest draft count for the next text


def known_tokens(kind: int, path: Sequence[int]) -> dict[int, int]:
    """What each kind would have kept in a cycle of `kind`, where that can be told.

    path: indices of the accepted nodes, the root's 0 first; a tree's are in the order of its growth."""
    if kind <= CHAIN:
        return {kind: len(path)}
    return {n: sum(node <= n for node in path) for n in TREES if n <= kind} | {kind: len(path)}


def told(kind: int, kept: Mapping[int, int]) -> dict[int, int]:
    """What a cycle of `kind` lets know of what every kind would have kept."""
    return {n: kept[n] for n in ((kind,) if kind <= CHAIN else TREES) if n <= kind}


class Budget:
    """Chooses kinds for one text after another. costs: of every kind it may choose, in any unit."""

    def __init__(self, costs: Mapping[int, float]) -> None:
        self.costs = dict(costs)
        self._times = {kind: deque([cost] * _TIMES, _TIMES) for kind, cost in costs.items()}  # the last ones
        # timed cycles; how many there were when a kind was last timed, and when it last ran
        self._timed, self._timed_at, self._ran_at = 0, dict.fromkeys(costs, 0), dict.fromkeys(costs, 0)
        self._drafts = [kind for kind in (CHAIN, *TREES) if kind in self.costs]
        # decayed sums over cycles: 1, the tokens of the smallest draft, their squares
        self._sums = [_PRIOR_CYCLES * n for n in (1.0, _PRIOR_TOKENS, 2 * _PRIOR_TOKENS**2)]
        self._above = {kind: [0.0, 0.0] for kind in self._drafts[1:]}  # sums of a kind and of the one below
        # decayed sums of one-pass tokens and of the smallest draft's beside them, from the prior on
        self._share = [_SHARE_WEIGHT * _PRIOR_SHARE, _SHARE_WEIGHT]
        self._seen = 0  # cycles that told of the smallest draft
        # How many one-pass cycles came in a row, and drafts: of the two the last run and the one before it.
        self._one_passes, self._drafted = 0, 0
        self._in_one_pass = False  # which one is the last
        self._one_pass = 0.0  # tokens of one-pass cycles in a row, a decayed mean
        self._tried, self._tries = ONE_PASS, 0  # what is tried, and cycles of it still to be launched
        self._since_try, self._try_wait = 0, float(_TRY_WAIT)
        self._last: int | None = None
        self._since = 0  # cycles since something else was tried
        self._wait: float = _WAIT

    def tokens(self, kind: int) -> float:
        """Expected tokens of a cycle; of a draft, at the upper end of what its few cycles leave open, so that
        bad luck does not end drafting."""
        if kind == PLAIN:
            return 1.0
        cycles, mean, square = self._sums[0], self._sums[1] / self._sums[0], self._sums[2] / self._sums[0]
        expected = mean + _HOPE * math.sqrt(max(square - mean**2, 0.0) / cycles)
        if kind == ONE_PASS:
            return self._one_pass_share() * expected
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
        if self._last == PLAIN:
            self._wait = min(self._wait, _NEW_WAIT)
        keep = min(1.0, _KEPT_SHARE / self._share[1])
        self._share = [keep * x for x in self._share]
        self._tries = self._one_passes = self._drafted = 0

    def next(self) -> int:
        """The kind of the next cycle: the best one; at times another, to learn what it is worth now."""
        if self._tries:
            self._tries -= 1
            return self._tried
        able = self.costs if self._seen >= _TRY else [kind for kind in self.costs if kind != ONE_PASS]
        best = max(able, key=self.rate)
        if self._last in self.costs and self.rate(best) < _MARGIN * self.rate(self._last):
            best = self._last
        if best != self._last:
            self._last, self._since = best, 0
            self._wait = {PLAIN: _WAIT, ONE_PASS: _DRAFT_WAIT}.get(best, _LOOK)
        if best not in (PLAIN, ONE_PASS) and self._tries_one_pass(best):
            return ONE_PASS
        self._since += 1
        if self._since < self._wait:
            return best
        other = self._other(best)
        if other is None:
            return best
        self._since = 0
        if best == ONE_PASS:
            self._tried, self._tries = other, _DRAFT_TRY - 1
        plain = best == PLAIN
        self._wait = min(2 * self._wait, _LONGEST_WAIT) if plain else min(_LONGER * self._wait, _LONGEST_LOOK)
        return other

    def _other(self, best: int) -> int | None:
        """What to try. In place of no draft and of one-pass the best draft. In place of a tree a kind that
        has not run for very long; else, of the trees that might be better, the one that has not run for
        longest, to begin with the largest, which tells of all smaller ones. A smaller tree only tells what it
        costs, so it is tried only where cycles are timed."""
        if best in (PLAIN, ONE_PASS):
            return max(self._drafts, key=self.rate, default=None)
        oldest = min((kind for kind in self.costs if kind != ONE_PASS), key=self._ran_at.__getitem__)
        if self._timed - self._ran_at[oldest] > _OLD:
            return oldest
        others = [k for k in self._drafts if k > best or (k < best and self._timed)]
        might = [k for k in others if _CHANCE * self.rate(k) >= self.rate(best)]
        return min(might, key=lambda kind: (self._ran_at[kind], -kind), default=None)

    def _tries_one_pass(self, best: int) -> bool:
        """Whether one-pass cycles begin here to show what they bring. Seldom: a try is long."""
        self._since_try += 1
        if ONE_PASS not in self.costs or self._since_try < self._try_wait:
            return False
        if _TRY_CHANCE * self.rate(ONE_PASS) < self.rate(best) and self._since_try < _WORSE_TRY_WAIT:
            return False
        self._since_try = 0
        self._try_wait = min(_LONGER * self._try_wait, _LONGEST_TRY_WAIT)
        self._tried, self._tries = ONE_PASS, _TRY - 1
        return True

    def _compare(self, one_pass: float, smallest_draft: float) -> None:
        pair = self._share
        pair[0] = pair[0] * _RATIO_DECAY + one_pass
        pair[1] = pair[1] * _RATIO_DECAY + smallest_draft

    def _one_pass_share(self) -> float:
        tokens, expected = self._share
        return tokens / expected

    def time(self, kind: int, cost: float | None) -> None:
        """Follow the cost of a kind as texts get longer and the GPU's clock changes, by the median of its
        last times, as cycles may be held up, one or two in a row. None: not measured."""
        self._timed += cost is not None
        self._ran_at[kind] = self._timed
        if cost is None:
            return
        age, self._timed_at[kind] = self._timed - self._timed_at[kind], self._timed
        known, times = self.costs[kind], self._times[kind]
        times.append(min(cost, 2 * known))
        self.costs[kind] += (1 - (1 - _FOLLOW) ** age) * (median(times) - known)

    def observe(self, known: Mapping[int, int]) -> None:
        """Learn from a cycle, its `known_tokens`; nothing of a one-pass cycle that had no draft."""
        base = float(known.get(self._drafts[0], 0.0))
        if ONE_PASS in known:
            kept = known[ONE_PASS]
            if not self._in_one_pass:
                self._in_one_pass, self._one_passes = True, 0
            self._one_passes += 1
            self._one_pass += (kept - self._one_pass) / min(self._one_passes, 1 / (1 - _DECAY))
            if self._one_passes < _TRY <= self._drafted:  # how it compares with drafts just before
                self._compare(kept, self._sums[1] / self._sums[0])
            else:  # how well the text can be drafted now
                base = kept / self._one_pass_share()
        elif base:
            if self._in_one_pass:
                self._in_one_pass, self._drafted = False, 0
            self._seen, self._drafted = self._seen + 1, self._drafted + 1
            if self._drafted < _TRY <= self._one_passes:
                self._compare(self._one_pass, base)
        elif PLAIN in known:  # what came before it is no neighbour any more
            self._one_passes = self._drafted = 0
        self._sums = [_DECAY * x for x in self._sums]
        if base:
            self._sums = [x + base**i for i, x in enumerate(self._sums)]
        for below, kind in zip(self._drafts, self._drafts[1:], strict=False):
            if below in known and kind in known:
                pair = self._above[kind]
                pair[0] = pair[0] * _RATIO_DECAY + known[kind]
                pair[1] = pair[1] * _RATIO_DECAY + known[below]
