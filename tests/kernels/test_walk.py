"""The end of a cycle: the kernel walks as the twin does, place by place, and both as the definition says."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels.layout import RECORD, Record, State
from orthrus_kernels.walk import walk, walk_triton

NAN = float("nan")
BAD = (NAN, float("inf"), float("-inf"))
SLOTS, FAR, ROOM = 7, 10_000, 93  # positions of a history: longer texts are cut there
BOTH = pytest.mark.parametrize("how, device", [(walk_triton, DEVICE), (walk, "cpu")])


class Forest(NamedTuple):
    """The trees of the seats of a cycle, as `walk` takes them. Row i's logit is i."""

    states: list[list[int]]
    slots: list[int]
    first: list[int]
    tokens: list[int]
    parents: list[int]
    choices: list[int]
    ends: list[list[int]]  # of each slot
    sums: list[float]
    nodes: int  # N


def run(forest, how=walk_triton, device=DEVICE):
    """(states, history, accepted, start, record) behind a walk, all lists. What is not written: 66, 9, -5 and
    77."""

    def table(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    seats, n, rows = len(forest.slots), forest.nodes, torch.arange(len(forest.tokens), device=device)
    written = table([[9] * n] * seats), table([-5] * seats), table([[77] * (RECORD + 3 * n)] * seats)
    width = 1 + max(map(len, forest.ends))
    ends = table([[*of, *[-1] * (width - len(of))] for of in forest.ends])
    history = table([[66] * ROOM] * len(forest.states))
    state, names = table(forest.states), table(forest.tokens, torch.int64)
    chosen = table(forest.choices, torch.int64)
    how(
        state, table(forest.slots), table(forest.first), names, table(forest.parents), chosen, rows.float(),
        table(forest.sums, torch.float32), ends, history, *written,
    )  # fmt: skip
    return [t.tolist() for t in (state, history, *written)]


def agreed(forest, node, last):
    """The first child of a node, of nodes before `last`, that carries the choice at it; None without one."""
    wanted = node, forest.choices[node]
    return next((i for i in range(node + 1, last) if (forest.parents[i], forest.tokens[i]) == wanted), None)


def by_definition(forest, seat):
    """(path, is it damaged, has the text ended): of the tree of a seat."""
    node, last = forest.first[seat : seat + 2]
    state, path = forest.states[forest.slots[seat]], []
    if state[State.FINISHED]:
        return path, False, True
    while node is not None and node < last and state[State.START] + len(path) < state[State.ROOM]:
        if forest.sums[node] in BAD or forest.sums[node] != forest.sums[node]:
            return path, True, True
        path.append(node)
        if forest.choices[node] in forest.ends[forest.slots[seat]] or len(path) >= state[State.LEFT]:
            return path, False, True
        node = agreed(forest, node, last)
    return path, False, False


@st.composite
def forests(draw, most_seats=4):
    """Up to four texts, in seats in any order over more slots; empty seats, which have rows of padding as
    those before the first tree and behind the last one. Three tokens only, so that walks are long, and 0 or
    1 may end some texts. Some texts have finished, and the pages of some end in the walk."""
    seats = draw(st.integers(1, most_seats))
    slots = draw(st.permutations(range(SLOTS)))[:seats]
    numbers = st.lists(st.integers(-3, 3), min_size=len(State), max_size=len(State))
    states = draw(st.lists(numbers, min_size=SLOTS, max_size=SLOTS))
    first = [draw(st.integers(0, 2))]
    parents, sums = [draw(st.integers(-1, 9)) for _ in range(first[0])], [NAN] * first[0]
    for seat, slot in enumerate(slots):
        row = first[-1]
        if draw(st.integers(0, 3)) == 0:
            slots[seat], size = -1, draw(st.integers(0, 3))
            parents, sums = parents + [row] * size, sums + [NAN] * size
        else:
            size = draw(st.integers(1, 24))
            parents += [-1] + [row + draw(st.integers(0, i - 1)) for i in range(1, size)]
            sums += [2.0 * i for i in range(row, row + size)]
            start = draw(st.integers(0, 90))
            states[slot] = [
                start, 2, draw(st.integers(1, 8)), draw(st.sampled_from([0, 0, 0, 1])),
                start + draw(st.sampled_from([FAR, FAR, 0, 1, 2, 3])), size,
            ]  # fmt: skip
        first.append(row + size)
    behind = draw(st.integers(0, 2))
    parents, sums = parents + [first[-1] - 1] * behind, sums + [NAN] * behind
    for row in draw(st.lists(st.integers(0, len(sums) - 1), max_size=3)) if sums else []:
        sums[row] = draw(st.sampled_from(BAD))
    few = st.lists(st.integers(0, 2), min_size=len(sums), max_size=len(sums))
    own = st.lists(st.integers(0, 1), max_size=2)
    ends, nodes = draw(st.lists(own, min_size=SLOTS, max_size=SLOTS)), draw(st.integers(24, 40))
    return Forest(states, slots, first, draw(few), parents, draw(few), ends, sums, nodes)


@examples(80)
@given(forest=forests())
def test_a_cycle_keeps_the_walk_up_to_an_end(forest):
    found = run(forest)
    assert found == run(forest, walk, "cpu"), "the twin"
    after, histories, every, starts, records = found
    seated = [slot for slot in forest.slots if slot >= 0]
    nobody = [s for s in range(SLOTS) if s not in seated]
    assert all(after[s] == forest.states[s] and set(histories[s]) == {66} for s in nobody), (
        "nobody's business"
    )
    for b, (slot, accepted, at, record) in enumerate(zip(forest.slots, every, starts, records, strict=True)):
        path, damaged, finished = ([], False, False) if slot < 0 else by_definition(forest, b)
        kept, text, row = len(path), [forest.choices[node] for node in path], forest.first[b]
        assert accepted == path + [-1] * (forest.nodes - kept) and record[Record.KEPT] == kept
        parts = torch.tensor(record[RECORD:], dtype=torch.int32).view(3, forest.nodes)
        assert parts[0, :kept].tolist() == text and parts[2, :kept].tolist() == [i - row for i in path]
        assert parts[1, :kept].view(torch.float32).tolist() == [-float(node) for node in path]
        untouched = set(record[Record.BEGAN : RECORD] + parts[:, kept:].flatten().tolist())
        assert untouched <= {77} and record[Record.DRAFTED] == 77
        if slot < 0:
            assert at == -5 and record[1:RECORD] == [77] * (RECORD - 1)
            continue
        start, root, left, *rest = forest.states[slot]
        assert histories[slot] == ([66] * (start + 1) + text + [66] * ROOM)[:ROOM]
        assert after[slot] == [start + kept, [root, *text][-1], left - kept, int(finished), *rest[1:]]
        assert at == start and record[: Record.DRAFTED] == [kept, int(finished), int(damaged)]
        assert record[Record.NODES] == forest.first[b + 1] - row


def alone(state, tokens, parents, choices, sums=None):
    """A text alone, with room."""
    n = len(tokens)
    whole = [state + [FAR, n]]
    return Forest(whole, [0], [0, n], tokens, parents, choices, [[]], sums or [2.0 * i for i in range(n)], n)


@BOTH
@examples(40)
@given(forest=forests(most_seats=1).filter(lambda f: f.slots[0] >= 0), cut=st.integers(0, 23))
@example(forest=alone([10, 4, 9, 0], [4, 5, 6, 7], [-1, 0, 1, 2], [5, 6, 7, 8]), cut=2)
def test_a_text_whose_pages_end_goes_on_when_it_has_more(how, device, forest, cut):
    """Cut anywhere in its path, before its first token and behind its last one too: both walks together keep
    what one would have kept. Few of the drawn paths are long, but the example's is."""
    forest = deepcopy(forest)  # an example is used again
    (slot,), (row, last) = forest.slots, forest.first
    start, *_ = forest.states[slot]
    forest.states[slot][State.ROOM] = FAR
    pages = cut % (2 + len(by_definition(forest, 0)[0]))
    whole, told, (path,), _, (record,) = run(forest, how, device)
    forest.states[slot][State.ROOM] = start + pages
    between, before, (begun,), (at,), (part,) = run(forest, how, device)
    head, path = begun[: part[0]], path[: record[0]]
    if len(path) > pages:
        assert part[: Record.DRAFTED] == [pages, 0, 0], "neither finished nor damaged"
    node = agreed(forest, head[-1], last) if head else row
    if node is not None and not between[slot][State.FINISHED]:
        between[slot][State.ROOM] = FAR
        forest.parents[node] = -1
        between, behind, (more,), (at,), (end,) = run(
            forest._replace(states=between, first=[node, last]), how, device
        )
        assert head + more[: end[0]] == path and at == start + len(head)
        parts = before[slot][: at + 1] + behind[slot][at + 1 :]
        assert parts == told[slot]
        for i in (0, 1):  # tokens and log-probabilities
            parts = [r[RECORD + i * forest.nodes :][: r[0]] for r in (part, end, record)]
            assert parts[0] + parts[1] == parts[2]
        assert end[1:3] == record[1:3]
    else:
        assert (begun[: part[0]], part[1:3]) == (path, record[1:3])
    between[slot][State.ROOM] = FAR
    assert between == whole


@BOTH
def test_a_surplus_cycle_changes_nothing(how, device):
    (state,), _, (accepted,), _, (record,) = run(alone([10, 4, 3, 1], [4, 5], [-1, 0], [5, 6]), how, device)
    assert state == [10, 4, 3, 1, FAR, 2] and accepted == [-1, -1] and record[:3] == [0, 1, 0]


@BOTH
def test_damaged_logits_end_it_where_the_path_meets_them(how, device):
    for bad in BAD:
        (state,), _, (accepted,), _, (record,) = run(
            alone([10, 4, 9, 0], [4, 5, 6], [-1, 0, 1], [5, 6, 7], [0, bad, 0]), how, device
        )
        assert state[:4] == [11, 5, 8, 1] and accepted == [0, -1, -1] and record[:3] == [1, 1, 1]
    off = alone([10, 4, 9, 0], [4, 5, 6], [-1, 0, 0], [5, 9, 7], [0, 0, BAD[0]])
    *_, (record,) = run(off, how, device)
    assert record[:3] == [2, 0, 0], "a node off the path"
