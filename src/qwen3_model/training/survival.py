"""Weights of a block's offsets by what an agreement there is worth to a chain, measured as training goes.

A chain of proposals that are right with the chances a_1, a_2, ..., each where all before it were right, makes
E = 1 + a_1 + a_1 a_2 + ... tokens a cycle. So a little more of a_j is worth

    dE / da_j = S_(j-1) (1 + R_j),   S_j = a_1 ... a_j,   R_j = a_(j+1) + a_(j+1) a_(j+2) + ...

The chances are measured on greedy text of the base behind held-out prompts, every `EVERY` steps. Late
offsets, which hardly any chain reaches, would starve: each weighs at least `FLOOR` of the heaviest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .agreement import agreements, greedy_texts
from .network import Network

FLOOR = 0.15
EVERY = 200  # steps; a measurement takes as long as one or two of them
TOKENS = 128  # of each prompt's text
LEAST_TOKENS = 8
KEPT = "chain_agreement"  # its name in a run's state and in training.json


def survival_weights(chances: Sequence[float], floor: float = FLOOR) -> list[float]:
    """The weight of each offset, the heaviest 1, from the chances of a chain; none below `floor`."""
    worth, behind = list[float](), 1.0  # 1 + R_j
    for chance in reversed(chances):
        worth.insert(0, behind)
        behind = 1 + chance * behind
    survived = 1.0
    for j, chance in enumerate(chances):
        worth[j] *= survived
        survived *= chance
    return [max(w / max(worth), floor) for w in worth]


def chances_of(agrees: Tensor, known: Tensor) -> list[float]:
    """Of each offset, how often its proposal is right where all before it in the block are; 0 where that
    never is. agrees, known [..., K - 1] bool."""
    right = (agrees & known).int().cumprod(-1).flatten(0, -2)
    reached = torch.cat([torch.ones_like(right[:, :1]), right[:, :-1]], 1) * known.flatten(0, -2)
    return (right.sum(0) / reached.sum(0).clamp(min=1)).tolist()


class Survival:
    """The weights of a run. kept: what its state keeps, in which the chances are."""

    def __init__(self, network: Network, prompts: Tensor | None, kept: dict[str, list[float]]) -> None:
        """prompts [B, P]: held-out ones of equal length, on the network's device. Raises InputError where
        there are none, or the context has no room behind them."""
        if prompts is None:
            raise InputError(
                "the weights by survival are measured on held-out text, and there is too little text for "
                "any: give more, or take the weights by decay"
            )
        config = network.config
        room = config.context_length - prompts.shape[1] - config.block_size
        if room < LEAST_TOKENS:
            raise InputError(
                f"the weights by survival are measured behind prompts of {prompts.shape[1]} tokens, and the "
                f"base has a context of {config.context_length}: take the weights by decay"
            )
        self.network, self.kept = network, kept
        self.texts = greedy_texts(network, prompts, min(room, TOKENS))

    def weights(self, step: int) -> Tensor:
        """Of the offsets of the longest blocks, [K - 1] fp32 on the network's device, at a step."""
        if step % EVERY == 0 or len(self.kept.get(KEPT, ())) != self.network.config.block_size - 1:
            self.kept[KEPT] = chances_of(*agreements(self.network, self.texts))
        return torch.tensor(survival_weights(self.kept[KEPT]), device=self.texts.text.device)
