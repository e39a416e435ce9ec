"""What the endpoints of an app share: the engine, who may ask for what, and the requests that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..openai.body import Asked
from ..openai.served import Served
from .beside import Beside
from .choices import Job
from .engine_client import Client
from .errors import refusal
from .limits import Limits
from .metrics import Metrics


class Site:
    """The state of one app. draining: whether the server ends, and takes no more requests. beside,
    beside_large, beside_grammars: where work is done beside the loop; large bodies, and those whose grammar
    may have to be tried, wait for each other alone."""

    def __init__(self, served: Served, limits: Limits, client: Client | None = None) -> None:
        self.served, self.limits = served, limits
        self.draining = False
        self.jobs: set[Job] = set()
        self.beside, self.beside_large, self.beside_grammars = Beside(), Beside(2), Beside(2)
        self._reading = Counter[int]()  # requests whose body is being read, by key
        self.metrics = Metrics(lambda: self._client.load if self._client else None)
        self._client: Client | None = None
        if client is not None:
            self.attach(client)

    def attach(self, client: Client) -> None:
        """Answer requests from here on, by an engine that is ready."""
        self._client, ready = client, client.ready
        self.served = replace(self.served, fingerprint=ready.fingerprint, longest=ready.longest)

    @property
    def alive(self) -> bool:
        """Whether the engine has not died; one that is still being made has not."""
        return self._client is None or self._client.alive

    @property
    def ready(self) -> bool:
        """Whether a request would be answered."""
        return self._client is not None and self._client.alive and not self.draining

    def check_ready(self) -> Client:
        """The engine. Raises a Refusal with status 503."""
        if self._client is None:
            raise refusal(503, "the engine is not ready yet: see /ready", retry_after="5")
        if self.draining:
            raise refusal(503, "the server stops: send the request to one that is ready", connection="close")
        if not self._client.alive:
            raise refusal(503, "the engine's process has died")
        return self._client

    @contextmanager
    def reading(self, key: int) -> Iterator[None]:
        """While a request's body comes and is understood, which takes memory and time. Raises a Refusal."""
        self.limits.check(self.jobs, self._reading, key, 1, self._slots)
        self._reading[key] += 1
        try:
            yield
        finally:
            self._reading[key] -= 1

    @property
    def _slots(self) -> int:
        """Of the engine; of one that is still being made at least one."""
        return self._client.ready.slots if self._client is not None else 1

    def begin(self, asked: Asked, key: int) -> Job:
        """Submit a request's texts; `end` must follow. key: whose it is. Raises a Refusal, InputError, and
        EngineDied."""
        client = self.check_ready()
        choices = len(asked.prompts) * asked.n
        self.limits.check(self.jobs, self._reading, key, choices, self._slots)
        job = Job(client, self.served, asked, self.metrics, key)
        self.jobs.add(job)
        return job

    def end(self, job: Job) -> None:
        """Forget a request, and let go of the texts that it still has."""
        self.jobs.discard(job)
        if job.close():
            self.metrics.cancelled.inc()

    def stop(self) -> None:
        """End all requests with an error for their clients."""
        for job in self.jobs:
            job.stop()
