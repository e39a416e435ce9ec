"""The two forms that `orthrus quantize` writes: the tensors that stand for a matrix, and what config.json
says of them. vLLM and transformers read both.

- fp8: the form of Qwen's own FP8 checkpoints. Blocks of 128 x 128, `weight` and `weight_scale_inv`.
- int4: compressed-tensors, pack-quantized, asymmetric. `weight_packed` holds 8 codes a word along K, the
  first in the lowest bits; `weight_zero_point` holds the zero points of 8 rows a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_kernels.quantised import GROUPS

from ..errors import InputError
from ..quantised.scheme import BLOCKS
from .rounding import fp8_blocks, fp8_values, int4_groups, int4_values

CODES_A_WORD = 8
DIFFUSION_KEY = "diffusion_weights"  # of config.json: how `_diff` is stored, if not as the base


@dataclass(frozen=True)
class Stored:
    """A matrix as it is stored: its tensors by the ends of their names, and the numbers that they stand for
    in fp32."""

    tensors: dict[str, Tensor]
    values: Tensor


@dataclass(frozen=True)
class Fp8:
    """Qwen's form of fp8. Any matrix has it."""

    name = "fp8"

    def check(self, columns: Mapping[str, int]) -> None:
        """Nothing to check: every matrix has this form."""

    def stored(self, weight: Tensor) -> Stored:
        """The tensors of a matrix [N, K] of finite numbers."""
        codes, scale = fp8_blocks(weight)
        return Stored({"weight": codes, "weight_scale_inv": scale}, fp8_values(codes, scale))

    def config(self, plain: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. plain: modules beside the head that are not quantised."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": BLOCKS,
            "modules_to_not_convert": ["lm_head", *plain],
        }


@dataclass(frozen=True)
class Int4:
    """compressed-tensors' form of 4 bits with zero points. `group` columns of a row share a scale."""

    group: int
    name = "int4"

    def check(self, columns: Mapping[str, int]) -> None:
        """columns: of each matrix, multiples of 32. Raises InputError where the group divides some not."""
        wrong = next((name for name, count in columns.items() if count % self.group), None)
        if wrong is None:
            return
        fitting = [str(group) for group in GROUPS if not any(count % group for count in columns.values())]
        raise InputError(
            f"--group {self.group} does not divide the {columns[wrong]} columns of {wrong}; --group "
            f"{' or '.join(fitting)} does"
        )

    def stored(self, weight: Tensor) -> Stored:
        """The tensors of a matrix [N, K] of finite numbers, K a multiple of the group."""
        codes, scale, zero = int4_groups(weight, self.group)
        tensors = {
            "weight_packed": words(codes),
            "weight_scale": scale,
            "weight_zero_point": words(zero.t()).t().contiguous(),
            "weight_shape": torch.tensor(weight.shape),
        }
        return Stored(tensors, int4_values(codes, scale, zero))

    def config(self, plain: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. plain: modules beside the head that are not quantised."""
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": self.group,
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        scheme = {
            "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head", *plain],
            "kv_cache_scheme": None,
        }


Form = Fp8 | Int4


def words(codes: Tensor) -> Tensor:
    """Codes uint8 [A, B] as int32 [A, ceil(B / 8)], the first of a word in its lowest bits."""
    padded = F.pad(codes, (0, -codes.shape[1] % CODES_A_WORD))
    fields = padded.reshape(len(codes), -1, CODES_A_WORD).long()
    shifts = torch.arange(0, 32, 4, device=codes.device)
    unsigned = (fields << shifts).sum(-1)
    return torch.where(unsigned < 1 << 31, unsigned, unsigned - (1 << 32)).int()
