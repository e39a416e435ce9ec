"""Small configurations and models."""

from __future__ import annotations

import dataclasses

from qwen3_model import Qwen3, Qwen3Config

SMALL = Qwen3Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
    block_size=8,
    mask_token_id=96,
)


def small_config(**changes) -> Qwen3Config:
    """SMALL with changes."""
    return dataclasses.replace(SMALL, **changes)


def small_model(
    dtype: str = "float32", seed: int = 0, backend: str = "reference", device: str = "cpu", **changes
) -> Qwen3:
    """A random model whose weights are large enough for logits to differ."""
    model = Qwen3.from_config(small_config(**changes), seed, device, dtype, backend)
    for name, weight in model.destinations().items():
        if weight.dim() == 2 and "embed" not in name:
            weight.mul_(8)
    return model
