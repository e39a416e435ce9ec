"""The settings of several texts, a slot each, as the choice of a token reads them: twins the settings
themselves, kernels numbers on the device.

A captured graph reads whatever lies in the table. Its launches follow from the `Form` alone: the union of
what the choices of its rows take. A form that covers more changes no choice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import triton
from .layout import Settings, Takes
from .logit_summary import MOST
from .put_down import put_down
from .sampling import Sampling, correction_scale


class Form(NamedTuple):
    """What the launches of a choice follow from. room: for the tokens that top-k keeps, in the algorithm that
    finds them first; 0 without it."""

    takes: Takes
    room: int

    @staticmethod
    def of(sampling: Sampling, vocabulary: int) -> Form:
        """The form of one text's settings."""
        tables = Takes.BIAS if sampling.logit_bias else Takes(0)
        tables |= Takes.PENALTY if sampling.penalises else Takes(0)
        if sampling.temperature == 0:
            return Form(Takes.GREEDY | tables, 0)
        filters = Takes.TOP_K if 0 < sampling.top_k < vocabulary else Takes(0)
        filters |= Takes.TOP_P if sampling.top_p < 1 else Takes(0)
        filters |= Takes.MIN_P if sampling.min_p > 0 else Takes(0)
        if Takes.TOP_K in filters and sampling.top_k <= MOST:
            room = max(triton.next_power_of_2(int(sampling.top_k)), 16)
            return Form(Takes.BEST | filters | tables, room)
        return Form((Takes.EDGES if filters else Takes.SAMPLED) | filters | tables, 0)

    def __or__(self, other: Form) -> Form:
        """The form that covers both."""
        return Form(self.takes | other.takes, max(self.room, other.room))

    @property
    def plain(self) -> bool:
        """Whether every choice is the largest logit, so that no logits need to be written."""
        return self.takes == Takes.GREEDY

    def rounded(self) -> Form:
        """The first of FORMS that covers this one."""
        return next(form for form in FORMS if form | self == form)


_EVERY = reduce(or_, Takes)
# The forms of an engine of several texts, so that few graphs cover all of their settings: greedy alone;
# sampled with any filter; that with a bias, a penalty, ends held back, the likeliest tokens told and what a
# grammar permits too.
_RARE = Takes.BIAS | Takes.PENALTY | Takes.LEAST | Takes.LIKELIEST | Takes.MASK
FORMS = Form(Takes.GREEDY, 0), Form(_EVERY & ~_RARE, MOST), Form(_EVERY, MOST)


class SamplingTable:
    """The settings of S texts; greedy where none has been put. The form alone says what is launched: it has
    to cover the slots of the rows, and the table's owner sets it. What a launch reads stays where it is."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device | str) -> None:
        self.vocabulary, self.samplings = vocabulary, [Sampling()] * slots
        self._form = Form.of(Sampling(), vocabulary)
        self._forms = [self._form] * slots  # of each slot: asked for before every launch
        greedy = settings_numbers(Sampling(), vocabulary)
        self.numbers = greedy.repeat(slots, 1).to(device)  # [S, columns of Settings] int32
        self.bias: Tensor | None = None  # [S, V] fp32, from the first bias on

    @property
    def form(self) -> Form:
        """What the next launches follow from."""
        return self._form

    @form.setter
    def form(self, form: Form) -> None:
        self._form = form
        self._hold_biases(Takes.BIAS in form.takes)

    def put(
        self, slot: int, sampling: Sampling, least: int = 0, likeliest: bool = False, masked: bool = False
    ) -> None:
        """Take the settings of a text, which does not end at positions below `least`, whose likeliest tokens
        are told if so, and whose rows have masks if so. Raises IndexError for a bias of a token that is not
        in the vocabulary."""
        takes = (Takes.LEAST if least else Takes(0)) | (Takes.LIKELIEST if likeliest else Takes(0))
        takes |= Takes.MASK if masked else Takes(0)
        self.samplings[slot] = sampling
        self._forms[slot] = Form.of(sampling, self.vocabulary) | Form(takes, 0)
        put_down(self.numbers[slot], settings_numbers(sampling, self.vocabulary, least, masked))
        self._hold_biases(bool(sampling.logit_bias))
        if sampling.logit_bias and self.bias is not None:
            put_down(self.bias[slot], bias_row(sampling, self.vocabulary))

    def form_of(self, slots: Iterable[int]) -> Form:
        """The form that covers some slots, one at least."""
        return reduce(or_, {self._forms[slot] for slot in slots})

    def _hold_biases(self, wanted: bool) -> None:
        if wanted and self.bias is None:
            shape = len(self.samplings), self.vocabulary
            self.bias = torch.zeros(shape, dtype=torch.float32, device=self.numbers.device)

    @property
    def least(self) -> Tensor:
        """The position from which on each text may end, [S] int32, not contiguous."""
        return self.numbers[:, Settings.LEAST]

    @property
    def corrections(self) -> Tensor:
        """What each text's bigram correction is multiplied with, [S] fp32, not contiguous."""
        return self.numbers.view(torch.float32)[:, Settings.CORRECTION]

    @property
    def temperatures(self) -> Tensor:
        """[S] fp32, not contiguous."""
        return self.numbers.view(torch.float32)[:, Settings.TEMPERATURE]

    def groups(self, slots: Tensor) -> Iterator[tuple[Sampling, Tensor]]:
        """The settings of each slot that rows have, and those rows, int64; no padding rows."""
        for slot in slots.unique().tolist():
            if slot >= 0:
                yield self.samplings[slot], (slots == slot).nonzero().flatten()


def alike(sampling: Sampling, logits: Tensor) -> tuple[SamplingTable, Tensor]:
    """(table, slots) of rows of logits [T, V] that all have the same settings."""
    table = SamplingTable(1, logits.shape[1], logits.device)
    table.put(0, sampling)
    table.form = table.form_of([0])
    return table, torch.zeros(len(logits), dtype=torch.int32, device=logits.device)


def settings_numbers(sampling: Sampling, vocabulary: int, least: int = 0, masked: bool = False) -> Tensor:
    """The settings as kernels read them, int32 on the CPU in the order of `layout.Settings`."""
    whole = {
        Settings.SEED_LOW: signed32(sampling.seed), Settings.SEED_HIGH: signed32(sampling.seed >> 32),
        Settings.TOP_K: min(int(sampling.top_k), vocabulary),
        Settings.TAKES: int(Form.of(sampling, vocabulary).takes) | masked * int(Takes.MASK),
        Settings.LEAST: least,
    }  # fmt: skip
    parts = {
        Settings.REPETITION: sampling.repetition_penalty, Settings.FREQUENCY: sampling.frequency_penalty,
        Settings.PRESENCE: sampling.presence_penalty, Settings.TEMPERATURE: sampling.temperature,
        Settings.TOP_P: sampling.top_p, Settings.MIN_P: sampling.min_p,
        Settings.CORRECTION: correction_scale(sampling),
    }  # fmt: skip
    numbers = torch.zeros(len(Settings), dtype=torch.int32, device="cpu")
    numbers[list(whole)] = torch.tensor(list(whole.values()), dtype=torch.int32, device="cpu")
    bits = torch.tensor(list(parts.values()), dtype=torch.float32, device="cpu").view(torch.int32)
    numbers[list(parts)] = bits
    return numbers


def signed32(x: int) -> int:
    """The low 32 bits of x as an int32, which is what a kernel takes."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def bias_row(sampling: Sampling, vocabulary: int) -> Tensor:
    """[V] fp32 on the CPU: the bias of every token."""
    bias = torch.zeros(vocabulary, dtype=torch.float32, device="cpu")
    for token, value in sampling.logit_bias.items():
        bias[token] += value
    return bias
