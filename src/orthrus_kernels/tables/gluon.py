"""Tiles of the linears in Gluon (linear_gluon.py): gluon.json, beside the classes that linear.json keeps.

A weight that has a line here runs in Gluon on the device of the line, with as many rows as its tiles take.
Tiles change no bits. Quantised weights have lines in gluon_codes.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch

MOST_ROWS, MOST_GROUPS, MOST_STAGES = 256, 3, 10
TALL = 192  # rows of the tallest tile of a weight with codes
ROOM = 223 * 1024  # bytes of shared memory for a ring; barriers and stores take a few KiB of the 227 of sm_90


@dataclass(frozen=True)
class GluonTile:
    """A program's: `rows` rows of x in one or two parts, powers of two; groups: multiplying warpgroups, of 64
    weight rows each. Three of them have registers for 192 rows."""

    rows: int
    groups: int

    def __post_init__(self) -> None:
        fits = self.rows % 16 == 0 < self.rows <= MOST_ROWS and self.rows.bit_count() <= 2
        most = MOST_ROWS if self.groups < MOST_GROUPS else 192
        if not fits or not 1 <= self.groups <= MOST_GROUPS or self.rows > most:
            raise ValueError(
                f"a tile in Gluon has 16 to {most} rows, the sum of one or two powers of two, and 1 to "
                f"{MOST_GROUPS} groups, not {self.rows} rows and {self.groups} groups"
            )

    @property
    def parts(self) -> tuple[int, int]:
        """Its rows; the second may be 0."""
        wide = min(1 << self.rows.bit_length() - 1, 128)
        return wide, self.rows - wide

    @property
    def stages(self) -> int:
        """Places of its ring: what fits, blocks of 64 columns in 16 bits."""
        return min(ROOM // ((64 * self.groups + self.rows) * 128), MOST_STAGES)


@dataclass(frozen=True)
class CodedTile(GluonTile):
    """The same of a weight with codes of `bits` bits, whose program has a second accumulator, the sum of a
    group, and that group's operand in registers. TALL rows are three equal parts. Where rows are codes too
    (`rounds`), the operand lies in shared memory, and TALL rows are two parts as in a dense tile."""

    bits: int
    rounds: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 128 if self.groups < MOST_GROUPS else 96 if self.rounds else 48
        if self.bits not in (4, 8) or (self.rounds and self.bits != 8):
            raise ValueError(f"codes have {'' if self.rounds else '4 or '}8 bits, not {self.bits}")
        if self.rows > most and not (self.rows == TALL and self.groups < MOST_GROUPS):
            raise ValueError(
                f"with codes a tile in Gluon of {self.groups} groups has {most} rows at most"
                f"{f', or {TALL}' if self.groups < MOST_GROUPS else ''}, not {self.rows}"
            )

    @property
    def kernel_rows(self) -> tuple[int, int, int]:
        """As the kernel has them: number of equal parts, rows of one, rows behind them, which may be 0."""
        return (3, TALL // 3, 0) if self.rows == TALL and not self.rounds else (1, *self.parts)

    @property
    def scales(self) -> int:
        """Scales of rows that a place of the ring holds: a power of two, and 128 bytes at least for TMA."""
        return max(1 << (self.rows - 1).bit_length(), 32) if self.rounds else 0

    @property
    def stages(self) -> int:
        """Places of its ring: what fits, groups of 128 columns."""
        row, room = 128 if self.rounds else 256, ROOM
        if self.rounds and self.groups == MOST_GROUPS:
            room -= 5 * 1024  # stores of 96 rows by three warpgroups take 9 KiB, for 4 of which ROOM has room
        return min(
            room // (64 * self.groups * 16 * self.bits + self.rows * row + 4 * self.scales), MOST_STAGES
        )


def coded_tiles(rows: int, bits: int, rounds: bool = False) -> tuple[CodedTile, ...]:
    """Every tile that takes so many rows and no fewer, of 1 to MOST_GROUPS groups."""
    height = next(height for height in (16, 32, 48, 64, 96, 128, TALL) if rows <= height)
    most = 3 if height <= (96 if rounds else 48) else 2
    return tuple(CodedTile(height, groups, bits, rounds) for groups in range(1, most + 1))


@dataclass(frozen=True)
class CodedEntry:
    """Tiles of a weight with codes by rising rows; more rows than the last one's are cut into launches. Fewer
    rows than `least` run in Triton."""

    tiles: tuple[CodedTile, ...]
    least: int = 1
    measured: str | None = None  # GPU, date, command

    def __post_init__(self) -> None:
        rows = [tile.rows for tile in self.tiles]
        if not rows or rows != sorted(set(rows)):
            raise ValueError(f"tiles must rise in rows, and {rows} do not")
        if type(self.least) is not int or not 1 <= self.least <= rows[-1]:
            raise ValueError(f"`least` is {self.least!r}; 1 to {rows[-1]} was expected")

    def tile(self, rows: int) -> CodedTile:
        """The tile for so many rows, no more than the last one's."""
        return next(tile for tile in self.tiles if rows <= tile.rows)


@dataclass(frozen=True)
class GluonEntry:
    """Tiles of a weight by rising rows, for rows of one view alone; fewer than `least` run in Triton. both:
    tiles (of the AR view, of the diffusion view) for one launch of both, by rising rows; what fits none has a
    launch a view. wide: tiles of which a launch with more rows than the last tile's takes one
    (linear_gluon_wide.py), of equals the first; without any it runs in Triton. measured, wide_measured: GPU,
    date and command of `tiles` and `both`, and of `wide`."""

    tiles: tuple[GluonTile, ...]
    both: tuple[tuple[GluonTile, GluonTile], ...] = ()
    measured: str | None = None
    least: int = 1
    wide: tuple[GluonTile, ...] = ()
    wide_measured: str | None = None

    def tile(self, rows: int) -> GluonTile | None:
        """The tile for so many rows of one view; None: they run in Triton."""
        return next((tile for tile in self.tiles if self.least <= rows <= tile.rows), None)

    def wide_tiles(self, rows: int) -> tuple[GluonTile, ...]:
        """The tiles that so many rows of one view may be cut into; none where one tile takes them all."""
        most = self.tiles[-1].rows if self.tiles else 0
        return self.wide if rows >= self.least and rows > most else ()

    def pair(self, ar: int, diffusion: int) -> tuple[GluonTile, GluonTile] | None:
        """The tiles of one launch for so many rows of each view."""
        return next((pair for pair in self.both if ar <= pair[0].rows and diffusion <= pair[1].rows), None)


@cache
def gluon_entries() -> dict[tuple[int, int, torch.dtype, str], GluonEntry]:
    """All entries of gluon.json by (N, K, dtype, device). Raises ValueError when one is malformed."""
    entries = {}
    for row in json.loads(resources.files(__package__).joinpath("gluon.json").read_text()):
        tiles = tuple(GluonTile(*tile) for tile in row["tiles"])
        both = tuple((GluonTile(*ar), GluonTile(*diffusion)) for ar, diffusion in row["both"])
        wide = tuple(GluonTile(*tile) for tile in row.get("wide", ()))
        rows = [tile.rows for tile in tiles]
        least = row.get("least", 1)
        if not (rows or wide) or rows != sorted(set(rows)):
            raise ValueError(f"gluon.json: tiles of {row} must rise in rows")
        if not rows and least <= MOST_ROWS:
            raise ValueError(f"gluon.json: {row} has wide tiles alone, so `least` must be above {MOST_ROWS}")
        if any(1 < min(a.groups, b.groups) < max(a.groups, b.groups) for a, b in both):
            raise ValueError(f"gluon.json: of two tiles of one launch in {row} the lower has 1 group")
        key = row["n"], row["k"], getattr(torch, row["dtype"]), row["device"]
        entries[key] = GluonEntry(tiles, both, row["measured"], least, wide, row.get("wide_measured"))
    return entries


@cache
def coded_entries(rounds: bool = False) -> dict[tuple[int, int, int, str], CodedEntry]:
    """All entries of gluon_codes.json by (N, K, bits of a code, device), of weights that round their rows or
    of those that do not. Groups are of 128. Raises ValueError when one is malformed."""
    entries: dict[tuple[int, int, int, str], CodedEntry] = {}
    for row in json.loads(resources.files(__package__).joinpath("gluon_codes.json").read_text()):
        try:
            given = row.get("rounds", False)
            if type(given) is not bool:
                raise ValueError(f"`rounds` is {given!r}; true or false was expected")
            if given is not rounds:
                continue
            n, k, bits, device = (row[name] for name in ("n", "k", "bits", "device"))
            tiles = tuple(CodedTile(rows, groups, bits, rounds) for rows, groups in row["tiles"])
            entry = CodedEntry(tiles, row["least"], row["measured"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"gluon_codes.json: {row}: {error}") from None
        if (n, k, bits, device) in entries or k % 128:
            raise ValueError(f"gluon_codes.json: {row} has two lines, or K is no multiple of 128")
        entries[n, k, bits, device] = entry
    return entries
