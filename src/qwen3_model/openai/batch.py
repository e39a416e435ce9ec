"""A batch through an engine: requests are read as slots become free, and answered as they finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..decode.engine import Engine
from ..decode.sequence import Result, Sequence
from ..errors import InputError
from . import answer
from .batch_file import SYNC_SECONDS, BatchFile
from .batch_lines import Line, answered, unreadable
from .body import Asked, Served, read


@dataclass
class Counts:
    """What a run has done so far."""

    requests: int = 0  # answered, errors too
    texts: int = 0  # those that cycles made tokens of
    tokens: int = 0
    cycles: int = 0
    cycle_tokens: int = 0

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed by cycles / cycles of each text."""
        return self.cycle_tokens / self.cycles if self.cycles else 0.0

    def add(self, results: list[Result]) -> None:
        """Count an answer's texts."""
        self.requests += 1
        self.texts += len(results)
        for result in results:
            self.tokens += len(result.token_ids)
            self.cycles += result.stats.cycles
            self.cycle_tokens += result.stats.cycle_tokens


@dataclass
class Running:
    """A request whose texts are in the engine."""

    line: Line
    asked: Asked
    texts: list[Sequence] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all its choices have ended."""
        return all(text.finished for text in self.texts)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended one of them."""
        return any(text.stream.finish_reason == "interrupted" for text in self.texts)


Told = Callable[[Counts], None]


def run(engine: Engine, served: Served, batch: BatchFile, told: Told, limit: int | None = None) -> Counts:
    """Answer what has no answer yet. told(counts): called with each answer. limit: lines of IN that count.

    A text that fails is answered with status 500. Raises InputError where OUT cannot be written, and
    KeyboardInterrupt for Ctrl-C, once what had finished is written."""
    counts, running, waiting = Counts(), list[Running](), batch.waiting(limit)
    more = True
    try:
        while more or running:
            while more and sum(not t.finished for job in running for t in job.texts) < 2 * engine.slots:
                line = next(waiting, None)
                more = line is not None
                if line is not None and (job := _begun(engine, served, batch, line)) is not None:
                    running.append(job)
                elif line is not None:
                    counts.add([])
                    told(counts)
            interrupted = not _step(engine)
            for job in [job for job in running if job.finished and not job.interrupted]:
                counts.add(_write(served, batch, job))
                running.remove(job)
                told(counts)
            batch.sync(due=SYNC_SECONDS)
            if interrupted:
                raise KeyboardInterrupt
    finally:
        for job in running:
            _cancel(engine, job)
    return counts


def _begun(engine: Engine, served: Served, batch: BatchFile, line: Line) -> Running | None:
    """The request of a line, its texts submitted; None where it was answered with an error."""
    if line.wrong:
        batch.append(line, unreadable(line), ok=False)
        return None
    try:
        job = Running(line, read(served, line.url, line.body))
        try:
            for prompt, request in job.asked.jobs():
                job.texts.append(engine.submit(prompt, request))
        except InputError:
            _cancel(engine, job)
            raise
    except InputError as error:
        batch.append(line, answered(line, 400, answer.refused(error)), ok=False)
        return None
    return job


def _write(served: Served, batch: BatchFile, job: Running) -> list[Result]:
    """Answer a request whose texts have ended; returns them."""
    for text in job.texts:
        text.end("error")  # keeps its first reason, which Ctrl-C may have left untold
    results = [text.result() for text in job.texts]
    wrong = next((r.error or r.stats.finish_reason for r in results if r.stats.finish_reason == "error"), "")
    if wrong:
        batch.append(job.line, answered(job.line, 500, answer.failed(wrong)), ok=False)
    else:
        batch.append(job.line, answered(job.line, 200, answer.answer(served, job.asked, results)), ok=True)
    return results


def _step(engine: Engine) -> bool:
    """A step of the engine; False where Ctrl-C ended the texts that ran."""
    try:
        engine.step()
    except InputError:
        pass  # of texts that have ended: their results say why
    except KeyboardInterrupt:
        return False
    return True


def _cancel(engine: Engine, job: Running) -> None:
    for text in job.texts:
        engine.cancel(text)
