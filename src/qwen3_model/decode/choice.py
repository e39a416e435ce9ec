"""How a pass chooses tokens from states of the model, each row by the settings of the text in its slot."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orthrus_kernels import Form, Sampling, SamplingTable, put_down
from orthrus_kernels.layout import Takes
from orthrus_kernels.seen import GENERATED, counts_of

from ..kinds import MOST_STOP_TOKENS
from ..request import MOST_LIKELIEST

if TYPE_CHECKING:
    from ..model import Network

CANDIDATES = 16  # of a position that a draft may take


class Scores(NamedTuple):
    """What the head says of T nodes, before any setting."""

    sums: Tensor  # log-sum-exp of each row, [T] fp32
    logits: Tensor | None  # of all tokens, [T, V] fp32; None in a form that takes the largest alone
    largest: list[Tensor]  # then: logits [T, 1] fp32, and ids [T, 1] int64
    told: list[Tensor]  # the likeliest tokens, where the form tells them: logits, ids [T, MOST_LIKELIEST]


class Choice:
    """The settings of the texts in S slots, in memory that graphs read, and the choices made by them.

    In all methods, slots [T] int32 says whose each row is; -1: a padding row, whose results are finite and in
    range and mean nothing. What is launched follows from `form`, which has to cover those slots."""

    def __init__(self, model: Network, slots: int = 1) -> None:
        self.model = model
        self.table = SamplingTable(slots, model.config.vocab_size, model.device)
        # The tokens that end each text, then -1, [S, E] int32.
        most = len(model.config.eos_token_ids) + MOST_STOP_TOKENS
        self.ends = torch.full((slots, most), -1, dtype=torch.int32, device=model.device)
        # What penalties see of each text (seen.py), [S, V] int32, from the first penalty on.
        self.counts: Tensor | None = None

    @property
    def form(self) -> Form:
        """What the launches of the next pass follow from."""
        return self.table.form

    @form.setter
    def form(self, form: Form) -> None:
        self.table.form = form
        self._hold_counts(Takes.PENALTY in form.takes)

    def form_of(self, slots: Iterable[int]) -> Form:
        """The form that covers some slots, one at least; where there are several slots, rounded up."""
        form = self.table.form_of(slots)
        return form.rounded() if len(self.table.samplings) > 1 else form

    def put(
        self, slot: int, sampling: Sampling, tokens: list[int], prompt: int, ends: Collection[int] = (),
        least: int = 0, likeliest: bool = False, masked: bool = False,
    ) -> None:  # fmt: skip
        """Take the settings of a text that holds these tokens, the first `prompt` of which are its prompt.
        Each of `ends` ends it, but not at positions below `least`; its likeliest tokens are told if so, and
        what is chosen must be permitted if so."""
        self.table.put(slot, sampling, least if ends else 0, likeliest, masked)
        row = [*ends, *[-1] * (self.ends.shape[1] - len(ends))]
        put_down(self.ends[slot], torch.tensor(row, dtype=torch.int32))
        self._hold_counts(sampling.penalises)
        if sampling.penalises and self.counts is not None:
            put_down(self.counts[slot], counts_of(tokens, prompt, self.table.vocabulary))

    @property
    def masks(self) -> bool:
        """Whether the next pass takes masks of its rows."""
        return Takes.MASK in self.form.takes

    def scores(self, states: Tensor) -> Scores:
        """What the head says of nodes with states [T, E]."""
        ops, head = self.model.ops, self.model.head
        if self.form.plain:
            *largest, sums = ops.head(states, head, 1)
            return Scores(sums, None, largest, [])
        logits = ops.linear(states, head, out_dtype=torch.float32)
        if Takes.LIKELIEST in self.form.takes:
            *told, sums = ops.likeliest(logits, min(MOST_LIKELIEST, self.table.vocabulary))
            return Scores(sums, logits, [], told)
        return Scores(ops.log_sum_exp(logits), logits, [], [])

    def of_tree(
        self, scores: Scores, positions: Tensor, tokens: Tensor, parents: Tensor, slots: Tensor,
        masks: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The target's token behind each node of trees, [T] int64, and of that token the logit and of its row
        the log-sum-exp, [T] fp32, both before any setting; where the form tells them, the likeliest tokens
        besides, logits [T, MOST_LIKELIEST] fp32 and ids int64, as many as there are.

        scores: of the nodes, whose logits are changed; positions [T] int64: those that the chosen tokens
        take, which key the noise; tokens, parents [T]: the trees; masks [T, words] int32: what is permitted
        behind each node (permit.py), of texts that have a grammar."""
        if scores.logits is None:
            values, ids = scores.largest
            return [ids[:, 0], values[:, 0], scores.sums]
        ops, logits = self.model.ops, scores.logits
        self._hold_ends(logits, positions, slots)
        if masks is not None:
            ops.permit(logits, masks, self.table, slots)
        ids = ops.choose(logits, positions, self.table, slots, self._seen(slots, tokens, parents))
        return [ids, logits.gather(1, ids[:, None])[:, 0], scores.sums, *scores.told]

    def candidates(self, states: Tensor, positions: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [T, K] fp32 and ids [T, K] int64 of a draft's candidates, likeliest first, by the
        settings and the noise of the target's choice, which makes the two agree as often as they can. A
        penalty sees the text and not the draft. positions and slots of T rows may have several axes."""
        ops, head = self.model.ops, self.model.head
        k = min(CANDIDATES, self.table.vocabulary)
        if self.form.plain:
            values, ids, sums = ops.head(states, head, k)
            return values - sums[:, None], ids
        positions, slots = (t.flatten().contiguous() for t in (positions, slots))
        logits = ops.linear(states, head, out_dtype=torch.float32)
        self._hold_ends(logits, positions, slots)
        return ops.candidates(logits, positions, self.table, slots, k, self._seen(slots))

    def ranked(
        self, states: Tensor, positions: Tensor, roots: Tensor, slots: Tensor, known: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores [B, P, K] and ids [B, P, K] of the candidates of B drafts under roots [B], and None; if the
        model has a bigram correction, scores [B, P, K, K] and their order, as `grow` takes them.

        Rows are those of B blocks, P each, of one slot a block: states [B * P, E], positions and slots
        [B, P]. known: the blocks have seen their roots."""
        shape = *slots.shape, -1
        scores, ids = (x.view(shape) for x in self.candidates(states, positions, slots))
        ops, tables = self.model.ops, self.model.bigram
        if tables is None:
            return scores, ids, None
        settings = self.table.corrections, self.table.temperatures, slots[:, 0]
        scores, order = tables.rerank(ops, scores, ids, tables.gates(ops, states), roots, *settings, known)
        return scores, ids, order

    def note(self, choices: Tensor, accepted: Tensor, slots: Tensor) -> None:
        """Count the tokens that walks have kept: choices [T] int64 behind the nodes accepted [B, N] int32."""
        if Takes.PENALTY in self.form.takes and self.counts is not None:
            rows = accepted.flatten()
            kept = rows.clamp(min=0)
            at = slots[kept].clamp(min=0).long() * self.table.vocabulary + choices[kept]
            self.counts.view(-1).index_add_(0, at, (rows >= 0).int() * GENERATED)

    def _hold_counts(self, wanted: bool) -> None:
        if wanted and self.counts is None:
            shape = len(self.table.samplings), self.table.vocabulary
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.model.device)

    def _hold_ends(self, logits: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Make end tokens impossible, in place, at positions at which a text may not end yet."""
        if Takes.LEAST in self.form.takes:
            least = self.table.least  # rows of a rehearsal, which runs no kernel, may name any slot
            of = slots.clamp(0, len(least) - 1).long()
            held, ends = positions < least[of], self.ends[of]
            at = ends.clamp(min=0).long()
            bound = torch.where(held[:, None] & (ends >= 0), float("-inf"), float("inf"))
            logits.scatter_reduce_(1, at, bound, "amin")  # in any order: places behind the list are token 0's

    def _seen(
        self, slots: Tensor, tokens: Tensor | None = None, parents: Tensor | None = None
    ) -> Tensor | None:
        """What penalties see: the texts, and the paths of trees."""
        if Takes.PENALTY not in self.form.takes:
            return None
        return self.model.ops.seen_rows(self.counts, self.table, slots, tokens, parents)
