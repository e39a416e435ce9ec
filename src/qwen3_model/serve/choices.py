"""A request's choices: texts in the engine, whose tokens become text here as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from ..decode.sequence import GenerationStats, Likeliest, Result, Run
from ..decode.stream import TokenStream
from ..openai.body import Asked
from ..openai.served import Served
from ..request import Request
from .engine_client import Client
from .errors import refusal
from .messages import Ended, Ran
from .metrics import Metrics


@dataclass(frozen=True)
class Piece:
    """What an accepted run adds to a choice. text: what can no longer become part of a stop string. last:
    whether the choice has ended with it, for `reason`, as in GenerationStats.finish_reason. kind, nodes,
    forwards: of the run, as in Ran."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[Likeliest]
    reason: str
    kind: str
    nodes: int
    forwards: int


class Choice:
    """One text. Its end tokens, length and stop strings are those of a text that is decoded alone: the same
    TokenStream looks at its tokens."""

    def __init__(
        self,
        client: Client,
        served: Served,
        prompt: list[int],
        request: Request,
        index: int,
        streams: bool,
    ) -> None:
        """Submit the text. streams: whether its log-probabilities leave with its pieces, and are not kept for
        its result. Raises InputError and EngineDied."""
        fitted = request.fit(served.config, len(prompt), has_text=True)
        assert fitted.max_new_tokens is not None and fitted.seed is not None
        self.index, self.prompt_tokens, self._streams = index, len(prompt), streams
        self.stats = GenerationStats(fitted.strategy, fitted.seed)
        self.pieces, self.ended = 0, False
        self.began = time.perf_counter()
        self.first = self.last = 0.0  # when tokens came
        self._text, self._logprobs, self._top_logprobs = "", list[float](), list[Likeliest]()
        self._stream = TokenStream(
            served.text, fitted.end_tokens(served.config), fitted.stop, fitted.max_new_tokens, self._release,
            fitted.min_tokens,
        )  # fmt: skip
        self.running = client.submit(prompt, fitted)

    def _release(self, tokens: list[int], text: str) -> None:
        self._text = text

    def take(self, ran: Ran) -> Piece | None:
        """The piece of a run; None behind a stop string, of which the engine has not heard yet."""
        stream = self._stream
        if stream.finish_reason:
            return None
        self.pieces, self.last = self.pieces + 1, time.perf_counter()
        self.first = self.first or self.last
        kept = stream.push(ran.tokens)
        self.stats.count(Run(ran.tokens, ran.logprobs, ran.forwards, ran.kind, ran.nodes), kept)
        logprobs, likeliest = ran.logprobs[:kept], ran.top_logprobs[:kept]
        if not self._streams:
            self._logprobs += logprobs
            self._top_logprobs += likeliest
        stream.release()
        if stream.finish_reason == "stop_string":
            self.running.cancel()
        return Piece(
            self.index, self._text, ran.tokens[:kept], logprobs, likeliest, stream.finish_reason, ran.kind,
            ran.nodes, ran.forwards,
        )  # fmt: skip

    def end(self, ended: Ended) -> None:
        """Take the text's end. Raises a Refusal where it is not the text's own: it has failed, or was
        cancelled."""
        self.ended = True
        if not self._stream.finish_reason:
            failed = ended.reason == "error"
            raise refusal(500, ended.error or "a text has failed") if failed else refusal(503, STOPPED)
        self.stats.cached_tokens, self.stats.seconds = ended.stats.cached_tokens, ended.stats.seconds
        self.stats.finish_reason, self.stats.tokens = self._stream.finish_reason, len(self._stream.token_ids)

    def result(self) -> Result:
        """What has been decoded, once it has ended; of a stream without log-probabilities."""
        return Result(
            self._stream.token_ids, self._stream.text, self._logprobs, self.stats,
            top_logprobs=self._top_logprobs,
        )  # fmt: skip


TOGETHER = 64  # runs at most that leave in one piece: what a slow client has not read waits as pieces
STOPPED = "the server stops: send the request again, to a server that is ready"


_Came = Piece | Exception | None  # None: a choice has ended


class Job:
    """All choices of a request. served: what its answer names. key: whose request it is."""

    def __init__(self, client: Client, served: Served, asked: Asked, metrics: Metrics, key: int = 0) -> None:
        """Submit the choices, all or none. Raises InputError and EngineDied."""
        self.asked, self.served, self.key = asked, served, key
        self.choices: list[Choice] = []
        self._metrics = metrics
        self._came = asyncio.Queue[_Came]()
        self._tasks: list[asyncio.Task[None]] = []
        try:
            for index, (prompt, request) in enumerate(asked.jobs()):
                self.choices.append(Choice(client, served, prompt, request, index, asked.stream))
        except BaseException:
            self.close()
            raise
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in self.choices]

    async def place(self) -> None:
        """Wait until engines have the texts. Where there are several, the answer tells the fingerprint of
        those that have them. Raises a Refusal where it is not the same one, and EngineDied."""
        found = {await choice.running.placed() for choice in self.choices} - {None}
        if len(found) > 1:
            raise refusal(503, "the choices have engines with different fingerprints: send the request again")
        if found:
            self.served = replace(self.served, fingerprint=found.pop())

    @property
    def left(self) -> int:
        """Choices that have not ended."""
        return sum(not choice.ended for choice in self.choices)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """The pieces of all choices, those that have come since the last time, until all have ended. Raises
        what ends one of them early: a Refusal, InputError or EngineDied."""
        waited = len(self.choices)
        while waited:
            came = [await self._came.get()]
            while not self._came.empty() and len(came) < TOGETHER:
                came.append(self._came.get_nowait())
            error = next((one for one in came if isinstance(one, Exception)), None)
            told = came if error is None else came[: came.index(error)]
            if found := [one for one in told if isinstance(one, Piece)]:
                yield found
            if error is not None:
                raise error
            waited -= told.count(None)

    def results(self) -> list[Result]:
        """Of the choices in their order, once all have ended."""
        return [choice.result() for choice in self.choices]

    def stop(self) -> None:
        """End the request from outside, with an error for its client, though it may wait for a place."""
        self._came.put_nowait(refusal(503, STOPPED))
        self.close()

    def close(self) -> bool:
        """Let go of the engine's texts; whether one of them was still there."""
        for task in self._tasks:
            task.cancel()
        there = [choice for choice in self.choices if not choice.ended]
        for choice in there:
            choice.running.cancel()
        return bool(there)

    async def _pump(self, choice: Choice) -> None:
        """What a task does: take what a text gets, whether or not the client reads. Who does not read holds
        no place that others wait for."""
        try:
            async for item in choice.running:
                if isinstance(item, Ended):
                    choice.end(item)
                    self._metrics.ended(choice.stats, choice.prompt_tokens, choice.last - choice.first)
                    self._came.put_nowait(None)
                elif (piece := choice.take(item)) is not None:
                    if choice.pieces == 1:
                        self._metrics.first_token.observe(choice.first - choice.began)
                    self._came.put_nowait(piece)
        except Exception as error:
            choice.ended = True
            self._came.put_nowait(error)
