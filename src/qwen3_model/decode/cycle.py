"""A cycle: passes, the choice of tokens, the walk and the commit, in one place for every device.

A cycle is written once, as operations on tensors. The plain twins run it on a CPU; on a GPU the same launches
are captured as one CUDA graph. Nothing in a cycle comes from the host: where the text stands, its root and
its limit lie in a state that the walk moves on (orthrus_kernels/walk.py). So a graph serves every text and
every length. What passes a cycle has, its strategy says: two_pass.py, one_pass.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthrus_kernels import DraftTree
from orthrus_kernels.clock import has_clock, seconds_between
from orthrus_kernels.layout import RECORD, Record, State

from .choice import Choice
from .sequence import Run

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Network
    from ..passes import Pass

IN_FLIGHT = 4  # launches of a cycle that may be unread
Walk = Callable[..., None]  # called as `walk` of walk.py is


class Text:
    """The text that runs, on the device: what all cycles of a cache read and write."""

    def __init__(self, model: Network, cache: KVCache) -> None:
        self.model, self.cache, self.choice = model, cache, Choice(model)
        self.state = torch.zeros(1, len(State), dtype=torch.int32, device=model.device)  # [S, columns]
        ends = model.config.eos_token_ids or (-1,)
        self.ends = torch.tensor(ends, dtype=torch.int32, device=model.device)

    def begin(self, start: int, root: int, left: int, finished: bool = False) -> None:
        """Put a text down: its root at position `start`, and `left` tokens that may still be added."""
        columns = {
            State.START: start, State.ROOT: root, State.LEFT: left, State.FINISHED: int(finished)
        }  # fmt: skip
        self.state.copy_(torch.tensor([[columns[column] for column in State]], dtype=torch.int32))

    @property
    def start(self) -> Tensor:
        """Committed positions, [S] int32."""
        return self.state[:, State.START]

    @property
    def root(self) -> Tensor:
        """The last known token, [S] int32."""
        return self.state[:, State.ROOT]


@dataclass(frozen=True)
class Outcome:
    """What the host reads of a cycle. milliseconds: of its graph; None where it was not one or not timed."""

    run: Run
    finished: bool
    damaged: bool
    milliseconds: float | None


Read = Callable[[], Outcome]


class Reading:
    """Where the host finds the record of one launch. Made once a cycle: making an event takes as long as
    recording it, and a launch is the host's only work while the GPU runs."""

    def __init__(self, record: Tensor) -> None:
        """record: int32, of the cycle; only its shape counts."""
        self.on_gpu = record.is_cuda
        self.target = torch.zeros(record.shape, dtype=torch.int32, pin_memory=self.on_gpu)
        if self.on_gpu:
            self.began, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def fetch(self, record: Tensor) -> None:
        """Copy the record behind what was launched so far."""
        self.target.copy_(record, non_blocking=True)
        if self.on_gpu:
            self.done.record()

    def wait(self) -> Tensor:
        """The record, when it is there."""
        if self.on_gpu:
            self.done.synchronize()
        return self.target

    def milliseconds(self) -> float:
        """From `began` to the end."""
        return self.began.elapsed_time(self.done)


class Cycle:
    """A cycle of fixed shape: what its strategy adds, then choice, walk and commit of N nodes."""

    kind: str  # as in `Run`
    pass_rows: list[int]  # of each of its passes
    check: Pass  # that verifies, its first rows the nodes
    scores: Tensor  # [N] fp32: of the path to each node, as in `DraftTree`

    def __init__(self, text: Text, nodes: int) -> None:
        """nodes: that it verifies, the root included."""
        self.text, self.model = text, text.model
        device = text.state.device
        self.nodes = nodes
        self.accepted = text.state.new_zeros(1, nodes)
        self.start = text.state.new_zeros(1)
        self.choices = torch.zeros(nodes, dtype=torch.int64, device=device)  # of the last launch
        self.record = text.state.new_zeros(1, RECORD + 3 * nodes)
        timed = self.model.backend != "triton" or has_clock(device)  # twins ask the host for the time
        self.clock = self.record[0, Record.BEGAN : Record.DONE_AT] if timed else None
        self.walk: Walk = self.model.ops.walk
        self.readings = [Reading(self.record[0]) for _ in range(IN_FLIGHT)]
        self.launches = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def launch(self, pool: Any, timed: bool = False) -> Read:
        """Run the cycle once more. Returns how to read it, before IN_FLIGHT more launches.

        pool: of CUDA graphs; the second launch is captured, when its kernels are compiled. None: nothing is
        captured. timed: take the time of the graph."""
        reading = self.readings[self.launches % IN_FLIGHT]
        timed = timed and self.graph is not None
        if timed:
            reading.began.record()
        if pool is None or self.launches == 0:
            self.run()
        else:
            if self.graph is None:
                self.graph = captured(self.run, pool)
            self.graph.replay()
        self.launches += 1
        reading.fetch(self.record[0])

        def read() -> Outcome:
            head = reading.wait()[:RECORD].tolist()
            kept, drafted, times = head[Record.KEPT], head[Record.DRAFTED], head[Record.BEGAN :]
            tokens, logprobs, path = (part[:kept] for part in reading.target[RECORD:].view(3, -1))
            run = Run(
                tokens.tolist(), logprobs.view(torch.float32).tolist(), len(self.pass_rows), self.kind,
                self.nodes - 1 if drafted else 0, path.tolist(),
                [seconds_between(a, b) for a, b in pairwise(times)], self.pass_rows,
            )  # fmt: skip
            damaged, finished = bool(head[Record.DAMAGED]), bool(head[Record.FINISHED])
            return Outcome(run, finished, damaged, reading.milliseconds() if timed else None)

        return read

    def begin(self, tokens: list[int]) -> None:
        """Get ready for a text that holds these tokens: what the last text has left is not its own."""

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        raise NotImplementedError

    def tell(self, run: Run) -> None:
        """Fill in what a caller that watches wants to know of the launch that was just read."""
        n, plan = 1 + run.nodes, self.check.plan
        depths = (plan.positions[:n] - plan.positions[0]).tolist()
        scores = self.scores[:n].tolist()
        run.tree = DraftTree(plan.tokens[:n].tolist(), plan.parents[:n].tolist(), depths, scores)
        run.choices = self.choices[:n].tolist()

    def verify(self, parents: Tensor, states: Tensor, keys: Tensor, values: Tensor) -> None:
        """Choose behind the N nodes of `check`, walk, and commit what the walk accepted. parents [N] int32;
        states [N, E]; keys and values [L, >= N, G, D] of the pass."""
        n, text, plan = self.nodes, self.text, self.check.plan
        tokens, positions = plan.tokens[:n], plan.positions[:n]
        self.choices, logits, sums = text.choice.of_tree(states, positions + 1, tokens, parents)
        self.walk(
            text.state, tokens, parents, self.choices, logits, sums, text.ends, self.accepted, self.start,
            self.record, timed=self.clock is not None,
        )  # fmt: skip
        text.choice.note(self.choices, self.accepted)
        cache = text.cache
        self.model.ops.commit(cache.keys, cache.values, keys, values, self.accepted, self.start)


def captured(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The launches of a function as a CUDA graph, whole: an interrupted capture leaves none."""
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool):
        run()
    return graph


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """`torch.cuda.graph` without garbage collection: what that finds dead may be another graph, and CUDA
    does not permit destroying one during a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        if collects:
            gc.enable()
