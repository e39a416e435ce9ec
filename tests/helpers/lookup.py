"""A model whose states are looked up by position and token: its choices, trees, walks and cycles are the real
ones, and no layer runs.

What a diffusion row says differs from what the AR view says there by the share of the token alone, since the
row has the mask in its place: so drafts are accepted, all of them at a share of 0.

`fast_choices` puts twins of the choice into cycles on the device, for tests of what cycles keep from text to
text: the twins read what the kernels of a captured graph would read, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch
from interpreter import DEVICE
from small import small_config
from torch import Tensor

from orthrus_kernels import Sampling
from orthrus_kernels.backends import REFERENCE
from orthrus_kernels.choice_triton import choice_form
from qwen3_model import Qwen3
from qwen3_model.decode import cycle


def lookup_model(share: float, backend: str = "triton", seed: int = 0, **changes) -> Qwen3:
    """share: of a state that its token makes. Logits spread by about 2. In the interpreter logits and the
    correction are the twins': no test of this model is about them."""
    changes = {"num_hidden_layers": 1, "eos_token_ids": ()} | changes
    model = Qwen3.from_config(small_config(**changes), seed, DEVICE, "float32", backend)
    c, g = model.config, torch.Generator().manual_seed(seed)
    places = torch.randn(c.max_position_embeddings, c.hidden_size, generator=g).to(DEVICE)
    names = torch.randn(c.vocab_size, c.hidden_size, generator=g).to(DEVICE)
    model.head.data.copy_(torch.randn(model.head.shape, generator=g) * 2 / c.hidden_size**0.5)
    if DEVICE == "cpu":
        model.ops = replace(model.ops, linear=REFERENCE.linear, rerank=REFERENCE.rerank)

    def states(inputs, cache):
        tokens, positions = inputs.plan.tokens, inputs.plan.positions
        found = (1 - share**2) ** 0.5 * places[positions] + share * names[tokens]
        found = found if inputs.logits_of is None else found[inputs.logits_of]
        nothing = found.new_zeros(1, inputs.plan.shape.n_ar, c.num_key_value_heads, c.head_dim)
        return found, nothing, nothing

    model.states = states
    return model


def fast_choices(model: Qwen3, monkeypatch) -> None:
    """The twins in the kernels' place, where those are interpreted."""
    if DEVICE == "cpu":
        fast = {"candidates": _candidates, "head": _head, "log_probability": REFERENCE.log_probability}
        monkeypatch.setattr(model, "ops", replace(model.ops, choose=REFERENCE.choose, **fast))
        monkeypatch.setattr(cycle, "choose_triton", _choose)
        monkeypatch.setattr(cycle, "summary_of_logits", lambda logits, top: (0, 0, logits.logsumexp(-1)))


def _read(numbers: Tensor, form: Sampling, vocabulary: int) -> Sampling:
    """The settings that lie in `numbers` [8], of those that a launch of this form reads."""
    sampled, room, by_p, by_min = choice_form(form, vocabulary)
    low, high, top_k = numbers[:3].tolist()
    _, temperature, top_p, min_p, _ = numbers[3:].view(torch.float32).tolist()
    return Sampling(
        temperature=temperature if sampled else 0.0, top_k=top_k if room else 0,
        top_p=top_p if by_p else 1.0, min_p=min_p if by_min else 0.0,
        seed=low % 2**32 + high % 2**32 * 2**32,
    )  # fmt: skip


def _choose(logits, positions, sampling, *, out, numbers, bias):
    logits = logits if bias is None else logits + bias
    out.copy_(REFERENCE.choose(logits, positions, _read(numbers, sampling, logits.shape[1])))


def _candidates(logits, positions, sampling, k, seen=None, *, numbers=None, bias=None):
    if numbers is not None:
        sampling = _read(numbers, sampling, logits.shape[1])
    logits = logits if bias is None else logits + bias
    return tuple(t.contiguous() for t in REFERENCE.candidates(logits, positions, sampling, k, seen))


def _head(states, weight, k, out=None):
    found = [t.contiguous() for t in REFERENCE.head(states, weight, k)]
    for mine, theirs in zip(out or (), found, strict=False):
        mine.copy_(theirs)
    return found
