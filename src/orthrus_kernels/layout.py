"""The int32 tables that several kernels and the host share, their places by name.

`Tile`: the columns of an attention tile's row (pass_tables.py). `State`: a text on the device. `Record`:
what a cycle leaves for the host (walk.py). `Settings`: those of the choice of a token
(choice_triton.py). The host uses the enumerations, kernels the constants below, which are made of them."""

from __future__ import annotations

from enum import IntEnum

from ._triton import tl


class Tile(IntEnum):
    """Columns of a row of `PassTables.tiles`. From position CHAIN on, the rows of the tile's path follow one
    another from row CHAIN_ROW."""

    SEQUENCE = 0
    CONTEXT = 1  # committed positions
    END = 2  # the largest limit of its rows
    FIRST_SLOT = 3  # of its path
    REACH = 4  # behind the last key segment that it takes
    CHAIN = 5
    CHAIN_ROW = 6
    LOWEST = 7  # the smallest limit
    BEGIN = 8  # the first key segment that it takes


class State(IntEnum):
    """A text on the device."""

    START = 0  # the root's position, also the committed length
    ROOT = 1  # the root's token
    LEFT = 2  # tokens that may still be added
    FINISHED = 3  # 0 or 1


class Record(IntEnum):
    """The head of a cycle's record; behind it N tokens, N log-probabilities as bits of fp32, N nodes."""

    KEPT = 0  # how many of the N are good
    FINISHED = 1
    DAMAGED = 2  # logits on the path were not numbers
    DRAFTED = 3  # the tree came of a draft
    BEGAN = 4  # times, low 32 bits of ns (clock.py)
    DRAFTED_AT = 5
    GROWN_AT = 6
    DONE_AT = 7


class Settings(IntEnum):
    """Settings of a choice; those from PENALTY on as bits of fp32."""

    SEED_LOW = 0
    SEED_HIGH = 1
    TOP_K = 2
    PENALTY = 3
    TEMPERATURE = 4
    TOP_P = 5
    MIN_P = 6
    CORRECTION = 7  # what a bigram correction is multiplied with


TILE_COLUMNS = tl.constexpr(len(Tile))
TILE_SEQUENCE, TILE_CONTEXT = tl.constexpr(int(Tile.SEQUENCE)), tl.constexpr(int(Tile.CONTEXT))
TILE_END, TILE_FIRST_SLOT = tl.constexpr(int(Tile.END)), tl.constexpr(int(Tile.FIRST_SLOT))
TILE_REACH, TILE_CHAIN = tl.constexpr(int(Tile.REACH)), tl.constexpr(int(Tile.CHAIN))
TILE_CHAIN_ROW, TILE_LOWEST = tl.constexpr(int(Tile.CHAIN_ROW)), tl.constexpr(int(Tile.LOWEST))
TILE_BEGIN = tl.constexpr(int(Tile.BEGIN))

STATE_COLUMNS = tl.constexpr(len(State))
STATE_START, STATE_ROOT = tl.constexpr(int(State.START)), tl.constexpr(int(State.ROOT))
STATE_LEFT, STATE_FINISHED = tl.constexpr(int(State.LEFT)), tl.constexpr(int(State.FINISHED))

RECORD = len(Record)  # numbers before the tokens
RECORD_HEAD = tl.constexpr(RECORD)
RECORD_KEPT, RECORD_FINISHED = tl.constexpr(int(Record.KEPT)), tl.constexpr(int(Record.FINISHED))
RECORD_DAMAGED, RECORD_DRAFTED = tl.constexpr(int(Record.DAMAGED)), tl.constexpr(int(Record.DRAFTED))
RECORD_DONE_AT = tl.constexpr(int(Record.DONE_AT))

SEED_LOW, SEED_HIGH = tl.constexpr(int(Settings.SEED_LOW)), tl.constexpr(int(Settings.SEED_HIGH))
TOP_K, PENALTY = tl.constexpr(int(Settings.TOP_K)), tl.constexpr(int(Settings.PENALTY))
TEMPERATURE, TOP_P = tl.constexpr(int(Settings.TEMPERATURE)), tl.constexpr(int(Settings.TOP_P))
MIN_P = tl.constexpr(int(Settings.MIN_P))
