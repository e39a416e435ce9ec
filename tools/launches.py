"""One small launch of every kernel in every form, for compute-sanitizer: `python -m tools.launches NAME...`.

Odd sizes, so that masks matter; the caches hold no more than they must, so that reading past them shows.

racecheck looks at shared memory only. The arrival counters of split linears and of fused attention lie in
global memory, where no tool sees a race: equal bits over many launches stand for them (tests/gpu, and the
tests of both kernels)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import PassPlan, PassShape, PassTables, Rows, Sampling, Weight, alike, backend_ops
from orthrus_kernels._gluon import HAS_GLUON
from orthrus_kernels.attention_compared import Inputs, both
from orthrus_kernels.attention_triton import attention_triton, tile_rows
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import RECORD, State
from orthrus_kernels.linear_gluon_wide import WidePlan, linear_gluon_wide
from orthrus_kernels.pages import PAGE, pages_for
from orthrus_kernels.quantised import Format, QuantisedWeight
from orthrus_kernels.sampling_table import SamplingTable
from orthrus_kernels.swiglu import swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile, device_key
from orthrus_kernels.tables.gluon import GluonTile

TRITON = backend_ops("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16().to(DEVICE)


def weight(n: int, k: int) -> Weight:
    return Weight(numbers(n, k))


def table(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def linear(split: bool) -> None:
    """Three segments, a ragged last block of K and of N, both views."""
    entry = LinearEntry(64, 3, (LinearTile(None, 16, 64, split, 4, 3),))
    x, w, w_diff = numbers(21, 328), weight(70, 328), weight(70, 328)
    TRITON.linear(x, w, w_diff, 9, entry=entry)


def linear_by_tma(split: bool) -> None:
    """The same, copied by descriptors; a tile of 48 rows is two dots. Then a launch a view."""
    tile = LinearTile(None, 48, 64, split, 4, 3, tma=True)
    x, w, w_diff = numbers(70, 328), weight(70, 328), weight(70, 328)
    for apart in (None, 8):
        TRITON.linear(x, w, w_diff, 9, entry=LinearEntry(64, 3, (tile,), apart=apart))


def linears_of_a_model() -> None:
    """By the tables: on Hopper in Gluon, in one segment and in three, of both views and with SwiGLU, each
    beside Triton's launch that it is compared with. Elsewhere Triton's alone, of parts of the weights."""
    part = 1 if DEVICE == "cuda" else 32
    TRITON.linear(numbers(20, 2048), weight(2048 // part, 2048))
    TRITON.linear(numbers(60, 2048), weight(4096 // part, 2048), weight(4096 // part, 2048), 33)
    TRITON.linear_swiglu(numbers(20, 2048), weight(12288 // part, 2048))


def linears_of_many_rows() -> None:
    """On Hopper in Gluon, two programs that take tiles in turn: one segment, three, gate and up; elsewhere
    Triton's."""
    if not HAS_GLUON or device_key(torch.device(DEVICE)) != "sm_90":
        TRITON.linear(numbers(150, 328), weight(200, 328))
        return
    for plan in (
        WidePlan(200, 328, 1, GluonTile(48, 1)), WidePlan(200, 328, 3, GluonTile(96, 2)),
        WidePlan(160, 328, 1, GluonTile(32, 3), None, True),
    ):  # fmt: skip
        width = plan.n // 2 if plan.swiglu else plan.n
        out = torch.empty(150, width, dtype=torch.bfloat16, device=DEVICE)
        linear_gluon_wide(plan, numbers(150, 328), weight(plan.n, 328), out=out, programs=2)


def linear_by_the_table() -> None:
    for rows in (1, 40, 100, 200):
        TRITON.linear(numbers(rows, 2048), weight(200, 2048))


def linear_swiglu(tma: bool) -> None:
    """Three segments, ragged in every direction, a tile of 32 rows or of 64."""
    height, width = (64, 128) if tma else (32, 64)
    tile = LinearTile(None, height, width, False, 4, 3, tma)
    TRITON.linear_swiglu(numbers(70, 328), weight(2 * 75, 328), entry=LinearEntry(64, 3, (tile,)))


def quantised(format: Format, split: bool) -> None:
    """Three segments of groups of 64, both views, a ragged last tile of N and block of factors; then gate and
    up."""
    shared = 128 if format is Format.E4M3 else 1
    w, w_diff = (
        QuantisedWeight.new(
            150, 448, format, 64, zeros=format is Format.INT4, scale=torch.bfloat16, dtype=torch.bfloat16,
            device=DEVICE, factor_rows=shared,
        )
        for _ in range(2)
    )  # fmt: skip
    for of in (w, w_diff):
        codes = torch.randint(16, (150, 448), dtype=torch.uint8)
        scale = torch.rand(150, 7)[::shared].repeat_interleave(shared, 0)[:150]
        of.put(0, codes, scale, codes[:, :7] if format is Format.INT4 else None)
    tile = LinearTile(None, 16, 64, split, 4, 3)
    TRITON.linear(numbers(21, 448), w, w_diff, 9, entry=LinearEntry(64, 3, (tile,)))
    TRITON.linear_swiglu(numbers(21, 448), w, entry=LinearEntry(64, 3, (replace(tile, split=False),)))


def rounded() -> None:
    """W8A8: three segments, both views; then gate and up."""
    w, w_diff = (
        QuantisedWeight.new(
            150, 640, Format.E4M3, 128, zeros=False, scale=torch.bfloat16, dtype=torch.bfloat16,
            device=DEVICE, rounds=True,
        )
        for _ in range(2)
    )  # fmt: skip
    for of in (w, w_diff):
        of.put(0, torch.randint(64, (150, 640), dtype=torch.uint8), torch.rand(150, 5))
    tile = LinearTile(None, 16, 64, True, 4, 3)
    TRITON.linear(numbers(21, 640), w, w_diff, 9, entry=LinearEntry(128, 3, (tile,)))
    TRITON.linear_swiglu(numbers(21, 640), w, entry=LinearEntry(128, 3, (replace(tile, split=False),)))


def norms() -> None:
    x, w = numbers(5, 1000), numbers(1000)
    TRITON.rms_norm(x, w, EPS, w, 2)
    TRITON.add_rms_norm(x, x.flip(0), w, EPS)


def qk_norm_rope() -> None:
    w, angle = numbers(64), torch.randn(5, 32, device=DEVICE)
    keep = numbers(5, 2, 64), numbers(5, 2, 64)
    TRITON.qk_norm_rope(numbers(5, 9, 64), 5, w, w, angle.cos(), angle.sin(), EPS, w, w, 2, keep)


def laid(rows: Rows, q: Tensor, k: Tensor, form: str = "shared") -> PassTables:
    """The tables of a pass of q [T, H, D] and k [T, G, D], in the form that trees take or in another one."""
    plan, heads, groups, d = PassPlan.of(rows, DEVICE), q.shape[1], k.shape[1], q.shape[2]
    height = tile_rows(heads, groups, d, q.dtype, form == "whole")
    tables = PassTables.new(plan.shape, 700, height, form == "whole", DEVICE, shared=form == "shared")
    TRITON.lay(plan, tables)
    return tables


def cache(length: int, g: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of so many positions, and a table of their pages, the last one in front."""
    n = pages_for(length)
    return numbers(n, g, PAGE, d), numbers(n, g, PAGE, d), table([list(range(n))[::-1]])


def attention(form: str) -> None:
    """A tree with two blocks behind 330 cached keys: a whole segment, and a ragged one with a whole page."""
    rows = Rows.tree_with_blocks([1] * 7, [-1, 0, 0, 1, 1, 3, 2], 330, [2, 5], 4, 2)
    q, k, v = (numbers(len(rows), heads, 64) for heads in (4, 2, 2))
    TRITON.attention(q, k, v, *cache(330, 2, 64), laid(rows, q, k, form), 0.125)


def gluon_attention(form: str) -> None:
    """On Hopper in both kernels, elsewhere in Triton's: a tree with blocks beside a chain, or a prompt."""
    tree = Rows.tree_with_blocks([1] * 33, [-1, *range(32)], 300, [2, 5, 9], 6, 2)
    rows = Rows.chain([1] * 150, 300) if form == "whole" else Rows.batch([tree, Rows.chain([1] * 20, 100, 1)])
    inputs = Inputs.random(rows, 8, 2, torch.device(DEVICE))
    if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        both(inputs, rows, form)
    else:
        inputs.through(attention_triton, inputs.tables(rows, False, form), False)


def fused_attention() -> None:
    """One row: the program that arrives last folds."""
    q, k, v = (numbers(1, heads, 64) for heads in (4, 2, 2))
    tables = laid(Rows.chain([1], 300), q, k, "partial")
    TRITON.attention(q, k, v, *cache(300, 2, 64), tables, 0.125, form="fused")


def mixed_pass() -> None:
    """The attention half of a layer on 7 nodes and two blocks, rows of both views in every kernel."""
    rows = Rows.tree_with_blocks([1] * 7, [-1, 0, 0, 1, 1, 3, 2], 37, [2, 5], 4, 2)
    n, n_ar, h, g, d, e = len(rows), rows.n_ar, 4, 2, 64, 200
    x, w, angle = numbers(n, e), numbers(e), torch.randn(n, d // 2, device=DEVICE)
    normed = TRITON.rms_norm(x, w, EPS, w, n_ar)
    qkv = TRITON.linear(normed, weight((h + 2 * g) * d, e), weight((h + 2 * g) * d, e), n_ar)
    qkv, head_norm = qkv.view(n, h + 2 * g, d), numbers(d)
    keep = numbers(n, g, d), numbers(n, g, d)
    q, k, v = TRITON.qk_norm_rope(
        qkv, h, head_norm, head_norm, angle.cos(), angle.sin(), EPS, head_norm, head_norm, n_ar, keep
    )
    o = TRITON.attention(q, k, v, *cache(37, g, d), laid(rows, q, k), d**-0.5).view(n, h * d)
    TRITON.add_rms_norm(TRITON.linear(o, weight(e, h * d), weight(e, h * d), n_ar), x, w, EPS)


def grown(seats: int, nodes: int, depth: int) -> tuple[Trees, Tensor, Tensor]:
    """Trees of texts in the first slots but for an empty seat, the states of the slots, and the seats."""
    state, slots = table([[250, 1, 9, 0, 999, 99]] * seats), table([*range(seats - 1, 0, -1), 0][:seats])
    slots[1:2] = -1
    scores = torch.randn(seats, depth, 5, device=DEVICE).sort(-1, descending=True).values.log_softmax(-1)
    trees = Trees.new(seats, nodes + 1, DEVICE)
    ids = torch.ones(seats, depth, 5, dtype=torch.int64, device=DEVICE)
    TRITON.grow(trees, state, slots, scores, ids)
    return trees, state, slots


def allotted(
    seats: int, nodes: int, rows: int, blocks: int = 0
) -> tuple[PassPlan, Tensor, Trees, Tensor, Tensor]:
    """A plan of so many AR rows for grown trees and of so many blocks a seat, the first row of each tree, the
    trees, the states of the slots, and the seats."""
    trees, state, slots = grown(seats, nodes, 6)
    tree = Rows.tree_with_blocks([1] * rows, [-1] + [0] * (rows - 1), 0, [0] * (seats * blocks), 8, 2)
    shape = PassShape(len(tree), rows, rows + seats * blocks, 7 + 8, seats)
    plan = replace(PassPlan.of(tree, DEVICE), shape=shape, start=state[:, State.START])
    first = table([0] * (seats + 1))
    TRITON.allot(plan, first, trees, state, slots)
    return plan, first, trees, state, slots


def lay() -> None:
    """Grown trees with blocks, from one key segment to the next, trees that share rows, and a chain at the
    root."""
    plan, first, trees, _, slots = allotted(3, 12, 39, 7)
    TRITON.place_blocks(plan, first, trees, slots, table([[0] * 7] * 3))
    TRITON.lay(plan, PassTables.new(plan.shape, 700, 4, False, DEVICE))
    shared, *_ = allotted(5, 12, 29)
    TRITON.lay(shared, PassTables.new(shared.shape, 700, 4, False, DEVICE))
    chain, root = PassPlan.of(Rows.chain([1] * 200, 0), DEVICE), table([5])
    TRITON.lay(chain, PassTables.new(chain.shape, 700, 32, True, DEVICE), root)


def blocks() -> None:
    """Trees of 12 nodes with blocks at 7 of them, and the blocks where walks have ended; an empty seat."""
    plan, first, trees, state, slots = allotted(3, 12, 39, 7)
    anchors, record = table([[0] * 7] * 3), table([[0] * (RECORD + 3 * 13)] * 3)
    TRITON.place_blocks(plan, first, trees, slots, anchors)
    record[:, 0] = 1
    rows, positions = torch.zeros(2, 3, 6, dtype=torch.int64, device=DEVICE)
    TRITON.follow(record, state, slots, anchors, 8, rows, positions, table([0] * 4))


def rerank() -> None:
    """Blocks of two texts, and one of padding."""
    scores = torch.randn(3, 7, 5, device=DEVICE).sort(-1, descending=True).values.log_softmax(-1)
    ids, two = torch.randint(0, 90, (3, 7, 5)).to(DEVICE), torch.ones(2, device=DEVICE)
    roots, slots = table([3, 4, -9]), table([1, 0, -1])
    tables = numbers(90, 12), numbers(90, 12), torch.ones(2, 8, 2, device=DEVICE)
    TRITON.rerank(scores, ids, roots, *tables, two, two, slots, known=False)
    gate, places = (torch.ones(*n, device=DEVICE) for n in ((3, 7, 4), (8, 4)))
    TRITON.rerank(scores, ids, roots, *tables, two, two, slots, False, gate, places)


def head() -> None:
    for k in (1, 16):
        TRITON.head(numbers(21, 328), weight(1100, 328), k)


def logit_summary() -> None:
    """Two tiles of the vocabulary, the last one ragged."""
    logits = torch.randn(3, 5003, device=DEVICE)
    TRITON.log_sum_exp(logits)
    TRITON.likeliest(logits, 20)


def choose(**settings: Any) -> None:
    """Two blocks of the vocabulary, the last one ragged; rounded logits: ties at every edge."""
    logits, positions = 2 * torch.randn(3, 9001, device=DEVICE), torch.tensor([5, 0, 40959], device=DEVICE)
    logits[0] = logits[0].round()
    settings_of = alike(Sampling(seed=2**40 + 3, **settings), logits)
    seen = logits.clamp(min=0).int()
    TRITON.choose(logits, positions, *settings_of, seen)
    TRITON.candidates(logits, positions, *settings_of, 16, seen)


FILTERS = {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
           "frequency_penalty": 0.3, "presence_penalty": 0.2,
           "logit_bias": {7: 1.0, 9: float("-inf")}}  # fmt: skip


def walk() -> None:
    """Two texts in three seats, trees of 4 nodes and of 3, in a pass of 9 rows; one's pages end."""
    n, states = 4, table([[9, 5, 3, 0, 10, 4], [0] * len(State), [2, 5, 9, 0, 99, 4]])
    logits = torch.zeros(9, device=DEVICE)
    TRITON.walk(
        states, table([2, -1, 0]), table([0, 4, 5, 8]), table([5, 6, 7, 7, 0, 5, 6, 7, 7]).long(),
        table([-1, 0, 0, 2, -1, -1, 5, 6, 0]), table([7, 1, 7, 3, 0, 6, 7, 3, 3]).long(), logits, logits,
        table([[3, -1], [7, 3], [3, -1]]), table([[0] * 12] * 3), table([[0] * n] * 3), table([0] * 3),
        table([[0] * (RECORD + 3 * n)] * 3),
    )  # fmt: skip


def lookup() -> None:
    """Two texts in three seats; one repeats itself, and one holds nothing twice."""
    state, history = table([[0] * len(State), [40, *[0] * 5], [7, *[0] * 5]]), table([[*range(50)]] * 3)
    history[1] %= 9
    TRITON.lookup(
        history, state, table([2, -1, 1]), table([[0] * 15] * 3).long(), torch.zeros(3, 15, device=DEVICE)
    )


def branch() -> None:
    """Chains of 9 nodes, two of them with nodes of the tree."""
    trees, _, slots = grown(3, 30, 7)
    drafts = trees.tokens[:, 1:10].contiguous()
    TRITON.branch(trees, slots, drafts, -torch.arange(27, device=DEVICE).view(3, 9) / 9)


def seen_rows() -> None:
    """Trees of two texts, and a row of padding."""
    counts, tree = table([[0, 2, 0] * 30, [1, 0, 0] * 30]), table([-1, 0, 0, -1, 3, -1])
    settings = SamplingTable(2, 90, DEVICE)
    for slot in range(2):
        settings.put(slot, Sampling(presence_penalty=0.5))
    TRITON.seen_rows(counts, settings, table([1, 1, 1, 0, 0, -1]), table([5, 6, 89, 7, 7, 0]).long(), tree)


def permit() -> None:
    """A text with a grammar, one without and a row of padding; two tiles, the last one ragged."""
    settings = SamplingTable(2, 5003, DEVICE)
    settings.put(1, Sampling(), masked=True)
    TRITON.permit(torch.randn(3, 5003, device=DEVICE), table([[5] * 157] * 3), settings, table([1, 0, -1]))


def commit() -> None:
    pools, rows = [numbers(2, 2, 3, PAGE, 40) for _ in "kv"], [numbers(2, 6, 3, 40) for _ in "kv"]
    TRITON.commit(*pools, table([[1, 0]]), table([0]), *rows, table([[0, 2, 5, -1]]), table([2 * PAGE - 2]))


LAUNCHES: dict[str, Callable[[], object]] = {
    "linear, split": lambda: linear(True),
    "linear, in one CTA": lambda: linear(False),
    "linear, TMA, split": lambda: linear_by_tma(True),
    "linear, TMA, in one CTA": lambda: linear_by_tma(False),
    "linear, table": linear_by_the_table,
    "linears, either kernel": linears_of_a_model,
    "linears of many rows": linears_of_many_rows,
    "linears of fp8": lambda: quantised(Format.E4M3, True),
    "linears of int4": lambda: quantised(Format.INT4, False),
    "linears of W8A8": rounded,
    "linear_swiglu": lambda: linear_swiglu(False),
    "linear_swiglu, TMA": lambda: linear_swiglu(True),
    "norms": norms,
    "qk_norm_rope": qk_norm_rope,
    "swiglu": lambda: swiglu_triton(numbers(5, 2 * 1100)),
    "embedding": lambda: TRITON.embedding(numbers(50, 1100), table([49, 0, 7])),
    "attention, partial": lambda: attention("partial"),
    "attention, shared": lambda: attention("shared"),
    "attention, fused": fused_attention,
    "attention, whole": lambda: attention("whole"),
    "attention, Gluon, partial": lambda: gluon_attention("partial"),
    "attention, Gluon, shared": lambda: gluon_attention("shared"),
    "attention, Gluon, whole": lambda: gluon_attention("whole"),
    "mixed pass": mixed_pass,
    "head": head,
    "logit summary": logit_summary,
    "choose, greedy": choose,
    "choose, sampled": lambda: choose(temperature=0.8),
    "choose, all filters": lambda: choose(**FILTERS),
    "choose, top-k": lambda: choose(**FILTERS | {"top_k": 20}),
    "commit": commit,
    "lay": lay,
    "branch": branch,
    "lookup": lookup,
    "walk": walk,
    "seen_rows": seen_rows,
    "permit": permit,
    "grow": lambda: grown(3, 30, 7),
    "allot": lambda: allotted(5, 12, 29),
    "blocks": blocks,
    "rerank": rerank,
    # make new-op: a launch
}


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for name in names or LAUNCHES:
        LAUNCHES[name]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
