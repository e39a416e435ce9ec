"""A selector of draft candidates (qwen3_model/selector.py), fitted on text that the target writes.

The loss is the cross-entropy of the text's own token among the candidates and the rest, behind the text's own
tokens. A token that is no candidate trains the rest: at decoding it cannot be drafted. A proposal counts
where drafts come so far, and by its offset. Factors, weights of the rest and the offsets' numbers are learnt
apart for cycles of two passes and of one, whose blocks have not seen their roots; the tables stay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthrus_kernels.rerank import LEAST_REST, changes

from ..bigram import CALIBRATION, FORMS, TWO_PASS, Bigram
from ..errors import InputError, quoted
from ..request import ONE_PASS_BLOCK
from ..selector import PLACES
from .calibration import BESIDE
from .followed import Drafts, Lattice, Ranked, follow, joined, lattice
from .network import Network
from .pretrain import autocast
from .rollout import lengths, rollout
from .state import MOST_STEPS

DEPTHS = 15, 6  # proposals that are fitted of each form: of a one-pass block of 8 rows all
NODES = 63, 19  # of the trees whose cycles say which blocks count
DECAY = 0.85  # of the loss from one offset to the next
_EVERY, _BATCH = 100, 4096  # steps between looks at the development texts; blocks of each form a step


@dataclass(frozen=True)
class Data:
    """Blocks of one form along texts, M = texts * N of them. weight [M, P]: of each proposal in the loss."""

    blocks: Lattice
    weight: Tensor
    each: list[int]  # blocks of every text


def data_of(blocks: Lattice, each: Sequence[int], form: int, ranked: Ranked) -> Data:
    """Weighs blocks that follow each other in texts. A proposal counts where the text's tokens in front of it
    are candidates, else no draft comes as far. Blocks at which cycles begin count whole, as in
    calibration.py; they stand behind what earlier drafts have missed. ranked: by what cycles are followed."""
    drafts = Drafts(blocks, form == TWO_PASS, list(each))
    runs = follow(drafts, ranked, [NODES[form]]).kept[NODES[form]]
    begins = []
    for kept in runs:
        mine, at = [BESIDE] * len(kept), 0
        while at < len(kept):
            mine[at], at = 1.0, at + kept[at] + 1
        begins += mine
    ranks = drafts.ranks
    inside = ((ranks >= 0) & (ranks < blocks.ids.shape[-1])).int().cumprod(1)
    reached = torch.cat([torch.ones_like(inside[:, :1]), inside[:, :-1]], 1).bool() & (ranks >= 0)
    offsets = torch.arange(ranks.shape[1], device=ranks.device)
    weight = torch.tensor(begins, device=ranks.device)[:, None] * DECAY ** offsets.float()
    return Data(blocks, torch.where(reached, weight, 0.0), list(each))


@torch.no_grad()
def record(
    network: Network, pieces: Tensor, new: int, window: int, generator: torch.Generator, ranked: Ranked
) -> list[Data]:
    """Blocks at `window` neighbouring tokens of the greedy text of `new` tokens behind each piece [B, P], of
    both forms."""
    size, start = network.config.block_size, pieces.shape[1]
    text = rollout(network, pieces, new)
    room = new - window - DEPTHS[TWO_PASS]  # of a window's begin, so that its proposals have a truth
    first = start + torch.randint(0, max(room, 1), (len(text), 1), generator=generator)
    anchors = (first + torch.arange(window)).to(text.device)
    ends = start + lengths(text[:, start:], network.config.eos_token_ids)
    found = []
    for form, rows in zip(FORMS, (size, min(ONE_PASS_BLOCK, size)), strict=True):
        depth = min(DEPTHS[form] + form, rows - 1)
        with autocast(text.device):
            blocks = lattice(network, text, anchors, ends, rows, depth, states=True)
        blocks = Lattice(*(t[:, :, form:].flatten(0, 1) for t in blocks.tensors))  # without a first proposal
        data = data_of(blocks, [window] * len(text), form, ranked)
        found.append(Data(_small(data.blocks, network.config.vocab_size), data.weight, data.each))
    return found


def _small(blocks: Lattice, vocabulary: int) -> Lattice:
    """In half the memory."""
    number = torch.int16 if vocabulary < 2**15 else torch.int32
    assert blocks.states is not None
    ids, fronts, truth = (t.to(number) for t in (blocks.ids, blocks.fronts, blocks.truth))
    return Lattice(blocks.logs.half(), ids, fronts, truth, blocks.states.to(torch.bfloat16))


def bytes_of(width: int, candidates: int, blocks: int) -> int:
    """Of the data of so many blocks of each form, of states [width], at least; twice what stays, as parts are
    put together."""
    return 2 * blocks * sum(DEPTHS) * (2 * width + 4 * candidates)


def put_together(parts: Sequence[list[Data]]) -> list[Data]:
    """The data of each form, of several recordings."""
    found = []
    for of in zip(*parts, strict=True):
        each = [count for part in of for count in part.each]
        found.append(Data(joined([p.blocks for p in of], 0), torch.cat([p.weight for p in of]), each))
    return found


class Selector(nn.Module):
    """What is fitted beside tables, which stay: A and B of embedding rows with a standard deviation of 1, G,
    and of both forms and D offsets o and the calibration at temperature 0."""

    embedding: Tensor
    before: Tensor
    after: Tensor

    def __init__(self, embedding: Tensor, tables: Bigram, rank: int, offsets: int) -> None:
        """embedding [V, E]; tables: what decoding has, without a selector; offsets: D, of the model's
        blocks, of which tables without a calibration say nothing."""
        super().__init__()
        width = embedding.shape[1]
        self.std = float(embedding.std())
        self.register_buffer("embedding", (embedding / self.std).float(), persistent=False)
        self.register_buffer("before", tables.before.float(), persistent=False)
        self.register_buffer("after", tables.after.float(), persistent=False)
        self.front = nn.Parameter(torch.randn(width, rank) * width**-0.5)
        self.behind = nn.Parameter(torch.zeros(width, rank))  # the start changes nothing
        self.gate = nn.Parameter(torch.zeros(width, rank))
        self.places = nn.Parameter(torch.zeros(len(FORMS), offsets, rank))
        self.calibration = nn.Parameter(tables.calibration[:1, :offsets].float().repeat(len(FORMS), 1, 1))
        self.to(embedding.device)

    def by_offset(self, of_forms: Tensor, form: int) -> Tensor:
        """Of a form, [D, ...]; offsets that are not fitted are as the last one that is."""
        last = DEPTHS[form] - 1 + form
        return of_forms[form][torch.arange(of_forms.shape[1], device=of_forms.device).clamp(max=last)]

    def scores(self, form: int, blocks: Lattice) -> Tensor:
        """Log-probabilities [M, P, K + 1] behind the text's own tokens, the rest last."""
        assert blocks.states is not None
        there = slice(form, form + blocks.ids.shape[1])
        gate, places = blocks.states.float() @ self.gate, self.by_offset(self.places, form)[there]
        before = torch.cat([self.before, self.embedding @ self.front], 1)
        after = torch.cat([self.after, self.embedding @ self.behind], 1)
        fronts = blocks.fronts.long().clamp(min=0)[..., None]
        change = changes(fronts, blocks.ids.long(), before, after, gate, places)[:, :, 0]
        if form == TWO_PASS:  # the block has seen its root
            change = torch.cat([torch.zeros_like(change[:, :1]), change[:, 1:]], 1)
        factor, weight = self.by_offset(self.calibration, form)[there].unbind(-1)  # [P]
        logs = blocks.logs.float()
        rest = (1 - logs.exp().sum(-1)).clamp(min=LEAST_REST).log() * factor + weight
        return torch.log_softmax(torch.cat([logs * factor[:, None] + change, rest[..., None]], -1), -1)

    def loss(self, form: int, data: Data, some: Tensor | slice) -> Tensor:
        """The mean over what counts of some blocks."""
        blocks, weight = data.blocks.some(some), data.weight[some]
        said = Drafts(blocks, True, []).ranks.clamp(min=0)
        found = -self.scores(form, blocks).gather(-1, said[..., None])[..., 0]
        return (found * weight).sum() / weight.sum().clamp(min=1e-9)

    @torch.no_grad()
    def found(self) -> dict[str, Tensor]:
        """As a file has it: matrices for embedding rows as they are, and the calibration of temperature 0 for
        all."""
        calibration = torch.stack([self.by_offset(self.calibration, form) for form in FORMS])
        return {
            "front": self.front / self.std, "behind": self.behind / self.std, "gate": self.gate.clone(),
            PLACES: torch.stack([self.by_offset(self.places, form) for form in FORMS]),
            CALIBRATION: calibration[:, None].repeat(1, 2, 1, 1),
        }  # fmt: skip


@torch.no_grad()
def losses(selector: Selector, data: Sequence[Data]) -> list[float]:
    """Of each form, over all of its data."""
    found = []
    for form, mine in zip(FORMS, data, strict=True):
        total = counted = 0.0
        for at in range(0, len(mine.weight), _BATCH):
            weight = mine.weight[at : at + _BATCH].sum().item()
            total += selector.loss(form, mine, slice(at, at + _BATCH)).item() * weight
            counted += weight
        found.append(total / max(counted, 1e-9))
    return found


@dataclass(frozen=True)
class Limits:
    """How a selector is fitted: until seconds or steps end, whichever is first; blocks of each form a
    step."""

    seconds: float | None = None
    steps: int | None = None
    rate: float = 3e-3
    batch: int = _BATCH
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for limits by which nothing can be fitted."""
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value is not None and not 1 <= value <= MOST_STEPS:
                raise InputError(f"{name} is {quoted(value)}; 1 to {MOST_STEPS} was expected")
        if self.seconds is not None and not 0 < self.seconds < 1e9:
            raise InputError(f"seconds is {self.seconds}; above 0 was expected")
        if not 0 < self.rate < 1:
            raise InputError(f"lr is {self.rate}; above 0 and below 1 was expected")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}; 0 to {2**31 - 1} was expected")

    def share(self, step: int, seconds: float) -> float:
        """Of what is done."""
        of = [step / self.steps] if self.steps else []
        return max([*of, seconds / self.seconds] if self.seconds else of)


@dataclass(frozen=True)
class Fitted:
    """steps, the one that was best on the development texts, seconds, and the losses of both forms there,
    before and at the best step."""

    steps: int
    best: int
    seconds: float
    before: list[float]
    after: list[float]


def fit_selector(
    selector: Selector, data: Sequence[Data], dev: Sequence[Data], limits: Limits,
    tell: Callable[[int, float], None] = lambda step, loss: None, every: int = _EVERY,
) -> Fitted:  # fmt: skip
    """Minimise the sum of both forms' losses by AdamW, decay 0.1 of the matrices, a cosine over the limits.
    What was best on the development texts is kept. tell: called with steps and the loss there at every
    look."""
    matrices = [selector.front, selector.behind, selector.gate]
    others = [selector.places, selector.calibration]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=limits.rate, betas=(0.9, 0.95),
    )  # fmt: skip
    device = data[0].weight.device
    generator = torch.Generator(device).manual_seed(limits.seed)
    before = best = losses(selector, dev)
    kept, best_at, step, began = _copied(selector), 0, 0, time.perf_counter()
    share = 0.0
    while share < 1:
        for group in optimizer.param_groups:
            warm = min(1, step / 50 + 0.02)
            group["lr"] = limits.rate * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
        parts = []
        for form, mine in zip(FORMS, data, strict=True):
            count = min(limits.batch, len(mine.weight))
            some = torch.randint(len(mine.weight), (count,), generator=generator, device=device)
            parts.append(selector.loss(form, mine, some))
        sum(parts[1:], parts[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        share = limits.share(step, time.perf_counter() - began)
        if step % every == 0 or share >= 1:
            now = losses(selector, dev)
            tell(step, sum(now))
            if sum(now) < sum(best):
                best, best_at, kept = now, step, _copied(selector)
    selector.load_state_dict(kept)
    return Fitted(step, best_at, time.perf_counter() - began, before, best)


def _copied(selector: Selector) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in selector.state_dict().items()}
