"""The end of a cycle: the kernel walks as the twin does, place by place, and both as the definition says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels.layout import RECORD, Record
from orthrus_kernels.walk import walk, walk_triton

BAD = (float("nan"), float("inf"), float("-inf"))


def run(state, tokens, parents, choices, ends=(), sums=None, how=walk_triton, device=DEVICE):
    """(states, accepted, start, record) behind a walk, all lists. state: a line a sequence; tokens, parents,
    choices of all nodes side by side. Row i's logit is i, its log-sum-exp 2 i."""
    n, rows = len(tokens), torch.arange(len(tokens), device=device).float()

    def table(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    per = n // len(state)
    written = table([[9] * per] * len(state)), table([-5] * len(state))
    state, record = table(state), table([[77] * (RECORD + 3 * per)] * len(state))
    sums = 2 * rows if sums is None else table(sums, torch.float32)
    names, chosen = (table(t, torch.int64) for t in (tokens, choices))
    how(state, names, table(parents), chosen, rows, sums, table(list(ends)), *written, record)
    return [t.tolist() for t in (state, *written, record)]


def by_definition(node, last, tokens, parents, choices, sums, ends, left):
    """(path, is it damaged, has the text ended): from node, of nodes before `last`."""
    path = []
    while True:
        if sums[node] in BAD or sums[node] != sums[node]:
            return path, True, True
        path.append(node)
        if choices[node] in ends or len(path) >= left:
            return path, False, True
        agreed = [i for i in range(node + 1, last) if (parents[i], tokens[i]) == (node, choices[node])]
        if not agreed:
            return path, False, False
        node = agreed[0]


@st.composite
def forests(draw):
    """(states, tokens, parents, choices, ends, log-sum-exps) of one to three sequences whose trees have as
    many nodes. Three tokens only, so that walks are long, and 0 or 1 may end a text."""
    sequences, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    few = st.lists(st.integers(0, 2), min_size=sequences * n, max_size=sequences * n)
    tokens, choices, parents, states = draw(few), draw(few), [], []
    for first in range(0, sequences * n, n):
        parents += [-1] + [first + draw(st.integers(0, i - 1)) for i in range(1, n)]
        left, finished = draw(st.integers(1, 8)), draw(st.sampled_from([0, 0, 0, 1]))
        states.append([draw(st.integers(0, 90)), tokens[first], left, finished])
    sums = [2.0 * i for i in range(sequences * n)]
    for row in draw(st.lists(st.integers(0, sequences * n - 1), max_size=3)):
        sums[row] = draw(st.sampled_from(BAD))
    return states, tokens, parents, choices, draw(st.lists(st.integers(0, 1), max_size=2)), sums


@examples(60)
@given(forest=forests())
def test_a_cycle_keeps_the_walk_up_to_an_end(forest):
    found = run(*forest)
    assert found == run(*forest, how=walk, device="cpu"), "the twin"
    states, tokens, parents, choices, ends, sums = forest
    n = len(tokens) // len(states)
    for s, ((start, root, left, over), after, accepted, first, record) in enumerate(
        zip(states, *found, strict=True)
    ):
        tree = s * n, (s + 1) * n, tokens, parents, choices, sums, ends, left
        path, damaged, finished = ([], False, True) if over else by_definition(*tree)
        kept, text = len(path), [choices[node] for node in path]
        assert after == [start + kept, [root, *text][-1], left - kept, int(finished)] and first == start
        assert accepted == path + [-1] * (n - kept)
        assert record[: Record.DRAFTED] == [kept, int(finished), int(damaged)]
        parts = torch.tensor(record[RECORD:], dtype=torch.int32).view(3, n)
        assert parts[0, :kept].tolist() == text and parts[2, :kept].tolist() == [i - s * n for i in path]
        assert parts[1, :kept].view(torch.float32).tolist() == [-float(node) for node in path]
        assert set(record[Record.DRAFTED : RECORD] + parts[:, kept:].flatten().tolist()) <= {77}


@pytest.mark.parametrize("how, device", [(walk_triton, DEVICE), (walk, "cpu")])
def test_a_surplus_cycle_changes_nothing(how, device):
    (state,), (accepted,), _, (record,) = run(
        [[10, 4, 3, 1]], [4, 5], [-1, 0], [5, 6], how=how, device=device
    )
    assert state == [10, 4, 3, 1] and accepted == [-1, -1] and record[:3] == [0, 1, 0]


@pytest.mark.parametrize("how, device", [(walk_triton, DEVICE), (walk, "cpu")])
def test_damaged_logits_end_it_where_the_path_meets_them(how, device):
    for bad in BAD:
        (state,), (accepted,), _, (record,) = run(
            [[10, 4, 9, 0]], [4, 5, 6], [-1, 0, 1], [5, 6, 7], (), [0, bad, 0], how, device
        )
        assert state == [11, 5, 8, 1] and accepted == [0, -1, -1] and record[:3] == [1, 1, 1]
    *_, (record,) = run([[10, 4, 9, 0]], [4, 5, 6], [-1, 0, 0], [5, 9, 7], (), [0, 0, BAD[0]], how, device)
    assert record[:3] == [2, 0, 0], "a node off the path"
