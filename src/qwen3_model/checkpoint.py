"""Checkpoint folders: checking every header, loading raw safetensors into the model's tensors.

Nothing is copied before names, shapes and dtypes of all files are known to fit, so no model is ever half
loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError, one_line
from .tensor_names import EMBEDDING, check_names
from .weight_files import HEAD, Header, file_headers, listed, open_file, read_headers

EMBEDDED = Path(__file__).parent / "embedded"
FLOATING = ("F32", "BF16", "F16")


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file. Raises InputError when it cannot be written."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written: {one_line(error)}") from None


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of all tensors of a checkpoint folder, from its headers. Raises InputError for bad files."""
    return frozenset(read_headers(folder))


def load_into(folder: Path, destinations: Mapping[str, Tensor], progress: bool = True) -> None:
    """Copy a checkpoint's tensors into `destinations`: official name -> tensor or view, of any float dtype,
    on any device.

    Every name, shape and dtype of every file is checked first; destinations on the meta device are only
    checked. Files are memory-mapped and read once, tensor by tensor. A tied head's copy of the embedding is
    compared with it and left out. progress: a bar on stderr if that is a terminal. Raises InputError."""
    headers = read_headers(folder)
    check_names(folder, headers, destinations)
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
            with open_file(file, "pt") as tensors:
                for name in tensors.offset_keys():
                    if name in wanted:
                        wanted[name].copy_(tensors.get_tensor(name))
                        advance(wanted[name].nbytes)


def load_tables(file: Path, names: Sequence[str], rows: int, most: int) -> list[Tensor]:
    """Tensors of one shape [rows, 1 to most], as stored, from a safetensors file that holds these alone.
    Raises InputError."""
    headers = file_headers(file)
    if set(headers) != set(names):
        held = listed(set(headers)) if headers else "no tensor"
        raise InputError(f"{file} holds {held}; {', '.join(names)} were expected")
    shape = headers[names[0]].shape
    if len(shape) != 2 or not 1 <= shape[1] <= most:
        raise InputError(f"{file}: {names[0]} has shape {list(shape)}; [{rows}, 1 to {most}] was expected")
    for name in names:
        _check_tensor(name, headers[name], (rows, shape[1]))
    with open_file(file, "pt") as tensors:
        return [tensors.get_tensor(name) for name in names]


def _check_tensor(name: str, header: Header, shape: tuple[int, ...]) -> None:
    if header.shape != shape:
        raise InputError(
            f"{header.file}: {name} has shape {list(header.shape)}, config.json asks for {list(shape)}; "
            "check that weights and config belong together"
        )
    if header.dtype not in FLOATING:
        whole = "convert it to one of them" if header.dtype in ("F64", "C64", "BOOL") else ""
        raise InputError(
            f"{header.file}: {name} is {header.dtype}; {', '.join(FLOATING)} was expected: "
            + (whole or "use a checkpoint that is not quantised")
        )


def _check_tied_copy(headers: Mapping[str, Header]) -> None:
    """A stored head beside a tied embedding must be its copy, in whichever dtype, else the config is wrong
    about them."""
    head, embedding = headers[HEAD], headers[EMBEDDING]
    _check_tensor(HEAD, head, head.shape)
    same = head.shape == embedding.shape
    if same:
        with open_file(head.file, "pt") as a, open_file(embedding.file, "pt") as b:
            stored, tied = a.get_tensor(HEAD), b.get_tensor(EMBEDDING)
            same = torch.equal(stored.view(torch.uint8), tied.to(stored.dtype).view(torch.uint8))
    if not same:
        raise InputError(
            f"{head.file}: {HEAD} differs from {EMBEDDING} though config.json ties them: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


@contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if wanted and that is a terminal; yields advance(bytes)."""
    console = Console(stderr=True)
    columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, disable=not (wanted and console.file.isatty())) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
