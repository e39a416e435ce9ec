"""The state of an unfinished training: damaged ones, those of another run, and who may write one."""

import dataclasses
import json
import math
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import small_config
from trained import BLOCKS, PLAN

from qwen3_model import InputError
from qwen3_model.training import loop
from qwen3_model.training.distill import distill, start_from_ar
from qwen3_model.training.network import Network
from qwen3_model.training.optimizer import make_optimizers
from qwen3_model.training.pretrain import pretrain
from qwen3_model.training.state import load_state, save_state

STEPS = dataclasses.replace(PLAN, steps=2, batch=2, length=32)
FEW = dataclasses.replace(BLOCKS, count=2, size=4)


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 90, (400,), generator=torch.Generator().manual_seed(seed)).int()


def network(seed: int = 1) -> Network:
    made = Network(small_config())
    made.initialise(seed)
    start_from_ar(made)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A state of two steps of pretraining: tensors and progress."""
    file = tmp_path_factory.mktemp("state") / "s"
    pretrain(network(), text(), STEPS, file)
    with safe_open(file, "pt") as opened:
        return load_file(file), json.loads(opened.metadata()["progress"])


def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two optimizer tensors of other shapes, each in the other's place."""
    names = [name for name in tensors if name.endswith("momentum_buffer")]
    first = names[0]
    second = next(name for name in names if tensors[name].shape != tensors[first].shape)
    return tensors | {first: tensors[second], second: tensors[first]}


def with_progress(**changes):
    return lambda tensors, progress: (tensors, {k: v for k, v in (progress | changes).items() if v != "NONE"})


def with_tensors(change):
    return lambda tensors, progress: (change(dict(tensors)), progress)


def without(part: str):
    return with_tensors(lambda tensors: {name: t for name, t in tensors.items() if part not in name})


WEIGHT = "weight/model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "progress is a list": lambda tensors, progress: (tensors, [1]),
    "progress is null": lambda tensors, progress: (tensors, None),
    "no progress": lambda tensors, progress: (tensors, "NONE"),
    "progress is nested deeply": lambda tensors, progress: (tensors, "[" * 100_000),
    "no step": with_progress(step="NONE"),
    "no seconds": with_progress(seconds="NONE"),
    "no settings": with_progress(of="NONE"),
    "settings are a list": with_progress(of=[]),
    "step 10**30": with_progress(step=10**30),
    "step -1": with_progress(step=-1),
    "step 2.0": with_progress(step=2.0),
    "step true": with_progress(step=True),
    "step 0 with optimizers": with_progress(step=0),
    "seconds NaN": with_progress(seconds=math.nan),
    "seconds infinite": with_progress(seconds=math.inf),
    "seconds negative": with_progress(seconds=-1.0),
    "seconds a string": with_progress(seconds="1"),
    "swapped optimizer tensors": with_tensors(swapped),
    "no optimizer": without("optimizer"),
    "no second moments": without("exp_avg_sq"),
    "no weight": without(WEIGHT),
    "another name": with_tensors(lambda tensors: tensors | {"more": torch.zeros(1)}),
    "another optimizer": with_tensors(lambda tensors: tensors | {"optimizer/7/0/step": torch.zeros(())}),
    "no number": with_tensors(lambda tensors: tensors | {"optimizer/a/b/c": torch.zeros(())}),
    "another dtype": with_tensors(lambda tensors: tensors | {WEIGHT: tensors[WEIGHT].bfloat16()}),
    "a shape that would spread": with_tensors(lambda tensors: tensors | {WEIGHT: tensors[WEIGHT][:1]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_in_one_line_and_nothing_is_taken_from_it(damage, whole, tmp_path):
    tensors, progress = DAMAGES[damage](*whole)
    said = progress if isinstance(progress, str) else json.dumps(progress)
    save_file(tensors, tmp_path / "s", {"progress": said} if said != "NONE" else None)
    before = (tmp_path / "s").read_bytes()
    changed, untouched = network(), network().state_dict()
    with pytest.raises(InputError, match="is damaged or belongs to another run") as error:
        pretrain(changed, text(), STEPS, tmp_path / "s", resume=True)
    assert "delete it to start anew" in str(error.value) and len(str(error.value)) < 500
    assert all(torch.equal(weight, untouched[name]) for name, weight in changed.state_dict().items())
    assert (tmp_path / "s").read_bytes() == before


def test_a_state_belongs_to_its_text_and_its_base(tmp_path):
    state = tmp_path / "s"
    for training, args in ((pretrain, ()), (distill, (FEW,))):
        training(network(), text(), STEPS, *args, state)
        with pytest.raises(InputError, match="whose sha256 of the text was"):
            training(network(), text(seed=1), STEPS, *args, state, True)
        assert training(network(), text(), STEPS, *args, state, True)[0] == 2
        state.unlink()
    distill(network(), text(), STEPS, FEW, state)
    with pytest.raises(InputError, match="whose sha256 of the base's weights was"):
        distill(network(seed=2), text(), STEPS, FEW, state, True)


def test_a_file_that_has_appeared_in_the_states_place_stays(tmp_path):
    state = tmp_path / "s"
    state.write_text("mine")
    with pytest.raises(InputError, match="is not the state of this run any more"):
        pretrain(network(), text(), STEPS, state)
    assert state.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_state_before_the_first_step_holds_no_optimizer(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizers = make_optimizers([("w", weight)], 0.1, 0.0)
    progress = {"step": 0, "seconds": 0, "of": {}}
    save_state(tmp_path / "s", {"w": weight.data}, optimizers, progress)
    assert load_state(tmp_path / "s", {"w": weight.data}, optimizers) == progress


@pytest.mark.usefixtures("farewells")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_farewell_signal_saves_the_state_and_the_resumed_run_has_the_same_weights(
    number, tmp_path, monkeypatch
):
    from qwen3_model.training.interrupts import ending_by_signals

    plan, state = dataclasses.replace(STEPS, steps=4), tmp_path / "s"
    expected, found = network(), network()
    pretrain(expected, text(), plan)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Report, "show", lambda self, step, *_: step == 2 and signal.raise_signal(number))
        with pytest.raises(SystemExit) as ended, ending_by_signals():
            pretrain(found, text(), plan, state)
    assert ended.value.code == 128 + number and signal.getsignal(number) is signal.SIG_DFL
    shown: list[int] = []
    monkeypatch.setattr(loop._Report, "show", lambda self, step, *_: shown.append(step))
    again = network()
    pretrain(again, text(), plan, state, resume=True)
    assert shown == [3, 4]
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in expected.state_dict().items())


def test_a_signal_that_its_host_handles_is_left_alone(tmp_path):
    from qwen3_model.training.interrupts import ending_by_signals

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ending_by_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
