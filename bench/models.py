"""Shapes of the dense Qwen3 models that are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen3_model import Qwen3, Qwen3Config
from qwen3_model.quantised.scheme import WHERE, read_quantisation
from qwen3_model.quantising.written import Form, Fp8, Int4
from qwen3_model.settings import FP8


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; letters as everywhere: E hidden, H query heads, G key heads, D head, F MLP, V
    vocabulary."""

    layers: int
    E: int
    H: int
    F: int
    G: int = 8
    D: int = 128
    V: int = 151936
    tied: bool = True
    form: Form | None = None  # of quantised matrices, the diffusion view's in fp8; None: bf16
    activations: str | None = None  # as of Qwen3.from_pretrained

    def config(self) -> Qwen3Config:
        """An Orthrus of this shape, blocks of 32 as published. It has no end token, so that random weights
        decode as long as they are asked to."""
        return Qwen3Config(
            vocab_size=self.V, hidden_size=self.E, intermediate_size=self.F, num_hidden_layers=self.layers,
            num_attention_heads=self.H, num_key_value_heads=self.G, head_dim=self.D,
            max_position_embeddings=40960, tie_word_embeddings=self.tied, block_size=32,
            mask_token_id=self.V - 1,
            quantisation=read_quantisation({WHERE: self.form.config([])}) if self.form else None,
        )  # fmt: skip

    def weights(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every linear weight of a pass, by name."""
        return {
            "qkv": ((self.H + 2 * self.G) * self.D, self.E),
            "o": (self.E, self.H * self.D),
            "gate_up": (2 * self.F, self.E),
            "down": (self.E, self.F),
            "head": (self.V, self.E),
        }


MODELS = {
    "0.6B": Shape(28, 1024, 16, 3072),
    "1.7B": Shape(28, 2048, 16, 6144),
    "4B": Shape(36, 2560, 32, 9728),
    "8B": Shape(36, 4096, 32, 12288, tied=False),
    "32B": Shape(64, 5120, 64, 25600, tied=False),
}
# The same in 8 and 4 bits, for benches of whole models
QUANTISED = {
    f"{name}-{form.name}": replace(shape, form=form)
    for name, shape in MODELS.items()
    for form in (Fp8(), Int4(128))
}
QUANTISED |= {  # and with rows of 8 bits
    f"{name}-w8a8": replace(shape, form=Fp8(), activations=FP8) for name, shape in MODELS.items()
}
WHOLE = MODELS | QUANTISED
NAMES = f"{', '.join(MODELS)}, each also with -fp8, -w8a8 and -int4 behind it"
MOST_CONTEXT = 40960 - 256  # positions of the models, less the rows of a pass


def random_model(name: str, device: str = "cuda") -> Qwen3:
    """Random weights of a model's shape, in bf16 or codes."""
    shape = WHOLE[name]
    return Qwen3.from_config(shape.config(), device=device, dtype="bfloat16", activations=shape.activations)
