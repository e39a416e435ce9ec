"""Replicas of an engine on a cluster: what they are, which of them takes a text, and the text there. Nothing
here needs Ray."""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from orthrus_kernels import PAGE

from ..decode.sequence import GenerationStats
from .engine_client import EngineDied, Running
from .messages import Ended, EngineOptions, Ran

ATTEMPTS = 3  # replicas that may die under a text before it is given up


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


class NoReplica(EngineDied):
    """No replica takes texts."""


class RemoteText(Running):
    """A text in a replica. It goes to another one where its replica dies before the first token."""

    def __init__(self, send: Callable[[], Any]) -> None:
        """send: asks a replica for the text, and returns what it says, an asynchronous iterator with
        `cancel`: the engine's fingerprint, then Ran, Ran, ..., and Ended or an exception that is told."""
        super().__init__(self._stop)
        self._send, self._cached = send, 0
        self._placed: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._pump())
        self._task.add_done_callback(self._cancelled_text)

    async def placed(self) -> str | None:
        """The fingerprint of the engine that has taken the text; None for one that was cancelled before.
        Raises NoReplica, and Refused where the engine does not take it."""
        return await asyncio.shield(self._placed)

    @property
    def waits(self) -> bool:
        """Whether no replica has it yet."""
        return not self._placed.done()

    def _stop(self) -> None:
        self._task.cancel()

    async def _pump(self) -> None:
        began = False
        for _ in range(ATTEMPTS):
            response = None
            try:
                response = self._send()
                async for item in response:
                    if isinstance(item, str):
                        self._agree(item)
                        continue
                    began = True
                    self._cached = item.cached if isinstance(item, Ran) else self._cached
                    self._hand(item)
                    if not isinstance(item, Ran):
                        return
            except asyncio.CancelledError:
                _leave(response)
                raise
            except Exception as error:
                _leave(response)
                say(f"a replica has ended a text ({type(error).__name__})")
            if began:
                break
        if self.waits:
            self._hand(NoReplica("no replica takes texts now: send the request again"))
        else:
            self._hand(EngineDied("the replica that had this text has died: send it again, with its seed"))

    def _cancelled_text(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._hand(Ended("cancelled", GenerationStats("", 0, cached_tokens=self._cached), ""))

    def _agree(self, fingerprint: str) -> None:
        """Raises EngineDied where the client was told another engine's fingerprint."""
        if not self._placed.done():
            self._placed.set_result(fingerprint)
        elif self._placed.result() != fingerprint:
            raise EngineDied("the other replicas have another fingerprint")

    def _hand(self, item: Ran | Ended | Exception) -> None:
        if not self._placed.done() and isinstance(item, Exception):
            self._placed.set_exception(item)
            self._placed.exception()  # or asyncio complains where nobody asks
        elif not self._placed.done():
            self._placed.set_result(None)
        self.put(item)


def _leave(response: Any) -> None:
    """Want no more of what a replica says; None: none has been asked."""
    if response is not None:
        with suppress(Exception):  # of a cluster that is gone
            response.cancel()


def say(line: str) -> None:
    """A line for who runs the server."""
    print(f"orthrus: {line}", file=sys.stderr, flush=True)
