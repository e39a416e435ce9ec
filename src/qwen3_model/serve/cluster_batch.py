"""A batch through the replicas of a cluster: what `openai.batch` does with one engine."""

from __future__ import annotations

import asyncio
from typing import Any

from ..decode.sequence import Result
from ..errors import InputError
from ..openai import answer
from ..openai.batch import Counts, Told
from ..openai.batch_file import BatchFile
from ..openai.batch_lines import Line, answered, unreadable
from ..openai.body import Asked, read
from ..openai.served import Served
from .choices import Job
from .engine_client import Client, EngineDied
from .errors import Refusal
from .metrics import Metrics
from .replicas import NoReplica

ATTEMPTS = 5  # times that a line's replicas may die under it

Answer = tuple[Line, dict[str, Any], bool, list[Result]]  # with whether it is none of an error


async def run(client: Client, served: Served, batch: BatchFile, told: Told, limit: int | None) -> Counts:
    """Answer what has no answer yet, as `openai.batch.run` does, twice as many texts at a time as there are
    slots. A line whose replica dies is done again. Raises InputError where OUT cannot be written, and where
    no replica takes texts: what was answered is in OUT."""
    counts, waiting, more = Counts(), batch.waiting(limit), True
    metrics = Metrics(lambda: None)
    tasks: dict[asyncio.Task[Answer], int] = {}  # with the texts of each
    try:
        while more or tasks:
            while more and sum(tasks.values()) < 2 * client.ready.slots:
                line = next(waiting, None)
                more = line is not None
                if line is not None:
                    asked, wrong = _read(served, line)
                    work = _answer(client, served, metrics, line, asked, wrong)
                    texts = len(asked.prompts) * asked.n if asked is not None else 1
                    tasks[asyncio.create_task(work)] = texts
            if not tasks:  # nothing is left to answer
                break
            done, _ = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                line, said, ok, results = task.result()
                batch.append(line, said, ok)
                counts.add(results)
                told(counts)
                del tasks[task]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return counts


def _read(served: Served, line: Line) -> tuple[Asked | None, dict[str, Any]]:
    """What a line asks for, its seeds drawn; else its line of OUT."""
    if line.wrong:
        return None, unreadable(line)
    try:
        return read(served, line.url, line.body), {}
    except InputError as error:
        return None, answered(line, 400, answer.refused(error))


async def _answer(
    client: Client, served: Served, metrics: Metrics, line: Line, asked: Asked | None, wrong: dict[str, Any]
) -> Answer:
    """The line of OUT for a line of IN."""
    if asked is None:
        return line, wrong, False, []
    said = ""
    for _ in range(ATTEMPTS):
        job = None
        try:
            job = Job(client, served, asked, metrics)
            async for _ in job.pieces():
                pass
            results = job.results()
            return line, answered(line, 200, answer.answer(served, asked, results)), True, results
        except NoReplica:
            raise InputError("no replica of the cluster takes texts: the same command goes on") from None
        except EngineDied as error:
            said = str(error)
        except InputError as error:
            return line, answered(line, 400, answer.refused(error)), False, []
        except Refusal as error:
            return line, answered(line, 500, error.body), False, []
        finally:
            if job is not None:
                job.close()
    return line, answered(line, 500, answer.failed(said)), False, []
