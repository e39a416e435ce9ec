"""The steady part of a closed loop: each client has a request, and none its first. Before it the prompts of
all clients are read at once; behind it the batch runs empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .serve_jobs import Seen


@dataclass(frozen=True)
class Steady:
    """In seconds since the loop began. begin: when the last client's first request has ended. end: when the
    first client's last request has, and it has nothing more to send."""

    begin: float
    end: float

    @staticmethod
    def of(seen: Sequence[Seen]) -> Steady | None:
        """That of a loop; None where a client had nothing more to send before every first request had
        ended."""
        begin = max((s.ended for s in seen if not s.turn), default=0.0)
        last = dict[int, float]()
        for s in seen:
            last[s.client] = max(s.ended, last.get(s.client, 0.0))
        end = min(last.values(), default=0.0)
        return Steady(begin, end) if end > begin else None

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
