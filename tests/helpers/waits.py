"""How long texts of an engine wait for their next tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

from qwen3_model import Engine
from qwen3_model.decode.sequence import Sequence


def gaps(engine: Engine, text: Sequence, done: Callable[[], bool]) -> list[float]:
    """Seconds between the steps that bring a text tokens, until it has ended or that is done."""
    found, length, last = [], len(text.stream.token_ids), time.perf_counter()
    while not done() and not text.finished:
        engine.step()
        if len(text.stream.token_ids) > length:
            now, length = time.perf_counter(), len(text.stream.token_ids)
            found.append(now - last)
            last = now
    return found
