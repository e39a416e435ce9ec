"""The int32 tables that several kernels and the host share, their places by name.

`Tile`: the columns of an attention tile's row (pass_tables.py). `State`: a slot, the text in it. `Record`:
what a cycle leaves for the host (walk.py). `Settings`: those of the choice of a token, and `Takes`: what
such a choice takes (sampling_table.py). The host uses the enumerations, kernels the constants below, which
are made of them."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from ._triton import tl, triton


class Tile(IntEnum):
    """Columns of a row of `PassTables.tiles`. From position CHAIN on, the rows of the tile's path follow one
    another from row CHAIN_ROW."""

    SEQUENCE = 0
    CONTEXT = 1  # committed positions; of a context tile in the shared form those in whole pages
    END = 2  # the largest limit of its rows
    FIRST_SLOT = 3  # of its path
    REACH = 4  # behind the last key segment that it takes
    CHAIN = 5
    CHAIN_ROW = 6
    LOWEST = 7  # the smallest limit
    BEGIN = 8  # the first key segment that it takes


class State(IntEnum):
    """A slot: the text that runs in it, on the device."""

    START = 0  # the root's position, also the committed length
    ROOT = 1  # the root's token
    LEFT = 2  # tokens that may still be added
    FINISHED = 3  # 0 or 1
    ROOM = 4  # positions that its pages hold: it is committed no further
    NODES = 5  # of its draft tree at most, the root one of them


class Record(IntEnum):
    """The head of a cycle's record; behind it N tokens, N log-probabilities as bits of fp32, N nodes."""

    KEPT = 0  # how many of the N are good
    FINISHED = 1
    DAMAGED = 2  # logits on the path were not numbers
    DRAFTED = 3  # the tree came of a draft
    NODES = 4  # of the tree, the root one of them
    BEGAN = 5  # times, low 32 bits of ns (clock.py); of all seats in the first one's record
    DRAFTED_AT = 6
    GROWN_AT = 7
    DONE_AT = 8


class Settings(IntEnum):
    """Settings of a choice; those from REPETITION to CORRECTION as bits of fp32."""

    SEED_LOW = 0
    SEED_HIGH = 1
    TOP_K = 2
    REPETITION = 3  # the three penalties
    FREQUENCY = 4
    PRESENCE = 5
    TEMPERATURE = 6
    TOP_P = 7
    MIN_P = 8
    CORRECTION = 9  # what a bigram correction is multiplied with
    TAKES = 10  # a `Takes`
    LEAST = 11  # the text does not end at positions below


class Takes(IntFlag):
    """What a choice takes: one algorithm of four, filters, tables."""

    GREEDY = 1
    SAMPLED = 2  # without filters
    BEST = 4  # the k best tokens first (choice_top_k_triton.py)
    EDGES = 8  # a search for the edge of a filter (choice_edges_triton.py)
    TOP_K = 16
    TOP_P = 32
    MIN_P = 64
    BIAS = 128
    PENALTY = 256  # any of the three
    LEAST = 512  # end tokens are held back at first
    LIKELIEST = 1024  # the likeliest tokens are told beside the choice
    MASK = 2048  # only tokens that a grammar permits (permit.py)


TILE_COLUMNS = tl.constexpr(len(Tile))
TILE_SEQUENCE, TILE_CONTEXT = tl.constexpr(int(Tile.SEQUENCE)), tl.constexpr(int(Tile.CONTEXT))
TILE_END, TILE_FIRST_SLOT = tl.constexpr(int(Tile.END)), tl.constexpr(int(Tile.FIRST_SLOT))
TILE_REACH, TILE_CHAIN = tl.constexpr(int(Tile.REACH)), tl.constexpr(int(Tile.CHAIN))
TILE_CHAIN_ROW, TILE_LOWEST = tl.constexpr(int(Tile.CHAIN_ROW)), tl.constexpr(int(Tile.LOWEST))
TILE_BEGIN = tl.constexpr(int(Tile.BEGIN))

STATE_COLUMNS = tl.constexpr(len(State))
STATE_START, STATE_ROOT = tl.constexpr(int(State.START)), tl.constexpr(int(State.ROOT))
STATE_LEFT, STATE_FINISHED = tl.constexpr(int(State.LEFT)), tl.constexpr(int(State.FINISHED))
STATE_ROOM, STATE_NODES = tl.constexpr(int(State.ROOM)), tl.constexpr(int(State.NODES))

RECORD = len(Record)  # numbers before the tokens
RECORD_HEAD = tl.constexpr(RECORD)
RECORD_KEPT, RECORD_FINISHED = tl.constexpr(int(Record.KEPT)), tl.constexpr(int(Record.FINISHED))
RECORD_DAMAGED, RECORD_DRAFTED = tl.constexpr(int(Record.DAMAGED)), tl.constexpr(int(Record.DRAFTED))
RECORD_NODES, RECORD_DONE_AT = tl.constexpr(int(Record.NODES)), tl.constexpr(int(Record.DONE_AT))

SEED_LOW, SEED_HIGH = tl.constexpr(int(Settings.SEED_LOW)), tl.constexpr(int(Settings.SEED_HIGH))
TOP_K, REPETITION = tl.constexpr(int(Settings.TOP_K)), tl.constexpr(int(Settings.REPETITION))
FREQUENCY, PRESENCE = tl.constexpr(int(Settings.FREQUENCY)), tl.constexpr(int(Settings.PRESENCE))
TEMPERATURE, TOP_P = tl.constexpr(int(Settings.TEMPERATURE)), tl.constexpr(int(Settings.TOP_P))
MIN_P = tl.constexpr(int(Settings.MIN_P))
SETTINGS_COLUMNS = tl.constexpr(len(Settings))
_TAKES = tl.constexpr(int(Settings.TAKES))

TAKES_GREEDY, TAKES_SAMPLED = tl.constexpr(int(Takes.GREEDY)), tl.constexpr(int(Takes.SAMPLED))
TAKES_BEST, TAKES_EDGES = tl.constexpr(int(Takes.BEST)), tl.constexpr(int(Takes.EDGES))
TAKES_TOP_K, TAKES_TOP_P = tl.constexpr(int(Takes.TOP_K)), tl.constexpr(int(Takes.TOP_P))
TAKES_MIN_P = tl.constexpr(int(Takes.MIN_P))
TAKES_BIAS, TAKES_PENALTY = tl.constexpr(int(Takes.BIAS)), tl.constexpr(int(Takes.PENALTY))
TAKES_MASK = tl.constexpr(int(Takes.MASK))


@triton.jit
def slot_and_takes(numbers, slots, i_r):
    """(slot of row i_r, the `Takes` of its choice). A padding row has slot -1 and takes nothing. numbers
    [S, columns of Settings]."""
    slot = tl.load(slots + i_r)
    takes = tl.load(numbers + slot * SETTINGS_COLUMNS + _TAKES, mask=slot >= 0, other=0)
    return slot, takes
