"""Many texts through one engine: read as they are needed, decoded side by side, returned in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from ..errors import InputError
from ..request import Request
from .engine import Engine
from .sequence import Result, Sequence

Job = tuple[Ids[int], Request]  # token ids of a prompt, and its settings


def checked(engine: Engine, prompts: Iterable[Ids[int]], request: Request) -> None:
    """Raises InputError for a prompt that the engine refuses, naming it by its number from 0."""
    for nth, prompt in enumerate(prompts):
        with _named(nth):
            engine.fitted(prompt, request)


def with_bar(found: Iterator[Result], total: int | None, wanted: bool | None) -> Iterator[Result]:
    """The results, with a bar on stderr: how many there are, and how many tokens they have."""
    console = Console(stderr=True)
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
    )
    shown = console.is_terminal if wanted is None else wanted
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task, tokens = bar.add_task("decoding", total=total, tokens=0), 0
        for result in found:
            tokens += len(result.token_ids)
            bar.update(task, advance=1, tokens=tokens)
            yield result


def results(engine: Engine, jobs: Iterable[Job]) -> Iterator[Result]:
    """Decode every job; yields the results in the order of the jobs.

    Jobs are read when slots are free for them, with as many more in advance. A text that fails ends alone,
    for the reason "error". Ctrl-C ends every text that runs with what it has, for the reason "interrupted";
    no further job is read, and the results of those that were come still. Raises InputError, with the job's
    number from 0, for one that the engine refuses."""
    source, texts = iter(enumerate(jobs)), deque[Sequence]()
    more = True
    try:
        while more or texts:
            while more and sum(not text.finished for text in texts) < 2 * engine.slots:
                nth, job = next(source, (-1, None))
                more = job is not None
                if job is not None:
                    texts.append(_submitted(engine, nth, job))
            while texts and texts[0].finished:
                yield texts.popleft().result()
            if texts:
                more = _step(engine, texts) and more
    finally:
        for text in texts:  # an iterator that is left early leaves nothing running
            engine.cancel(text)


def _submitted(engine: Engine, nth: int, job: Job) -> Sequence:
    prompt, request = job
    with _named(nth):
        return engine.submit(prompt, request)


@contextmanager
def _named(nth: int) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"prompt {nth}: {error}") from None


def _step(engine: Engine, texts: Iterable[Sequence]) -> bool:
    """A step of the engine; False where Ctrl-C ended all texts."""
    try:
        engine.step()
    except InputError:
        pass  # of texts that have ended: their results say why
    except KeyboardInterrupt:
        for text in texts:
            engine.cancel(text, "interrupted")
        return False
    return True
