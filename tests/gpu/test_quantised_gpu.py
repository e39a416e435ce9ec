"""Quantised checkpoints on a GPU: drafted text is their own plain text, bit for bit, alone and side by side;
and drafts keep about as much as in 16 bits.

ORTHRUS_PROMPTS held-out prompts (20), ORTHRUS_TOKENS new tokens (128); the embedded checkpoint, quantised."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwen3_model import Qwen3, Result
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import main
from qwen3_model.prompts import read_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="for a GPU")

PROMPTS, TOKENS = (
    int(os.environ.get(f"ORTHRUS_{name}", default)) for name, default in (("PROMPTS", 20), ("TOKENS", 128))
)
# By form: the options of `orthrus quantize`, and the share of 16 bits' tokens a cycle that it keeps at least.
FORMS = {
    "fp8": (("--format", "fp8"), 0.95),
    "int4": (("--format", "int4", "--group", "64"), 0.93),
    "int4 in both views": (("--format", "int4", "--group", "64", "--diff", "same"), 0.8),
}
DRAFTS = (
    {"strategy": "auto"}, {"strategy": "two-pass", "tree_nodes": 31}, {"strategy": "one-pass"},
)  # fmt: skip
SIDE = 16  # texts at once


def loaded(folder: Path) -> Qwen3:
    return Qwen3.from_pretrained(folder, "cuda", "bfloat16", progress=False)


def said(result: Result) -> tuple[list[int], list[float]]:
    whole = result.whole()
    return whole.token_ids, whole.logprobs


def tokens_a_cycle(model: Qwen3, prompts: list[list[int]]) -> float:
    found = [model.generate(p, "two-pass", TOKENS, tree_nodes=31).whole().stats for p in prompts]
    return sum(s.cycle_tokens for s in found) / sum(s.cycles for s in found)


@pytest.mark.parametrize("form", FORMS)
def test_drafted_text_is_plain_text(form, tmp_path):
    options, least = FORMS[form]
    assert main(["quantize", str(EMBEDDED), str(tmp_path / "out"), *options, "--json"]) == 0
    model, dense = loaded(tmp_path / "out"), loaded(EMBEDDED)
    assert model.text is not None
    texts = read_prompts(EMBEDDED / "held_out.jsonl", PROMPTS, None, "test")
    prompts = [model.text.encode(text) for text in texts]
    for temperature in (0.0, 0.8):
        how = {"max_new_tokens": TOKENS, "temperature": temperature, "seed": 5}
        plain = [said(model.generate(prompt, "autoregressive", **how)) for prompt in prompts]
        for draft in DRAFTS:
            assert [said(model.generate(prompt, **draft, **how)) for prompt in prompts] == plain, draft
            together = model.generate_many(prompts, slots=SIDE, progress=False, **draft, **how)
            assert list(map(said, together)) == plain, draft
    kept = tokens_a_cycle(model, prompts) / tokens_a_cycle(dense, prompts)
    print(f"\n{form}: {kept:.3f} of the tokens a cycle in 16 bits")
    assert kept > least
