"""bench.strong: simulated traces have the acceptance that they say, and bench.decode's options for them."""

import numpy as np
import pytest

from bench import decode, strong, trace
from bench.strong import (
    CURVE,
    STRETCHED_MEAN,
    Drafter,
    OnePass,
    both,
    drafters,
    loss,
    mean_of,
    stretched,
)
from bench.trace_file import CHAIN, KINDS, ONE_PASS, TREES, Tally, Text, Trace, followed, write
from qwen3_model import InputError
from qwen3_model.decode.controller import LOOKUP
from qwen3_model.decode.one_pass import Shape

SHARES = [0.4, 0.2, 0.1]  # of 1000 misses; 0.3 none


def recorded(earlier=0.6, whole=0.8):
    """Blocks of 32 that know their root, blocks of 8 that do not; each offset as good as the others."""
    misses = [int(1000 * share) for share in SHARES] + [0] * 12 + [300]
    trials = [1000] * 7
    tallies = [
        Tally(32, True, False, [int(1000 * whole)] * 7, trials, misses),
        Tally(8, False, False, [int(1000 * earlier)] * 6, trials[:6], misses),
    ]
    texts = [Text(n, {kind: [1, 1] for kind in KINDS}) for n in (40, 50)]
    return Trace("small", 32, 8, False, texts, tallies)


def survival(trace, kind, depth):
    """Share of the drawn cycles that keep `depth` proposals or more."""
    return float(np.mean([n > depth for text in trace.texts for n in text.kept[kind]]))


@pytest.fixture(scope="module")
def simulated():
    return strong.strong(recorded(), CURVE, "4B", texts=40, tokens=250)


def test_the_chain_is_accepted_as_the_curve_says(simulated):
    """10,000 cycles: a share is known to 0.005, its standard error."""
    for depth, share in enumerate(CURVE, 1):
        assert survival(simulated, CHAIN, depth) == pytest.approx(share, abs=0.02)
    assert survival(simulated, CHAIN, 17) == 0 and mean_of(CURVE) == pytest.approx(6.16)
    assert simulated.mean(CHAIN) == pytest.approx(6.16, abs=0.35), "1,600 cycles, the last one of a text cut"


def test_the_stretched_curve_has_the_mean_asked_for():
    far = stretched(CURVE, STRETCHED_MEAN, 31)
    assert mean_of(far) == pytest.approx(10, abs=0.1) and len(far) <= 31
    assert far == sorted(far, reverse=True) and 0.05 <= far[-1] < far[0] < 1
    drawn = strong.strong(recorded(), far, "far", texts=40, tokens=250)
    kept = [n for text in drawn.texts for n in text.kept[CHAIN]]
    assert np.mean(kept) == pytest.approx(10, abs=0.3), "standard error 0.08"
    assert stretched(CURVE, mean_of(CURVE), 31) == pytest.approx(CURVE)
    with pytest.raises(InputError, match="no stretch"):
        stretched(CURVE, 30.0, 31)


def test_trees_grow_and_share_their_cycles(simulated):
    for text in simulated.texts:
        for small, large in zip(TREES, TREES[1:], strict=False):
            pairs = zip(text.kept[str(small)], text.kept[str(large)], strict=True)
            assert all(a <= b for a, b in pairs)
    means = [simulated.mean(str(n)) for n in TREES]
    assert means[-1] > means[0] and means[-1] > simulated.mean(CHAIN)
    assert [text.prompt_tokens for text in simulated.texts[:3]] == [40, 50, 40]


def test_one_pass_loses_by_the_recorded_ratio(simulated):
    """0.6 / 0.8 at every offset. Its tree's second rank helps: with a first candidate and 0.4 of the misses
    both in the tree, depth 1 is kept that often."""
    assert loss(recorded(), 8) == pytest.approx([0.75] * 6)
    _, short = drafters(recorded(), CURVE, 8)
    assert len(short.right) == 6 and short.right[0] == pytest.approx(0.75 * 0.73 / 0.87)
    p = short.right[0]
    tree = short.tree(19)
    ranks = [rank for rank in range(4) if [rank] in tree.paths()]
    wanted = p + (1 - p) * sum(SHARES[: len(ranks) - 1])
    assert survival(simulated, ONE_PASS, 1) == pytest.approx(wanted, abs=0.02) and len(ranks) > 1
    assert max(max(text.kept[ONE_PASS]) for text in simulated.texts) <= 7, "six deep, and the bonus token"


def test_draws_say_what_trees_of_any_size_and_blocks_of_any_length_keep(simulated):
    """Whole blocks: what the trace of the same seed says. A block of 8 rows has 7 depths, and its tree is not
    the large one cut there: the nodes below make room for others. 10,000 cycles keep what the tree's
    probabilities promise."""
    draws = strong.Draws.of(recorded(), CURVE, 40, 250)
    for text, chain, tree in zip(simulated.texts, draws.walks(0, 32), draws.walks(63, 32), strict=True):
        assert [len(walk) for walk in chain] == text.kept[CHAIN]
        for nodes in TREES:
            assert [sum(node <= nodes for node in walk) for walk in tree] == text.kept[str(nodes)]
    assert draws.walks(Shape.of(8, 19), 8)[3] == [
        [*range(1, n), 0] for n in simulated.texts[3].kept[ONE_PASS]
    ]
    assert draws.walks(-1, 0)[0] == [[0]] * 250
    whole = drafters(recorded(), CURVE, 8)[0]
    for block, sizes in ((8, (3, 7, 12)), (3, (7,))):
        chains = [walk for text in draws.walks(0, block) for walk in text]
        assert chains == [walk[:block] for text in draws.walks(0, 32) for walk in text]
        walks = [walk for text in draws.walks(sizes[0], block) for walk in text]
        assert max(map(len, walks)) == block and all(walk == sorted(walk) for walk in walks)
        for nodes in sizes:
            tree = Drafter(whole.right[: block - 1], whole.shares).tree(nodes)
            mean = np.mean([sum(node <= nodes for node in walk) for walk in walks])
            assert mean == pytest.approx(np.exp(tree.scores).sum(), abs=0.06) and max(tree.depths) < block


def test_a_drafter_by_hand():
    """Depth 1: 0.5, 0.3, none 0.2; depth 2: 0.9, 0.06: the best nodes are 0, 00, 1, 10."""
    drafter = Drafter([0.5, 0.9], [0.6])
    assert drafter.probabilities() == pytest.approx(np.array([[0.5, 0.3], [0.9, 0.06]]))
    tree = drafter.tree(4)
    assert tree.paths() == [[], [0], [0, 0], [1], [1, 0]]
    assert np.exp(tree.scores) == pytest.approx([1, 0.5, 0.45, 0.3, 0.27])
    assert drafter.draw(np.array([0.6, 0.89])) == [1, 0]
    assert drafter.draw(np.array([0.4, 0.95])) == [0, 1] and drafter.draw(np.array([0.81, 0.1])) == []
    weak = Drafter([0.2], [0.9])  # the second candidate is the likelier one: it comes first
    assert weak.tree(1).paths() == [[], [1]]


def test_cycles_that_end_where_no_block_stands():
    """Ends: root 0.2, 0: 0.05, 00: 0.45, 1: 0.03, 10: 0.27. With blocks at 00 and 10 of the tree of 4 nodes,
    0.72 of the cycles are followed by one with a draft. Drawn: as often as expected."""
    drafter = Drafter([0.5, 0.9], [0.6])
    one_pass = OnePass.of(drafter, Shape(4, 2, 4))
    assert one_pass.anchors == {2, 4}
    tokens, covered, rate = one_pass.expected()
    assert (tokens, covered) == pytest.approx((2.52, 0.72)) and rate == pytest.approx(2.8 / 1.28)
    numbers = np.random.default_rng(0).random((20_000, 2))
    nodes = {tuple(path): i for i, path in enumerate(one_pass.tree.paths())}
    kept = one_pass.kept([drafter.draw(row) for row in numbers], nodes)
    text = Text(3, {CHAIN: kept, ONE_PASS: kept})
    steps = followed(text, ONE_PASS)
    assert sum(steps) / len(steps) == pytest.approx(rate, abs=0.03) and steps[0] == 1
    drawn = one_pass.kept([[0, 0], [0, 0], [0], [0], [0, 0], [], [0, 0]] * 2, nodes)
    assert drawn[:5] == [1, 3, 2, 2, 3] and drawn[7] == 3, "drafted at 1, 4 and 7"


def test_the_command_prints_shapes(tmp_path, capsys, refused):
    trace = recorded()
    for known in (True, False):
        trace.tallies.append(Tally(16, known, False, [700] * 15, [1000] * 15, [300] + [0] * 15))
    trace.tallies.append(Tally(32, False, False, [700] * 30, [1000] * 30, [300] + [0] * 15))
    write(tmp_path / "t.json", trace)
    assert strong.main([str(tmp_path / "t.json")]) == 0
    said = capsys.readouterr().out
    assert "simulated" in said and "tokens/forward" in said
    assert "cannot be read" in refused(strong.main, str(tmp_path / "none.json"))


def test_a_simulated_trace_says_so():
    for made in both(recorded(), 1, 9):
        assert made.says == "simulated acceptance" and made.simulated.startswith("simulated")
        assert "independent" in made.made["model"] and made.made["recorded"] == "small"
        assert "simulated" in trace.tables(made)[0][0] and len(followed(made.texts[0], CHAIN)) >= 1
        assert "lookup" not in made.kinds and "lookup" in KINDS
    with pytest.raises(InputError, match="no tokens that lookup"):
        strong.Draws.of(recorded(), CURVE, 1, 9).walks(LOOKUP, 16)
    short = recorded()
    short.tallies[1].hits, short.tallies[1].trials = [], [9] * 6
    with pytest.raises(InputError, match="too short"):
        both(short, 1, 9)
    with pytest.raises(InputError, match="no tally"):
        strong.strong(recorded(), CURVE, "4B", shape=Shape.of(16, 19))


def test_the_same_seed_draws_the_same_trace():
    one, two, other = (strong.strong(recorded(), CURVE, "4B", 1, 50, seed=seed) for seed in (1, 1, 2))
    assert one == two and one.texts != other.texts


def test_a_replay_needs_a_gpu(monkeypatch, refused):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "need a GPU" in refused(decode.main, "--replay", "t.json")
