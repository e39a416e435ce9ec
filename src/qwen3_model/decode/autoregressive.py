"""Plain decoding: one AR row a pass, one token a cycle. What every other strategy must equal."""

from __future__ import annotations

import time
from collections.abc import Iterator

from orthrus_kernels import Rows

from .state import Decoding, Run


def cycles(decoding: Decoding) -> Iterator[Run]:
    """One token after the other."""
    while True:
        yield cycle(decoding)


def cycle(decoding: Decoding) -> Run:
    """Decode the token after the root."""
    began = time.perf_counter()
    out = decoding.model.forward(Rows.chain([decoding.root], decoding.start), decoding.cache)
    decoding.cache.commit(out.keys, out.values, [0])
    run = decoding.extend(decoding.choose(out.logits, [[]]), out.logits, forwards=1)
    run.seconds = 0.0, 0.0, time.perf_counter() - began
    return run
