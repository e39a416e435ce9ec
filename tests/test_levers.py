"""The levers' experiment on a tiny network: arms, gains, and the calibration that it fits."""

import argparse

import numpy as np
import pytest
import torch
from small import small_config

from bench import levers
from qwen3_model.bigram import Bigram
from qwen3_model.training.distill import Blocks, start_from_ar
from qwen3_model.training.followed import Drafts, Lattice, greedy_texts
from qwen3_model.training.loop import Plan
from qwen3_model.training.network import Network


def test_factors_are_fitted_alone():
    """A view that says less than it knows gets a factor above 1, as decoding's calibration does."""
    v, p, k, g = 24, 4, 6, torch.Generator().manual_seed(3)
    sure = torch.log_softmax(3 * torch.randn(400, p, v, generator=g), -1)
    truth = torch.distributions.Categorical(logits=sure).sample()
    logs = torch.log_softmax(sure / 2, -1).topk(k, -1)
    drafts = Drafts(Lattice(logs.values, logs.indices, truth, truth), True, [200, 200])
    nothing = torch.zeros(v, 3)
    assert (levers.calibrated(drafts, nothing, nothing)[:, 0] > 1.5).all()


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
