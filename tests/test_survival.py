"""Weights of offsets by measured survival: the formula, the measurement, and a run that goes on."""

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_config

from qwen3_model import InputError
from qwen3_model.training import loop, survival
from qwen3_model.training.distill import Blocks, distill, start_from_ar
from qwen3_model.training.loop import Plan
from qwen3_model.training.network import Network
from qwen3_model.training.objective import Objective
from qwen3_model.training.state import read_progress
from qwen3_model.training.survival import KEPT, Survival, chances_of, survival_weights

CHANCE = st.floats(0.0, 1.0, allow_subnormal=False)
BY_SURVIVAL = Objective("ce", "survival")
PLAN = Plan(steps=9, batch=2, length=32, lr=5e-3, save_every=0.0)
BLOCKS = Blocks(count=4, size=8)


def tokens_a_cycle(chances: list[float]) -> float:
    """Each number of kept proposals times its probability."""
    found = 0.0
    for kept in range(len(chances) + 1):
        ends = 1 - chances[kept] if kept < len(chances) else 1.0
        found += (kept + 1) * math.prod(chances[:kept]) * ends
    return found


@given(st.lists(CHANCE, min_size=1, max_size=12))
def test_weights_are_derivatives_of_the_tokens_a_cycle(chances):
    """By differences: tokens a cycle are linear in each chance."""
    worth = [
        tokens_a_cycle([*chances[:j], 1.0, *chances[j + 1 :]])
        - tokens_a_cycle([*chances[:j], 0.0, *chances[j + 1 :]])
        for j in range(len(chances))
    ]
    want = [w / max(worth) for w in worth]
    assert survival_weights(chances, 0.0) == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert survival_weights(chances) == pytest.approx([max(w, 0.15) for w in want], rel=1e-6)


def test_chances_by_hand():
    """Of five blocks: one has ended before its last proposal."""
    yes, no = True, False
    agrees = torch.tensor([[yes, yes, yes], [yes, no, yes], [no, yes, yes], [yes, yes, no], [yes, yes, yes]])
    known = torch.ones(5, 3, dtype=torch.bool)
    known[4, 2] = False
    assert chances_of(agrees, known) == pytest.approx([4 / 5, 3 / 4, 1 / 2])
    assert chances_of(agrees.view(5, 1, 3), known.view(5, 1, 3)) == pytest.approx([4 / 5, 3 / 4, 1 / 2])
    assert chances_of(torch.zeros(2, 3, dtype=torch.bool), known[:2]) == [0.0, 0.0, 0.0]


def network_of() -> Network:
    network = Network(small_config())
    network.initialise(0)
    start_from_ar(network)
    return network


def test_a_run_that_goes_on_has_the_weights_it_had(tmp_path, monkeypatch):
    """Interrupted between two measurements: what was measured is in the state, and every bit comes out."""
    monkeypatch.setattr(survival, "TOKENS", 8)
    monkeypatch.setattr(survival, "EVERY", 4)
    text = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(0))
    prompts, state = text[:40].view(2, 20).long(), tmp_path / "s.safetensors"
    measured: list[list[float]] = []
    real, last = survival.chances_of, 0

    def chances(*pair):
        measured.append(real(*pair))
        return measured[-1]

    def show(self, step, *_):
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(survival, "chances_of", chances)
    monkeypatch.setattr(loop._Report, "show", show)

    def run(resume=False):
        network, kept = network_of(), {}
        measured.clear()
        with contextlib.suppress(KeyboardInterrupt):
            distill(network, text, PLAN, BLOCKS, state if last or resume else None, resume,
                    objective=BY_SURVIVAL, prompts=prompts, kept=kept)  # fmt: skip
        return network.state_dict(), kept, list(measured)

    whole, kept, times = run()
    assert len(times) == 4, "before the clock, and at steps 0, 4 and 8"
    last = 7
    _, _, before = run()
    assert read_progress(state)["step"] == 6 and read_progress(state)["kept"] == {KEPT: before[-1]}
    last = 0
    again, kept_again, after = run(resume=True)
    assert kept_again == kept and len(after) == 1, "at step 8 alone"
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_text_too_short_to_measure_on_is_one_line():
    network = network_of()
    with pytest.raises(InputError, match="held-out text"):
        Survival(network, None, {})
    with pytest.raises(InputError, match="context of"):
        Survival(network, torch.zeros(1, network.config.context_length - 10, dtype=torch.long), {})


def test_a_state_of_an_earlier_version_has_the_settings_it_could_have(tmp_path):
    told = {"tokens": 5}
    loop._check_same(tmp_path / "s", told, told | {"loss": "kl", "offset_weights": "decay"})
    with pytest.raises(InputError, match="whose loss was 'kl', not 'ce'"):
        loop._check_same(tmp_path / "s", told, told | {"loss": "ce", "offset_weights": "decay"})
