"""Safetensors files of a folder: their headers, what the index says of them, and why there are none.

Pickle files are never opened."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import InputError, in_memory, memory_asked, one_line, quoted, size_of
from .reading import check_file, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
HEAD = "lm_head.weight"
LEGACY = re.compile(
    r".*rotary_emb\.inv_freq"
)  # buffers of old transformers versions; RoPE follows the config


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of one tensor, and the file it is in."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Header]:
    """Headers of all tensors of the folder's one file or its shards, legacy buffers left out. Raises
    InputError."""
    if adapter := next((name for name in ADAPTERS if os.path.lexists(folder / name)), None):
        raise InputError(
            f"{folder} holds an adapter ({adapter}), which is never applied: merge it into its base model "
            "and save the whole, or remove it if that is done"
        )
    if os.path.lexists(folder / SINGLE):
        headers = file_headers(folder / SINGLE)
    elif os.path.lexists(folder / INDEX):
        headers = _shard_headers(folder)
    else:
        raise InputError(_why_no_weights(folder))
    return {name: header for name, header in headers.items() if not LEGACY.fullmatch(name)}


def file_headers(file: Path) -> dict[str, Header]:
    """Headers of one file. Raises InputError."""
    # numpy's reader maps the file read-only; torch's reserves memory for as much as the file holds
    with open_file(file, "numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
        return {name: Header(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@contextmanager
def open_file(file: Path, framework: str) -> Iterator[safe_open]:
    """A safetensors file, memory-mapped. Raises InputError for one that is no such file, is cut short, or for
    whose tensors there is no memory."""
    check_file(file)
    with in_memory(f"{file}, {size_of(file.stat().st_size)},", "free some, or use a smaller checkpoint"):
        try:
            opened = safe_open(file, framework)
        except SafetensorError as error:
            raise InputError(
                f"{file} is damaged, cut short or no safetensors file ({one_line(error, 200)}): "
                "download it again"
            ) from None
        except (OSError, RuntimeError) as error:
            if memory_asked(error) is not None:
                raise
            raise InputError(f"{file} cannot be read: {one_line(error, 200)}") from None
        with opened as tensors:
            yield tensors


def listed(names: Collection[str]) -> str:
    """The first names in order, and how many more there are; one short line whatever the names."""
    first = [one_line(name, 80) if name.isprintable() else quoted(name) for name in sorted(names)[:3]]
    return (", ".join(first) or "none") + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shard_headers(folder: Path) -> dict[str, Header]:
    """Headers of all shards, which must hold exactly what the index says.

    A head that only the index lists is left out: some programs list the one of a tied model, and do not store
    it. A model that needs it is refused for the lack of it."""
    index = folder / INDEX
    headers: dict[str, Header] = {}
    for shard, names in _shards(index).items():
        if not os.path.lexists(folder / shard):
            raise InputError(
                f"{index} lists {one_line(shard, 80)}, which is missing: download the checkpoint again"
            )
        found = file_headers(folder / shard)
        if lacking := {n for n in names - found.keys() - {HEAD} if not LEGACY.fullmatch(n)}:
            raise InputError(
                f"{folder / shard} lacks {listed(lacking)}, which {INDEX} says it holds: "
                "download the checkpoint again"
            )
        if unlisted := {name for name in found.keys() - names if not LEGACY.fullmatch(name)}:
            raise InputError(
                f"{folder / shard} holds {listed(unlisted)}, which {INDEX} does not list there: "
                "download the checkpoint again"
            )
        headers |= {name: header for name, header in found.items() if name in names}
    return headers


def _shards(index: Path) -> dict[str, set[str]]:
    """The index: shard file name -> names of its tensors. A shard must lie in the folder itself."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map from tensor names to files: download it again")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise InputError(
                f"{index} maps {quoted(name)} to {quoted(shard)}; the name of a .safetensors file beside it "
                "was expected"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _why_no_weights(folder: Path) -> str:
    """The refusal of a folder without safetensors weights, naming what it has instead."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        return f"{folder} cannot be read: {one_line(error)}"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return (
            f"{folder} holds its weights as pickle only ({listed(pickles)}): pickle is never loaded because "
            "it can run code; convert them to safetensors"
        )
    if others := [name for name in names if name.endswith((".safetensors", ".gguf", ".npz"))]:
        return (
            f"{folder} holds {listed(others)}, but neither {SINGLE} nor {INDEX}, by which weights are found: "
            "download the checkpoint again, or save it with transformers' save_pretrained"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}: a checkpoint folder with safetensors was expected"
