"""Every launch that aot.py compiles: (case, module, kernel, launcher call, targets)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

import torch

import orthrus_kernels.backends  # noqa: F401  imports every kernel module
from orthrus_kernels import Weight, tables
from orthrus_kernels.layout import RECORD, State

Launch = tuple[str, ModuleType, str, Callable[[], object], tuple[str, ...]]
HOPPER = ("sm_90",)
MORE = ("sm_90 too",)  # near relatives of launches for HOPPER, compiled by slow tests alone
PDL = ("sm_90", "sm_100", "sm_120")
ALL = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def module(name: str) -> ModuleType:
    """A module of orthrus_kernels; `orthrus_kernels.linear` as an attribute is the function."""
    return import_module(f"orthrus_kernels.{name}")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# Tiles by descriptors as `make tune` tries them: the smallest, and those with most registers.
TMA_ENTRIES = (
    tables.LinearEntry(64, 4, (
        tables.LinearTile(16, 16, 64, True, 4, 10, tma=True),
        tables.LinearTile(128, 128, 256, True, 8, 4, tma=True),
        tables.LinearTile(192, 192, 128, True, 8, 5, tma=True),
        tables.LinearTile(None, 96, 128, False, 8, 4, tma=True),
    )),
    tables.LinearEntry(64, 1, (
        tables.LinearTile(192, 192, 256, False, 16, 4, tma=True),
        tables.LinearTile(None, 128, 256, False, 8, 4, tma=True),
    )),
)  # fmt: skip


def linears() -> Iterator[Launch]:
    """Every tile of the table's entries and of defaults. Of tiles that differ in their stages, or in their
    number of segments where there are several, the one with most: it has most registers. Of those that differ
    in their sizes alone, the one with most accumulators stands for the others; and one of several segments,
    which also adds up what others have left, for one of a single segment that is no larger."""
    op = module("linear")
    shapes = ((151936, 4096), (6144, 4096), (4096, 4096), (512, 4096))
    entries = [(dtype, entry) for (_, _, dtype, _), entry in tables.linear_entries().items()]
    entries += [(d, tables.default_entry(*s, d)) for s in shapes for d in (torch.bfloat16, torch.float32)]
    entries += [(torch.bfloat16, tables.default_entry(*s, torch.bfloat16, "sm_90")) for s in shapes]
    entries += [(torch.bfloat16, entry) for entry in TMA_ENTRIES]
    entries += [(torch.float16, tables.default_entry(*shapes[1], torch.float16))]
    most: dict[tuple, tuple[tables.LinearEntry, tables.LinearTile]] = {}
    for dtype, entry in entries:
        for tile in entry.tiles:
            several = entry.segments > 1
            key = dtype, entry.block_k, several, replace(tile, rows=None, prefetch=0, stages=0)
            other = most.get(key)
            size = entry.segments, tile.stages
            if other is None or size > (other[0].segments, other[1].stages):
                most[key] = entry, tile
    largest: dict[tuple, int] = {}
    for (dtype, _, several, _), (_, tile) in most.items():
        kind = dtype, several, tile.tma, tile.split, tile.warps
        largest[kind] = max(largest.get(kind, 0), tile.block_t * tile.block_n)
    for nth, ((dtype, _, several, _), (entry, tile)) in enumerate(most.items()):
        size = tile.block_t * tile.block_n
        alike = [largest.get((dtype, n, tile.tma, tile.split, tile.warps), 0) for n in (several, True)]
        stands = size == alike[0] and (several or size > alike[1])

        def launch(pdl, dtype=dtype, entry=entry, rows=tile.rows or 512):
            space = op.Workspace.new(torch.device("meta"), 1 << 28, 1 << 20)
            x = meta(2 * rows, 4096, dtype=dtype)
            w, w2 = (Weight(meta(4096, 4096, dtype=dtype)) for _ in range(2))
            one = replace(entry, apart=None)  # both weights in one launch, which is the harder
            op.linear_triton(x, w, w2, rows, entry=one, space=space, pdl=pdl)

        name = f"{dtype} segments {entry.segments} block_k {entry.block_k} {tile}"
        targets = (HOPPER if stands else MORE) if nth else PDL
        yield "pdl " + name, op, "_linear_kernel", partial(launch, True), targets
        if not nth:
            yield name, op, "_linear_kernel", partial(launch, False), ALL


def on_amd(launch: Callable[[], object]) -> None:
    """The launch as torch of an AMD GPU makes it."""
    with patch.object(torch.version, "hip", "6"):
        launch()


def quantised_linears() -> Iterator[Launch]:
    """Of each format the smallest tiles and those with most accumulators."""
    linear, fused, of = module("linear"), module("linear_swiglu"), module("quantised")
    fp8 = of.Format.E4M3, 128, False, torch.bfloat16, 128
    int4, small = (of.Format.INT4, 128, True, torch.float16, 1), (of.Format.INT4, 32, False, torch.float32, 1)

    def weight(n: int, k: int, scheme: tuple) -> of.QuantisedWeight:
        return of.QuantisedWeight.new(
            n, k, *scheme[:2], zeros=scheme[2], scale=scheme[3], factor_rows=scheme[4], dtype=torch.bfloat16,
            device="meta",
        )  # fmt: skip

    def product(scheme: tuple, k: int, rows: int, split: bool, pdl: bool) -> None:
        space = linear.Workspace.new(torch.device("meta"), 1 << 28 if split else 1, 1 << 20)
        w, w2 = (weight(4096, k, scheme) for _ in range(2))
        entry = tables.linear_entry(4096, k, torch.bfloat16, "sm_90", w.scheme)
        linear.linear_triton(meta(2 * rows, k), w, w2, rows, space=space, pdl=pdl, entry=entry)

    def gate_and_up(scheme: tuple, rows: int, pdl: bool, at_once: int = 1) -> None:
        w = weight(24576, 4096, scheme)
        entry = fused.swiglu_entry(*w.shape, torch.bfloat16, "sm_90", w.scheme)
        entry = replace(entry, tiles=tuple(replace(tile, at_once=at_once) for tile in entry.tiles))
        fused.linear_swiglu_triton(meta(rows, 4096), w, pdl=pdl, entry=entry)

    for scheme, k, rows, split in (
        (fp8, 12288, 16, True), (fp8, 12288, 512, False), (fp8, 4096, 64, True), (int4, 12288, 32, True),
        (int4, 12288, 64, False), (small, 4096, 128, True),
    ):  # fmt: skip
        name = f"pdl {scheme[0].value} group {scheme[1]} of {k}, {rows} rows, split {split}"
        yield name, linear, "_linear_kernel", partial(product, scheme, k, rows, split, True), HOPPER
    for scheme, rows, at_once in ((fp8, 128, 1), (int4, 16, 1), (fp8, 16, 2)):
        name = f"pdl {scheme[0].value} group 128, {rows} rows, {at_once} a round"
        yield name, fused, "_linear_swiglu_kernel", partial(gate_and_up, scheme, rows, True, at_once), HOPPER
    for scheme, op, kernel, launch in (
        (fp8, fused, "_linear_swiglu_kernel", partial(gate_and_up, fp8, 128, False)),
        (int4, linear, "_linear_kernel", partial(product, int4, 4096, 16, True, False)),
    ):
        name = f"{scheme[0].value} group 128"
        yield name, op, kernel, launch, tuple(key for key in ALL if key not in ("sm_90", "gfx942"))
        yield name, op, kernel, partial(on_amd, launch), ("gfx942",)


def rounded_linears() -> Iterator[Launch]:
    """W8A8: every tile of its table, with several segments and, of gate and up, with one. Those of the linear
    have most registers; gate and up have a launch beside them."""
    linear, fused, of = module("linear"), module("linear_swiglu"), module("quantised")

    def weight(n: int, k: int) -> of.QuantisedWeight:
        return of.QuantisedWeight.new(
            n, k, of.Format.E4M3, 128, zeros=False, scale=torch.bfloat16, factor_rows=128, rounds=True,
            dtype=torch.bfloat16, device="meta",
        )  # fmt: skip

    def product(n: int, rows: int) -> None:
        space = linear.Workspace.new(torch.device("meta"), 1 << 28, 1 << 20)
        w, w2 = (weight(n, 4096) for _ in range(2))
        linear.linear_triton(meta(2 * rows, 4096), w, w2, rows, space=space, pdl=True)

    def gate_and_up(n: int, rows: int) -> None:
        fused.linear_swiglu_triton(meta(rows, 4096), weight(n, 4096), pdl=True)

    tiles = tables.linear_entry(4096, 4096, torch.bfloat16, "sm_90", weight(4096, 4096).scheme).tiles
    for tile in tiles:
        rows = tile.rows or 512
        for n, op, kernel, launch in (
            (4096, linear, "_linear_kernel", product), (24576, fused, "_linear_swiglu_kernel", gate_and_up),
            (6144, fused, "_linear_swiglu_kernel", gate_and_up),
        ):  # fmt: skip
            targets = HOPPER if n == 4096 or (n == 24576 and rows == 64) else MORE
            yield f"pdl W8A8 {n} outputs, {tile}", op, kernel, partial(launch, n, rows), targets
    rounding = module("quantise_rows")
    for k, targets in ((4096, ALL), (12288, HOPPER)):
        launch = partial(rounding.quantise_rows_triton, meta(33, k))
        yield f"{k} columns", rounding, "_quantise_rows_kernel", launch, targets


def row_wise() -> Iterator[Launch]:
    """The kernels of fixed layout at the shapes of Qwen3-8B."""
    norm, qk = module("rms_norm"), module("qk_norm_rope")
    x, w, w_d = meta(33, 4096), meta(4096), meta(128)
    yield "4096", norm, "_rms_norm_kernel", lambda: norm.rms_norm_triton(x, w, 1e-6, w, 20), ALL
    yield "add 4096", norm, "_rms_norm_kernel", lambda: norm.add_rms_norm_triton(x, x, w, 1e-6), HOPPER
    yield (
        "128", norm, "_rms_norm_kernel", lambda: norm.rms_norm_triton(meta(33, 32, 128), w_d, 1e-6), HOPPER
    )  # fmt: skip
    for d in (128, 64):

        def launch(d=d):
            qkv, k, w, cos = meta(33, 48, d), meta(33, 8, d), meta(d), meta(33, d // 2, dtype=torch.float32)
            qk.qk_norm_rope_triton(qkv, 32, w, w, cos, cos, 1e-6, w, w, 9, (k, k))

        yield f"D {d}", qk, "_qk_norm_rope_kernel", launch, ALL if d == 128 else HOPPER
    swiglu, embedding = module("swiglu"), module("embedding")
    yield "12288", swiglu, "_swiglu_kernel", lambda: swiglu.swiglu_triton(meta(33, 24576)), ALL
    tokens = meta(33, dtype=torch.int64)
    yield (
        "4096", embedding, "_embedding_kernel",
        lambda: embedding.embedding_triton(meta(151936, 4096), tokens), ALL,
    )  # fmt: skip
    # make new-op: a launch


def heads() -> Iterator[Launch]:
    """Qwen3-8B's head: every tile of its entry, greedy and with the candidates of a draft tree; the merge."""
    head, summary = module("head"), module("logit_summary")
    v, e = 151936, 4096
    for dtype in (torch.bfloat16, torch.float32):
        entry = head.head_entry(v, e, dtype, "sm_90")
        for tile in entry.tiles:
            for k in (1, 16):

                def launch(dtype=dtype, k=k, entry=entry, rows=tile.rows or 512):
                    logits = None if k == 1 else meta(rows, v, dtype=torch.float32)
                    w = Weight(meta(v, e, dtype=dtype))
                    head.head_groups(meta(rows, e, dtype=dtype), w, logits, entry)

                first = dtype == torch.bfloat16 and tile.rows == 16 and k == 1
                ends = tile.rows in (16, None) and (k == 16 or dtype == torch.bfloat16)
                targets = HOPPER if ends else MORE
                yield f"{dtype} k {k} {tile}", head, "_head_kernel", launch, ALL if first else targets

    def segments():
        logits = meta(33, 512, dtype=torch.float32)
        entry = head.head_entry(512, e, torch.bfloat16, "sm_90")
        head.head_groups(meta(33, e), Weight(meta(512, e)), logits, entry)

    yield "8 segments", head, "_head_kernel", segments, HOPPER
    logits = meta(33, v, dtype=torch.float32)
    yield "", summary, "_logits_kernel", lambda: summary.groups_of(logits), ALL
    for k in (1, 16, 32, 128):

        def merge(k=k):
            groups = summary.Groups.new(33, v, 64, torch.device("meta"))
            out = summary.empty_summary(33, v, k, torch.device("meta"), None)
            groups.merge(None if k == 1 else logits, v, out)

        yield f"k {k}", summary, "_merge_kernel", merge, ALL if k == 16 else HOPPER


# Those with most registers; several segments by either copy.
SWIGLU_ENTRIES = (
    tables.LinearEntry(64, 1, (
        tables.LinearTile(64, 64, 128, False, 4, 9, tma=True),
        tables.LinearTile(128, 128, 128, False, 4, 7, tma=True),
        tables.LinearTile(None, 128, 256, False, 8, 4, tma=True),
    )),
    tables.LinearEntry(64, 3, (
        tables.LinearTile(64, 64, 128, False, 8, 4),
        tables.LinearTile(None, 128, 128, False, 8, 4, tma=True),
    )),
)  # fmt: skip


def linear_swiglus() -> Iterator[Launch]:
    """Every tile of gate_up's entries at Qwen3's sizes and by default; tiles equal but for stages once. Of
    those that differ in their sizes alone, the one with most accumulators stands for the others."""
    op = module("linear_swiglu")
    keys = "sm_90", "sm_80"
    entries = [(torch.bfloat16, op.swiglu_entry(24576, 4096, torch.bfloat16, key)) for key in keys]
    entries += [(torch.bfloat16, entry) for entry in SWIGLU_ENTRIES]
    entries.append((torch.float32, op.swiglu_entry(6144, 1024, torch.float32, "sm_90")))
    largest: dict[tuple, int] = {}
    for dtype, entry in entries:
        for tile in entry.tiles:
            kind = dtype, entry.segments, tile.tma, tile.warps
            largest[kind] = max(largest.get(kind, 0), tile.block_t * tile.block_n)
    seen = set()
    for dtype, entry in entries:
        for tile in entry.tiles:
            key = dtype, entry.block_k, entry.segments, replace(tile, rows=None, stages=0)
            if key in seen:
                continue
            stands = largest[dtype, entry.segments, tile.tma, tile.warps] == tile.block_t * tile.block_n

            def launch(pdl, dtype=dtype, entry=entry, rows=tile.rows or 512):
                x, w = meta(rows, 4096, dtype=dtype), Weight(meta(8192, 4096, dtype=dtype))
                op.linear_swiglu_triton(x, w, entry=replace(entry, apart=None), pdl=pdl)

            name = f"{dtype} segments {entry.segments} block_k {entry.block_k} {tile}"
            if not seen:
                yield name, op, "_linear_swiglu_kernel", partial(launch, False), ALL
            targets = HOPPER if stands else MORE
            yield "pdl " + name, op, "_linear_swiglu_kernel", partial(launch, True), targets
            seen.add(key)


def choices() -> Iterator[Launch]:
    """The choice from Qwen3's vocabulary, with few and with all settings, and in mixed passes; some as for a
    draft tree."""
    op, edges, of = module("choice_triton"), module("choice_edges_triton"), module("sampling_table")
    sampling, logits = module("sampling").Sampling, meta(33, 151936, dtype=torch.float32)
    positions, seen = meta(33, dtype=torch.int64), meta(33, 151936, dtype=torch.int32)
    slots, warm = meta(33, dtype=torch.int32), {"temperature": 0.8}
    everything = {**warm, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}}
    few, many = {**everything, "top_k": 20}, {**everything, "top_k": 200}
    mixed = {}, warm, few, many
    for kernel, cases in (
        ("_tile_best_kernel", (("greedy", [{}], False), ("sampled", [warm], True), ("mixed", mixed, True))),
        ("_row_best_kernel", (("sampled", [warm], True),)),
        ("_group_best_kernel", (("all", [few], True),)),
        ("_choose_top_k_kernel", (("top-k", [{**warm, "top_k": 20}], False),
                                  ("all", [{**everything, "top_k": 128}], False),
                                  ("candidates, all", [few], True))),
        *((kernel, (("top-p", [{**warm, "top_p": 0.95}], False), ("all", [many], True)))
          for kernel in ("_tops_kernel", "_count_kernel", "_bounds_kernel", "_list_kernel", "_edge_kernel")),
        ("_log_probabilities_kernel", (("sampled", [warm], True), ("mixed", mixed, True))),
    ):  # fmt: skip
        for i, (name, settings, draft) in enumerate(cases):

            def launch(settings=settings, draft=draft):
                table = of.SamplingTable(len(settings), logits.shape[1], "meta")
                for slot, one in enumerate(settings):
                    table.put(slot, sampling(**one))
                table.form = table.form_of(range(len(settings)))
                given = (16, seen) if draft else (seen,)
                (op.candidates_triton if draft else op.choose_triton)(logits, positions, table, slots, *given)

            owner = op if hasattr(op, kernel) else edges
            yield name, owner, kernel, launch, ALL if i == len(cases) - 1 else HOPPER


def allots() -> Iterator[Launch]:
    """The rows of the largest passes of many texts, and of a text alone."""
    allot, trees, plans = module("allot"), module("grow").Trees, module("plan").PassPlan
    for seats, n, t in ((64, 64, 512), (256, 16, 512), (256, 64, 512), (1, 128, 128)):
        plan, sat = plans.of(module("visibility").Rows.chain([1] * t, 0), "meta"), meta(seats).int()
        tree, state, first = trees.new(seats, n, "meta"), meta(256, len(State)).int(), meta(seats + 1).int()
        launch = partial(allot.allot_triton, plan, first, tree, state, sat)
        name = f"{seats} seats, {n} nodes, {t} rows"
        yield name, allot, "_allot_kernel", launch, ALL if seats == n else HOPPER


def cycles() -> Iterator[Launch]:
    """What a cycle on the device begins and ends with, for a tree with blocks at 32k."""
    lay, rows = module("lay_triton"), module("visibility").Rows
    one, record = meta(1, dtype=torch.int32), meta(RECORD + 3 * 33, dtype=torch.int32)
    tree = rows.tree_with_blocks([1] * 33, [-1, *range(32)], 0, range(9, 33), 6, 96)
    chains, prompts = (
        rows.batch([rows.chain([1] * n, 0, s) for s in range(count)]) for n, count in ((64, 8), (128, 16))
    )
    mixed = rows.batch(
        [rows.tree_with_blocks([1] * 7, [-1, *range(6)], 0, range(7), 8, 96, s) for s in range(8)]
    )
    for name, of, root, clock, targets in (
        ("177 rows", tree, None, None, ALL), ("504 rows of 8 texts", mixed, None, None, MORE),
        ("a chain, timed", rows.chain([1] * 32, 0), one, record[5:8], HOPPER),
        ("a prompt", rows.chain([1] * 2048, 0), None, None, MORE), ("8 chains", chains, None, None, HOPPER),
        ("16 prompts", prompts, None, None, MORE),
        ("deep tree", rows.tree([1] * 256, [-1, *range(63), *range(192)], 0), None, None, MORE),
    ):  # fmt: skip
        plan = module("plan").PassPlan.of(of, "meta")
        whole = of is chains or of is prompts
        shared = plan.shape.branches and not whole
        tables = module("pass_tables").PassTables.new(plan.shape, 32768, 16, whole, "meta", shared=shared)
        yield name, lay, "_lay_kernel", partial(lay.lay_triton, plan, tables, root, clock), targets
    for name, n, lines, roots in (
        ("64 trees", 8, 512, None),
        ("64 texts", 1, 64, meta(64, dtype=torch.int32)),
    ):
        texts = [rows.tree([1] * n, [-1, *range(n - 1)], 0, s) for s in range(64)]
        of = rows.batch([*texts, rows.chain([1] * 256, 0, 64)])
        shape = module("plan").PassShape(len(of), len(of), lines + 16, 256, sequences=64)
        at = meta(64, dtype=torch.int32)
        plan = replace(module("plan").PassPlan.of(of, "meta"), shape=shape, start=at)
        tables = module("pass_tables").PassTables.new(shape, 32768, 16, False, "meta", shared=True)
        launch = partial(lay.lay_triton, plan, tables, roots, None if roots is None else record[5:8])
        yield f"{name} and prompts", lay, "_lay_kernel", launch, MORE if roots is None else HOPPER

    grow, ids = module("grow"), meta(2, 31, 16).long()
    trees, slots = grow.Trees.new(2, 129, "meta"), meta(2, dtype=torch.int32)
    state, scores = meta(4, len(State), dtype=torch.int32), meta(2, 31, 16, dtype=torch.float32)
    for name, clock, targets in (("128 nodes", None, ALL), ("128 nodes, timed", record[6:8], HOPPER)):
        launch = partial(grow.grow_triton, trees, state, slots, scores, ids, None, clock)
        yield name, grow, "_grow_kernel", launch, targets

    order, ranked = meta(2, 31, 16, 16, dtype=torch.int32), meta(2, 31, 16, 16, dtype=torch.float32)
    launch = partial(grow.grow_triton, trees, state, slots, ranked, ids, order)
    yield "128 nodes, re-ranked", grow, "_grow_kernel", launch, HOPPER
    line = grow.Trees.new(2, 32, "meta")
    for name, clock, targets in (("a chain", None, ALL), ("a chain, timed", record[6:8], HOPPER)):
        launch = partial(grow.grow_triton, line, state, slots, ranked, ids, order, clock, True)
        yield name, grow, "_chain_kernel", launch, targets
    chain, chain_scores, hang = meta(2, 31).long(), meta(2, 31).float(), module("branch")
    for nodes, targets in ((64, ALL), (256, HOPPER)):
        tree = grow.Trees.new(2, nodes, "meta")
        launch = partial(hang.branch_triton, tree, slots, chain, chain_scores)
        yield f"{nodes} nodes, a chain of 31", hang, "_branch_kernel", launch, targets
    yield from allots()
    lookup, history = module("lookup"), meta(4, 40960, dtype=torch.int32)
    drafts, score = (meta(2, 16, dtype=t)[:, 1:] for t in (torch.int64, torch.float32))
    for name, clock, targets in (("40,960 places", None, ALL), ("40,960 places, timed", record[5:8], HOPPER)):
        launch = partial(lookup.lookup_triton, history, state, slots, drafts, score, clock)
        yield name, lookup, "_lookup_kernel", launch, targets
    rerank, bigram = module("rerank"), meta(151936, 32)
    scales, calibration = meta(4, dtype=torch.float32), meta(2, 31, 2, dtype=torch.float32)
    tables, settings = (bigram, bigram, calibration), (scales, scales, slots)
    launch = partial(rerank.rerank_triton, scores, ids, slots, *tables, *settings, True)
    yield "31 x 16, rank 32", rerank, "_rerank_kernel", launch, ALL
    for rank, targets in ((64, ALL), (256, HOPPER)):
        wide = meta(151936, 32 + rank)
        gate = meta(2, 31, rank, dtype=torch.float32), meta(31, rank, dtype=torch.float32)
        launch = partial(
            rerank.rerank_triton, scores, ids, slots, wide, wide, calibration, *settings, True, *gate
        )
        yield f"31 x 16, rank 32, gate of rank {rank}", rerank, "_rerank_kernel", launch, targets

    blocks, at, two = module("blocks"), meta(2, 20, dtype=torch.int32), grow.Trees.new(2, 20, "meta")
    first, each = meta(3, dtype=torch.int32), ([0] * 20, [-1] + [0] * 19, 0, range(20), 8, 96)
    placed = module("plan").PassPlan.of(rows.batch([rows.tree_with_blocks(*each, b) for b in (0, 1)]), "meta")
    launch = partial(blocks.place_blocks_triton, placed, first, two, slots, at)
    yield "20 nodes, 20 blocks", blocks, "_place_kernel", launch, ALL
    drafts, behind = (meta(2, 6, dtype=torch.int64) for _ in "01")
    ends, fifth = meta(2, RECORD + 3 * 20, dtype=torch.int32), meta(5, dtype=torch.int32)
    launch = partial(blocks.follow_triton, ends, state, slots, at, 8, drafts, behind, fifth)
    yield "20 blocks", blocks, "_follow_kernel", launch, ALL

    nodes, chosen, logits = (meta(66, dtype=t) for t in (torch.int32, torch.int64, torch.float32))
    states, accepted, start, first = (
        meta(*n, dtype=torch.int32) for n in ((4, len(State)), (2, 33), (2,), (3,))
    )  # fmt: skip
    ends, records = meta(4, 18, dtype=torch.int32), meta(2, RECORD + 3 * 33, dtype=torch.int32)
    walk, commit, seen = module("walk"), module("commit"), module("seen")
    for name, timed, targets in (("33 nodes", False, ALL), ("33 nodes, timed", True, HOPPER)):
        launch = partial(
            walk.walk_triton, states, start, first, chosen, nodes, chosen, logits, logits, ends, history,
            accepted, start, records, timed,
        )  # fmt: skip
        yield name, walk, "_walk_kernel", launch, targets
    cache, pages, kept = meta(36, 64, 8, 64, 128), meta(2, 32, dtype=torch.int32), meta(36, 66, 8, 128)
    launch = partial(commit.commit_triton, cache, cache, pages, start, kept, kept, accepted, start)
    yield "36 layers", commit, "_commit_kernel", launch, ALL
    settings = module("sampling_table").SamplingTable(2, 151936, "meta")
    counts = meta(2, 151936, dtype=torch.int32)
    launch = partial(seen.seen_rows_triton, counts, settings, nodes, chosen, nodes)
    for kernel in ("_texts_kernel", "_paths_kernel"):
        yield "66 rows", seen, kernel, launch, ALL
    permit, masks = module("permit"), meta(66, 4748, dtype=torch.int32)
    launch = partial(
        permit.permit_triton, meta(66, 151936, dtype=torch.float32), masks, settings, nodes
    )  # fmt: skip
    yield "66 rows", permit, "_permit_kernel", launch, ALL


def launches() -> Iterator[Launch]:
    yield from linears()
    yield from quantised_linears()
    yield from rounded_linears()
    yield from row_wise()
    yield from linear_swiglus()
    yield from heads()
    yield from choices()
    yield from cycles()
