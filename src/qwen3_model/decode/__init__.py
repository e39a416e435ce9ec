"""Decoding strategies: one file each, with a function `cycles(decoding)` that yields runs. With
`model.use_cycles` the same cycles run without the host between them (device.py)."""

from collections.abc import Callable, Iterator

from . import autoregressive, device, one_pass, rejection, two_pass
from .state import Decoding, Run

STRATEGIES: dict[str, Callable[[Decoding], Iterator[Run]]] = {
    "autoregressive": autoregressive.cycles,
    "two-pass": two_pass.cycles,
    "one-pass": one_pass.cycles,
    "auto": two_pass.cycles,
}
VERIFY = ("coupled", "rejection")  # how a two-pass cycle decides on its proposals


def cycles(decoding: Decoding, strategy: str) -> Iterator[Run]:
    """What each cycle after the prefill adds to the text, which the caller ends."""
    on_device = decoding.cache.cycles
    if on_device is not None and device.serves(strategy, decoding):
        yield from on_device.runs(strategy, decoding)
    elif decoding.verify == "rejection":
        yield from rejection.cycles(decoding)
    else:
        yield from STRATEGIES[strategy](decoding)


__all__ = ["STRATEGIES", "VERIFY", "Decoding", "Run", "cycles"]
