"""The bigram correction: kernel against twin, what it may not do to a tree, and trees grown from it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels import draft_tree, rerank
from orthrus_kernels.grow import Trees, grow_triton
from orthrus_kernels.rerank import rerank_triton

VOCABULARY = 50


def identity(offsets):
    """The calibration that changes nothing."""
    return torch.tensor([1.0, 0.0]).repeat(2, offsets, 1)


def candidates(p, k, seed, rank=6, dtype=torch.float32, slots=(0,), calibrated=False):
    """Scores, ids, roots, tables, calibration, scales, temperatures, slots: candidates take 0.9 of the
    probability."""
    g, b = torch.Generator().manual_seed(seed), len(slots)
    scores = torch.randn(b, p, k, generator=g).sort(-1, descending=True).values.log_softmax(-1)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=g)[:k] for _ in range(b * p)]).view(b, p, k)
    tables = [torch.randn(VOCABULARY, rank, generator=g).to(dtype) for _ in "uw"]
    roots = torch.randint(0, VOCABULARY, (b,), generator=g, dtype=torch.int32)
    calibration = identity(p + 1)
    if calibrated:
        calibration[..., 0] += torch.rand(2, p + 1, generator=g)
        calibration[..., 1] += torch.randn(2, p + 1, generator=g)
    settings = torch.tensor([0.7, 2.0, 0.25]), torch.tensor([0.0, 0.5, 4.0])
    slots = torch.tensor(slots, dtype=torch.int32)
    return scores + math.log(0.9), ids, roots, *tables, calibration, *settings, slots


def kernel(arguments, known, *gate):
    found = rerank_triton(*(t.to(DEVICE) for t in arguments), known, *(t.to(DEVICE) for t in gate))
    return tuple(t.cpu() for t in found)


def gated(arguments, rank, seed, dtype=torch.float32):
    """The arguments with `rank` more columns of the tables, and their gate and places."""
    g = torch.Generator().manual_seed(seed)
    b, p, _ = arguments[1].shape
    more = [torch.randn(VOCABULARY, rank, generator=g).to(dtype) for _ in "AB"]
    before, after = (torch.cat(pair, 1) for pair in zip(arguments[3:5], more, strict=True))
    gate, places = torch.randn(b, p, rank, generator=g), torch.randn(p + 1, rank, generator=g)
    return (*arguments[:3], before, after, *arguments[5:]), (gate, places)


@examples(10)
@given(slots=st.lists(st.integers(-1, 2), min_size=1, max_size=4), p=st.integers(1, 3), k=st.integers(1, 5),
       seed=st.integers(0, 10**6), known=st.booleans())  # fmt: skip
def test_a_block_is_ranked_as_it_is_alone(slots, p, k, seed, known):
    """By the root and the scale of its own text; beside it are blocks of others, and of none with a root that
    is no token."""
    drawn, (gate, places) = gated(candidates(p, k, seed, 6, slots=slots, calibrated=True), 4, seed)
    scores, ids, roots, *tables, scales, temperatures, slots = drawn
    gate[slots < 0] = math.nan  # states of padding may be anything
    roots[slots < 0] = -(2**31)
    # Columns of tables: what lies beside them is read by nobody.
    beside = torch.stack([torch.full_like(roots, 2**30), roots], 1)[:, 1]
    columns = (torch.stack([torch.full_like(x, math.nan), x], 1)[:, 1] for x in (scales, temperatures))
    settings = *tables, *columns
    for how in (rerank, rerank_triton):
        given_ = (scores, ids, beside, *settings, slots)

        def of(arguments, *gate, how=how):
            at = [t.to(DEVICE) if how is rerank_triton else t for t in (*arguments, *gate)]
            return how(*at[:9], known, *at[9:])

        together = of(given_, gate, places)
        for b, slot in enumerate(slots.tolist()):
            if slot < 0:
                assert together[0][b].isfinite().all()
                assert torch.equal(
                    together[1][b].cpu().sort(-1).values, torch.arange(k).expand(p, k, k).int()
                )
                continue
            one = slice(b, b + 1)
            alone = (
                scores[one], ids[one], roots[one], *tables, scales[slot : slot + 1],
                temperatures[slot : slot + 1], torch.zeros_like(slots[one]),
            )  # fmt: skip
            alone = of(alone, gate[one], places)
            assert torch.equal(together[0][one], alone[0]) and torch.equal(together[1][one], alone[1])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rank", [3, 70])
def test_a_gate_by_its_formula(known, rank):
    """In fp64, of one block at temperature 0: u . w + (A e * (1 + gate + place)) . (B e), by position and
    offset. 70 columns are weighed in two parts."""
    plain = candidates(3, 5, 11, calibrated=True)
    scores, ids, roots, u, w, calibration, *_ = (t.double() if t.is_floating_point() else t for t in plain)
    arguments, (gate, places) = gated(plain, rank, 12)
    front, behind = (t[:, -rank:].double() for t in arguments[3:5])
    for found, order in (rerank(*arguments, known, gate, places), kernel(arguments, known, gate, places)):
        for p in range(3):
            offset = p + (not known)
            factor, weight = calibration[0, offset]
            weighed = 1 + gate[0, p].double() + places[offset].double()
            for a in range(5):
                x = int(roots[0]) if p == 0 else int(ids[0, p - 1, a])
                change = u[x] @ w[ids[0, p]].T + (front[x] * weighed) @ behind[ids[0, p]].T
                change = torch.zeros(5) if known and p == 0 else change * plain[6][0].double()
                rest = (factor * (1 - scores[0, p].exp().sum()).log() + weight)[None]
                want = torch.cat([factor * scores[0, p] + change, rest]).log_softmax(0)[:-1]
                got = torch.empty(5).scatter(0, order[0, p, a].long(), found[0, p, a])
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@examples(10)
@given(p=st.integers(1, 4), k=st.integers(1, 6), rank=st.integers(1, 9), seed=st.integers(0, 10**6),
       known=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_kernel_and_twin_with_a_gate(p, k, rank, seed, known, dtype):
    arguments, gate = gated(candidates(p, k, seed, dtype=dtype, calibrated=True), rank, seed + 1, dtype)
    scores, order = rerank(*arguments, known, *gate)
    got, got_order = kernel(arguments, known, *gate)
    torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
    far = (scores[..., 1:] - scores[..., :-1]).abs().amin(-1) > 1e-3 if k > 1 else torch.ones(1, p, k).bool()
    assert torch.equal(got_order[far], order[far])


@pytest.mark.parametrize("known", [True, False])
def test_columns_of_zeros_change_no_bit(known):
    """Whatever the gate is: the kernel sums what the tables alone say by itself."""
    plain = candidates(4, 6, 5, slots=(0, 2), calibrated=True)
    arguments, gate = gated(plain, 7, 6)
    arguments[4][:, -7:] = 0
    with_gate, without = kernel(arguments, known, *gate), kernel(plain, known)
    assert torch.equal(with_gate[0], without[0]) and torch.equal(with_gate[1], without[1])


@pytest.mark.parametrize("known", [True, False])
def test_by_hand(known):
    """Two candidates of two positions, a table of rank 1."""
    scores, ids = torch.tensor([[[0.5, 0.25], [0.6, 0.4]]]).log(), torch.tensor([[[3, 5], [4, 2]]])
    before, after = torch.zeros(8, 1), torch.zeros(8, 1)
    before[[7, 3, 5], 0] = torch.tensor([1.0, 2.0, 0.0])
    after[[5, 2], 0] = math.log(4)
    root, slot = torch.tensor([[7], [0]], dtype=torch.int32)
    rest = identity(3), torch.ones(1), torch.zeros(1), slot
    found, order = (x[0] for x in rerank(scores, ids, root, before, after, *rest, known))
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
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), slot=st.integers(0, 1))  # fmt: skip
def test_kernel_and_twin(p, k, seed, known, dtype, slot):
    """Calibrated, as for temperature 0 and above."""
    arguments = candidates(p, k, seed, dtype=dtype, slots=(slot,), calibrated=True)
    scores, order = rerank(*arguments, known)
    got, got_order = kernel(arguments, known)
    torch.testing.assert_close(got, scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(got_order.sort(-1).values, torch.arange(k).expand(1, p, k, k).int()), "a permutation"
    assert torch.equal(got, got.sort(-1, descending=True).values) and (got <= 0).all()
    far = (scores[..., 1:] - scores[..., :-1]).abs().amin(-1) > 1e-4 if k > 1 else torch.ones(1, p, k).bool()
    assert torch.equal(got_order[far], order[far])
    total = got.exp().sum(-1)
    assert (total < 1 + 1e-4).all(), "with what is not among the candidates it is 1"


@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_what_is_not_possible_stays_so(nothing):
    """Filtered or damaged candidates rank last, whatever the tables say; every order is a permutation."""
    arguments = candidates(3, 6, 1)
    arguments[0][..., 4:] = nothing
    for scores, order in (rerank(*arguments, False), kernel(arguments, False)):
        assert torch.isneginf(scores[..., -1]).all() and (order[..., 4:] >= 4).all()
        assert torch.equal(order.sort(-1).values, torch.arange(6).expand(1, 3, 6, 6).int())


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_a_temperature_near_0_leaves_one_candidate(scale):
    """No sum overflows: the best one keeps all the probability, in twin and kernel."""
    *arguments, _, _, slots = candidates(4, 6, 3)
    arguments = *arguments, torch.tensor([scale]), 1 / torch.tensor([scale]), slots
    scores, order = rerank(*arguments, False)
    got, got_order = kernel(arguments, False)
    best = scores[..., 0] > math.log(0.5)
    assert best.float().mean() > 0.8 and torch.equal(best, got[..., 0] > math.log(0.5))
    assert torch.equal(order[..., 0][best], got_order[..., 0][best]) and not got.isnan().any()


def test_without_tables_of_any_size_nothing_changes():
    arguments = candidates(4, 5, 2)
    arguments[3].zero_()
    scores, order = rerank(*arguments, False)
    torch.testing.assert_close(scores, arguments[0][:, :, None].expand(-1, -1, 5, -1))
    assert torch.equal(order, torch.arange(5).expand(1, 4, 5, 5).int())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_calibration_by_hand(temperature, known):
    """Of each offset, and of the temperature: a factor of log-probabilities, and a weight of the rest. Where
    the root was not seen position 0 is offset 1."""
    scores, ids, roots, *_, slots = candidates(2, 3, 5)
    tables = torch.zeros(VOCABULARY, 1), torch.zeros(VOCABULARY, 1)
    calibration = torch.tensor([[[2.0, 0.1], [1.5, -0.2], [3.0, 0.4]], [[0.5, 1.0], [0.7, -1.0], [0.9, 0.3]]])
    arguments = (
        scores, ids, roots, *tables, calibration, torch.ones(1), torch.tensor([temperature]), slots
    )  # fmt: skip
    for found, order in (rerank(*arguments, known), kernel(arguments, known)):
        for p in range(2):
            factor, weight = calibration[int(temperature > 0), p + (not known)].tolist()
            shares = [math.exp(x) ** factor for x in scores[0, p].tolist()]
            rest = 0.1**factor * math.exp(weight)
            want = [share / (sum(shares) + rest) for share in shares]
            assert found[0, p, 1].exp().tolist() == pytest.approx(want, rel=1e-4)
            assert order[0, p, 1].tolist() == [0, 1, 2]


@examples(10)
@given(p=st.integers(1, 6), k=st.integers(2, 6), nodes=st.integers(1, 30), seed=st.integers(0, 10**6),
       chain=st.booleans())  # fmt: skip
def test_a_tree_grown_from_it(p, k, nodes, seed, chain):
    """The kernel's tree is the twin's, and every node is where the scores say."""
    nodes = min(nodes, p * (1 if chain else k))  # at least so many paths
    arguments = candidates(p, k, seed)
    scores, order = (x[0] for x in rerank(*arguments, False))
    ids = arguments[1][0]
    tree = draft_tree(7, scores, ids, nodes, order, 1 if chain else None)
    state = torch.tensor([[20, 7, 9, 0, 99, 99]], dtype=torch.int32, device=DEVICE)
    trees, slots = Trees.new(1, nodes + 1, DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    given_ = (t[None].to(DEVICE) for t in (scores, ids, order))
    grow_triton(trees, state, slots, *given_, chain=chain)
    assert trees.tokens[0].tolist() == tree.tokens and trees.parents[0].tolist() == tree.parents
    assert trees.depths[0].tolist() == tree.depths and trees.scores[0].tolist() == tree.scores
    which = [0]
    for node in range(1, len(tree)):
        parent, depth = tree.parents[node], tree.depths[node]
        mine = ids[depth - 1].tolist().index(tree.tokens[node])
        rank = order[depth - 1, which[parent]].tolist().index(mine)
        step = scores[depth - 1, which[parent], rank]
        assert tree.scores[node] == (scores.new_tensor(tree.scores[parent]) + step).item()
        which.append(mine)
