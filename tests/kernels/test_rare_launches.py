"""Kernels in rare cases, pinned: several end tokens, tied tops, segments that no model has, rows so small
that eps counts; and the options that they are compiled with, as their launchers say them."""

import sys

import pytest
import torch
from interpreter import DEVICE
from limits import assert_close
from strategies import hard
from test_walk import FAR, alone, run

from orthrus_kernels import Sampling, alike, choose
from orthrus_kernels.backends import REFERENCE, backend_ops
from orthrus_kernels.choice_triton import choose_triton
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.logit_summary import summary_of_logits
from orthrus_kernels.swiglu import swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.weight import Weight

TRITON = backend_ops("triton")


@pytest.mark.parametrize("ends", [(14, 12), (30, 31, 12), (13, 30, 14, 31, 12), (12,), (30, 31), ()], ids=str)
def test_every_end_token_of_the_list_ends_a_walk(ends):
    """A chain of 11, 12, 13, 14, all agreed with."""
    chain = alone([7, 10, 9, 0], [10, 11, 12, 13], [-1, 0, 1, 2], [11, 12, 13, 14])
    (state,), _, (accepted,), _, (record,) = run(chain._replace(ends=[[*ends]]))
    kept = 2 if 12 in ends else 4
    assert state == [7 + kept, 10 + kept, 9 - kept, int(12 in ends), FAR, 4] and record[0] == kept
    assert accepted == [0, 1, 2, 3][:kept] + [-1] * (4 - kept)


TIED = [1.0, 3.0, -2.0, 3.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"min_p": 1.0}, [1, 3, 4]), ({"min_p": 1.0, "top_k": 4}, [1, 3, 4]),
     ({"min_p": 1.0, "top_k": 2}, [1, 3]), ({"min_p": 1.0, "top_p": 0.5}, [1, 3])],
    ids=str,
)  # fmt: skip
def test_tied_tops(settings, kept):
    sampling, positions = Sampling(temperature=1.0, seed=5, **settings), torch.arange(30)
    logits = torch.tensor([TIED]).repeat(30, 1)
    there = logits.to(DEVICE)
    got = choose_triton(there, positions.to(DEVICE), *alike(sampling, there)).cpu()
    assert sorted(set(got.tolist())) == kept and torch.equal(
        got, choose(logits, positions, *alike(sampling, logits))
    )


# (K, block_k, segments): blocks of K that segments do not share evenly, so that the last one is short, or
# empty, and a block too far would be the next row's.
ODD = [(80, 16, 3), (80, 16, 4), (75, 16, 4), (112, 16, 5), (16, 16, 3), (48, 16, 2)]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("k", "block_k", "segments"), ODD)
def test_segments_of_unequal_length(k, block_k, segments, tma):
    tma &= k % 16 == 0  # rows of other widths go by pointers
    # with rows behind them, so that a block too far reads numbers
    x, w = hard("normal", 5, k).to(DEVICE)[:3], Weight((hard("normal", 64, k, seed=1) / 4).to(DEVICE)[:32])
    for split in (True, False):
        entry = LinearEntry(block_k, segments, (LinearTile(None, 16, 32, split, 4, 3, tma=tma),))
        assert_close(linear_triton(x, w, entry=entry), x.double() @ w.dense().double().T)
    entry = LinearEntry(block_k, segments, (LinearTile(None, 16, 32, False, 4, 3, tma=tma),))
    gate, up = (x.double() @ w.dense().double().T).chunk(2, -1)
    assert_close(linear_swiglu_triton(x, w, entry=entry), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("ops", [TRITON, REFERENCE], ids=["kernels", "twins"])
def test_eps_stands_in_the_root(ops):
    """Rows of mean square 3e-6 with an eps of 1e-6: halved, where eps outside the root would leave them."""
    x = torch.full((2, 64), 3e-6).sqrt().to(DEVICE)
    weight, angles = torch.ones(64, device=DEVICE), torch.zeros(2, 32, device=DEVICE)
    want = torch.full((2, 64), 0.75).sqrt()
    close = {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6).cpu(), want, **close)
    torch.testing.assert_close(ops.add_rms_norm(x / 4, 3 * x / 4, weight, 1e-6)[0].cpu(), want, **close)
    qkv, cos = x[:, None].repeat(1, 3, 1), angles + 1
    q, k, _ = ops.qk_norm_rope(qkv, 1, weight, weight, cos, angles, 1e-6)
    torch.testing.assert_close(q[:, 0].cpu(), want, **close)
    torch.testing.assert_close(k[:, 0].cpu(), want, **close)


class Noted:
    """In a kernel's place: notes the options of its launches."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*values, **arguments):
            self.launches.append((self.name, arguments))
            return self.kernel[grid](*values, **arguments)

        return launch


# Elementwise arithmetic whose contraction could differ between two forms of a launch.
UNCONTRACTED = {
    "_rms_norm_kernel", "_qk_norm_rope_kernel", "_swiglu_kernel", "_linear_swiglu_kernel", "_merge_kernel",
    "_logits_kernel", "_tile_best_kernel", "_group_best_kernel", "_choose_top_k_kernel",
    "_tops_kernel", "_count_kernel", "_bounds_kernel", "_list_kernel", "_edge_kernel",
}  # fmt: skip


def test_row_wise_kernels_are_compiled_without_contraction(monkeypatch):
    launches: list[tuple[str, dict]] = []
    modules = [m for name, m in sys.modules.items() if name.startswith("orthrus_kernels.")]
    for module in modules:
        for name in UNCONTRACTED & set(vars(module)):
            monkeypatch.setattr(module, name, Noted(getattr(module, name), name, launches))
    x = hard("normal", 2, 64).to(DEVICE)
    weight, angles = torch.ones(64, device=DEVICE), torch.zeros(2, 32, device=DEVICE)
    TRITON.rms_norm(x, weight, 1e-6), TRITON.add_rms_norm(x, x, weight, 1e-6), swiglu_triton(x)
    TRITON.qk_norm_rope(x[:, None].repeat(1, 3, 1), 1, weight, weight, angles, angles, 1e-6)
    TRITON.linear_swiglu(x, Weight(hard("normal", 64, 64).to(DEVICE))), summary_of_logits(x, 2)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.5}):
        TRITON.choose(x, torch.arange(2, device=DEVICE), *alike(Sampling(temperature=1.0, **settings), x))
    assert {name for name, _ in launches} == UNCONTRACTED
    assert all(arguments.get("enable_fp_fusion") is False for _, arguments in launches), launches
