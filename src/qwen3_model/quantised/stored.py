"""Which weights of a checkpoint are quantised, and how: told by the tensors that each module has.

The config says what a form means (scheme.py). A module that it lists as not converted, and another form or
group than the config's, are refused. Weights of a diffusion view, of which no config speaks, may have any
form whose tensors say all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orthrus_kernels.quantised import GROUPS, Format

from ..errors import InputError
from ..weight_files import Header, listed
from .forms import BLOCK, Awq, FloatQuantized, Form, Fp8, Gptq, PackQuantized, group_of_eight_bits
from .scheme import OTHERS, Quantisation

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DIFFUSION = "_diff"  # ends the names of modules of a diffusion view
STATIC = "input_scale"  # the tensor of a static scale of activations
# The tensor that tells a form, if those above it are missing
_TOLD_BY: tuple[tuple[str, type[Form]], ...] = (
    ("weight_scale_inv", Fp8),
    ("weight_packed", PackQuantized),
    ("g_idx", Gptq),
    ("qweight", Awq),
    ("weight_scale", FloatQuantized),
)


@dataclass(frozen=True)
class Kind:
    """What the parts of a stack share: how their codes, scales and zero points lie in files and in memory."""

    form: Form
    group: int
    zeros: bool
    scale: torch.dtype

    @property
    def in_memory(self) -> tuple[Format, bool]:
        """The format of codes in memory, and whether zero points lie beside them. Beside scales of fp32 there
        is no room for them: codes less their zero point, 6 bits, are then kept in 8, exactly."""
        if self.zeros and self.scale == torch.float32:
            return Format.E4M3, False
        return self.form.format, self.zeros

    def __str__(self) -> str:
        zeros = "zero points" if self.zeros else "no zero points"
        return f"{self.form.name} in groups of {self.group}, {zeros}, {str(self.scale)[6:]} scales"


@dataclass(frozen=True)
class StoredWeight:
    """A quantised weight [n, k] of a checkpoint."""

    module: str
    n: int
    k: int
    kind: Kind
    scale_rows: int  # rows that share a scale, or more: BLOCK or 1
    tensors: Mapping[str, Header]  # by the last part of their names; none: of a model without a checkpoint

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return [f"{self.module}.{tensor}" for tensor in self.tensors]


FindStored = Callable[[str, int, int], StoredWeight | None]  # of a module with a weight [n, k]; None: plain


class StoredWeights:
    """The quantised weights of a folder, by its headers."""

    def __init__(self, headers: Mapping[str, Header], quantisation: Quantisation | None) -> None:
        """Raises InputError where the config speaks of quantised weights and there are none."""
        self.quantisation = quantisation
        self.modules: dict[str, dict[str, Header]] = {}
        for name, header in headers.items():
            module, _, tensor = name.rpartition(".")
            self.modules.setdefault(module, {})[tensor] = header
        told = {module for module, tensors in self.modules.items() if _found(tensors)}
        if quantisation is not None and not any(not module.endswith(DIFFUSION) for module in told):
            raise InputError(
                f"config.json has a quantization_config ({quantisation.form}), but no module has tensors of "
                "codes: remove it if the weights are plain"
            )
        self.any = bool(told)

    def of(self, module: str, n: int, k: int) -> StoredWeight | None:
        """How the weight [n, k] of a module is stored; None: as one plain tensor, or not at all.

        Raises InputError for a form that config.json does not tell of, and for tensors that are missing or do
        not fit."""
        tensors = self.modules.get(module, {})
        found = _found(tensors)
        if found is None:
            return None
        folder = next(iter(tensors.values())).file.parent
        if STATIC in tensors:
            raise InputError(
                f"{folder}: {module} has a static scale of activations ({STATIC}), which is not applied: "
                f"{OTHERS}"
            )
        form = self._told(folder, module, found)
        group = self._group(folder, module, form, tensors, k)
        wanted = form.tensors(n, k, group)
        if missing := {f"{module}.{t}" for t in wanted if t not in tensors and t not in form.optional}:
            raise InputError(
                f"{folder} lacks {listed(missing)} of a weight that is stored as {form.name}: "
                "download the checkpoint again"
            )
        mine = {tensor: tensors[tensor] for tensor in wanted if tensor in tensors}
        for tensor, (dtypes, shapes) in wanted.items():
            if tensor in mine:
                _check(f"{module}.{tensor}", mine[tensor], dtypes, shapes, form)
        zeros = form.has_zeros(frozenset(mine))
        self._check_zeros(folder, module, form, zeros)
        scale = mine[form.scale]
        rows = form.scale_rows(n, scale.shape)
        return StoredWeight(module, n, k, Kind(form, group, zeros, DTYPES[scale.dtype]), rows, mine)

    def _told(self, folder: Path, module: str, found: type[Form]) -> Form:
        """The form that a module's tensors tell of, as the config means it."""
        scheme = self.quantisation
        if module.endswith(DIFFUSION) and found is not Gptq:
            return found()
        if scheme is None or scheme.form != found.name:
            told = f"of {scheme.form}" if scheme else "of none (quantization_config is missing)"
            raise InputError(
                f"{folder}: {module} is stored as {found.name}, and config.json tells {told}: check that "
                "weights and config belong together"
            )
        if scheme.leaves_out(module):
            raise InputError(
                f"{folder}: {module} is stored as {found.name}, and quantization_config of config.json lists "
                "it among modules that are not converted: check that weights and config belong together"
            )
        return form_of(scheme)

    def _group(self, folder: Path, module: str, form: Form, tensors: Mapping[str, Header], k: int) -> int:
        """Columns that share a scale."""
        if form.by_group is None:
            group = group_of_eight_bits(k)
            if group is None:
                raise InputError(
                    f"{folder}: {module} has {k} columns; a multiple of {min(GROUPS)} was expected"
                )
            return group
        shape = tensors[form.scale].shape if form.scale in tensors else ()
        count = shape[form.by_group] if len(shape) == 2 else 0
        group = k // count if count and k % count == 0 else 0
        told = None if self.quantisation is None or module.endswith(DIFFUSION) else self.quantisation.group
        if group not in GROUPS or told not in (None, group):
            expected = told or f"one of {', '.join(map(str, GROUPS))}"
            raise InputError(
                f"{folder}: {module}.{form.scale} of {k} columns has shape {list(shape)}; {expected} columns "
                "a scale were expected: check that weights and config belong together"
            )
        return group

    def _check_zeros(self, folder: Path, module: str, form: Form, zeros: bool) -> None:
        scheme = self.quantisation
        if scheme is not None and not module.endswith(DIFFUSION) and zeros == scheme.symmetric:
            held, told = ("zero points", "symmetric") if zeros else ("no zero points", "asymmetric")
            raise InputError(
                f"{folder}: {module} has {held} though config.json calls it {told}: check that weights and "
                "config belong together"
            )


def all_plain(module: str, n: int, k: int) -> None:
    """Of a model without quantised weights."""


def by_config(scheme: Quantisation | None) -> FindStored:
    """The weights that a checkpoint of such a config would have, for a model without one. The diffusion view
    is in fp8."""
    if scheme is None:
        return all_plain

    def of(module: str, n: int, k: int) -> StoredWeight | None:
        if module.endswith(DIFFUSION):
            return in_fp8(module, n, k)
        if scheme.leaves_out(module):
            return None
        group = scheme.group or group_of_eight_bits(k)
        if group is None or k % group:
            raise InputError(
                f"config.json: {module} has {k} columns; a multiple of {group or 32} was expected"
            )
        scale = torch.float16 if scheme.form in ("awq", "gptq") else torch.bfloat16
        kind = Kind(form_of(scheme), group, not scheme.symmetric, scale)
        return StoredWeight(module, n, k, kind, scheme.scale_rows, {})

    return of


def in_fp8(module: str, n: int, k: int) -> StoredWeight | None:
    """A weight of no file in fp8; None where no group of columns divides it, so that it is plain."""
    group = group_of_eight_bits(k)
    if group is None:
        return None
    return StoredWeight(module, n, k, Kind(Fp8(), group, False, torch.bfloat16), BLOCK, {})


def form_of(scheme: Quantisation) -> Form:
    """The form that a config tells of."""
    if scheme.form == Gptq.name:
        return Gptq(scheme.zeros_less_one, scheme.symmetric)
    return next(form for _, form in _TOLD_BY if form.name == scheme.form)()


def kind_of(stack: Sequence[tuple[str, StoredWeight | None]]) -> Kind | None:
    """The kind that the parts of a stack share, each with its module's name; None: all are plain. Raises
    InputError where they differ."""
    kinds = {module: "plain" if part is None else str(part.kind) for module, part in stack}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{module} is {kind}" for module, kind in kinds.items())
        raise InputError(
            f"{told}: these are multiplied at once, so one kind was expected: quantise them alike"
        )
    return stack[0][1].kind if stack[0][1] else None


def _found(tensors: Mapping[str, Header]) -> type[Form] | None:
    """The form that a module's tensors tell of; None for one that is not quantised."""
    return next((form for tensor, form in _TOLD_BY if tensor in tensors), None)


def _check(
    name: str, header: Header, dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], form: Form
) -> None:
    if header.dtype not in dtypes:
        raise InputError(
            f"{header.file}: {name} is {header.dtype}; {', '.join(dtypes)} was expected of {form.name}"
        )
    if header.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(
            f"{header.file}: {name} has shape {list(header.shape)}; {expected} was expected of {form.name}: "
            "check that weights and config belong together"
        )
