"""Attention: right against a dense fp64 softmax under `visible`, and the same bits for every split, index,
tree and neighbour.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import committed, paged
from plans import laid
from strategies import KINDS, hard, mixed_passes

from orthrus_kernels import Rows, key_segments, visible
from orthrus_kernels import attention as attention_of

HEADS, GROUPS, DIM = 4, 2, 16
LIMIT = {
    torch.float32: 3e-6,
    torch.bfloat16: 1.5e-2,
}  # of the largest output; bf16 rounds probabilities and output


def attention(q, k, v, k_cache, v_cache, rows: Rows, scale: float) -> torch.Tensor:
    """The twin with its tables, from caches [B, G, S, D] whose pages lie in any order."""
    return attention_of(q, k, v, *paged(k_cache, v_cache, rows.contexts), laid(rows, q, k), scale)


def inputs(rows: Rows, dtype=torch.float32, kind="normal", seed=0, room=64):
    """Random q, k, v of a pass and caches whose uncommitted slots are NaN."""
    context = max(rows.contexts.values())
    size = (max(rows.contexts) + 1, GROUPS, context + room, DIM)
    q = hard(kind, len(rows), HEADS, DIM, seed=seed).to(dtype)
    k, v = (hard(kind, len(rows), GROUPS, DIM, seed=seed + s).to(dtype) for s in (1, 2))
    k_cache, v_cache = (hard(kind, *size, seed=seed + s).to(dtype) for s in (3, 4))
    for sequence, length in rows.contexts.items():
        k_cache[sequence, :, length:] = v_cache[sequence, :, length:] = float("nan")
    return q, k, v, k_cache, v_cache


def dense(rows, q, k, v, k_cache, v_cache, scale):
    """The definition: one softmax over all keys a row sees, in fp64."""
    seen, out = visible(rows), []
    for i in range(len(rows)):
        s = rows.sequences[i]
        context, mine = rows.contexts[s], seen[i].nonzero().flatten()
        keys = (
            torch.cat([k_cache[s, :, :context], k[mine].transpose(0, 1)], 1)
            .double()
            .repeat_interleave(HEADS // GROUPS, 0)
        )
        values = (
            torch.cat([v_cache[s, :, :context], v[mine].transpose(0, 1)], 1)
            .double()
            .repeat_interleave(HEADS // GROUPS, 0)
        )
        weights = torch.softmax(torch.einsum("hd,hsd->hs", q[i].double(), keys) * scale, -1)
        out.append(torch.einsum("hs,hsd->hd", weights, values))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@settings(max_examples=25)
@given(rows=mixed_passes(max_start=300), seed=st.integers(0, 99))
def test_against_dense_fp64(dtype, rows, seed):
    args = inputs(rows, dtype, seed=seed)
    want = dense(rows, *args, 0.25)
    assert ((attention(*args, rows, 0.25).double() - want).abs().max() / want.abs().max()).item() < LIMIT[
        dtype
    ]


@settings(max_examples=15)
@given(st.data())
def test_several_sequences_in_one_pass(data):
    alone = [data.draw(mixed_passes(sequence=s)) for s in range(2)]
    rows = Rows.batch(alone)
    args = inputs(rows, room=64)
    got = attention(*args, rows, 0.25)
    for s, single in enumerate(alone):
        mine = [i for i in range(len(rows)) if rows.sequences[i] == s]
        part = attention(*(a[mine] for a in args[:3]), *args[3:], single, 0.25)
        assert torch.equal(got[mine], part)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [0, 1, 127, 254, 255, 256, 257, 500])
def test_row_bits_do_not_depend_on_the_split(context, kind, dtype):
    """A row after `context` cached keys: alone, or with 1, 2, 9, ... of those keys still in flight."""
    total = context + 40
    q = hard(kind, total, HEADS, DIM, seed=7).to(dtype)
    k, v = (hard(kind, total, GROUPS, DIM, seed=s).to(dtype) for s in (8, 9))

    def at(row: int, cached: int) -> torch.Tensor:
        """Row `row` when positions below `cached` are committed and a chain from there on is in flight, 3
        rows past it too.
        """
        k_cache = v_cache = torch.full((1, GROUPS, total, DIM), float("nan"), dtype=dtype)
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        k_cache[0, :, :cached], v_cache[0, :, :cached] = (
            k[:cached].transpose(0, 1),
            v[:cached].transpose(0, 1),
        )
        flight = slice(cached, min(row + 4, total))
        rows = Rows.chain([1] * len(q[flight]), cached)
        return attention(q[flight], k[flight], v[flight], k_cache, v_cache, rows, 0.25)[row - cached]

    for row in (context, context + 1, context + 35):
        alone = at(row, row)
        for cached in {context, max(row - 1, 0), max(row - 9, 0), max(row - 33, 0)}:
            assert torch.equal(at(row, min(cached, row)), alone), (row, cached)


@settings(max_examples=30)
@given(
    rows=mixed_passes(max_start=270),
    dtype=st.sampled_from(list(LIMIT)),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_tree_node_equals_decoding_its_path_alone(rows, dtype, kind, data):
    """Commit a node's ancestors and run it as the only row: the same bits as inside the tree beside all other
    rows.
    """
    q, k, v, k_cache, v_cache = inputs(rows, dtype, kind)
    node = data.draw(st.integers(0, rows.n_ar - 1))
    inside = attention(q, k, v, k_cache, v_cache, rows, 0.25)[node]
    above, start = rows.ancestors(node), rows.contexts[0]
    caches = committed(k_cache, v_cache, k, v, above, start)
    alone = Rows.chain([1], start + len(above))
    assert torch.equal(attention(q[[node]], k[[node]], v[[node]], *caches, alone, 0.25)[0], inside)


@settings(max_examples=15)
@given(rows=mixed_passes(max_start=300), dtype=st.sampled_from(list(LIMIT)))
def test_where_pages_lie_changes_no_bit(rows, dtype):
    """One behind the other, or in any order among foreign pages, which hold NaN."""
    q, k, v, *caches = inputs(rows, dtype)
    apart = attention_of(q, k, v, *paged(*caches, rows.contexts, shuffled=False), laid(rows, q, k), 0.25)
    assert torch.equal(attention(q, k, v, *caches, rows, 0.25), apart)


@settings(max_examples=20)
@given(rows=mixed_passes(), seed=st.integers(0, 99))
def test_hidden_rows_cannot_matter(rows, seed):
    """Change every key and value that row i may not see: its bits stay. Change a seen one: they do not."""
    q, k, v, k_cache, v_cache = inputs(rows, seed=seed)
    base, seen = attention(q, k, v, k_cache, v_cache, rows, 0.25), visible(rows)
    for i in range(0, len(rows), 3):
        k2, v2 = k.clone(), v.clone()
        k2[~seen[i]], v2[~seen[i]] = 9.0, -9.0
        assert torch.equal(attention(q, k2, v2, k_cache, v_cache, rows, 0.25)[i], base[i])
        j = seen[i].nonzero().flatten()[0]
        v3 = v.clone()
        v3[j] += 100.0
        assert not torch.equal(attention(q, k, v3, k_cache, v_cache, rows, 0.25)[i], base[i])


@given(st.integers(1, 200_000))
def test_key_cuts_are_one_constant_list(end):
    cuts = list(key_segments(end))
    assert cuts[0][0] == 0 and cuts[-1][0] < end <= cuts[-1][1]
    assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
    assert cuts == list(key_segments(200_000))[: len(cuts)], (
        "the end chooses how many segments, never where they lie"
    )
