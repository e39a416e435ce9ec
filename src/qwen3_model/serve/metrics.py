"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from ..decode.sequence import GenerationStats
    from .messages import Load

FIRST = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
TOKEN = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
# Of the engine's Load: field, what it says
GAUGES = {
    "running": "texts in slots", "waiting": "texts that wait for a slot",
    "paused": "running texts that wait for a page of the cache",
    "pages_used": "pages of the cache that running texts own", "pages": "pages of the cache",
}  # fmt: skip


class Metrics:
    """Counts of one app, in a registry of its own. load: the engine's last counts; None before it runs."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load
        self._made = self._took = 0  # tokens of cycles, cycles
        self._registry = registry = CollectorRegistry()
        registry.register(self)

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"orthrus_{name}", says, labels, registry=registry)

        self.first_token = Histogram(
            "orthrus_time_to_first_token_seconds", "of a choice, from when it was asked for",
            buckets=FIRST, registry=registry,
        )  # fmt: skip
        self.token = Histogram(
            "orthrus_time_per_token_seconds", "of a choice, behind its first one",
            buckets=TOKEN, registry=registry,
        )  # fmt: skip
        self.tokens = counter("generated_tokens", "tokens of choices that have ended")
        self.prompt_tokens = counter("prompt_tokens", "tokens of their prompts, those of each choice")
        self.cached_tokens = counter("cached_prompt_tokens", "prompt tokens that were found in the cache")
        self.cycles = counter("cycles", "decoding cycles of choices that have ended")
        self.cycle_tokens = counter("cycle_tokens", "tokens that these cycles made")
        self.finished = counter("choices", "choices that have ended by themselves", "finish_reason")
        self.cancelled = counter(
            "cancelled", "requests that ended before their texts did: the client has gone, or an error"
        )
        self.refused = counter("refused", "answers that are errors, by HTTP status", "status")
        self._gain = Gauge(
            "orthrus_tokens_per_cycle", "cycle tokens over cycles, since the start", registry=registry
        )

    def ended(self, stats: GenerationStats, prompt_tokens: int, seconds: float) -> None:
        """Count a choice that has ended by itself. seconds: from its first token to its last."""
        self.tokens.inc(stats.tokens)
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(stats.cached_tokens)
        self.cycles.inc(stats.cycles)
        self.cycle_tokens.inc(stats.cycle_tokens)
        self._made, self._took = self._made + stats.cycle_tokens, self._took + stats.cycles
        self._gain.set(self._made / self._took if self._took else 0.0)
        self.finished.labels(stats.finish_reason).inc()
        if stats.tokens > 1:
            self.token.observe(seconds / (stats.tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """The engine's own counts, as a collector."""
        load = self._load()
        if load is None:
            return
        for name, says in GAUGES.items():
            kind = "requests" if name in ("running", "waiting", "paused") else "cache"
            yield GaugeMetricFamily(f"orthrus_{kind}_{name}", says, getattr(load, name))
        says = "texts that gave up their pages and were prefilled again"
        yield CounterMetricFamily("orthrus_preemptions", says, load.preemptions)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
