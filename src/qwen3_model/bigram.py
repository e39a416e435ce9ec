"""The tables of the bigram correction (orthrus_kernels/rerank.py), a file of their own beside a checkpoint's
weights: `orthrus bigram` learns them, other programs need not know it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .config import Qwen3Config
from .errors import InputError

FILE = "bigram.safetensors"
MOST_RANK = 256


@dataclass(frozen=True, eq=False)  # hashed by identity: cycles of these tables and of others are not one
class Bigram:
    """u and w, both [V, rank]: u[x] . w[y] is added to the logit of token y behind token x in a draft."""

    before: Tensor
    after: Tensor


def load(folder: Path, config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Bigram | None:
    """The tables of a folder, None if it has none or the model no diffusion view. Raises InputError for a
    file that is damaged or does not fit the config, and for a link to nowhere."""
    if not os.path.lexists(folder / FILE) or not config.has_diffusion_view:
        return None
    tables = checkpoint.load_tables(folder / FILE, ("before", "after"), config.vocab_size, MOST_RANK)
    if not all(table.isfinite().all() for table in tables):
        raise InputError(f"{folder / FILE}: the tables are not finite numbers: learn them anew")
    return Bigram(*(table.to(device, dtype).contiguous() for table in tables))


def save(folder: Path, before: Tensor, after: Tensor) -> None:
    """Write the tables in bf16."""
    tables = {"before": before, "after": after}
    stored = {name: table.detach().cpu().bfloat16().contiguous() for name, table in tables.items()}
    checkpoint.save(stored, folder / FILE, metadata={"format": "pt"})
