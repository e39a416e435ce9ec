"""The engine of a measured server. Before it serves it decodes the closed loops of the bench by itself, with
nobody else in its process and without making text: what a server adds is told from that.

It writes a JSON line to stdout for each loop."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qwen3_model import Engine, Qwen3, Request
from qwen3_model.decode.sequence import Sequence as Text
from qwen3_model.serve.messages import EngineOptions
from qwen3_model.text import Text as Tokenizer

from . import strong, trace_file
from .forced_walk import Forced
from .models import random_model
from .replay import with_bigram
from .serve_jobs import LEAST_TURNS, Job, Seen, dealt, of_loop

TRACE = Path(__file__).parent / "results/trace-h100.json"  # whose ranks of misses the simulated drafter has
SIMULATED_TEXTS, SIMULATED_TOKENS = 64, 256  # tables of simulated texts; more texts have them again
WARM_TOKENS = 4
OWN_SHARE = 0.4


@dataclass(frozen=True)
class Loop:
    """A closed loop. strategy: of its requests; each: jobs of a client, as in `of_loop`."""

    clients: int
    strategy: str
    each: int

    @property
    def jobs(self) -> int:
        """How many it has at most."""
        return of_loop(self.clients, self.each)


@dataclass(frozen=True)
class MeasuredEngine(EngineOptions):
    """shape: of random weights (models.py), whose acceptance is simulated; None: `model` is a checkpoint.
    tokenizer: the folder of its tokenizer. until: when `models` models, this one among them, have to be done
    (time.monotonic): its own loops have OWN_SHARE of its part of what is left when it is warm. most: seconds
    after which a loop's clients send no more."""

    shape: str | None = None
    tokenizer: Path = Path()
    loops: tuple[Loop, ...] = ()
    jobs: tuple[Job, ...] = field(default=(), repr=False)
    until: float = 0.0
    models: int = 1
    most: float = 0.0

    def made(self) -> tuple[Qwen3, Engine]:
        """As in EngineOptions, and measured."""
        model, engine = super().made() if self.shape is None else self._random()
        model.text = None  # a server's engine makes none either
        engine.runner_for(1)
        engine.warm()
        gc.collect()
        gc.freeze()  # as the server's process does
        self._measure(engine)
        return model, engine

    def _random(self) -> tuple[Qwen3, Engine]:
        assert self.shape is not None
        model = with_bigram(random_model(self.shape))
        tokens = max(model.positions_that_fit(model.config.context_length * self.slots), 1)
        engine = model.engine_of(self.slots, tokens)
        draws = strong.Draws.of(trace_file.read(TRACE), strong.CURVE, SIMULATED_TEXTS, SIMULATED_TOKENS)
        engine.runner_for(1).cycles.force(Forced(model.device, self.slots, draws.walks))
        return model, engine

    def _measure(self, engine: Engine) -> None:
        tokenizer = Tokenizer(self.tokenizer)
        prompts = [
            tokenizer.encode(p) if isinstance(p, str) else p for p in (job.prompt for job in self.jobs)
        ]
        asked = [(prompt, job.new_tokens) for prompt, job in zip(prompts, self.jobs, strict=True)]
        short = [(prompt, WARM_TOKENS) for prompt, _ in asked[: max(loop.clients for loop in self.loops)]]
        for strategy in dict.fromkeys(loop.strategy for loop in self.loops):
            decode(engine, short, Loop(len(short), strategy, 1), 0.0)
        until = time.monotonic() + OWN_SHARE * (self.until - time.monotonic()) / self.models
        for i, loop in enumerate(self.loops):
            left = (until - time.monotonic()) / (len(self.loops) - i)
            limit = max(min(left / 2, self.most), 0.0)  # what has begun by then ends behind it
            texts = decode(engine, asked[: loop.jobs], loop, limit) if left > 0 else []
            seen = [asdict(t.seen(tokenizer)) for t in texts]
            print(json.dumps({"loop": asdict(loop), "seen": seen}), flush=True)


def encoded(tokenizer: Tokenizer, job: Job) -> list[int]:
    """A prompt's token ids."""
    return tokenizer.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt


@dataclass
class Decoded:
    """A job's text and when it got what."""

    job: int
    turn: int
    text: Text
    sent: float
    first: float = 0.0
    ended: float = 0.0

    def seen(self, tokenizer: Tokenizer) -> Seen:
        """As a client would tell it."""
        ids = self.text.stream.token_ids
        digest = hashlib.sha256(tokenizer.decode(ids).encode()).hexdigest()[:16]
        return Seen(self.job, self.turn, self.sent, self.first, self.ended, len(ids), digest)


def decode(engine: Engine, asked: Sequence[tuple[list[int], int]], loop: Loop, limit: float) -> list[Decoded]:
    """The jobs of a loop, prompts and new tokens, each client's next one when its last has ended; none later
    than `limit` seconds but LEAST_TURNS each. Raises InputError."""
    waiting = [iter(enumerate(jobs)) for jobs in dealt(len(asked), loop.clients)]
    running, done = dict[Text, tuple[int, Decoded]](), list[Decoded]()
    began = time.perf_counter()

    def send(client: int) -> None:
        now = time.perf_counter() - began
        turn, job = next(waiting[client], (0, None))
        if job is not None and (turn < LEAST_TURNS or now <= limit):
            prompt, new = asked[job]
            salt = f"{began} {job}"  # it finds no prompt in the cache
            text = engine.submit(prompt, Request(strategy=loop.strategy, max_new_tokens=new, min_tokens=new,
                                                 seed=0, cache_salt=salt))  # fmt: skip
            running[text] = client, Decoded(job, turn, text, now)

    for client in range(len(waiting)):
        send(client)
    while running:
        touched, now = engine.step(), time.perf_counter() - began
        for text in touched:
            client, decoded = running[text]
            if not decoded.first and text.stream.token_ids:
                decoded.first = now
            if text.finished:
                text.result()
                decoded.ended = now
                done.append(decoded)
                del running[text]
                send(client)
    return done
