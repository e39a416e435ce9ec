"""Where a cycle's time is booked, by clocks that are not ones: the kind that ran, the part that took it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from lookup import fast_choices, lookup_model
from scripted import ScriptedModel
from small import small_config

from qwen3_model.decode import autoregressive, device, one_pass, two_pass
from qwen3_model.decode.controller import PLAIN, Controller, Times

PROMPT = [5, 6, 7]


@pytest.fixture
def model(monkeypatch):
    made = lookup_model(0.5, vocab_size=32, mask_token_id=31)
    fast_choices(made, monkeypatch)
    made.use_graphs = made.use_cycles = True
    return made


@pytest.mark.skipif(DEVICE != "cpu", reason="a graph on a GPU has times of its own")
def test_a_cycles_time_is_its_kinds(model, monkeypatch):
    """The next cycle is launched before one is read, and may be of another kind."""
    of, booked, observed = {1: PLAIN, 4: 3, 8: 7}, [], []
    turns = iter([3, PLAIN, 3, 3, 7, PLAIN, PLAIN, 7, 7, 3] * 9)
    launch = device.Cycle.launch

    def timed(self, pool, timed=False):
        read = launch(self, pool, timed)
        return lambda: replace(read(), milliseconds=100.0 + of[len(self.choices)])

    monkeypatch.setattr(device.Cycle, "launch", timed)
    monkeypatch.setattr(Controller, "next", lambda self: next(turns))
    monkeypatch.setattr(Times, "observe", lambda self, kind, cost: booked.append((kind, cost)))
    monkeypatch.setattr(Controller, "observe", lambda self, kind, path: observed.append((kind, path)))
    stats = model.generate(PROMPT, max_new_tokens=16, strategy="auto", block_size=4).stats
    assert {kind for kind, _ in booked} == {PLAIN, 3, 7} and len(booked) == stats.cycles
    assert all(cost == 100.0 + kind for kind, cost in booked), booked
    assert [kind for kind, _ in booked[:6]] == [3, PLAIN, 3, 3, 7, PLAIN]
    for (kind, _), (told, path) in zip(booked, observed, strict=True):
        assert told == kind and (path is None) == (kind == PLAIN), (kind, told, path)


def test_the_parts_of_a_cycle_on_the_device(model):
    """Begin, behind the draft, behind the tree, end: low bits of ns, which pass the largest int32."""
    model.generate(PROMPT, max_new_tokens=4, strategy="two-pass", tree_nodes=2, block_size=3)
    cycles = model.spare_cache.cycles
    (cycle,) = cycles._cycles.values()
    with torch.inference_mode():
        read = cycle.launch(cycles._pool)
        slot = cycle.slots[(cycle.launches - 1) % len(cycle.slots)]
        slot.wait()[4:8] = torch.tensor([2**31 - 400, 2**31 - 300, -(2**31) + 100, -(2**31) + 1100])
    assert read().run.seconds == pytest.approx([100e-9, 400e-9, 1000e-9], rel=1e-9)


class Ticking(ScriptedModel):
    """Takes a second a diffusion pass, ten an AR or mixed one."""

    def __init__(self, clock):
        super().__init__(small_config(eos_token_ids=()), skill=1.0)
        self.clock = clock

    def forward(self, rows, cache, logits_of=None, repeats=True):
        self.clock.now += 10.0 if rows.n_ar else 1.0
        return super().forward(rows, cache, logits_of, repeats)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [({"strategy": "two-pass", "tree_nodes": 5}, (1, 100, 10)),
     ({"strategy": "two-pass", "tree_nodes": 0}, (1, 0, 10)), ({"strategy": "autoregressive"}, (0, 0, 10))],
    ids=str,
)  # fmt: skip
def test_the_parts_of_a_cycle_of_the_loop(settings, parts, monkeypatch):
    clock, runs = SimpleNamespace(now=0.0), []
    ticks = SimpleNamespace(perf_counter=lambda: clock.now)
    for module in (two_pass, one_pass, autoregressive):
        monkeypatch.setattr(module, "time", ticks)
    grow = two_pass.draft_tree

    def slow(*arguments):
        clock.now += 100.0
        return grow(*arguments)

    monkeypatch.setattr(two_pass, "draft_tree", slow)
    stats = (
        Ticking(clock)
        .generate([1], max_new_tokens=17, on_run=lambda run, kept: runs.append(run), **settings)
        .stats
    )
    cycles = [run for run in runs[1:] if run.kind != "plain" or settings["strategy"] == "autoregressive"]
    assert len(cycles) > 1 and all(tuple(run.seconds) == parts for run in cycles)
    plain = 10.0 * (len(runs) - 1 - len(cycles))
    wanted = [n * len(cycles) for n in parts]
    wanted[2] += plain
    assert stats.seconds_in == wanted


def test_the_parts_of_a_one_pass_cycle(monkeypatch):
    clock, runs = SimpleNamespace(now=0.0), []
    ticks = SimpleNamespace(perf_counter=lambda: clock.now)
    for module in (two_pass, one_pass):
        monkeypatch.setattr(module, "time", ticks)
    grow = one_pass.grow

    def slow(*arguments, **named):
        clock.now += 100.0
        return grow(*arguments, **named)

    monkeypatch.setattr(one_pass, "grow", slow)
    Ticking(clock).generate(
        [1], max_new_tokens=20, strategy="one-pass", on_run=lambda run, kept: runs.append(run)
    )
    assert {tuple(run.seconds) for run in runs[1:-1]} == {(0.0, 100.0, 10.0)} and len(runs) > 3
