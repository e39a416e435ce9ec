"""The bigram correction: kernel against twin, what it may not do to a tree, and trees grown from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels import PassPlan, Rows, draft_tree, rerank
from orthrus_kernels.grow import grow_triton
from orthrus_kernels.rerank import rerank_triton

VOCABULARY = 50


def candidates(p, k, seed, rank=6, dtype=torch.float32):
    """Scores, ids, root, tables, scale: candidates take 0.9 of the probability."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(p, k, generator=g).sort(-1, descending=True).values.log_softmax(-1) + math.log(0.9)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=g)[:k] for _ in range(p)])
    tables = [torch.randn(VOCABULARY, rank, generator=g).to(dtype) for _ in "uw"]
    root = torch.randint(0, VOCABULARY, (1,), generator=g, dtype=torch.int32)
    return scores, ids, root, *tables, torch.tensor([0.7])


def kernel(arguments, known):
    found = rerank_triton(*(t.to(DEVICE) for t in arguments), known)
    return tuple(t.cpu() for t in found)


@pytest.mark.parametrize("known", [True, False])
def test_by_hand(known):
    """Two candidates of two positions, a table of rank 1."""
    scores, ids = torch.tensor([[0.5, 0.25], [0.6, 0.4]]).log(), torch.tensor([[3, 5], [4, 2]])
    before, after = torch.zeros(8, 1), torch.zeros(8, 1)
    before[[7, 3, 5], 0] = torch.tensor([1.0, 2.0, 0.0])
    after[[5, 2], 0] = math.log(4)
    root, scale = torch.tensor([7], dtype=torch.int32), torch.ones(1)
    found, order = rerank(scores, ids, root, before, after, scale, known)
    # position 0 behind token 7: 5 weighs 4 times as much, the rest 0.25 as before
    want = [0.5, 0.25] if known else [1.0 / 1.75, 0.5 / 1.75]
    assert found[0, 0].exp().tolist() == pytest.approx(want, rel=1e-5)
    assert order[0, 0].tolist() == ([0, 1] if known else [1, 0])
    # position 1 behind 3: 2 weighs 16 times as much; behind 5 nothing changes
    assert order[1].tolist() == [[1, 0], [0, 1]]
    assert found[1, 0].exp().tolist() == pytest.approx([6.4 / 7, 0.6 / 7], rel=1e-4)
    assert found[1, 1].exp().tolist() == pytest.approx([0.6, 0.4], rel=1e-4)


@examples(20)
@given(p=st.integers(1, 5), k=st.integers(1, 9), seed=st.integers(0, 10**6), known=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_kernel_and_twin(p, k, seed, known, dtype):
    arguments = candidates(p, k, seed, dtype=dtype)
    scores, order = rerank(*arguments, known)
    got, got_order = kernel(arguments, known)
    torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(got_order.sort(-1).values, torch.arange(k).expand(p, k, k).int()), "a permutation"
    assert torch.equal(got, got.sort(-1, descending=True).values) and (got <= 0).all()
    far = (scores[..., 1:] - scores[..., :-1]).abs().amin(-1) > 1e-4 if k > 1 else torch.ones(p, k).bool()
    assert torch.equal(got_order[far], order[far])
    total = got.exp().sum(-1)
    assert (total < 1 + 1e-4).all(), "with what is not among the candidates it is 1"


@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_what_is_not_possible_stays_so(nothing):
    """Filtered or damaged candidates rank last, whatever the tables say; every order is a permutation."""
    arguments = candidates(3, 6, 1)
    arguments[0][:, 4:] = nothing
    for scores, order in (rerank(*arguments, False), kernel(arguments, False)):
        assert torch.isneginf(scores[..., -1]).all() and (order[..., 4:] >= 4).all()
        assert torch.equal(order.sort(-1).values, torch.arange(6).expand(3, 6, 6).int())


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_a_temperature_near_0_leaves_one_candidate(scale):
    """No sum overflows: the best one keeps all the probability, in twin and kernel."""
    arguments = (*candidates(4, 6, 3)[:5], torch.tensor([scale]))
    scores, order = rerank(*arguments, False)
    got, got_order = kernel(arguments, False)
    best = scores[..., 0] > math.log(0.5)
    assert best.float().mean() > 0.8 and torch.equal(best, got[..., 0] > math.log(0.5))
    assert torch.equal(order[..., 0][best], got_order[..., 0][best]) and not got.isnan().any()


def test_without_tables_of_any_size_nothing_changes():
    arguments = candidates(4, 5, 2)
    arguments[3].zero_()
    scores, order = rerank(*arguments, False)
    torch.testing.assert_close(scores, arguments[0][:, None].expand(-1, 5, -1))
    assert torch.equal(order, torch.arange(5).expand(4, 5, 5).int())


@examples(10)
@given(p=st.integers(1, 6), k=st.integers(2, 6), nodes=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_a_tree_grown_from_it(p, k, nodes, seed):
    """The kernel's tree is the twin's, and every node is where the scores say."""
    nodes = min(nodes, p * k)
    arguments = candidates(p, k, seed)
    scores, order = rerank(*arguments, False)
    ids = arguments[1]
    tree = draft_tree(7, scores, ids, nodes, order=order)
    plan = PassPlan.of(Rows.chain([0] * (nodes + 1), 0), DEVICE)
    state = torch.tensor([[20, 7, 9, 0]], dtype=torch.int32, device=DEVICE)
    of = torch.zeros(nodes + 1, device=DEVICE)
    grow_triton(plan, of, state, scores.to(DEVICE), ids.to(DEVICE), order.to(DEVICE))
    assert plan.tokens.tolist() == tree.tokens and plan.parents.tolist() == tree.parents
    assert of.tolist() == tree.scores
    which = [0]
    for node in range(1, len(tree)):
        parent, depth = tree.parents[node], tree.depths[node]
        mine = ids[depth - 1].tolist().index(tree.tokens[node])
        rank = order[depth - 1, which[parent]].tolist().index(mine)
        step = scores[depth - 1, which[parent], rank]
        assert tree.scores[node] == (scores.new_tensor(tree.scores[parent]) + step).item()
        which.append(mine)
