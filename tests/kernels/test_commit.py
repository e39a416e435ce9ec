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
    accepted=st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=3), data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), unused=st.integers(0, 2),
)  # fmt: skip
def test_commit_equals_its_twin(accepted, data, dtype, unused):
    """Every slot of every sequence, written or not, and whatever lies in it; rows past the end too."""
    sequences, n = len(accepted), max(map(len, accepted)) + unused
    start = data.draw(st.lists(st.integers(0, 11), min_size=sequences, max_size=sequences))
    caches = [hard("normal", 2, sequences, 3, 12, 20, seed=s).to(DEVICE, dtype) for s in (1, 2)]
    rows = [hard("normal", 2, 7, 3, 20, seed=s).to(DEVICE, dtype) for s in (3, 4)]
    for s, first in enumerate(start):
        caches[0][:, s, :, first:] = float("nan")
    kept = table([line + [-1] * (n - len(line)) for line in accepted]).view(sequences, n)
    want, before = [c.clone() for c in caches], [c.clone() for c in caches]
    commit(*want, *rows, kept, table(start))
    commit_triton(*caches, *rows, kept, table(start))
    for got, exact, old, of in zip(caches, want, before, rows, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
        for s, (first, line) in enumerate(zip(start, accepted, strict=True)):
            for at in range(12):
                there = line[at - first] if 0 <= at - first < len(line) else None
                exact = old[:, s, :, at] if there is None else of[:, there]
                torch.testing.assert_close(got[:, s, :, at], exact, rtol=0, atol=0, equal_nan=True)


def test_commit_does_not_write_past_the_cache():
    caches = [torch.zeros(1, 1, 1, 4, 16, device=DEVICE) for _ in "kv"]
    rows = [torch.ones(1, 5, 1, 16, device=DEVICE) for _ in "kv"]
    commit_triton(*(c[:, :, :, :3] for c in caches), *rows, table([[0, 1, 2]]), table([2]))
    assert caches[0].sum(-1).flatten().tolist() == [0, 0, 16, 0]
