"""Checkpoint folders of the trainings: loading into the training network, saving atomically."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ..config import Qwen3Config
from .network import Network
from .tokenizer import save_tokenizer


def load_network(folder: Path, config: Qwen3Config) -> Network:
    """The training network in fp32 with the weights of a folder; diffusion weights it lacks stay
    uninitialised.
    """
    network = Network(config)
    missing, unexpected = network.load_state_dict(read_tensors(folder), strict=False)
    wrong = [name for name in missing if "_diff" not in name] + list(unexpected)
    assert not wrong, wrong
    return network


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder as stored, single file or shards; a tied head's copy is left out."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if Qwen3Config.from_folder(folder).tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def save_pretrained(
    out: Path, network: Network, tokenizer: Tokenizer, prompts: list[dict[str, str]], facts: dict[str, object]
) -> None:
    """A plain Qwen3 folder: the AR tensors in bf16, tokenizer, held-out prompts, `training.json`."""

    def fill(folder: Path) -> None:
        tensors = {name: w.detach().cpu().bfloat16().contiguous() for name, w in network.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write_configs(folder, network.config)
        save_tokenizer(tokenizer, folder, network.config.max_position_embeddings)
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    replace_folder(out, fill)


def save_distilled(base: Path, out: Path, network: Network, facts: dict[str, object]) -> None:
    """An Orthrus folder: the base's tensors bit for bit as stored, the `_diff` tensors in their dtype, the
    base's other files.
    """

    def fill(folder: Path) -> None:
        tensors = read_tensors(base)
        for name, weight in network.state_dict().items():
            if "_diff" in name:
                stored = tensors[name.replace("_diff", "")].dtype
                tensors[name] = weight.detach().cpu().to(stored).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        skipped = {"config.json", "training.json", "model.safetensors.index.json"}
        for file in base.iterdir():
            if file.suffix in (".json", ".jsonl", ".jinja", ".txt") and file.name not in skipped:
                shutil.copyfile(file, folder / file.name)
        _write_configs(folder, network.config, generation=not (folder / "generation_config.json").exists())
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    replace_folder(out, fill)


def replace_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside `out`, then put it in its place: `out` is whole or untouched."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if out.exists():
            old = temporary.with_name(temporary.name + ".old")
            os.rename(out, old)
            os.rename(temporary, out)
            shutil.rmtree(old)
        else:
            os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_configs(folder: Path, config: Qwen3Config, generation: bool = True) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    if generation:
        ends = list(config.eos_token_ids)
        settings = {"eos_token_id": ends[0] if len(ends) == 1 else ends, "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
