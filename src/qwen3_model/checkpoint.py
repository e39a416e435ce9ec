"""Checkpoint folders: finding them, checking every header, loading raw safetensors into the model's tensors.

Nothing is copied before names, shapes and dtypes of all files are known to fit, so no model is ever half
loaded. Pickle files are never opened."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError, one_line
from .reading import read_json_object

EMBEDDED = Path(__file__).parent / "embedded"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = ("F32", "BF16", "F16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LEGACY = re.compile(
    r".*rotary_emb\.inv_freq"
)  # buffers of old transformers versions; RoPE follows the config


@dataclass(frozen=True)
class Header:
    """What a safetensors header says of one tensor, and the file it is in."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: an existing one, or a hub id ("owner/name") downloaded or found in
    the hub's cache.

    revision: branch, tag or commit of a hub id. Raises InputError when there is neither, or the hub refuses.
    """
    name = str(path_or_id)
    folder = os.path.expanduser(name)
    if name and os.path.isdir(folder):
        if revision is not None:
            raise InputError(
                f"revision {revision!r} was given with the local folder {name}: "
                "revisions belong to hub ids, leave it out"
            )
        return Path(folder)
    if name and os.path.exists(folder):
        raise InputError(f"{name} is a file; a checkpoint folder or a hub id (owner/name) was expected")
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise InputError(
            f"there is no folder {name!r}, and it is not a hub id: give a checkpoint folder or owner/name"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """The snapshot folder of a hub id. Raises InputError in one line for whatever keeps it from coming."""
    at = f"{name} at revision {revision!r}" if revision is not None else name
    try:
        # weights of other formats lie in subfolders
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
            )
        )
    except hub.GatedRepoError:
        reason = "the hub wants a login with access to it: request access, then run `hf auth login`"
    except hub.RepositoryNotFoundError:
        reason = "it is neither a local folder nor a public model of the hub: check the spelling"
    except hub.RevisionNotFoundError:
        reason = "the hub has no such revision: give a branch, tag or commit of this model"
    except hub.LocalEntryNotFoundError:
        reason = (
            "there is no such local folder, the hub cannot be reached and its cache does not hold this: "
            "check the spelling and the connection"
        )
    except Exception as error:  # the hub's client lets errors of its HTTP library through, which one varies
        reason = one_line(error)
    raise InputError(f"cannot get {at}: {reason}") from None


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file. Raises InputError when it cannot be written."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written: {one_line(error)}") from None


def writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, found out by making one: root may do all but on a full or
    read-only disk.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of all tensors of a checkpoint folder, from its headers. Raises InputError for bad files."""
    return frozenset(_read_headers(folder))


def load_into(folder: Path, destinations: Mapping[str, Tensor], progress: bool = True) -> None:
    """Copy a checkpoint's tensors into `destinations`: official name -> tensor or view, of any float dtype,
    on any device.

    Every name, shape and dtype of every file is checked first; destinations on the meta device are only
    checked. Files are memory-mapped and read once, tensor by tensor. A tied head's copy of the embedding is
    compared with it and left out. progress: a bar on stderr if that is a terminal. Raises InputError."""
    headers = _read_headers(folder)
    _check_names(folder, headers, destinations)
    for name, header in headers.items():
        if name in destinations:
            _check_tensor(name, header, tuple(destinations[name].shape))
    wanted = {name: dest for name, dest in destinations.items() if not dest.is_meta}
    if not wanted:
        return
    if HEAD in headers and HEAD not in destinations:
        _check_tied_copy(headers)
    files = list(dict.fromkeys(headers[name].file for name in wanted))
    with _bar(sum(dest.nbytes for dest in wanted.values()), progress) as advance:
        for file in files:
            with _open(file, "pt") as tensors:
                for name in tensors.offset_keys():
                    if name in wanted:
                        wanted[name].copy_(tensors.get_tensor(name))
                        advance(wanted[name].nbytes)


def load_tables(file: Path, names: Sequence[str], rows: int, most: int) -> list[Tensor]:
    """Tensors of one shape [rows, 1 to most], as stored, from a safetensors file that holds these alone.
    Raises InputError."""
    headers = _file_headers(file)
    if set(headers) != set(names):
        held = _listed(set(headers)) or "no tensor"
        raise InputError(f"{file} holds {held}; {', '.join(names)} were expected")
    shape = headers[names[0]].shape
    if len(shape) != 2 or not 1 <= shape[1] <= most:
        raise InputError(f"{file}: {names[0]} has shape {list(shape)}; [{rows}, 1 to {most}] was expected")
    for name in names:
        _check_tensor(name, headers[name], (rows, shape[1]))
    with _open(file, "pt") as tensors:
        return [tensors.get_tensor(name) for name in names]


def _read_headers(folder: Path) -> dict[str, Header]:
    """Headers of all tensors of the folder's one file or its shards, legacy buffers left out."""
    if (folder / SINGLE).exists():
        headers = _file_headers(folder / SINGLE)
    elif (folder / INDEX).exists():
        headers = _shard_headers(folder)
    else:
        raise InputError(_why_no_weights(folder))
    return {name: header for name, header in headers.items() if not LEGACY.fullmatch(name)}


def _why_no_weights(folder: Path) -> str:
    """The refusal of a folder without safetensors weights, naming its pickle files if it has any."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds its weights as pickle only ({_listed(pickles)}): pickle is never loaded because "
            "it can run code; convert them to safetensors"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}: a checkpoint folder with safetensors was expected"


def _shard_headers(folder: Path) -> dict[str, Header]:
    """Headers of all shards, which must hold exactly what the index says."""
    index = folder / INDEX
    shards = _shards(index)
    headers: dict[str, Header] = {}
    for shard, listed in shards.items():
        if not (folder / shard).is_file():
            raise InputError(f"{index} lists {shard}, which is missing: download the checkpoint again")
        found = _file_headers(folder / shard)
        if lacking := listed - found.keys():
            raise InputError(
                f"{folder / shard} lacks {_listed(lacking)}, which {INDEX} says it holds: "
                "download the checkpoint again"
            )
        if unlisted := {name for name in found.keys() - listed if not LEGACY.fullmatch(name)}:
            raise InputError(
                f"{folder / shard} holds {_listed(unlisted)}, which {INDEX} does not list there: "
                "download the checkpoint again"
            )
        headers |= {name: header for name, header in found.items() if name in listed}
    return headers


def _shards(index: Path) -> dict[str, set[str]]:
    """The index: shard file name -> names of its tensors. A shard must lie in the folder itself."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map from tensor names to files: download it again")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(
                f"{index} maps {name!r} to {shard!r}; the name of a .safetensors file beside it was expected"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _file_headers(file: Path) -> dict[str, Header]:
    # numpy's reader maps the file read-only; torch's reserves memory for as much as the file holds
    with _open(file, "numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
        return {name: Header(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


@contextmanager
def _open(file: Path, framework: str) -> Iterator[safe_open]:
    """A safetensors file, memory-mapped. Raises InputError for one that is no such file, or cut short."""
    if not file.is_file():  # a pipe would block
        raise InputError(f"{file} is not a file; a safetensors file was expected")
    try:
        opened = safe_open(file, framework)
    except SafetensorError as error:
        raise InputError(
            f"{file} is damaged, cut short or no safetensors file ({one_line(error)}): download it again"
        ) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: torch cannot map a file larger than memory
        raise InputError(f"{file} cannot be read: {one_line(error)}") from None
    with opened as tensors:
        yield tensors


def _check_names(folder: Path, headers: Mapping[str, Header], destinations: Mapping[str, Tensor]) -> None:
    if missing := destinations.keys() - headers.keys():
        raise InputError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for: {_listed(missing)}; "
            "check that weights and config belong together"
        )
    unexpected = headers.keys() - destinations.keys()
    if HEAD in unexpected and EMBEDDING in destinations:
        unexpected -= {HEAD}  # tied: the model has no head of its own
    if unexpected:
        raise InputError(
            f"{folder} holds {len(unexpected)} tensors that its config.json has no place for: "
            f"{_listed(unexpected)}; check that weights and config belong together"
        )


def _check_tensor(name: str, header: Header, shape: tuple[int, ...]) -> None:
    if header.shape != shape:
        raise InputError(
            f"{header.file}: {name} has shape {list(header.shape)}, config.json asks for {list(shape)}; "
            "check that weights and config belong together"
        )
    if header.dtype not in FLOATING:
        raise InputError(
            f"{header.file}: {name} is {header.dtype}; {', '.join(FLOATING)} was expected: "
            "use a checkpoint that is not quantised"
        )


def _check_tied_copy(headers: Mapping[str, Header]) -> None:
    """A stored head beside a tied embedding must be its copy, else the config is wrong about them."""
    head, embedding = headers[HEAD], headers[EMBEDDING]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same:
        with _open(head.file, "pt") as a, _open(embedding.file, "pt") as b:
            same = torch.equal(
                a.get_tensor(HEAD).view(torch.uint8), b.get_tensor(EMBEDDING).view(torch.uint8)
            )
    if not same:
        raise InputError(
            f"{head.file}: {HEAD} differs from {EMBEDDING} though config.json ties them: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def _listed(names: set[str] | list[str]) -> str:
    """The first names in order, and how many more there are; one line whatever the names."""
    first = [name if name.isprintable() else repr(name) for name in sorted(names)[:3]]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if wanted and that is a terminal; yields advance(bytes)."""
    console = Console(stderr=True)
    columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not (wanted and console.file.isatty())) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
