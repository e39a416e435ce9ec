"""A server from its first connection to its last: it answers while its engine is made, drains when it is told
to end, and does not outlive its engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from .app import build
from .engine_client import Client
from .guard import Access
from .messages import Ready
from .protocol import Protocol, raise_file_limit
from .site import Site

DIED, INTERRUPTED = 1, 130  # exit codes
HEADER_BYTES = 2**16  # of a request's line and headers
LAST_SECONDS = 5  # that clients have to read their last bytes

Start = Callable[[], Coroutine[Any, Any, Client]]


def run(
    site: Site, access: Access, start: Start, listener: socket.socket, told: Callable[[Ready], None]
) -> int:
    """Serve until a signal, or the engine's death. start: makes the engine. told: called once requests are
    answered. Returns the exit code: 0 after SIGTERM. Raises InputError where the engine cannot start."""
    raise_file_limit()
    return asyncio.run(_run(site, access, start, listener, told))


async def _run(
    site: Site, access: Access, start: Start, listener: socket.socket, told: Callable[[Ready], None]
) -> int:
    with _Farewell().taken() as farewell:
        server = Server(http_config(site, access))
        http = asyncio.create_task(server.serve(sockets=[listener]))
        starting = asyncio.create_task(start())
        client = None
        try:
            await _first(starting, farewell.first.wait(), http)
            if not starting.done():
                return farewell.exit_code
            client = starting.result()
            gc.collect()
            gc.freeze()  # or a search for garbage among what was imported stops all streams now and then
            site.attach(client)
            told(client.ready)
            watch = asyncio.create_task(_watched(client, site.limits.engine_seconds))
            await _first(farewell.first.wait(), client.died.wait(), http)
            site.draining = True
            await _drained(site, farewell)
            watch.cancel()
            return farewell.exit_code if client.alive else await _death(client)
        finally:
            site.stop()
            starting.cancel()
            if client is not None:
                await client.close(grace=0.0)
            server.should_exit = True
            await asyncio.gather(http, starting, return_exceptions=True)


async def _drained(site: Site, farewell: _Farewell) -> None:
    """Wait for the requests that are there, as long as they may go on."""
    if site.jobs and site.alive:
        _say(
            f"ending; {len(site.jobs)} requests may go on for {site.limits.grace:g} s, a second Ctrl-C or "
            "SIGTERM ends them now"
        )
    loop = asyncio.get_running_loop()
    until = loop.time() + site.limits.grace
    while site.jobs and site.alive and not farewell.second.is_set() and loop.time() < until:
        await asyncio.sleep(0.02)


async def _watched(client: Client, seconds: float) -> None:
    """End an engine that hangs: then it has died, as everybody is told."""
    while client.silent <= seconds:
        await asyncio.sleep(min(seconds / 4, 1.0))
    _say(f"the engine has texts and has said nothing for {seconds:g} s: it is killed (--engine-timeout)")
    client.kill()


async def _death(client: Client) -> int:
    await client.close(grace=0.0)  # waits for the process, which says how it ended
    _say(f"the engine's process has died (exit code {client.exit_code}): the server ends")
    return DIED


def _say(line: str) -> None:
    print(f"orthrus: {line}", file=sys.stderr, flush=True)


async def _first(*waited: Any) -> None:
    """Wait for the first of these; coroutines are dropped then, tasks go on."""
    tasks = [asyncio.ensure_future(one) for one in waited]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, one in zip(tasks, waited, strict=True):
        if task is not one:
            task.cancel()


class _Farewell:
    """SIGTERM and Ctrl-C: the first asks the server to end, the second one to end at once."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.exit_code = 0

    @contextmanager
    def taken(self) -> Iterator[_Farewell]:
        """Hear the signals, in the block. Behind a first one no more is listened to: the process ends, with
        the exit code that the first one asked for."""
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            loop.add_signal_handler(number, self._come, number)
        try:
            yield self
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN if self.first.is_set() else handler)

    def _come(self, number: int) -> None:
        if not self.first.is_set():
            self.exit_code = INTERRUPTED if number == signal.SIGINT else 0
        (self.second if self.first.is_set() else self.first).set()


class Server(uvicorn.Server):
    """uvicorn, which leaves the signals to others."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


class PathOnly(logging.Filter):
    """Takes query strings out of the log of requests: nothing that a client wrote belongs there."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a record, its path cut."""
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, *rest = record.args
            record.args = (client, method, str(path).partition("?")[0], *rest)
        return True


def http_config(site: Site, access: Access | None) -> uvicorn.Config:
    """How uvicorn serves a site: no lifespan, no websockets, requests logged by their path alone."""
    handler = {"class": "logging.StreamHandler", "formatter": "line", "filters": ["path"]}
    log = {
        "version": 1, "disable_existing_loggers": False,
        "filters": {"path": {"()": PathOnly}},
        "formatters": {"line": {"format": "%(asctime)s %(message)s"}},
        "handlers": {"stderr": handler},
        "loggers": {
            "uvicorn.error": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
            "uvicorn.access": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        },
    }  # fmt: skip
    return uvicorn.Config(
        build(site, access), http=Protocol, ws="none", lifespan="off", log_config=log, server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=LAST_SECONDS,
    )  # fmt: skip
