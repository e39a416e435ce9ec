"""A tiny base and its Orthrus, trained for seconds on some of this project's source: real files for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from qwen3_model import Qwen3Config
from qwen3_model.training import recipe
from qwen3_model.training.distill import Blocks
from qwen3_model.training.loop import Plan

TEXT = (Path(__file__).parents[2] / "src/qwen3_model/training",)
CONFIG = dataclasses.replace(
    recipe.TINY, vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
)  # fmt: skip
BLOCKS = Blocks(count=6, size=8, offset_decay=0.9)
PLAN = Plan(steps=40, batch=4, length=64, lr=5e-3)


def make_base(folder: Path, config: Qwen3Config = CONFIG, **changes) -> Path:
    """Pretrain a base into a folder."""
    recipe.run_pretrain(
        folder, None, plan=dataclasses.replace(PLAN, **changes), config=config, text=TEXT, overwrite=True
    )
    return folder


def make_orthrus(base: Path, folder: Path, **settings):
    """Distil a base into a folder; returns the estimate."""
    settings = {"plan": PLAN, "blocks": BLOCKS, "text": TEXT} | settings
    return recipe.run_distill(base, folder, None, **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def sharded_copy(base: Path, out: Path) -> Path:
    """The base in two shards with an index, without training.json, fp32, and with a licence."""
    out.mkdir()
    for name, content in files_of(base).items():
        if name not in ("model.safetensors", "training.json"):
            (out / name).write_bytes(content)
    (out / "LICENSE").write_text("terms")
    tensors = {name: w.float() for name, w in load_file(base / "model.safetensors").items()}
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: w for name, w in tensors.items() if places[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return out
