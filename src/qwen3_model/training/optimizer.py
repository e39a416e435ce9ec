"""The optimizers of both trainings, their schedule, and their state as safetensors (a pickle is never written
or read).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import checkpoint
from ..errors import InputError, one_line

WARM_UP = 0.02  # of the run
FLOOR = 0.01  # of the peak learning rate, at the end


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, at AdamW's update size) for the matrices, AdamW for embeddings, head and
    norms.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in named:
        inner = weight.dim() == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(weight)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        found.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = lr
    return found


def set_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Cosine with a linear warm-up; `share` is the part of the run that is done, 0 to 1."""
    rate = min(
        share / WARM_UP + 0.01, FLOOR + (1 - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate


def save_state(
    path: Path,
    weights: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    progress: Mapping[str, Any],
) -> None:
    """Write weights, optimizer states and progress to one safetensors file, atomically."""
    tensors = {f"weight/{name}": w.detach().contiguous() for name, w in weights.items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{i}/{index}/{key}"] = torch.as_tensor(value).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    checkpoint.save(tensors, temporary, metadata={"progress": json.dumps(progress)})
    os.replace(temporary, path)


def load_state(
    path: Path, weights: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Read a state back into the same weights and optimizers; returns its progress. Raises InputError for a
    file that is damaged or of other weights.
    """
    try:
        return _load_state(path, weights, optimizers)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is damaged or belongs to another run ({one_line(error)}): delete it to start anew"
        ) from None


def _load_state(
    path: Path, weights: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(file.get_tensor(f"weight/{name}"))
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name.startswith("optimizer/"):
                _, i, index, key = name.split("/")
                states[int(i)].setdefault(int(index), {})[key] = file.get_tensor(name)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        return json.loads(file.metadata()["progress"])
