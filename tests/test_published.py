"""The published checkpoints, by headers derived from their configs: every name and shape has its place.

Headers in fixtures/published.json were written from the configs, not read from the published files; the files
here are sparse and hold zeros."""

import json
import math
from pathlib import Path

import pytest
import torch
from raw_safetensors import write_index, write_sparse

from qwen3_model import InputError, Qwen3, Qwen3Config
from qwen3_model.checkpoint import load_into, tensor_names

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "published.json").read_text())
MODELS = {model["name"]: model for model in PUBLISHED["models"]}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def shapes(model: dict) -> dict[str, list[int]]:
    """All tensors of a published checkpoint: name -> shape."""
    layers = {
        f"model.layers.{i}.{name}": shape
        for i in range(model["layers"])
        for name, shape in model["layer_tensors"].items()
    }
    return model["tensors"] | layers


def on_meta(model: dict) -> Qwen3:
    config = Qwen3Config.from_dict(model["config"], PUBLISHED["generation_config"])
    return Qwen3.from_config(config, device="meta")


def test_the_fixture_is_whole():
    qwen3 = [f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")]
    assert list(MODELS) == qwen3 + [f"chiennv/Orthrus-Qwen3-{size}" for size in ("1.7B", "4B", "8B")]


@every_model
def test_names_and_shapes_are_the_models(model):
    destinations = on_meta(model).destinations()
    assert {name: list(weight.shape) for name, weight in destinations.items()} == shapes(model)


@every_model
def test_headers_load_from_a_single_file(model, tmp_path):
    stored = {name: (model["dtype"], shape) for name, shape in shapes(model).items()}
    write_sparse(tmp_path / "model.safetensors", stored)
    load_into(tmp_path, on_meta(model).destinations())  # raises for the slightest difference:
    wrong = on_meta(model).destinations() | {"model.norm.weight": torch.empty(7, device="meta")}
    with pytest.raises(InputError, match="model.norm.weight"):
        load_into(tmp_path, wrong)


@every_model
def test_headers_load_from_shards_with_a_tied_copy_of_the_head(model, tmp_path):
    stored = {name: (model["dtype"], shape) for name, shape in shapes(model).items()}
    stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    names = list(stored)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for shard, held in shards.items():
        write_sparse(tmp_path / shard, {name: stored[name] for name in held})
    write_index(tmp_path, {name: shard for shard, held in shards.items() for name in held})
    assert tensor_names(tmp_path) == set(names)
    load_into(tmp_path, on_meta(model).destinations())


@every_model
def test_configs_are_read(model):
    config = Qwen3Config.from_dict(model["config"], PUBLISHED["generation_config"])
    assert config.has_diffusion_view == ("Orthrus" in model["name"])
    assert (config.block_size, config.mask_token_id) in ((32, 151669), (0, -1))
    assert (config.head_dim, config.vocab_size, config.rope_theta, config.yarn) == (128, 151936, 1e6, None)
    assert config.eos_token_ids == (151645, 151643) and config.dtype == "bfloat16"
    assert config.context_length == 40960 and config.rms_norm_eps == 1e-6
    assert Qwen3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", PUBLISHED["parameters"])
def test_parameter_counts_are_those_of_the_model_cards(name):
    """An independent figure: the fixture itself could be wrong."""
    count = sum(math.prod(shape) for shape in shapes(MODELS[name]).values())
    assert round(count / 1e9, 1) == PUBLISHED["parameters"][name]
