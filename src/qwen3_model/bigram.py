"""The tables of the bigram correction and the calibration of scores (orthrus_kernels/rerank.py), a file of
their own beside a checkpoint's weights: `orthrus bigram` learns them, other programs need not know it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .config import BLOCK_SIZES, Qwen3Config
from .errors import InputError

FILE = "bigram.safetensors"
MOST_RANK = 256
CALIBRATION = "calibration"


@dataclass(frozen=True, eq=False)  # hashed by identity: cycles of these tables and of others are not one
class Bigram:
    """u and w, both [V, rank]: u[x] . w[y] is added to the logit of token y behind token x in a draft. And
    the calibration [2, D, 2] fp32: a factor and a weight of each offset, at temperature 0 and above."""

    before: Tensor
    after: Tensor
    calibration: Tensor

    @staticmethod
    def of(before: Tensor, after: Tensor, calibration: Tensor | None = None) -> Bigram:
        """Without a calibration scores stay what they are, at any offset."""
        if calibration is None:
            calibration = torch.tensor([1.0, 0.0]).expand(2, BLOCK_SIZES[-1] - 1, 2)
        return Bigram(before, after, calibration.to(before.device, torch.float32).contiguous())

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `rerank` takes them."""
        return self.before, self.after, self.calibration


def load(folder: Path, config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Bigram | None:
    """The tables of a folder, None if it has none or the model no diffusion view. Raises InputError for a
    file that is damaged or does not fit the config, and for a link to nowhere."""
    if not os.path.lexists(folder / FILE) or not config.has_diffusion_view:
        return None
    file, names = folder / FILE, ("before", "after")
    beside = {CALIBRATION: (2, config.block_size - 1, 2)}
    found = checkpoint.load_tables(file, names, config.vocab_size, MOST_RANK, beside)
    if not all(table.isfinite().all() for table in found.values()):
        raise InputError(f"{file}: the tables are not finite numbers: learn them anew")
    calibration = found.get(CALIBRATION)
    if calibration is not None and not (calibration[..., 0] > 0).all():
        raise InputError(
            f"{file}: the calibration has factors that are not above 0: fit it anew, with orthrus bigram "
            "--calibrate"
        )
    before, after = (found[name].to(device, dtype).contiguous() for name in names)
    return Bigram.of(before, after, calibration)


def save(folder: Path, before: Tensor, after: Tensor, calibration: Tensor | None = None) -> None:
    """Write the tables in bf16, and a calibration in fp32."""
    stored = {"before": before.bfloat16(), "after": after.bfloat16()}
    stored |= {} if calibration is None else {CALIBRATION: calibration.float()}
    stored = {name: table.detach().cpu().contiguous() for name, table in stored.items()}
    checkpoint.save(stored, folder / FILE, metadata={"format": "pt"})
