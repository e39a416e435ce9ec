"""Commit on the device against its twin, exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from strategies import hard

from orthrus_kernels.commit import commit, commit_triton


def table(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@settings(max_examples=20)
@given(
    accepted=st.lists(st.integers(0, 6), max_size=5), start=st.integers(0, 6), sequence=st.integers(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), unused=st.integers(0, 2),
)  # fmt: skip
def test_commit_equals_its_twin(accepted, start, sequence, dtype, unused):
    """Every slot, written or not, and whatever lies in it."""
    caches = [hard("normal", 2, 2, 3, 12, 20, seed=s).to(DEVICE, dtype) for s in (1, 2)]
    rows = [hard("normal", 2, 7, 3, 20, seed=s).to(DEVICE, dtype) for s in (3, 4)]
    caches[0][:, :, :, start:] = float("nan")
    want = [c.clone() for c in caches]
    commit(*want, *rows, accepted, start, sequence)
    if accepted or unused:
        commit_triton(*caches, *rows, table(accepted + [-1] * unused), table([start]), sequence)
    for got, exact in zip(caches, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


def test_commit_does_not_write_past_the_cache():
    caches = [torch.zeros(1, 1, 1, 4, 16, device=DEVICE) for _ in "kv"]
    rows = [torch.ones(1, 5, 1, 16, device=DEVICE) for _ in "kv"]
    commit_triton(*(c[:, :, :, :3] for c in caches), *rows, table([0, 1, 2]), table([2]))
    assert caches[0].sum(-1).flatten().tolist() == [0, 0, 16, 0]
