"""`bench.decode --replay`: speed of whole decoding at real shapes, where acceptance is replayed from a trace.

Random weights decode; every kernel of every cycle runs, and only what a cycle keeps is forced
(forced_walk.py), at each position what the trace says (trace_file.py). Prompts are random tokens, as long as
the recorded ones or as --contexts says. Prefills are outside the clock."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median
from typing import Any, Literal

import torch

from qwen3_model import InputError, Qwen3, selector
from qwen3_model.bigram import CALIBRATION, Bigram
from qwen3_model.decode.one_pass import Shape
from qwen3_model.request import ONE_PASS_BLOCK

from . import report, strong, trace_file
from .command import fail
from .forced_walk import Forced, found_by_lookup, recorded
from .measure import free_memory, machine, machine_line
from .models import random_model
from .report import number
from .trace_file import LOOKUP, ONE_PASS, Text, Trace

COMMAND = "bench.decode"
BIGRAM_RANK = 32  # of the embedded checkpoint's tables


@dataclass(frozen=True)
class Way:
    """A way to decode: arguments of `generate`."""

    name: str
    strategy: str
    tree_nodes: int | Literal["auto"]
    block_size: int | None = None


PLAIN = Way("plain", "autoregressive", 0)
LOOKED_UP = Way("lookup", "lookup", 0)
TWO_PASS_CHAIN = Way("two-pass chain", "two-pass", 0)


def ways(trace: Trace, trees: Sequence[int] = (63,)) -> list[Way]:
    """What is compared: two-pass trees of so many nodes, one-pass cycles of the shape that a trace was made
    for, and lookup where the trace has it. Raises InputError for a trace whose one-pass blocks have another
    shape and do not say it."""
    found = [
        PLAIN, *([LOOKED_UP] if LOOKUP in trace.kinds else []), TWO_PASS_CHAIN,
        *(Way(f"two-pass tree {n}", "two-pass", n) for n in trees),
        Way("one-pass", "one-pass", "auto"), Way("auto", "auto", "auto"),
    ]  # fmt: skip
    made = trace.made.get("one_pass")
    if made is None and trace.one_pass_rows != ONE_PASS_BLOCK:
        raise InputError(
            f"the trace's one-pass blocks have {trace.one_pass_rows} rows, cycles here {ONE_PASS_BLOCK}"
        )
    if made is None or Shape(**made) == Shape.of(ONE_PASS_BLOCK, "auto"):
        return found
    size = {"tree_nodes": made["nodes"], "block_size": made["block"]}
    return [replace(way, **size) if way.strategy == ONE_PASS else way for way in found]


@dataclass
class Measured:
    """A way over all texts; one entry a text. Tokens and passes are those of cycles."""

    way: Way
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cycles: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    nodes: int = 0
    cycles_of: Counter[str] = field(default_factory=Counter)  # by kind

    @property
    def per_second(self) -> float:
        """Tokens / seconds, as a ratio of sums."""
        return sum(self.tokens) / sum(self.seconds)

    def row(self, name: str, trace: Trace) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "model": name, "acceptance": trace.says, "of": trace.simulated or trace.checkpoint,
            "way": self.way.name, "texts": len(self.seconds), "tokens": sum(self.tokens),
            "seconds": round(sum(self.seconds), 4), "tokens_per_second": round(self.per_second, 2),
            "median_of_texts": round(median(
                n / s for n, s in zip(self.tokens, self.seconds, strict=True)), 2),
            "ms_per_cycle": round(1e3 * sum(self.seconds) / sum(self.cycles), 4),
            "tokens_per_cycle": round(sum(self.tokens) / sum(self.cycles), 4),
            "tokens_per_forward": round(sum(self.tokens) / sum(self.forwards), 4),
            "nodes_per_cycle": round(self.nodes / sum(self.cycles), 2), "cycles_of": dict(self.cycles_of),
        }  # fmt: skip


class Replay:
    """Decodes a trace's texts with one model. Its cache's cycles have forced walks until `close`."""

    def __init__(self, model: Qwen3, texts: Sequence[Text], tokens: int, temperature: float = 0.0) -> None:
        """tokens: new ones of a text at most. temperature: the choices', which cost what they cost and are
        then forced. Raises InputError for a model on the plain twins."""
        if model.backend != "triton":
            raise InputError("acceptance is replayed by a kernel: backend triton, on a GPU")
        self.model, self.texts, self.tokens, self.temperature = model, texts, tokens, temperature
        looked_up = found_by_lookup(texts, tokens)
        self.forced = Forced(model.device, 1, recorded(texts, tokens), looked_up)
        model.engine.forget()
        longest = max(text.prompt_tokens for text in texts)
        model.engine.runner_for(longest + tokens).cycles.force(self.forced)

    def close(self) -> None:
        """Drop the cache with its cycles: the next text's walks are its own."""
        self.model.engine.forget()

    def decode(self, number: int, way: Way, into: Measured) -> None:
        """A text by its number, prefill outside the clock, into what was measured."""
        began: list[float] = []

        def note(tokens: list[int], piece: str) -> None:
            if not began:  # the prefill's token
                began.append(time.perf_counter())

        text, self.forced.next = self.texts[number], number
        prompt = [(7919 * i + 11) % (self.model.config.vocab_size - 1) for i in range(text.prompt_tokens)]
        stats = self.model.generate(
            prompt, way.strategy, min(self.tokens, text.tokens), seed=0, tree_nodes=way.tree_nodes,
            block_size=way.block_size, temperature=self.temperature, on_tokens=note,
        ).whole().stats  # fmt: skip
        into.seconds.append(time.perf_counter() - began[0])
        into.tokens.append(stats.cycle_tokens)
        into.cycles.append(stats.cycles)
        into.forwards.append(stats.forwards - 1)
        into.nodes += stats.nodes
        into.cycles_of.update(stats.cycles_of)


def run(
    model: Qwen3, trace: Trace, prompts: int, tokens: int, compared: Sequence[Way], context: int | None = None
) -> list[Measured]:
    """Every way over the first texts of a trace, in turn text by text, after one that compiles and captures.
    context: tokens of each prompt; None: as recorded. Raises InputError for a model on the plain twins or a
    trace of texts without cycles."""
    texts = [text for text in trace.texts if text.tokens > 1][:prompts]
    texts = [replace(text, prompt_tokens=context or text.prompt_tokens) for text in texts]
    if not texts:
        raise InputError("the trace's texts end with their first token")
    longest = max(range(len(texts)), key=lambda number: texts[number].prompt_tokens)
    replay = Replay(model, texts, tokens, trace.temperature)
    found = [Measured(way) for way in compared]
    try:
        for way in compared:
            replay.decode(longest, way, Measured(way))
        for number in range(len(texts)):
            for measured in found:
                replay.decode(number, measured.way, measured)
    finally:
        replay.close()
    return found


def with_bigram(model: Qwen3, rank: int = BIGRAM_RANK, selected: int = 0) -> Qwen3:
    """The model with small random tables of a bigram correction: ranking takes its time. selected: rank of a
    random selector beside them; 0: none."""
    generator = torch.Generator(model.device).manual_seed(1)
    shape = model.config.vocab_size, rank
    tables = [torch.randn(shape, generator=generator, device=model.device) / rank for _ in "uw"]
    model.bigram = Bigram.of(*(table.to(model.dtype) for table in tables))
    if selected:
        width, offsets = model.config.hidden_size, model.config.block_size - 1
        shapes = dict.fromkeys(selector.MATRICES, (width, selected))
        shapes[selector.PLACES] = 2, offsets, selected
        found = {
            name: torch.randn(shape, generator=generator, device=model.device) / width
            for name, shape in shapes.items()
        }
        found[CALIBRATION] = torch.tensor([1.0, 0.0]).repeat(2, 2, offsets, 1)
        model.bigram = selector.joined(model.bigram, found, model.embedding)
    return model


def tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table a model and acceptance; gains over the two-pass chain, the published cycle."""
    head = ["cycles", "acceptance", "tokens/s", "median of texts", "ms/cycle", "tokens/cycle",
            "tokens/forward", "nodes", "over plain", "over chain"]  # fmt: skip
    found = []
    for name, of in dict.fromkeys((row["model"], row["of"]) for row in rows):
        mine = {row["way"]: row for row in rows if (row["model"], row["of"]) == (name, of)}
        lines = []
        for row in mine.values():
            over = [f"{row['tokens_per_second'] / mine[way.name]['tokens_per_second']:.2f}x"
                    if way.name in mine else "-" for way in (PLAIN, TWO_PASS_CHAIN)]  # fmt: skip
            lines.append([
                row["way"], row["acceptance"], f"{row['tokens_per_second']:.1f}",
                f"{row['median_of_texts']:.1f}", number(row["ms_per_cycle"]),
                f"{row['tokens_per_cycle']:.2f}", f"{row['tokens_per_forward']:.2f}",
                f"{row['nodes_per_cycle']:.0f}", *over,
            ])  # fmt: skip
        texts = next(iter(mine.values()))["texts"]
        found.append((f"{name}, random weights, {texts} texts, acceptance of: {of}", head, lines))
    return found


def without_lookup(trace: Trace) -> list[str]:
    """Why a trace's table has no line of lookup, in one line; none where it has that line."""
    if LOOKUP in trace.kinds:
        return []
    why = "the trace is older than that kind, and python -m bench.trace records it anew"
    return [f"  no line of lookup: {'simulated texts have no tokens' if trace.simulated else why}"]


def traces(given: Any) -> Iterator[Trace]:
    """The recorded traces and, if asked for, simulated ones. Raises InputError, also for two of one name."""
    seen: dict[str, Any] = {}
    for path in given.replay:
        recorded = trace_file.read(path)
        if recorded.checkpoint in seen:
            before = seen[recorded.checkpoint]
            raise InputError(f"{before} and {path} are both of {recorded.checkpoint}: replay them in turn")
        if all(text.tokens < 2 for text in recorded.texts):
            raise InputError(f"{path}: the trace's texts end with their first token")
        seen[recorded.checkpoint] = path
        yield recorded
    if given.strong:
        shape = Shape.of(given.shape[1], given.shape[0]) if given.shape else None
        yield from strong.both(recorded, given.prompts, given.tokens, shape)


def main(given: Any) -> int:
    """What `bench.decode --replay` does with its options. The table and the JSON file come trace by trace: a
    run that is cut short keeps what it measured of whole sets of texts (a model with a trace), and its file
    says how many were left out."""
    if not torch.cuda.is_available():
        fail(COMMAND, "--replay takes times, which need a GPU, and there is none")
    began, rows = time.perf_counter(), list[dict[str, Any]]()
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    print(machine_line(facts), flush=True)
    try:
        wanted = [(trace, ways(trace, given.trees)) for trace in traces(given)]
        made = [{"checkpoint": t.checkpoint, "simulated": t.simulated, "temperature": t.temperature,
                 "made": t.made} for t, _ in wanted]  # fmt: skip
        selectors = given.selectors or [0]
        contexts = given.contexts or [None]
        sets = len(given.models) * len(selectors) * len(wanted) * len(contexts)
        for name in given.models:
            model = random_model(name)
            for rank, (trace, compared), context in product(selectors, wanted, contexts):
                with_bigram(model, selected=rank)
                measured = run(model, trace, given.prompts, given.tokens, compared, context)
                of = f"{name}, a selector of rank {rank}" if rank else name
                of += f", prompts of {context} tokens" if context else ""
                found = [one.row(of, trace) | {"context": context} for one in measured]
                rows += found
                sets -= 1
                report.print_tables(tables(found))
                so_far = f"  {time.perf_counter() - began:.0f} s so far"
                print(*without_lookup(trace), so_far, sep="\n", flush=True)
                if given.json:
                    report.write_json(
                        given.json, {"machine": facts, "traces": made, "rows": rows, "sets_left_out": sets}
                    )
            del model
            free_memory()
    except InputError as error:
        fail(COMMAND, str(error))
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    return 0
