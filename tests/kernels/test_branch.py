"""A chain added to draft trees: the kernel does what the twin does, and both keep the likeliest nodes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels.branch import branch, branch_triton
from orthrus_kernels.grow import Trees, grow
from orthrus_kernels.layout import State

ROOT = 3


def grown(draws, nodes):
    """Trees of `nodes` nodes from (log-probabilities, ids), each below ROOT."""
    trees, seats = Trees.new(len(draws), nodes, "cpu"), len(draws)
    state = torch.full((1, len(State)), ROOT, dtype=torch.int32)
    scores, ids = (torch.stack(parts) for parts in zip(*draws, strict=True))
    grow(trees, state, torch.zeros(seats, dtype=torch.int32), scores, ids)
    return trees


def branched(trees, slots, drafts, scores, how=branch_triton, device=DEVICE):
    """Copies of trees with chains, as lists by seat."""
    parts = trees.tokens, trees.parents, trees.depths, trees.scores
    made = Trees(*(t.clone().to(device) for t in parts))
    slots = torch.tensor(slots, dtype=torch.int32, device=device)
    how(made, slots, drafts.to(device), scores.to(device))
    made = made.tokens, made.parents, made.depths, made.scores
    return [[t[b].tolist() for t in made] for b in range(len(slots))]


def paths(tokens, parents, depths, scores):
    """The score of each path, by its tokens; of paths that are possible, each of which stands once."""
    found, told = {}, [()]
    for node in range(1, len(tokens)):
        assert 0 <= parents[node] < node and depths[node] == depths[parents[node]] + 1
        told.append((*told[parents[node]], tokens[node]))
        if scores[node] > float("-inf"):
            assert told[node] not in found and scores[node] <= scores[parents[node]]
            found[told[node]] = scores[node]
    assert (tokens[0], parents[0], depths[0], scores[0]) == (ROOT, -1, 0, 0.0)
    return found


@examples(80)
@given(
    depth=st.integers(1, 6), width=st.integers(1, 4), nodes=st.integers(1, 40), length=st.integers(1, 9),
    seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    agrees=st.sampled_from([1.0, 0.9, 0.5, 0.01]), empty=st.integers(0, 5),
)  # fmt: skip
def test_the_likeliest_nodes_of_both_stay(depth, width, nodes, length, seed, share, agrees, empty):
    """Chains that begin as the likeliest path of a tree does, or elsewhere, and go on behind it."""
    g = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(3):
        ids = torch.stack([torch.randperm(8, generator=g)[:width] for _ in range(depth)])
        logits = torch.randn(depth, width, generator=g).round()  # ties
        draws.append((logits.log_softmax(-1).sort(-1, descending=True).values, ids))
    trees = grown(draws, nodes)
    drafts = torch.randint(0, 8, (3, length), generator=g)
    same = int(share * min(depth, length))
    for b, (_, ids) in enumerate(draws):
        drafts[b, :same] = ids[:same, 0]
    scores = torch.full((3, length), agrees).log().cumsum(1)
    slots = [-1 if b == empty else 5 - b for b in range(3)]
    found = branched(trees, slots, drafts, scores)
    assert found == branched(trees, slots, drafts, scores, branch, "cpu"), "the twin"
    for b, after in enumerate(found):
        before = [t[b].tolist() for t in (trees.tokens, trees.parents, trees.depths, trees.scores)]
        if slots[b] < 0:
            assert after == before
            continue
        wanted, chain = paths(*before), drafts[b].tolist()
        for j in range(1, length + 1):
            path = tuple(chain[:j])
            wanted[path] = max(wanted.get(path, float("-inf")), scores[b, j - 1].item())
        kept, ranked = paths(*after), sorted(wanted.values(), reverse=True)
        assert all(wanted[path] == score for path, score in kept.items())
        assert sorted(kept.values(), reverse=True) == ranked[: nodes - 1]
        assert after[3] == sorted(after[3], reverse=True), "any first nodes are a tree"


@pytest.mark.parametrize("how, device", [(branch_triton, DEVICE), (branch, "cpu")])
def test_a_known_branch(how, device):
    """Below a node that both have, whose child is not the chain's; the least likely node goes."""
    probabilities, ids = torch.tensor([[0.6, 0.4], [0.7, 0.3]]), torch.tensor([[10, 11], [20, 21]])
    trees = grown([(probabilities.log(), ids)], 6)
    assert trees.tokens[0].tolist() == [3, 10, 20, 11, 20, 21]
    drafts, scores = torch.tensor([[11, 7, 8]]), torch.tensor([[0.9, 0.8, 0.1]]).log()
    ((tokens, parents, depths, likely),) = branched(trees, [0], drafts, scores, how, device)
    assert tokens == [3, 11, 7, 10, 20, 20] and parents == [-1, 0, 1, 0, 3, 1]
    assert depths == [0, 1, 2, 1, 2, 2]
    assert torch.tensor(likely).exp().tolist() == pytest.approx([1, 0.9, 0.8, 0.6, 0.42, 0.28])


def test_what_is_not_added():
    trees, slots = Trees.new(2, 4, "cpu"), torch.zeros(2, dtype=torch.int32)
    for drafts, scores in ((torch.zeros(1, 3), torch.zeros(1, 3)), (torch.zeros(2, 3), torch.zeros(2, 2))):
        with pytest.raises(AssertionError):
            branch_triton(trees, slots, drafts.long(), scores)
