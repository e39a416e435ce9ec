"""A random little Orthrus as a checkpoint folder, in the way the embedded one is laid out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small import small_model

from qwen3_model.training.tokenizer import SPECIAL, save_tokenizer, train_tokenizer

CODE = 'def add(first, second):\n    """Return the sum."""\n    return first + second\n\n\n' * 8
VOCABULARY, MASK = 300, SPECIAL.index("<|mask|>")
PROMPTS = ["def add(first", "return second", "the sum of both", "    return"]


def write_tiny(folder: Path, **changes) -> Path:
    """A folder with weights, tokenizer, chat template and held-out prompts; `changes` go into its config."""
    changes = {"vocab_size": VOCABULARY, "mask_token_id": MASK, "eos_token_ids": ()} | changes
    model = small_model(**changes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(
        {name: weight.contiguous() for name, weight in model.destinations().items()},
        folder / "model.safetensors",
    )
    save_tokenizer(train_tokenizer([CODE], VOCABULARY), folder, model.config.context_length)
    rows = [{"prompt": prompt, "split": "test"} for prompt in PROMPTS]
    rows.append({"prompt": "for tuning", "split": "dev"})
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Change fields of a folder's config.json."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def edit_tensor(folder: Path, name: str, change) -> None:
    """Replace a tensor of a folder's file by change(tensor)."""
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> list[Path]:
    """Split a folder's file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return [folder / file for file in files]
