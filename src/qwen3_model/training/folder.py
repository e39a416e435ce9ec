"""Checkpoint folders of the trainings: loading into the training network, and what is written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from .. import checkpoint, selector
from ..chat_template import MORE_TEMPLATES
from ..config import Qwen3Config
from ..errors import InputError
from ..reading import read_json_object
from ..settings import DTYPES
from .network import Network
from .out_folder import OutFolder, claimed
from .tokenizer import save_tokenizer

SHARD_BYTES = 2_000_000_000  # of one safetensors file; a larger checkpoint is written as shards and an index
COPIED = (".json", ".jsonl", ".jinja", ".txt")  # tokenizer, chat template, generation settings, prompts
NOT_COPIED = ("config.json", "training.json", "model.safetensors.index.json")
LICENCES = ("LICENSE", "LICENCE", "NOTICE")  # begin the names of files that travel with the weights


def load_network(folder: Path, config: Qwen3Config) -> Network:
    """The training network in fp32 with the weights of a folder, read one tensor at a time. Diffusion weights
    it lacks stay as they were made. Raises InputError when the tensors do not fit the config, and for
    quantised ones.
    """
    if config.quantisation is not None:
        raise InputError(f"{folder} is quantised: train with the bf16, fp16 or fp32 checkpoint of the model")
    network, stored = Network(config), checkpoint.tensor_names(folder)
    weights = network.state_dict()  # shares the parameters' memory
    wanted = {name: w for name, w in weights.items() if name in stored or "_diff" not in name}
    checkpoint.load_into(folder, wanted)
    return network


def save_pretrained(
    out: Path | OutFolder,
    network: Network,
    tokenizer: Tokenizer,
    prompts: list[dict[str, str]],
    facts: Mapping[str, object],
) -> None:
    """A plain Qwen3 folder: the AR tensors in bf16, tokenizer, held-out prompts if any, `training.json`."""

    def fill(folder: Path) -> None:
        tensors = {name: w.detach().cpu().bfloat16().contiguous() for name, w in network.state_dict().items()}
        checkpoint.save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_configs(folder, network.config)
        save_tokenizer(tokenizer, folder, network.config.max_position_embeddings)
        if prompts:
            (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        _write_json(folder / "training.json", facts)

    _put(out, fill)


def save_retrained(base: Path, out: Path | OutFolder, network: Network, facts: Mapping[str, object]) -> None:
    """A plain Qwen3 folder like `base` with other weights, in its dtype, and another `training.json`."""

    def fill(folder: Path) -> None:
        dtype = DTYPES[network.config.dtype]
        tensors = {name: w.detach().cpu().to(dtype).contiguous() for name, w in network.state_dict().items()}
        checkpoint.save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _copy_others(base, folder)
        _write_configs(folder, network.config, generation=not (folder / "generation_config.json").exists())
        _write_json(folder / "training.json", facts)

    _put(out, fill)


def save_distilled(
    base: Path,
    out: Path | OutFolder,
    network: Network,
    facts: Mapping[str, object],
    card: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """An Orthrus folder: the base's tensors bit for bit as stored, the `_diff` tensors in their dtype, the
    base's other files, `training.json` and the model card.
    """

    def fill(folder: Path) -> None:
        _write_shards(folder, base, network, shard_bytes)
        _copy_others(base, folder)
        _write_configs(folder, network.config, generation=not (folder / "generation_config.json").exists())
        _write_json(folder / "training.json", facts)
        (folder / "README.md").write_text(card, encoding="utf-8")

    _put(out, fill)


def without_selector(base: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of the folder `base` for one with other tables: a selector belongs to those that it was
    fitted beside, and `save_corrected` leaves it out. Says so on stderr where there is one."""
    facts.pop("selector", None)
    if os.path.lexists(base / selector.FILE):
        print(f"{selector.FILE} belongs to the earlier tables: left out, orthrus select fits one anew",
              file=sys.stderr)  # fmt: skip
    return facts


def save_corrected(
    base: Path,
    out: Path | OutFolder,
    save: Callable[[Path], None],
    facts: Mapping[str, object],
    card: str | None,
) -> None:
    """A folder with all files of the Orthrus `base`, bit for bit, but its selector, and what `save` writes
    there: tables of a bigram correction, or a selector. card: a new model card, None: the base's."""

    def fill(folder: Path) -> None:
        for file in base.iterdir():
            if file.is_file() and file.name != selector.FILE:
                shutil.copyfile(file, folder / file.name)
        _copy_templates(base, folder)
        save(folder)
        _write_json(folder / "training.json", facts)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")

    _put(out, fill)


def _put(out: Path | OutFolder, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint: `out` is whole or untouched."""
    with claimed(out) as place:
        place.put(fill)


def _tensors(folder: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a folder that has been loaded from, one at a time, as stored."""
    names = ["model.safetensors"]
    if not (folder / names[0]).exists():
        names = sorted(set(read_json_object(folder / "model.safetensors.index.json")["weight_map"].values()))
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in wanted:
                    yield key, file.get_tensor(key)


def _write_shards(folder: Path, base: Path, network: Network, shard_bytes: int) -> None:
    """Write the base's tensors, each diffusion twin behind its AR tensor, into files of up to `shard_bytes`,
    holding one file's tensors at a time.
    """
    twins = {name.replace("_diff", ""): name for name, _ in network.named_parameters() if "_diff" in name}
    trained = network.state_dict()
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}

    def write() -> None:
        shards.append(list(shard))
        checkpoint.save(shard, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shard.clear()

    total = 0
    for name, tensor in _tensors(base, trained):
        new = {name: tensor}
        if name in twins:
            new[twins[name]] = trained[twins[name]].detach().cpu().to(tensor.dtype).contiguous()
        size = sum(t.nbytes for t in new.values())
        if shard and sum(t.nbytes for t in shard.values()) + size > shard_bytes:
            write()
        shard |= new
        total += size
    write()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the written shards their customary names, and an index if there are several."""
    if len(shards) == 1:
        os.rename(folder / "shard-1.safetensors", folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{i}.safetensors", folder / file)
        places |= dict.fromkeys(names, file)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _copy_others(base: Path, folder: Path) -> None:
    """Copy what belongs to a base beside its weights and config."""
    for file in base.iterdir():
        copied = file.suffix in COPIED and file.name not in NOT_COPIED
        if file.is_file() and (copied or file.name.upper().startswith(LICENCES)):
            shutil.copyfile(file, folder / file.name)
    _copy_templates(base, folder)


def _copy_templates(base: Path, folder: Path) -> None:
    """Copy the chat templates that stand in a folder of their own."""
    templates = sorted((base / MORE_TEMPLATES).glob("*.jinja"))
    if templates:
        (folder / MORE_TEMPLATES).mkdir()
    for file in templates:
        shutil.copyfile(file, folder / MORE_TEMPLATES / file.name)


def _write_configs(folder: Path, config: Qwen3Config, generation: bool = True) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    if generation:
        ends = list(config.eos_token_ids)
        settings = {"eos_token_id": ends[0] if len(ends) == 1 else ends, "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
