"""orthrus batch: answer the requests of a file, many side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import options, output, ray_options, terminal
from .interrupts import INTERRUPTED

if TYPE_CHECKING:
    from ..openai.batch import Counts, Told
    from ..openai.batch_file import BatchFile

SLOTS, CPU_SLOTS = 32, 1  # by default; on a CPU one text after another is faster
DECIDING = "model", "revision", "device", "dtype", "backend", "generation_config", "served_model_name"
HOW = """\
A line of IN is one of OpenAI's batch:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
or has the url /v1/completions and a body with a prompt. A line of OUT has the custom_id and the response,
and comes as its request finishes; with --ordered OUT is brought into the order of IN at the end. The same
command goes on where a run ended, however it ended. A line that cannot be answered gets an error in OUT, and
the exit code is 1 where OUT has one. To ask again, take it out of OUT. A request that has changed since its
answer came, or a checkpoint that has, is refused.

"""


def add(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = options.new_verb(
        subparsers, "batch", "answer a file of requests in OpenAI's batch format, many side by side",
        "orthrus batch requests.jsonl answers.jsonl --model chiennv/Orthrus-Qwen3-1.7B --slots 64", run,
    )  # fmt: skip
    parser.epilog = HOW + str(parser.epilog)
    parser.add_argument("source", metavar="IN.jsonl", help="a request a line")
    parser.add_argument(
        "out", metavar="OUT.jsonl", help="gets an answer a line; one that is there is gone on with"
    )
    options.add_model_options(parser)
    options.add_generation_config(parser)
    options.add_engine_options(parser, SLOTS, CPU_SLOTS)
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N requests")
    parser.add_argument(
        "--ordered", action="store_true", help="at the end bring OUT into the order of IN, all at once"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the summary")
    ray_options.add_ray_options(parser, autoscales=False)


def run(args: argparse.Namespace) -> int:
    """Answer what has no answer yet; 1 where an answer in OUT is an error, 130 for Ctrl-C."""
    from ..decode.engine import MOST_TOKENS
    from ..identity import identity
    from ..openai.batch_file import batch_file

    options.check_engine_options(args, ("--limit", args.limit, 1, MOST_TOKENS))
    ray_options.check(args, autoscales=False)
    checkpoint = identity(options.checkpoint_folder(args))
    # Files begun before there was --activations have no place for it.
    deciding = [getattr(args, name) for name in DECIDING] + [args.activations] * bool(args.activations)
    settings = json.dumps([*deciding, checkpoint])
    with batch_file(Path(args.source), Path(args.out), settings) as batch:
        try:
            return _answer(args, batch)
        except KeyboardInterrupt:
            print(
                f"orthrus: interrupted: {len(batch.known)} of {batch.total} requests are answered in "
                f"{args.out}; the same command goes on",
                file=sys.stderr,
            )
            return INTERRUPTED


def _answer(args: argparse.Namespace, batch: BatchFile) -> int:
    device, counts, seconds = (_on_cluster if args.ray else _here)(args, batch)
    if args.ordered:
        batch.order()
    _summary(args, device, batch, counts, seconds)
    return 1 if batch.failed else 0


def _here(args: argparse.Namespace, batch: BatchFile) -> tuple[str, Counts, float]:
    """Answer with an engine of this process; its device, and the seconds that the answers took."""
    from ..openai import batch as requests
    from ..openai.served import Served

    name = options.served_name(args)
    defaults = options.recommended_settings(args, options.checkpoint_folder(args))
    model = options.load_model(args)
    served = Served(name, model.config, options.text_of(model), defaults)
    slots = args.slots or (CPU_SLOTS if model.device.type == "cpu" else SLOTS)
    engine, begun = model.engine_of(slots, args.cache_tokens), time.perf_counter()
    with batch.open():
        if slots > 1 or args.cache_tokens is not None:
            engine.runner_for(1)  # a cache that does not fit is this command's error, not each request's
        if slots > 1:
            engine.warm()
        with _progress(batch) as told:
            counts = requests.run(engine, served, batch, told, args.limit)
    return str(model.device), counts, time.perf_counter() - begun


def _on_cluster(args: argparse.Namespace, batch: BatchFile) -> tuple[str, Counts, float]:
    """The same with engines of a Ray cluster, which end with this run."""
    from ..serve import cluster_batch
    from ..serve.cluster import Fleet
    from .serve import served_by

    name = options.served_name(args)
    served = served_by(args, name, options.checkpoint_folder(args))
    own = sha256(f"{platform.node()} {Path(args.out).resolve()}".encode()).hexdigest()[:8]  # nobody else's
    replicas = ray_options.replicas(args, f"batch-{own}-{name}", (SLOTS, CPU_SLOTS))

    async def answered() -> tuple[str, Counts, float]:
        fleet = await Fleet.start(replicas, ends=True)
        try:
            begun = time.perf_counter()
            with batch.open(), _progress(batch) as told:
                counts = await cluster_batch.run(fleet, served, batch, told, args.limit)
            return fleet.ready.device, counts, time.perf_counter() - begun
        finally:
            await fleet.close(grace=0.0, ends=True)

    return asyncio.run(answered())


def _summary(args: argparse.Namespace, device: str, batch: BatchFile, counts: Counts, seconds: float) -> None:
    figures: dict[str, Any] = {
        "model": args.model or "embedded",
        "device": device,
        "requests": batch.total,
        "answered": len(batch.known),
        "failed": batch.failed,
        "answered_now": counts.requests,
        "tokens": counts.tokens,
        "seconds": seconds,
        "tokens_per_second": counts.tokens / seconds,
        "tokens_per_cycle": counts.tokens_per_cycle,
    }
    if args.json:
        output.write_json(figures)
        return
    print(
        "{answered} of {requests} requests answered, {failed} with an error; now {answered_now}: {tokens} "
        "tokens in {seconds:.1f} s, {tokens_per_second:.1f} tok/s, {tokens_per_cycle:.2f} tokens a "
        "cycle".format(**figures)
    )


@contextmanager
def _progress(batch: BatchFile) -> Iterator[Told]:
    """A bar on stderr, where that is a terminal: requests done, tokens a second and a cycle."""
    columns = (
        *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[speed]:.0f} tok/s, {task.fields[gain]:.2f} tokens a cycle"),
    )  # fmt: skip
    console, begun = terminal.new_console(stderr=True), time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("answering", total=batch.total, completed=len(batch.known), speed=0.0, gain=0.0)

        def told(counts: Counts) -> None:
            speed = counts.tokens / (time.perf_counter() - begun)
            bar.update(task, completed=len(batch.known), speed=speed, gain=counts.tokens_per_cycle)

        yield told
