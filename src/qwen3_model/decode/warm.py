"""A warm start: what texts will need is compiled in parallel, and captured, before the first one is read.

Kernels are found by a recording (orthrus_kernels/compile_ahead.py) of every chunk and cycle on the model's
first layer, as all layers launch the same ones. Those that Triton's cache on disk lacks are compiled by
processes, one a core. With a whole cache no process is started.

An engine of several slots also captures its graphs then, and times its cycles: for every number of seats and
each of the three forms of a choice, plain decoding and the drafts that "auto" chooses among, plain decoding
and the largest of these with rows for prompts too; and every chunk of a prompt. Nothing is compiled or
captured in the middle of a text, unless a text asks for something else: one-pass, a block size that is not
the model's, a number of tree nodes, or lookup of an Orthrus while prompts are read beside it. That is
compiled and captured when it first comes. An engine of one slot captures a graph when it first needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from orthrus_kernels import FORMS, Form
from orthrus_kernels.compile_ahead import compile_all, missing, recorded

from ..errors import in_memory
from ..model import PREFILL_ROWS, Network
from ..request import SAMPLING, Request
from .groups import Kind
from .kinds import kinds_of, kinds_of_auto, seat_counts
from .prompt import LEAST_ROWS, rows_for
from .runner import Runner, cache_size, replays
from .scheduler import MOST_PARTS, Part
from .sequence import Sequence
from .stream import TokenStream

FEW = 3  # kernels that are compiled where they are launched: processes take seconds to start
# Settings of which an engine of one slot compiles the kernels; those of another text come before its prompt.
_SAMPLED = Request(temperature=0.8), Request(temperature=0.8, top_p=0.95)
ALONE = Request(), *_SAMPLED, Request(temperature=0.8, top_k=20, top_p=0.95)
# One text's of each of FORMS.
BESIDE = Request(), _SAMPLED[0], Request(repetition_penalty=1.1, logit_bias={0: 0.0})


@dataclass(frozen=True)
class Plan:
    """What is compiled ahead: every chunk, and every kind of cycle for every number of seats and the choice
    of every request. kinds: None: those that "auto" chooses among. block: rows of a draft block, 0: none."""

    requests: tuple[Request, ...]
    seats: tuple[int, ...]
    kinds: tuple[Kind, ...] | None
    block: int
    chunks: tuple[int, ...]  # by rows

    def kinds_of(self, seats: int) -> tuple[Kind, ...]:
        """The kinds of cycles of so many seats."""
        return kinds_of_auto(seats, self.block) if self.kinds is None else self.kinds


@dataclass(frozen=True)
class Warmed:
    """What a warm start did. kernels: that this process had not loaded; compiled: those of them that Triton's
    cache on disk did not hold; graphs: captured."""

    kernels: int = 0
    compiled: int = 0
    graphs: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Ready for JSON."""
        return asdict(self)


def plan_of_engine(model: Network, slots: int, capacity: int) -> Plan:
    """For any texts of up to `capacity` positions."""
    seats, most = seat_counts(slots), min(capacity * min(slots, MOST_PARTS), PREFILL_ROWS)
    requests = BESIDE if slots > 1 else ALONE
    return Plan(requests, seats, None, model.config.block_size or 0, _chunks(range(1, most + 1)))


def plan_of_text(text: Sequence) -> Plan:
    """For one text alone."""
    whole, rest = divmod(len(text.tokens), PREFILL_ROWS)
    chunks = _chunks([PREFILL_ROWS] * (whole > 0) + [rest] * (rest > 0))
    return Plan((text.request,), (1,), kinds_of(text), text.block_size, chunks)


def _chunks(tokens: Iterable[int]) -> tuple[int, ...]:
    """Rows of the chunks that hold so many tokens."""
    return tuple(sorted({rows_for(count) for count in tokens}))


def launches(model: Network, slots: int, capacity: int, plan: Plan) -> set[str]:
    """A recording of what a plan launches. model: of the Triton backend. Nothing is computed."""
    with recorded() as found, torch.inference_mode():
        runner = Runner(_first_layer(model), slots, capacity, pages=1)
        for rows in plan.chunks:
            runner.prompts.ready(rows)
        tokens = min(LEAST_ROWS, model.config.context_length - 1)
        for request in plan.requests:
            texts = [_text(model, request, tokens) for _ in range(min(slots, 2))]
            for together in (texts[:1], texts)[:slots]:
                runner.prefill([Part(text, slot, 0, tokens, True) for slot, text in enumerate(together)])
            form = runner.cycles.slots.choice.form_of([0])
            for seats in plan.seats:
                runner.cycles.rehearse(plan.kinds_of(seats), form, plan.block, seats)
    return found


def _first_layer(model: Network) -> Network:
    """The model with one layer, whose engine launches every kernel by itself. model: may be a weak proxy."""
    first = Network.__new__(Network)
    vars(first).update(model.__dict__)
    first.layers, first.use_graphs = model.layers[:1], False
    first.config = replace(model.config, num_hidden_layers=1)
    return first


def _text(model: Network, request: Request, tokens: int) -> Sequence:
    """A text of so many tokens with the choice of a request."""
    chosen, least = {name: getattr(request, name) for name in SAMPLING}, min(request.min_tokens, 1)
    fitted = Request(strategy="autoregressive", max_new_tokens=1, min_tokens=least, **chosen)
    fitted = replace(fitted, top_logprobs=request.top_logprobs)
    fitted = fitted.fit(model.config, tokens, has_text=False)
    fitted = replace(fitted, grammar=request.grammar)  # its masks are taken, and nobody makes any
    return Sequence([0] * tokens, fitted, TokenStream(None, model.config.eos_token_ids, (), 1, None))


@torch.inference_mode()
def capture(runner: Runner, plan: Plan, progress: bool | None = None) -> int:
    """Capture and time all that texts of a runner of several slots take, the largest first, as smaller graphs
    then find their memory; returns how many graphs there are. Texts that run keep what they have. Raises
    InputError where memory runs out."""
    prompts, cycles = runner.prompts, runner.cycles
    parts: list[Callable[[], None]] = [partial(prompts.ready, rows) for rows in reversed(plan.chunks)]
    for seats in reversed(plan.seats):
        parts += [partial(cycles.ready, form, plan.block, seats) for form in FORMS]
    with (
        in_memory("what so many texts need", "ask for fewer slots, or lower cache_tokens"),
        _bar("capturing graphs", len(parts), progress) as advance,
    ):
        for part in parts:
            part()
            advance()
    cycles.pace.first = prompts.measured(plan.chunks)
    cycles.time_keys()
    return len(prompts) + len(cycles)


class WarmStart:
    """What has been compiled for the texts of an engine of so many slots.

    progress: a bar on stderr; None: where that is a terminal."""

    def __init__(self, model: Network, slots: int) -> None:
        self.model, self.slots = model, slots
        self._compiled: set[tuple] = set()

    def before(self, text: Sequence, runner: Runner) -> None:
        """Get ready for a text whose prompt comes next: for this one, or with several slots once for all.
        Raises InputError where memory runs out."""
        if not replays(self.model):
            return
        if self.slots == 1:
            self._compile(plan_of_text(text), runner.cache.capacity, None, FEW)
        elif not runner.warm:
            self.several(runner, None)

    def alone(self, tokens: int | None, progress: bool | None) -> Warmed:
        """Compile what most texts of an engine of one slot need. tokens: as in `cache_size`."""
        if not replays(self.model):
            return Warmed()
        began, limits = time.perf_counter(), (1, self.model.config.context_length)
        sizes = dict.fromkeys(cache_size(self.model, 1, tokens, limit)[0] for limit in limits)
        counts = [self._compile(plan_of_engine(self.model, 1, size), size, progress) for size in sizes]
        kernels, compiled = map(sum, zip(*counts, strict=True))
        return Warmed(kernels, compiled, 0, time.perf_counter() - began)

    def several(self, runner: Runner, progress: bool | None) -> Warmed:
        """Compile and capture what texts of several slots need. Raises InputError where memory runs out."""
        began, capacity = time.perf_counter(), runner.cache.capacity
        plan = plan_of_engine(self.model, self.slots, capacity)
        counts = self._compile(plan, capacity, progress)
        graphs = 0 if runner.warm else capture(runner, plan, progress)
        runner.warm = True
        return Warmed(*counts, graphs, time.perf_counter() - began)

    def _compile(self, plan: Plan, capacity: int, progress: bool | None, few: int = 0) -> tuple[int, int]:
        """Compile what a plan needs, once; returns how many kernels this process had not loaded, and how many
        of them were compiled. few: so many are left to their launches."""
        vocabulary = self.model.config.vocab_size
        forms = tuple(
            (Form.of(of.sampling, vocabulary), of.min_tokens > 0, of.top_logprobs > 0, of.grammar is not None)
            for of in plan.requests
        )
        key = forms, plan.seats, plan.kinds, plan.block, plan.chunks, capacity
        if key in self._compiled:
            return 0, 0
        found = launches(self.model, self.slots, capacity, plan)
        lacked, compiled = missing(found), 0
        if len(lacked) > few:
            with _bar("compiling kernels", len(lacked), progress) as advance:
                compile_all(lacked, advance)
            compiled = len(lacked) - len(missing(lacked))
        self._compiled.add(key)
        return len(found), compiled


@contextmanager
def _bar(what: str, total: int, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """A bar on stderr, gone when it is done; call what it gives behind every part."""
    console = Console(stderr=True)
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    shown = console.is_terminal if wanted is None else wanted
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
