"""config.json: both spellings are read alike, everything that is not a dense Qwen3 is refused in one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_config

from qwen3_model import InputError, Qwen3Config
from qwen3_model.config import YarnScaling
from qwen3_model.errors import quoted
from qwen3_model.reading import read_json_object

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
ORTHRUS = QWEN3 | {"architectures": ["OrthrusLM"], "block_size": 32, "mask_token_id": 151669}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def without(raw: dict, *names: str) -> dict:
    return {name: value for name, value in raw.items() if name not in names}


def refusal(raw: dict, **settings) -> str:
    with pytest.raises(InputError) as caught:
        Qwen3Config.from_dict(raw, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is read


def test_every_field():
    assert Qwen3Config.from_dict(QWEN3) == Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1e6, yarn=None, tie_word_embeddings=True, eos_token_ids=(151645,),
        dtype="bfloat16", block_size=0, mask_token_id=-1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "default"}, YARN, YARN | {"beta_fast": 16, "attention_factor": 1.5}]
)
def test_old_and_new_spelling_are_the_same(scaling):
    old = QWEN3 | {"rope_scaling": scaling}
    new = without(QWEN3, "rope_scaling", "rope_theta", "torch_dtype") | {
        "rope_parameters": {"rope_theta": 1000000} | (scaling or {"rope_type": "default"}),
        "dtype": "bfloat16",
    }
    assert Qwen3Config.from_dict(old) == Qwen3Config.from_dict(new)
    assert Qwen3Config.from_dict(old).rope_theta == 1e6


def test_yarn():
    config = Qwen3Config.from_dict(QWEN3 | {"rope_scaling": without(YARN, "rope_type") | {"type": "yarn"}})
    assert config.yarn == YarnScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.context_length == 131072
    whole = Qwen3Config.from_dict(QWEN3 | {"rope_scaling": {"rope_type": "yarn", "factor": 2}})
    assert whole.yarn.original_max_position_embeddings == 40960  # the config's own
    assert whole.context_length == 81920


def test_orthrus_by_architecture_model_type_or_weights():
    assert Qwen3Config.from_dict(ORTHRUS).block_size == 32
    assert Qwen3Config.from_dict(ORTHRUS | {"r": 128, "lora_alpha": 256}) == Qwen3Config.from_dict(ORTHRUS)
    plain = ORTHRUS | {"architectures": ["Qwen3ForCausalLM"]}
    assert not Qwen3Config.from_dict(plain).has_diffusion_view
    assert Qwen3Config.from_dict(plain, diffusion=True).mask_token_id == 151669
    assert Qwen3Config.from_dict(without(plain, "architectures") | {"model_type": "orthrus"}).block_size == 32


def test_end_tokens_of_generation_config_win():
    ends = [151645, 151643, 151645]
    assert Qwen3Config.from_dict(QWEN3, {"eos_token_id": ends}).eos_token_ids == (151645, 151643)
    assert Qwen3Config.from_dict(QWEN3, {}).eos_token_ids == (151645,)
    assert Qwen3Config.from_dict(QWEN3 | {"eos_token_id": None}).eos_token_ids == ()


def test_from_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ORTHRUS | {"architectures": None}))
    names = {"model.norm.weight", "model.layers.0.self_attn.q_proj_diff.weight"}
    assert Qwen3Config.from_folder(tmp_path, names).has_diffusion_view
    assert not Qwen3Config.from_folder(tmp_path).has_diffusion_view
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert Qwen3Config.from_folder(tmp_path).eos_token_ids == (1, 2)


# there and back


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": 0, "mask_token_id": -1, "tie_word_embeddings": False},
        {"yarn": YarnScaling(2.5, 512), "eos_token_ids": (3, 1), "dtype": "float16"},
        {"yarn": YarnScaling(8.0, 64, 24.0, 2.0, 1.25, False), "eos_token_ids": (), "rms_norm_eps": 1e-5},
    ],
)
def test_round_trip(changes):
    config = small_config(**changes)
    assert Qwen3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_transformers_reads_what_is_written():
    transformers = pytest.importorskip("transformers")
    written = without(small_config(block_size=0).to_dict(), "architectures")
    theirs = transformers.Qwen3Config(**written)
    assert theirs.head_dim == 16 and theirs.num_key_value_heads == 2 and theirs.tie_word_embeddings
    assert theirs.rope_parameters["rope_theta"] == 10_000.0
    assert Qwen3Config.from_dict(theirs.to_dict()) == small_config(
        block_size=0, mask_token_id=-1, dtype="bfloat16"
    )


# what is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 27}, "1 of 28 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["qwen3"]}, "model_type is"),
        ({"num_experts": 128}, "mixture of experts"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"dtype": ["bfloat16"]}, "dtype is"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 63}, "head_dim is 63; RoPE needs an even one"),
        ({"rope_scaling": "yarn"}, "RoPE settings are 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "RoPE type 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "RoPE type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "RoPE type 'llama3'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "RoPE type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": YARN | {"factor": -1}}, "factor is -1"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"eos_token_id": "end"}, "eos_token_id holds 'end'"),
        ({"eos_token_id": [151936]}, "eos_token_id holds 151936"),
        ({"eos_token_id": True}, "eos_token_id holds True"),
    ],
)
def test_what_is_not_dense_qwen3_is_refused(changes, says):
    assert says in refusal(QWEN3 | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_size": None}, "block_size is missing"),
        ({"block_size": 1}, "block_size is 1; 2 to 256"),
        ({"block_size": 257}, "block_size is 257"),
        ({"block_size": "32"}, "block_size is '32'"),
        ({"mask_token_id": None}, "mask_token_id is None"),
        ({"mask_token_id": 151936}, "mask_token_id is 151936; a token id in 0..151935"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"mask_token_id": True}, "mask_token_id is True"),
    ],
)
def test_bad_orthrus_settings_are_refused(changes, says):
    assert says in refusal(ORTHRUS | changes)
    assert says in refusal(ORTHRUS | changes | {"architectures": ["Qwen3ForCausalLM"]}, diffusion=True)


COUNTS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_wrong_numbers_are_refused(name):
    assert f"{name} is missing" in refusal(without(QWEN3, name))
    for wrong in (0, -1, 1.5, "8", True, [8], 2**40):
        assert f"{name} is {wrong!r}; a whole number in 1.." in refusal(QWEN3 | {name: wrong})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_wrong_real_numbers_are_refused(name):
    for wrong in (0, -1e-6, "1e-6", True, float("nan"), float("inf"), 10**400):
        assert f"{name} is {quoted(wrong)}; a finite number" in refusal(QWEN3 | {name: wrong})


@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "use_sliding_window"])
def test_wrong_flags_are_refused(name):
    for wrong in (1, "true", []):
        assert f"{name} is {wrong!r}; true or false" in refusal(QWEN3 | {name: wrong})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(ORTHRUS) + ["rope_parameters", "layer_types", "dtype"]), values)
def test_any_value_is_read_or_refused(name, value):
    try:
        Qwen3Config.from_dict(ORTHRUS | {name: value})
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"3", b'"x"', b"null", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=lambda content: repr(content[:6]),
)
def test_files_that_hold_no_object_are_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json") as caught:
        read_json_object(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json is missing"):
        Qwen3Config.from_folder(tmp_path)
