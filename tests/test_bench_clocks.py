"""Figures by hand, from clocks that are not ones: roofs, bytes over time, what is outside the clock."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import decode_report, measure, passes, replay
from bench.cases import OURS, Case
from bench.measure import Meter, Pool, Timing
from bench.passes import Pass
from bench.report import Result


def meter(numbers: int) -> Meter:
    """One without a GPU."""
    made = object.__new__(Meter)
    made.pool, made.seconds = Pool(torch.device("cpu"), numbers), 0.03
    return made


def test_the_read_roof_is_all_bytes_over_the_best_time(monkeypatch):
    made, medians = meter(3_000_000), iter([30.0, 12.0, 20.0])
    monkeypatch.setattr(made, "time", lambda call, copies: Timing(next(medians), 1.0, 99.0))
    assert made.read_roof() == pytest.approx(6_000_000 / 12e-6 / 1e9), "2 bytes each, the fastest setting"


def test_the_matmul_roof_counts_a_product_and_a_sum(monkeypatch):
    made, sizes = meter(2 * 64 * 64), []

    def time(call, copies):
        call(copies - 1)
        sizes.append(copies)
        return Timing(5.0, 4.0, 6.0)

    monkeypatch.setattr(made, "time", time)
    assert made.matmul_roof(64) == pytest.approx(2 * 64**3 / 5e-6 / 1e12) and sizes == [4]


def test_a_call_is_a_replay_over_its_copies(monkeypatch):
    """The first replay says how many follow, and does not count."""
    made, calls = meter(64), []
    replays = iter([900.0, *[40.0, 44.0, 48.0, 52.0, 56.0] * 9])
    monkeypatch.setattr(made, "_replay", lambda graph: next(replays))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    timing = made.time(calls.append, 4)
    assert calls == [0, 1, 0, 1, 2, 3], "two before the capture, then every copy"
    assert timing == Timing.of([10.0, 11.0, 12.0, 13.0, 14.0] * 5)


def test_replays_are_timed_one_behind_another(monkeypatch):
    """Replays of 500, 1, 2, 3, ... ms in each burst: the long one fills the queue and is not timed, and the
    host waits once a burst. A first look, then as many bursts as fill the time."""
    clock, said = SimpleNamespace(now=0.0, ran=0), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now
            said.append("event")

        def elapsed_time(self, other):
            return other.at - self.at

    def replayed():
        place = clock.ran % (measure.BURST + 1)
        clock.now, clock.ran = clock.now + (place or 500), clock.ran + 1
        said.append("replay")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    timing = measure.time_replays(replayed, seconds=0.021)
    assert timing == Timing.of([1000.0 * i for i in range(1, measure.BURST + 1)])
    burst = ["replay"] + ["event", "replay"] * measure.BURST + ["event", "wait"]
    assert said == 4 * burst, "21 samples at least"


def test_bytes_over_time_and_shares_of_a_floor():
    case = Case("linear", "8B", "down", 1, None, 6_000_000, 9_000_000, lambda pool: (1, {}))
    result = Result(
        case, {OURS: Timing(4.0, 3.0, 5.0), "a": Timing(9.0, 1.0, 9.0), "b": Timing(6.0, 6.0, 7.0)}
    )
    assert result.gb_s == 6_000_000 / 4e-6 / 1e9 == 1500 and result.best_peer == ("b", 6.0)
    assert result.gain == 1.5
    measured = passes.Measured(Pass("verify-8", 8), 5, 3_000_000, Timing(2000.0, 1.0, 1.0), launch_us=50.0)
    row = decode_report.pass_row("m", measured, 3.0, 500.0)
    assert row["floor_ms"] == 1.0 and row["share_of_floor"] == 0.5
    assert row["over_token"] == 4.0 and row["host_launch_share"] == 0.025


def test_replayed_tokens_a_second_begin_behind_the_prefill(monkeypatch):
    """The clock: 100 s of prefill, then a second a cycle."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(replay, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def generate(prompt, strategy, count, *, on_tokens, **settings):
        for tokens, seconds in ([[1], 100.0], [[2, 3, 4], 1.0], [[5], 1.0]):
            clock.now += seconds
            on_tokens(tokens, "")
        stats = SimpleNamespace(cycle_tokens=4, cycles=2, forwards=5, nodes=6, cycles_of={"two-pass": 2})
        return SimpleNamespace(whole=lambda: SimpleNamespace(stats=stats))

    made = object.__new__(replay.Replay)
    made.model = SimpleNamespace(generate=generate, config=SimpleNamespace(vocab_size=97))
    made.forced, made.tokens, made.temperature = SimpleNamespace(), 5, 0.0
    made.texts = [SimpleNamespace(prompt_tokens=3, tokens=9)] * 3
    way = replay.Way("tree", "two-pass", 3)
    found = replay.Measured(way)
    for number in range(3):
        made.decode(number, way, found)
        assert made.forced.next == number
    assert found.seconds == [2.0] * 3 and found.tokens == [4] * 3 and found.forwards == [4] * 3
    assert found.per_second == 2.0 and found.cycles_of == Counter({"two-pass": 6})
    found.seconds[0] = 4.0
    row = found.row("m", SimpleNamespace(says="", simulated="s", checkpoint=""))
    assert (row["tokens_per_second"], row["median_of_texts"]) == (1.5, 2.0)
    assert (row["ms_per_cycle"], row["tokens_per_cycle"], row["tokens_per_forward"]) == (1333.3333, 2.0, 1.0)
    assert row["nodes_per_cycle"] == 3.0
