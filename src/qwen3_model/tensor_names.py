"""Whether a checkpoint's tensors are the ones that its config asks for, and what they are if not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import InputError, one_line
from .weight_files import HEAD, Header, listed

EMBEDDING, PREFIX = "model.embed_tokens.weight", "model."
# Scales of a cache of 8 bits, which is not kept
CACHE_SCALES = re.compile(r".*\.self_attn\.([qkv]|[kv]_proj\.output)_scale|.*\.[kv]_cache_scale")
# What else trainers and converters store, and what is to be done about it
STRANGERS = (
    (
        r"lora_|\.base_layer\.|modules_to_save|ia3_|dora_|prompt_encoder",
        "an adapter that is not merged: merge it into its base model and save the whole",
    ),
    (
        r"qweight|qzeros|g_idx|scales?$|scale_inv$|absmax|quant_map|quant_state|weight_packed|weight_scale",
        "a quantised checkpoint where a plain weight is needed: use the bf16, fp16 or fp32 one",
    ),
    (r"^v_head\.|value_head", "a value head of reinforcement learning: save the model without it"),
    (r"^(score|classifier|classification_head)\.", "a classifier's head: a model of text was expected"),
    (r"exp_avg|optimizer|momentum|master_param", "a training's optimizer state: save the weights alone"),
    (r"\.bias$", "biases, which Qwen3 does not have: another kind of model"),
    (r"\.experts\.", "a mixture of experts: dense Qwen3 models only"),
    (r"^(vision|visual|model\.visual|audio)", "a model of images or sound: a model of text was expected"),
)  # fmt: skip


def check_names(folder: Path, headers: Mapping[str, Header], wanted: Collection[str]) -> None:
    """Raise InputError unless the folder's tensors are exactly those wanted, a tied head's copy besides."""
    tied = HEAD not in wanted and EMBEDDING in wanted
    missing = set(wanted) - headers.keys()
    unexpected = headers.keys() - set(wanted) - ({HEAD} if tied else set()) - set(cache_scales(headers))
    if missing and (prefix := other_prefix(headers, wanted)) is not None:
        count = sum(name.startswith(PREFIX) for name in wanted)
        raise InputError(
            f"{folder}: all {count} tensors of the model are there "
            + (f"with the prefix `{one_line(prefix, 60)}` in place of" if prefix else "without")
            + f" `{PREFIX}`: rename them, or save the model again as a Qwen3ForCausalLM"
        )
    for pattern, kind in STRANGERS:
        if strangers := {name for name in unexpected if re.search(pattern, name)}:
            raise InputError(f"{folder} holds {listed(strangers)}, the tensors of {kind}")
    if missing == {HEAD}:
        raise InputError(
            f"{folder} lacks 1 tensors that its config.json asks for: {HEAD}; if the head is the embedding, "
            "set tie_word_embeddings to true in config.json"
        )
    if missing == {EMBEDDING} and HEAD in headers:
        raise InputError(
            f"{folder} lacks 1 tensors that its config.json asks for: {EMBEDDING}; if {HEAD} is it, store it "
            "under that name"
        )
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for: {listed(missing)}; "
            "check that weights and config belong together"
        )
    if unexpected:
        raise InputError(
            f"{folder} holds {len(unexpected)} tensors that its config.json has no place for: "
            f"{listed(unexpected)}; check that weights and config belong together"
        )


def cache_scales(names: Collection[str]) -> list[str]:
    """The tensors among these that are scales of a cache of 8 bits, which is not kept."""
    return [name for name in names if CACHE_SCALES.fullmatch(name)]


def other_prefix(names: Collection[str], wanted: Collection[str]) -> str | None:
    """What stands in place of `model.` in the names of all tensors wanted; None where nothing does."""
    inner = [name.removeprefix(PREFIX) for name in wanted if name.startswith(PREFIX)]
    known, core = set(names), EMBEDDING.removeprefix(PREFIX)
    if not inner:
        return None
    prefixes = sorted({name.removesuffix(core) for name in known if name.endswith(core)} - {PREFIX})
    return next((prefix for prefix in prefixes if all(prefix + name in known for name in inner)), None)
