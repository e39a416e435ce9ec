"""Plain decoding by hand: one AR row a pass, driven by the host. What every strategy has to equal.

It shares the model's forward pass and the choice of a token with the product, and nothing of its cycles."""

from __future__ import annotations

import torch

from orthrus_kernels import Rows, Sampling, alike
from qwen3_model.model import Network


@torch.inference_mode()
def plainly(model: Network, prompt, max_new_tokens: int, **settings) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) behind a prompt, until an end token or the limit."""
    sampling, text, logprobs = Sampling(**settings), list(prompt), []
    cache = model.new_cache(len(text) + max_new_tokens)
    logits = model.prefill(text, cache)[None]
    while True:
        seen = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        for nth, told in enumerate(text):
            seen[0, told] = seen[0, told] | 1 if nth < len(prompt) else seen[0, told] + 2
        at = torch.tensor([len(text)], device=logits.device)
        token = int(model.ops.choose(logits, at, *alike(sampling, logits), seen))
        logprobs.append(float(logits[0, token] - model.ops.log_sum_exp(logits)[0]))
        text.append(token)
        if token in model.config.eos_token_ids or len(logprobs) == max_new_tokens:
            return text[len(prompt) :], logprobs
        out = model.forward(Rows.chain([token], len(text) - 1), cache)
        cache.commit(out.keys, out.values, [0])
        logits = out.logits
