"""The launch tables: every key has an entry, whose tiles cover every number of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_kernels import tables


@given(n=st.integers(1, 200_000), k=st.integers(1, 30_000), rows=st.integers(1, 5000))
def test_a_default_depends_on_the_weight_alone(n, k, rows):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        entry = tables.default_entry(n, k, dtype)
        tile = entry.tile(rows)
        assert tile.rows is None or rows <= tile.rows
        assert entry.segments in (1, 2, 4, 8) and k >= (entry.segments > 1) * 512 * entry.segments


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
            got, plain = tables.linear_entry(33, 70, dtype, device), tables.default_entry(33, 70, dtype)
            assert (got.block_k, got.segments) == (plain.block_k, plain.segments)
            for tile in got.tiles:
                stage = (tile.block_n + tile.block_t) * got.block_k * dtype.itemsize
                assert tile.stages * stage <= kib * 1024, (device, tile)
    assert got == plain, "an H100 takes the default as it is"
