"""A trace: how many tokens a cycle of each kind would keep if it began at a position of a recorded text.

Texts are known before: a block anchored at every position drafts in a few mixed passes what cycles would
draft there, and what the target would say is what comes next in the text: a sampled choice has the noise of
its position (orthrus_kernels/choice.py), whichever cycle asks. Kinds: "chain" is the first
candidate of each position; "15" to "127" are draft trees of so many nodes, of which the smaller ones are
prefixes; "one-pass" is that strategy's default tree, from a short block anchored one position earlier, which
has not seen the root. The end of a text matches no proposal."""

from __future__ import annotations

import heapq
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthrus_kernels import Rows, Sampling
from orthrus_kernels.choice import correction_scale
from qwen3_model import InputError, Qwen3
from qwen3_model.cli.output import write_atomically
from qwen3_model.decode.cycle import CANDIDATES
from qwen3_model.decode.one_pass import NODES
from qwen3_model.kv_cache import KVCache
from qwen3_model.request import block_rows

CHAIN, ONE_PASS = "chain", "one-pass"
TREES = (15, 31, 63, 127)  # nodes that are recorded: with the root they fill the kernels' tiles of rows
KINDS = (CHAIN, *map(str, TREES), ONE_PASS)
_ROWS = {"cuda": 4096}  # of a pass; elsewhere:
_CPU_ROWS = 512
_LOGITS = 1 << 28  # numbers of a pass's logits at most: 1 GiB
GREEDY = Sampling()


@dataclass(frozen=True)
class Text:
    """A recorded text behind a prompt. kept[kind][i]: tokens of a cycle whose root is its token i."""

    prompt_tokens: int
    kept: dict[str, list[int]]

    @property
    def tokens(self) -> int:
        """Of the text, the prompt's not counted."""
        return len(self.kept[CHAIN])


@dataclass
class Tally:
    """Where first candidates fail. rows: of the blocks. knows_root: or anchored one position earlier.
    corrected: candidates in the order of the bigram correction, behind the true token before.

    hits[d] of trials[d] cycles whose first d first candidates were right have the next one right as well.
    misses[r]: first misses at which the truth was candidate r + 1 behind the first; the last number: none of
    the candidates."""

    rows: int
    knows_root: bool
    corrected: bool
    hits: list[int] = field(default_factory=list)
    trials: list[int] = field(default_factory=list)
    misses: list[int] = field(default_factory=lambda: [0] * CANDIDATES)

    def add(self, ranks: Sequence[int], count: int) -> None:
        """One cycle: `ranks_of` its truth of `count` tokens."""
        right = next((d for d, rank in enumerate(ranks) if rank), len(ranks))
        for numbers, n in ((self.hits, right), (self.trials, min(right + 1, count))):
            numbers += [0] * (n - len(numbers))
            for d in range(n):
                numbers[d] += 1
        if right < count:
            self.misses[ranks[right] - 1 if right < len(ranks) else -1] += 1

    def agreement(self, least: int = 100) -> list[float]:
        """Share of hits by offset, as far as there are `least` trials."""
        hits = [*self.hits, *[0] * (len(self.trials) - len(self.hits))]
        return [a / b for a, b in zip(hits, self.trials, strict=True) if b >= least]

    def shares(self) -> list[float]:
        """`misses` as shares of all misses."""
        return [n / max(sum(self.misses), 1) for n in self.misses]


@dataclass
class Trace:
    """Texts and tallies of a checkpoint. simulated: the model that made it up, in words; None: recorded."""

    checkpoint: str
    block_rows: int
    one_pass_rows: int
    bigram: bool
    texts: list[Text]
    tallies: list[Tally]
    simulated: str | None = None
    made: dict[str, Any] = field(default_factory=dict)  # machine, dtype, command
    temperature: float = 0.0

    @property
    def says(self) -> str:
        """What every figure that rests on it must say."""
        return "simulated acceptance" if self.simulated else "acceptance replayed"

    def tally(self, rows: int, knows_root: bool, corrected: bool) -> Tally:
        """Raises InputError when it was not recorded."""
        wanted = rows, knows_root, corrected
        for t in self.tallies:
            if (t.rows, t.knows_root, t.corrected) == wanted:
                return t
        raise InputError(f"the trace has no tally of {wanted}: record it with --blocks {rows}")

    def mean(self, kind: str) -> float:
        """Tokens a cycle, cycle after cycle through all texts."""
        steps = [followed(text, kind) for text in self.texts]
        return sum(sum(kept) for kept in steps) / max(sum(map(len, steps)), 1)


def followed(text: Text, kind: str) -> list[int]:
    """Tokens of each cycle of one kind, from the first root to the end. The first one-pass cycle of a text
    has no draft; every later one has, as if a block stood at each node."""
    kept, at, found = text.kept[kind], 0, list[int]()
    while at < text.tokens - 1:
        found.append(1 if kind == ONE_PASS and not found else min(kept[at], text.tokens - 1 - at))
        at += found[-1]
    return found


def write(path: Path, trace: Trace) -> None:
    """As JSON on one line."""
    write_atomically(path, json.dumps(asdict(trace), allow_nan=False, separators=(",", ":")) + "\n")


def read(path: Path) -> Trace:
    """Raises InputError for what is no trace."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        texts = [Text(**text) for text in found.pop("texts")]
        tallies = [Tally(**tally) for tally in found.pop("tallies")]
        trace = Trace(texts=texts, tallies=tallies, **found)
        sizes = [{len(text.kept[kind]) for kind in KINDS} for text in texts]
        if not texts or any(len(size) != 1 for size in sizes):
            raise ValueError("no texts, or tables of several lengths")
        _check(trace)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no trace ({error}): python -m bench.trace records one") from None
    return trace


def _check(trace: Trace) -> None:
    """Raises ValueError for numbers that no recording gives."""
    numbers = [trace.block_rows, trace.one_pass_rows]
    for text in trace.texts:
        numbers += [text.prompt_tokens, *(n for kept in text.kept.values() for n in kept)]
    if any(type(n) is not int or n < 1 for n in numbers):
        raise ValueError("whole numbers above 0 were expected")
    if type(trace.temperature) not in (int, float) or trace.temperature > 1e30:
        raise ValueError("a temperature is a number")
    Sampling(temperature=trace.temperature)
    for tally in trace.tallies:
        counts = [*tally.hits, *tally.trials, *tally.misses]
        if any(type(n) is not int or n < 0 for n in counts) or type(tally.rows) is not int:
            raise ValueError("tallies are of whole numbers")
        if tally.rows < 2 or len(tally.hits) > len(tally.trials):
            raise ValueError("a tally has fewer trials than hits, or no rows")
    shape = trace.made.get("one_pass")
    if shape is not None and set(shape) != {"nodes", "anchors", "block", "width"}:
        raise ValueError("a shape of one-pass cycles has nodes, anchors, block and width")


def ranks_of(ids: Sequence[Sequence[int]], order: np.ndarray, truth: Sequence[int]) -> list[int]:
    """The rank of each token of the truth among its position's candidates behind the true token before, up to
    the first that is none of them. ids [P, K]; order [P, K, K] as of `rerank`."""
    found, before = list[int](), 0
    for names, orders, token in zip(ids, order, truth, strict=False):
        if token not in names:
            break
        which = names.index(token)
        found.append(orders[before].tolist().index(which))
        before = which
    return found


def indices(scores: np.ndarray, order: np.ndarray, ranks: Sequence[int], nodes: int) -> list[int]:
    """Indices of the nodes of a path in the tree of `nodes` nodes that `draft_tree` would grow, as far as it
    goes. scores, order [P, K, K]; ranks: of the path, from the root down."""
    depths, width, _ = scores.shape
    single, rows = struct.Struct("f"), dict[int, list[float]]()  # sums are rounded to fp32

    def row(depth: int, which: int) -> list[float]:
        key = depth * width + which
        if key not in rows:
            rows[key] = scores[depth, which].tolist()
        return rows[key]

    found, known = list[int](), 1
    # (-score, when it was known, score of the parent, its depth, which candidate it is, rank, parent on path)
    frontier = [(-row(0, 0)[0], 0, 0.0, 0, 0, 0, True)]
    for index in range(1, nodes + 1):
        if not frontier or len(found) == len(ranks):
            break
        score, _, base, depth, which, rank, on_path = heapq.heappop(frontier)
        if score == float("inf"):
            break
        taken = on_path and rank == ranks[depth]
        if taken:
            found.append(index)
        if rank + 1 < width:
            (sibling,) = single.unpack(single.pack(base + row(depth, which)[rank + 1]))
            heapq.heappush(frontier, (-sibling, known, base, depth, which, rank + 1, on_path))
            known += 1
        if depth + 1 < depths:
            child = int(order[depth, which, rank])
            (first,) = single.unpack(single.pack(row(depth + 1, child)[0] - score))
            heapq.heappush(frontier, (-first, known, -score, depth + 1, child, 0, taken))
            known += 1
    return found


Candidates = tuple[Tensor, Tensor]  # of N blocks: log-probabilities [N, P, K] fp32 and ids [N, P, K] int64


def drafts(
    model: Qwen3, cache: KVCache, whole: Sequence[int], first: int, last: int, size: int, sampling: Sampling
) -> Candidates:
    """Candidates of a block of `size` rows anchored at each position from first to before last. The cache
    holds all of `whole`; only its length is changed."""
    found, width = list[Candidates](), min(CANDIDATES, model.config.vocab_size)
    most = min(_ROWS.get(model.device.type, _CPU_ROWS), _LOGITS // model.config.vocab_size)
    anchors = max(most // (size + 1), 1)
    for start in range(first, last, anchors):
        tokens = whole[start : min(start + anchors, last)]
        n, cache.lengths[0] = len(tokens), start
        rows = Rows.tree_with_blocks(
            tokens, range(-1, n - 1), start, range(n), size, model.config.mask_token_id or 0
        )
        wanted = [n + block * size + i for block in range(n) for i in range(size - 1)]
        logits = model.forward(rows, cache, logits_of=wanted, repeats=False).logits
        positions = torch.tensor([rows.positions[row] + 1 for row in wanted], device=model.device)
        scores, ids = model.ops.candidates(logits, positions, sampling, width)
        shape = n, size - 1, width
        found.append((scores.view(shape), ids.view(shape)))
    scores, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, ids


def ranked(
    model: Qwen3, blocks: Candidates, roots: Sequence[int], known: bool, corrected: bool,
    sampling: Sampling = GREEDY,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(scores, order), both [N, P, K, K], of the candidates of N blocks under N roots; not corrected: as they
    are. One `rerank` for all, each block behind a row that holds nothing but its root."""
    scores, ids = blocks
    n, p, k = scores.shape
    if not corrected or model.bigram is None:
        plain, unmoved = scores.cpu().numpy()[:, :, None], np.arange(k)
        return np.broadcast_to(plain, (n, p, k, k)), np.broadcast_to(unmoved, (n, p, k, k))
    tables, scale = model.bigram, torch.tensor([correction_scale(sampling)], device=ids.device)
    front = torch.zeros(1, dtype=torch.int32, device=ids.device)
    above = torch.tensor(roots, device=ids.device)[:, None, None].expand(n, 1, k)
    lines = torch.cat([scores[:, :1], scores], 1).flatten(0, 1), torch.cat([above, ids], 1).flatten(0, 1)
    found = model.ops.rerank(*lines, front, tables.before, tables.after, scale, False)
    both, order = (x.view(n, p + 1, k, k)[:, 1:].cpu().numpy() for x in found)
    if known:  # the first position keeps its scores
        none = torch.zeros_like(tables.before)
        first = scores[:, 0].contiguous(), ids[:, 0].contiguous()
        found = model.ops.rerank(*first, front, none, none, scale, False)
        both[:, 0], order[:, 0] = (x.cpu().numpy() for x in found)
    return both, order


@dataclass(frozen=True)
class Recorder:
    """Records texts of one model. rows: of the blocks; short: of those of one-pass cycles; sizes: all that
    are tallied. sampling: temperature and seed alone."""

    model: Qwen3
    rows: int
    short: int
    sizes: list[int]
    tallies: dict[tuple[int, bool, bool], Tally]
    sampling: Sampling

    @staticmethod
    def of(model: Qwen3, also: Sequence[int] = (), sampling: Sampling = GREEDY) -> Recorder:
        """also: sizes of blocks. Raises InputError for a model whose blocks are smaller, or below 3 rows."""
        short, rows = block_rows(model.config, None, "one-pass"), model.config.block_size
        sizes = sorted({rows, short, *(block_rows(model.config, size, "one-pass") for size in also)})
        kinds = [(size, known, corrected) for size in sizes for known in (True, False)
                 for corrected in (False, True) if model.bigram or not corrected]  # fmt: skip
        return Recorder(model, rows, short, sizes, {kind: Tally(*kind) for kind in kinds}, sampling)

    @torch.inference_mode()
    def text(self, prompt: Sequence[int], tokens: int) -> Text:
        """Decode `tokens` behind a prompt and see what cycles at each of them keep."""
        model, s = self.model, self.sampling
        result = model.generate(prompt, "two-pass", tokens, temperature=s.temperature, seed=s.seed)
        text = result.whole().token_ids
        whole, n = [*prompt, *text], len(prompt)
        cache = model.new_cache(len(whole) + self.rows)
        model.prefill(whole, cache)
        kept: dict[str, list[int]] = {kind: [] for kind in KINDS}
        for size in self.sizes if len(text) > 1 else ():
            blocks = drafts(model, cache, whole, n - 1, len(whole) - 1, size, s)
            for known in (True, False):
                self._follow(text, blocks, size, known, kept)
        for counts in kept.values():
            counts.append(1)  # of the last token, behind which nothing is known
        return Text(n, kept)

    def _follow(
        self, text: Sequence[int], blocks: Candidates, size: int, known: bool, kept: dict[str, list[int]]
    ) -> None:
        """What is kept with blocks of one size, anchored at the roots, or one position earlier, where the
        first proposal stands in the root's place; blocks[i + 1] stands at text[i]."""
        scores, ids = (x[1:] if known else x[:-1, 1:] for x in blocks)
        names, roots = ids.tolist(), text[:-1]
        orders = [corrected for corrected in (False, True) if self.model.bigram or not corrected]
        for corrected in orders:
            trees = ranked(self.model, (scores, ids), roots, known, corrected, self.sampling)
            tally = self.tallies[size, known, corrected]
            for i in range(len(roots)):
                tree = trees[0][i], trees[1][i]
                truth = text[i + 1 : i + 1 + ids.shape[1]]
                ranks = ranks_of(names[i], tree[1], truth)
                tally.add(ranks, len(truth))
                if known and size == self.rows and not corrected:
                    kept[CHAIN].append(1 + next((d for d, rank in enumerate(ranks) if rank), len(ranks)))
                if known and size == self.rows and corrected == orders[-1]:
                    path = indices(*tree, ranks, TREES[-1])
                    for nodes in TREES:
                        kept[str(nodes)].append(1 + sum(node <= nodes for node in path))
                if not known and size == self.short and corrected == orders[-1]:
                    kept[ONE_PASS].append(1 + len(indices(*tree, ranks, NODES)))


def record(
    model: Qwen3, prompts: Sequence[Sequence[int]], tokens: int, checkpoint: str, also: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, of: None, sampling: Sampling = GREEDY,
) -> Trace:  # fmt: skip
    """The trace of `tokens` tokens behind each prompt. also: further sizes of blocks to tally. sampling:
    temperature and seed alone. Raises InputError, with the prompt's number."""
    recorder, texts = Recorder.of(model, also, sampling), list[Text]()
    for i, prompt in enumerate(prompts):
        try:
            texts.append(recorder.text(prompt, tokens))
        except InputError as error:
            raise InputError(f"prompt {i + 1}: {error}") from None
        progress(i + 1, len(prompts))
    return Trace(checkpoint, recorder.rows, recorder.short, model.bigram is not None, texts,
                 list(recorder.tallies.values()), temperature=sampling.temperature)  # fmt: skip
