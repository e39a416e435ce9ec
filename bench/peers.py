"""The decode step of Hugging Face's transformers, with a static cache and torch.compile, on our weights."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from qwen3_model import Qwen3

from .measure import Timing
from .passes import PEER_TOLERANCE, synchronize

HUGGING_FACE = "transformers, static cache, torch.compile"
WARM_UP, ROUNDS, STEPS = 4, 8, 8  # a sample is the wall time of STEPS steps over their number


def hugging_face(model: Qwen3, context: int, compiled: Callable[..., Any] = torch.compile) -> Timing:
    """µs of wall time a token after `context` tokens, host included.

    Raises ImportError without transformers, ValueError when its logits are not ours. compiled: torch.compile,
    or a stand-in for it."""
    try:
        return _steps(model, context, compiled)
    finally:
        torch.compiler.reset()  # what was compiled holds the weights


def _steps(model: Qwen3, context: int, compiled: Callable[..., Any]) -> Timing:
    import transformers

    peer = _with_weights_of(model, transformers)
    rng = random.Random(0)
    ids = [rng.randrange(model.config.vocab_size) for _ in range(context)]
    cache = transformers.StaticCache(
        config=peer.config, max_batch_size=1, max_cache_len=context + WARM_UP + ROUNDS * STEPS + 1,
        device=model.device, dtype=model.dtype,
    )  # fmt: skip
    takes_position = "cache_position" in inspect.signature(peer.forward).parameters  # transformers 4

    def step(forward: Callable[..., Any], tokens: list[int], start: int) -> torch.Tensor:
        at = torch.arange(start, start + len(tokens), device=model.device)
        more = {"cache_position": at} if takes_position else {}
        there = torch.tensor([tokens], device=model.device)
        out = forward(input_ids=there, position_ids=at[None], past_key_values=cache, use_cache=True,
                      logits_to_keep=1, **more)  # fmt: skip
        return out.logits[0, -1]

    with torch.no_grad():
        theirs = step(peer.forward, ids, 0).float()
        ours = model.prefill(ids, model.new_cache(context))
        off = ((theirs - ours).abs().max() / ours.abs().max()).nan_to_num(1.0).item()
        if off > PEER_TOLERANCE:
            raise ValueError(f"its logits differ by {off:.1%}")
        forward = compiled(peer.forward, mode="reduce-overhead")
        position, samples = context, []
        for steps in [1] * WARM_UP + [STEPS] * ROUNDS:
            synchronize(model.device)
            began = time.perf_counter()
            for _ in range(steps):
                torch.compiler.cudagraph_mark_step_begin()
                step(forward, ids[:1], position)
                position += 1
            synchronize(model.device)
            samples.append((time.perf_counter() - began) / steps * 1e6)
    return Timing.of(samples[WARM_UP:])


def _with_weights_of(model: Qwen3, transformers: Any) -> Any:
    """transformers' Qwen3 whose parameters are ours, not copies of them."""
    c = model.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=c.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rope_theta=c.rope_theta,
        attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with model.device:
            peer = transformers.Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    ours = {name: w for name, w in model.destinations().items() if "_diff" not in name}
    peer.load_state_dict(ours, strict=False, assign=True)
    peer.tie_weights()
    return peer
