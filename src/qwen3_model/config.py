"""Qwen3 and Orthrus-Qwen3 configurations, read from `config.json` and checked.

A setting that is given in two places is applied where they agree and refused where they do not."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_kernels import inverse_frequencies

from .errors import InputError, foreign, quoted
from .fields import MOST_HEADS, MOST_LAYERS, MOST_TOKENS, Fields
from .quantised.scheme import Quantisation, read_quantisation
from .reading import read_json_object
from .rope_config import YarnScaling, read_rope
from .unsupported import refuse_sliding_window, refuse_unsupported

DTYPES = ("bfloat16", "float16", "float32")
BLOCK_SIZES = range(2, 257)


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
    quantisation: Quantisation | None = None  # what the linear weights of the layers are stored as

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
            read_json_object(generation) if os.path.lexists(generation) else None,
            diffusion=any("_diff." in name for name in tensor_names),
        )

    @staticmethod
    def from_dict(
        raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, diffusion: bool = False
    ) -> Qwen3Config:
        """Check and convert a parsed config.json. Raises InputError for what is wrong or what this project
        does not do.

        generation: a parsed generation_config.json; its end tokens win where it has any, because config.json
        often lists only one of them. diffusion: the weights hold a diffusion view, whatever the architecture
        is called."""
        refuse_unsupported(raw)
        fields = Fields(raw, "config.json")
        heads, groups = _heads(fields)
        hidden, vocabulary = fields.count("hidden_size"), fields.count("vocab_size", MOST_TOKENS)
        layers = fields.count("num_hidden_layers", MOST_LAYERS)
        refuse_sliding_window(raw, layers)
        head_dim = fields.count("head_dim", MOST_HEADS, 128)  # the default of transformers' Qwen3Config
        if head_dim % 2:
            raise InputError(f"config.json: head_dim is {head_dim}; RoPE needs an even one")
        theta, yarn = read_rope(raw)
        _check_frequencies(head_dim, theta, yarn)
        block_size, mask_token_id = _diffusion(raw, vocabulary, diffusion)
        return Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            num_hidden_layers=layers,
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
            quantisation=read_quantisation(raw),
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
        if self.quantisation is not None:
            written["quantization_config"] = dict(self.quantisation.raw)
        return written


def _heads(fields: Fields) -> tuple[int, int]:
    """Query and key/value heads; a null number of the latter means as many, as in transformers."""
    heads = fields.count("num_attention_heads", MOST_HEADS)
    as_many = heads if "num_key_value_heads" in fields.raw else None
    groups = fields.count("num_key_value_heads", MOST_HEADS, as_many)
    if heads % groups:
        raise InputError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    return heads, groups


def _check_frequencies(head_dim: int, theta: float, yarn: YarnScaling | None) -> None:
    """Settings that are each possible can still give angles that are no numbers."""
    with foreign("config.json: the RoPE settings give no frequencies", "correct rope_theta and its scaling"):
        frequencies, scale = inverse_frequencies(head_dim, theta, yarn)
        if not (frequencies.isfinite().all() and 0 < scale < float("inf")):
            raise ArithmeticError("they are not finite")


def _diffusion(raw: Mapping[str, Any], vocabulary: int, in_weights: bool) -> tuple[int, int]:
    """Block size and mask token of an Orthrus, told by its name or weights; (0, -1) for a plain Qwen3."""
    architectures = raw.get("architectures")
    named = isinstance(architectures, list) and "OrthrusLM" in architectures
    if not (named or raw.get("model_type") == "orthrus" or in_weights):
        return 0, -1
    where = "config.json of an Orthrus"
    block_size = Fields(raw, where).count("block_size")
    if block_size not in BLOCK_SIZES:
        raise InputError(
            f"{where}: block_size is {block_size}; {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} was expected"
        )
    mask = raw.get("mask_token_id")
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask < vocabulary:
        raise InputError(
            f"{where}: mask_token_id is {quoted(mask)}; a token id in 0..{vocabulary - 1} was expected"
        )
    return block_size, mask


def _end_tokens(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None, vocabulary: int
) -> tuple[int, ...]:
    """End tokens of generation_config.json, or of config.json where it has none. Both are checked."""
    of_generation = _token_ids(generation or {}, "generation_config.json", vocabulary)
    of_config = _token_ids(raw, "config.json", vocabulary)
    return of_generation or of_config


def _token_ids(raw: Mapping[str, Any], where: str, vocabulary: int) -> tuple[int, ...]:
    listed = raw.get("eos_token_id")
    ends = [] if listed is None else listed if isinstance(listed, list) else [listed]
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < vocabulary:
            raise InputError(
                f"{where}: eos_token_id holds {quoted(end)}; token ids in 0..{vocabulary - 1} were expected"
            )
    return tuple(dict.fromkeys(ends))


def _dtype(raw: Mapping[str, Any]) -> str:
    """The dtype of both of its names, with or without torch's prefix."""
    read = {}
    for name in ("dtype", "torch_dtype"):
        value = raw.get(name)
        if value is None:
            continue
        read[name] = value.removeprefix("torch.") if isinstance(value, str) else value
        if read[name] not in DTYPES:
            raise InputError(f"config.json: {name} is {quoted(value)}; {', '.join(DTYPES)} was expected")
    if len(set(read.values())) > 1:
        raise InputError(
            f"config.json: dtype is {read['dtype']} and torch_dtype is {read['torch_dtype']}: "
            "keep the one that is right"
        )
    return next(iter(read.values()), "bfloat16")
