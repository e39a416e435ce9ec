"""Quantised checkpoints written literally: every word bit by bit, in loops, without a line of the loader.

A `Matrix` holds numbers of Python: codes, scales and zero points of every group. `write` makes the tensors
of a form of it, and a folder of a whole model takes a Matrix for each of its projections."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from small import small_model

from qwen3_model import Qwen3

GROUP = 32  # of the small models' codes of 4 bits
FINITE = [code for code in range(256) if code & 127 != 127]
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that nibble 0, 1, .. of a word holds


@dataclass
class Matrix:
    """A weight [n, k]: codes [n][k], a scale and a zero point for row n and group g."""

    codes: list[list[int]]
    scale: Callable[[int, int], float]  # of row and column
    zero: list[list[int]]  # [n][group]; all 8 where it is symmetric

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), len(self.codes[0])

    def value(self, n: int, c: int, form: str) -> float:
        code = self.codes[n][c]
        number = e4m3(code) if form in EIGHT_BITS else code - self.zero[n][c // GROUP]
        return number * self.scale(n, c)

    def dense(self, form: str) -> torch.Tensor:
        rows, columns = self.shape
        return torch.tensor([[self.value(n, c, form) for c in range(columns)] for n in range(rows)])


def e4m3(code: int) -> float:
    """The number of a byte: a sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinities."""
    sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def random_matrix(n: int, k: int, form: str, rng: random.Random) -> Matrix:
    """Codes and zero points of every kind, scales of the form's pattern."""
    if form in EIGHT_BITS:
        codes = [rng.choices(FINITE, k=k) for _ in range(n)]
        height, width = {"channel": (1, k), "tensor": (n, k)}.get(form, (128, 128))
        scales = [[_scale(rng, -13, -10) for _ in range(0, k, width)] for _ in range(0, n, height)]
        return Matrix(codes, lambda r, c: scales[r // height][c // width], [])
    codes = [[rng.randrange(16) for _ in range(k)] for _ in range(n)]
    small = [[_scale(rng, -8, -5) for _ in range(k // GROUP)] for _ in range(n)]
    least = 8 if form in SYMMETRIC else 1 if form == "gptq" else 0  # a stored 15 is a 16 in the older files
    most = 8 if form in SYMMETRIC else least + 15
    zero = [[rng.randint(least, most) for _ in range(k // GROUP)] for _ in range(n)]
    return Matrix(codes, lambda n, c: small[n][c // GROUP], zero)


def _scale(rng: random.Random, low: int, high: int) -> float:
    """One that bf16, fp16 and fp32 hold."""
    return 2.0 ** rng.randint(low, high) * rng.choice([1, 1.25, 1.5])


def of_row(numbers: list, row: int, column: int) -> int:
    """numbers[row][column], 0 past the last row: a word along N is always whole."""
    return numbers[row][column] if row < len(numbers) else 0


def word(nibbles: list[int]) -> int:
    """A signed int32 of eight nibbles, the first one lowest."""
    bits = [nibble >> b & 1 for nibble in nibbles for b in range(4)]
    return struct.unpack("<i", struct.pack("<I", sum(bit << i for i, bit in enumerate(bits))))[0]


def words(rows: int, columns: int, nibble: Callable[[int, int, int], int]) -> torch.Tensor:
    """int32 [rows, columns]; nibble(row, column, i) is the nibble i of that word."""
    return torch.tensor(
        [[word([nibble(r, c, i) for i in range(8)]) for c in range(columns)] for r in range(rows)],
        dtype=torch.int32,
    )


def numbers(rows: int, columns: int, dtype: torch.dtype, of: Callable[[int, int], float]) -> torch.Tensor:
    return torch.tensor([[of(r, c) for c in range(columns)] for r in range(rows)], dtype=dtype)


def bytes_of(m: Matrix) -> torch.Tensor:
    return torch.tensor(m.codes, dtype=torch.uint8).view(torch.float8_e4m3fn)


def fp8(m: Matrix) -> dict[str, torch.Tensor]:
    """Qwen's: [ceil(n / 128), ceil(k / 128)] scales."""
    n, k = m.shape
    scale = numbers(
        (n + 127) // 128, (k + 127) // 128, torch.bfloat16, lambda a, b: m.scale(128 * a, 128 * b)
    )
    return {"weight": bytes_of(m), "weight_scale_inv": scale}


def awq(m: Matrix) -> dict[str, torch.Tensor]:
    n, k = m.shape
    return {
        "qweight": words(k, (n + 7) // 8, lambda r, c, i: of_row(m.codes, 8 * c + AWQ_COLUMNS[i], r)),
        "qzeros": words(k // GROUP, (n + 7) // 8, lambda g, c, i: of_row(m.zero, 8 * c + AWQ_COLUMNS[i], g)),
        "scales": numbers(k // GROUP, n, torch.float16, lambda g, c: m.scale(c, g * GROUP)),
    }


def gptq(m: Matrix, less: int = 1) -> dict[str, torch.Tensor]:
    n, k = m.shape
    return {
        "qweight": words(k // 8, n, lambda r, c, i: m.codes[c][8 * r + i]),
        "qzeros": words(
            k // GROUP, (n + 7) // 8, lambda g, c, i: max(of_row(m.zero, 8 * c + i, g) - less, 0)
        ),
        "scales": numbers(k // GROUP, n, torch.float16, lambda g, c: m.scale(c, g * GROUP)),
        "g_idx": torch.tensor([c // GROUP for c in range(k)], dtype=torch.int32),
    }


def pack_quantized(m: Matrix, zeros: bool = True) -> dict[str, torch.Tensor]:
    n, k = m.shape
    made = {
        "weight_packed": words(n, k // 8, lambda r, c, i: m.codes[r][8 * c + i]),
        "weight_scale": numbers(n, k // GROUP, torch.bfloat16, lambda r, g: m.scale(r, g * GROUP)),
        "weight_shape": torch.tensor([n, k]),
    }
    if zeros:
        made["weight_zero_point"] = words(
            (n + 7) // 8, k // GROUP, lambda r, g, i: of_row(m.zero, 8 * r + i, g)
        )
    return made


def float_quantized(m: Matrix, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """compressed-tensors: rows, columns: how many share a scale."""
    n, k = m.shape
    scale = numbers(
        (n + rows - 1) // rows, (k + columns - 1) // columns, torch.float32,
        lambda a, b: m.scale(rows * a, columns * b),
    )  # fmt: skip
    return {"weight": bytes_of(m), "weight_scale": scale}


def _compressed(form: str, **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True} | weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


_FLOAT = {"num_bits": 8, "type": "float"}
_INT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "lm_head": False,
         "checkpoint_format": "gptq", "pack_dtype": "int32", "sym": False}  # fmt: skip
# name -> the tensors of a matrix, and the quantization_config of the folder
FORMS: dict[str, tuple[Callable[[Matrix], dict[str, torch.Tensor]], dict[str, object]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                  "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
                  "version": "gemm", "modules_to_not_convert": None}),
    "gptq": (gptq, _GPTQ),
    "gptq symmetric": (gptq, _GPTQ | {"sym": True}),
    "gptq v2": (lambda m: gptq(m, 0), _GPTQ | {"checkpoint_format": "gptq_v2"}),
    "channel": (lambda m: float_quantized(m, 1, m.shape[1]),
                _compressed("float-quantized", **_FLOAT, strategy="channel")),
    "tensor": (lambda m: {"weight": bytes_of(m), "weight_scale": torch.tensor([m.scale(0, 0)])},
               _compressed("float-quantized", **_FLOAT, strategy="tensor")),
    "block": (lambda m: float_quantized(m, 128, 128),
              _compressed("float-quantized", **_FLOAT, strategy="block", block_structure=[128, 128])),
    "pack": (pack_quantized, _compressed("pack-quantized", **_INT | {"symmetric": False})),
    "pack symmetric": (lambda m: pack_quantized(m, False), _compressed("pack-quantized", **_INT)),
}  # fmt: skip
EIGHT_BITS = ("fp8", "channel", "tensor", "block")
SYMMETRIC = ("gptq symmetric", "pack symmetric")


@dataclass
class Written:
    """A folder, what its projections hold by the names of their modules, and the same model with plain fp32
    weights of the same numbers."""

    folder: Path
    matrices: dict[str, tuple[str, Matrix]]  # module -> form and numbers
    tensors: dict[str, torch.Tensor]
    config: dict[str, object]
    plain: Qwen3

    def save(self) -> Path:
        """Write the folder again, after a change of `tensors` or `config`."""
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file(
            {name: t.contiguous() for name, t in self.tensors.items()}, self.folder / "model.safetensors"
        )
        return self.folder

    def put(self, module: str, form: str, m: Matrix) -> None:
        """Hold a module in a form."""
        for name in [name for name in self.tensors if name.rpartition(".")[0] == module]:
            del self.tensors[name]
        self.tensors |= {f"{module}.{name}": tensor for name, tensor in FORMS[form][0](m).items()}
        self.matrices[module] = form, m
        self.plain.destinations()[f"{module}.weight"].copy_(m.dense(form))


def write(folder: Path, form: str, diffusion: str | None = None, seed: int = 0, **changes) -> Written:
    """A small Orthrus whose projections have a form, those of the diffusion view another (None: plain)."""
    changes = {"intermediate_size": 96, "num_hidden_layers": 1, "max_position_embeddings": 256} | changes
    plain, rng = small_model(seed=seed, **changes), random.Random(seed)
    config = plain.config.to_dict() | {"quantization_config": FORMS[form][1]}
    tensors = {name: weight.clone() for name, weight in plain.destinations().items()}
    made = Written(folder, {}, tensors, config, plain)
    for name in [name for name in tensors if "_proj" in name]:
        of = diffusion if "_diff" in name else form
        if of is not None:
            made.put(name.removesuffix(".weight"), of, random_matrix(*tensors[name].shape, of, rng))
    folder.mkdir(parents=True, exist_ok=True)
    made.save()
    return made
