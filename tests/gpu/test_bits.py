"""The promise on a GPU, compiled: the embedded checkpoint, and random weights at the shapes of Qwen3-1.7B and
8B. `make gpu-check` runs it; `-s` shows the counts.
"""

import os

import pytest
import torch
from promise import check_model, check_prefill

from qwen3_model import Qwen3, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs a GPU and compiled kernels",
)

CONTEXTS = [1, 127, 128, 129, 255, 256, 257, 4096]
SHAPES = {"1.7B": (2048, 6144, 28, 16, True), "8B": (4096, 12288, 36, 32, False)}


def random_model(name: str) -> Qwen3:
    hidden, mlp, layers, heads, tied = SHAPES[name]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rope_theta=1e6, tie_word_embeddings=tied, eos_token_ids=(151645,), dtype="bfloat16", block_size=32,
        mask_token_id=151669,
    )  # fmt: skip
    return Qwen3.from_config(config, device="cuda", dtype="bfloat16")


@pytest.mark.parametrize("name", ["embedded", *SHAPES])
def test_bits(name):
    embedded = name == "embedded"
    model = (
        Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)
        if embedded
        else random_model(name)
    )
    assert model.backend == "triton"
    contexts = CONTEXTS[:-1] + [3900] if embedded else [*CONTEXTS, 32768]
    found = check_model(model, contexts, passes=120, graphs=True)
    prefill = check_prefill(model, 1300, [1, 100, 512])
    print(f"\n{name}: {found}\n{name}: prefill {prefill}")
    assert found.different == 0 and found.passes >= 900 and found.rows >= 1000, found
    assert prefill.different == 0, prefill
