"""Cycles captured on a GPU keep what the host's loop keeps: the embedded checkpoint, at any length."""

from dataclasses import replace

import pytest
import torch

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts


@pytest.fixture(scope="module")
def model():
    return Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)


@pytest.mark.parametrize(
    ("strategy", "nodes"),
    [
        ("autoregressive", 0),
        ("two-pass", 0),
        ("two-pass", 64),
        ("one-pass", "auto"),
        ("one-pass", 40),
        ("auto", "auto"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_captured_cycles(model, strategy, nodes, settings):
    """After 900 tokens of several texts, past 1024 positions, where segments are wider."""
    texts = read_prompts(EMBEDDED / "held_out.jsonl", 9, None, "test")
    prompt = [token for text in texts for token in model.text.encode(text)][:900]
    found, settings = [], {"max_new_tokens": 250, "seed": 5, "tree_nodes": nodes, **settings}
    for graphs in (False, True):
        model.use_graphs, model.use_cycles, model.spare_cache = graphs, graphs, None
        found.append(model.generate(prompt, strategy, **settings))
    assert found[0].token_ids == found[1].token_ids and found[0].logprobs == found[1].logprobs
    cycles = model.spare_cache.cycles._cycles
    assert len(cycles) == 1 or (strategy, nodes) == ("auto", "auto")
    assert nodes == "auto" or all(cycle.graph is not None for cycle in cycles.values())
    again = model.generate(prompt, strategy, **settings)
    assert again.token_ids == found[0].token_ids, "all of it from the graphs"


def test_a_surplus_cycle_changes_nothing(model):
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    model.generate([5, 6, 7], "two-pass", max_new_tokens=40, tree_nodes=0)
    cache, cycles = model.spare_cache, model.spare_cache.cycles
    (cycle,) = cycles._cycles.values()
    before = [t.clone() for t in (cache.keys, cache.values, cycles._state)]
    with torch.inference_mode():
        for _ in range(3):
            end = cycle.launch(cycles._pool)()
            assert end.finished and not end.run.tokens
    for old, new in zip(before, (cache.keys, cache.values, cycles._state), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_a_plain_qwen3_past_the_first_cut(model):
    """With the defaults; the AR view of the checkpoint alone."""
    alone = Qwen3.from_config(
        replace(model.config, block_size=0, mask_token_id=None), device="cuda", dtype="bfloat16"
    )
    mine = model.destinations()
    for name, weight in alone.destinations().items():
        weight.copy_(mine[name])
    prompt = [token for text in read_prompts(EMBEDDED / "held_out.jsonl", 9, None, "test")
              for token in model.text.encode(text)][:1000]  # fmt: skip
    model.use_graphs, model.use_cycles, model.spare_cache = False, False, None
    want = model.generate(prompt, "autoregressive", max_new_tokens=60)
    got = alone.generate(prompt, max_new_tokens=60)
    assert got.token_ids == want.token_ids and got.logprobs == want.logprobs
    assert len(alone.spare_cache.cycles._cycles) == 1
