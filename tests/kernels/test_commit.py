"""Commit on the device against its twin, exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from strategies import hard

from orthrus_kernels import PAGE
from orthrus_kernels.commit import commit, commit_triton


def table(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@settings(max_examples=20)
@given(
    accepted=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=2, max_size=3),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), unused=st.integers(0, 2),
)  # fmt: skip
def test_commit_equals_its_twin(accepted, data, dtype, unused):
    """Every place of every page, written or not, and whatever lies in it; rows past the reach of the table,
    before it and without a page too. Seats are of any slots, or of none."""
    slots, n = len(accepted), max(map(len, accepted)) + unused
    owners = data.draw(st.permutations([*range(slots), -1]))[:slots]
    near = st.sampled_from([-2, 0, 3, PAGE - 2, PAGE, 2 * PAGE - 3, 2 * PAGE, 1 << 20])
    start = data.draw(st.lists(near, min_size=slots, max_size=slots))
    pages = [page - 2 for page in data.draw(st.permutations(range(2 * slots + 2)))[: 2 * slots]]
    pools = [hard("normal", 2, 2 * slots, 3, PAGE, 20, seed=s).to(DEVICE, dtype) for s in (1, 2)]
    rows = [hard("normal", 2, 7, 3, 20, seed=s).to(DEVICE, dtype) for s in (3, 4)]
    pools[0][:, :, :, 3:] = float("nan")
    kept = table([line + [-1] * (n - len(line)) for line in accepted]).view(slots, n)
    places = table(pages).view(slots, 2)
    want, exact = [p.clone() for p in pools], [p.clone() for p in pools]
    for s, first, line in zip(owners, start, accepted, strict=True):
        for at, row in enumerate(line, first):
            page = pages[2 * s + at // PAGE] if s >= 0 and 0 <= at < 2 * PAGE else -1
            for pool, of in zip(exact, rows, strict=True):
                if page >= 0:
                    pool[:, page, :, at % PAGE] = of[:, row]
    commit(*want, places, table(owners), *rows, kept, table(start))
    commit_triton(*pools, places, table(owners), *rows, kept, table(start))
    for found in (pools, want):
        for got, of in zip(found, exact, strict=True):
            torch.testing.assert_close(got, of, rtol=0, atol=0, equal_nan=True)


def test_commit_does_not_write_past_the_table():
    """The pool goes on, and so does the memory behind the table's line."""
    pools, places = [torch.zeros(1, 3, 1, PAGE, 16, device=DEVICE) for _ in "kv"], table([[1, 2]])
    rows = [torch.ones(1, 5, 1, 16, device=DEVICE) for _ in "kv"]
    commit_triton(*pools, places[:, :1], table([0]), *rows, table([[0, 1, 2]]), table([PAGE - 1]))
    assert pools[0].sum(-1).flatten().nonzero().flatten().tolist() == [2 * PAGE - 1]
