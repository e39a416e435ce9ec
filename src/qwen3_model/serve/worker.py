"""The engine's process: it reads what is asked of it, steps, and sends what texts got, once a step.

A thread reads the pipe, so that the process ends as soon as the other end closes, whatever it is doing: it
never stays behind with a GPU. A send waits while the pipe is full; the server empties it in a thread of its
own (engine_client.py), so that a slow HTTP client never holds the engine up."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn

from ..decode.engine import Engine
from ..decode.sequence import Sequence
from ..errors import InputError, one_line
from ..model import Network
from .fingerprint import device_name, fingerprint
from .messages import Batch, Cancel, Ended, EngineOptions, Failed, Load, Ready, Row, Stop, Submit

Inbox = SimpleQueue[Submit | Cancel]
BAD_INPUT, BROKEN = 2, 1  # exit codes


def main() -> NoReturn:
    """Serve the pipe whose file descriptor is the last word of the command line, until it closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server gets them too, and lets texts end
        signal.signal(number, signal.SIG_IGN)
    code = BROKEN
    try:
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server has gone
            code = serve(Connection(int(sys.argv[-1])))
    except BaseException as error:
        with suppress(OSError):
            traceback.print_exc()
            print(f"orthrus: the engine has failed: {one_line(error, 200)}", file=sys.stderr, flush=True)
    os._exit(code)  # without waiting for a GPU that may hang


def serve(pipe: Connection) -> int:
    """Make the engine that the first message describes, and run it. Returns the exit code where it cannot
    start."""
    options, inbox = pipe.recv(), Inbox()
    Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    try:
        model, engine, ready = started(options)
    except InputError as error:
        pipe.send(Failed(str(error)))
        return BAD_INPUT
    gc.collect()
    gc.freeze()  # else a search for garbage among what was imported stops all texts for 0.16 s now and then
    pipe.send(ready)
    loop = Loop(engine, inbox, pipe.send)
    while True:
        loop.turn()


def started(options: EngineOptions) -> tuple[Network, Engine, Ready]:
    """A warm engine with its model. Raises InputError."""
    model, engine = options.made()
    model.text = None  # the server makes text of tokens
    began = time.perf_counter()
    engine.runner_for(1)
    engine.warm()
    tokens, context = engine.cache_tokens, model.config.context_length
    found, name = fingerprint(model, engine), device_name(model.device)
    seconds = time.perf_counter() - began
    return model, engine, Ready(tokens, min(tokens, context), engine.slots, found, name, seconds)


def _receive(pipe: Connection, inbox: Inbox) -> None:
    """Hand on what comes; the process ends with it."""
    try:
        while not isinstance(message := pipe.recv(), Stop):
            inbox.put(message)
    finally:
        os._exit(0)


@dataclass
class _Open:
    """A text that has not ended. told: how many of its tokens were sent."""

    number: int
    told: int = 0


class Loop:
    """The engine with the texts that it has for a server."""

    def __init__(self, engine: Engine, inbox: Inbox, send: Callable[[Batch], None]) -> None:
        self.engine, self._inbox, self._send = engine, inbox, send
        self._texts: dict[int, Sequence] = {}  # that have not ended
        self._open: dict[Sequence, _Open] = {}
        self._cycles = self._tokens = 0
        self._begin_batch()

    def turn(self) -> None:
        """Take what has come, step, send what came of it, if only that a step was made: who hears nothing for
        long knows that something is wrong. Without a text it waits for a message."""
        self._take()
        steps = bool(self._open)
        if steps:
            self._step()
        if steps or self._ended or self._refused:
            load = Load(**vars(self.engine.load), cycles=self._cycles, tokens=self._tokens)
            self._send(Batch(self._ran, self._ended, self._refused, load))
            self._begin_batch()

    def _begin_batch(self) -> None:
        self._ran: list[Row] = []
        self._ended: list[tuple[int, Ended]] = []
        self._refused: list[tuple[int, str]] = []

    def _take(self) -> None:
        wait = not self._open
        with suppress(Empty):
            while True:
                message = self._inbox.get(wait)
                self._submit(message) if isinstance(message, Submit) else self._cancel(message)
                wait = False

    def _submit(self, message: Submit) -> None:
        try:
            text = self.engine.submit(message.prompt_ids, message.request)
        except InputError as error:
            self._refused.append((message.number, str(error)))
        else:
            self._texts[message.number], self._open[text] = text, _Open(message.number)

    def _cancel(self, message: Cancel) -> None:
        if (text := self._texts.get(message.number)) is not None:
            self.engine.cancel(text)
            self._tell(text)

    def _step(self) -> None:
        try:
            texts = self.engine.step()
        except InputError:  # the texts concerned have ended, and say why
            texts = tuple(self._open)
        for text in texts:
            self._tell(text)

    def _tell(self, text: Sequence) -> None:
        """Put what is new of a text into the batch. A step adds one run to it at most."""
        to = self._open[text]
        if tokens := text.stream.token_ids[to.told :]:
            run, logprobs, likeliest = text.last_run, text.logprobs[to.told :], text.top_logprobs[to.told :]
            assert run is not None
            told = to.number, tokens, logprobs, run.forwards, run.kind, run.nodes, likeliest
            self._ran.append((*told, text.stats.cached_tokens))
            to.told += len(tokens)
            self._tokens += len(tokens)
            self._cycles += run.kind != "prompt"
        if text.finished:
            result = text.result()
            self._ended.append((to.number, Ended(result.stats.finish_reason, result.stats, result.error)))
            del self._open[text], self._texts[to.number]
