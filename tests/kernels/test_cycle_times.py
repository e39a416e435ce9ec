"""Where a cycle's time is booked, by clocks that are not ones: the kind that ran, the part that took it."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from lookup import fast_choices, lookup_model
from scripted import ScriptedModel
from small import small_config, small_model

from orthrus_kernels import clock as clocks
from orthrus_kernels.layout import Record
from qwen3_model.decode.controller import PLAIN, Controller, Times
from qwen3_model.decode.cycle import Cycle

PROMPT = [5, 6, 7]


@pytest.fixture
def model(monkeypatch):
    made = lookup_model(0.5, vocab_size=32, mask_token_id=31)
    fast_choices(made, monkeypatch)
    return made


@pytest.mark.skipif(DEVICE != "cpu", reason="a graph on a GPU has times of its own")
def test_a_cycles_time_is_its_kinds(model, monkeypatch):
    """The next cycle is launched before one is read, and may be of another kind; the text stays."""
    of, booked, observed = {1: PLAIN, 4: 3, 8: 7}, [], []
    turns = iter([3, PLAIN, 3, 3, 7, PLAIN, PLAIN, 7, 7, 3] * 9)
    launch = Cycle.launch
    plain = model.generate(PROMPT, "autoregressive", max_new_tokens=16)

    def timed(self, pool, timed=False):
        read = launch(self, pool, timed)
        return lambda: [end._replace(milliseconds=100.0 + of[self.nodes]) for end in read()]

    monkeypatch.setattr(Cycle, "launch", timed)
    monkeypatch.setattr(Controller, "next", lambda self: next(turns))
    monkeypatch.setattr(Times, "observe", lambda self, kind, cost: booked.append((kind, cost)))
    monkeypatch.setattr(Controller, "observe", lambda self, kind, path: observed.append((kind, path)))
    model.engine.runner.ahead = True
    result = model.generate(PROMPT, max_new_tokens=16, strategy="auto", block_size=4)
    assert result.token_ids == plain.token_ids and result.logprobs == plain.logprobs
    assert {kind for kind, _ in booked} == {PLAIN, 3, 7} and len(booked) == result.stats.cycles
    assert all(cost == 100.0 + kind for kind, cost in booked), booked
    assert [kind for kind, _ in booked[:6]] == [3, PLAIN, 3, 3, 7, PLAIN]
    for (kind, _), (told, path) in zip(booked, observed, strict=True):
        assert told == kind and (path is None) == (kind == PLAIN), (kind, told, path)
    counts = result.stats.cycles_of
    assert set(counts) == {"plain", "two-pass"} and sum(counts.values()) == result.stats.cycles
    assert result.stats.forwards == 1 + result.stats.cycles + counts["two-pass"]


def test_the_parts_of_a_cycle_on_the_device(model):
    """Begin, behind the draft, behind the tree, end: low bits of ns, which pass the largest int32."""
    model.generate(PROMPT, max_new_tokens=4, strategy="two-pass", tree_nodes=2, block_size=3)
    over = model.engine.runner.cycles
    cycle = next(cycle for (kind, *_), cycle in over._cycles.items() if kind == 2)
    with torch.inference_mode():
        read = cycle.launch(over.pool)
        times = cycle.readings[(cycle.launches - 1) % len(cycle.readings)].wait()[0, Record.BEGAN :]
        times[:4] = torch.tensor([2**31 - 400, 2**31 - 300, -(2**31) + 100, -(2**31) + 1100])
    assert read()[0].run.seconds == pytest.approx([100e-9, 400e-9, 1000e-9], rel=1e-9)


class Ticking(ScriptedModel):
    """Takes a second a diffusion pass, ten an AR or mixed one."""

    def __init__(self, clock):
        super().__init__(small_config(eos_token_ids=()), skill=1.0)
        self.clock = clock

    def states(self, given, cache):
        self.clock.now += 10.0 if given.plan.shape.n_ar else 1.0
        return super().states(given, cache)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [({"strategy": "two-pass", "tree_nodes": 5}, (1, 100, 10)),
     ({"strategy": "two-pass", "tree_nodes": 0}, (1, 100, 10)), ({"strategy": "autoregressive"}, (0, 0, 10)),
     ({"strategy": "one-pass"}, (0, 100, 10))],
    ids=str,
)  # fmt: skip
def test_the_parts_of_a_cycle_of_the_twins(settings, parts, monkeypatch):
    """In ms: a clock's low half comes again every 4 s."""
    clock, runs = SimpleNamespace(now=0.0), []
    ticks = SimpleNamespace(perf_counter_ns=lambda: int(clock.now * 1e6))
    monkeypatch.setattr(clocks, "time", ticks)
    grown = import_module("orthrus_kernels.grow")
    grow = grown.draft_tree

    def slow(*arguments, **named):
        clock.now += 100.0
        return grow(*arguments, **named)

    monkeypatch.setattr(grown, "draft_tree", slow)
    stats = (
        Ticking(clock)
        .generate([1], max_new_tokens=17, on_run=lambda run, kept: runs.append(run), **settings)
        .stats
    )
    cycles = [run for run in runs[1:] if run.kind != "plain" or settings["strategy"] == "autoregressive"]
    assert len(cycles) > 1
    assert all([round(1e3 * part) for part in run.seconds] == list(parts) for run in cycles)
    wanted = [n * len(cycles) for n in parts]
    wanted[2] += 10 * (len(runs) - 1 - len(cycles))
    assert [1e3 * part for part in stats.seconds_in] == pytest.approx(wanted)


@pytest.mark.parametrize("strategy", ["autoregressive", "lookup", "two-pass", "one-pass"])
def test_the_time_of_cycles_on_torchs_own_operations(strategy):
    """The backend has tables of its own and marks the clock: no part takes longer than the text."""
    model = small_model("float32", backend="torch")
    stats = model.generate([5, 6, 7], max_new_tokens=6, strategy=strategy).stats
    assert 0 < sum(stats.seconds_in) <= stats.seconds
