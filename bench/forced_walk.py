"""The end of a cycle with its walk forced: what it keeps comes from a trace (trace_file.py), not a choice.

State and record are those of `walk_triton` (orthrus_kernels/walk.py), which this takes the place of, for one
text: every other kernel runs, on whatever tokens random weights choose. End tokens end nothing.

Walk of a cycle whose root is token i of the text: the nodes in row i of a table, int32 [L, W], -1 behind the
last; the root alone in a cycle without a draft. Nodes of a two-pass tree are in the order of its growth, and
a smaller tree is a prefix of a larger one; so the table puts what a smaller tree would have kept too at nodes
of that tree, and a controller that counts them learns what the trace says of every size
(qwen3_model/decode/controller.py). Walks of one-pass trees end at the root: where the weights are random it
is the likeliest end, at which a block stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from orthrus_kernels._triton import tl, triton
from orthrus_kernels.clock import mark
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
)
from qwen3_model.decode import controller
from qwen3_model.decode.cycle import Walk
from qwen3_model.decode.cycles import Kind
from qwen3_model.decode.one_pass import Shape

from .trace_file import CHAIN, ONE_PASS, TREES, Text

WIDTH = 64  # nodes of a walk at most: rows of a block


@triton.jit(do_not_specialize=["N", "L"])
def _forced_walk_kernel(
    state, slots, first, choices, logits, log_sum_exp, accepted, start, record, paths, base,
    N, L,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One program; the steps of the walk lie side by side."""
    o_n = tl.arange(0, BLOCK)
    state += tl.load(slots) * STATE_COLUMNS
    row = tl.load(first)  # of the root
    nodes = tl.load(first + 1) - row
    begin, root = tl.load(state + STATE_START), tl.load(state + STATE_ROOT)
    left, finished = tl.load(state + STATE_LEFT), tl.load(state + STATE_FINISHED)
    most = tl.minimum(left, tl.load(state + STATE_ROOM) - begin)
    at = tl.minimum(tl.maximum(begin - tl.load(base), 0), L - 1)
    b_node = tl.load(paths + at * WIDTH + o_n, mask=o_n < WIDTH, other=-1)
    b_node = tl.where(
        tl.load(record + RECORD_DRAFTED) != 0, b_node, tl.where(o_n == 0, 0, -1)
    )  # without a draft
    m_kept = (b_node >= 0) & (b_node < nodes) & (o_n < N) & (o_n < most) & (finished == 0)
    count = tl.sum(m_kept.to(tl.int32), axis=0)
    b_token = tl.load(choices + row + b_node, mask=m_kept, other=0).to(tl.int32)
    b_log = tl.load(logits + row + b_node, mask=m_kept, other=0.0)
    b_log -= tl.load(log_sum_exp + row + b_node, mask=m_kept, other=0.0)
    last = tl.sum(tl.where(o_n == count - 1, b_token, 0), axis=0)
    tl.debug_barrier()  # what was read above is written below
    tl.store(accepted + o_n, tl.where(m_kept, row + b_node, -1), mask=o_n < N)
    tl.store(record + RECORD_HEAD + o_n, b_token, mask=m_kept)
    tl.store(record + RECORD_HEAD + N + o_n, b_log.to(tl.int32, bitcast=True), mask=m_kept)
    tl.store(record + RECORD_HEAD + 2 * N + o_n, b_node, mask=m_kept)
    finished = tl.where((finished == 1) | (count >= left), 1, 0)
    tl.store(start, begin)
    tl.store(state + STATE_START, begin + count)
    tl.store(state + STATE_ROOT, tl.where(count > 0, last, root))
    tl.store(state + STATE_LEFT, left - count)
    tl.store(state + STATE_FINISHED, finished)
    tl.store(record + RECORD_KEPT, count)
    tl.store(record + RECORD_FINISHED, finished)
    tl.store(record + RECORD_DAMAGED, 0)
    tl.store(record + RECORD_NODES, nodes)
    if CLOCK:
        mark(record, RECORD_DONE_AT)


def forced_walk(
    state: Tensor, slots: Tensor, first: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor,
    logits: Tensor, log_sum_exp: Tensor, ends: Tensor, accepted: Tensor, start: Tensor, record: Tensor,
    timed: bool = False, *,
    paths: Tensor, base: Tensor,
) -> None:  # fmt: skip
    """Keep the first nodes of the text's row of `paths`, as many as are left and its pages hold. One launch.

    Arguments up to `timed` as for `walk_triton`, of one seat, which is not empty; tokens, parents and ends
    are not read. paths [L, WIDTH] int32: by state's start less base [1] int32, the position of the text's
    first token."""
    n = accepted.shape[1]
    assert 0 < n <= 4096 and accepted.shape == (1, n) and record.shape == (1, RECORD + 3 * n), record.shape
    assert len(slots) == 1 and len(first) == 2, (slots.shape, first.shape)
    assert paths.shape[1:] == (WIDTH,) and paths.is_contiguous(), (paths.shape, paths.stride())
    whole = state, slots, first, accepted, start, record, paths, base
    assert {t.dtype for t in whole} == {torch.int32}, [t.dtype for t in whole]
    assert (choices.dtype, logits.dtype, log_sum_exp.dtype) == (torch.int64, torch.float32, torch.float32)
    _forced_walk_kernel[(1,)](
        state=state, slots=slots, first=first, choices=choices, logits=logits, log_sum_exp=log_sum_exp,
        accepted=accepted, start=start, record=record, paths=paths, base=base, N=n, L=len(paths),
        WIDTH=WIDTH, BLOCK=max(WIDTH, triton.next_power_of_2(n)), CLOCK=timed, num_warps=1,
    )  # fmt: skip


def walk(kept: Sequence[int]) -> list[int]:
    """Nodes of a walk of kept[-1] tokens, of which trees of TREES[i] nodes keep kept[i], each tree
    below the one it is a prefix of."""
    nodes, firsts = [0], (1, *(size + 1 for size in TREES))
    for first, last in zip(firsts, kept, strict=False):
        nodes += range(first, first + max(last - len(nodes), 0))
    return nodes


def walks(kind: Kind, kept: Mapping[str, Sequence[int]], count: int) -> list[list[int]]:
    """Of cycles of a kind (cycles.py) at the first `count` tokens of a text. Raises KeyError for a tree
    that the trace lacks."""
    if isinstance(kind, Shape):
        return [[*range(1, n), 0] for n in kept[ONE_PASS][:count]]
    if kind == controller.PLAIN:
        return [[0]] * count
    if kind == controller.CHAIN:
        return [list(range(n)) for n in kept[CHAIN][:count]]
    sizes = [str(size) for size in TREES if size < kind] + [str(kind)]
    return [walk([kept[size][i] for size in sizes]) for i in range(count)]


class Forced:
    """The tables of the walks of one text after another, at fixed places, for cycles that are captured."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        """tokens: of a text at most."""
        self._device, self._tokens = device, tokens
        self._base = torch.zeros(1, dtype=torch.int32, device=device)
        self._tables: dict[Kind, Tensor] = {}
        self._text: Text | None = None

    @torch.inference_mode()
    def begin(self, text: Text, base: int) -> None:
        """From now on the cycles are this text's, whose first token stands at position `base`."""
        self._text = text
        self._base.fill_(base)
        for kind in self._tables:
            self._fill(kind)

    def walk_of(self, kind: Kind) -> Walk:
        """`forced_walk` for cycles of a kind."""
        if kind not in self._tables:
            self._tables[kind] = torch.full((self._tokens, WIDTH), -1, dtype=torch.int32, device=self._device)
            self._fill(kind)
        return partial(forced_walk, paths=self._tables[kind], base=self._base)

    def _fill(self, kind: Kind) -> None:
        assert self._text is not None, "begin comes first"
        count = min(self._tokens, self._text.tokens)
        rows = [nodes[:WIDTH] + [-1] * (WIDTH - len(nodes)) for nodes in walks(kind, self._text.kept, count)]
        self._tables[kind][:count].copy_(torch.tensor(rows, dtype=torch.int32))
