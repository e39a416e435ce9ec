"""A server in a thread of its own, and an engine that does what a test says."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
from forked_worker import ForkedWorker

from qwen3_model import Request
from qwen3_model.decode.sequence import GenerationStats
from qwen3_model.openai.served import Served
from qwen3_model.serve import engine_client
from qwen3_model.serve.engine_client import EngineClient, EngineDied, Running
from qwen3_model.serve.guard import Access
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import Ended, EngineOptions, Load, Ran, Ready
from qwen3_model.serve.server import Server, http_config
from qwen3_model.serve.site import Site


class ScriptedText:
    """A text of a ScriptedEngine; its methods may be called in any thread."""

    def __init__(self, request: Request) -> None:
        self.request, self.cancelled = request, Event()
        self.running = Running(self._cancel)
        self._loop = asyncio.get_running_loop()

    def run(self, tokens: Sequence[int]) -> None:
        """Add a run, each token with a log-probability of its own."""
        logprobs = [-1.0 - token / 1024 for token in tokens]
        self._put(Ran(list(tokens), logprobs, 1, "plain", 0))

    def end(self, reason: str, error: str = "") -> None:
        """End the text."""
        self._put(Ended(reason, GenerationStats("auto", 0, finish_reason=reason), error))

    def die(self) -> None:
        """As where the engine's process ends."""
        self._put(EngineDied("the engine's process has died"))

    def _put(self, item: Any) -> None:
        self._loop.call_soon_threadsafe(self.running.put, item)

    def _cancel(self) -> None:
        self.cancelled.set()
        self.end("cancelled")


class ScriptedEngine:
    """An EngineClient without an engine. script(text): called with each text that is submitted."""

    def __init__(self, slots: int = 2, script: Callable[[ScriptedText], None] | None = None) -> None:
        self.ready = Ready(4096, 1000, slots, "f1", "scripted", 0.0)
        self.alive, self.load, self.texts = True, Load(running=1, pages=8), list[ScriptedText]()
        self.script = script

    def submit(self, prompt_ids: Sequence[int], request: Request) -> Running:
        """Of an engine that is alive."""
        if not self.alive:
            raise EngineDied("the engine's process has died")
        text = ScriptedText(request)
        self.texts.append(text)
        if self.script is not None:
            self.script(text)
        return text.running


class Serving:
    """A server on a free port of this machine. start: makes its engine, in its loop; a client without
    `close` is no process."""

    def __init__(
        self, served: Served, start: Callable[[], Awaitable[Any]], limits: Limits, access: Access | None
    ) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.site = Site(served, limits)
        self._access, self._start = access, start
        self._begun, self._thread = Event(), Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Serving:
        self._thread.start()
        assert self._begun.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self.engine = await self._start()
        self.site.attach(self.engine)
        self.server = Server(http_config(self.site, self._access))
        self._begun.set()
        await self.server.serve(sockets=[self.listener])
        if hasattr(self.engine, "close"):
            await self.engine.close(0.0)

    def connected(
        self, path: str, body: bytes, receive_buffer: int | None = None, missing: int = 0
    ) -> socket.socket:
        """A connection that has sent a request. missing: bytes that its body still owes."""
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        client.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        client.sendall(head.encode() + f"content-length: {len(body) + missing}\r\n\r\n".encode() + body)
        return client


@contextmanager
def with_engine(served: Served, options: EngineOptions, limits: Limits) -> Iterator[Serving]:
    """A server with a real engine, in a process that forks off this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_client, "_spawned", ForkedWorker)
        with Serving(served, lambda: EngineClient.start(options), limits, None) as serving:
            yield serving
