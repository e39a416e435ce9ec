"""Checkpoint folders: what is loaded arrives bit for bit, what is wrong is refused in one line before
anything is copied.
"""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raw_safetensors import header, write_index, write_sparse
from safetensors.torch import save_file
from small import small_config, small_model

from qwen3_model import InputError, Qwen3, Qwen3Config, weight_files
from qwen3_model.checkpoint import load_into, tensor_names
from qwen3_model.training.tokenizer import save_tokenizer, train_tokenizer

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def weights_of(model: Qwen3) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.destinations().items()}


def write_config(folder: Path, config: Qwen3Config, **changes) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))


def save(folder: Path, model: Qwen3, tensors: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    """A checkpoint of one file; returns the folder."""
    write_config(folder, model.config, **changes)
    save_file(tensors or weights_of(model), folder / "model.safetensors")
    return folder


def save_shards(folder: Path, model: Qwen3) -> dict[str, str]:
    """A checkpoint of two shards; returns the index's map."""
    write_config(folder, model.config)
    weights = weights_of(model)
    for i, shard in enumerate(SHARDS):
        save_file({name: weights[name] for name in list(weights)[i::2]}, folder / shard)
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(weights)}
    write_index(folder, weight_map)
    return weight_map


def load(folder: Path, **settings) -> Qwen3:
    return Qwen3.from_pretrained(folder, device="cpu", progress=False, **settings)


def refusal(folder: Path, destinations=None) -> str:
    """The message loading fails with: one line, and nothing was copied."""
    if destinations is None:
        destinations = small_model().destinations()
    before = {name: weight.clone() for name, weight in destinations.items()}
    with pytest.raises(InputError) as caught:
        load_into(folder, destinations, progress=False)
    assert "\n" not in str(caught.value)
    for name, weight in destinations.items():
        assert weight.is_meta or torch.equal(weight, before[name]), name
    return str(caught.value)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"block_size": 0, "mask_token_id": -1}]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_comes_back_bit_for_bit(tmp_path, changes, sharded):
    model = small_model(seed=3, **changes)
    (save_shards if sharded else save)(tmp_path, model)
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert loaded.text is None
    for name, weight in model.destinations().items():
        assert torch.equal(loaded.destinations()[name], weight), name
    assert torch.equal(loaded.logits([1, 2, 3]), model.logits([1, 2, 3]))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes_are_converted(tmp_path, stored, wanted):
    model = small_model(dtype=stored)
    loaded = load(save(tmp_path, model), dtype=wanted)
    for name, weight in model.destinations().items():
        assert torch.equal(loaded.destinations()[name], weight.to(loaded.dtype))


def test_meta_destinations_are_only_checked(tmp_path):
    save(tmp_path, small_model())
    load_into(tmp_path, Qwen3.from_config(small_config(), device="meta").destinations())
    other = Qwen3.from_config(small_config(hidden_size=64), device="meta")
    assert "has shape" in refusal(tmp_path, other.destinations())


def test_a_sharded_checkpoint_is_read_file_by_file(tmp_path, monkeypatch):
    save_shards(tmp_path, small_model())
    opened, plain = [], weight_files.safe_open

    def watched(file, framework):
        opened.append((file.name, framework))
        return plain(file, framework)

    monkeypatch.setattr(weight_files, "safe_open", watched)
    load_into(tmp_path, small_model().destinations(), progress=False)
    assert opened == [(s, "numpy") for s in SHARDS] + [(s, "pt") for s in SHARDS]


def test_a_folder_with_a_tokenizer_gives_text(tmp_path):
    save(tmp_path, small_model(vocab_size=300))
    save_tokenizer(train_tokenizer(["def f(x):\n    return x\n" * 9], 280), tmp_path, 1024)
    model = load(tmp_path)
    streamed: list[str] = []
    prompt = model.text.encode(model.text.chat([{"role": "user", "content": "def f(x):\n"}]))
    result = model.generate(prompt, max_new_tokens=40, on_tokens=lambda ids, text: streamed.append(text))
    assert result.text == model.text.decode(result.token_ids) == "".join(streamed) != ""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer"):
        load(tmp_path)


# Orthrus by its weights


def test_diffusion_tensors_make_an_orthrus_whatever_its_name(tmp_path):
    model = small_model()
    save(tmp_path, model, architectures=["Qwen3ForCausalLM"])
    assert load(tmp_path).config == model.config


def test_diffusion_tensors_need_a_block_size(tmp_path):
    save(tmp_path, small_model(), architectures=["Qwen3ForCausalLM"], block_size=None)
    with pytest.raises(InputError, match="config.json of an Orthrus: block_size is missing"):
        load(tmp_path)


def test_an_orthrus_without_its_tensors_is_refused(tmp_path):
    model = small_model()
    save(tmp_path, model, {n: w for n, w in weights_of(model).items() if "_diff" not in n})
    with pytest.raises(InputError, match="lacks 12 tensors .*k_norm_diff.* and 9 more"):
        load(tmp_path)


# tied heads and legacy buffers


def test_a_tied_copy_and_legacy_buffers_are_left_out(tmp_path):
    model = small_model()
    extra = {
        "lm_head.weight": model.embedding.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
    }
    save(tmp_path, model, weights_of(model) | extra)
    assert torch.equal(load(tmp_path).head.dense(), model.embedding)
    assert "inv_freq" not in " ".join(tensor_names(tmp_path))


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    model = small_model()
    head = model.embedding.clone()
    head[-1, -1] += 1
    save(tmp_path, model, weights_of(model) | {"lm_head.weight": head})
    assert "set tie_word_embeddings to false" in refusal(tmp_path)
    save(tmp_path, model, weights_of(model) | {"lm_head.weight": head[:5].clone()})
    assert "set tie_word_embeddings to false" in refusal(tmp_path)


# names, shapes, dtypes


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj_diff.weight"])
def test_wrong_tensors_are_refused(tmp_path, name):
    weights = weights_of(small_model())
    lacking = {n: w for n, w in weights.items() if n != name}
    save(tmp_path, small_model(), lacking)
    assert f"lacks 1 tensors that its config.json asks for: {name};" in refusal(tmp_path)
    save(tmp_path, small_model(), weights | {"model.layers.9.extra": torch.ones(2)})
    assert "no place for: model.layers.9.extra;" in refusal(tmp_path)
    save(tmp_path, small_model(), weights | {"two\nlines": torch.ones(2)})
    assert "no place for: 'two\\nlines';" in refusal(tmp_path)
    save(tmp_path, small_model(), weights | {name: weights[name][:-1].clone()})
    assert f"{name} has shape" in refusal(tmp_path)
    save(tmp_path, small_model(), weights | {name: weights[name][None]})
    assert f"{name} has shape [1, " in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["F64", "I32", "F8_E4M3"])
def test_dtypes_other_than_the_three_are_refused(tmp_path, dtype):
    shapes = {n: ("F32", list(w.shape)) for n, w in small_model().destinations().items()}
    shapes["model.norm.weight"] = (dtype, [32])
    write_sparse(tmp_path / "model.safetensors", shapes)
    assert f"model.norm.weight is {dtype}; F32, BF16, F16 was expected" in refusal(tmp_path)


# damaged files


@pytest.mark.parametrize(
    "content",
    [b"", b"\x07", b"\xff" * 8, b"\x05" + bytes(7) + b"{nope", b"\x02" + bytes(7) + b"[]",
     b"\x32" + bytes(7) + b"{}"],
    ids=["empty", "one byte", "vast header", "bad JSON", "a list", "short header"],
)  # fmt: skip
def test_bad_headers_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "damaged, cut short or no safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("left", [-1, -4000, 100, 4])
def test_truncated_files_are_refused(tmp_path, left):
    file = save(tmp_path, small_model()) / "model.safetensors"
    os.truncate(file, left if left > 0 else file.stat().st_size + left)
    assert "cut short" in refusal(tmp_path)


def test_a_truncated_last_shard_leaves_nothing_half_loaded(tmp_path):
    save_shards(tmp_path, small_model(seed=1))
    os.truncate(tmp_path / SHARDS[1], (tmp_path / SHARDS[1]).stat().st_size - 1)
    assert SHARDS[1] in refusal(tmp_path)


@given(st.data())
def test_a_damaged_header_never_gets_past_the_checks(tmp_path_factory, data):
    """One byte of the header changed: refused, or the same tensors."""
    folder = tmp_path_factory.mktemp("damaged")
    shapes = {n: ("F32", list(w.shape)) for n, w in small_model().destinations().items()}
    head, size = header(shapes)
    at = data.draw(st.integers(0, len(head) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != head[at]))
    (folder / "model.safetensors").write_bytes(head[:at] + bytes([byte]) + head[at + 1 :] + bytes(size))
    destinations = small_model().destinations()
    try:
        load_into(folder, destinations, progress=False)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert not any(weight.any() for weight in destinations.values())


@pytest.mark.parametrize("where", ["model.safetensors", SHARDS[0]])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused(tmp_path, where, make):
    if where in SHARDS:
        save_shards(tmp_path, small_model())
        (tmp_path / where).unlink()
    make(tmp_path / where)
    assert where in refusal(tmp_path)


# the index


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "an object was expected"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "maps 'a' to 1;"),
        ('{"weight_map": {"a": "none.safetensors"}}', "lists none.safetensors, which is missing"),
    ],
)
def test_bad_indices_are_refused(tmp_path, text, says):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin", "", "..",
     "x.safetensors\n"],
)  # fmt: skip
def test_shards_lie_in_the_folder_itself(tmp_path, shard):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for outside in (tmp_path, folder / "sub"):
        save(outside, small_model())
        os.rename(outside / "model.safetensors", outside / "x.safetensors")
    write_index(folder, dict.fromkeys(small_model().destinations(), shard))
    assert "beside it was expected" in refusal(folder)


def test_index_and_shards_must_agree(tmp_path):
    weight_map = save_shards(tmp_path, small_model())
    first = next(iter(weight_map))
    write_index(tmp_path, weight_map | {first: SHARDS[1]})
    assert f"{SHARDS[1]} lacks {first}" in refusal(tmp_path)
    write_index(tmp_path, weight_map | {"ghost": SHARDS[0]})
    assert f"{SHARDS[0]} lacks ghost" in refusal(tmp_path)
    write_index(tmp_path, {name: shard for name, shard in weight_map.items() if name != first})
    assert f"{SHARDS[0]} holds {first}, which" in refusal(tmp_path)


def test_symlinked_files_load_as_the_hub_cache_keeps_them(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_shards(blobs, small_model(seed=2))
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert torch.equal(load(snapshot).embedding, small_model(seed=2).embedding)


# pickle


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle file was opened",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickle_is_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    assert f"pickle only ({name}): pickle is never loaded" in refusal(tmp_path)
    load(save(tmp_path, small_model()))


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "neither model.safetensors nor" in refusal(tmp_path)
    write_config(tmp_path, small_config())
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        load(tmp_path)


def test_everything_is_checked_before_weights_take_memory(tmp_path, monkeypatch):
    save(tmp_path, small_model(), hidden_size=64)
    plain, devices = Qwen3.__init__, []

    def watched(self, config, device, *rest):
        devices.append(device.type)
        plain(self, config, device, *rest)

    monkeypatch.setattr(Qwen3, "__init__", watched)
    with pytest.raises(InputError, match="has shape"):
        load(tmp_path)
    assert devices == ["meta"]
