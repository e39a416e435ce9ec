"""What cycles cost, as a GPU says it that was idle before."""

from statistics import median
from types import SimpleNamespace

import pytest

from qwen3_model.decode import costs
from qwen3_model.decode.budget import ONE_PASS, PLAIN, Budget
from qwen3_model.decode.costs import AWAKE, ROUNDS, measured_costs
from qwen3_model.decode.cycle import IN_FLIGHT

# ms, about those of the embedded checkpoint on an H100 (2026-11-27).
COSTS = {PLAIN: 0.165, 15: 0.345, 31: 0.365, 63: 0.434, 127: 0.55, ONE_PASS: 0.355}


class Gpu:
    """Takes its time by COSTS and as much again after idling, ever less; its clock stands still otherwise."""

    def __init__(self, awake_after, blip=None):
        """In cycles. blip: a cycle that takes ten times as long."""
        self.awake_after, self.blip = awake_after, blip
        self.launched, self.read, self.most, self.now = [], 0, 0, 0.0

    def launch(self, kind):
        i = len(self.launched)
        self.launched.append(kind)
        self.most = max(self.most, i + 1 - self.read)

        def read():
            assert self.read == i, "a record is read in the order of the launches"
            self.read += 1
            slow = 1 + max(0.0, 1 - i / self.awake_after)
            milliseconds = COSTS[kind] * (10.0 if i == self.blip else slow)
            self.now += milliseconds / 1e3
            return SimpleNamespace(milliseconds=milliseconds)

        return read


def found_by(gpu, monkeypatch, awake=AWAKE):
    monkeypatch.setattr(costs, "perf_counter", lambda: gpu.now)
    monkeypatch.setattr(costs, "AWAKE", awake)
    return measured_costs(list(COSTS), gpu.launch)


def spread(found):
    """The largest error over the smallest one."""
    ratios = [found[kind] / COSTS[kind] for kind in COSTS]
    return max(ratios) / min(ratios)


@pytest.mark.parametrize("awake_after", [10, 30, 60])
def test_a_gpu_that_wakes_up_slows_all_kinds_alike(awake_after, monkeypatch):
    """Apart from what one round takes of it. Timed one kind after another the first looked far dearer."""
    gpu, kinds = Gpu(awake_after), list(COSTS)
    found = found_by(gpu, monkeypatch, awake=0)
    assert gpu.launched == ROUNDS * kinds and gpu.read == len(gpu.launched) and gpu.most == IN_FLIGHT
    gpu = Gpu(awake_after)
    one_by_one = {kind: median(gpu.launch(kind)().milliseconds for _ in range(ROUNDS)) for kind in kinds}
    assert spread(found) <= 1 + (len(kinds) - 1) / awake_after
    assert spread(found) - 1 < 0.25 * (spread(one_by_one) - 1)


def test_rounds_go_on_until_the_gpu_is_awake(monkeypatch):
    """Slow for most of 0.1 s: only the last rounds count."""
    gpu = Gpu(awake_after=120)
    found = found_by(gpu, monkeypatch)
    assert gpu.now >= AWAKE >= 0.05 and len(gpu.launched) / 2 < 120 and len(gpu.launched) % len(COSTS) == 0
    assert found == pytest.approx(COSTS) and list(Budget(found).costs) == list(COSTS)


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("which", range(ROUNDS))
def test_one_cycle_that_was_held_up_does_not_count(kind, which, monkeypatch):
    blip = which * len(COSTS) + list(COSTS).index(kind)
    assert found_by(Gpu(1e-9, blip), monkeypatch, awake=0) == pytest.approx(COSTS)
