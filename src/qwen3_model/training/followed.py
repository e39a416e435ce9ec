"""What drafts keep along texts, all cycles at once on tensors: a batch of texts on the training network.

`bench.trace` and `bench.oracle` follow one text at a time through the model that decodes. A selector's data,
and an experiment that compares trained views or scores, need the same counts of many texts in seconds on a
GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from orthrus_kernels import backend_ops

from ..bigram import Bigram
from ..errors import InputError
from ..lattice import walked
from .network import Network, diffusion_blocks
from .rollout import lengths

K = 16  # candidates of a position
AT_ONCE = 8  # blocks of a text in one pass
TEXTS_AT_ONCE = 512
_DRAFTS = {"cuda": 16384}  # whose trees grow together; elsewhere:
_CPU_DRAFTS = 1024
_OPS = backend_ops("torch")  # its products are the trainings', and its `rerank` the twin


@dataclass(frozen=True)
class Texts:
    """ids [B, T]: prompts, texts behind them and more. starts [B]: where the texts begin. counts [B]: their
    tokens, the first end token with them."""

    ids: Tensor
    starts: Tensor
    counts: Tensor


@torch.no_grad()
def greedy_texts(network: Network, prompts: Sequence[Sequence[int]], tokens: int, spare: int) -> Texts:
    """Greedy texts of `tokens` tokens at most behind prompts of any lengths, and `spare` tokens behind them.
    Prompts are read with the texts of shorter ones, a token a pass. Texts that end at once are left out, as
    they have no cycles. Raises InputError where the context is too short, and where no text is left."""
    device, sizes = network.frequencies.device, [len(prompt) for prompt in prompts]
    first, last = min(sizes), max(sizes)
    if last + tokens + spare > network.config.context_length:
        raise InputError(
            f"a prompt of {last} tokens and {tokens + spare} behind it do not fit into the context of "
            f"{network.config.context_length}"
        )
    given = torch.zeros(len(prompts), last, dtype=torch.long)
    for row, prompt in zip(given, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    given, starts = given.to(device), torch.tensor(sizes, device=device)
    text, step, past = given[:, :first], given[:, :first], None
    for at in range(first, last + tokens + spare):
        states, past = network.ar(step, past)
        step = network.head(states[:, -1:]).argmax(-1)
        if at < last:
            step = torch.where((at < starts)[:, None], given[:, at : at + 1], step)
        text = torch.cat([text, step], 1)
    behind = starts[:, None] + torch.arange(tokens, device=device)
    counts = lengths(text.gather(1, behind), network.config.eos_token_ids)
    if not (counts > 1).any():
        raise InputError("every text ended at once: give other prompts")
    return Texts(*(t[counts > 1] for t in (text, starts, counts)))


@dataclass(frozen=True)
class Lattice:
    """Of B texts the blocks at N positions each. logs, ids [B, N, P, K]: candidates, likeliest first. fronts,
    truth [B, N, P]: the text's tokens in front of each proposed position and there, -1 behind its end. states
    [B, N, P, E]: behind the final norm, None where they were not kept."""

    logs: Tensor
    ids: Tensor
    fronts: Tensor
    truth: Tensor
    states: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in their order."""
        found = [self.logs, self.ids, self.fronts, self.truth]
        return found if self.states is None else [*found, self.states]

    def map(self, change: Callable[[Tensor], Tensor]) -> Lattice:
        """Every tensor changed alike."""
        return Lattice(*map(change, self.tensors))

    def some(self, index: slice | Tensor) -> Lattice:
        """Of the texts, or drafts, of an index."""
        return self.map(lambda t: t[index])


@torch.no_grad()
def lattice(
    network: Network, ids: Tensor, anchors: Tensor, ends: Tensor, size: int, depth: int, states: bool = False
) -> Lattice:
    """Of blocks of `size` rows at anchors [B, N] of texts [B, T] that end in front of positions ends [B], the
    first `depth` proposals."""
    some = zip(*(t.split(TEXTS_AT_ONCE) for t in (ids, anchors, ends)), strict=True)
    parts = [_of_some(network, i, a, e, size, depth, states) for i, a, e in some]
    return joined(parts, 0)


def joined(parts: Sequence[Lattice], dim: int) -> Lattice:
    """One lattice of several."""
    return Lattice(*(torch.cat(c, dim) for c in zip(*(p.tensors for p in parts), strict=True)))


def _of_some(
    network: Network, ids: Tensor, anchors: Tensor, ends: Tensor, size: int, depth: int, states: bool
) -> Lattice:
    _, context = network.ar(ids)
    found, offsets = [], torch.arange(depth + 1, device=ids.device)
    for some in anchors.split(AT_ONCE, 1):
        rows, positions, mask = diffusion_blocks(ids, some, size, network.config.mask_token_id)
        x = network.diffusion(rows, positions, context, mask).unflatten(1, (-1, size))[:, :, :depth]
        logits = network.head(x).float()
        likely = logits.topk(min(K, logits.shape[-1]), -1)
        logs = likely.values - logits.logsumexp(-1, keepdim=True)
        places = some[..., None] + offsets
        words = ids.gather(1, places.flatten(1).clamp(max=ids.shape[1] - 1)).view_as(places)
        words = torch.where(places < ends[:, None, None], words, -1)
        kept = network.model.norm(x) if states else None
        found.append(Lattice(logs, likely.indices, words[..., :-1], words[..., 1:], kept))
    return joined(found, 1)


@torch.no_grad()
def along(network: Network, texts: Texts, size: int, states: bool = False) -> Lattice:
    """A block at every token of texts but the last one."""
    longest = int(texts.counts.max())
    anchors = texts.starts[:, None] + torch.arange(max(longest - 1, 1), device=texts.ids.device)
    ends = texts.starts + texts.counts
    return lattice(network, texts.ids, anchors, ends, size, size - 1, states)


@dataclass(frozen=True)
class Drafts:
    """M drafts of some texts' cycles, in the order of the texts. logs, ids [M, P, K], fronts, truth [M, P],
    states [M, P, E] or None: as of `Lattice`; fronts[:, 0] are the roots. known: the blocks have seen them.
    each: drafts of every text; where they are not known, the first cycle of a text has none."""

    blocks: Lattice
    known: bool
    each: list[int]

    def parts(self) -> Iterator[Drafts]:
        """Few enough for their trees."""
        some = _DRAFTS.get(self.blocks.ids.device.type, _CPU_DRAFTS)
        for at in range(0, len(self.blocks.truth), some):
            yield replace(self, blocks=self.blocks.some(slice(at, at + some)))

    @property
    def ranks(self) -> Tensor:
        """Which candidate the truth is, [M, P]: K for none, -1 unknown."""
        same = self.blocks.ids == self.blocks.truth[..., None]
        found = torch.where(same.any(-1), same.int().argmax(-1), same.shape[-1])
        return torch.where(self.blocks.truth < 0, -1, found)


def drafts_of(blocks: Lattice, counts: Tensor, known: bool) -> Drafts:
    """The drafts of two-pass cycles (known) or of one-pass cycles, whose blocks stand one position before
    their roots, so that their first proposals are dropped. blocks: `along` texts of `counts` tokens."""
    each = (counts - (1 if known else 2)).clamp(min=0)
    there = torch.arange(blocks.truth.shape[1], device=counts.device) < each[:, None]
    flat = blocks.map(lambda t: t[there] if known else t[there][:, 1:])
    return Drafts(flat, known, each.tolist())


# Of drafts: scores [M, P, K, K], likeliest first, and which candidate each is, as of `rerank`.
Ranked = Callable[[Drafts], tuple[Tensor, Tensor]]


def by_tables(tables: Bigram) -> Ranked:
    """As decoding ranks a greedy text's drafts by tables, which a selector may stand beside."""

    def ranked(drafts: Drafts) -> tuple[Tensor, Tensor]:
        b = drafts.blocks
        one, none = b.logs.new_ones(1), b.logs.new_zeros(1)
        slots = torch.zeros(len(b.truth), dtype=torch.int32, device=b.ids.device)
        roots = b.fronts[:, 0].clamp(min=0).int()
        gates = None
        if tables.gate is not None and b.states is not None:
            gates = tables.gates(_OPS, b.states.flatten(0, 1).to(tables.gate.weight.dtype))
        return tables.rerank(_OPS, b.logs, b.ids, gates, roots, one, none, slots, drafts.known)

    return ranked


def places(order: Tensor, ranks: Tensor) -> Tensor:
    """Where the text's token stands among the candidates behind the text's token before, [M, P]; -1 from the
    first that is no candidate on. order [M, P, K, K], ranks [M, P]."""
    width = order.shape[-1]
    right = ((ranks >= 0) & (ranks < width)).int().cumprod(1).bool()
    which = ranks.clamp(0, width - 1)
    before = torch.cat([torch.zeros_like(which[:, :1]), which[:, :-1]], 1)
    behind = order.gather(2, before[..., None, None].expand(-1, -1, 1, width))[:, :, 0]
    found = (behind == which[..., None]).int().argmax(-1)
    return torch.where(right, found, -1)


def grown(
    scores: Tensor, order: Tensor, truth: Tensor, nodes: int, anchors: int | None = None
) -> tuple[Tensor, Tensor]:
    """The trees of `nodes` nodes that `draft_tree` grows of ranked candidates, M of them side by side.

    truth: of `places`. Returns the number, from 1 on, of the node at which the text goes on at each depth,
    [M, P], 0 where the tree has none; and whether a block stands where the text leaves the tree, [M], if
    blocks stand at `anchors` nodes, those of `choose_anchors`, all of them for None."""
    m, depths, width = scores.shape[:3]
    lines, every = scores.reshape(m, -1), torch.arange(m, device=scores.device)
    orders = order.reshape(m, -1)
    frontier = scores.new_full((m, 2 * nodes + 1), float("-inf"))
    # of what stands in the frontier: depth, candidate in front, rank, node in front, whether the text's
    about = torch.zeros(m, 2 * nodes + 1, 5, dtype=torch.long, device=scores.device)
    bases = scores.new_zeros(m, 2 * nodes + 1)
    frontier[:, 0], about[:, 0, 4] = lines[:, 0], 1
    reached = torch.zeros(m, depths, dtype=torch.long, device=scores.device)
    ends = scores.new_zeros(m, nodes + 1)  # a node's own probability, less its children's
    ends[:, 0] = 1
    for node in range(1, nodes + 1):
        score, at = frontier.max(1)
        there = score > float("-inf")
        depth, front, rank, parent, on_path = about[every, at].unbind(-1)
        base = bases[every, at]
        frontier[every, at] = float("-inf")
        taken = there & (on_path > 0) & (truth.gather(1, depth[:, None])[:, 0] == rank)
        reached[every, depth] = torch.where(taken, node, reached[every, depth])
        chance = torch.where(there, score.exp(), 0.0)
        ends[:, node] = chance
        ends[every, parent] -= chance
        line = (depth * width + front) * width
        further = there & (rank + 1 < width)
        next_score = base + lines.gather(1, (line + (rank + 1).clamp(max=width - 1))[:, None])[:, 0]
        frontier[:, 2 * node - 1] = torch.where(further, next_score, float("-inf"))
        about[:, 2 * node - 1] = torch.stack([depth, front, rank + 1, parent, on_path], -1)
        bases[:, 2 * node - 1] = base
        which = orders.gather(1, (line + rank)[:, None])[:, 0].long()
        deeper, below = there & (depth + 1 < depths), (depth + 1).clamp(max=depths - 1)
        first = score + lines.gather(1, ((below * width + which) * width)[:, None])[:, 0]
        frontier[:, 2 * node] = torch.where(deeper, first, float("-inf"))
        number = torch.full_like(depth, node)
        about[:, 2 * node] = torch.stack([below, which, torch.zeros_like(rank), number, taken.long()], -1)
        bases[:, 2 * node] = score
    left = reached.max(1).values  # nodes of a path are numbered from the root down
    if anchors is None:
        return reached, torch.ones_like(left, dtype=torch.bool)
    mine = ends.gather(1, left[:, None])
    numbers = torch.arange(nodes + 1, device=scores.device)
    likelier = (ends > mine) | ((ends == mine) & (numbers < left[:, None]))
    return reached, likelier.sum(1) < anchors


@dataclass(frozen=True)
class Kept:
    """By the nodes of a tree, 0 for a chain: the proposals that every cycle of every text would keep.
    placed: of the largest tree, whether a block stands where the text leaves it. first [P, 2]: how often the
    first candidate behind the text's token is right, and how often that token was a candidate."""

    kept: dict[int, list[list[int]]]
    placed: list[list[bool]]
    known: bool
    first: np.ndarray

    def pairs(self, nodes: int) -> np.ndarray:
        """(tokens, cycles) of each text, [B, 2]."""
        texts = self.kept[nodes]
        if self.known:
            return np.array([walked(kept) for kept in texts])
        return np.array([
            passed(kept, placed) for kept, placed in zip(texts, self.placed, strict=True)
        ])  # fmt: skip


def passed(kept: Sequence[int], placed: Sequence[bool]) -> tuple[int, int]:
    """(tokens, cycles) of a text whose cycles have one pass. kept[i], placed[i]: of the root behind root i.
    The first cycle has no draft, nor has one behind a cycle that ended where no block stood; then one stands
    at the root."""
    at = cycles = 0
    drafted = False
    while at <= len(kept):
        mine = drafted and at > 0
        run, drafted = (kept[at - 1], placed[at - 1]) if mine else (0, True)
        at, cycles = at + min(run, len(kept) - at) + 1, cycles + 1
    return len(kept) + 1, cycles


@torch.no_grad()
def follow(drafts: Drafts, ranked: Ranked, nodes: Sequence[int], anchors: int | None = None) -> Kept:
    """What chains and trees of `nodes` nodes keep of drafts."""
    most, found = max(nodes, default=0), []
    depths = drafts.blocks.truth.shape[1]
    first = torch.zeros(depths, 2, dtype=torch.long, device=drafts.blocks.truth.device)
    for part in drafts.parts():
        scores, order = ranked(part)
        ranks = part.ranks
        truth = places(order, ranks)
        reached, placed = grown(scores, order, truth, most, anchors)
        chain = (truth == 0).int().cumprod(1).sum(1)
        trees = [((reached > 0) & (reached <= n)).sum(1) for n in nodes]
        found.append(torch.stack([chain, *trees, placed.long()]))
        first += _first_right(order, ranks)
    table = torch.cat(found, 1).cpu().split(drafts.each, 1)
    columns = [[text[i].tolist() for text in table] for i in range(len(nodes) + 2)]
    kept = dict(zip((0, *nodes), columns, strict=False))
    placed_at = [[bool(x) for x in text] for text in columns[-1]]
    return Kept(kept, placed_at, drafts.known, first.cpu().numpy())


def _first_right(order: Tensor, ranks: Tensor) -> Tensor:
    width = order.shape[-1]
    before = torch.cat([torch.zeros_like(ranks[:, :1]), ranks[:, :-1]], 1)
    counts = (ranks >= 0) & (before >= 0) & (before < width)
    index = before.clamp(0, width - 1)[..., None, None].expand(-1, -1, 1, width)
    right = counts & (order.gather(2, index)[:, :, 0, 0] == ranks)
    return torch.stack([right.sum(0), counts.sum(0)], -1)
