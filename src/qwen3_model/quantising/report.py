"""What quantising costs, on prompts: the AR view's distributions before and after, and what drafts gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthrus_kernels import Rows

from ..comparison import compare
from ..errors import InputError
from ..model import checked_prompt

if TYPE_CHECKING:
    from ..qwen3 import Qwen3

SCORED = 256  # first tokens of a prompt whose distributions are compared: logits of all take memory
NEW_TOKENS = 128  # a prompt
STRATEGY = "two-pass"


def measure(
    before: Qwen3, after: Qwen3, prompts: Sequence[Sequence[int]], advance: Callable[[], None]
) -> dict[str, Any]:
    """Figures of prompts (token ids) by a model and its quantised form: KL divergence and perplexity of the
    AR view over the prompts' own tokens; with a diffusion view tokens a cycle of both models, and how many
    texts of the quantised one are its own plain decoding's, bit for bit. advance() is called 2 times a
    prompt. Raises InputError."""
    scores = []
    for prompt in prompts:
        scores.append(_scores(before, after, checked_prompt(prompt, before.config.vocab_size)[:SCORED]))
        advance()
    if not any(score.shape[1] for score in scores):
        raise InputError("no prompt has two tokens, so there is nothing to measure: give longer ones")
    means = torch.cat(scores, 1).double().mean(1)
    means[1:] = means[1:].exp()
    if not means.isfinite().all():
        raise InputError("the logits of these prompts are no numbers in one of the models: try other ones")
    divergence, plain, quantised = means.tolist()
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "scored_tokens": sum(score.shape[1] for score in scores),
        "kl_divergence": divergence,
        "perplexity_before": plain,
        "perplexity_after": quantised,
    }
    if after.config.has_diffusion_view:
        found |= _drafts(before, after, prompts, advance)
    return found


def _scores(before: Qwen3, after: Qwen3, prompt: Sequence[int]) -> Tensor:
    """Of every token of a prompt behind its first: KL divergence in nats of what both models expected, and
    the negative log-probability that each gave it; [3, T - 1]."""
    p, q = (_log_probabilities(model, prompt) for model in (before, after))
    tokens = torch.tensor(prompt[1:], device=p.device)[:, None]
    divergence = (p.exp() * (p - q)).sum(-1)
    return torch.stack([divergence, -p.gather(1, tokens)[:, 0], -q.gather(1, tokens)[:, 0]]).cpu()


def _log_probabilities(model: Qwen3, prompt: Sequence[int]) -> Tensor:
    """Of the token behind each token but the last, by the AR view: [T - 1, V] fp32."""
    rows = Rows.chain(prompt, 0, 0)
    out = model.forward(rows, model.new_cache(len(prompt)))
    return out.logits[:-1].log_softmax(-1)


def _drafts(
    before: Qwen3, after: Qwen3, prompts: Sequence[Sequence[int]], advance: Callable[[], None]
) -> dict[str, Any]:
    """Tokens a cycle by both models, and the quantised one's equality with its own plain decoding."""
    stats = [
        before.generate(prompt, STRATEGY, NEW_TOKENS, seed=i).whole().stats
        for i, prompt in enumerate(prompts)
    ]
    cycles = sum(each.cycles for each in stats)
    report = compare(
        after, prompts, STRATEGY, on_pair=lambda _pair: advance(), max_new_tokens=NEW_TOKENS
    ).to_dict()
    return {
        "strategy": STRATEGY,
        "max_new_tokens": NEW_TOKENS,
        "tokens_per_cycle_before": sum(each.cycle_tokens for each in stats) / cycles if cycles else 0.0,
        "tokens_per_cycle_after": report["tokens_per_cycle"],
        "identical": report["identical"],
        "compared": report["compared"],
    }
