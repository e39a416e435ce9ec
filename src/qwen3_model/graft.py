"""The diffusion view of an Orthrus, grafted onto another checkpoint of the same base: a quantised one, say.

The views share the embedding, the norms and the MLPs, and diffusion rows read the AR view's keys and values.
So a view works on the base that it was learnt for alone. What can be seen of that is checked: a fine-tune
changes the embedding or the norms of queries and keys. AWQ multiplies the columns of the query, key and value
projections by numbers of its own, and divides `input_layernorm` by them. The view's projections are not
among those, so here they get the same numbers: (W r) (n / r) = W n."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .config import Qwen3Config
from .errors import InputError
from .matrices import Part
from .plain import plain_config
from .quantised.slot import Slot
from .quantised.stored import DIFFUSION, StoredWeight, StoredWeights, in_fp8
from .quantising.rounding import fp8_blocks
from .tensor_names import EMBEDDING
from .weight_files import Header, open_file, read_headers

WIDEST = 64.0  # a ratio of two norms of a column beyond this, or its inverse, is no fold of a quantiser
ROWS = 4096  # of an embedding are compared at a time
# What both configs must agree on. A base may extend its context (YaRN) as it likes.
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps",
)  # fmt: skip


def column_ratios(learnt: Tensor, base: Tensor, where: str) -> Tensor | None:
    """What the columns of projections that were learnt behind a norm [E] are multiplied by, so that they work
    behind the base's: fp32 [E]; None where both are the same numbers. Raises InputError where a ratio is not
    finite or outside 1/64..64."""
    learnt, base = learnt.float(), base.float()
    if torch.equal(learnt, base):
        return None
    ratios = learnt / base
    ratios[(learnt == 0) & (base == 0)] = 1.0
    wrong = ~((ratios >= 1 / WIDEST) & (ratios <= WIDEST))  # NaN too
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise InputError(
            f"{where}: column {at} is {float(base[at]):.4g} in the base and {float(learnt[at]):.4g} in the "
            f"Orthrus, more than {WIDEST:.0f} times apart: this is another model, no fold of a quantiser"
        )
    return ratios


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in bf16, after each has been in the other's dtype: fp16 holds
    the least of bf16's numbers with fewer digits."""
    pairs = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return all(torch.equal(x.to(y.dtype).bfloat16(), y.to(x.dtype).bfloat16()) for x, y in pairs)


def with_view(config: Qwen3Config, base: Path, orthrus: Path) -> Qwen3Config:
    """The config of a base with the diffusion view of an Orthrus, by their configs alone. Raises InputError
    where these do not fit."""
    learnt = Qwen3Config.from_folder(orthrus, checkpoint.tensor_names(orthrus))
    if config.has_diffusion_view:
        raise InputError(f"{base} has a diffusion view of its own: leave --diffusion out")
    if not learnt.has_diffusion_view:
        raise InputError(f"{orthrus} has no diffusion view to graft: an Orthrus was expected")
    if learnt.quantisation is not None:
        raise InputError(f"{orthrus} is quantised: give the Orthrus in 16 or 32 bits for --diffusion")
    for name in SHARED:
        own, other = getattr(config, name), getattr(learnt, name)
        if own != other:
            raise InputError(
                f"{name} is {own} in {base} and {other} in {orthrus}: an Orthrus of the same base was "
                "expected"
            )
    return replace(config, block_size=learnt.block_size, mask_token_id=learnt.mask_token_id)


class Graft:
    """An Orthrus's diffusion view that fits a base. config: the base's, with the view."""

    def __init__(self, folder: Path, base: Path, config: Qwen3Config, stored: StoredWeights) -> None:
        """folder: of the Orthrus, in 16 or 32 bits. base: a folder without a diffusion view, whose config and
        stored weights are given. Reads both embeddings. Raises InputError where they do not fit."""
        self.folder, self._of_base, self._headers = folder, stored, read_headers(folder)
        self.config = with_view(config, base, folder)
        plain_config(folder, self._headers)
        headers = read_headers(base)
        self._check_shared(base, headers)
        self._ratios = [
            column_ratios(read_tensor(self._headers, name), read_tensor(headers, name), f"{base}: {name}")
            for name in (f"model.layers.{i}.input_layernorm.weight" for i in range(config.num_hidden_layers))
        ]

    def stored(self, module: str, n: int, k: int) -> StoredWeight | None:
        """How a module's weight lies in memory: the base's as its files hold it, the view's in fp8 beside a
        quantised base, else plain."""
        if not module.endswith(DIFFUSION):
            return self._of_base.of(module, n, k)
        return in_fp8(module, n, k) if self._of_base.any else None

    def load_into(self, folder: Path, destinations: Mapping[str, Part], progress: bool = True) -> None:
        """As `checkpoint.load_into`: the base's own weights, of its folder, and the view's."""
        own = {name: dest for name, dest in destinations.items() if f"{DIFFUSION}." not in name}
        checkpoint.load_into(folder, own, progress)
        self._fill({n: dest for n, dest in destinations.items() if n not in own and not dest.is_meta})

    def _fill(self, destinations: Mapping[str, Part]) -> None:
        """Copy the view's weights to where a model has them, one at a time, folded and quantised there."""
        for name, tensor in self._tensors(destinations):
            dest = destinations[name]
            if isinstance(dest, Slot):
                given = self._folded(name, tensor.to(dest.weight.words.device))
                codes, scale = fp8_blocks(given)
                dest.fill({"weight": codes, "weight_scale_inv": scale})
            else:
                dest.copy_(self._folded(name, tensor.to(dest.device)))

    def _folded(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the view as it works behind the base's norms."""
        ratios = self._ratios[int(name.split(".")[2])]
        reads_norm = name.rpartition(".")[0].endswith(("q_proj_diff", "k_proj_diff", "v_proj_diff"))
        return tensor.float() * ratios.to(tensor.device) if ratios is not None and reads_norm else tensor

    def _tensors(self, wanted: Mapping[str, Part]) -> Iterator[tuple[str, Tensor]]:
        """The view's tensors, file by file."""
        for file in sorted({self._headers[name].file for name in wanted}):
            with open_file(file, "pt") as tensors:
                for name in tensors.offset_keys():
                    if name in wanted:
                        yield name, tensors.get_tensor(name)

    def _check_shared(self, base: Path, headers: Mapping[str, Header]) -> None:
        """Raises InputError where what both views share, and no quantiser changes, is not the same."""
        norms = [
            f"model.layers.{i}.self_attn.{norm}.weight"
            for i in range(self.config.num_hidden_layers)
            for norm in ("q_norm", "k_norm")
        ]
        for name in (*norms, EMBEDDING):
            if not same_numbers(read_tensor(headers, name), read_tensor(self._headers, name)):
                raise InputError(
                    f"{name} of {base} is not that of {self.folder}: the diffusion view was learnt for "
                    "another base, or for one before a fine-tune"
                )


def read_tensor(headers: Mapping[str, Header], name: str) -> Tensor:
    """A tensor of a folder, as stored."""
    with open_file(headers[name].file, "pt") as tensors:
        return tensors.get_tensor(name)
