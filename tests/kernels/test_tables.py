"""The launch tables: every key has an entry, whose tiles cover every number of rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import DEVICE
from strategies import hard

from orthrus_kernels import tables
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.weight import Weight


@given(n=st.integers(1, 200_000), k=st.integers(1, 30_000), rows=st.integers(1, 5000))
def test_a_default_depends_on_the_weight_alone(n, k, rows):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        entry = tables.default_entry(n, k, dtype)
        tile = entry.tile(rows)
        assert tile.rows is None or rows <= tile.rows
        assert entry.segments in (1, 2, 4, 8) and k >= (entry.segments > 1) * 512 * entry.segments
        for device in ("sm_80", "sm_90", "gfx942"):  # tiles may be others, what decides bits may not
            other = tables.default_entry(n, k, dtype, device)
            assert (other.block_k, other.segments) == (entry.block_k, entry.segments)


def test_entries_are_well_formed():
    """Tensor-core tiles: powers of two, rows by descriptors also 3 * 2^k; a committed entry says what it was
    measured with."""
    for (n, k, _, _), entry in tables.linear_entries().items():
        assert n > 0 and k > 0 and entry.measured, (n, k)
        for tile in entry.tiles:
            rows = tile.block_t // 3 if tile.tma and tile.block_t % 3 == 0 else tile.block_t
            for size in (rows, tile.block_n, entry.block_k, tile.warps):
                assert size & (size - 1) == 0, tile


@pytest.mark.parametrize("tiles", [[[16, 16, 64, True, 4, 4]], [[None, 16, 64, True, 4, 4]] * 2])
def test_a_malformed_table_is_refused(tiles, monkeypatch, tmp_path):
    row = {"n": 1, "k": 1, "dtype": "bfloat16", "device": "sm_90", "block_k": 64, "segments": 1}
    (tmp_path / "linear.json").write_text(tables.json.dumps([row | {"tiles": tiles, "measured": "x"}]))
    monkeypatch.setattr(tables.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match="must rise in rows"):
        tables.linear_entries.__wrapped__()


def test_defaults_fit_the_device_and_keep_their_class():
    for device, kib in (("sm_75", 64), ("gfx942", 64), ("sm_120", 99), ("sm_90", 227)):
        for dtype in (torch.float32, torch.bfloat16):
            got, plain = tables.linear_entry(512, 4096, dtype, device), tables.default_entry(512, 4096, dtype)
            assert (got.block_k, got.segments) == (plain.block_k, plain.segments)
            for tile in got.tiles:
                stage = (tile.block_n + tile.block_t) * got.block_k * dtype.itemsize
                assert tile.stages * stage <= kib * 1024, (device, tile)
    assert got == tables.default_entry(512, 4096, dtype, "sm_90"), "an H100 takes the default as it is"


def classes():
    """The reduction classes of the committed entries, each with every tile that an entry of it has. On a GPU
    its own entries: another's tiles may not fit it.
    """
    found = {}
    for (_, _, dtype, key), entry in tables.linear_entries().items():
        if DEVICE == "cuda" and key != tables.device_key(torch.device(DEVICE)):
            continue
        found.setdefault((dtype, entry.block_k, entry.segments), {}).update(dict.fromkeys(entry.tiles))
    return [pytest.param(*key, list(tiles), id=f"k{key[1]}-s{key[2]}") for key, tiles in found.items()]


@pytest.mark.parametrize("dtype,block_k,segments,tiles", classes())
def test_every_row_count_gives_a_row_the_same_bits(dtype, block_k, segments, tiles, device):
    """Each tile of a class at the row counts where its launch changes, against every row alone.

    On a small weight: beside the class, N only says which rows of the weight a tile holds."""
    rows, k = 40, block_k * segments + 24
    x, w = hard("heavy", rows, k).to(device, dtype), Weight(hard("normal", 40, k, seed=1).to(device, dtype))
    entry = tables.LinearEntry(block_k, segments, (replace(tiles[0], rows=None),))
    alone = torch.cat([linear_triton(x[i : i + 1], w, entry=entry) for i in range(rows)])
    launches = {"warps": 4, "stages": 1} if device.type == "cpu" else {}  # the interpreter knows neither
    for tile in dict.fromkeys(replace(tile, rows=None, **launches) for tile in tiles):
        one = replace(entry, tiles=(tile,))
        for count in {min(count, rows) for count in (1, tile.block_t, tile.block_t + 1, rows)}:
            assert torch.equal(linear_triton(x[:count], w, entry=one), alone[:count]), (tile, count)


def test_another_class_gives_other_bits(device):
    """The test above can fail: segments are part of what the bits depend on."""
    x, w = hard("heavy", 8, 280).to(device), Weight(hard("normal", 40, 280, seed=1).to(device))
    one, two = (tables.LinearEntry(64, s, (tables.LinearTile(None, 16, 64, True, 4, 3),)) for s in (1, 2))
    assert not torch.equal(linear_triton(x, w, entry=one), linear_triton(x, w, entry=two))
