"""Settings of the choice of a token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST_TEMPERATURE = 1e-4  # logits over less would leave fp32's range


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice. Defaults choose greedily. Raises ValueError with one line when a setting is
    impossible.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("temperature", self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf,
             f"0 (greedy) or a finite number of at least {LEAST_TEMPERATURE}"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k),
             "a whole number of at least 0; 0 turns it off"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; 1 turns it off"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]; 0 turns it off"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100,
             "in [0.01, 100]; 1 turns it off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]; 0 turns it off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]; 0 turns it off"),
            ("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**64, "a whole number in [0, 2^64)"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ValueError(
                    f"logit_bias of token {token} is {bias}; it must be finite, or -inf to ban it"
                )

    @property
    def filters(self) -> bool:
        """Whether any token can be filtered out of a sampled choice."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalises(self) -> bool:
        """Whether a choice depends on which tokens the text holds."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def correction_scale(sampling: Sampling) -> float:
    """What `rerank` multiplies a change of logits with: 1 / temperature, 1 for greedy choice."""
    return 1.0 / sampling.temperature if sampling.temperature > 0 else 1.0
