"""Replicas of an engine on a cluster: what they are, and which of them takes a text. Ray is not needed."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from orthrus_kernels import PAGE

from .messages import EngineOptions


@dataclass(frozen=True)
class Replicas:
    """The replicas of an application, all alike; those that run stay where these are equal. name: of the
    application. engine: of each, its device "cpu" or "cuda". least, most: how many; where they differ Ray
    starts and ends some as texts come. grace: seconds that texts go on in a replica that is to end.
    engine_seconds: that an engine may be silent while it has texts."""

    name: str
    engine: EngineOptions
    least: int = 1
    most: int = 1
    grace: float = 30.0
    engine_seconds: float = 300.0

    @property
    def slack(self) -> int:
        """How many texts more than the least busy replica one may have that holds a text's first page."""
        return max(self.engine.slots // 4, 1)


def page_key(prompt_ids: Sequence[int], cache_salt: str) -> bytes | None:
    """What prompts have in common that share their first page of the cache; None for a prompt that has no
    page to share, as its last token is always read."""
    if len(prompt_ids) <= PAGE:
        return None
    return sha256(array("q", prompt_ids[:PAGE]).tobytes() + cache_salt.encode()).digest()


def preferred(key: bytes, names: Collection[str]) -> str:
    """The replica that texts of a key go to. A replica that comes or goes moves no other one's keys."""
    return max(names, key=lambda name: sha256(key + name.encode()).digest())


def picked(key: bytes | None, loads: Mapping[str, int], slack: int) -> str | None:
    """The replica for a text; None: the least busy one. loads: texts of each replica, by name."""
    if key is None:
        return None
    first = preferred(key, loads)
    return first if loads[first] <= min(loads.values()) + slack else None
