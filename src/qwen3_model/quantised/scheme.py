"""`quantization_config` of a config.json: what it says of the weights, and what of it is refused.

Which modules are quantised is asked of the files' headers (stored.py); this says what their tensors mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from orthrus_kernels.quantised import GROUPS

from ..errors import InputError, quoted
from ..fields import Fields
from .forms import BLOCK

WHERE = "quantization_config"
BLOCKS = [BLOCK, BLOCK]  # rows and columns that share a scale of an fp8 weight
OTHERS = (
    "use a checkpoint in bf16, fp8, AWQ, GPTQ (int4) or compressed-tensors, such as Qwen/Qwen3-8B-FP8 or "
    "Qwen/Qwen3-8B-AWQ"
)
# Methods and formats of others, by a word of their names
STRANGERS = {
    "gguf": "GGUF has an arithmetic of its own",
    "bitsandbytes": "bitsandbytes rounds weights to tables of its own",
    "bnb": "bitsandbytes rounds weights to tables of its own",
    "fp4": "weights of 4-bit floats (NVFP4, MXFP4) are not read",
}


@dataclass(frozen=True)
class Quantisation:
    """What a config says of its quantised weights."""

    form: str  # of forms.py: "fp8", "awq", "gptq", "float-quantized" or "pack-quantized"
    group: int | None  # columns that share a scale in a form of 4 bits; None: 8 bits
    symmetric: bool  # codes have no zero points, or all the same
    scale_rows: int = 1  # rows that share a scale, or more: BLOCK or 1
    zeros_less_one: bool = False  # GPTQ files hold zero points minus one, those of version 2 do not
    not_converted: tuple[str, ...] = ()  # names of modules, or whole parts of them; "re:" is not looked at
    cache_scheme: bool = False  # the checkpoint has scales for a cache of 8 bits, which is not kept
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as it was given

    def leaves_out(self, module: str) -> bool:
        """Whether the config lists a module, by its full name, among those that are not converted."""
        return any(f".{name.strip('.')}." in f".{module}." for name in self.not_converted)


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """The scheme of a parsed config.json; None where it has none. Raises InputError for one that this project
    does not compute, naming what to use instead."""
    raw = config.get(WHERE)
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise InputError(f"config.json: {WHERE} is {quoted(raw)}; an object was expected")
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        _refuse("quant_method", method, "fp8, awq, gptq or compressed-tensors was expected")
    return _READERS[method](raw, Fields(raw, f"config.json: {WHERE}"))


def _fp8(raw: Mapping[str, Any], fields: Fields) -> Quantisation:
    _expect(raw, "activation_scheme", "dynamic")
    _expect(raw, "fmt", "e4m3")
    if raw.get("scale_fmt") is not None:
        _refuse("scale_fmt", raw["scale_fmt"], "scales in bf16 or fp32 were expected")
    if raw.get("weight_block_size") != BLOCKS:
        _refuse("weight_block_size", raw.get("weight_block_size"), f"{BLOCKS} was expected")
    left_out = _listed(raw, "modules_to_not_convert") or _listed(raw, "ignored_layers")
    return Quantisation("fp8", None, True, BLOCK, not_converted=left_out, raw=raw)


def _awq(raw: Mapping[str, Any], fields: Fields) -> Quantisation:
    _expect(raw, "version", "gemm")
    if not fields.flag("zero_point", True):
        _refuse("zero_point", False, "true was expected")
    group, left_out = _group_of_four_bits(raw, "bits"), _listed(raw, "modules_to_not_convert")
    return Quantisation("awq", group, False, not_converted=left_out, raw=raw)


def _gptq(raw: Mapping[str, Any], fields: Fields) -> Quantisation:
    told = [raw[name] for name in ("checkpoint_format", "format") if raw.get(name) is not None] or ["gptq"]
    if told[0] not in ("gptq", "gptq_v2") or told[-1] != told[0] or raw.get("is_marlin_format"):
        _refuse("checkpoint_format", told, "gptq or gptq_v2 was expected")
    _expect(raw, "pack_dtype", "int32")
    if raw.get("dynamic"):
        _refuse("dynamic", raw["dynamic"], "one scheme for all modules was expected")
    if fields.flag("lm_head"):
        _refuse("lm_head", True, "a head in 16 bits was expected")
    group = _group_of_four_bits(raw, "bits")
    less_one = told[0] == "gptq"
    return Quantisation("gptq", group, fields.flag("sym", True), zeros_less_one=less_one, raw=raw)


def _compressed(raw: Mapping[str, Any], fields: Fields) -> Quantisation:
    form = raw.get("format")
    if form not in ("float-quantized", "pack-quantized"):
        _refuse("format", form, "float-quantized or pack-quantized was expected")
    if _object(raw, "sparsity_config").get("format") not in (None, "dense") or raw.get("transform_config"):
        name = "transform_config" if raw.get("transform_config") else "sparsity_config"
        _refuse(name, raw[name], "plain weights, neither sparse nor rotated, were expected")
    groups = _object(raw, "config_groups")
    found = [_compressed_group(form, _object(groups, name)) for name in groups]
    if not found or any(one != found[0] for one in found):
        _refuse("config_groups", list(groups), "one scheme for all of them was expected")
    group, symmetric = found[0]
    strategies = {_object(_object(groups, name), "weights").get("strategy") for name in groups}
    rows = BLOCK if strategies <= {"tensor", "block"} else 1
    left_out, scheme = _listed(raw, "ignore"), raw.get("kv_cache_scheme") is not None
    return Quantisation(form, group, symmetric, rows, not_converted=left_out, cache_scheme=scheme, raw=raw)


def _compressed_group(form: str, group: Mapping[str, Any]) -> tuple[int | None, bool]:
    """Columns that share a scale (None: 8 bits) and whether there are no zero points, of a config group."""
    if group.get("format") not in (None, form):
        _refuse("format of a config group", group["format"], f"{form} was expected")
    for name in ("input_activations", "output_activations"):
        if (activations := _object(group, name)) and activations.get("dynamic") is not True:
            _refuse(name, activations, "none or dynamic ones were expected, since scales are never static")
    weights = _object(group, "weights")
    fields = Fields(weights, f"config.json: weights of {WHERE}")
    symmetric, strategy = fields.flag("symmetric", True), weights.get("strategy")
    if form == "pack-quantized":
        _expect(weights, "type", "int")
        if strategy != "group":
            _refuse("strategy", strategy, "group was expected")
        return _group_of_four_bits(weights, "num_bits"), symmetric
    _expect(weights, "type", "float")
    _expect(weights, "num_bits", 8)
    if strategy not in ("tensor", "channel", "block") or not symmetric:
        _refuse("strategy", strategy, "tensor, channel or block was expected, symmetric")
    if strategy == "block" and weights.get("block_structure") != BLOCKS:
        _refuse("block_structure", weights.get("block_structure"), f"{BLOCKS} was expected")
    return None, True


def _group_of_four_bits(raw: Mapping[str, Any], bits: str) -> int:
    """group_size, of codes of 4 bits."""
    if raw.get(bits) != 4:
        _refuse(bits, raw.get(bits), "4 was expected")
    group = raw.get("group_size")
    if isinstance(group, bool) or group not in GROUPS:
        _refuse("group_size", group, f"{', '.join(map(str, GROUPS))} was expected")
    return int(group)


def _expect(raw: Mapping[str, Any], name: str, value: object) -> None:
    """Refuse another value of a field that may be missing."""
    given = raw.get(name)
    given = given.lower() if isinstance(given, str) else given
    if given is not None and given != value:
        _refuse(name, raw[name], f"{value} was expected")


def _object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that is an object; an empty one where it is missing."""
    value = {} if raw.get(name) is None else raw[name]
    if not isinstance(value, Mapping):
        _refuse(name, value, "an object was expected")
    return value


def _listed(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of names of modules, or none."""
    names = raw.get(name)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        _refuse(name, names, "a list of names was expected")
    return tuple(names)


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    words = str(value).lower()
    why = next((f"; {why}" for word, why in STRANGERS.items() if word in words), "")
    raise InputError(f"config.json: {WHERE}: {name} is {quoted(value)}{why}; {expected}: {OTHERS}")


_READERS = {"fp8": _fp8, "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}
