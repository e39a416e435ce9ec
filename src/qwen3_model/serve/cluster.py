"""Engines on the machines of a Ray cluster, which a server knows as one engine.

A replica of Ray Serve is an actor with an engine's process of its own. `Fleet` stands where an EngineClient
stands: HTTP, keys, limits, text and metrics stay in the server's process, and a text is one streamed call of
a replica. Ray's own HTTP proxy is not used: it cuts the stream of a replica that dies, where this server
sends an error event (docs/scaling.md)."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakSet

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from orthrus_kernels import pages_for

from ..decode.scheduler import check_fits
from ..errors import InputError, one_line
from ..request import Request
from .engine_client import EngineClient, EngineDied, Refused, Running
from .messages import Load, Ready
from .replicas import RemoteText, Replicas, page_key, picked, say

ASK_SECONDS = 1.0  # between two questions to all replicas for what they have to do
CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 20.0  # between two lines of a start that takes long
QUESTIONS = 8  # to a full replica at a time: Ray counts them as it counts texts
LAST_WORDS = 1.0  # seconds in which the texts of an engine that has died hear of it
QUIET = {"log_level": "WARNING", "enable_access_log": False}
SILENT: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}  # its files have the rest
OBJECT_STORE = 2**27  # bytes; only prompts of more than 100 KB go through it


@dataclass(frozen=True)
class About:
    """What a replica says of itself."""

    replicas: Replicas
    ready: Ready
    load: Load


class Replica:
    """An engine's process and what asks it, as Ray Serve runs them."""

    async def __init__(self, replicas: Replicas) -> None:  # type: ignore[misc]
        """Start the engine. Raises InputError."""
        self._replicas = replicas
        self._client = await EngineClient.start(replicas.engine)
        self._watch = asyncio.create_task(self._end_with_engine())

    async def text(self, prompt_ids: list[int], request: Request) -> AsyncIterator[Any]:
        """Decode a text: the engine's fingerprint, then what a `Running` has; Refused is told, not raised."""
        yield self._client.ready.fingerprint
        try:
            running = self._client.submit(prompt_ids, request)
        except InputError as error:
            yield Refused(str(error))
            return
        try:
            async for item in running:
                yield item
        except Refused as error:
            yield error
        finally:
            running.cancel()

    async def about(self) -> About:
        """What this replica is, and how busy."""
        return About(self._replicas, self._client.ready, self._client.load)

    async def check_health(self) -> None:
        """Raises EngineDied where the engine has died, or hangs."""
        if not self._client.alive or self._client.silent > self._replicas.engine_seconds:
            raise EngineDied("the engine's process has died, or says nothing")

    async def _end_with_engine(self) -> None:
        """End this process soon after its engine, before Ray has asked three times for its health: an empty
        replica would get all new texts."""
        while self._client.alive and self._client.silent <= self._replicas.engine_seconds:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._client.died.wait(), ASK_SECONDS)
        print("orthrus: the engine has died, or says nothing: its replica ends", file=sys.stderr, flush=True)
        self._client.kill()
        await asyncio.sleep(LAST_WORDS)
        os._exit(1)


class PrefixRouter(RequestRouter):
    """Sends a text to the replica that has its first page, unless that has much more to do than others."""

    def initialize_state(self, slack: int, full: int) -> None:
        """slack: as in `Replicas`. full: texts of a replica that takes no more."""
        self._slack, self._full = slack, full

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The preferred replica if there is one, then all that are not full, of which Ray takes the least
        busy one. Unknown ones count as idle: Ray asks them before it takes one."""
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None or not named:
            return [candidate_replicas]
        # While all are full; else Ray asks without rest.
        pending_request.routing_context.should_backoff = True
        prompt_ids, request = pending_request.args[:2]
        known = self.replica_queue_len_cache
        loads = {name: known.get(replica.replica_id) or 0 for name, replica in named.items()}
        first = picked(page_key(prompt_ids, request.cache_salt), loads, self._slack)
        free = [named[name] for name, texts in loads.items() if texts < self._full]
        return [[named[first]], free] if first is not None and loads[first] < self._full else [free]


def application(replicas: Replicas) -> serve.Application:
    """What Ray Serve runs. A text is a request of it, so Ray counts texts that run or wait: twice as many as
    an engine has slots go to it, the others wait for the first replica that has room."""
    slots, gpus = replicas.engine.slots, int(replicas.engine.device == "cuda")
    number: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        bounds = {"min_replicas": replicas.least, "max_replicas": replicas.most}
        number = {"autoscaling_config": bounds | {"target_ongoing_requests": slots}}
    deployment = serve.deployment(
        Replica, name="engine", ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        max_ongoing_requests=2 * slots + QUESTIONS, health_check_period_s=2, health_check_timeout_s=30,
        graceful_shutdown_timeout_s=replicas.grace + LAST_WORDS, graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1, logging_config=QUIET,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"slack": replicas.slack, "full": 2 * slots},
        ), **number,
    )  # fmt: skip
    return deployment.bind(replicas)


class Fleet:
    """All replicas of an application, in place of an EngineClient. ready: what holds for each of them, but
    that its slots are those of all. Its replicas watch their engines themselves, and texts wait while there
    is none: it never dies."""

    alive, silent, exit_code = True, 0.0, None

    def __init__(self, replicas: Replicas, handle: DeploymentHandle, owned: bool) -> None:
        """owned: whether the cluster ends with this process."""
        self._replicas, self._handle, self._owned = replicas, handle, owned
        self._text = handle.options(stream=True).text
        self.died, self._load, self._texts = asyncio.Event(), Load(), WeakSet[RemoteText]()
        self.ready = Ready(0, 0, 0, "", "", 0.0)
        self._asking: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, replicas: Replicas, ends: bool = False) -> Fleet:
        """Connect to the cluster of RAY_ADDRESS, else of this machine, else start one here that ends with
        this process, and have its replicas run. Those of an application with other settings are replaced, one
        behind the other; SIGHUP does that with these settings. ends: the replicas end with this process, and
        SIGHUP ends it. Raises InputError."""
        owned = await asyncio.to_thread(connect)
        for number in (signal.SIGTERM, signal.SIGINT):  # taken again, or Ray prints its stack first
            signal.signal(number, signal.getsignal(number))
        try:
            handle = await _running(replicas) or await _started(replicas)
            fleet = cls(replicas, handle, owned)
            await fleet._ask()
        except BaseException:
            if ends:
                with suppress(Exception):  # it has not begun, or the cluster is gone
                    await asyncio.to_thread(serve.delete, replicas.name)
            await asyncio.to_thread(ray.shutdown)
            raise
        fleet._asking = asyncio.create_task(fleet._keep_asking())
        if not ends and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, fleet._restart)
        return fleet

    def submit(self, prompt_ids: Sequence[int], request: Request) -> Running:
        """As `EngineClient.submit`."""
        most = request.max_new_tokens or max(self.ready.longest - len(prompt_ids), 1)
        check_fits(len(prompt_ids) + most, pages_for(self.ready.cache_tokens))
        asked = replace(request, stop=(), max_new_tokens=most)
        text = RemoteText(lambda: self._text.remote(list(prompt_ids), asked))
        self._texts.add(text)
        return text

    @property
    def load(self) -> Load:
        """Of all replicas, as they said last; the texts of this process that no replica has wait too."""
        return replace(self._load, waiting=self._load.waiting + sum(text.waits for text in self._texts))

    def kill(self) -> None:
        """Nothing: a replica ends its engine itself."""

    async def close(self, grace: float, ends: bool = False) -> None:
        """Leave the cluster. ends: its replicas end too, as they do where this process has started it."""
        if self._asking is not None:
            self._asking.cancel()
        if ends:
            await asyncio.to_thread(serve.delete, self._replicas.name)
        elif not self._owned:
            say(f"the replicas of {self._replicas.name} stay in the cluster")
        await asyncio.to_thread(ray.shutdown)

    async def _ask(self) -> None:
        said = await _said(self._handle)
        ready = [about.ready for about in said]
        self._load = Load(**{f.name: sum(getattr(a.load, f.name) for a in said) for f in fields(Load)})
        self.ready = replace(
            ready[0], slots=sum(r.slots for r in ready), longest=min(r.longest for r in ready),
            cache_tokens=min(r.cache_tokens for r in ready), device=f"{len(ready)} x {ready[0].device}",
        )  # fmt: skip

    async def _keep_asking(self) -> None:
        while True:
            await asyncio.sleep(ASK_SECONDS)
            with suppress(Exception):  # of a replica that comes or goes: what was said last holds
                await self._ask()

    def _restart(self) -> None:
        say("SIGHUP: replicas are replaced, one behind the other")
        self._restarting = asyncio.create_task(asyncio.to_thread(deployed, self._replicas))
        self._restarting.add_done_callback(lambda t: say(str(t.exception() or "all replicas are new")))


def connect() -> bool:
    """Join the cluster that is there, or start one on this machine; whether it was started, and so ends with
    this process. Raises InputError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    # They warn of each text that waits, of signals, and that a token is asked for.
    for name in ("ray.serve", "ray._private.worker", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS", "auto")
    _check_answers(address)
    try:
        if address != "local":
            ray.init(address=address, **SILENT)
            return False
    except Exception as error:
        if address != "auto" or not isinstance(error, ConnectionError):
            said = one_line(error, 200)
            raise InputError(f"the Ray cluster does not answer ({said}): see RAY_ADDRESS") from None
    ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **SILENT)
    return True


def _check_answers(address: str) -> None:
    """Raises InputError for a HOST:PORT where nobody listens, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        said = one_line(error, 100)
        raise InputError(f"no Ray cluster answers at {address} ({said}): see RAY_ADDRESS") from None


async def _running(replicas: Replicas) -> DeploymentHandle | None:
    """The application if it runs with these settings."""
    status = await asyncio.to_thread(serve.status)
    if replicas.name not in status.applications:
        return None
    with suppress(Exception):  # it has no replica that answers
        handle = await asyncio.to_thread(serve.get_app_handle, replicas.name)
        if {about.replicas for about in await _said(handle)} == {replicas}:
            return handle
    return None


async def _started(replicas: Replicas) -> DeploymentHandle:
    """Run the application. As long as the cluster has no room for a replica that takes, so it is said."""
    starting = asyncio.create_task(asyncio.to_thread(deployed, replicas))
    while not (await asyncio.wait({starting}, timeout=PATIENCE_SECONDS))[0]:
        with suppress(Exception):  # the cluster is busy, or gone: `starting` tells
            kind = "GPU" if replicas.engine.device == "cuda" else "CPU"
            free = (await asyncio.to_thread(ray.available_resources)).get(kind, 0.0)
            say(f"waiting for {replicas.least} replicas to run; {free:g} {kind}s of the cluster are free")
    return await starting


async def _said(handle: DeploymentHandle) -> list[About]:
    """What all replicas say of themselves, full ones too."""
    return await handle.broadcast("about").results_async(timeout_s=30)


def deployed(replicas: Replicas) -> DeploymentHandle:
    """Run the application; replicas of it that run are replaced, one behind the other. Raises InputError."""
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    try:
        return serve.run(application(replicas), name=replicas.name, route_prefix=None)
    except RuntimeError as error:
        deployments = serve.status().applications[replicas.name].deployments.values()
        told = re.findall(r"InputError: (.+)", "\n".join(each.message for each in deployments))
        raise InputError(f"the replicas cannot start: {told[-1] if told else error}") from None
