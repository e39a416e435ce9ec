"""Weights that are not what they should be are called what they are; other official forms are loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
import torch
from raw_safetensors import write_index, write_sparse
from small import small_model
from test_checkpoint import SHARDS, load, refusal, save, save_shards, weights_of, write_config

from qwen3_model import InputError, Qwen3Config, weight_files
from qwen3_model.reading import LARGEST, check_file, read_json_object, read_text

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
MODEL = small_model(seed=5)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def renamed(change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {change(name): weight for name, weight in weights_of(MODEL).items()}


# files


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    """The same download would give the same pointer again."""
    save(tmp_path, MODEL)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        InputError, match=r"is a Git LFS pointer, not the file itself: fetch that, with `git lfs"
    ):
        load(tmp_path)


def test_a_pointer_in_place_of_a_shard_is_named(tmp_path):
    save_shards(tmp_path, MODEL)
    (tmp_path / SHARDS[1]).write_text(POINTER)
    assert f"{SHARDS[1]} is a Git LFS pointer" in refusal(tmp_path)


PLACED = {
    "a folder": os.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", SHARDS[0]],
)
def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path, kind, name):
    """A pipe would wait for a writer, and a device has no end."""
    if name in SHARDS or "index" in name:
        save_shards(tmp_path, MODEL)
    else:
        save(tmp_path, MODEL)
    (tmp_path / name).unlink(missing_ok=True)
    PLACED[kind](tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is {kind}, not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors"])
def test_a_link_to_nowhere_is_a_file_that_someone_meant(tmp_path, name):
    save(tmp_path, MODEL)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"{name} is not a file but a link to nowhere"):
        load(tmp_path)


def test_a_file_too_large_for_text_is_not_read(tmp_path):
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", LARGEST + 1)
    with pytest.raises(InputError, match=f"larger than the {LARGEST} bytes"):
        read_json_object(tmp_path / "config.json")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    save_shards(tmp_path, MODEL)
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text(), "utf-8-sig")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3]}', "utf-8-sig")
    loaded = load(tmp_path)
    assert loaded.config.eos_token_ids == (3,) and torch.equal(loaded.embedding, MODEL.embedding)
    assert read_text(tmp_path / "generation_config.json")[0] == "{"


def test_an_empty_or_lacking_file_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(InputError, match="config.json cannot be read as JSON"):
        Qwen3Config.from_folder(tmp_path)
    with pytest.raises(InputError, match="gone is missing"):
        check_file(tmp_path / "gone")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "KiB, does not fit into memory: free some"),
        (RuntimeError("unable to mmap 12884901888 bytes: Cannot allocate memory (12)"), "12.0 GiB were"),
        (OSError(12, "Cannot allocate memory"), "does not fit into memory"),
        (RuntimeError("of another kind"), "cannot be read: of another kind"),
    ],
)
def test_memory_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, error, says):
    def fail(*_):
        raise error

    save(tmp_path, MODEL)
    monkeypatch.setattr(weight_files, "safe_open", fail)
    with pytest.raises(InputError, match=says):
        weight_files.read_headers(tmp_path)


# folders


@pytest.mark.parametrize("adapter", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_never_dropped(tmp_path, adapter):
    """transformers would apply it, so weights beside it are not the model."""
    write_config(tmp_path, MODEL.config)
    (tmp_path / adapter).touch()
    assert f"holds an adapter ({adapter}), which is never applied: merge it" in refusal(tmp_path)
    save(tmp_path, MODEL)
    assert "remove it if that is done" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "consolidated.safetensors", "model.gguf"]
)
def test_weights_under_other_names_are_named(tmp_path, name):
    (tmp_path / name).touch()
    assert f"holds {name}, but neither model.safetensors nor" in refusal(tmp_path)


# names


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.model.", "module.model.", "_orig_mod.model.", "model.language_model.", "gpt."],
)
def test_a_prefix_of_all_names_is_named(tmp_path, prefix):
    save(tmp_path, MODEL, renamed(lambda name: name.replace("model.", prefix, 1)))
    count = len(weights_of(MODEL))
    assert f"all {count} tensors of the model are there with the prefix `{prefix}` in place" in refusal(
        tmp_path
    )


def test_names_without_their_prefix_are_named(tmp_path):
    save(tmp_path, MODEL, renamed(lambda name: name.removeprefix("model.")))
    count = len(weights_of(MODEL))
    assert f"all {count} tensors of the model are there without `model.`: rename" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v_head.summary.weight", "value head of reinforcement learning"),
        ("score.weight", "classifier's head"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "adapter that is not merged"),
        ("model.layers.0.mlp.down_proj.qweight", "a quantised checkpoint"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "a quantised checkpoint"),
        ("optimizer.state.0.exp_avg", "optimizer state"),
        ("model.layers.0.self_attn.q_proj.bias", "biases"),
        ("x\x1b[2J" + "y" * 9999, "no place for: 'x"),
    ],
)
def test_tensors_of_other_things_are_named(tmp_path, name, says):
    save(tmp_path, MODEL, weights_of(MODEL) | {name: torch.ones(2)})
    said = refusal(tmp_path)
    assert says in said and len(said) < 500 and said.isprintable()


@pytest.mark.parametrize(
    ("dtype", "advice"), [("F64", "convert it"), ("I32", "not quantised"), ("F8_E4M3", "not quantised")]
)
def test_advice_follows_the_dtype(tmp_path, dtype, advice):
    shapes = {name: ("F32", list(weight.shape)) for name, weight in weights_of(MODEL).items()}
    shapes["model.norm.weight"] = (dtype, [32])
    write_sparse(tmp_path / "model.safetensors", shapes)
    assert advice in refusal(tmp_path)


# tied heads


def test_a_tied_head_in_the_index_alone_is_superfluous(tmp_path):
    weight_map = save_shards(tmp_path, MODEL)
    write_index(tmp_path, weight_map | {HEAD: SHARDS[0]})
    assert torch.equal(load(tmp_path).head.dense(), MODEL.embedding)


def test_a_head_in_the_index_alone_is_missed_by_a_model_that_needs_it(tmp_path):
    weight_map = save_shards(tmp_path, MODEL)
    write_index(tmp_path, weight_map | {HEAD: SHARDS[0]})
    config = json.loads((tmp_path / "config.json").read_text())
    for untied in ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | untied))
        with pytest.raises(
            InputError, match="lm_head.weight; if the head is the embedding, set tie_word_emb"
        ):
            load(tmp_path)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")])
def test_a_tied_head_of_another_dtype_is_compared_by_value(tmp_path, dtypes):
    stored, of_head = (getattr(torch, name) for name in dtypes)
    embedding = MODEL.embedding.bfloat16().to(stored)
    head = embedding.to(of_head)
    weights = weights_of(MODEL) | {EMBEDDING: embedding, HEAD: head}
    if not torch.equal(head.float(), embedding.float()):
        pytest.fail("the case needs equal values")
    loaded = load(save(tmp_path, MODEL, weights))
    assert torch.equal(loaded.head.dense(), embedding.to(loaded.dtype))
    head = head.clone()
    head[-1, -1] *= 2
    save(tmp_path, MODEL, weights | {HEAD: head})
    assert "differs from model.embed_tokens.weight" in refusal(tmp_path)


def test_a_tied_head_may_be_rounded_to_its_own_dtype(tmp_path):
    embedding = MODEL.embedding.bfloat16() * 1e-6  # below what fp16 resolves
    weights = weights_of(MODEL) | {EMBEDDING: embedding, HEAD: embedding.half()}
    assert not torch.equal(embedding.float(), embedding.half().float())
    assert torch.equal(load(save(tmp_path, MODEL, weights)).head.dense(), embedding.float())


def test_old_buffers_may_stand_in_the_index_alone(tmp_path):
    weight_map = save_shards(tmp_path, MODEL)
    write_index(tmp_path, weight_map | {"model.layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]})
    assert torch.equal(load(tmp_path).head.dense(), MODEL.embedding)


def test_a_tied_head_of_no_float_dtype_is_refused(tmp_path):
    head = torch.zeros(MODEL.embedding.shape, dtype=torch.int8)
    save(tmp_path, MODEL, weights_of(MODEL) | {HEAD: head})
    assert "lm_head.weight is I8; F32, BF16, F16 was expected" in refusal(tmp_path)


def test_a_head_without_the_embedding_is_named(tmp_path):
    weights = weights_of(MODEL)
    weights[HEAD] = weights.pop(EMBEDDING)
    save(tmp_path, MODEL, weights)
    assert f"asks for: {EMBEDDING}; if {HEAD} is it, store it" in refusal(tmp_path)


def test_long_lists_of_hostile_names_are_cut(tmp_path):
    names = {f"\x1b]0;t\x07{i}" + "n" * 5000: torch.ones(1) for i in range(50)}
    save(tmp_path, MODEL, weights_of(MODEL) | names)
    said = refusal(tmp_path)
    assert len(said) < 500 and said.isprintable() and "and 47 more" in said
    write_index(tmp_path, dict.fromkeys(names, "x" * 5000))
    (tmp_path / "model.safetensors").unlink()
    said = refusal(tmp_path)
    assert len(said) < 500 and said.isprintable() and "beside it was expected" in said
