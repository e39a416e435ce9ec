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

from orthrus_kernels import Sampling, SamplingTable
from orthrus_kernels.backends import REFERENCE
from orthrus_kernels.layout import Settings, Takes
from qwen3_model import Qwen3


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
        fast = {name: _reading(getattr(REFERENCE, name)) for name in ("choose", "candidates")}
        fast["head"] = _packed(REFERENCE.head)
        fast |= {name: getattr(REFERENCE, name) for name in ("log_sum_exp", "seen_rows")}
        monkeypatch.setattr(model, "ops", replace(model.ops, **fast))


def _read(table: SamplingTable) -> SamplingTable:
    """A table of the settings that lie in the numbers of another, as launches of its form read them."""
    read, takes = SamplingTable(len(table.samplings), table.vocabulary, "cpu"), table.form.takes
    for slot, numbers in enumerate(table.numbers.cpu()):
        whole, parts = numbers.tolist(), numbers.view(torch.float32).tolist()
        biased = table.bias is not None and Takes.BIAS in takes
        sampling = Sampling(
            temperature=0.0 if takes & Takes.GREEDY else parts[Settings.TEMPERATURE],
            top_k=whole[Settings.TOP_K] if Takes.TOP_K in takes else 0,
            top_p=parts[Settings.TOP_P] if Takes.TOP_P in takes else 1.0,
            min_p=parts[Settings.MIN_P] if Takes.MIN_P in takes else 0.0,
            repetition_penalty=parts[Settings.REPETITION],
            frequency_penalty=parts[Settings.FREQUENCY],
            presence_penalty=parts[Settings.PRESENCE],
            logit_bias=dict(enumerate(table.bias[slot].tolist())) if biased else {},
            seed=whole[Settings.SEED_LOW] % 2**32 + whole[Settings.SEED_HIGH] % 2**32 * 2**32,
        )  # fmt: skip
        read.put(slot, sampling)
    return read


def _reading(twin):
    """A twin of the choice that takes its settings from where a kernel finds them."""

    def run(logits, positions, table, *given):
        return _packed(twin)(logits, positions, _read(table), *given)

    return run


def _packed(twin):
    """With results as kernels lay them out."""

    def run(*given):
        found = twin(*given)
        return found.contiguous() if isinstance(found, Tensor) else [t.contiguous() for t in found]

    return run
