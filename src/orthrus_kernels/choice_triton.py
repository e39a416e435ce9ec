"""The choice of a token in Triton: `choose`, `candidates`, `log_sum_exp` of choice.py on written logits.

Three forms, by the settings alone: without filters many programs a row (here); with top-k up to 128 the k
best tokens first (choice_top_k_triton.py); with any other filter a search for its edge
(choice_edges_triton.py). Scores and noise are one definition (scores_triton.py). A row's bits: every
reduction, in all forms, is a maximum or a sum of integers, which have no order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .choice import Sampling, correction_scale
from .choice_edges_triton import _choose_by_edges_kernel
from .choice_top_k_triton import GROUP, MOST, _choose_top_k_kernel, _group_best_kernel
from .layout import Settings
from .logit_summary import summary_of_logits
from .rows import NO_CONTRACTION
from .scores_triton import LEAST, best_of, better, gumbel_from, scores_of, settings

_BLOCK = 8192  # tokens a step of the search for edges: what one program keeps in flight
_TILE = 4096  # tokens a program where a row has several
_NOISE_BLOCK = 2048  # tokens a step where noise is drawn: random bits take registers (8192: spills, sm_90)
_SEARCH = 1 << 30  # in place of room for the k best: k has no room


@triton.jit
def _tile_best_kernel(
    logits, s_t, positions, seen, s_seen, bias, perturbed, keys, ids, numbers,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, SAMPLED: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, row): image and id int32 of the tile's best token to keys and ids [T, tiles]. KEEP: what
    is compared goes to perturbed [T, V]."""
    seed_low, seed_high, _, penalty, temperature, _, _ = settings(numbers)
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    logits += i_r * s_t
    if HAS_SEEN:
        seen += i_r * s_seen
    position = tl.load(positions + i_r).to(tl.int32)
    b_best = tl.full((BLOCK,), LEAST, tl.int32)
    b_id = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(i_n * TILE, (i_n + 1) * TILE, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        b = scores_of(logits, bias, seen, o_v, o_v < V, penalty, temperature, HAS_BIAS, HAS_SEEN, SAMPLED)
        if SAMPLED:
            b += gumbel_from(seed_low, seed_high, position, first, BLOCK)
        b_best, b_id = better(b_best, b_id, b, o_v, o_v < V)
        if KEEP:
            tl.store(perturbed + i_r * V + o_v, b, mask=o_v < V)
    key, id = best_of(b_best, b_id)
    at = i_r * tl.num_programs(0) + i_n
    tl.store(keys + at, key)
    tl.store(ids + at, id)


@triton.jit
def _row_best_kernel(keys, ids, choices, tiles, BLOCK: tl.constexpr):
    """Program r: row r, the best of its tiles."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    b_key = tl.load(keys + i_r * tiles + o, mask=o < tiles, other=LEAST)
    b_id = tl.load(ids + i_r * tiles + o, mask=o < tiles, other=0x7FFFFFFF)
    _, choice = best_of(b_key, b_id)
    tl.store(choices + i_r, choice.to(tl.int64))


def choose_triton(
    logits: Tensor, positions: Tensor, sampling: Sampling, seen: Tensor | None = None, *,
    out: Tensor | None = None, numbers: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`choose` in Triton; `out` [T] int64 takes the result.

    numbers, bias: those of `choice_numbers` and `bias_table`, on the device already: a captured graph reads
    whatever lies there, for any settings with the same `choice_form`, with a bias or without one. Left out,
    they are copied there. Rows of logits and seen must be contiguous."""
    rows, v = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    assert out.is_contiguous() and out.dtype == torch.int64 and out.shape == (rows,), (out.dtype, out.shape)
    if rows == 0:
        return out
    shared = _arguments(logits, positions, sampling, seen, numbers, bias)
    sampled, room, by_p, by_min = choice_form(sampling, v)
    if 0 < room < _SEARCH:
        _top_k(shared, room, by_p, by_min, choices=out)
    elif room or by_p or by_min:
        _by_edges(shared, room > 0, by_p, by_min, choices=out)
    else:
        _unfiltered(shared, sampled, choices=out)
    return out


def candidates_triton(
    logits: Tensor, positions: Tensor, sampling: Sampling, k: int, seen: Tensor | None = None, *,
    numbers: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`candidates` in Triton; k up to 128, arguments as for `choose_triton`."""
    rows, v = logits.shape
    if not 1 <= k <= min(v, MOST):
        raise ValueError(f"candidates: k is {k}, must be in 1..{MOST}, the vocabulary has {v} tokens")
    shared = _arguments(logits, positions, sampling, seen, numbers, bias)
    sampled, room, by_p, by_min = choice_form(sampling, v)
    choices = positions.new_empty(rows)
    if 0 < room < _SEARCH:
        scores, ids = logits.new_empty(rows, k), positions.new_empty(rows, k)
        _top_k(shared, max(room, triton.next_power_of_2(k)), by_p, by_min, choices, (scores, ids))
        return scores.log_softmax(-1), ids
    perturbed = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if room or by_p or by_min:
        _by_edges(shared, room > 0, by_p, by_min, choices, perturbed)
    else:
        _unfiltered(shared, sampled, choices, perturbed)
    scores, ids, sums = summary_of_logits(perturbed, k)
    return (scores.log_softmax(-1) if sampled else scores - sums[:, None]), ids


def _arguments(
    logits: Tensor, positions: Tensor, sampling: Sampling, seen: Tensor | None, numbers: Tensor | None,
    bias: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """What all forms take, checked."""
    rows, v = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert positions.dtype == torch.int64 and positions.shape == (rows,), (positions.dtype, positions.shape)
    assert positions.is_contiguous(), positions.stride()
    if sampling.repetition_penalty == 1.0:
        seen = None
    if seen is not None:
        assert seen.dtype == torch.bool and seen.shape == logits.shape and seen.stride(1) == 1, seen.shape
        seen = seen.view(torch.uint8)
    if bias is None and sampling.logit_bias:
        bias = bias_table(tuple(sampling.logit_bias.items()), v, logits.device)
    if numbers is None:
        numbers = _numbers_on(
            logits.device, v, seed=sampling.seed, top_k=sampling.top_k, top_p=sampling.top_p,
            min_p=sampling.min_p, temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
    assert numbers.dtype == torch.int32 and numbers.shape == (len(Settings),), (numbers.dtype, numbers.shape)
    return dict(
        logits=logits, s_t=logits.stride(0) if rows > 1 else v, positions=positions, seen=seen,
        s_seen=seen.stride(0) if seen is not None and rows > 1 else v, bias=bias, numbers=numbers, V=v,
        HAS_BIAS=bias is not None, HAS_SEEN=seen is not None, **NO_CONTRACTION,
    )  # fmt: skip


def _unfiltered(
    shared: dict[str, Any], sampled: bool, choices: Tensor, perturbed: Tensor | None = None
) -> None:
    logits = shared["logits"]
    rows, v = logits.shape
    tile = min(_TILE, max(triton.next_power_of_2(v), 64))
    tiles = triton.cdiv(v, tile)
    keys, ids = torch.empty(2, rows, tiles, dtype=torch.int32, device=logits.device)
    _tile_best_kernel[(tiles, rows)](
        **shared, perturbed=perturbed, keys=keys, ids=ids, SAMPLED=sampled, KEEP=perturbed is not None,
        TILE=tile, BLOCK=min(_NOISE_BLOCK, tile), num_warps=8,
    )  # fmt: skip
    _row_best_kernel[(rows,)](
        keys=keys, ids=ids, choices=choices, tiles=tiles, BLOCK=triton.next_power_of_2(tiles), num_warps=1
    )


def _top_k(
    shared: dict[str, Any], room: int, by_p: bool, by_min: bool, choices: Tensor,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    logits = shared["logits"]
    rows, v = logits.shape
    tile = min(_TILE, max(triton.next_power_of_2(v), GROUP))
    tiles = triton.cdiv(v, tile)
    groups = tiles * (tile // GROUP)
    keys = torch.empty(rows, groups, dtype=torch.int32, device=logits.device)
    without_noise = {name: value for name, value in shared.items() if name != "positions"}
    _group_best_kernel[(tiles, rows)](
        **without_noise, best=keys, groups=groups, BLOCK=tile, GROUP=GROUP, num_warps=4
    )
    _choose_top_k_kernel[(rows,)](
        **shared, best=keys, choices=choices, candidate_scores=best and best[0],
        candidate_ids=best and best[1], groups=groups, TOP_P=by_p, MIN_P=by_min,
        CANDIDATES=best[0].shape[1] if best else 0, BLOCK_K=room, BLOCK_GROUPS=triton.next_power_of_2(groups),
        GROUP=GROUP, num_warps=8,
    )  # fmt: skip


def _by_edges(
    shared: dict[str, Any], by_k: bool, by_p: bool, by_min: bool, choices: Tensor,
    perturbed: Tensor | None = None,
) -> None:  # fmt: skip
    logits = shared["logits"]
    block = max(triton.next_power_of_2(logits.shape[1]), 64)
    scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _choose_by_edges_kernel[(len(logits),)](
        **shared, scores=scores, perturbed=perturbed,
        choices=choices, TOP_K=by_k, TOP_P=by_p, MIN_P=by_min, KEEP=perturbed is not None,
        BLOCK=min(_BLOCK, block), NOISE_BLOCK=min(_NOISE_BLOCK, block), num_warps=16,
    )  # fmt: skip


def choice_form(sampling: Sampling, vocabulary: int) -> tuple[bool, int, bool, bool]:
    """What the launches of a choice follow from: (sampled, room for the tokens that top-k keeps, by top-p, by
    min-p). Room: 0 without top-k, 2^30 where k is past 128."""
    if sampling.temperature == 0:
        return False, 0, False, False
    room = 0
    if 0 < sampling.top_k < vocabulary:
        room = max(triton.next_power_of_2(int(sampling.top_k)), 16) if sampling.top_k <= MOST else _SEARCH
    return True, room, sampling.top_p < 1, sampling.min_p > 0


def choice_numbers(sampling: Sampling, vocabulary: int) -> Tensor:
    """The settings as kernels read them, int32 on the CPU in the order of `layout.Settings`."""
    whole = {
        Settings.SEED_LOW: _signed32(sampling.seed), Settings.SEED_HIGH: _signed32(sampling.seed >> 32),
        Settings.TOP_K: min(int(sampling.top_k), vocabulary),
    }  # fmt: skip
    parts = {
        Settings.PENALTY: sampling.repetition_penalty, Settings.TEMPERATURE: sampling.temperature,
        Settings.TOP_P: sampling.top_p, Settings.MIN_P: sampling.min_p,
        Settings.CORRECTION: correction_scale(sampling),
    }  # fmt: skip
    numbers = torch.zeros(len(Settings), dtype=torch.int32, device="cpu")
    numbers[list(whole)] = torch.tensor(list(whole.values()), dtype=torch.int32, device="cpu")
    bits = torch.tensor(list(parts.values()), dtype=torch.float32, device="cpu").view(torch.int32)
    numbers[list(parts)] = bits
    return numbers


@lru_cache(maxsize=16)
def _numbers_on(device: torch.device, vocabulary: int, **settings: float) -> Tensor:
    """`choice_numbers` on a device: copied once for a text, not once a choice."""
    return choice_numbers(Sampling(**settings), vocabulary).to(device)  # type: ignore[arg-type]


def _signed32(x: int) -> int:
    """The low 32 bits of x as an int32, which is what a kernel takes."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@lru_cache(maxsize=16)
def bias_table(items: tuple[tuple[int, float], ...], vocabulary: int, device: torch.device) -> Tensor:
    """[V] fp32: the bias of every token."""
    bias = torch.zeros(vocabulary, dtype=torch.float32, device="cpu")
    for token, value in items:
        bias[token] += value
    return bias.to(device)


def log_sum_exp_triton(logits: Tensor) -> Tensor:
    """`log_sum_exp` in Triton for logits [T, V] fp32, with the bits of `head`'s."""
    return summary_of_logits(logits, 1)[2]
