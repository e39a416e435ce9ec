"""What penalties see behind each node of a draft tree: kernel, twin and definition, exactly."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from strategies import parent_lists

from orthrus_kernels import Sampling, SamplingTable
from orthrus_kernels.seen import counts_of, seen_rows, seen_rows_triton

V = 11
TEXT = st.lists(st.integers(0, V - 1), min_size=1, max_size=9)


@examples(40)
@given(parents=st.lists(parent_lists(), min_size=1, max_size=2), data=st.data())
def test_the_text_and_a_nodes_own_path(parents, data):
    """One tree, or two side by side, of texts with a penalty or without, or of none; few tokens: paths hold
    them twice. The texts' last tokens are the roots."""
    above = [p if p < 0 else p + s * len(parents[0]) for s, tree in enumerate(parents) for p in tree]
    n = len(above)
    tokens = data.draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n))
    texts = [data.draw(st.tuples(TEXT, st.lists(st.integers(0, V - 1), max_size=9))) for _ in range(3)]
    table = SamplingTable(3, V, DEVICE)
    for slot, how in enumerate(({"presence_penalty": 1.0}, {}, {"repetition_penalty": 1.5})):
        table.put(slot, Sampling(**how))
    counts = torch.stack([counts_of([*prompt, *more], len(prompt), V) for prompt, more in texts]).to(DEVICE)
    of = [data.draw(st.integers(-1, 2)) for _ in parents]
    slots = [slot for slot, tree in zip(of, parents, strict=True) for _ in tree]
    rows, trees = torch.tensor(slots, dtype=torch.int32), (torch.tensor(tokens), torch.tensor(above).int())
    rows, trees = rows.to(DEVICE), [t.to(DEVICE) for t in trees]
    before = counts.clone()
    found = [
        op(counts, table, rows, *given_).tolist()
        for op in (seen_rows, seen_rows_triton)
        for given_ in (trees, ())
    ]
    assert torch.equal(counts, before), "the texts' counts are not changed"
    for row, slot in enumerate(slots):
        if slot in (-1, 1):
            continue
        (prompt, generated), path, node = texts[slot], [], row
        while above[node] >= 0:
            path.append(tokens[node])
            node = above[node]
        for got, told in zip(found, 2 * ([*generated, *path], generated), strict=True):
            assert got[row] == [2 * told.count(v) + (v in prompt) for v in range(V)]
