"""A setting that is given in two places or spellings is applied where they agree and refused where they do
not; what nothing reads is refused where it would change the text."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_config import QWEN3, YARN, refusal, without

from orthrus_kernels import inverse_frequencies
from qwen3_model import InputError, Qwen3Config
from qwen3_model.reading import read_json_object
from qwen3_model.unsupported import changes_arithmetic

BASE = {"rope_theta": 1e6}
FLAT = BASE | YARN
OLD = without(QWEN3, "rope_scaling")
NEW = without(QWEN3, "rope_scaling", "rope_theta")


def read(raw: dict, **settings) -> Qwen3Config:
    return Qwen3Config.from_dict(raw, **settings)


# RoPE


@pytest.mark.parametrize(
    "raw",
    [
        OLD | {"rope_scaling": YARN},
        OLD | {"rope_scaling": YARN, "rope_parameters": {}},
        OLD | {"rope_scaling": YARN, "rope_parameters": None},
        OLD | {"rope_scaling": {}, "rope_parameters": YARN},
        OLD | {"rope_scaling": without(YARN, "rope_type") | {"type": "yarn"}, "rope_parameters": FLAT},
        OLD | {"rope_scaling": YARN | {"type": "yarn"}},
        OLD
        | {
            "rope_scaling": without(YARN, "original_max_position_embeddings"),
            "original_max_position_embeddings": 32768,
        },
        NEW | {"rope_parameters": FLAT},
        NEW
        | {"rope_parameters": FLAT | {"beta_fast": None, "attention_factor": None, "low_freq_factor": None}},
        NEW | {"rope_parameters": FLAT | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 1},
        NEW | {"rope_parameters": {"full_attention": FLAT}},
        NEW | {"rope_parameters": {"full_attention": FLAT, "sliding_attention": FLAT}},
    ],
)
def test_yarn_is_applied_however_it_is_spelt(raw):
    config = read(raw)
    assert config == read(QWEN3 | {"rope_scaling": YARN}) and config.context_length == 131072


def test_a_part_of_yarns_own_attention_factor_multiplies_it():
    """DeepSeek-R1-0528-Qwen3-8B: 0.878 of YaRN's own 1.139, so that attention is not scaled."""
    own = 0.1 * math.log(4.0) + 1.0
    config = read(QWEN3 | {"rope_scaling": YARN | {"attn_factor": 1 / own}})
    assert config.yarn.attention_factor == pytest.approx(1.0)
    with pytest.raises(InputError, match="keep attention_factor"):
        read(QWEN3 | {"rope_scaling": YARN | {"attn_factor": 0.9, "attention_factor": 1.0}})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            OLD | {"rope_scaling": YARN, "rope_parameters": BASE | {"rope_type": "default"}},
            "disagree about RoPE",
        ),
        (OLD | {"rope_scaling": {"type": "default"}, "rope_parameters": FLAT}, "disagree about RoPE"),
        (OLD | {"rope_scaling": YARN | {"factor": 2.0}, "rope_parameters": FLAT}, "disagree about RoPE"),
        (NEW | {"rope_scaling": YARN, "rope_parameters": FLAT}, "rope_theta is missing in rope_scaling"),
        (
            NEW | {"rope_parameters": {"full_attention": FLAT, "sliding_attention": BASE}},
            "disagree about RoPE",
        ),
        (
            OLD | {"rope_parameters": {"rope_theta": 5e6}},
            "1000000 at the top level and 5000000.0 in rope_para",
        ),
        (OLD | {"rope_scaling": YARN, "original_max_position_embeddings": 1024}, "1024 at the top level"),
        (OLD | {"rope_scaling": YARN | {"type": "default"}}, "rope_type yarn and type default"),
        (
            OLD | {"rope_scaling": YARN | {"partial_rotary_factor": 1}, "partial_rotary_factor": 0.5},
            "partial_",
        ),
        (OLD | {"rope_scaling": YARN | {"beta_fst": 16}}, "does not take 'beta_fst'"),
        (OLD | {"rope_scaling": YARN | {"short_factor": [1.0]}}, "does not take 'short_factor'"),
        (OLD | {"rope_scaling": {"factor": 4.0}}, "of type default does not take 'factor'"),
        (OLD | {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "does not take 'factor'"),
        (OLD | {"rope_scaling": YARN | {"truncate": None}}, "truncate is None"),
        (
            OLD | {"rope_parameters": {"full_attention": YARN, "factor": 2}},
            "'factor' beside settings by layer",
        ),
        (OLD | {"rope_parameters": {"full_attention": None}}, "full_attention is null"),
        (OLD | {"rope_parameters": {"full_attention": [4]}}, "RoPE settings of full_attention are"),
        (OLD | {"rope_parameters": []}, "RoPE settings are []"),
        (OLD | {"rope_theta": 1e-300}, "give no frequencies"),
        (OLD | {"rope_scaling": YARN, "rope_theta": 1 + 1e-15, "head_dim": 2**16}, "give no frequencies"),
    ],
)
def test_rope_that_says_two_things_or_what_nothing_reads_is_refused(raw, says):
    assert says in refusal(raw)


@pytest.mark.parametrize(
    "scaling", [None, YARN, YARN | {"beta_fast": 16, "truncate": False}, {"factor": 1.0}]
)
def test_what_is_read_is_what_transformers_computes_with(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    raw = OLD | {"rope_parameters": {}, "rope_scaling": scaling and {"type": "yarn"} | scaling}
    theirs = Qwen3RotaryEmbedding(transformers.Qwen3Config.from_dict(copy.deepcopy(raw)))
    config = read(raw)
    frequencies, scale = inverse_frequencies(config.head_dim, config.rope_theta, config.yarn)
    assert scale == theirs.attention_scaling
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)


# dtype, end tokens, heads, layers


def test_a_dtype_has_two_names():
    bare = without(QWEN3, "torch_dtype")
    for raw in (
        {"dtype": None, "torch_dtype": "float16"},
        {"dtype": "float16"},
        {"torch_dtype": "torch.float16"},
        {"dtype": "float16", "torch_dtype": "torch.float16"},
    ):
        assert read(bare | raw).dtype == "float16"
    assert read(bare).dtype == "bfloat16"
    assert "dtype is float16 and torch_dtype is bfloat16" in refusal(QWEN3 | {"dtype": "float16"})
    for odd in ("", "auto", "torch.", 16, {}):
        assert "dtype is" in refusal(bare | {"dtype": odd, "torch_dtype": "float16"})


@pytest.mark.parametrize("none", [{}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_without_end_tokens_of_generation_those_of_the_config_count(none):
    assert read(QWEN3, generation=none).eos_token_ids == (151645,)
    assert read(QWEN3 | none, generation={"eos_token_id": 7}).eos_token_ids == (7,)
    assert read(without(QWEN3, "eos_token_id") | none, generation=none).eos_token_ids == ()


def test_end_tokens_of_both_files_are_checked():
    assert "generation_config.json: eos_token_id holds '7'" in refusal(
        QWEN3, generation={"eos_token_id": "7"}
    )
    assert "\nconfig.json: eos_token_id holds -1" in "\n" + refusal(
        QWEN3 | {"eos_token_id": [-1]}, generation={"eos_token_id": 7}
    )


def test_a_null_number_of_key_heads_means_as_many():
    assert read(QWEN3 | {"num_key_value_heads": None}).num_key_value_heads == 16


def test_sliding_layers_are_counted():
    """As transformers does: a window is used by layers from max_window_layers on, if there are any."""
    used = QWEN3 | {"use_sliding_window": True, "sliding_window": 4096}
    for whole in (
        {"max_window_layers": 28},
        {"max_window_layers": 99},
        {},
        {"sliding_window": None, "max_window_layers": 0},
        {"max_window_layers": 0, "layer_types": ["full_attention"] * 28},
    ):
        assert read(used | whole) == read(QWEN3)
    assert "1 of 28 layers" in refusal(used | {"max_window_layers": 27})
    assert "28 of 28 layers" in refusal(used | {"max_window_layers": -3})
    assert "layer_types lists 1 layers of 28" in refusal(QWEN3 | {"layer_types": ["full_attention"]})
    assert "layer_types is 'full_attention'" in refusal(QWEN3 | {"layer_types": "full_attention"})
    assert "max_window_layers is '3'" in refusal(QWEN3 | {"max_window_layers": "3"})


# what nothing reads


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlp_bias", True),
        ("qkv_bias", True),
        ("logits_soft_cap", 30.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 224),
        ("attention_multiplier", 0.1),
        ("residual_multiplier", 0.2),
        ("embedding_multiplier", 12.0),
        ("scale_emb", 12),
        ("logit_scale", 0),
        ("rope_interleaved", True),
        ("rope_ratio", 2),
        ("no_rope_layers", [1, 0]),
        ("rotary_pct", 0.5),
        ("attention_chunk_size", 8192),
        ("dual_chunk_attention_config", {"chunk_size": 4}),
        ("is_causal", False),
        ("use_qk_norm", False),
        ("layer_norm_eps", 1e-5),
        ("norm_type", "layernorm"),
        ("pruned_heads", {"0": [1]}),
        ("quantization", {"bits": 4}),
        ("adapter_path", "x"),
        ("per_layer_config", {"0": {"head_dim": 8}}),
        ("moe_intermediate_size", 768),
        ("ropeScaling", {"factor": 4}),
        ("position_embedding_type", "alibi"),
        ("rope_\x1b[2J" + "y" * 9999, "z" * 9999),
    ],
)
def test_a_setting_of_other_models_is_refused(name, value):
    said = refusal(QWEN3 | {name: value})
    assert "would change the arithmetic" in said and "remove it" in said
    assert len(said) < 500 and said.isprintable()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mlp_bias", False),
        ("logit_scale", 1.0),
        ("rope_ratio", 1),
        ("final_logit_softcapping", None),
        ("pruned_heads", {}),
        ("num_experts", 0),
        ("use_mrope", False),
        ("is_causal", True),
        ("use_qk_norm", True),
        ("unsloth_version", "2026.1"),
        ("auto_map", {"AutoModel": "m.M"}),
        ("properties", {"scope": 1}),
        ("_attn_implementation_autoset", True),
        ("attn_implementation", "sdpa"),
        ("attention_dropout", 0.1),
        ("transformers.js_config", {"dtype": "q4"}),
        ("temperature", 0.6),
        ("capabilities", ["chat"]),
        ("output_attentions", True),
        ("lora_alpha", 256),
        ("initializer_range", 0.02),
    ],
)
def test_settings_that_are_off_or_private_pass(name, value):
    assert read(QWEN3 | {name: value}) == read(QWEN3)


def test_what_transformers_itself_writes_passes():
    transformers = pytest.importorskip("transformers")
    written = transformers.Qwen3Config().to_dict()
    assert not [name for name, value in written.items() if changes_arithmetic(name, value)]


def test_one_name_twice_in_a_file_is_refused(tmp_path):
    """Python's reader would take the last: YaRN above and the old null below."""
    file = tmp_path / "config.json"
    file.write_text('{"rope_scaling": {"factor": 4.0}, "a": 1, "rope_scaling": null}')
    with pytest.raises(InputError, match="'rope_scaling' stands in it twice"):
        read_json_object(file)
    file.write_text('{"a": {"b": 1, "b": 1}, "a": {"b": 1}}')
    assert read_json_object(file) == {"a": {"b": 1}}


def test_messages_about_hostile_settings_are_short():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for odd in ("x" * 100_000, "\x1b[2J\n", 10**5000, deep, {"a\x1b": deep}, float("nan"), ["y" * 5000]):
        for name in (*QWEN3, "rope_parameters", "dtype", "layer_types", "logit_scale"):
            try:
                read(QWEN3 | {name: odd})
            except InputError as error:
                assert len(str(error)) < 500 and str(error).isprintable()
