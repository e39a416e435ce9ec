"""How a cycle chooses tokens from states of the model, for the settings of the text that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orthrus_kernels import Sampling
from orthrus_kernels.choice_triton import bias_table, choice_form, choice_numbers
from orthrus_kernels.layout import Settings

if TYPE_CHECKING:
    from ..model import Network

CANDIDATES = 16  # of a position that a tree may take


class Form(NamedTuple):
    """What the launches of a choice follow from; settings of one form differ in numbers alone."""

    filters: tuple[bool, int, bool, bool]  # of `choice_form`
    biased: bool
    penalised: bool

    @staticmethod
    def of(sampling: Sampling, vocabulary: int) -> Form:
        """The form of settings."""
        penalised = sampling.repetition_penalty != 1.0
        return Form(choice_form(sampling, vocabulary), bool(sampling.logit_bias), penalised)

    @property
    def plain(self) -> bool:
        """Whether the choice is the largest logit, so that no logits need to be written."""
        sampled, *_ = self.filters
        return not (sampled or self.biased or self.penalised)


class Choice:
    """The settings of the text that runs, in memory that graphs read, and the choices made by them."""

    def __init__(self, model: Network) -> None:
        v, device = model.config.vocab_size, model.device
        self.model, self.sampling = model, Sampling()
        self.numbers = torch.zeros(len(Settings), dtype=torch.int32, device=device)
        self.bias = torch.zeros(v, dtype=torch.float32, device=device)
        self.counts = torch.zeros(
            v, dtype=torch.int32, device=device
        )  # of the text's tokens, for the penalty

    def begin(self, sampling: Sampling, tokens: list[int]) -> Form:
        """Take the settings of a text that holds these tokens."""
        vocabulary, biases = len(self.bias), sampling.logit_bias
        form, self.sampling = Form.of(sampling, vocabulary), sampling
        self.numbers.copy_(choice_numbers(sampling, vocabulary))
        if form.biased:
            self.bias.copy_(bias_table(tuple(biases.items()), vocabulary, self.bias.device))
        if form.penalised:
            self.counts.copy_(torch.tensor(tokens).bincount(minlength=vocabulary))
        return form

    def of_tree(self, states: Tensor, positions: Tensor, tokens: Tensor, parents: Tensor) -> list[Tensor]:
        """The target's token behind each node of a tree, [T] int64, and of that token the logit and of its
        row the log-sum-exp, [T] fp32, both before any setting.

        states [T, E]; positions [T] int64: those that the chosen tokens take, which key the noise; tokens,
        parents [T]: the tree."""
        form, ops, head = Form.of(self.sampling, len(self.bias)), self.model.ops, self.model.head
        if form.plain:
            values, ids, sums = ops.head(states, head, 1)
            return [ids[:, 0], values[:, 0], sums]
        logits = ops.linear(states, head, out_dtype=torch.float32)
        seen = ops.seen_rows(self.counts, tokens, parents) if form.penalised else None
        ids = ops.choose(logits, positions, self.sampling, seen, **self._on_device(form))
        return [ids, logits.gather(1, ids[:, None])[:, 0], ops.log_sum_exp(logits)]

    def proposals(self, states: Tensor, positions: Tensor) -> Tensor:
        """A token for each row of a draft, [T] int64, by the settings and the noise of the target's choice,
        which makes the two agree as often as they can. A penalty sees the text and not the draft."""
        form, ops, head = Form.of(self.sampling, len(self.bias)), self.model.ops, self.model.head
        if form.plain:
            return ops.head(states, head, 1)[1][:, 0]
        logits = ops.linear(states, head, out_dtype=torch.float32)
        return ops.choose(logits, positions, self.sampling, self._seen(form, states), **self._on_device(form))

    def candidates(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [T, k] fp32 and ids [T, k] int64 of a tree's candidates, likeliest first."""
        form, ops, head = Form.of(self.sampling, len(self.bias)), self.model.ops, self.model.head
        k = min(CANDIDATES, len(self.bias))
        if form.plain:
            values, ids, sums = ops.head(states, head, k)
            return values - sums[:, None], ids
        logits = ops.linear(states, head, out_dtype=torch.float32)
        seen = self._seen(form, states)
        return ops.candidates(logits, positions, self.sampling, k, seen, **self._on_device(form))

    def ranked(
        self, states: Tensor, positions: Tensor, root: Tensor, known: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores and ids of a tree's candidates under `root` [1] int32, and their order if the model has a
        bigram correction, as `grow` takes them. known: the block has seen the root."""
        scores, ids = self.candidates(states, positions)
        if self.model.bigram is None:
            return scores, ids, None
        scale = self.numbers[Settings.CORRECTION :][:1].view(torch.float32)
        tables = self.model.bigram.before, self.model.bigram.after
        scores, order = self.model.ops.rerank(scores, ids, root, *tables, scale, known)
        return scores, ids, order

    def note(self, choices: Tensor, accepted: Tensor) -> None:
        """Count the tokens that a walk has kept: choices [T] int64 behind the nodes accepted [S, N] int32."""
        if self.sampling.repetition_penalty != 1.0:
            rows = accepted.flatten()
            self.counts.index_add_(0, choices[rows.clamp(min=0)], (rows >= 0).int())

    def _seen(self, form: Form, states: Tensor) -> Tensor | None:
        return (self.counts > 0).repeat(len(states), 1) if form.penalised else None

    def _on_device(self, form: Form) -> dict[str, Tensor | None]:
        """What kernels take beside the settings themselves: where a graph finds them."""
        if self.model.backend != "triton":
            return {}
        return {"numbers": self.numbers, "bias": self.bias if form.biased else None}
