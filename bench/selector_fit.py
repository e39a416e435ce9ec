"""A selector of draft candidates, gated by the view's state, and how it is fitted on text that the target
writes: the bigram correction's tables (orthrus_kernels/rerank.py), and beside them

    change[p, a, c] = u[a] . w[c] + (A e[a] * (1 + G h[p] + o[p])) . (B e[c])

e: embedding rows, h[p]: the view's state behind the final norm, o: of the position. A two-pass and a one-pass
cycle, whose block has not seen its root, have factors, weights of the rest and o of their own. The loss is
the cross-entropy of the text's own token among the candidates and the rest. A token that is no candidate
trains the rest: at decoding it cannot be drafted."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen3_model.training.calibration import BESIDE, Blocks, fit
from qwen3_model.training.network import Network
from qwen3_model.training.pretrain import autocast
from qwen3_model.training.rollout import lengths, rollout

from .followed import Drafts, Lattice, Ranked, along, drafts_of, follow, greedy_texts, joined, lattice

FORMS = TWO_PASS, ONE_PASS = 0, 1
DEPTHS = 15, 6  # offsets that are fitted of each form: 15 of a long block, all of a one-pass block of 8 rows
ONE_PASS_ROWS = 8
NODES = 63, 19  # of the trees whose cycles say which blocks count
DECAY = 0.85  # of the loss from one offset to the next
_LEAST_REST = 1e-6  # as in rerank.py
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
    for form, rows in zip(FORMS, (size, min(ONE_PASS_ROWS, size)), strict=True):
        depth = min(DEPTHS[form] + (form == ONE_PASS), rows - 1)
        with autocast(text.device):
            blocks = lattice(network, text, anchors, ends, rows, depth, states=True)
        blocks = blocks.map(lambda t, form=form: t[:, :, form:].flatten(0, 1))
        data = data_of(blocks, [window] * len(text), form, ranked)
        found.append(Data(_small(data.blocks, network.config.vocab_size), data.weight, data.each))
    return found


def _small(blocks: Lattice, vocabulary: int) -> Lattice:
    """In half the memory."""
    number = torch.int16 if vocabulary < 2**15 else torch.int32
    assert blocks.states is not None
    ids, fronts, truth = (t.to(number) for t in (blocks.ids, blocks.fronts, blocks.truth))
    return Lattice(blocks.logs.half(), ids, fronts, truth, blocks.states.to(torch.bfloat16))


def put_together(parts: Sequence[list[Data]]) -> list[Data]:
    """The data of each form, of several recordings."""
    found = []
    for of in zip(*parts, strict=True):
        each = [count for part in of for count in part.each]
        found.append(Data(joined([p.blocks for p in of], 0), torch.cat([p.weight for p in of]), each))
    return found


def held_out(network: Network, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[Drafts], int]:
    """All drafts of the greedy texts behind prompts, of both forms, and the texts' tokens."""
    size = network.config.block_size
    texts = greedy_texts(network, prompts, tokens, size)
    found = [
        drafts_of(along(network, texts, rows, states=True), texts.counts, form == TWO_PASS)
        for form, rows in zip(FORMS, (size, min(ONE_PASS_ROWS, size)), strict=True)
    ]
    return found, int(texts.counts.sum())


class Selector(nn.Module):
    """rank 0: the tables alone. tables: whether they learn too."""

    embedding: Tensor

    def __init__(
        self, embedding: Tensor, before: Tensor, after: Tensor, calibration: Tensor, rank: int, tables: bool
    ) -> None:
        """embedding [V, E]; before, after [V, R']; calibration [2, D, 2]: what decoding has, at temperature 0
        and above."""
        super().__init__()
        self.rank, width = rank, embedding.shape[1]
        self.register_buffer("embedding", (embedding / embedding.std()).float())
        self.before = nn.Parameter(before.float().clone(), requires_grad=tables)
        self.after = nn.Parameter(after.float().clone(), requires_grad=tables)
        self.front = nn.Parameter(torch.randn(width, rank) * width**-0.5)  # A
        self.behind = nn.Parameter(torch.zeros(width, rank))  # B: the start changes nothing
        self.gate = nn.Parameter(torch.zeros(width, rank))  # G
        self.place = nn.Parameter(torch.zeros(len(FORMS), max(DEPTHS), rank))  # o
        start = [calibration[0, form : form + max(DEPTHS)].float() for form in FORMS]
        self.calibration = nn.Parameter(torch.stack(start))
        self.to(embedding.device)

    def change(self, form: int, fronts: Tensor, blocks: Lattice) -> Tensor:
        """fronts [M, P, A]: tokens in front of each position. Returns [M, P, A, K]; 0 where a block has seen
        its root."""
        ids = blocks.ids.long()
        found = torch.einsum("mpar,mpkr->mpak", self.before[fronts], self.after[ids])
        if self.rank:
            assert blocks.states is not None
            where = torch.arange(ids.shape[1], device=ids.device).clamp(max=DEPTHS[form] - 1)
            gate = 1 + blocks.states.float() @ self.gate + self.place[form, where]
            front = (self.embedding @ self.front)[fronts] * gate[:, :, None]
            found = found + torch.einsum("mpar,mpkr->mpak", front, (self.embedding @ self.behind)[ids])
        return torch.cat([torch.zeros_like(found[:, :1]), found[:, 1:]], 1) if form == TWO_PASS else found

    def scores(self, form: int, fronts: Tensor, blocks: Lattice) -> Tensor:
        """Log-probabilities [M, P, A, K + 1], the rest last."""
        where = torch.arange(blocks.ids.shape[1], device=fronts.device).clamp(max=DEPTHS[form] - 1)
        factor, weight = self.calibration[form, where].unbind(-1)  # [P]
        logs, rest = blocks.logs.float(), _rest(blocks.logs.float())
        x = (logs * factor[:, None])[:, :, None] + self.change(form, fronts, blocks)
        rest = (rest * factor + weight)[:, :, None, None].expand(*x.shape[:3], 1)
        return torch.log_softmax(torch.cat([x, rest], -1), -1)

    def loss(self, form: int, data: Data, some: Tensor | slice) -> Tensor:
        """The mean over what counts of some blocks, behind the text's own tokens."""
        blocks = data.blocks.map(lambda t: t[some])
        scores = self.scores(form, blocks.fronts.long().clamp(min=0)[..., None], blocks)[:, :, 0]
        said = Drafts(blocks, True, []).ranks.clamp(min=0)
        weight = data.weight[some]
        found = -scores.gather(-1, said[..., None])[..., 0]
        return (found * weight).sum() / weight.sum().clamp(min=1e-9)

    def ranked(self, drafts: Drafts) -> tuple[Tensor, Tensor]:
        """As `followed.Ranked`."""
        b = drafts.blocks
        fronts = b.fronts[:, :1, None].long().expand(-1, -1, b.ids.shape[-1])
        fronts = torch.cat([fronts, b.ids[:, :-1].long()], 1)
        scores = self.scores(TWO_PASS if drafts.known else ONE_PASS, fronts, b)[..., :-1]
        return scores.sort(dim=-1, descending=True, stable=True)

    @torch.no_grad()
    def calibrate(self, form: int, data: Data, texts: int) -> None:
        """Fit factors and weights of the rest anew, alone, on the first texts of the data."""
        count = sum(data.each[:texts])
        blocks = data.blocks.map(lambda t: t[:count])
        change = self.change(form, blocks.fronts.long().clamp(min=0)[..., None], blocks)[:, :, 0]
        found = _calibration(blocks, change, data.each[:texts])
        found = torch.cat([found, found[-1:].expand(max(DEPTHS) - len(found), -1)])
        self.calibration[form] = found.to(self.calibration.device)


def calibrated(drafts: Drafts, before: Tensor, after: Tensor) -> Tensor:
    """The calibration [P, 2] of two-pass drafts by tables [V, R], as training/calibration.py fits it."""
    b = drafts.blocks
    change = torch.einsum("mpr,mpkr->mpk", before[b.fronts.clamp(min=0)], after[b.ids])
    change[:, 0] = 0  # the block has seen its root
    return _calibration(b, change, drafts.each)


def _calibration(blocks: Lattice, change: Tensor, each: Sequence[int]) -> Tensor:
    logs, said = blocks.logs.float(), Drafts(blocks, True, []).ranks
    rest = _rest(logs)[..., None]
    tensors = torch.cat([logs, rest], -1), torch.cat([change, torch.zeros_like(rest)], -1), said
    split = zip(*(t.split(list(each)) for t in tensors), strict=True)
    with torch.enable_grad():
        return fit([Blocks(*text) for text in split])


def _rest(logs: Tensor) -> Tensor:
    return (1 - logs.exp().sum(-1)).clamp(min=_LEAST_REST).log()


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
class Fitted:
    """steps, the one that was best on the development texts, and the losses of both forms there, before and
    at the best step."""

    steps: int
    best: int
    before: list[float]
    after: list[float]


def fit_selector(
    selector: Selector, data: Sequence[Data], dev: Sequence[Data], seconds: float, rate: float, seed: int = 0,
    batch: int = _BATCH, every: int = _EVERY, steps: int | None = None,
) -> Fitted:  # fmt: skip
    """Minimise the sum of both forms' losses by AdamW, decay 0.1, cosine over the seconds, or over so many
    steps. What was best on the development texts is kept."""
    learning = [p for p in selector.parameters() if p.requires_grad and p.numel()]
    matrices = [p for p in (selector.front, selector.behind, selector.gate) if p.numel()]
    others = [p for p in learning if all(p is not m for m in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.95),
    )  # fmt: skip
    device = data[0].weight.device
    generator = torch.Generator(device).manual_seed(seed)
    before = best = losses(selector, dev)
    kept, best_at, step, began = _copied(selector), 0, 0, time.perf_counter()
    while (share := step / steps if steps else (time.perf_counter() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 50 + 0.02) * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
        parts = []
        for form, mine in zip(FORMS, data, strict=True):
            count = min(batch, len(mine.weight))
            some = torch.randint(len(mine.weight), (count,), generator=generator, device=device)
            parts.append(selector.loss(form, mine, some))
        sum(parts[1:], parts[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % every == 0:
            now = losses(selector, dev)
            if sum(now) < sum(best):
                best, best_at, kept = now, step, _copied(selector)
    selector.load_state_dict(kept)
    return Fitted(step, best_at, before, best)


def _copied(selector: Selector) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in selector.state_dict().items()}
