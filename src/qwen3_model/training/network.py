"""The training form of the model: batched, differentiable, on torch's own attention. Its state dict has the
official names.

Inference is `qwen3_model.model`; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthrus_kernels import cos_sin, inverse_frequencies, rope
from orthrus_kernels.visibility import row_limit, row_sees

from ..config import Qwen3Config

KeysValues = tuple[Tensor, Tensor]  # each [B, G, T, D]
Turn = tuple[Tensor, Tensor]  # cosine and sine of the rows' positions, each [B T, D / 2]


class Norm(nn.Module):
    """RMSNorm over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size]; returns its shape and dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Both views' attention weights under their official names."""

    o_proj: nn.Linear
    o_proj_diff: nn.Linear

    def __init__(self, c: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        for view in ("", "_diff") if c.has_diffusion_view else ("",):
            self.add_module(f"q_proj{view}", nn.Linear(c.hidden_size, query, bias=False))
            self.add_module(f"k_proj{view}", nn.Linear(c.hidden_size, key, bias=False))
            self.add_module(f"v_proj{view}", nn.Linear(c.hidden_size, key, bias=False))
            self.add_module(f"o_proj{view}", nn.Linear(query, c.hidden_size, bias=False))
            self.add_module(f"q_norm{view}", Norm(c.head_dim, c.rms_norm_eps))
            self.add_module(f"k_norm{view}", Norm(c.head_dim, c.rms_norm_eps))

    def _project(self, x: Tensor, turn: Turn, view: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (getattr(self, f"{n}_proj{view}")(x).unflatten(-1, (-1, self.head_dim)) for n in "qkv")
        q, k = getattr(self, f"q_norm{view}")(q), getattr(self, f"k_norm{view}")(k)
        q, k = (rope(t.flatten(0, 1), *turn).unflatten(0, t.shape[:2]) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, turn: Turn, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """The AR view, causal: x [B, T, E] behind `past`. Returns the output and all keys and values."""
        q, k, v = self._project(x, turn, "")
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)

    def diffusion(self, x: Tensor, turn: Turn, context: KeysValues, mask: Tensor) -> Tensor:
        """The diffusion view: blocks x [B, N K, E] over AR keys `context` and their own, by mask [B, 1, N K,
        T + N K].
        """
        q, k, v = self._project(x, turn, "_diff")
        k, v = torch.cat([context[0], k], 2), torch.cat([context[1], v], 2)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj_diff(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E]; returns its shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer: attention weights of both views, shared norms and MLP."""

    def __init__(self, c: Qwen3Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, turn: Turn, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """The AR view of the layer."""
        out, keys_values = self.self_attn(self.input_layernorm(x), turn, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values

    def diffusion(self, x: Tensor, turn: Turn, context: KeysValues, mask: Tensor) -> Tensor:
        """The diffusion view of the layer."""
        x = x + self.self_attn.diffusion(self.input_layernorm(x), turn, context, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the head."""

    def __init__(self, c: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class Network(nn.Module):
    """Qwen3 with both views; parameters `model.*` and, untied, `lm_head.weight`."""

    frequencies: Tensor

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequencies, self.rope_scale = inverse_frequencies(config.head_dim, config.rope_theta, config.yarn)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def initialise(self, seed: int) -> None:
        """Matrices N(0, 0.02^2), those that write to the residual smaller by the root of twice the depth;
        norms 1.
        """
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02 / depth if "o_proj" in name or "down_proj" in name else 0.02
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)

    def turn(self, positions: Tensor) -> Turn:
        """RoPE of positions [B, T]."""
        return cos_sin(positions.flatten(), self.frequencies, self.rope_scale)

    def head(self, x: Tensor) -> Tensor:
        """Final norm and head: x [..., E] to logits [..., V]."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(self.model.norm(x), weight.to(x.dtype))

    def ar(self, ids: Tensor, past: list[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:
        """The AR view over ids [B, T]: states before the final norm [B, T, E], and each layer's keys and
        values.
        """
        start = past[0][0].shape[2] if past else 0
        turn = self.turn(torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids))
        x, kept = self.model.embed_tokens(ids), []
        for i, layer in enumerate(self.model.layers):
            x, keys_values = layer(x, turn, past[i] if past else None)
            kept.append(keys_values)
        return x, kept

    def diffusion(self, ids: Tensor, positions: Tensor, context: list[KeysValues], mask: Tensor) -> Tensor:
        """The diffusion view over the rows of blocks, ids and positions [B, N K]: states before the final
        norm.
        """
        x, turn = self.model.embed_tokens(ids), self.turn(positions)
        layers = cast("Iterable[Layer]", self.model.layers)
        for layer, keys_values in zip(layers, context, strict=True):
            x = layer.diffusion(x, turn, keys_values, mask)
        return x


def diffusion_blocks(
    ids: Tensor, anchors: Tensor, size: int, mask_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of blocks of `size` at anchors [B, N] of texts [B, T].

    Returns ids and positions [B, N size], and the mask [B, 1, N size, T + N size]. A row's path is the text
    in front of its anchor and its own block; what it sees of that, visibility.py says."""
    offsets, places = (torch.arange(n, device=ids.device) for n in (size, ids.shape[1]))
    positions = (anchors[..., None] + offsets).flatten(1)
    rows = torch.full_like(positions, mask_token)
    rows[:, ::size] = ids.gather(1, anchors)
    limits = torch.tensor([row_limit(row, 0, size) for row in range(size)], device=ids.device)
    limits = (anchors[..., None] + limits).flatten(1)[..., None]
    before = (places < anchors.repeat_interleave(size, 1)[..., None]) & row_sees(places, limits)
    block = torch.arange(anchors.shape[1], device=ids.device).repeat_interleave(size)
    own = (block[:, None] == block) & row_sees(positions[:, None], limits)
    return rows, positions, torch.cat([before, own], -1)[:, None]
