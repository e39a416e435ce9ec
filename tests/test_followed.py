"""Drafts followed on tensors: trees against `draft_tree`, walks by hand, and cycles against decoding."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import bootstrap, oracle
from bench.selector import held_out
from orthrus_kernels.anchors import choose_anchors
from orthrus_kernels.draft_tree import draft_tree
from qwen3_model import Qwen3
from qwen3_model.bigram import Bigram
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.lattice import walked
from qwen3_model.prompts import read_prompts
from qwen3_model.training import followed
from qwen3_model.training.folder import load_network
from qwen3_model.training.followed import (
    Drafts,
    Lattice,
    by_tables,
    drafts_of,
    follow,
    greedy_texts,
    grown,
    passed,
    places,
)
from qwen3_model.training.rollout import rollout

NEW = 16  # tokens of a decoded text


def random_drafts(seed: int, known: bool, m: int = 7, depths: int = 5, width: int = 4) -> Drafts:
    """Texts that often go on with a candidate."""
    g = torch.Generator().manual_seed(seed)
    logs = torch.log_softmax(2 * torch.randn(m, depths, width + 2, generator=g), -1)[..., :width]
    logs = logs.sort(-1, descending=True).values.round(decimals=1).clamp(max=0)  # some are equal
    ids = torch.stack([torch.randperm(9, generator=g)[:width] for _ in range(m * depths)])
    ids = ids.view(m, depths, width)
    pick = torch.randint(0, width + 1, (m, depths, 1), generator=g)
    truth = torch.where(pick < width, ids.gather(-1, pick.clamp(max=width - 1)), 9)[..., 0]
    truth[-1, 2:] = -1
    roots = torch.randint(0, 9, (m, 1), generator=g)
    fronts = torch.cat([roots, truth[:, :-1]], 1)
    return Drafts(Lattice(logs, ids, fronts, truth), known, [m - 2, 0, 2])


def tables(seed: int, rank: int = 3) -> Bigram:
    g = torch.Generator().manual_seed(seed)
    calibration = torch.rand(2, 6, 2, generator=g) + 0.5
    return Bigram(torch.randn(10, rank, generator=g), torch.randn(10, rank, generator=g), calibration)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 24), st.sampled_from([None, 1, 3]))
def test_trees_are_those_of_draft_tree(seed, known, nodes, anchors):
    """Which of their nodes the text goes along, and whether a block stands where it leaves them."""
    drafts = random_drafts(seed, known)
    scores, order = by_tables(tables(seed))(drafts)
    truth = places(order, drafts.ranks)
    reached, placed = grown(scores, order, truth, nodes, anchors)
    b = drafts.blocks
    for i in range(len(b.truth)):
        tree = draft_tree(0, scores[i], b.ids[i], nodes, order[i])
        node, want = 0, []
        for token in b.truth[i].tolist():
            below = [n for n, p in enumerate(tree.parents) if p == node and tree.tokens[n] == token]
            if not below:
                break
            node = below[0]
            want.append(node)
        assert reached[i].tolist() == want + [0] * (len(b.truth[i]) - len(want))
        if anchors:
            chosen = choose_anchors(tree.parents, tree.scores, anchors)
            ends = {round(x, 4) for x in tree.scores}
            assert bool(placed[i]) == (node in chosen) or len(ends) < len(tree), "but where some are alike"
        else:
            assert placed[i]
    chains = follow(drafts, by_tables(tables(seed)), []).kept[0]
    for i, kept in enumerate(x for text in chains for x in text):
        tree = draft_tree(0, scores[i], b.ids[i], len(b.truth[i]), order[i], children=1)
        text = b.truth[i].tolist()
        want = next((d for d, t in enumerate(text) if tree.tokens[d + 1 : d + 2] != [t]), len(text))
        assert kept == want


def test_passes_by_hand():
    """Five tokens behind the first root. Roots 1 to 4 would keep 1, 0, 2 and 0."""
    kept = [1, 0, 2, 0]
    assert passed(kept, [True] * 4) == (5, 3)  # root 0 alone, 1 and one more, 3 and the last
    # behind root 1's cycle no block stands: root 3 has no draft, and root 4 has one
    assert passed(kept, [False, True, True, True]) == (5, 4)
    assert passed([2, 0, 0, 0], [False] * 4) == (5, 3)
    assert passed([], []) == (1, 1)


def test_a_gain_is_paired_by_prompt():
    """Twice the tokens at the same cycles, whatever prompts are drawn: no spread."""
    old = np.array([[10, 5], [90, 10], [33, 11]])
    new = old * [2, 1]
    assert bootstrap.gain(new, old) == 2 and bootstrap.gain_interval(new, old) == pytest.approx((2, 2))
    low, high = bootstrap.gain_interval(new[::-1], old)
    assert low < 1.9 and high > 2.1


@pytest.fixture(scope="module")
def decoded():
    """Cycles of two prompts of unlike length, decoded and followed on tensors."""
    model = Qwen3.from_pretrained(EMBEDDED, "cpu", "float32", "torch", progress=False)
    model.ops = replace(model.ops, branch=lambda *_: None)  # what lookup finds is no draft of these blocks
    texts = read_prompts(EMBEDDED / "held_out.jsonl", 12, split="dev")
    prompts = [model.text.encode(texts[0])[-40:], model.text.encode(texts[9])[-23:]]
    network = load_network(EMBEDDED, model.config)
    return model, prompts, greedy_texts(network, prompts, NEW, 32), network


def test_texts_are_the_models(decoded):
    model, prompts, texts, network = decoded
    for i, prompt in enumerate(prompts):
        result = model.generate(prompt, max_new_tokens=NEW).token_ids
        begin = int(texts.starts[i])
        assert texts.ids[i, :begin].tolist() == prompt and len(result) == int(texts.counts[i])
        assert texts.ids[i, begin : begin + len(result)].tolist() == result
    assert torch.equal(rollout(network, torch.tensor(prompts[:1]), NEW + 32)[0], texts.ids[0])


def test_followed_cycles_are_the_decoded_ones(decoded):
    model, prompts, texts, network = decoded
    ranked = by_tables(model.bigram)
    drafts, _ = held_out(network, prompts, NEW)
    two = follow(drafts[0], ranked, [31])
    one = follow(drafts[1], ranked, [19])
    for nodes in (0, 31):
        stats = [model.generate(p, "two-pass", NEW, tree_nodes=nodes).stats for p in prompts]
        assert two.pairs(nodes).tolist() == [[s.cycle_tokens, s.cycles] for s in stats]
    stats = [model.generate(p, "one-pass", NEW, tree_nodes=19).stats for p in prompts]
    assert one.pairs(19).tolist() == [[s.cycle_tokens, s.cycles] for s in stats]
    # blocks of 16 at ten nodes, as one-pass has them where they are asked for
    blocks = followed.along(network, texts, 16, states=True)
    kept = follow(drafts_of(blocks, texts.counts, False), ranked, [19], 10)
    stats = [model.generate(p, "one-pass", NEW, tree_nodes=19, block_size=16).stats for p in prompts]
    assert kept.pairs(19).tolist() == [[s.cycle_tokens, s.cycles] for s in stats]
    best = oracle.of_drafts(drafts[0])
    assert (best[:, 1] <= two.pairs(31)[:, 1]).all() and (best[:, 0] == two.pairs(31)[:, 0]).all()
    assert walked([]) == (0, 0)
