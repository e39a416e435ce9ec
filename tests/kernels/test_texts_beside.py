"""Texts side by side on the kernels: each has the tokens and log-probabilities that it has alone, and what a
text leaves in a slot or a page does not reach the next one there."""

import pytest
import torch
from interpreter import DEVICE
from plainly import plainly
from small import small_model

from orthrus_kernels import PAGE
from qwen3_model import Engine, Request

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1} if DEVICE == "cpu" else {}  # fewer programs
PROMPTS = [[5, 6, 7], [9], list(range(1, 63)), [3] * 20, [8, 8]]
NEW = [2, 5, 5, 5, 5]  # tokens of each
SETTINGS = [
    {"temperature": 0.8, "top_k": 5, "seed": 3},
    {"repetition_penalty": 1.4},
    {},
    {"temperature": 1.2, "seed": 2**40, "logit_bias": {9: 2.0}},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3},
]


@pytest.fixture(scope="module")
def model():
    changes = HEADS | {"num_hidden_layers": 1, "eos_token_ids": ()}
    return small_model("float32", backend="triton", device=DEVICE, **changes)


@pytest.mark.parametrize("how", [{"strategy": "autoregressive"}, {"strategy": "lookup"},
                                 {"tree_nodes": 0, "block_size": 3},
                                 {"tree_nodes": 4, "block_size": 3},
                                 {"strategy": "one-pass", "tree_nodes": 2, "block_size": 3}],
                         ids=str)  # fmt: skip
def test_each_text_has_the_bits_it_has_alone(model, how):
    """Settings of every form in one pass, slots and pages used again; pages hold NaN before. Texts end one by
    one, so the prompts of the last ones ride in others' passes."""
    engine = Engine(model, 3, 6 * PAGE)
    runner = engine.runner_for(1)
    runner.ahead = True
    for cache in (runner.cache.keys, runner.cache.values):
        cache.fill_(float("nan"))
    strategy = {"strategy": "two-pass"} | how
    texts = [
        engine.submit(prompt, Request(max_new_tokens=NEW[nth], **settings, **strategy))
        for nth, (prompt, settings) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]
    carried, launch = list[bool](), runner.cycles._launch
    runner.cycles._launch = lambda *given: launched(launch(*given))

    def launched(it):
        carried.append(it.states is not None)
        return it

    while engine.step():
        pass
    for text, prompt, new, settings in zip(texts, PROMPTS, NEW, SETTINGS, strict=True):
        result = text.result()
        assert (result.token_ids, result.logprobs) == plainly(model, prompt, new, **settings), prompt
    assert torch.isnan(runner.cache.keys).any(), "no more pages than the texts need"
    assert any(carried) == ("one-pass" not in how.values()), "prompts rode in the passes of others"
