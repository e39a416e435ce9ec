"""A cycle of fixed shape on the device: its passes, the choice of tokens, the walk and the commit, as one
CUDA graph. Nothing in it comes from the host; what it reads of the text lies in the state that cycles share
(orthrus_kernels/advance_triton.py). What a cycle's passes are, its strategy says: two_pass_cycle.py,
one_pass_cycle.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthrus_kernels import Sampling
from orthrus_kernels.advance_triton import advance_triton
from orthrus_kernels.choice_triton import choose_triton
from orthrus_kernels.clock import has_clock, seconds_between
from orthrus_kernels.layout import RECORD, Record, Settings
from orthrus_kernels.logit_summary import summary_of_logits

from ..graphs import capturing
from .state import Run

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Qwen3

CANDIDATES = 16  # of a position that a tree may take
IN_FLIGHT = 4  # launches of a cycle that may be unread
Walk = Callable[..., None]  # called as `advance_triton` is

Chosen = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen from a row of states."""

    sampling: Sampling  # of its form
    numbers: Tensor  # of the settings, refilled for each text
    bias: Tensor | None  # [V] fp32, likewise

    def __call__(self, model: Qwen3, states: Tensor, positions: Tensor, tokens: Tensor) -> Chosen:
        """Write the token after each of the states [T, E] to tokens [T] int64; positions [T] int64: what
        those tokens take. Returns a function for the token's logit and the row's log-sum-exp, [T] fp32, both
        before any setting; of proposals nobody asks."""
        n = len(tokens)
        if self.sampling.temperature == 0 and self.bias is None:  # no logits in memory
            found, sums = (
                states.new_empty(n, 1, dtype=torch.float32),
                states.new_empty(n, dtype=torch.float32),
            )
            model.ops.head(states, model.head, 1, out=(found, tokens[:, None], sums))
            return lambda: (found[:, 0], sums)
        logits = model.ops.linear(states, model.head, out_dtype=torch.float32)
        choose_triton(logits, positions, self.sampling, out=tokens, numbers=self.numbers, bias=self.bias)
        return lambda: (logits.gather(1, tokens[:, None])[:, 0], summary_of_logits(logits, 1)[2])

    def ranked(
        self, model: Qwen3, states: Tensor, positions: Tensor, root: Tensor, known: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores and ids of the candidates of a tree under `root` [1] int32, and their order if the model
        has a bigram correction, as `grow` takes them. known: the block has seen the root."""
        scores, ids = self.candidates(model, states, positions)
        if model.bigram is None:
            return scores, ids, None
        scale = self.numbers[Settings.CORRECTION :][:1].view(torch.float32)
        tables = model.bigram.before, model.bigram.after
        scores, order = model.ops.rerank(scores, ids, root, *tables, scale, known=known)
        return scores, ids, order

    def candidates(self, model: Qwen3, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The `candidates` of a tree, for the positions [T] behind a root."""
        k = min(CANDIDATES, model.config.vocab_size)
        if self.sampling.temperature == 0 and self.bias is None:
            scores, ids, sums = model.ops.head(states, model.head, k)
            return scores - sums[:, None], ids
        logits = model.ops.linear(states, model.head, out_dtype=torch.float32)
        return model.ops.candidates(logits, positions, self.sampling, k, numbers=self.numbers, bias=self.bias)


@dataclass(frozen=True)
class End:
    """What the host reads of a cycle. milliseconds: of its graph; None where it was not one or not timed."""

    run: Run
    finished: bool
    damaged: bool
    milliseconds: float | None


Read = Callable[[], End]


class Slot:
    """Where the host finds the record of one launch. Made once a cycle: making an event takes as long as
    recording it, and a launch is the host's only work while the GPU runs."""

    def __init__(self, record: Tensor) -> None:
        """record: int32, of the cycle; only its shape counts."""
        self.on_gpu = record.is_cuda
        self.target = torch.zeros(record.shape, dtype=torch.int32, pin_memory=self.on_gpu)
        if self.on_gpu:
            self.began, self.done = (torch.cuda.Event(enable_timing=True) for _ in "01")

    def fill(self, record: Tensor) -> None:
        """Fetch the record behind what was launched so far."""
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


@dataclass(frozen=True)
class Shared:
    """What cycles of one cache and form of the choice have in common."""

    model: Qwen3
    cache: KVCache
    state: Tensor  # int32, of layout.State
    ends: Tensor  # int32, end tokens
    choice: Choice


class Cycle:
    """A cycle of fixed shape: what its strategy adds, then choice, walk and commit of N nodes."""

    kind: str  # as in `Run`
    forwards: int  # passes of it

    def __init__(self, shared: Shared, nodes: int) -> None:
        """nodes: that it verifies, the root included."""
        self.model, self.cache, self.state = shared.model, shared.cache, shared.state
        self.ends, self.choice = shared.ends, shared.choice
        device = self.model.device
        self.accepted = torch.zeros(nodes, dtype=torch.int32, device=device)
        self.start = self.state.new_zeros(1)
        self.choices = torch.zeros(nodes, dtype=torch.int64, device=device)
        self.record = self.state.new_zeros(RECORD + 3 * nodes)
        self.clock = self.record[Record.BEGAN : Record.DONE_AT] if has_clock(device) else None
        self.walk: Walk = advance_triton
        self.slots = [Slot(self.record) for _ in range(IN_FLIGHT)]
        self.launches = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def launch(self, pool: Any, timed: bool = False) -> Read:
        """Run the cycle once more, captured when it comes for the second time. Returns how to read it, before
        IN_FLIGHT more launches. timed: take the time of the graph."""
        slot = self.slots[self.launches % IN_FLIGHT]
        timed = timed and self.graph is not None
        if timed:
            slot.began.record()
        if pool is None or self.launches == 0:
            self.run()
        else:
            if self.graph is None:
                graph = torch.cuda.CUDAGraph()
                with capturing(graph, pool):
                    self.run()
                self.graph = graph  # whole: an interrupted capture leaves none
            self.graph.replay()
        self.launches += 1
        slot.fill(self.record)

        def read() -> End:
            head = slot.wait()[:RECORD].tolist()
            kept, drafted, times = head[Record.KEPT], head[Record.DRAFTED], head[Record.BEGAN :]
            tokens, logprobs, path = (part[:kept] for part in slot.target[RECORD:].view(3, -1))
            run = Run(
                tokens.tolist(), logprobs.view(torch.float32).tolist(), self.forwards, self.kind,
                len(self.choices) - 1 if drafted else 0, path.tolist(),
                [seconds_between(a, b) for a, b in pairwise(times)],
            )  # fmt: skip
            damage, end = bool(head[Record.DAMAGED]), bool(head[Record.FINISHED])
            return End(run, end, damage, slot.milliseconds() if timed else None)

        return read

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        raise NotImplementedError

    def verify(
        self, tokens: Tensor, positions: Tensor, parents: Tensor, states: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Choose behind N nodes, walk, and commit what the walk accepted. tokens, positions [N] int64,
        parents [N] int32; states [N, E], keys and values [L, N, G, D] of the pass."""
        logits, sums = self.choice(self.model, states, positions + 1, self.choices)()
        self.walk(
            self.state, tokens, parents, self.choices, logits, sums, self.ends, self.accepted, self.start,
            self.record, timed=self.clock is not None,
        )  # fmt: skip
        self.model.ops.commit(self.cache.keys, self.cache.values, keys, values, self.accepted, self.start)
