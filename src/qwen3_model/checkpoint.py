"""Checkpoint folders: checking every header, loading raw safetensors into the model's tensors.

Nothing is copied before names, shapes and dtypes of all files are known to fit, so no model is ever half
loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import InputError, one_line
from .quantised.slot import SAYING, Slot
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


def load_into(folder: Path, destinations: Mapping[str, Tensor | Slot], progress: bool = True) -> None:
    """Copy a checkpoint's tensors into `destinations`: official name of a weight -> tensor or view, of any
    float dtype, or slot, on any device.

    Every name, shape and dtype of every file is checked first; destinations on the meta device are only
    checked. Files are memory-mapped and read once, tensor by tensor; a quantised weight is repacked when the
    last of its tensors is found. A tied head's copy of the embedding is compared with it and left out.
    progress: a bar on stderr if that is a terminal. Raises InputError."""
    headers = read_headers(folder)
    names = {name: _stored_names(name, dest) for name, dest in destinations.items()}
    check_names(folder, headers, {one for stored in names.values() for one in stored})
    for name, dest in destinations.items():
        if isinstance(dest, Tensor):
            _check_tensor(name, headers[name], tuple(dest.shape))
    _check_sayings([dest for dest in destinations.values() if isinstance(dest, Slot)])
    wanted = {name: dest for name, dest in destinations.items() if not dest.is_meta}
    if not wanted:
        return
    if HEAD in headers and HEAD not in destinations:
        _check_tied_copy(headers)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}  # of each, by tensor: views of files
    owners = {one: name for name in wanted for one in names[name]}
    files = list(dict.fromkeys(headers[one].file for one in owners))
    with _bar(sum(dest.nbytes for dest in wanted.values()), progress) as advance:
        for file in files:
            with open_file(file, "pt") as tensors:
                for one in tensors.offset_keys():
                    if one not in owners:
                        continue
                    name = owners[one]
                    found[name][one.rpartition(".")[2]] = tensors.get_tensor(one)
                    if len(found[name]) == len(names[name]):
                        _fill(wanted[name], found.pop(name))
                        advance(wanted[name].nbytes)


def _stored_names(name: str, destination: Tensor | Slot) -> list[str]:
    """The names of the tensors that a destination is filled from."""
    return destination.stored.names if isinstance(destination, Slot) else [name]


def _fill(destination: Tensor | Slot, found: Mapping[str, Tensor]) -> None:
    if isinstance(destination, Slot):
        destination.fill(found)
    else:
        destination.copy_(found["weight"])


def _check_sayings(slots: Iterable[Slot]) -> None:
    """Read the small tensors that say what must be so of a quantised weight, and check them."""
    by_file: dict[Path, list[tuple[Slot, str]]] = {}
    for slot in slots:
        for tensor, header in slot.stored.tensors.items():
            if tensor in SAYING:
                by_file.setdefault(header.file, []).append((slot, tensor))
    for file, sayings in by_file.items():
        with open_file(file, "pt") as tensors:
            for slot, tensor in sayings:
                slot.check({tensor: tensors.get_tensor(f"{slot.stored.module}.{tensor}")})


def load_tables(
    file: Path, names: Sequence[str], rows: int, most: int, beside: Mapping[str, tuple[int | None, ...]]
) -> dict[str, Tensor]:
    """Tensors of one shape [rows, 1 to most], as stored, from a safetensors file that holds these alone, and
    those of `beside`, of given shapes, that it has; None in a shape: the columns of the others. Raises
    InputError."""
    headers = file_headers(file)
    more = [name for name in beside if name in headers]
    if set(headers) != {*names, *more}:
        held = listed(set(headers)) if headers else "no tensor"
        raise InputError(f"{file} holds {held}; {', '.join(names)} were expected")
    shape = headers[names[0]].shape
    if len(shape) != 2 or not 1 <= shape[1] <= most:
        raise InputError(f"{file}: {names[0]} has shape {list(shape)}; [{rows}, 1 to {most}] was expected")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (rows, shape[1]))
    shapes |= {name: tuple(shape[1] if n is None else n for n in beside[name]) for name in more}
    for name, wanted in shapes.items():
        _check_tensor(name, headers[name], wanted)
    with open_file(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in shapes}


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
