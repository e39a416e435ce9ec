"""The engine of a measured server. Before it serves it decodes the closed loops of the bench by itself, with
nobody else in its process and without making text: what a server adds is told from that.

It writes a JSON line to stdout for each loop."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
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
from .serve_jobs import Job, Seen, of_loop
from .serve_loop import Turn, closed, steady_seconds

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
    tokenizer: the folder of its tokenizer. until: when the model has to be done (time.monotonic): its own
    loops have OWN_SHARE of what is left when it is warm. most: seconds that a loop is steady."""

    shape: str | None = None
    tokenizer: Path = Path()
    loops: tuple[Loop, ...] = ()
    jobs: tuple[Job, ...] = field(default=(), repr=False)
    until: float = 0.0
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
        until = time.monotonic() + OWN_SHARE * (self.until - time.monotonic())
        for i, loop in enumerate(self.loops):
            limit = steady_seconds(until, len(self.loops) - i, self.most)
            texts = decode(engine, asked[: loop.jobs], loop, limit) if limit > 0 else []
            told = [asdict(seen(text, tokenizer)) for text in texts]
            print(json.dumps({"loop": asdict(loop), "seen": told}), flush=True)


def encoded(tokenizer: Tokenizer, job: Job) -> list[int]:
    """A prompt's token ids."""
    return tokenizer.encode(job.prompt) if isinstance(job.prompt, str) else job.prompt


def decode(
    engine: Engine, asked: Sequence[tuple[list[int], int]], loop: Loop, limit: float
) -> list[Turn[Text]]:
    """The jobs of a loop, prompts and new tokens. limit: as in `closed`. Raises InputError."""
    began = time.perf_counter()

    def submit(job: int) -> Text:
        prompt, new = asked[job]
        salt = f"{began} {job}"  # it finds no prompt in the cache
        return engine.submit(prompt, Request(strategy=loop.strategy, max_new_tokens=new, min_tokens=new,
                                             seed=0, cache_salt=salt))  # fmt: skip

    def step() -> Iterator[tuple[Text, bool]]:
        for text in engine.step():
            if text.finished:
                text.result()
            if text.stream.token_ids:
                yield text, text.finished

    return closed(len(asked), loop.clients, limit, submit, step)


def seen(turn: Turn[Text], tokenizer: Tokenizer) -> Seen:
    """A text as a client would tell it."""
    ids = turn.text.stream.token_ids
    return turn.seen(len(ids), hashlib.sha256(tokenizer.decode(ids).encode()).hexdigest()[:16])
