"""Qwen3 and Orthrus-Qwen3 configurations, read from `config.json` in both spellings of RoPE settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, quoted
from .reading import read_json_object

DTYPES = ("bfloat16", "float16", "float32")
BLOCK_SIZES = range(2, 257)
# Far above any model, and low enough that no product of them overflows and a wrong file is refused quickly
MOST_LAYERS, MOST_HEADS, MOST_SIZE, MOST_TOKENS = 2**12, 2**16, 2**24, 2**30


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071): frequencies slowed by wavelength, attention rescaled."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    truncate: bool = True


@dataclass(frozen=True)
class Qwen3Config:
    """Everything the model's shape and arithmetic depend on. Dense Qwen3 only."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    yarn: YarnScaling | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    block_size: int = 0  # rows of a diffusion block (K); 0: a plain Qwen3 without a diffusion view
    mask_token_id: int = -1  # -1: none

    @property
    def has_diffusion_view(self) -> bool:
        """Whether the checkpoint carries the second set of attention weights."""
        return self.block_size > 0

    @property
    def context_length(self) -> int:
        """Positions the model may use: YaRN extends what the checkpoint was trained on by its factor."""
        if self.yarn is None:
            return self.max_position_embeddings
        extended = min(self.yarn.factor * self.yarn.original_max_position_embeddings, MOST_TOKENS)
        return max(self.max_position_embeddings, int(extended))

    @staticmethod
    def from_folder(folder: Path, tensor_names: Collection[str] = ()) -> Qwen3Config:
        """Read config.json and, for the end tokens, generation_config.json. Raises InputError.

        tensor_names: those of the folder's weights. Names of a diffusion view make it an Orthrus even if
        config.json calls it a plain Qwen3."""
        generation = folder / "generation_config.json"
        return Qwen3Config.from_dict(
            read_json_object(folder / "config.json"),
            read_json_object(generation) if generation.exists() else None,
            diffusion=any("_diff." in name for name in tensor_names),
        )

    @staticmethod
    def from_dict(
        raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, diffusion: bool = False
    ) -> Qwen3Config:
        """Check and convert a parsed config.json. Raises InputError for what is wrong or what this project
        does not do.

        generation: a parsed generation_config.json; its end tokens win, because config.json often lists only
        one of them. diffusion: the weights hold a diffusion view, whatever the architecture is called."""
        _refuse_what_is_not_dense_qwen3(raw)
        fields = _Fields(raw, "config.json")
        heads, groups = (
            fields.count(name, MOST_HEADS) for name in ("num_attention_heads", "num_key_value_heads")
        )
        hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size", MOST_TOKENS)
        if heads % groups:
            raise InputError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            )
        head_dim = fields.count("head_dim", MOST_HEADS, 128)  # the default of transformers' Qwen3Config
        if head_dim % 2:
            raise InputError(f"config.json: head_dim is {head_dim}; RoPE needs an even one")
        theta, yarn = _rope(raw)
        block_size, mask_token_id = _diffusion(raw, vocabulary, diffusion)
        return Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            num_hidden_layers=fields.count("num_hidden_layers", MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            max_position_embeddings=fields.count("max_position_embeddings", MOST_TOKENS),
            rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
            rope_theta=theta,
            yarn=yarn,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            eos_token_ids=_end_tokens(raw, generation, vocabulary),
            dtype=_dtype(raw),
            block_size=block_size,
            mask_token_id=mask_token_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, in the spelling of the published Orthrus checkpoints."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.yarn:
            rope |= {
                "rope_type": "yarn",
                "factor": self.yarn.factor,
                "original_max_position_embeddings": self.yarn.original_max_position_embeddings,
                "beta_fast": self.yarn.beta_fast,
                "beta_slow": self.yarn.beta_slow,
                "attention_factor": self.yarn.attention_factor,
                "truncate": self.yarn.truncate,
            }
        ends = list(self.eos_token_ids)
        written = {
            "architectures": ["OrthrusLM" if self.has_diffusion_view else "Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": self.dtype,
            "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }
        if self.has_diffusion_view:
            written |= {"block_size": self.block_size, "mask_token_id": self.mask_token_id}
        return written


@dataclass(frozen=True)
class _Fields:
    """Typed reading of a JSON object's fields."""

    raw: Mapping[str, Any]
    where: str

    def count(self, name: str, most: int = MOST_SIZE, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise InputError(
                f"{self.where}: {name} is {quoted(value)}; a whole number in 1..{most} was expected"
            )
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1e30 or not math.isfinite(value):
            raise InputError(f"{self.where}: {name} is {quoted(value)}; a finite number above 0 was expected")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {name} is {quoted(value)}; true or false was expected")
        return value


def _refuse_what_is_not_dense_qwen3(raw: Mapping[str, Any]) -> None:
    fields = _Fields(raw, "config.json")
    kind = raw.get("model_type")
    if kind not in ("qwen3", "orthrus"):
        raise InputError(
            f"config.json: model_type is {kind!r}; this project runs dense qwen3 (and orthrus) models only"
        )
    if raw.get("num_experts") or raw.get("num_local_experts"):
        raise InputError("config.json: this is a mixture of experts; dense Qwen3 models only")
    if raw.get("quantization_config") is not None:
        raise InputError("config.json: this checkpoint is quantised; use the bf16, fp16 or fp32 one")
    if fields.flag("attention_bias"):
        raise InputError(
            "config.json: attention_bias is true; Qwen3 has no attention bias and it is not supported"
        )
    layer_types = raw.get("layer_types")
    sliding = isinstance(layer_types, list) and any(kind != "full_attention" for kind in layer_types)
    if fields.flag("use_sliding_window") or sliding:
        raise InputError("config.json: sliding-window attention is not supported; full attention only")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act is {raw.get('hidden_act')!r}; silu was expected")


def _rope(raw: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """RoPE base and scaling from `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    settings = raw.get("rope_parameters")
    settings = raw.get("rope_scaling") if settings is None else settings
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InputError(f"config.json: RoPE settings are {settings!r}; an object was expected")
    theta = _Fields(
        {"rope_theta": settings.get("rope_theta", raw.get("rope_theta"))}, "config.json"
    ).positive("rope_theta")
    if settings.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind in ("default", None):
        return theta, None
    if kind != "yarn":
        raise InputError(f"config.json: RoPE type {kind!r} is not supported; default or yarn")
    if settings.get("mscale") is not None or settings.get("mscale_all_dim") is not None:
        raise InputError("config.json: YaRN with mscale is not supported; use attention_factor")
    fields = _Fields(settings, "config.json: YaRN")
    original = settings.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    attention = settings.get("attention_factor")
    if not theta > 1:
        raise InputError(f"config.json: YaRN needs a rope_theta above 1, it is {theta}")
    return theta, YarnScaling(
        factor=fields.positive("factor"),
        original_max_position_embeddings=_Fields(
            {"original_max_position_embeddings": original}, "config.json: YaRN"
        ).count("original_max_position_embeddings", MOST_TOKENS),
        beta_fast=fields.positive("beta_fast", 32.0),
        beta_slow=fields.positive("beta_slow", 1.0),
        attention_factor=None if attention is None else fields.positive("attention_factor"),
        truncate=fields.flag("truncate", True),
    )


def _diffusion(raw: Mapping[str, Any], vocabulary: int, in_weights: bool) -> tuple[int, int]:
    """Block size and mask token of an Orthrus, told by its name or weights; (0, -1) for a plain Qwen3."""
    architectures = raw.get("architectures")
    named = isinstance(architectures, list) and "OrthrusLM" in architectures
    if not (named or raw.get("model_type") == "orthrus" or in_weights):
        return 0, -1
    where = "config.json of an Orthrus"
    block_size = _Fields(raw, where).count("block_size")
    if block_size not in BLOCK_SIZES:
        raise InputError(
            f"{where}: block_size is {block_size}; {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} was expected"
        )
    mask = raw.get("mask_token_id")
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < vocabulary:
        raise InputError(
            f"{where}: mask_token_id is {mask!r}; a token id in 0..{vocabulary - 1} was expected"
        )
    return block_size, mask


def _end_tokens(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None, vocabulary: int
) -> tuple[int, ...]:
    listed = (generation or {}).get("eos_token_id")
    listed = raw.get("eos_token_id") if listed is None else listed
    ends = [] if listed is None else listed if isinstance(listed, list) else [listed]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < vocabulary:
            raise InputError(f"eos_token_id holds {end!r}; token ids in 0..{vocabulary - 1} were expected")
    return tuple(dict.fromkeys(ends))


def _dtype(raw: Mapping[str, Any]) -> str:
    name = raw.get("dtype", raw.get("torch_dtype"))
    name = "bfloat16" if name is None else name
    if name not in DTYPES:
        raise InputError(f"config.json: dtype is {name!r}; {', '.join(DTYPES)} was expected")
    return name
