"""What cycles cost, as a GPU says it that was idle before."""

from statistics import median
from types import SimpleNamespace

import pytest

from qwen3_model.decode.budget import ONE_PASS, PLAIN, Budget
from qwen3_model.decode.costs import ROUNDS, measured_costs
from qwen3_model.decode.cycle import IN_FLIGHT

COSTS = {PLAIN: 0.165, 15: 0.345, 31: 0.365, 63: 0.434, 127: 0.55, ONE_PASS: 0.355}


class Gpu:
    """Takes its time by COSTS and as much again after idling, ever less; reads come in order."""

    def __init__(self, awake_after, blip=None):
        self.awake_after, self.blip = awake_after, blip
        self.launched, self.read, self.most = [], 0, 0

    def launch(self, kind):
        i = len(self.launched)
        self.launched.append(kind)
        self.most = max(self.most, i + 1 - self.read)

        def read():
            assert self.read == i, "a record is read in the order of the launches"
            self.read += 1
            slow = 1 + max(0.0, 1 - i / self.awake_after)
            return SimpleNamespace(milliseconds=COSTS[kind] * (10.0 if i == self.blip else slow))

        return read


@pytest.mark.parametrize("awake_after", [10, 30, 60])
def test_a_gpu_that_wakes_up_slows_all_kinds_alike(awake_after):
    """Apart from what one round takes of it. Timed one kind after another the first looked far dearer."""
    gpu, kinds = Gpu(awake_after), list(COSTS)
    found = measured_costs(kinds, gpu.launch, awake=0)
    assert gpu.launched == ROUNDS * kinds and gpu.read == len(gpu.launched) and gpu.most == IN_FLIGHT
    gpu = Gpu(awake_after)
    one_by_one = {kind: median(gpu.launch(kind)().milliseconds for _ in range(ROUNDS)) for kind in kinds}
    assert spread(found) <= 1 + (len(kinds) - 1) / awake_after
    assert spread(found) - 1 < 0.25 * (spread(one_by_one) - 1)


def spread(found):
    """The largest error over the smallest one."""
    ratios = [found[kind] / COSTS[kind] for kind in COSTS]
    return max(ratios) / min(ratios)


def test_rounds_go_on_until_the_gpu_is_awake():
    gpu = Gpu(awake_after=60)
    found = measured_costs(list(COSTS), gpu.launch, awake=0.02)
    assert len(gpu.launched) > 2 * ROUNDS * len(COSTS) and len(gpu.launched) % len(COSTS) == 0
    assert found == pytest.approx(COSTS) and list(Budget(found).costs) == list(COSTS)


@pytest.mark.parametrize("blip", range(ROUNDS * len(COSTS)))
def test_one_cycle_that_was_held_up_does_not_count(blip):
    assert measured_costs(list(COSTS), Gpu(1e-9, blip).launch, awake=0) == pytest.approx(COSTS)
