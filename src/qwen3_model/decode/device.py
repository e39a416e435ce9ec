"""Cycles without the host: length, root, end tokens and limit live on the device, and a cycle is one CUDA
graph from the tables of its passes to the commit.

The host launches cycle n + 1 before it reads what cycle n kept, so that the GPU does not wait for Python; a
cycle launched after the text has ended changes nothing (orthrus_kernels/advance_triton.py). A graph serves
all texts, lengths and settings of its key: rows of the cycle, **room** (the passes' tables are laid out for
that many positions, which changes grids and never key cuts), and form of the choice. The host's loop and
these cycles give the same tokens and log-probabilities; they differ in two things. With one token left the
loop does not draft, and a cycle here does. And the loop refuses logits that are not numbers in any row, a
cycle only those on the accepted path. On a CPU, under the
interpreter, cycles run from the same fixed tensors, uncaptured: a test of everything but the capture."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthrus_kernels import PackedRows, Rows, Sampling
from orthrus_kernels.advance_triton import RECORD, advance_triton
from orthrus_kernels.attention_triton import tile_rows
from orthrus_kernels.choice_triton import bias_table, choice_form, choice_numbers, choose_triton
from orthrus_kernels.grow_triton import TreeTables, grow_triton, tree_tables
from orthrus_kernels.logit_summary import summary_of_logits
from orthrus_kernels.move_triton import move_triton

from ..errors import InputError
from ..pass_inputs import PassInputs
from .state import NOT_NUMBERS, Decoding, Run

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Qwen3

LEAST_ROOM = 1024  # positions; each larger room is twice the one before
CANDIDATES = 16  # of a position that a tree may take
MOST_GRAPHS = 64  # the one not used for longest goes first
STRATEGIES = ("autoregressive", "two-pass")  # what has a cycle here


def serves(strategy: str, decoding: Decoding) -> bool:
    """Whether a generation can run here: the kernels are Triton's. A repetition penalty makes each proposal
    depend on those before it, which the host follows; rejection sampling has no kernel."""
    model, coupled = decoding.model, decoding.verify == "coupled"
    able = model.backend == "triton" and coupled and decoding.sampling.repetition_penalty == 1.0
    return able and model.use_cycles and strategy in STRATEGIES


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

    def move(self, state: Tensor) -> None:
        """Put the rows behind the text, the root in row 0."""
        move_triton(self.packed, state[0:1], state[1:2], self.ids, self.depths)


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

    def candidates(self, model: Qwen3, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What a tree is grown from: log-probabilities [T, K], likeliest first, and tokens [T, K], of the
        positions [T] behind a root. As `two_pass.grow` has them."""
        k = min(CANDIDATES, model.config.vocab_size)
        if self.sampling.temperature == 0 and self.bias is None:
            scores, ids, sums = model.ops.head(states, model.head, k)
            return scores - sums[:, None], ids
        logits = model.ops.linear(states, model.head, out_dtype=torch.float32)
        perturbed = torch.empty_like(logits)
        choose_triton(
            logits, positions, self.sampling, numbers=self.numbers, bias=self.bias, perturbed=perturbed
        )
        scores, ids, sums = summary_of_logits(perturbed, k)
        return (scores.log_softmax(-1) if self.sampling.temperature > 0 else scores - sums[:, None]), ids


class DeviceCycles:
    """The cycles of one cache, with their graphs."""

    def __init__(self, model: Qwen3, cache: KVCache) -> None:
        # weak: the cache owns its cycles and the model the cache
        self._model, self._cache = weakref.proxy(model), weakref.proxy(cache)
        device = model.device
        self._state = torch.zeros(4, dtype=torch.int32, device=device)
        self._numbers = torch.zeros(8, dtype=torch.int32, device=device)
        self._bias = torch.zeros(model.config.vocab_size, dtype=torch.float32, device=device)
        self._ends = torch.tensor(model.config.eos_token_ids or (-1,), dtype=torch.int32, device=device)
        self._cycles: OrderedDict[tuple, Cycle] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        """How many kinds of cycle there are."""
        return len(self._cycles)

    def again(self) -> None:
        """Launch the last cycle once more; behind the end of a text that changes nothing."""
        next(reversed(self._cycles.values())).launch(self._pool)

    def runs(self, strategy: str, decoding: Decoding) -> Iterator[Run]:
        """What each cycle adds to the text, until an end token or the limit. Raises InputError when logits
        are not numbers."""
        drafted = strategy == "two-pass"
        nodes = decoding.tree_nodes if drafted else 0
        rows = nodes + 1 if nodes else decoding.block_size if drafted else 1
        vocabulary, biases = self._model.config.vocab_size, decoding.sampling.logit_bias
        form = *choice_form(decoding.sampling, vocabulary), bool(biases)
        self._numbers.copy_(choice_numbers(decoding.sampling, vocabulary))
        if biases:
            self._bias.copy_(bias_table(tuple(biases.items()), vocabulary, self._bias.device))
        begin = [decoding.start, decoding.root, decoding.remaining, 0]
        self._state.copy_(torch.tensor(begin, dtype=torch.int32))
        shape = strategy, rows, nodes > 0
        waiting = self._launch(shape, form, decoding, unread=0)
        while True:
            following = self._launch(shape, form, decoding, unread=1)
            kept, finished, damaged, tokens, logprobs = waiting()
            decoding.tokens += tokens
            self._cache.lengths[0] += kept
            if kept:
                yield Run(tokens, logprobs, forwards=2 if drafted else 1, nodes=rows - 1)
            if damaged:
                raise InputError(NOT_NUMBERS)
            if finished:
                return
            waiting = following

    def _launch(self, shape: tuple[str, int, bool], form: tuple, decoding: Decoding, unread: int) -> Read:
        """Launch a cycle while `unread` others are not read; returns how to read it. shape: strategy, rows to
        verify, and whether they are a tree."""
        strategy, rows, tree = shape
        block = decoding.block_size if strategy == "two-pass" else 1
        furthest = min(decoding.start + unread * block, decoding.limit - 1) + block
        room = LEAST_ROOM
        while room < furthest:
            room *= 2
        key = strategy, rows, room, form, block, tree
        if key not in self._cycles:
            bias = self._bias if decoding.sampling.logit_bias else None
            choice = Choice(decoding.sampling, self._numbers, bias)
            self._cycles[key] = Cycle(
                self._model, self._cache, self._state, self._ends, choice, rows, room,
                block if strategy == "two-pass" else 0, tree,
            )  # fmt: skip
            while len(self._cycles) > MOST_GRAPHS:
                self._cycles.popitem(last=False)
        self._cycles.move_to_end(key)
        return self._cycles[key].launch(self._pool)


Read = Callable[[], tuple[int, int, int, list[int], list[float]]]


class Cycle:
    """A cycle of fixed shape: draft and verify passes, choice, walk, commit."""

    def __init__(
        self, model: Qwen3, cache: KVCache, state: Tensor, ends: Tensor, choice: Choice, rows: int, room: int,
        block: int, tree: bool = False,
    ) -> None:  # fmt: skip
        """rows: of the pass to verify, root included. block: rows of the draft, 0 without one. tree: of the
        likeliest rows - 1 nodes, in place of a chain of the block's length."""
        self.model, self.cache, self.state, self.ends, self.choice = model, cache, state, ends, choice
        device, config = model.device, model.config
        self.draft: MovingPass | None = None
        if block:
            masks = Rows.block(0, block, 0, config.mask_token_id)
            self.draft = MovingPass(model, masks, room, logits_of=block - 1)
        self.check: MovingPass | GrownPass
        if tree:
            self.check = GrownPass(model, rows - 1, block - 1, room)
            self.parents = self.check.parents
        else:
            chain = Rows.chain([0] * rows, 0)
            self.check = MovingPass(model, chain, room)
            self.parents = torch.tensor(chain.parents, dtype=torch.int32, device=device)
        self.accepted, self.start = torch.zeros_like(self.parents), state.new_zeros(1)
        self.choices = torch.zeros(rows, dtype=torch.int64, device=device)
        self.record = state.new_zeros(RECORD + 2 * rows)
        pinned = device.type == "cuda"
        # two: one is read while the next cycle fills the other
        self.read = [torch.zeros(self.record.shape, dtype=torch.int32, pin_memory=pinned) for _ in "01"]
        self.launches = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def launch(self, pool: Any) -> Read:
        """Run the cycle once more, captured when it comes for the second time."""
        if pool is None or self.launches == 0:
            self.run()
        else:
            if self.graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.run()
                self.graph = graph  # whole: an interrupted capture leaves none
            self.graph.replay()
        target = self.read[self.launches % 2]
        self.launches += 1
        target.copy_(self.record, non_blocking=True)
        done = None
        if pool is not None:
            done = torch.cuda.Event()
            done.record()

        def read() -> tuple[int, int, int, list[int], list[float]]:
            if done is not None:
                done.synchronize()
            n = len(self.choices)
            kept, finished, damaged, _, *tokens = target[: RECORD + n].tolist()
            logprobs = target[RECORD + n :].view(torch.float32).tolist()
            return kept, finished, damaged, tokens[:kept], logprobs[:kept]

        return read

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        model, check = self.model, self.check
        if isinstance(check, MovingPass):
            check.move(self.state)
        if self.draft is not None:
            self.draft.move(self.state)
            states, _, _ = model.states(self.draft.inputs, self.cache)
            if isinstance(check, GrownPass):
                behind = self.draft.ids[1, 1:]
                grow_triton(check.tables, self.state, *self.choice.candidates(model, states, behind))
            else:  # the proposal of block row i takes the place of verify row i + 1
                self.choice(model, states, check.ids[1, 1:], check.ids[0, 1:])
        states, keys, values = model.states(check.inputs, self.cache)
        logits, sums = self.choice(model, states, check.ids[1] + 1, self.choices)()
        advance_triton(
            self.state, check.ids[0], self.parents, self.choices, logits, sums, self.ends,
            self.accepted, self.start, self.record,
        )  # fmt: skip
        model.ops.commit(self.cache.keys, self.cache.values, keys, values, self.accepted, self.start)
