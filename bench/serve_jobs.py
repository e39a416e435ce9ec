"""What the clients of `bench.serve` ask for, when, and what they saw. Nothing here needs torch: the processes
of the clients import it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LEAST = 8  # jobs of a closed loop


@dataclass(frozen=True)
class Job:
    """A text to decode. prompt: its text, or its token ids."""

    prompt: str | list[int]
    new_tokens: int


@dataclass(frozen=True)
class Seen:
    """What became of a job. sent, first, ended: in seconds since the loop began. first: when its first token
    came. client: whose job it was, 0 in an open loop. turn: how many jobs that client had before. digest: of
    its text. error: why it has no whole text."""

    job: int
    client: int
    turn: int
    sent: float
    first: float
    ended: float
    tokens: int
    digest: str
    error: str = ""


def by_client(seen: Sequence[Seen]) -> dict[int, list[int]]:
    """The numbers of each client's jobs, in their order."""
    found = dict[int, list[int]]()
    for s in sorted(seen, key=lambda s: (s.client, s.turn)):
        found.setdefault(s.client, []).append(s.job)
    return found


def of_loop(clients: int, each: int) -> int:
    """Jobs of a closed loop in which every client has about so many, and all together LEAST at least."""
    return clients * max(each, math.ceil(LEAST / clients))


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """When requests come that do not wait for each other: a Poisson process of `rate` a second."""
    rng, at = random.Random(seed), 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        yield at


def random_jobs(
    words: Sequence[str] | range, lengths: Sequence[tuple[int, int]], count: int, seed: int
) -> list[Job]:
    """Jobs of random words, one token each, or of random token ids. lengths: of prompts and texts, again from
    the first where there are more jobs."""
    rng, found = random.Random(seed), list[Job]()
    for i in range(count):
        tokens, new = lengths[i % len(lengths)]
        drawn: list[Any] = rng.choices(words, k=tokens)
        found.append(Job(drawn if isinstance(words, range) else "".join(drawn), new))
    return found


def body(job: Job, strategy: str, salt: str) -> dict[str, Any]:
    """The request of a job: a greedy text of all its tokens. salt: a text finds no prompt in the cache that
    came with another one."""
    return {
        "prompt": job.prompt, "max_tokens": job.new_tokens, "min_tokens": job.new_tokens, "temperature": 0,
        "seed": 0, "strategy": strategy, "cache_salt": salt, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
