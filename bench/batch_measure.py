"""What `bench.decode --batch` measures of an engine: rounds of cycles while all texts run, and whole lists of
texts with their prompts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch

from qwen3_model import Engine, Grammar, InputError, Request
from qwen3_model.decode.cycle import Reading
from qwen3_model.decode.sequence import Sequence as Text
from qwen3_model.model import PREFILL_ROWS

from .batch_report import Rounds, Row
from .replay import Way

# Tokens of the oldest text before the clock and in a round, and rounds: every way is measured behind contexts
# of about the same lengths, as vllm_peer.py measures behind 64 to 192 new tokens.
SETTLE, TOKENS, ROUNDS = 32, 32, 5
MOST_NEW = 1 << 15  # tokens of a text that is cancelled long before
Prompt = Sequence[int]
_RUNS = count()


@dataclass(frozen=True)
class Job:
    """A text to decode."""

    prompt: Prompt
    new_tokens: int
    grammar: Grammar | None = None


@contextmanager
def waits() -> Iterator[list[float]]:
    """Seconds of each wait for the record of a cycle, as they come."""
    found, plain = list[float](), Reading.wait

    def wait(self: Reading) -> torch.Tensor:
        began = time.perf_counter()
        record = plain(self)
        found.append(time.perf_counter() - began)
        return record

    Reading.wait = wait
    try:
        yield found
    finally:
        Reading.wait = plain


def _submitted(engine: Engine, jobs: Sequence[Job], way: Way) -> list[Text]:
    """Greedy texts, by a way. None finds its prompt in pages that an earlier run has filled."""
    salt = str(next(_RUNS))
    requests = [
        Request(
            strategy=way.strategy, max_new_tokens=job.new_tokens, tree_nodes=way.tree_nodes, seed=0,
            cache_salt=salt, grammar=job.grammar,
        )
        for job in jobs
    ]  # fmt: skip
    return [engine.submit(job.prompt, request) for job, request in zip(jobs, requests, strict=True)]


@contextmanager
def whole_chunks(engine: Engine) -> Iterator[None]:
    """Chunks of prompts are as large beside texts that decode as they are alone: texts then begin at about
    the same time, and their contexts stay about as long as their prompts."""
    assert engine.runner is not None
    pace = engine.runner.cycles.pace
    pace.rows = lambda: PREFILL_ROWS  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pace.rows


def steady(engine: Engine, prompts: Sequence[Prompt], way: Way, grammars: Sequence[Grammar] = ()) -> Rounds:
    """Rounds in which all texts run; afterwards they are cancelled. grammars: one a text, or none. Raises
    InputError where a text ends before the clock does or gives its pages up."""
    found, before = Rounds(len(prompts)), engine.load.preemptions
    jobs = [
        Job(prompt, _most_new(engine, prompt), grammar)
        for prompt, grammar in zip(prompts, grammars or [None] * len(prompts), strict=True)
    ]
    texts = _submitted(engine, jobs, way)
    try:
        with whole_chunks(engine):
            while not all(text.stats.cycles for text in texts):
                _step(engine, texts)
        _until(engine, texts, SETTLE)
        length, nodes, kinds = _length(texts), _nodes(texts), _kinds(texts)
        with waits() as waited:
            for _ in range(ROUNDS):
                _round(engine, texts, found, waited)
        found.context = (length + _length(texts)) / 2 / len(texts)
        found.nodes = _nodes(texts) - nodes
        found.kinds = _kinds(texts)
        found.kinds.subtract(kinds)
        if engine.load.preemptions > before:
            raise InputError(f"{len(texts)} texts do not fit into {engine.cache_tokens} positions")
    finally:
        for text in texts:
            engine.cancel(text)
        while engine.step():
            pass
    return found


def _round(engine: Engine, texts: Sequence[Text], into: Rounds, waited: list[float]) -> None:
    """A round; `waited` grows as cycles are waited for."""
    waits_before, tokens, cycles = len(waited), _tokens(texts), _count(texts)
    began = time.perf_counter()
    _until(engine, texts, TOKENS)
    into.seconds.append(time.perf_counter() - began)
    into.waited.append(sum(waited[waits_before:]))
    into.tokens.append(_tokens(texts) - tokens)
    into.cycles.append(_count(texts) - cycles)


def _until(engine: Engine, texts: Sequence[Text], tokens: int) -> None:
    """Step until cycles have added so many tokens to the oldest text, which every cycle has."""
    wanted = texts[0].stats.cycle_tokens + tokens
    while texts[0].stats.cycle_tokens < wanted:
        _step(engine, texts)


def _step(engine: Engine, texts: Sequence[Text]) -> None:
    engine.step()
    if any(text.finished for text in texts):
        raise InputError("a text has ended before all were measured: its context is full")


def _most_new(engine: Engine, prompt: Prompt) -> int:
    """New tokens that a text of the clock may have: what its context holds, and the cache for it alone."""
    room = min(engine.model.config.context_length, engine.cache_tokens or 1 << 40)
    return min(room - len(prompt), MOST_NEW)


def _tokens(texts: Sequence[Text]) -> int:
    return sum(text.stats.cycle_tokens for text in texts)


def _count(texts: Sequence[Text]) -> int:
    return sum(text.stats.cycles for text in texts)


def _nodes(texts: Sequence[Text]) -> int:
    return sum(text.stats.nodes for text in texts)


def _length(texts: Sequence[Text]) -> int:
    return sum(len(text.tokens) for text in texts)


def _kinds(texts: Sequence[Text]) -> Counter[str]:
    return sum((Counter(text.stats.cycles_of) for text in texts), Counter())


def decode(engine: Engine, jobs: Sequence[Job], way: Way) -> tuple[Row, list[list[int]]]:
    """(row, texts) of a list of jobs, the clock around all of it. Raises InputError for one that fails."""
    _decode(engine, jobs[: 2 * engine.slots], way)
    with waits() as waited:
        began = time.perf_counter()
        texts = _decode(engine, jobs, way)
        seconds = time.perf_counter() - began
    tokens = sum(map(len, texts))
    row = {
        "texts": engine.slots, "jobs": len(jobs), "tokens": tokens, "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1), "host_share": round(1 - sum(waited) / seconds, 4),
    }  # fmt: skip
    return row, texts


def _decode(engine: Engine, jobs: Sequence[Job], way: Way) -> list[list[int]]:
    texts = _submitted(engine, jobs, way)
    try:
        while not all(text.finished for text in texts):
            engine.step()
    finally:
        for text in texts:
            engine.cancel(text)
    return [text.result().token_ids for text in texts]
