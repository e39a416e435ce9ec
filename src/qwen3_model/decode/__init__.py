"""Decoding strategies: one file each, with a function `cycle(decoding) -> Run`. With `model.use_cycles` the
same cycles run without the host between them (device.py)."""

from collections.abc import Callable, Iterator

from . import autoregressive, device, rejection, two_pass
from .state import Decoding, Run

STRATEGIES: dict[str, Callable[[Decoding], Run]] = {
    "autoregressive": autoregressive.cycle,
    "two-pass": two_pass.cycle,
}
VERIFY = ("coupled", "rejection")  # how a two-pass cycle decides on its proposals


def cycles(decoding: Decoding, strategy: str) -> Iterator[Run]:
    """What each cycle after the prefill adds to the text, which the caller ends."""
    on_device = decoding.cache.cycles
    if on_device is not None and device.serves(strategy, decoding):
        yield from on_device.runs(strategy, decoding)
    cycle = rejection.cycle if decoding.verify == "rejection" else STRATEGIES[strategy]
    while True:
        yield cycle(decoding)


__all__ = ["STRATEGIES", "VERIFY", "Decoding", "Run", "cycles"]
