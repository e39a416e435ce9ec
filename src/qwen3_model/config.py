"""Qwen3 and Orthrus-Qwen3 configurations, read from `config.json` in both spellings of RoPE settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071): frequencies slowed by wavelength, attention rescaled."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    truncate: bool = True


@dataclass(frozen=True)
class Qwen3Config:
    """Everything the model's shape and arithmetic depend on. Dense Qwen3 only."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    yarn: YarnScaling | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    block_size: int = 0  # rows of a diffusion block (K); 0: a plain Qwen3 without a diffusion view
    mask_token_id: int = -1  # -1: none

    @property
    def has_diffusion_view(self) -> bool:
        """Whether the checkpoint carries the second set of attention weights."""
        return self.block_size > 0

    @property
    def context_length(self) -> int:
        """Positions the model may use: YaRN extends what the checkpoint was trained on by its factor."""
        if self.yarn is None:
            return self.max_position_embeddings
        return max(
            self.max_position_embeddings, int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        )
