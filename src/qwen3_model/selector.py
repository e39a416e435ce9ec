"""The selector of draft candidates (orthrus_kernels/rerank.py), a file of its own beside the bigram
correction's: `orthrus select` fits it, and a folder without it drafts by the tables alone.

    change[p, a, c] = u[a] . w[c] + (A e[a] * (1 + G h[p] + o[p])) . (B e[c])

e: embedding rows, h[p]: the diffusion view's state behind the final norm. So a pair of tokens is worth what
the context says, and the file stays small: A, B, G ("front", "behind", "gate") [E, R'], o ("places")
[2, D, R'] and a calibration [2, 2, D, 2] for cycles of two passes and of one, the latter for temperature 0
and above. At load A e and B e become columns of the tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from orthrus_kernels import Weight

from . import bigram, checkpoint
from .bigram import CALIBRATION, FORMS, MOST_RANK, Bigram, Gate
from .config import Qwen3Config
from .errors import InputError

FILE = "selector.safetensors"
MATRICES, PLACES = ("front", "behind", "gate"), "places"
_ROWS = 8192  # of the embedding, in fp32 at a time


def load(folder: Path, config: Qwen3Config, tables: Bigram | None, embedding: Tensor) -> Bigram | None:
    """The tables of a folder with its selector's columns, in the dtype and on the device of the embedding
    [V, E]; as they are where the folder has none. Raises InputError for a file that is damaged, does not fit
    the config or stands there without tables."""
    found = stored(folder, config, tables)
    return tables if found is None or tables is None else joined(tables, found, embedding)


def stored(folder: Path, config: Qwen3Config, tables: Bigram | None) -> dict[str, Tensor] | None:
    """The tensors of a folder's selector, None where it has none. Raises InputError as `load` does."""
    file = folder / FILE
    if not os.path.lexists(file) or not config.has_diffusion_view:
        return None
    if tables is None:
        raise InputError(
            f"{file} stands beside the tables that it was fitted with, and there is no {bigram.FILE}: copy "
            "that too, or remove the selector"
        )
    d = config.block_size - 1
    beside: dict[str, tuple[int | None, ...]] = {
        PLACES: (len(FORMS), d, None), CALIBRATION: (len(FORMS), 2, d, 2)
    }  # fmt: skip
    found = checkpoint.load_tables(file, MATRICES, config.hidden_size, MOST_RANK, beside)
    if lacking := [name for name in beside if name not in found]:
        raise InputError(f"{file} lacks {' and '.join(lacking)}: fit it anew, with orthrus select")
    bigram.check_numbers(file, found, "fit them anew, with orthrus select", "with orthrus select")
    return found


def joined(tables: Bigram, found: Mapping[str, Tensor], embedding: Tensor) -> Bigram:
    """Tables without a selector, and the tensors of one, as decoding takes them."""
    device, dtype = embedding.device, embedding.dtype
    wide = {name: tensor.to(device, torch.float32) for name, tensor in found.items()}

    def columns(table: Tensor, matrix: Tensor) -> Tensor:
        rows = torch.cat([some.float() @ matrix for some in embedding.split(_ROWS)])
        return torch.cat([table, rows.to(dtype)], 1)

    gate = Gate(Weight(wide["gate"].t().to(dtype).contiguous()), wide[PLACES].contiguous(),
                wide[CALIBRATION].contiguous())  # fmt: skip
    before, after = columns(tables.before, wide["front"]), columns(tables.after, wide["behind"])
    return Bigram(before, after, tables.calibration, gate)


def save(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Write the matrices in bf16 and all else in fp32."""
    stored = {name: t.bfloat16() if name in MATRICES else t.float() for name, t in found.items()}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    checkpoint.save(stored, folder / FILE, metadata={"format": "pt"})


def ranks_of(folder: Path, config: Qwen3Config) -> dict[str, int]:
    """Columns of the tables that rank a folder's drafts: "bigram" and "selector" where it has them. Raises
    InputError for files that decoding would refuse."""
    tables = bigram.load(folder, config, torch.device("cpu"), torch.bfloat16)
    found = stored(folder, config, tables)
    ranks = {} if tables is None else {"bigram": tables.before.shape[1]}
    return ranks if found is None else ranks | {"selector": found[MATRICES[0]].shape[1]}
