"""config.json and generation_config.json in odd, contradicting and hostile spellings, against transformers.

What is accepted must be read as transformers reads it, and as it would be read from each of the places that
say something: a file in two spellings that are not the same has no right reading."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from fuzzing import LONGEST_LINE, Finding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from orthrus_kernels import inverse_frequencies
from qwen3_model import InputError, Qwen3Config

logging.disable(logging.WARNING)  # transformers has much to say about these files
COUNT = 4000
KINDS = {
    "other frequencies": "RoPE's frequencies and scale are transformers', from whichever place they are read",
    "other shape": "sizes, epsilon and tied heads are transformers'",
    "other dtype": "the dtype is the one given, under either name",
    "other end tokens": "those of generation_config.json, or config.json's where it has none",
    "setting dropped": "a setting that would change the arithmetic is applied or refused",
    "file read otherwise": "a byte order mark changes nothing",
    "traceback": "only InputError is raised",
    "long line": f"a message has at most {LONGEST_LINE} characters",
    "escape": "a message is one line that can be printed",
}
BASE = {
    "architectures": ["Qwen3ForCausalLM"], "eos_token_id": 7, "head_dim": 16, "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 2048, "model_type": "qwen3",
    "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 300,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "attention_bias": False,
}  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
         "tie_word_embeddings")  # fmt: skip
SPELLINGS = ("rope_parameters", "rope_scaling")
READ = {  # what transformers' RoPE types of Qwen3 take
    "default": {"rope_type", "type", "rope_theta", "partial_rotary_factor"},
    "yarn": {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow",
             "attention_factor", "truncate", "original_max_position_embeddings"},
}  # fmt: skip
ARITHMETIC = {  # settings of other models, and values at which they are off
    "mlp_bias": (False, None), "qkv_bias": (False,), "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None, 0), "query_pre_attn_scalar": (None,), "attention_multiplier": (1, 1.0),
    "residual_multiplier": (1.0,), "embedding_multiplier": (1,), "logit_scale": (1.0, None),
    "scale_emb": (1,), "rope_interleaved": (False,), "no_rope_layers": ([], None), "rope_ratio": (1,),
    "attention_chunk_size": (None,), "quantization_config": (None,), "quantization": (None, {}),
    "num_experts": (0, None), "partial_rotary_factor": (1, None, 1.0), "attention_bias": (False, None),
    "is_causal": (True, None), "use_qk_norm": (True,), "dual_chunk_attention_config": (None, {}),
}  # fmt: skip
PRIVATE = {
    "unsloth_version": "2026.1", "auto_map": {"AutoModel": "m.M"}, "transformers.js_config": {"dtype": "q4"},
    "_name_or_path": "./x", "use_cache": True, "temperature": 0.6, "trl": {"a": 1}, "bos_token_id": 1,
    "attention_dropout": 0.1, "initializer_range": 0.02, "pad_token_id": None,
}  # fmt: skip


def case(rng: Random, folder: Path) -> list[Finding]:
    """One pair of files, changed in a few places."""
    raw: dict[str, Any] = copy.deepcopy(BASE)
    for _ in range(rng.choice([1, 1, 2, 2, 3, 4])):
        rng.choice(CHANGES)(raw, rng)
    generation = _generation(rng)
    try:
        config = Qwen3Config.from_dict(copy.deepcopy(raw), copy.deepcopy(generation))
    except InputError as error:
        found = list(_of_message(str(error)))
        config = None
    except Exception as error:
        return [Finding("traceback", f"{type(error).__name__}: {str(error)[:80]!r} {_shown(raw)}")]
    else:
        found = list(_of_reading(config, raw, generation))
    if rng.random() < 0.05:
        found += _of_files(config, raw, generation, folder)
    return found


def _of_message(said: str) -> Iterator[Finding]:
    if len(said) > LONGEST_LINE:
        yield Finding("long line", f"{len(said)} characters: {said[:80]!r}")
    if not said.isprintable():
        yield Finding("escape", ascii(said[:200]))


def _of_reading(config: Qwen3Config, raw: dict, generation: dict | None) -> Iterator[Finding]:
    yield from _of_dropped(raw)
    ends = [source.get("eos_token_id") for source in (generation or {}, raw)]
    ends = next((end for end in ends if end not in (None, [])), [])
    ends = ends if isinstance(ends, list) else [ends]
    if list(config.eos_token_ids) != [end for i, end in enumerate(ends) if end not in ends[:i]]:
        yield Finding("other end tokens", f"{config.eos_token_ids} {generation} {_shown(raw)}")
    dtypes = {str(raw[name]) for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    if {config.dtype} != {str(dtype).removeprefix("torch.") for dtype in dtypes or {"bfloat16"}}:
        yield Finding("other dtype", f"{config.dtype} {_shown(raw)}")
    ours = inverse_frequencies(config.head_dim, config.rope_theta, config.yarn)
    for reading in _readings(raw):
        theirs = _transformers(reading)
        if theirs is None:
            continue
        frequencies, scale, read = theirs
        same = ours[0].shape == frequencies.shape and abs(ours[1] - scale) < 1e-12
        if not (same and torch.allclose(ours[0], frequencies, rtol=1e-6, atol=0)):
            yield Finding("other frequencies", f"{config.rope_theta} {config.yarn} {_shown(raw)}")
        for name in SIZES:
            if getattr(config, name) != getattr(read, name):
                yield Finding("other shape", f"{name} is {getattr(config, name)}: {_shown(raw)}")
        if any(kind != "full_attention" for kind in read.layer_types):
            yield Finding("setting dropped", f"sliding window {_shown(raw)}")


def _of_dropped(raw: dict) -> Iterator[Finding]:
    """What was accepted though nothing reads it."""
    for name, neutral in ARITHMETIC.items():
        if name in raw and not any(raw[name] == n and type(raw[name]) is type(n) for n in neutral):
            yield Finding("setting dropped", f"{name} is {_short(raw[name])}")
    for _, settings in _rope_objects(raw):
        kind = settings.get("rope_type") or settings.get("type") or "default"
        for name, value in settings.items():
            harmless = value is None or name == "original_max_position_embeddings"
            if name not in READ.get(str(kind)[:20], ()) and not harmless:
                yield Finding("setting dropped", f"{_short(name)} of {_short(kind)}: {_shown(raw)}")


def _rope_objects(raw: dict) -> Iterator[tuple[str, dict]]:
    for name in SPELLINGS:
        settings = raw.get(name)
        if isinstance(settings, dict) and settings:
            nested = [v for k, v in settings.items() if k.endswith("_attention") and isinstance(v, dict)]
            yield from ((name, inner) for inner in nested or [settings])


def _readings(raw: dict) -> Iterator[dict]:
    """The file with RoPE said in one place only, for every place, and with each base that is given."""
    objects = list(_rope_objects(raw)) or [("rope_parameters", {})]
    for name, settings in objects:
        alone = {key: value for key, value in raw.items() if key not in SPELLINGS}
        inner = {key: value for key, value in settings.items() if value is not None or key == "truncate"}
        yield alone | {name: inner}
        if inner.get("rope_theta") is not None and raw.get("rope_theta") is not None:
            yield alone | {name: inner | {"rope_theta": raw["rope_theta"]}}


def _transformers(raw: dict) -> tuple[torch.Tensor, float, transformers.Qwen3Config] | None:
    """What transformers makes of a file, None if it cannot run it."""
    raw = {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")}
    if raw.get("head_dim", 0) is None:  # refused there, absent here
        del raw["head_dim"]
    try:
        read = transformers.Qwen3Config.from_dict(copy.deepcopy(raw))
        rotary = Qwen3RotaryEmbedding(read)
    except Exception:
        return None
    return rotary.inv_freq, rotary.attention_scaling, read


def _of_files(
    config: Qwen3Config | None, raw: dict, generation: dict | None, folder: Path
) -> Iterator[Finding]:
    """The same from files that begin with a byte order mark, as an editor leaves them."""
    try:
        (folder / "config.json").write_text(json.dumps(raw), "utf-8-sig")
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8-sig")
    except ValueError:  # a number of 5000 digits
        return
    try:
        read = Qwen3Config.from_folder(folder)
    except InputError as error:
        read = None
        yield from _of_message(str(error).replace(str(folder), ""))
    except Exception as error:
        yield Finding("traceback", f"{type(error).__name__}: {str(error)[:80]!r} {_shown(raw)}")
        return
    if read != config:
        yield Finding("file read otherwise", _shown(raw))


def _shown(raw: dict) -> str:
    """What was changed, as short as a message."""
    changed = {name: value for name, value in raw.items() if value != BASE.get(name, BASE)}
    return ", ".join(f"{_short(name)}: {_short(value)}" for name, value in changed.items())


def _short(value: Any) -> str:
    try:
        return repr(value)[:90]
    except ValueError:  # a number of 5000 digits
        return f"a {type(value).__name__}"


# changes


def _rope(raw: dict, rng: Random) -> None:
    """One or both spellings, the base here or there."""
    where = rng.choice([*SPELLINGS, SPELLINGS])
    for name in (where,) if isinstance(where, str) else where:
        raw[name] = _rope_object(rng)
    if rng.random() < 0.3:
        raw["rope_scaling"] = rng.choice([copy.deepcopy(raw.get("rope_parameters")), _rope_object(rng)])
    if rng.random() < 0.3:
        raw["rope_theta"] = _theta(rng)
    if rng.random() < 0.1:
        raw.pop("rope_theta", None)


def _rope_object(rng: Random) -> Any:
    if rng.random() < 0.25:
        return rng.choice([None, None, None, {}, {}, {}, "yarn", [], {"full_attention": None}])
    kind = rng.choice(["yarn"] * 6 + ["default"] * 4 + [None, None, "linear", "llama3"])
    settings: dict[str, Any] = {}
    if kind is not None or rng.random() < 0.5:
        settings[rng.choice(["rope_type", "rope_type", "type"])] = kind
    if kind == "yarn":
        settings["factor"] = rng.choice([4.0, 4.0, 4.0, 2, 1, 0.5, 1e9, None, "4"])
        settings |= (
            {}
            if rng.random() < 0.4
            else {"original_max_position_embeddings": rng.choice([512, 512, 1024, None])}
        )
        for name, values in (
            ("beta_fast", [32, 32.0, 16, None, 0, 1e-3]), ("beta_slow", [1, 2.0, None, 64]),
            ("attention_factor", [1.0, 1.5, None, -1, 1]), ("truncate", [True, False, None]),
            ("mscale", [1.0, None, 0.7]),
        ):  # fmt: skip
            settings |= {name: rng.choice(values)} if rng.random() < 0.15 else {}
    if rng.random() < 0.6:
        settings["rope_theta"] = _theta(rng)
    if rng.random() < 0.1:
        settings[rng.choice(["factor", "beta_fst", "short_factor", "low_freq_factor", "partial_rotary_factor",
                             "original_max_position_embeddings", "type", "mrope_section"])] = rng.choice(
            [4.0, [1.0], None, 1.0, 0.5, "yarn", "default"])  # fmt: skip
    return {rng.choice(["full_attention", "sliding_attention"]): settings} if rng.random() < 0.1 else settings


def _theta(rng: Random) -> Any:
    if rng.random() < 0.8:
        return rng.choice([1000000, 1e6])
    return rng.choice([10000.0, 5e6, None, 1, 1e-300, 1.0000000000000002, "1e6", 0])


def _dtype(raw: dict, rng: Random) -> None:
    values = ["bfloat16", "bfloat16", "float16", "float32", None, "torch.float16", "", "auto", "float64", 3]
    for name in rng.choice([("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")]):
        raw[name] = rng.choice(values)


def _ends(raw: dict, rng: Random) -> None:
    raw["eos_token_id"] = rng.choice([None, [], 0, 7, 7, [7, 8, 7], [8], 299, 300, -1, True, "7", [[7]]])


def _generation(rng: Random) -> dict | None:
    if rng.random() < 0.7:
        return None
    raw: dict[str, Any] = {"do_sample": True, "temperature": 0.6}
    _ends(raw, rng)
    return raw if rng.random() < 0.9 else {}


def _layers(raw: dict, rng: Random) -> None:
    raw["use_sliding_window"] = rng.choice([True, True, True, False, False, None, 1])
    raw["sliding_window"] = rng.choice([None, 4096, 64])
    raw["max_window_layers"] = rng.choice([0, 2, 3, 28, -1])
    if rng.random() < 0.4:
        kinds = ["full_attention", "full_attention", "full_attention", "sliding_attention", "attention"]
        raw["layer_types"] = rng.choice([None, [rng.choice(kinds) for _ in range(rng.choice([3, 3, 3, 2]))]])
    for name in [name for name in ("sliding_window", "max_window_layers") if rng.random() < 0.2]:
        del raw[name]


def _size(raw: dict, rng: Random) -> None:
    raw[rng.choice(SIZES)] = rng.choice(
        [1, 2, 4, 8, 64, 3, 0, -1, None, 1e-5, True, 2.0, "8", 2**70, 10**400]
    )


def _arithmetic(raw: dict, rng: Random) -> None:
    name = rng.choice(sorted(ARITHMETIC))
    raw[name] = rng.choice([*ARITHMETIC[name], True, 2, 0.5, 30.0, [1, 0], {"a": 1}])


def _private(raw: dict, rng: Random) -> None:
    name = rng.choice(sorted(PRIVATE))
    raw[name] = PRIVATE[name]


def _hostile(raw: dict, rng: Random) -> None:
    deep: Any = []
    for _ in range(rng.choice([1, 50, 200])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    odd = ["x" * 100_000, "\x1b[2J\x1b]0;title\x07", "\ud800", "a\nb\r\u2028\u202ec", deep, 10**5000,
           float("nan"), float("inf"), -0.0, {"\x1b[31m" * 300: 1}, ["y" * 5000], False]  # fmt: skip
    name = rng.choice([*BASE, *SPELLINGS, "dtype", "layer_types", "generation", "rope_\x1b[2J" + "z" * 3000])
    value = rng.choice(odd)
    if rng.random() < 0.3:
        settings = {"rope_type": "yarn", "factor": 4.0}
        raw[rng.choice(SPELLINGS)] = settings | {rng.choice([*settings, "truncate", "w\x1b" * 900]): value}
    else:
        raw[name] = value


CHANGES = [_rope] * 6 + [_dtype, _ends, _layers, _size, _arithmetic, _arithmetic, _private, _hostile]
