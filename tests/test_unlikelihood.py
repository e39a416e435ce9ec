"""Greedy text against itself: which tokens repeat, the loss on them, and that training on it lowers them."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trained import BLOCKS, PLAN, TEXT, make_base

from qwen3_model import InputError, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.training import recipe
from qwen3_model.training.base import load_tokenizer
from qwen3_model.training.corpus import own_texts
from qwen3_model.training.folder import load_network
from qwen3_model.training.network import Network
from qwen3_model.training.objective import Objective
from qwen3_model.training.rollout import (
    OWN_REPEATED,
    check_own_text,
    distinct_share,
    repeats,
    rollout,
    texts_at_once,
    with_own_text,
)
from qwen3_model.training.survival import KEPT
from qwen3_model.training.unlikelihood import unlikelihood


@given(st.lists(st.integers(0, 2), min_size=4, max_size=40), st.integers(2, 4), st.integers(1, 40))
def test_repeats_and_the_distinct_share_by_their_definition(row, gram, end):
    end = min(end, len(row))
    runs = [tuple(row[i : i + gram]) for i in range(len(row) - gram + 1)]
    wanted = [False] * (gram - 1) + [run in runs[:i] for i, run in enumerate(runs)]
    assert repeats(torch.tensor([row]), gram)[0].tolist() == wanted
    counted = runs[: max(end - gram + 1, 0)]
    share = len(set(counted)) / len(counted) if counted else 1.0
    assert distinct_share(torch.tensor([row]), torch.tensor([end]), gram) == pytest.approx(share)


def test_unlikelihood_is_exact_and_its_gradient_does_not_vanish_where_a_token_is_certain():
    logits = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.0, 60.0]]], requires_grad=True)
    tokens = torch.tensor([[1, 2]])
    loss = unlikelihood(logits, tokens)
    p = torch.softmax(logits.double(), -1)[0, 0, 1]
    assert loss[0, 0].item() == pytest.approx(-torch.log1p(-p).item(), rel=1e-5)
    assert loss[0, 1].item() == pytest.approx(60 - torch.tensor(2.0).log().item(), rel=1e-5)
    loss.sum().backward()
    assert logits.grad[0, 0, 1].item() == pytest.approx(p.item(), rel=1e-4)
    assert logits.grad[0, 1, 2].item() == pytest.approx(1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", steps=5)


def test_a_step_makes_repeated_tokens_less_likely():
    """On the embedded checkpoint: a toy is too unsure of its loops for the loss to hold on to."""
    torch.manual_seed(0)
    config = dataclasses.replace(Qwen3Config.from_folder(EMBEDDED), block_size=0)
    weights = {k: w for k, w in load_file(EMBEDDED / "model.safetensors").items() if "_diff" not in k}
    network = Network(config)
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    corpus = recipe.read_corpus(own_texts(TEXT), load_tokenizer(EMBEDDED), own=True)
    tokens = torch.from_numpy(corpus.training)
    text = rollout(network, tokens[: 4 * 32].long().unflatten(0, (4, 32)), 96)
    again = repeats(text)[:, 1:]
    assert again.float().mean() > 0.1

    def chances():
        return torch.softmax(network.head(network.ar(text[:, :-1])[0]), -1).gather(-1, text[:, 1:, None])

    before = chances()[..., 0][again].mean().item()
    (unlikelihood(network.head(network.ar(text[:, :-1])[0]), text[:, 1:]) * again).mean().backward()
    with torch.no_grad():
        for weight in network.parameters():
            weight -= 0.1 * weight.grad
        assert chances()[..., 0][again].mean().item() < 0.9 * before


def test_own_text_is_the_share_asked_for(base, monkeypatch):
    monkeypatch.setattr("qwen3_model.training.rollout.OWN_PROMPT", 8)
    monkeypatch.setattr("qwen3_model.training.rollout.OWN_TOKENS", 12)
    network = load_network(base, Qwen3Config.from_folder(base))
    text = torch.randint(4, 300, (2000,), generator=torch.Generator().manual_seed(0))
    longer, share = with_own_text(network, text, 0.25, 0, 0)
    assert torch.equal(longer[:2000], text)
    assert share == (len(longer) - 2000) / len(longer) == pytest.approx(0.25, abs=0.05)
    first = longer[2000:2021]
    assert first[-1] == 0 and torch.equal(rollout(network, first[None, :8], 12)[0], first[:20])
    assert with_own_text(network, text, 0.0, 0, 0) == (text, 0.0)
    own, share = with_own_text(network, text, 1.0, 0, 0)
    assert share == 1 and len(own) == pytest.approx(2000, rel=0.05), "in the text's place, as long as it"
    pieces = own.view(-1, 21)
    assert len(pieces.unique(dim=0)) == len(pieces) // OWN_REPEATED
    assert torch.equal(rollout(network, pieces[3:4, :8], 12)[0], pieces[3, :20])
    assert any(torch.equal(pieces[3, :8], text[i : i + 8]) for i in range(1992)), "behind a piece of the text"
    monkeypatch.setattr("qwen3_model.training.rollout.KEYS_AT_ONCE", 1)
    assert texts_at_once(network, 20) == 1 and torch.equal(with_own_text(network, text, 1.0, 0, 0)[0], own)
    with pytest.raises(InputError, match="own text"):
        check_own_text(1.5, 512)
    with pytest.raises(InputError, match="context of 16"):
        check_own_text(0.5, 16)


def test_all_text_is_the_bases_own(base, tmp_path, monkeypatch):
    """The facts and the card say what was trained on, and how."""
    monkeypatch.setattr("qwen3_model.training.survival.TOKENS", 8)
    monkeypatch.setattr("qwen3_model.training.rollout.OWN_TOKENS", 12)
    seen = []
    real = recipe.distill
    monkeypatch.setattr(recipe, "distill", lambda n, tokens, *a: seen.append(tokens) or real(n, tokens, *a))
    plan = dataclasses.replace(PLAN, steps=1)
    recipe.run_distill(
        base,
        tmp_path / "out",
        None,
        plan=plan,
        blocks=BLOCKS,
        text=TEXT,
        own_text=1.0,
        objective=Objective("ce", "survival"),
    )
    facts = recipe.facts_of(tmp_path / "out")["distill"]
    assert (facts["own_text"], facts["loss"], facts["offset_weights"]) == (1.0, "ce", "survival")
    assert len(facts[KEPT]) == BLOCKS.size - 1
    card = (tmp_path / "out/README.md").read_text()
    assert "100% of the text" in card and "cross-entropy" in card and "at least 0.15" in card
    (tokens,) = seen
    assert len(tokens) % 141 == 0, "pieces of 128 tokens, 12 that were written, and an end"
    assert set(tokens[140::141].tolist()) == {0}
