"""What a repetition penalty sees behind each node of a draft tree: kernel, twin and definition, exactly."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from strategies import parent_lists

from orthrus_kernels.seen import seen_rows, seen_rows_triton

V = 11


@examples(40)
@given(parents=st.lists(parent_lists(), min_size=1, max_size=2), data=st.data())
def test_the_text_and_a_nodes_own_path(parents, data):
    """One tree, or two side by side, of any of three texts or of none; few tokens: paths hold them twice."""
    above = [p if p < 0 else p + s * len(parents[0]) for s, tree in enumerate(parents) for p in tree]
    n = len(above)
    tokens = data.draw(st.lists(st.integers(0, V - 1), min_size=n, max_size=n))
    counts = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 1, 3]), min_size=3 * V, max_size=3 * V)))
    counts = counts.view(3, V)
    of = [data.draw(st.integers(-1, 2)) for _ in parents]
    slots = [slot for slot, tree in zip(of, parents, strict=True) for _ in tree]
    given_ = (
        counts.int(), torch.tensor(slots, dtype=torch.int32), torch.tensor(tokens),
        torch.tensor(above, dtype=torch.int32),
    )  # fmt: skip
    before = given_[0].clone()
    got = seen_rows_triton(*(t.to(DEVICE) for t in given_)).cpu()
    assert got.dtype == torch.bool and torch.equal(got, seen_rows(*given_))
    assert torch.equal(given_[0], before), "the text's counts are not changed"
    texts = seen_rows_triton(*(t.to(DEVICE) for t in given_[:2])).cpu()
    assert torch.equal(texts, seen_rows(*given_[:2]))
    for row, slot in enumerate(slots):
        names, node = {v for v in range(V) if slot >= 0 and counts[slot, v] > 0}, row
        assert texts[row].nonzero().flatten().tolist() == sorted(names)
        while node >= 0 and slot >= 0:
            names.add(tokens[node])
            node = above[node]
        assert got[row].nonzero().flatten().tolist() == sorted(names)
