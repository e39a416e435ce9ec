"""A quantised copy of a checkpoint folder: every shard in turn, one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels.quantised import GROUPS

from .. import bigram, checkpoint, selector
from ..chat_template import MORE_TEMPLATES
from ..errors import InputError
from ..plain import plain_config
from ..reading import read_json_object
from ..weight_files import INDEX, PICKLES, SINGLE, Header, open_file, read_headers
from .written import DIFFUSION_KEY, Form

REPORT = "quantization.json"
MATRIX = re.compile(
    r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj(_diff)?|mlp\.(?:gate|up|down)_proj)\.weight"
)
OTHER_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".npz", ".h5", ".msgpack", ".onnx")  # of other programs
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint's matrices. None: of `diffusion`, which stays as it is then."""

    base: Form
    diffusion: Form | None

    def form(self, name: str) -> Form | None:
        """The form of a tensor; None: it stays as it is."""
        found = MATRIX.fullmatch(name)
        if found is None:
            return None
        return self.diffusion if found[1] else self.base


@dataclass
class Written:
    """What came of it: bytes of all tensors, and how far each quantised one is from what it was."""

    bytes_before: int = 0
    bytes_after: int = 0
    errors: dict[str, float] = field(default_factory=dict)  # norm of the difference / norm of the tensor

    def worst(self, most: int = 10) -> list[tuple[str, float]]:
        """The tensors that changed most, the worst first."""
        return sorted(self.errors.items(), key=lambda item: -item[1])[:most]


class Source:
    """A plain checkpoint folder whose headers fit its config."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for one that is damaged, not a dense Qwen3, or quantised already."""
        self.folder, self.headers = folder, read_headers(folder)
        self.config = plain_config(folder, self.headers)

    @property
    def nbytes(self) -> int:
        """Of all weight files."""
        return sum(file.stat().st_size for file in self.files())

    def files(self) -> list[Path]:
        """The weight files, in the order of their names."""
        return sorted({header.file for header in self.headers.values()})

    def check(self, plan: Plan) -> None:
        """Raises InputError where a matrix cannot have the form that a plan gives it."""
        for name, header in self.headers.items():
            if MATRIX.fullmatch(name) and header.shape[1] % min(GROUPS):
                raise InputError(
                    f"{name} has {header.shape[1]} columns; a multiple of {min(GROUPS)} was expected"
                )
        forms = {name: form for name in self.headers if (form := plan.form(name)) is not None}
        for form in set(forms.values()):
            form.check({name: self.headers[name].shape[1] for name, own in forms.items() if own == form})


def write(source: Source, plan: Plan, out: Path, device: torch.device, advance: Advance) -> Written:
    """Fill an empty folder with the quantised checkpoint and the source's other files. device: rounds the
    matrices. advance(bytes read) is called behind each tensor. Raises InputError and OSError."""
    written, places = Written(), dict[str, str]()
    for file in source.files():
        shard: dict[str, Tensor] = {}
        for name, tensor in _tensors(file, source.headers):
            stored = _stored(file, name, tensor, plan.form(name), device, written)
            written.bytes_before += tensor.nbytes
            written.bytes_after += sum(part.nbytes for part in stored.values())
            shard |= stored
            advance(tensor.nbytes)
        checkpoint.save(shard, out / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file.name)
    if {SINGLE} != set(places.values()):
        index = {"metadata": {"total_size": written.bytes_after}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(as_json(index), encoding="utf-8")
    _copy_others(source.folder, out)
    (out / "config.json").write_text(as_json(_config(source, plan)), encoding="utf-8")
    return written


def as_json(content: Mapping[str, Any]) -> str:
    """What a JSON file holds."""
    return json.dumps(content, indent=2) + "\n"


def _tensors(file: Path, headers: Mapping[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that belong to the model, one at a time, as stored."""
    with open_file(file, "pt") as tensors:
        for name in tensors.offset_keys():
            if name in headers:
                yield name, tensors.get_tensor(name)


def _stored(
    file: Path, name: str, tensor: Tensor, form: Form | None, device: torch.device, written: Written
) -> dict[str, Tensor]:
    """What stands for a tensor in the quantised checkpoint, by its official names. Raises InputError."""
    given = tensor.to(device)
    if not given.isfinite().all():
        raise InputError(f"{file}: {name} holds NaN or infinite numbers, which no scale can be found for")
    if form is None:
        return {name: tensor}
    found = form.stored(given)
    norm = float(given.float().norm())
    written.errors[name] = float((found.values - given.float()).norm()) / norm if norm else 0.0
    module = name.removesuffix("weight")
    return {module + end: part.cpu() for end, part in found.tensors.items()}


def _config(source: Source, plan: Plan) -> dict[str, Any]:
    """The source's config.json as it is, and how the weights are stored."""
    raw = read_json_object(source.folder / "config.json")
    matrices = [found for name in source.headers if (found := MATRIX.fullmatch(name))]
    apart = [found[0].removesuffix(".weight") for found in matrices if found[1]]
    mixed = plan.diffusion != plan.base
    raw["quantization_config"] = plan.base.config(sorted(apart) if mixed else [])
    if apart and mixed and plan.diffusion is not None:
        raw[DIFFUSION_KEY] = plan.diffusion.config([])
    return raw


def _copy_others(base: Path, out: Path) -> None:
    """Copy the files beside the weights: tokenizer, chat templates, bigram correction and selector, card,
    licences."""
    for file in sorted(base.iterdir()):
        weights = file.name.endswith(OTHER_WEIGHTS) and file.name not in (bigram.FILE, selector.FILE)
        replaced = file.name in ("config.json", INDEX, REPORT) or file.name.startswith(".")
        if file.is_file() and not (weights or replaced):
            shutil.copyfile(file, out / file.name)
    for file in sorted((base / MORE_TEMPLATES).glob("*.jinja")):
        (out / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, out / MORE_TEMPLATES / file.name)
