"""Shapes of the dense Qwen3 models that are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; letters as everywhere: E hidden, H query heads, G key heads, D head, F MLP, V
    vocabulary."""

    layers: int
    E: int
    H: int
    F: int
    G: int = 8
    D: int = 128
    V: int = 151936

    def weights(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every linear weight of a pass, by name."""
        return {
            "qkv": ((self.H + 2 * self.G) * self.D, self.E),
            "o": (self.E, self.H * self.D),
            "gate_up": (2 * self.F, self.E),
            "down": (self.E, self.F),
            "head": (self.V, self.E),
        }


MODELS = {
    "0.6B": Shape(28, 1024, 16, 3072),
    "1.7B": Shape(28, 2048, 16, 6144),
    "4B": Shape(36, 2560, 32, 9728),
    "8B": Shape(36, 4096, 32, 12288),
    "32B": Shape(64, 5120, 64, 25600),
}
