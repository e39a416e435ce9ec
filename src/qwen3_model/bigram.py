"""The tables of the bigram correction and the calibration of scores (orthrus_kernels/rerank.py), a file of
their own beside a checkpoint's weights: `orthrus bigram` learns them, other programs need not know it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orthrus_kernels import Weight
from orthrus_kernels.backends import Ops

from . import checkpoint
from .config import BLOCK_SIZES, Qwen3Config
from .errors import InputError

FILE = "bigram.safetensors"
MOST_RANK = 256
CALIBRATION = "calibration"
FORMS = TWO_PASS, ONE_PASS = 0, 1  # of cycles: those whose blocks have seen their roots, and the others


@dataclass(frozen=True)
class Gate:
    """What a selector weighs the last R' columns of the tables with (selector.py).

    weight: G, [R', E]. places [2, D, R'] fp32, calibration [2, 2, D, 2] fp32: of both `FORMS` of cycles."""

    weight: Weight
    places: Tensor
    calibration: Tensor


@dataclass(frozen=True, eq=False)  # hashed by identity: cycles of these tables and of others are not one
class Bigram:
    """u and w, both [V, rank]: u[x] . w[y] is added to the logit of token y behind token x in a draft. And
    the calibration [2, D, 2] fp32: a factor and a weight of each offset, at temperature 0 and above.

    gate: with a selector, whose columns stand behind those of u and w and whose calibration counts."""

    before: Tensor
    after: Tensor
    calibration: Tensor
    gate: Gate | None = None

    @staticmethod
    def of(before: Tensor, after: Tensor, calibration: Tensor | None = None) -> Bigram:
        """Without a calibration scores stay what they are, at any offset."""
        if calibration is None:
            calibration = torch.tensor([1.0, 0.0]).expand(2, BLOCK_SIZES[-1] - 1, 2)
        return Bigram(before, after, calibration.to(before.device, torch.float32).contiguous())

    def gates(self, ops: Ops, states: Tensor) -> Tensor | None:
        """Of the states [T, E] behind the final norm from which candidates come: [T, R'] fp32."""
        return None if self.gate is None else ops.linear(states, self.gate.weight, out_dtype=torch.float32)

    def rerank(
        self, ops: Ops, scores: Tensor, ids: Tensor, gates: Tensor | None, roots: Tensor, scales: Tensor,
        temperatures: Tensor, slots: Tensor, known: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`rerank` of candidates [B, P, K] by these tables. gates: of their states, [B * P, R'] or
        [B, P, R']."""
        tables, settings = (self.before, self.after), (scales, temperatures, slots, known)
        if self.gate is None:
            return ops.rerank(scores, ids, roots, *tables, self.calibration, *settings)
        assert gates is not None, "a selector ranks by states"
        form, gates = TWO_PASS if known else ONE_PASS, gates.view(*ids.shape[:2], -1)
        calibration, places = self.gate.calibration[form], self.gate.places[form]
        return ops.rerank(scores, ids, roots, *tables, calibration, *settings, gates, places)


def load(folder: Path, config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Bigram | None:
    """The tables of a folder, None if it has none or the model no diffusion view. Raises InputError for a
    file that is damaged or does not fit the config, and for a link to nowhere."""
    if not os.path.lexists(folder / FILE) or not config.has_diffusion_view:
        return None
    file, names = folder / FILE, ("before", "after")
    beside: dict[str, tuple[int | None, ...]] = {CALIBRATION: (2, config.block_size - 1, 2)}
    found = checkpoint.load_tables(file, names, config.vocab_size, MOST_RANK, beside)
    check_numbers(file, found, "learn them anew", "with orthrus bigram --calibrate")
    before, after = (found[name].to(device, dtype).contiguous() for name in names)
    return Bigram.of(before, after, found.get(CALIBRATION))


def check_numbers(file: Path, found: Mapping[str, Tensor], anew: str, fitted: str) -> None:
    """Raises InputError for tables that are no numbers, and for factors of a calibration that are not above
    0. anew, fitted: what to do about them."""
    if not all(table.isfinite().all() for table in found.values()):
        raise InputError(f"{file}: the tables are not finite numbers: {anew}")
    if CALIBRATION in found and not (found[CALIBRATION][..., 0] > 0).all():
        raise InputError(f"{file}: the calibration has factors that are not above 0: fit it anew, {fitted}")


def save(folder: Path, before: Tensor, after: Tensor, calibration: Tensor | None = None) -> None:
    """Write the tables in bf16, and a calibration in fp32."""
    stored = {"before": before.bfloat16(), "after": after.bfloat16()}
    stored |= {} if calibration is None else {CALIBRATION: calibration.float()}
    stored = {name: table.detach().cpu().contiguous() for name, table in stored.items()}
    checkpoint.save(stored, folder / FILE, metadata={"format": "pt"})
