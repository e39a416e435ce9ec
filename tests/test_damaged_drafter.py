"""A damaged diffusion view costs speed and never a text: NaN or infinity in it alone gives the tokens and
log-probabilities of plain decoding, by every strategy."""

from __future__ import annotations

import logging

import pytest
import torch
from small import small_model
from tiny_folder import edit_tensor, write_tiny

from qwen3_model import InputError, Qwen3

PROMPT = [5, 6, 7]
SETTINGS = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05, "logit_bias": {9: 2.0}, "repetition_penalty": 1.2},
]
STRATEGIES = [
    {"strategy": "auto"},
    {"strategy": "two-pass", "tree_nodes": 0},
    {"strategy": "two-pass", "tree_nodes": 6},
    {"strategy": "one-pass"},
    {"strategy": "one-pass", "tree_nodes": 0, "block_size": 4},
]


def damaged(value: float, name: str = "qkv", layer: int = 1):
    """A model one weight of whose diffusion view is `value`."""
    model = small_model()
    getattr(model.layers[layer].diffusion, name).data.view(-1)[3] = value
    return model


# NaN with every setting, each other value with two of them; the rest is slow.
USUAL = {float("inf"): (0, 3), 3e38: (1, 2)}
CASES = [
    pytest.param(
        settings, value, marks=[] if nth in USUAL.get(value, (nth,)) else pytest.mark.slow,
        id=f"{settings}-{value}",
    )
    for nth, settings in enumerate(SETTINGS) for value in (float("nan"), *USUAL)
]  # fmt: skip


@pytest.mark.parametrize("settings, value", CASES)
def test_the_text_is_that_of_plain_decoding(settings, value):
    model = damaged(value)
    common = settings | {"max_new_tokens": 12, "seed": 3}
    plain = model.generate(PROMPT, "autoregressive", **common)
    for strategy in STRATEGIES:
        drafted = model.generate(PROMPT, **strategy, **common)
        assert drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs, strategy


def test_rejection_sampling_without_a_sound_draft_is_plain_sampling():
    model, settings = damaged(float("nan"), "o"), {"temperature": 0.9, "max_new_tokens": 12, "seed": 4}
    plain = model.generate(PROMPT, "autoregressive", **settings)
    assert model.generate(PROMPT, verify="rejection", **settings).token_ids == plain.token_ids


def test_damage_of_the_target_is_still_refused():
    model = small_model()
    model.layers[1].ar.qkv.data[3, 3] = float("nan")
    for strategy in STRATEGIES:
        with pytest.raises(InputError, match="logits are NaN"):
            model.generate(PROMPT, max_new_tokens=4, **strategy)


@pytest.mark.parametrize("value, warnings", [(float("nan"), 1), (float("-inf"), 1), (1e30, 0)])
def test_loading_a_damaged_drafter_warns_once(tmp_path, caplog, value, warnings):
    folder = write_tiny(tmp_path / "tiny")
    edit_tensor(folder, "model.layers.1.self_attn.k_norm_diff.weight", lambda w: torch.full_like(w, value))
    with caplog.at_level(logging.WARNING):
        model = Qwen3.from_pretrained(folder, device="cpu")
    assert len(caplog.records) == warnings and model.drafts_are_numbers() == (not warnings)
    assert all("diffusion view" in record.message for record in caplog.records)
