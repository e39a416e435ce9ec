"""The steady part of a closed loop: each client has a request, and none its first. Before it the prompts of
all clients are read at once; behind it the batch runs empty.

It is whole turns of one client. Clients whose texts are equally long go on in step, and in a part of a turn
they would have more or less than its share of the time in which prompts are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .serve_jobs import Seen


@dataclass(frozen=True)
class Steady:
    """In seconds since the loop began."""

    begin: float
    end: float

    @staticmethod
    def of(seen: Sequence[Seen]) -> Steady | None:
        """From the end of the first request that ends last of all first ones to another end of the same
        client's, the last one before a client has nothing more to send; None where there is no other."""
        ends = dict[int, list[float]]()
        for s in seen:
            ends.setdefault(s.client, []).append(s.ended)
        begin, client = max(((s.ended, s.client) for s in seen if not s.turn), default=(0.0, 0))
        stop = min(map(max, ends.values()), default=0.0)
        end = max((at for at in ends.get(client, []) if begin < at <= stop), default=None)
        return None if end is None else Steady(begin, end)

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin

    def holds(self, at: float) -> bool:
        """Whether what came at that time came in it: at its beginning no more, at its end still."""
        return self.begin < at <= self.end

    def tokens(self, s: Seen) -> float:
        """How many of a request's tokens came in it: one at `first`, the others evenly from there until
        `ended`."""
        spread = s.ended - s.first
        if spread <= 0:
            return s.tokens * self.holds(s.first)
        inside = max(min(s.ended, self.end) - max(s.first, self.begin), 0.0)
        return self.holds(s.first) + (s.tokens - 1) * inside / spread
