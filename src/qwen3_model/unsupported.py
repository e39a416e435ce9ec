"""Settings of a config.json that would change the arithmetic and that this project does not apply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import InputError, quoted
from .fields import Fields

# Settings that are read elsewhere or change no text, though their names speak of arithmetic
HARMLESS = frozenset(
    ["attention_bias", "chunk_size_feed_forward", "hidden_act", "lora_alpha", "max_position_embeddings",
     "max_window_layers", "num_attention_heads", "original_max_position_embeddings", "partial_rotary_factor",
     "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
     "use_sliding_window"]
)  # fmt: skip
# Speed, memory, training or output: never the text
HARMLESS_WORDS = re.compile(r"dropout|pdrop|implementation|flash|^output_|initializer|(^|_)loss(_|$)")
ARITHMETIC = re.compile(
    r"(^|[_.-])("
    r"rope|rotary|yarn|ntk|alibi|position|attn|attend|attention|causal|bidirectional|sliding|window|chunk|sink"
    r"|moe|expert|router|mlp|ffn|qkv?(?![a-z])|bias|norm|layernorm|rmsnorm|scal|multiplier|mup"
    r"|soft_?cap|cap(ping)?(?![a-z])|logit|residual|act(ivation)?s?(?![a-z])|quant|lora|adapter|pruned?(?![a-z])"
    r"|per_layer"
    r")"
)
FACTOR = re.compile(r"scal|multiplier|factor|ratio")  # neutral at 1, not at 0
TRUE_OF_QWEN3 = frozenset(["causal", "is_causal", "qk_norm", "use_qk_norm", "use_rope"])


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise InputError for a config.json of another kind of model, or of a Qwen3 that was changed.

    Settings that nothing here knows pass where their names do not speak of arithmetic, or their values say
    that it is off."""
    kind = raw.get("model_type")
    if kind not in ("qwen3", "orthrus"):
        raise InputError(
            f"config.json: model_type is {quoted(kind)}; this project runs dense qwen3 (and orthrus) models "
            "only"
        )
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise InputError("config.json: this is a mixture of experts; dense Qwen3 models only")
    if Fields(raw, "config.json").flag("attention_bias"):
        raise InputError(
            "config.json: attention_bias is true; Qwen3 has no attention bias and it is not supported"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act is {quoted(raw['hidden_act'])}; silu was expected")
    for name, value in raw.items():
        if changes_arithmetic(str(name), value):
            raise InputError(
                f"config.json: {quoted(name)} is {quoted(value)}, which would change the arithmetic of a "
                "Qwen3 and is not supported: remove it if the model does not need it"
            )


def changes_arithmetic(name: str, value: Any) -> bool:
    """Whether a setting that nothing here reads seems to change what the model computes."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if words in TRUE_OF_QWEN3:
        return value is not None and value is not True
    if name in HARMLESS or HARMLESS_WORDS.search(words) or not ARITHMETIC.search(words):
        return False
    if value is None or value is False or (isinstance(value, (str, list, dict)) and not value):
        return False
    neutral = 1 if FACTOR.search(words) else 0
    return isinstance(value, bool) or not isinstance(value, (int, float)) or value != neutral


def refuse_sliding_window(raw: Mapping[str, Any], layers: int) -> None:
    """Raise InputError where a layer would attend to a window of the context only, as transformers counts:
    `layer_types` where it is given, else layers from `max_window_layers` on if a window is set and used."""
    fields, kinds = Fields(raw, "config.json"), raw.get("layer_types")
    used = fields.flag("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int):
        raise InputError(f"config.json: max_window_layers is {quoted(first)}; a whole number was expected")
    if kinds is None:
        sliding = layers - max(first, 0) if used else 0
    elif isinstance(kinds, list):
        sliding = sum(kind not in ("full_attention", "attention") for kind in kinds)
    else:
        raise InputError(f"config.json: layer_types is {quoted(kinds)}; a list was expected")
    if sliding > 0:
        raise InputError(
            "config.json: sliding-window attention is not supported; full attention only, "
            f"and {sliding} of {layers} layers have another kind"
        )
    if kinds is not None and len(kinds) != layers:
        raise InputError(f"config.json: layer_types lists {len(kinds)} layers of {layers}")
