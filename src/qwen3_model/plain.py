"""Checkpoints whose weights must be plain: one to be quantised, and one that gives its diffusion view."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from . import checkpoint
from .config import Qwen3Config
from .errors import InputError
from .model import Network
from .quantised.stored import by_config
from .weight_files import Header


def plain_config(folder: Path, headers: Mapping[str, Header]) -> Qwen3Config:
    """The config of a folder with these headers. Raises InputError where the folder's tensors are not plain
    ones of 16 or 32 bits that fit it."""
    config = Qwen3Config.from_folder(folder, headers)
    if config.quantisation is not None:
        raise InputError(f"{folder} is quantised already: give the checkpoint in 16 or 32 bits")
    skeleton = Network(config, torch.device("meta"), torch.bfloat16, "reference", None, by_config(None))
    checkpoint.load_into(folder, skeleton.destinations())
    return config
