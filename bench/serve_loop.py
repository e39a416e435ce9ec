"""A closed loop in this process, whatever engine decodes it: each client has one text at a time, and takes
the next job of the list when that has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .serve_jobs import Seen

Text = TypeVar("Text", bound=Hashable)


@dataclass
class Turn(Generic[Text]):
    """A client's text. turn: how many it had before. sent, first, ended: as in Seen."""

    job: int
    client: int
    turn: int
    text: Text
    sent: float
    first: float = 0.0
    ended: float = 0.0

    def seen(self, tokens: int, digest: str = "", error: str = "") -> Seen:
        """As a client would tell it."""
        times = self.sent, self.first, self.ended
        return Seen(self.job, self.client, self.turn, *times, tokens, digest, error)


def closed(
    jobs: int,
    clients: int,
    limit: float,
    submit: Callable[[int], Text],
    step: Callable[[], Iterable[tuple[Text, bool]]],
) -> list[Turn[Text]]:
    """The texts of a list of so many jobs, as they ended. limit: seconds behind the end of the last client's
    first text after which no client begins one. submit: begins a job. step: what the engine does next; the
    texts that have got tokens, and whether each has ended."""
    left, running, done = iter(range(jobs)), dict[Text, Turn[Text]](), list[Turn[Text]]()
    began, last = time.perf_counter(), math.inf

    def send(client: int, turn: int) -> None:
        now = time.perf_counter() - began
        if now <= last and (job := next(left, None)) is not None:
            text = submit(job)
            running[text] = Turn(job, client, turn, text, now)

    for client in range(clients):
        send(client, 0)
    firsts = len(running)
    while running:
        touched, now = list(step()), time.perf_counter() - began
        for text, ended in touched:
            turn = running[text]
            turn.first = turn.first or now
            if ended:
                turn.ended = now
                done.append(running.pop(text))
                firsts -= not turn.turn
                if not firsts:
                    last = min(last, now + limit)
                send(turn.client, turn.turn + 1)
    return done


def steady_seconds(until: float, loops: int, most: float) -> float:
    """How long the next one of so many loops may be steady, `most` seconds at most, so that all are done at
    `until` (time.monotonic): its beginning and its end have the other half of its time. 0 or less: no time is
    left."""
    return min((until - time.monotonic()) / loops / 2, most)
