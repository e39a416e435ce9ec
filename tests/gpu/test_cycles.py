"""Cycles captured on a GPU keep what the host's loop keeps: the embedded checkpoint, and rooms that grow."""

import os

import pytest
import torch

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU and compiled kernels",
)


@pytest.fixture(scope="module")
def model():
    return Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)


@pytest.mark.parametrize("strategy", ["autoregressive", "two-pass"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_captured_cycles(model, strategy, settings):
    """From a prompt of three texts on, past 1024 positions, where the room grows."""
    prompt = [
        t for p in read_prompts(EMBEDDED / "held_out.jsonl", 9, None, "test") for t in model.text.encode(p)
    ]
    found = []
    for graphs in (False, True):
        model.use_graphs, model.use_cycles, model.spare_cache = graphs, graphs, None
        found.append(model.generate(prompt[-900:], strategy, max_new_tokens=250, seed=5, **settings))
    assert found[0].token_ids == found[1].token_ids and found[0].logprobs == found[1].logprobs
    cycles = model.spare_cache.cycles
    assert len(cycles) >= 1 and all(c.graph is not None for c in cycles._cycles.values() if c.launches > 1)


def test_a_surplus_cycle_changes_nothing(model):
    model.use_graphs, model.use_cycles, model.spare_cache = True, True, None
    model.generate([5, 6, 7], "two-pass", max_new_tokens=40)
    cache, cycles = model.spare_cache, model.spare_cache.cycles
    (cycle,) = cycles._cycles.values()
    before = [t.clone() for t in (cache.keys, cache.values, cycles._state)]
    with torch.inference_mode():
        for _ in range(3):
            kept, finished, *_ = cycle.launch(cycles._pool)()
            assert (kept, finished) == (0, 1)
    for old, new in zip(before, (cache.keys, cache.values, cycles._state), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
