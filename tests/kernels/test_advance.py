"""The end of a cycle on the device against `verify`, cut on the host."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from orthrus_kernels.advance_triton import advance_triton
from strategies import parent_lists

from orthrus_kernels import verify
from orthrus_kernels.layout import RECORD


def table(values, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def run(state, tokens, parents, choices, ends=(), sums=None):
    """(state, accepted, start, record) after a cycle; node i's logit is i, its log-sum-exp 2 i."""
    n = len(tokens)
    accepted, start, record = table([9] * n), table([-5]), table([77] * (RECORD + 3 * n))
    sums = [2.0 * i for i in range(n)] if sums is None else sums
    state = table(state)
    advance_triton(
        state, table(tokens, torch.int64), table(parents), table(choices, torch.int64),
        table([float(i) for i in range(n)], torch.float32), table(sums, torch.float32), table(list(ends)),
        accepted, start, record,
    )  # fmt: skip
    return state.tolist(), accepted.tolist(), int(start), record.cpu()


@settings(max_examples=60)
@given(parents=parent_lists(max_nodes=40), data=st.data())
def test_a_cycle_keeps_the_walk_up_to_an_end(parents, data):
    """Three tokens only, so that walks are long, and 0 or 1 may end the text."""
    n = len(parents)
    few = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    tokens, choices, left = data.draw(few), data.draw(few), data.draw(st.integers(1, 8))
    ends = data.draw(st.lists(st.integers(0, 1), max_size=2))
    path, _ = verify(tokens, parents, choices)
    text = [choices[node] for node in path]
    cut = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
    kept = min(cut, left)
    finished = int(text[kept - 1] in ends or kept == left)
    state, accepted, start, record = run([10, tokens[0], left, 0], tokens, parents, choices, ends)
    assert state == [10 + kept, text[kept - 1], left - kept, finished] and start == 10
    assert accepted == path[:kept] + [-1] * (n - kept)
    assert record[:3].tolist() == [kept, finished, 0] and record[RECORD:][:kept].tolist() == text[:kept]
    logs = record[RECORD + n : RECORD + 2 * n].view(torch.float32)[:kept].tolist()
    assert logs == [-float(node) for node in path[:kept]]
    assert record[RECORD + 2 * n :][:kept].tolist() == path[:kept]


def test_a_surplus_cycle_changes_nothing():
    state, accepted, start, record = run([10, 4, 3, 1], [4, 5], [-1, 0], [5, 6])
    assert state == [10, 4, 3, 1] and accepted == [-1, -1] and record[:3].tolist() == [0, 1, 0]


def test_damaged_logits_end_it_where_the_path_meets_them():
    nan, inf = float("nan"), float("inf")
    for bad in (nan, inf, -inf):
        state, accepted, _, record = run([10, 4, 9, 0], [4, 5, 6], [-1, 0, 1], [5, 6, 7], sums=[0, bad, 0])
        assert state == [11, 5, 8, 1] and accepted == [0, -1, -1] and record[:3].tolist() == [1, 1, 1]
    *_, record = run([10, 4, 9, 0], [4, 5, 6], [-1, 0, 0], [5, 9, 7], sums=[0, 0, nan])
    assert record[:3].tolist() == [2, 0, 0], "a node off the path"
