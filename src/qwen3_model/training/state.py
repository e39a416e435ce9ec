"""The state of an unfinished training: weights, optimizers and progress in one safetensors file (a pickle is
never written or read). A file is checked whole before anything of it is used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import checkpoint
from ..errors import InputError, foreign, quoted
from ..files import replacing

MOST_STEPS = 10**9  # of a training, and rows of a step: products of such numbers stay within 64 bits
# What an optimizer keeps of a parameter, in its shape; `step` is one number.
KEPT: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Muon: ("momentum_buffer",),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
FOREIGN = "{} is damaged or belongs to another run"
ADVICE = "name another --state, or delete it to start anew"
SHA_OF_TEXT, SHA_OF_BASE = "sha256 of the text", "sha256 of the base's weights"  # settings of a run


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """What stands for the content of tensors in a state: a resumed run must have the same."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def save_state(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    progress: Mapping[str, Any],
) -> None:
    """Write a state, whole or not at all. progress: see `read_progress`. Raises InputError where another
    file has appeared in its place."""
    tensors = {f"weight/{name}": w.detach().contiguous() for name, w in weights.items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{i}/{index}/{key}"] = torch.as_tensor(value).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not is_state(path):
        raise InputError(f"{path} is not the state of this run any more: it is left as it is")
    try:
        with replacing(path) as file:
            checkpoint.save(tensors, file, metadata={"progress": json.dumps(progress)})
    except InputError as error:  # names the file beside it that is gone
        raise InputError(f"the state {path} cannot be written ({error}): choose another --state") from None


def is_state(path: Path) -> bool:
    """Whether a file is the state of a training, of whichever."""
    try:
        read_progress(path)
    except InputError:
        return False
    return True


def read_progress(path: Path) -> dict[str, Any]:
    """How far a state's run had come: `step`, `seconds`, `of`, the settings that a run that goes on must
    share, and `kept`, lists of shares by name that it goes on with. Raises InputError for a file that says
    something else."""
    with foreign(FOREIGN.format(path), ADVICE), safe_open(path, framework="numpy") as file:
        progress = json.loads(file.metadata()["progress"])
        step, seconds = progress["step"], progress["seconds"]
        if type(step) is not int or not 0 <= step <= MOST_STEPS:
            raise ValueError(f"step is {quoted(step)}")
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise ValueError(f"seconds is {quoted(seconds)}")
        if not isinstance(progress["of"], dict):
            raise ValueError(f"its settings are {quoted(progress['of'])}")
        if not all(_shares(value) for value in dict(progress.get("kept", {})).values()):
            raise ValueError(f"what it keeps is {quoted(progress['kept'])}")
        return progress


def _shares(value: object) -> bool:
    return isinstance(value, list) and all(type(n) in (int, float) and 0 <= n <= 1 for n in value)


def load_state(
    path: Path, weights: Mapping[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Read a state back into the same weights and optimizers; returns its progress. Raises InputError for a
    file that is damaged or of other weights."""
    progress = read_progress(path)
    with foreign(FOREIGN.format(path), ADVICE), safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        _check_tensors(found, _expected(weights, optimizers, started=progress["step"] > 0))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(found[f"weight/{name}"])
        for i, optimizer in enumerate(optimizers):
            groups = optimizer.state_dict()["param_groups"]
            numbers = [index for group in groups for index in group["params"]] if progress["step"] else []
            state = {
                index: {key: found[f"optimizer/{i}/{index}/{key}"] for key in KEPT[type(optimizer)]}
                for index in numbers
            }
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress


def _expected(
    weights: Mapping[str, Tensor], optimizers: list[torch.optim.Optimizer], started: bool
) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a state; the optimizers keep nothing before the first step."""
    shapes = {f"weight/{name}": weight.shape for name, weight in weights.items()}
    for i, optimizer in enumerate(optimizers if started else ()):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            for key in KEPT[type(optimizer)]:
                shape = torch.Size() if key == "step" else parameter.shape
                shapes[f"optimizer/{i}/{index}/{key}"] = shape
    return shapes


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises ValueError where a state's tensors are not those of this run."""
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"{'no' if name in expected else 'a'} tensor {quoted(name)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name] or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
