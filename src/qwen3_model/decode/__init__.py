"""Decoding strategies: one file each, with a function `cycle(decoding) -> Run`."""

from collections.abc import Callable

from . import autoregressive, two_pass
from .state import Decoding, Run

STRATEGIES: dict[str, Callable[[Decoding], Run]] = {
    "autoregressive": autoregressive.cycle,
    "two-pass": two_pass.cycle,
}

__all__ = ["STRATEGIES", "Decoding", "Run"]
