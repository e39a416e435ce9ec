"""A cycle of fixed shape on the device: its passes, the choice of tokens, the walk and the commit, as one
CUDA graph. Nothing in it comes from the host; what it reads of the text lies in the state that cycles share
(orthrus_kernels/advance_triton.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthrus_kernels import PackedRows, Rows, Sampling
from orthrus_kernels.advance_triton import RECORD, advance_triton
from orthrus_kernels.attention_triton import tile_rows
from orthrus_kernels.choice_triton import choose_triton
from orthrus_kernels.clock import has_clock, seconds_between
from orthrus_kernels.grow_triton import TreeTables, grow_triton, tree_tables
from orthrus_kernels.logit_summary import summary_of_logits
from orthrus_kernels.move_triton import move_triton

from ..graphs import capturing
from ..pass_inputs import PassInputs
from .budget import CHAIN
from .state import Run

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Qwen3

CANDIDATES = 16  # of a position that a tree may take
IN_FLIGHT = 4  # launches of a cycle that may be unread


class MovingPass:
    """A pass whose rows stand behind wherever the text has got to."""

    def __init__(self, model: Qwen3, rows: Rows, room: int, logits_of: int | None = None) -> None:
        """rows: on an empty context. logits_of: of the first so many rows; None: of all."""
        c, device = model.config, model.device
        packed = model.ops.prepare_rows(
            rows, c.num_attention_heads, c.num_key_value_heads, c.head_dim, model.dtype, device, room=room
        )
        assert isinstance(packed, PackedRows)
        wanted = None if logits_of is None else torch.arange(logits_of, device=device)
        self.packed, self.ids = packed, torch.tensor([rows.tokens, rows.positions], device=device)
        self.inputs = PassInputs(self.ids, packed, rows.n_ar, wanted)
        self.depths = self.ids[1].clone()

    def move(self, state: Tensor, clock: Tensor | None = None) -> None:
        """Put the rows behind the text, the root in row 0; clock: takes the time."""
        move_triton(self.packed, state[0:1], state[1:2], self.ids, self.depths, clock)


class GrownPass:
    """The pass that verifies a draft tree, its shape fixed and its tree grown anew by every cycle."""

    def __init__(self, model: Qwen3, nodes: int, depth: int, room: int) -> None:
        """nodes: below the root."""
        c = model.config
        height = tile_rows(c.num_attention_heads, c.num_key_value_heads, c.head_dim, model.dtype)
        self.tables: TreeTables = tree_tables(nodes, depth, height, room, model.device)
        self.ids, self.parents = self.tables.ids, self.tables.parents
        self.inputs = PassInputs(self.ids, self.tables.packed, nodes + 1, None)


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
        self, model: Qwen3, states: Tensor, positions: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores and ids of the candidates of a tree under `root` [1] int32, and their order if the model
        has a bigram correction, as `grow_triton` takes them. The block has seen the root."""
        scores, ids = self.candidates(model, states, positions)
        if model.bigram is None:
            return scores, ids, None
        scale = self.numbers[7:8].view(torch.float32)
        tables = model.bigram.before, model.bigram.after
        scores, order = model.ops.rerank(scores, ids, root, *tables, scale, known=True)
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


class Cycle:
    """A cycle of fixed shape: draft and verify passes, choice, walk, commit."""

    def __init__(
        self, model: Qwen3, cache: KVCache, state: Tensor, ends: Tensor, choice: Choice, kind: int, room: int,
        block: int,
    ) -> None:  # fmt: skip
        """kind: of budget.py. block: rows of the draft, 0 without one."""
        rows = kind + 1 if kind > CHAIN else max(block, 1)
        self.model, self.cache, self.state, self.ends, self.choice = model, cache, state, ends, choice
        device, config = model.device, model.config
        self.draft: MovingPass | None = None
        if block:
            masks = Rows.block(0, block, 0, config.mask_token_id)
            self.draft = MovingPass(model, masks, room, logits_of=block - 1)
        self.check: MovingPass | GrownPass
        if kind > CHAIN:
            self.check = GrownPass(model, kind, block - 1, room)
            self.parents = self.check.parents
        else:
            chain = Rows.chain([0] * rows, 0)
            self.check = MovingPass(model, chain, room)
            self.parents = torch.tensor(chain.parents, dtype=torch.int32, device=device)
        self.accepted, self.start = torch.zeros_like(self.parents), state.new_zeros(1)
        self.choices = torch.zeros(rows, dtype=torch.int64, device=device)
        self.record = state.new_zeros(RECORD + 3 * rows)
        self.clock = self.record[4:7] if has_clock(device) else None
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
            kept, finished, damaged, leading, *times = slot.wait()[:RECORD].tolist()
            tokens, logprobs, path = (part[:kept] for part in slot.target[RECORD:].view(3, -1))
            run = Run(
                tokens.tolist(), logprobs.view(torch.float32).tolist(), 1 if self.draft is None else 2,
                len(self.choices) - 1, path.tolist(), leading,
                [seconds_between(a, b) for a, b in pairwise(times)],
            )  # fmt: skip
            return End(run, bool(finished), bool(damaged), slot.milliseconds() if timed else None)

        return read

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        model, check, clock = self.model, self.check, self.clock
        if self.draft is not None:
            self.draft.move(self.state, clock)
            states, _, _ = model.states(self.draft.inputs, self.cache)
            behind = self.draft.ids[1, 1:]
            if isinstance(check, GrownPass):
                drafted = None if clock is None else clock[1:]
                scores, ids, order = self.choice.ranked(model, states, behind, self.state[1:2])
                grow_triton(check.tables, self.state, scores, ids, drafted, order)
            else:  # the proposal of block row i takes the place of verify row i + 1
                self.choice(model, states, behind, check.ids[0, 1:])
        if isinstance(check, MovingPass):
            check.move(self.state, clock if clock is None or self.draft is None else clock[1:])
        states, keys, values = model.states(check.inputs, self.cache)
        logits, sums = self.choice(model, states, check.ids[1] + 1, self.choices)()
        advance_triton(
            self.state, check.ids[0], self.parents, self.choices, logits, sums, self.ends,
            self.accepted, self.start, self.record, timed=clock is not None,
        )  # fmt: skip
        model.ops.commit(self.cache.keys, self.cache.values, keys, values, self.accepted, self.start)
