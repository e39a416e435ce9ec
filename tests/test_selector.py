"""The selector's experiment: what it must learn where tokens depend on their neighbours by the view's state,
the loss that counts, its command; and the levers' experiment on a tiny network."""

import argparse
import json

import numpy as np
import pytest
import torch
from small import small_config

from bench import levers, selector
from bench.followed import Drafts, Lattice, by_tables, follow, greedy_texts
from bench.selector_fit import BESIDE, DECAY, TWO_PASS, Data, Selector, calibrated, data_of, fit_selector
from qwen3_model.bigram import Bigram
from qwen3_model.training.distill import Blocks, start_from_ar
from qwen3_model.training.loop import Plan
from qwen3_model.training.network import Network

V, E, P, K = 24, 24, 4, 6
TABLES = torch.zeros(V, 3)
CALIBRATION = Bigram.of(TABLES, TABLES).calibration


def planted(seed: int, m: int = 1500) -> Data:
    """Behind token a comes 3 a + 1 or 5 a + 2, as the sign of the state's first number says; the view finds
    all candidates alike, and both are among them."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(m, P, E, generator=g)
    fronts, truth, ids = [torch.randint(V, (m,), generator=g)], [], []
    for p in range(P):
        two = torch.stack([(3 * fronts[p] + 1) % V, (5 * fronts[p] + 2) % V], -1)
        said = torch.where(states[:, p, 0] > 0, two[:, 0], two[:, 1])
        others = torch.stack([(two[:, 0] + d) % V for d in (5, 7, 11, 13)], -1)
        names = torch.cat([two, others], -1)
        ids.append(names.gather(1, torch.rand(m, K, generator=g).argsort(-1)))
        truth.append(said)
        fronts.append(said)
    blocks = Lattice(
        torch.full((m, P, K), -2.0),
        torch.stack(ids, 1),
        torch.stack(fronts[:P], 1),
        torch.stack(truth, 1),
        states,
    )
    return Data(blocks, torch.ones(m, P), [m])


@pytest.fixture(scope="module")
def fitted():
    """A selector and tables alone, fitted alike: (selector, losses before and after on other blocks)."""
    embedding = torch.randn(V, E, generator=torch.Generator().manual_seed(1))
    data, dev, found = planted(2), planted(3, 300), {}
    start = torch.randn(V, 12, generator=torch.Generator().manual_seed(4)) * 0.3
    for name, rank, tables in (("tables", 0, True), ("selector", 20, False)):
        torch.manual_seed(0)
        made = Selector(embedding, start, torch.zeros_like(start), CALIBRATION, rank, tables)
        fit = fit_selector(made, [data, data], [dev, dev], 0, 2e-2, batch=128, every=20, steps=100)
        found[name] = made, fit
    return found


def chains(ranked, data: Data) -> float:
    """Proposals that a chain keeps."""
    return float(np.mean(follow(Drafts(data.blocks, True, data.each), ranked, []).kept[0][0]))


def test_the_selector_learns_what_tables_cannot(fitted):
    """Tables know the pair of tokens and not which of them: half of the time they are wrong. A gate of
    another position is worth nothing."""
    tables, selected = fitted["tables"], fitted["selector"]
    assert sum(selected[1].after) < 0.5 * sum(tables[1].after) and selected[1].best > 0
    test = planted(5, 200)
    with torch.no_grad():
        by_selector, by_tables_ = (chains(made.ranked, test) for made, _ in (selected, tables))
        moved = Lattice(*(getattr(test.blocks, n) for n in ("logs", "ids", "fronts", "truth")),
                        test.blocks.states.roll(1, 1))  # fmt: skip
        moved = chains(selected[0].ranked, Data(moved, test.weight, test.each))
    # position 0 has seen its root and is ranked by the view alone, which here says nothing
    assert by_selector > 1.5 * by_tables_ and by_selector > 1.5 * moved and by_selector < P


def test_what_is_best_on_the_development_texts_is_kept(fitted):
    made, fit = fitted["selector"]
    dev = planted(3, 300)
    assert [made.loss(form, dev, slice(None)).item() for form in (0, 1)] == pytest.approx(fit.after, rel=1e-4)
    assert fit.best <= fit.steps and sum(fit.after) < sum(fit.before)


def test_a_selector_without_rank_ranks_as_decoding_does():
    """Tables and calibration of both forms: scores and order of `rerank`."""
    g = torch.Generator().manual_seed(7)
    before, after = torch.randn(V, 3, generator=g), torch.randn(V, 3, generator=g)
    calibration = torch.rand(2, 31, 2, generator=g) + 0.5
    made = Selector(torch.randn(V, E, generator=g), before, after, calibration, 0, False)
    for known in (True, False):
        drafts = Drafts(planted(8, 5).blocks, known, [5])
        with torch.no_grad():
            scores, order = made.ranked(drafts)
        want, places = by_tables(before, after, calibration)(drafts)
        torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(order.int(), places)


def test_what_counts_in_the_loss():
    """Behind a token that is no candidate nothing counts; a block inside another's draft counts little."""
    data = planted(9, 3)
    blocks = data.blocks.map(torch.clone)
    blocks.truth[1, 1], blocks.truth[2, 2:] = V + 1, -1
    ones = by_tables(TABLES, TABLES, CALIBRATION)
    weight = data_of(blocks, [3], TWO_PASS, ones).weight
    powers = [DECAY**p for p in range(P)]
    runs = follow(Drafts(blocks, True, [3]), ones, [63]).kept[63][0]
    first = [
        1.0 if i == 0 or i == runs[0] + 1 or (runs[0] == 0 and i == 2 + runs[1]) else BESIDE for i in range(3)
    ]
    want = [[first[0] * x for x in powers], [first[1] * x for x in powers[:2]] + [0, 0],
            [first[2] * x for x in powers[:2]] + [0, 0]]  # fmt: skip
    torch.testing.assert_close(weight, torch.tensor(want), rtol=1e-6, atol=0)


def test_factors_are_fitted_alone():
    """A view that says less than it knows gets a factor above 1, as decoding's calibration does."""
    g = torch.Generator().manual_seed(3)
    sure = torch.log_softmax(3 * torch.randn(400, P, V, generator=g), -1)
    truth = torch.distributions.Categorical(logits=sure).sample()
    logs = torch.log_softmax(sure / 2, -1).topk(K, -1)
    blocks = Lattice(logs.values, logs.indices, truth, truth, torch.zeros(400, P, E))
    drafts = Drafts(blocks, True, [200, 200])
    assert (calibrated(drafts, TABLES, TABLES)[:, 0] > 1.5).all()


def test_pieces_of_held_out_prompts_are_left_out():
    g = torch.Generator().manual_seed(0)
    pieces = torch.randint(0, 2000, (5, 128), generator=g)
    prompts = [[1, 2, *pieces[3, 30:80].tolist(), 5], pieces[1, 70:119].tolist()]
    assert torch.equal(selector.apart(pieces, prompts), pieces[[0, 1, 2, 4]]), (
        "49 tokens alike are few enough"
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.py"
    path.write_text(
        "".join(f"def f{i}(self, value):\n    return self.v[{i}] + value * {i}\n\n" for i in range(99))
    )
    return path


def test_the_selectors_command(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qwen3_model.training.calibration.ROUNDS", 1)
    file = tmp_path / "s.json"
    few = "--tokens 40 --new 20 --window 4 --prompts 1 --dev 1 --seconds 0.01 --ranks 4 --rates 1e-3"
    assert selector.main([*few.split(), "--device", "cpu", "--text", str(source), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    said = capsys.readouterr().out
    assert found["judged"] == "selector, rank 4, rate 0.001" in said and found["passes"] in (True, False)
    assert found["tokens"] == 40 and found["blocks"] == 8
    ways = found["ways"]
    assert ways["no tables"]["chain"]["tokens_per_cycle"] < ways["tables"]["tree 31"]["tokens_per_cycle"]
    assert all(w["tree 63"]["tokens_per_cycle"] <= found["oracle"]["two-pass"] for w in ways.values())
    assert ways[selector.CALIBRATED]["tree 31"]["gain"] == [1, 1, 1]


def test_the_stop_rule():
    """Every draft has to gain what it must."""

    def ways(chain, tree, early):
        old = {k: np.array([[100, 50]]) for k in ("chain", "tree 31", "one-pass")}
        new = {"chain": old["chain"] * [chain, 1], "tree 31": old["tree 31"] * [tree, 1],
               "one-pass": old["one-pass"] * [early, 1]}  # fmt: skip
        found = {selector.CALIBRATED: selector.Followed(old, []), "s": selector.Followed(new, [])}
        return selector.Ways(found, {}, "s")

    assert ways(1.051, 1.031, 1.031).passes
    for short in ((1.049, 1.031, 1.031), (1.051, 1.029, 1.031), (1.051, 1.031, 1.029)):
        assert not ways(*short).passes


@pytest.mark.parametrize("name", ["own+own", "other", "recipe+ce", ""])
def test_arms_that_are_none(name):
    with pytest.raises(argparse.ArgumentTypeError, match="own, survival"):
        levers.Arm.of(name)


def test_an_arm_is_its_levers():
    arm, recipe = levers.Arm.of("ce+own"), levers.Arm.of("recipe")
    assert (arm.own_text, arm.objective.loss, arm.objective.offset_weights) == (1.0, "ce", "decay")
    assert (recipe.own_text, recipe.objective.loss) == (0.25, "kl")
    assert levers.Arm.of("survival").objective.offset_weights == "survival"
    assert (
        levers.Arm.of("short16").blocks(Blocks(short=8)).short == 16 != recipe.blocks(Blocks(short=8)).short
    )


def test_gains_of_an_arm():
    """Over the recipe, of the seeds that both have, prompt by prompt."""
    pairs = {"chain": np.array([[10, 5], [20, 10]])}
    double = {"chain": np.array([[20, 5], [40, 10]])}
    runs = {"recipe": {0: pairs}, "ce": {0: double, 1: pairs}}
    said = levers.gains(runs, "ce", "chain")
    assert said == {"gain": 2.0, "interval_95": [2.0, 2.0], "by_seed": [2.0]}
    assert levers.gains({"ce": runs["ce"]}, "ce", "chain") is None
    assert [line[0] for line in levers.tables_of(runs)[1][2]] == ["ce"]


def test_arms_start_alike_and_leave_the_base_alone():
    """Twice the same arm: the same bits. AR weights never change."""
    network = Network(small_config())
    network.initialise(0)
    start_from_ar(network)
    first = {name: w.clone() for name, w in network.state_dict().items()}
    start = {name: w for name, w in first.items() if "_diff" in name}
    g = torch.Generator().manual_seed(0)
    text = torch.randint(0, 90, (800,), generator=g)
    texts = greedy_texts(network, [text[:9].tolist(), text[20:33].tolist()], 16, network.config.block_size)
    before, after = (torch.randn(network.config.vocab_size, 2, generator=g) for _ in range(2))
    tables = Bigram.of(before, after)
    plan, blocks = Plan(9, 2, 32, 1e-2), Blocks(count=2, size=8, offset_decay=0.9, short=4)
    correction = Plan(2, 2, 32, 1e-3), Blocks(count=2, size=8)
    training = {0.25: text, 1.0: text[:400]}
    bench = levers.Bench(network, start, tables, training, None, texts, texts, plan, blocks, correction)
    ended = []
    for name in ("recipe", "ce", "recipe"):
        bench.train(levers.Arm.of(name), 2, 0)
        ended.append({n: w.clone() for n, w in network.state_dict().items()})
    assert all(torch.equal(ended[0][n], ended[2][n]) for n in first)
    changed = {n for n in first if not torch.equal(ended[0][n], ended[1][n])}
    assert changed and all("_diff" in n for n in changed)
    assert all(torch.equal(first[n], ended[1][n]) for n in first if "_diff" not in n)
    found = bench.measure(0)
    assert {"chain", "tree 31", "tree 63", "one-pass 8", "one-pass 16, 10 blocks", "oracle"} <= found.keys()
    assert all(pairs[:, 0].tolist() == found["chain"][:, 0].tolist() for pairs in found.values())
    assert (found["oracle"][:, 1] <= found["tree 63"][:, 1]).all()
    assert (found["one-pass 16, 10 blocks"][:, 1] >= found["one-pass 16"][:, 1]).all()
