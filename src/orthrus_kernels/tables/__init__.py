"""Launch tables of the kernels: committed data, never tuned at run time where bits matter.

A linear weight is looked up by (N, K, dtype, device). What its row of bits depends on, `block_k` and
`segments`, is one pair for the weight: its **reduction class**. What may change with the number of rows
(tile, warps, stages, whether segments run side by side or one after another) is a list of tiles, and every
tile gives the same bits; tests/kernels/test_linear.py and tests/gpu/test_linear_rows.py assert it.

`linear.json` holds the measured entries, each with the measurement it came from. A weight without an entry
takes `default_entry`, whose class is a function of (N, K, dtype) alone. A quantised weight is looked up by
its scheme too (quantised.py); it takes a default in which a block of K is a group."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

import torch

from ..quantised import Scheme


@dataclass(frozen=True)
class LinearTile:
    """A launch for up to `rows` rows of one view; None: any number.

    block_t: rows of x a CTA; 3 * 2^k (two dots, 2^(k+1) and 2^k wide) with tma only.
    split: one CTA a segment, partials added by the CTA that arrives last; else one CTA runs all segments.
    tma: tiles are copied by the tensor memory accelerator, where the operands' alignment allows it.
    prefetch: blocks of K of each weight row asked for while the kernel in front ends (pdl.py).
    at_once: groups of a quantised weight that a round of the loop takes, 1 or 2. Two halve the barriers."""

    rows: int | None
    block_t: int
    block_n: int
    split: bool
    warps: int
    stages: int
    tma: bool = False
    prefetch: int = 2
    at_once: int = 1


@dataclass(frozen=True)
class LinearEntry:
    """The reduction class of a weight and its tiles, by rising number of rows; the last one takes any.

    apart: with rows of both views, more than this of one: one launch a view, each with its own tile. None:
    always one launch. Of an entry of `linear_swiglu`: more rows take the linear and SwiGLU in turn."""

    block_k: int
    segments: int
    tiles: tuple[LinearTile, ...]
    measured: str | None = None  # GPU, date, command; None: a default that nobody measured
    apart: int | None = None

    def tile(self, rows: int) -> LinearTile:
        """The tile for `rows` rows of the view that has more of them."""
        return next(tile for tile in self.tiles if tile.rows is None or rows <= tile.rows)


# (rows, block_t, block_n, split, warps, stages). The activation tile is read from L2 once for every block_n
# weight rows, so block_n grows with block_t; fp32 runs on plain FMA and keeps its operands in registers.
_TILES_16_BIT = (
    LinearTile(16, 16, 64, True, 4, 6),
    LinearTile(32, 32, 64, True, 4, 6),
    LinearTile(64, 64, 128, True, 8, 4),
    LinearTile(128, 128, 128, True, 8, 3),
    LinearTile(None, 128, 128, False, 8, 3),
)
_TILES_32_BIT = (
    LinearTile(16, 16, 64, True, 4, 3),
    LinearTile(64, 32, 64, True, 4, 3),
    LinearTile(None, 64, 64, False, 8, 3),
)
# Of quantised weights by the bits of a code, whose sum of a group is an accumulator more: the fastest of
# bench.tune_codes for the weights of 8B (H200, 2026-11-30), up to 192 rows.
_WIDE_QUANTISED = (
    LinearTile(64, 64, 64, True, 4, 4),
    LinearTile(256, 128, 64, True, 4, 3),
    LinearTile(None, 64, 128, False, 8, 3),
)
_TILES_QUANTISED = {
    8: (LinearTile(16, 16, 64, True, 4, 4), LinearTile(32, 32, 64, True, 4, 4), *_WIDE_QUANTISED),
    4: (
        LinearTile(16, 16, 64, True, 4, 3, at_once=2), LinearTile(32, 32, 64, True, 4, 3, at_once=2),
        *_WIDE_QUANTISED,
    ),
}  # fmt: skip
# Of weights that round their rows (W8A8): the fastest of the same command on the same day among those that
# copy 16 bytes at a time, with Triton 3.7.1 too.
_TILES_ROUNDED = (
    LinearTile(16, 16, 64, True, 4, 6),
    LinearTile(32, 32, 64, True, 4, 4),
    LinearTile(64, 64, 128, True, 4, 4),
    LinearTile(128, 128, 64, True, 4, 3),
    LinearTile(None, 64, 128, False, 8, 4),
)
# An H100 has 132 multiprocessors, and two CTAs of the narrow tiles on each keep more reads in flight. Start
# value: the settings of a prototype (H200, 2026-11-24) had 192 to 384 CTAs.
_CTAS_TO_FILL = 192
# KiB of shared memory a CTA may have; any other device is taken for the smallest.
_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99}
_LEAST_SHARED = 64  # gfx942
_LEAST_SEGMENT = 512  # columns: shorter ones spend their time filling the pipeline


def default_entry(n: int, k: int, dtype: torch.dtype, device: str = "") -> LinearEntry:
    """A safe entry for any weight: the segments, a power of two up to 8, that let narrow tiles fill a GPU.
    Tiles depend on the device, what decides bits does not."""
    segments = 1
    while segments < 8 and -(-n // 64) * segments < _CTAS_TO_FILL and k // (2 * segments) >= _LEAST_SEGMENT:
        segments *= 2
    if dtype == torch.float32:
        return LinearEntry(32, segments, _TILES_32_BIT)
    if device == "sm_90" and segments > 1:
        return LinearEntry(64, segments, _tiles_sm_90(segments))
    return LinearEntry(64, segments, _TILES_16_BIT)


def _tiles_sm_90(segments: int) -> tuple[LinearTile, ...]:
    """From 33 rows on 0.3 to 1 of the time of the tiles of other devices (weights of 0.6B, H200,
    bench/LOG.md, 2026-11-26). Two segments fill the GPU with one row tile; with more, CTAs would wait for
    CTAs. One segment, of many outputs: not measured."""
    return (
        LinearTile(16, 16, 64, True, 4, 6),
        LinearTile(32, 32, 64, True, 4, 6),
        LinearTile(64, 64, 64, True, 4, 6, tma=True),
        LinearTile(256, 64, 64, segments > 2, 4, 6, tma=True),
        LinearTile(None, 128, 128, False, 8, 3),
    )


def fitted(entry: LinearEntry, dtype: torch.dtype, device: str, scheme: Scheme | None = None) -> LinearEntry:
    """The entry with no more stages than the device's shared memory holds, and the same reduction class.
    scheme: of a quantised weight, whose tiles are smaller."""
    room = _SHARED.get(device, _LEAST_SHARED) * 1024
    bits = scheme.format.bits if scheme else 8 * dtype.itemsize
    of_row = 1 if scheme and scheme.rounds else dtype.itemsize

    def fit(tile: LinearTile) -> LinearTile:
        stage = (tile.block_n * bits // 8 + tile.block_t * of_row) * entry.block_k * tile.at_once
        return replace(tile, stages=max(min(tile.stages, room // stage), 1))

    return replace(entry, tiles=tuple(fit(tile) for tile in entry.tiles))


def device_key(device: torch.device) -> str:
    """The device part of a key: "sm_90", "gfx942", or "cpu" for the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def linear_entries() -> dict[tuple[int, int, torch.dtype, str], LinearEntry]:
    """All committed entries of linear.json by key. Raises ValueError when an entry is malformed."""
    entries = {}
    for row in json.loads(resources.files(__package__).joinpath("linear.json").read_text()):
        tiles = tuple(LinearTile(*tile) for tile in row["tiles"])
        limits = [tile.rows for tile in tiles[:-1] if tile.rows is not None]
        if tiles[-1].rows is not None or len(limits) < len(tiles) - 1 or limits != sorted(limits):
            raise ValueError(f"linear.json: tiles of {row} must rise in rows and end with null")
        key = row["n"], row["k"], getattr(torch, row["dtype"]), row["device"]
        entries[key] = LinearEntry(row["block_k"], row["segments"], tiles, row["measured"], row.get("apart"))
    return entries


@cache
def linear_entry(
    n: int, k: int, dtype: torch.dtype, device: str, scheme: Scheme | None = None
) -> LinearEntry:
    """The committed entry of a weight that multiplies rows of `dtype`, else the default. Interpreted kernels
    use what an H100 would. scheme: of a quantised weight; all of them take the default."""
    device = "sm_90" if device == "cpu" else device
    if scheme:  # a block is a group, so segments end where groups do
        segments = default_entry(n, k, dtype).segments
        tiles = _TILES_ROUNDED if scheme.rounds else _TILES_QUANTISED[scheme.format.bits]
        entry = LinearEntry(scheme.group, segments, tiles)
        return fitted(entry, dtype, device, scheme)
    return linear_entries().get((n, k, dtype, device)) or fitted(
        default_entry(n, k, dtype, device), dtype, device
    )
