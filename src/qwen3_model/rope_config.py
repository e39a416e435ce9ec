"""RoPE settings of a config.json, in whichever of the official spellings, or in several of them.

transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`, flat or by
layer type. A file can hold more than one of them. Each is read by itself, and they must say the same: which
of two would win differs from program to program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError, quoted
from .fields import MOST_TOKENS, Fields

SPELLINGS = ("rope_parameters", "rope_scaling")
LAYER_TYPES = ("full_attention", "sliding_attention")
TYPE_NAMES = ("rope_type", "type")
COMMON = (*TYPE_NAMES, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
YARN_ONLY = ("factor", "beta_fast", "beta_slow", "attention_factor", "attn_factor", "truncate", "finetuned")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071): frequencies slowed by wavelength, attention rescaled."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    truncate: bool = True


Rope = tuple[float, YarnScaling | None]  # base and scaling


def read_rope(raw: Mapping[str, Any]) -> Rope:
    """RoPE base and scaling of a parsed config.json. Raises InputError for what this project does not do, for
    settings that nothing here reads, and where two places disagree."""
    read = [(place, _read(settings, place, raw)) for place, settings in _places(raw)]
    if not read:
        return _read({}, "the top level", raw)
    first, rope = read[0]
    for other, found in read[1:]:
        if found != rope:
            raise InputError(
                f"config.json: {first} and {other} disagree about RoPE: keep the one that is right, "
                "with its rope_theta, and remove the other"
            )
    return rope


def _places(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object that says something about RoPE, with its name."""
    for name in SPELLINGS:
        settings = raw.get(name)
        if settings is None or settings == {}:
            continue
        if not isinstance(settings, dict):
            raise InputError(f"config.json: RoPE settings are {quoted(settings)}; an object was expected")
        nested = [kind for kind in LAYER_TYPES if kind in settings]
        if not nested:
            yield name, settings
            continue
        if beside := settings.keys() - set(LAYER_TYPES):
            raise InputError(
                f"config.json: {name} holds {quoted(min(beside, key=str))} beside settings by layer type: "
                "put all of them under full_attention"
            )
        for kind in nested:
            if settings[kind] is None:
                raise InputError(f"config.json: {name} of {kind} is null; every layer has RoPE")
            if not isinstance(settings[kind], dict):
                raise InputError(
                    f"config.json: RoPE settings of {kind} are {quoted(settings[kind])}; "
                    "an object was expected"
                )
            yield f"{name} of {kind}", settings[kind]


def _read(settings: Mapping[str, Any], place: str, raw: Mapping[str, Any]) -> Rope:
    """One object's settings, completed by those at the top level of the config."""
    theta = _said("rope_theta", settings, place, raw)
    if theta is None:
        raise InputError(
            f"config.json: rope_theta is missing in {place}: give all RoPE settings in rope_parameters"
        )
    base = Fields({"rope_theta": theta}, "config.json").positive("rope_theta")
    if _said("partial_rotary_factor", settings, place, raw) not in (None, 1):
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = _kind(settings, place)
    known = COMMON if kind == "default" else COMMON + YARN_ONLY
    _refuse_unread(settings, known, f"config.json: {place} of type {kind}")
    if kind == "default":
        return base, None
    if not base > 1:
        raise InputError(f"config.json: YaRN needs a rope_theta above 1, it is {base}")
    fields = Fields(settings, "config.json: YaRN")
    original = _said("original_max_position_embeddings", settings, place, raw)
    completed = Fields({"original_max_position_embeddings": original}, "config.json: YaRN")
    if "truncate" in settings and settings["truncate"] is None:  # transformers reads null as false
        raise InputError("config.json: YaRN: truncate is None; true or false was expected")
    return base, YarnScaling(
        factor=fields.positive("factor"),
        original_max_position_embeddings=completed.count(
            "original_max_position_embeddings", MOST_TOKENS, raw.get("max_position_embeddings")
        ),
        beta_fast=fields.positive("beta_fast", 32.0),
        beta_slow=fields.positive("beta_slow", 1.0),
        attention_factor=_attention_factor(fields),
        truncate=fields.flag("truncate", True),
    )


def _attention_factor(fields: Fields) -> float | None:
    """What YaRN scales attention by; None: its own. DeepSeek-R1-0528-Qwen3 has `attn_factor`: its own is
    multiplied by it, as in vLLM; transformers does not read it."""
    whole, part = fields.raw.get("attention_factor"), fields.raw.get("attn_factor")
    if part is None:
        return None if whole is None else fields.positive("attention_factor")
    if whole is not None:
        raise InputError("config.json: YaRN has attention_factor and attn_factor: keep attention_factor")
    return fields.positive("attn_factor") * (0.1 * math.log(max(fields.positive("factor"), 1.0)) + 1.0)


def _said(name: str, settings: Mapping[str, Any], place: str, raw: Mapping[str, Any]) -> Any:
    """A number that can stand in the object, at the top level, or in both if they agree."""
    said = [value for value in (settings.get(name), raw.get(name)) if value is not None]
    for value in said:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"config.json: {name} is {quoted(value)}; a finite number above 0 was expected")
    if len(said) == 2 and said[0] != said[1]:
        raise InputError(
            f"config.json: {name} is {quoted(raw[name])} at the top level and {quoted(settings[name])} in "
            f"{place}: keep the one that is right"
        )
    return said[0] if said else None


def _kind(settings: Mapping[str, Any], place: str) -> str:
    kinds = [settings[name] for name in TYPE_NAMES if settings.get(name) is not None] or ["default"]
    for kind in kinds:
        if kind not in ("default", "yarn"):
            raise InputError(f"config.json: RoPE type {quoted(kind)} is not supported; default or yarn")
    if kinds[0] != kinds[-1]:
        raise InputError(f"config.json: {place} has rope_type {kinds[0]} and type {kinds[-1]}: keep one")
    return kinds[0]


def _refuse_unread(settings: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Settings that nothing reads: misspelt, or of another type of RoPE. null says nothing."""
    for name, value in settings.items():
        if name in ("mscale", "mscale_all_dim") and value is not None and "factor" in known:
            raise InputError("config.json: YaRN with mscale is not supported; use attention_factor")
        if name not in known and value is not None:
            raise InputError(
                f"{where} does not take {quoted(name)}: correct its spelling or the rope_type, or remove it"
            )
