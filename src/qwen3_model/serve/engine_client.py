"""The server's side of the engine's process, for one event loop.

    client = await EngineClient.start(EngineOptions(slots=32))
    running = client.submit(prompt_ids, Request(max_new_tokens=100))
    async for item in running:
        ...  # Ran, Ran, ..., Ended
    await client.close(grace=30)

A thread reads the pipe and hands each batch to the loop; another one writes to it. So the loop never waits
for the engine, and the engine never for a slow client: what a client has not taken waits in its `Running`,
as many tokens as it asked for at most."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Pipe
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from orthrus_kernels import pages_for

from ..decode.scheduler import check_fits
from ..errors import InputError
from ..request import Request
from .messages import Batch, Cancel, Ended, EngineOptions, Failed, Load, Ran, Ready, Stop, Submit

# The folder in which the server was started is no place for modules.
_WORKER = (
    "import sys; sys.path[:] = filter(None, sys.path); from qwen3_model.serve import worker as w; w.main()"
)
LAST_STEP = 10.0  # seconds that the engine has to end what is cancelled, and then itself


class EngineDied(RuntimeError):
    """The engine's process has ended, and its texts with it."""


class Refused(InputError):
    """The engine does not take the text."""


class Running:
    """A text in the engine: an asynchronous iterator of its runs, each as it comes, and of its end."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._items = asyncio.Queue[Ran | Ended | Exception]()
        self._cancelled = self._over = False

    def __aiter__(self) -> Running:
        return self

    async def __anext__(self) -> Ran | Ended:
        """The next run; last of all the text's end. Raises Refused, in place of the first run, for what the
        engine does not take, and EngineDied where its process has ended."""
        if self._over:
            raise StopAsyncIteration
        item = await self._items.get()
        self._over = not isinstance(item, Ran)
        if isinstance(item, Exception):
            raise item
        return item

    async def placed(self) -> str | None:
        """Wait until an engine has the text; its fingerprint, where there are several engines. Raises
        EngineDied."""
        return None

    def cancel(self) -> None:
        """End the text before the engine's next step, with what it has: its end comes all the same. One that
        has ended stays as it is."""
        if not self._cancelled:
            self._cancelled = True
            self._cancel()

    def put(self, item: Ran | Ended | Exception) -> None:
        """Take what the engine sent."""
        self._items.put_nowait(item)


class Client(Protocol):
    """What a server asks of its engine: an EngineClient's process, or many of them (cluster.py)."""

    ready: Ready

    @property
    def load(self) -> Load:
        """How busy it is."""

    @property
    def alive(self) -> bool:
        """Whether it takes texts, now or later."""

    @property
    def died(self) -> asyncio.Event:
        """Set once it takes none."""

    @property
    def silent(self) -> float:
        """Seconds since it has said something, while it has texts."""

    @property
    def exit_code(self) -> int | None:
        """Of its process; None while that runs."""

    def submit(self, prompt_ids: Sequence[int], request: Request) -> Running:
        """Queue a text."""

    def kill(self) -> None:
        """End it now, whatever it does."""

    async def close(self, grace: float) -> None:
        """Take no more texts, and let those that run go on for `grace` seconds."""


class EngineClient:
    """The engine's process. All methods are called in the event loop in which it was started."""

    ready: Ready

    def __init__(self, options: EngineOptions) -> None:
        """Start the process; `start` waits for it too."""
        self._loop = asyncio.get_running_loop()
        self.alive, self.died = True, asyncio.Event()
        self.load = Load()
        self._heard = self._loop.time()  # of a text: when it came, or the engine last spoke
        self._begun: asyncio.Future[Ready] = self._loop.create_future()
        self._closing, self._numbers = False, count()
        self._open: dict[int, Running] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._outbox = SimpleQueue[EngineOptions | Submit | Cancel | Stop | None]()
        self._outbox.put(options)
        self._pipe, theirs = Pipe()
        self._process = _spawned(theirs.fileno())
        theirs.close()
        self._writer = Thread(target=self._write, daemon=True)
        self._reader = Thread(target=self._read, daemon=True)
        self._writer.start()
        self._reader.start()

    @classmethod
    async def start(cls, options: EngineOptions) -> EngineClient:
        """A client whose engine takes texts: loaded, warm, with progress on stderr. Raises InputError, with
        the engine's one line, where it cannot start."""
        client = cls(options)
        try:
            client.ready = await client._begun
        except BaseException:
            client._process.kill()
            await asyncio.shield(asyncio.to_thread(client._reader.join))
            raise
        return client

    @property
    def exit_code(self) -> int | None:
        """Of the process, minus the number of the signal that killed it; None while it runs."""
        return self._process.poll()

    def submit(self, prompt_ids: Sequence[int], request: Request) -> Running:
        """Queue a text, which iterates over its runs. Stop strings are the caller's, who cancels the text.
        Without max_new_tokens it may have what context and cache hold. Raises EngineDied where the process
        has ended or is being closed, and InputError for what is longer than the cache."""
        if not self.alive or self._closing:
            raise EngineDied("the engine is being closed" if self.alive else "the engine's process has died")
        most = request.max_new_tokens or max(self.ready.longest - len(prompt_ids), 1)
        check_fits(len(prompt_ids) + most, pages_for(self.ready.cache_tokens))
        if not self._open:
            self._heard = self._loop.time()
        number = next(self._numbers)
        self._open[number] = running = Running(lambda: self._outbox.put(Cancel(number)))
        self._idle.clear()
        asked = replace(request, stop=(), max_new_tokens=most)
        self._outbox.put(Submit(number, list(prompt_ids), asked))
        return running

    @property
    def silent(self) -> float:
        """Seconds since the engine has said something, while it has texts. It speaks at every step."""
        return self._loop.time() - self._heard if self._open else 0.0

    def kill(self) -> None:
        """End the process now, whatever it does."""
        self._process.kill()

    async def close(self, grace: float) -> None:
        """Take no more texts, give those that run `grace` seconds to end, cancel the others, and end the
        process. May be called again, also meanwhile, with less grace."""
        self._closing = True
        await self._emptied(grace)
        for running in self._open.values():
            running.cancel()
        await self._emptied(LAST_STEP)
        self._outbox.put(Stop())
        try:
            await asyncio.wait_for(self.died.wait(), LAST_STEP)
        except asyncio.TimeoutError:
            self._process.kill()
        await asyncio.to_thread(self._reader.join)

    async def _emptied(self, seconds: float) -> None:
        """Wait until no text is open, so many seconds at most."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def _write(self) -> None:
        """What a thread does: send what is put into the outbox, in order."""
        with suppress(OSError):  # the process has ended, as the reader sees
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)

    def _read(self) -> None:
        """What a thread does: hand what comes to the loop, and tidy up behind the process's end."""
        with suppress(EOFError, OSError, RuntimeError):  # RuntimeError: the loop is closed
            while True:
                self._loop.call_soon_threadsafe(self._take, self._pipe.recv())
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._gone)
        self._outbox.put(None)
        self._writer.join()
        self._pipe.close()
        self._process.wait()

    def _take(self, message: Ready | Failed | Batch) -> None:
        self._heard = self._loop.time()
        if isinstance(message, Batch):
            self.load = message.load
            for row in message.ran:
                self._open[row[0]].put(Ran(*row[1:]))
            for number, ended in message.ended:
                self._end(number, ended)
            for number, line in message.refused:
                self._end(number, Refused(line))
        elif self._begun.done():
            pass  # nobody waits for it any more
        elif isinstance(message, Failed):
            self._begun.set_exception(InputError(message.message))
        else:
            self._begun.set_result(message)

    def _end(self, number: int, item: Ended | Exception) -> None:
        self._open.pop(number).put(item)
        if not self._open:
            self._idle.set()

    def _gone(self) -> None:
        """The process has ended."""
        self.alive = False
        self.died.set()
        if not self._begun.done():
            self._begun.set_exception(
                InputError("the engine's process has ended before it was ready; stderr says why")
            )
        for number in list(self._open):
            self._end(number, EngineDied("the engine's process has died"))


def _spawned(pipe: int) -> subprocess.Popen[bytes]:
    """A process with a file descriptor of ours. Its session is its own, so that Ctrl-C in a terminal comes to
    the server alone. It is no child of `multiprocessing`, which would run the caller's script again."""
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(pipe)], stdin=subprocess.DEVNULL, pass_fds=[pipe],
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
