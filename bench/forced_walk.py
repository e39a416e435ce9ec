"""The end of a cycle with its walks forced: what it keeps comes from tables, not from choices.

State and record are those of `walk_triton` (orthrus_kernels/walk.py), which this takes the place of: every
other kernel runs, on whatever tokens random weights choose. End tokens end nothing.

Walk of a cycle whose root is token i of a text: the nodes in row i of the text's table, int32 [L, WIDTH], -1
behind the last; a text longer than its table begins at its first row again. In a cycle without a draft the
root alone is kept. Trees are best first, so a smaller tree is a prefix of a larger one, and a cycle keeps
those nodes of a row that its tree has: one row says what trees of every size keep, also of texts that share
the rows of a pass, and a controller that counts nodes learns the same
(qwen3_model/decode/controller.py). Walks of one-pass trees end at the root: where the weights are random it
is the likeliest end, at which a block stands.

Scores of random weights say nothing of a text, so they do not share rows out among texts either: of a pass
of trees of n nodes every text has n.

Where the rows come from: of a recorded trace (trace_file.py) `recorded` makes them, for the sizes of trees
that were recorded and whole blocks; of a simulated drafter `strong.Draws.walks`, for trees of any size and
blocks of any length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from orthrus_kernels._triton import tl, triton
from orthrus_kernels.clock import mark
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import (
    RECORD,
    RECORD_DAMAGED,
    RECORD_DONE_AT,
    RECORD_DRAFTED,
    RECORD_FINISHED,
    RECORD_HEAD,
    RECORD_KEPT,
    RECORD_NODES,
    STATE_COLUMNS,
    STATE_FINISHED,
    STATE_LEFT,
    STATE_ROOM,
    STATE_ROOT,
    STATE_START,
    State,
)
from orthrus_kernels.plan import PassPlan
from qwen3_model.decode import controller
from qwen3_model.decode.cycle import Allot, Walk
from qwen3_model.decode.foreseen import Followed
from qwen3_model.decode.groups import Kind
from qwen3_model.decode.one_pass import Shape
from qwen3_model.decode.sequence import Sequence as RunningText

from .trace_file import CHAIN, LOOKUP, ONE_PASS, TREES, Text

WIDTH = 64  # nodes of a walk at most: rows of a block
CHAINS = {controller.CHAIN: CHAIN, controller.LOOKUP: LOOKUP}  # kinds of cycles, and a trace's
Made = Callable[
    [Kind, int], Sequence[Sequence[Sequence[int]]]
]  # kind, rows of a block: [texts][tokens] walks


@triton.jit(do_not_specialize=["N", "L"])
def _forced_walk_kernel(
    state, slots, first, choices, logits, log_sum_exp, accepted, start, record, paths, texts,
    N, L,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One seat; the steps of its walk lie side by side."""
    i_b = tl.program_id(0)
    accepted, record = accepted + i_b * N, record + i_b * (RECORD_HEAD + 3 * N)
    o_n = tl.arange(0, BLOCK)
    slot, row = tl.load(slots + i_b), tl.load(first + i_b)  # row: of its root
    b_place, count = tl.full((BLOCK,), -1, tl.int32), 0
    if slot >= 0:
        state += slot * STATE_COLUMNS
        nodes = tl.load(first + i_b + 1) - row
        begin, root = tl.load(state + STATE_START), tl.load(state + STATE_ROOT)
        left, finished = tl.load(state + STATE_LEFT), tl.load(state + STATE_FINISHED)
        most = tl.minimum(left, tl.load(state + STATE_ROOM) - begin)
        text, base = tl.load(texts + 2 * slot), tl.load(texts + 2 * slot + 1)
        at = tl.cast(text, tl.int64) * L + tl.maximum(begin - base, 0) % L
        b_node = tl.load(paths + at * WIDTH + o_n, mask=o_n < WIDTH, other=-1)
        b_node = tl.where(
            tl.load(record + RECORD_DRAFTED) != 0, b_node, tl.where(o_n == 0, 0, -1)
        )  # without a draft
        m_kept = (b_node >= 0) & (b_node < nodes)
        o_to = tl.cumsum(m_kept.to(tl.int32)) - 1  # nodes that the tree lacks leave no gap
        m_kept = m_kept & (o_to < N) & (o_to < most) & (finished == 0)
        count = tl.sum(m_kept.to(tl.int32), axis=0)
        b_token = tl.load(choices + row + b_node, mask=m_kept, other=0).to(tl.int32)
        b_log = tl.load(logits + row + b_node, mask=m_kept, other=0.0)
        b_log -= tl.load(log_sum_exp + row + b_node, mask=m_kept, other=0.0)
        last = tl.sum(tl.where(m_kept & (o_to == count - 1), b_token, 0), axis=0)
        tl.store(record + RECORD_HEAD + o_to, b_token, mask=m_kept)
        tl.store(record + RECORD_HEAD + N + o_to, b_log.to(tl.int32, bitcast=True), mask=m_kept)
        tl.store(record + RECORD_HEAD + 2 * N + o_to, b_node, mask=m_kept)
        finished = tl.where((finished == 1) | (count >= left), 1, 0)
        tl.debug_barrier()  # what was read above is written below
        tl.store(start + i_b, begin)
        tl.store(state + STATE_START, begin + count)
        tl.store(state + STATE_ROOT, tl.where(count > 0, last, root))
        tl.store(state + STATE_LEFT, left - count)
        tl.store(state + STATE_FINISHED, finished)
        tl.store(record + RECORD_FINISHED, finished)
        tl.store(record + RECORD_DAMAGED, 0)
        tl.store(record + RECORD_NODES, nodes)
        b_place = tl.where(m_kept, row + b_node, -1)
        tl.store(accepted + o_n, tl.full((BLOCK,), -1, tl.int32), mask=(o_n < N) & (o_n >= count))
        tl.store(accepted + o_to, b_place, mask=m_kept)
    else:
        tl.store(accepted + o_n, b_place, mask=o_n < N)
    tl.store(record + RECORD_KEPT, count)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(record, RECORD_DONE_AT)


def forced_walk(
    state: Tensor, slots: Tensor, first: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor,
    logits: Tensor, log_sum_exp: Tensor, ends: Tensor, history: Tensor, accepted: Tensor, start: Tensor,
    record: Tensor, timed: bool = False, *,
    paths: Tensor, texts: Tensor,
) -> None:  # fmt: skip
    """Keep the nodes of each text's row of `paths` that its tree has, as many as are left and its pages hold.
    One launch, a program a seat.

    Arguments up to `timed` as for `walk_triton`; tokens, parents and ends are not read, nor is history
    written. paths
    [texts, L, WIDTH] int32. texts [S, 2] int32: of each slot, which text runs there and the position of that
    text's first token."""
    seats, n = accepted.shape
    assert 0 < n <= 4096 and record.shape == (seats, RECORD + 3 * n), record.shape
    assert (len(slots), len(first), len(start)) == (seats, seats + 1, seats), (slots, first, start)
    assert state.shape[1] == len(State) and texts.shape == (len(state), 2), (state.shape, texts.shape)
    assert paths.shape[2:] == (WIDTH,), paths.shape
    whole = state, slots, first, accepted, start, record, paths, texts
    assert {t.dtype for t in whole} == {torch.int32}, [t.dtype for t in whole]
    assert all(t.is_contiguous() for t in whole), [t.stride() for t in whole]
    assert (choices.dtype, logits.dtype, log_sum_exp.dtype) == (torch.int64, torch.float32, torch.float32)
    _forced_walk_kernel[(seats,)](
        state=state, slots=slots, first=first, choices=choices, logits=logits, log_sum_exp=log_sum_exp,
        accepted=accepted, start=start, record=record, paths=paths, texts=texts, N=n, L=paths.shape[1],
        WIDTH=WIDTH, BLOCK=max(WIDTH, triton.next_power_of_2(n)), CLOCK=timed, num_warps=1,
    )  # fmt: skip


def evenly(by_scores: Allot) -> Allot:
    """`allot` (orthrus_kernels/allot.py) with as many rows for each text as for any other."""

    def allot(plan: PassPlan, first: Tensor, trees: Trees, state: Tensor, slots: Tensor) -> None:
        own = trees.scores.clone()
        trees.scores.copy_(-torch.arange(own.shape[1], device=own.device))
        by_scores(plan, first, trees, state, slots)
        trees.scores.copy_(own)

    return allot


def walk(kept: Sequence[int]) -> list[int]:
    """Nodes of a walk of kept[-1] tokens, of which trees of TREES[i] nodes keep kept[i], each tree
    below the one it is a prefix of."""
    nodes, firsts = [0], (1, *(size + 1 for size in TREES))
    for first, last in zip(firsts, kept, strict=False):
        nodes += range(first, first + max(last - len(nodes), 0))
    return nodes


def walks(kind: Kind, kept: Mapping[str, Sequence[int]], count: int) -> list[list[int]]:
    """Of cycles of a kind (cycles.py) at the first `count` tokens of a text. Raises KeyError for a tree, or
    for lookup, that the trace lacks."""
    if isinstance(kind, Shape):
        return [[*range(1, n), 0] for n in kept[ONE_PASS][:count]]
    if kind == controller.PLAIN:
        return [[0]] * count
    if kind in CHAINS:
        return [list(range(n)) for n in kept[CHAINS[kind]][:count]]
    sizes = [str(size) for size in TREES if size < kind] + [str(kind)]
    return [walk([kept[size][i] for size in sizes]) for i in range(count)]


def found_by_lookup(texts: Sequence[Text], tokens: int) -> list[list[int]] | None:
    """`Forced`'s `found` of the first `tokens` tokens of recorded texts."""
    if not all(LOOKUP in text.kept for text in texts):
        return None
    return [text.kept[LOOKUP][:tokens] for text in texts]


def recorded(texts: Sequence[Text], tokens: int) -> Made:
    """Of the first `tokens` tokens of recorded texts, whose draft blocks were whole: `block` is not asked."""

    def made(kind: Kind, block: int) -> list[list[list[int]]]:
        return [walks(kind, text.kept, min(tokens, text.tokens)) for text in texts]

    return made


class Found:
    """What cycles of lookup keep of a text that runs, as a trace says it: `Foresees` of foreseen.py."""

    def __init__(self, text: RunningText, kept: Sequence[int]) -> None:
        """kept: of the cycle at each of the text's tokens behind the prompt; the first again behind them."""
        self._text, self._kept, self._root = text, kept, 0

    @property
    def unread(self) -> int:
        """0, as nothing is searched."""
        return 0

    def follow(self, rows: int, most: int) -> Followed:
        """Of what is known of the text; `most` bounds nothing."""
        found, last = list[int](), len(self._text.tokens) - self._text.prompt - 1
        while (end := self._root + min(self._kept[self._root % len(self._kept)], rows)) <= last:
            found.append(end - self._root)
            self._root = end
        return Followed(found, last - self._root + 1, sum(found))


class Forced:
    """The tables of the walks of texts, at fixed places, for cycles that are captured: `Walks` of cycles.py.

    Texts have the tables of `made` in turn, from number `next` on, in the order in which they begin; a text
    that begins again keeps its own."""

    def __init__(
        self, device: torch.device, slots: int, made: Made, found: Sequence[Sequence[int]] | None = None
    ) -> None:
        """slots: of the engine. made: of a kind and rows of a block, the walks of each text, by token. found:
        tokens that a cycle of lookup keeps, likewise; None: nobody knows, and "auto" chooses none."""
        self._device, self._made, self._found = device, made, found
        self.looks = found is not None
        self._texts = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self._numbers: dict[RunningText, int] = {}
        self._tables: dict[tuple[Kind, int], Tensor] = {}
        self.next = 0
        self._count = len(made(controller.PLAIN, 0))

    def begin(self, text: RunningText, slot: int) -> None:
        """The cycles in a slot are this text's from now on, in turn on the stream."""
        if text not in self._numbers:
            self._numbers[text], self.next = self.next, (self.next + 1) % self._count
        assert text.request.max_new_tokens is not None
        gpu, base = self._texts.is_cuda, text.limit - text.request.max_new_tokens
        numbers = torch.tensor([self._numbers[text], base], dtype=torch.int32, pin_memory=gpu)
        self._texts[slot].copy_(numbers, non_blocking=gpu)

    def walk(self, kind: Kind, block: int) -> Walk:
        """`forced_walk` for cycles of a kind with draft blocks of so many rows."""
        if (kind, block) not in self._tables:
            self._tables[kind, block] = self._table(self._made(kind, block))
        return partial(forced_walk, paths=self._tables[kind, block], texts=self._texts)

    def allot(self, by_scores: Allot) -> Allot:
        """Called in place of `by_scores`."""
        return evenly(by_scores)

    def foresees(self, text: RunningText) -> Found:
        """Of a text that has begun."""
        assert self._found is not None
        return Found(text, self._found[self._numbers[text]])

    def _table(self, of_texts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """[texts, L, WIDTH]; behind the last token of a text that is shorter than L, nothing."""
        found = np.full((len(of_texts), max(map(len, of_texts)), WIDTH), -1, np.int32)
        for table, rows in zip(found, of_texts, strict=True):
            for row, nodes in zip(table, rows, strict=False):
                row[: len(nodes)] = nodes[:WIDTH]
        return torch.from_numpy(found).to(self._device)
