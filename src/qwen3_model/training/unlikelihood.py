"""Less repetition in greedy text: sequence-level unlikelihood training (Welleck et al., arXiv 1908.04319).

Small models loop when they decode greedily, and a loop flatters a drafter: it proposes loops well. Every few
steps the network continues pieces of the training text greedily; where one of its tokens completes a run of 8
that its continuation had before, the loss is -log(1 - p(token)). Beside it runs the ordinary next-token loss.
The share of repeated runs steers the weight: it falls to 0 as the continuations reach `distinct`, so that
real repetition, of which source code has a lot, is not trained away."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .loop import Plan, Rows, train
from .network import Network
from .pretrain import autocast, compiled
from .rollout import distinct_share, lengths, repeats, rollout


@dataclass(frozen=True)
class Continuations:
    """The network's own greedy text, and what is asked of it."""

    distinct: float = 0.45  # share of different runs of 8 tokens; the weight of the loss is 0 above it
    soft: float = 0.05  # and 1 where the share is so far below
    count: int = 512  # pieces continued at a time
    prompt: int = 128  # tokens of a piece
    tokens: int = 256  # of its continuation
    steps: int = 8  # trained on one set of continuations, count / steps of them a step

    def check(self, context: int) -> None:
        """Raises InputError for settings that cannot be carried out in a context of so many tokens."""
        if not 0 < self.distinct <= 1:
            raise InputError(f"distinct is {self.distinct}; above 0, at most 1 was expected")
        if self.prompt + self.tokens > context:
            raise InputError(
                f"pieces of {self.prompt} tokens and {self.tokens} behind them do not fit into the base's "
                f"context of {context} tokens"
            )


def unlikelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log(1 - p(token)) [B, T] from fp32 logits [B, T, V]: over the logits of all others, exact where p is
    near 1.
    """
    others = logits.scatter(-1, tokens[..., None], float("-inf"))
    return torch.logsumexp(logits, -1) - torch.logsumexp(others, -1)


def unrepeat(
    network: Network, tokens: Tensor, plan: Plan, own: Continuations = Continuations()
) -> tuple[int, float, float]:
    """Train the AR view on a long text of token ids (on its device) and on its own continuations. Returns
    steps, seconds, and the share of different runs in the last continuations.
    """
    rows, pieces = Rows(tokens, plan.length, plan.seed), Rows(tokens, own.prompt, plan.seed + 1)
    device, ends = tokens.device, network.config.eos_token_ids
    each = -(-own.count // own.steps)

    @compiled
    def loss_on(ids: Tensor, text: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = network.ar(ids[:, :-1])
        likely = F.cross_entropy(network.head(states).float().flatten(0, 1), ids[:, 1:].flatten())
        states, _ = network.ar(text[:, :-1])
        logits = network.head(states[:, -own.tokens :]).float()
        return likely, (unlikelihood(logits, text[:, -own.tokens :]) * marked).mean()

    text = marked = torch.empty(0)
    share = weight = 0.0

    def continue_pieces(number: int) -> None:
        nonlocal text, marked, share, weight
        text = rollout(network, pieces.batch(number, own.count)[:, :-1], own.tokens)
        new = text[:, own.prompt :]
        known = lengths(new, ends)
        share = distinct_share(new, known)
        weight = min(max((own.distinct - share) / own.soft, 0.0), 1.0)
        place = torch.arange(own.tokens, device=device)
        marked = (repeats(new) & (place < known[:, None])).float()

    def loss_of(step: int):
        number, part = divmod(step, own.steps)
        if part == 0:
            continue_pieces(number)
        at = slice(part * each, (part + 1) * each)
        with autocast(device):
            likely, unlikely = loss_on(rows.batch(step, plan.batch), text[at], marked[at])
        shown = share
        return likely + weight * unlikely, lambda: f"distinct 8-grams {shown:.3f}"

    weights = {name: w for name, w in network.named_parameters() if "_diff" not in name}
    steps, seconds = train("unrepeat", weights, loss_of, plan, {"tokens": len(tokens), **asdict(own)})
    return steps, seconds, share
