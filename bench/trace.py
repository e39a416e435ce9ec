"""Record a trace: tokens that a cycle of each kind would keep at each position of texts.

What lookup would draft follows from the recorded text alone: its twin is asked at each token.

`python -m bench.decode --replay TRACE` states the speed of larger models with it. Also counted: how often
first candidates are right by offset, with blocks that know their root and with blocks anchored one position
earlier, and at which candidate the truth is where the first one fails (bench/strong.py)."""

from __future__ import annotations

import argparse
import heapq
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from orthrus_kernels import Sampling
from orthrus_kernels.layout import State
from orthrus_kernels.lookup import lookup
from orthrus_kernels.sampling import correction_scale
from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.cycle import LOOKUP_ROWS
from qwen3_model.decode.one_pass import NODES
from qwen3_model.lattice import Candidates, lattice
from qwen3_model.prompts import read_prompts
from qwen3_model.request import block_rows

from . import report, trace_file
from .budget import SEED, SETS, prompt_sets
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line
from .trace_file import CHAIN, KINDS, LOOKUP, ONE_PASS, TREES, Tally, Text, Trace

COMMAND = "bench.trace"
_OFFSETS, _RANKS = 8, 6  # that are printed
GREEDY = Sampling()


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


def ranked(
    model: Qwen3, blocks: Candidates, roots: Sequence[int], known: bool, corrected: bool,
    sampling: Sampling = GREEDY,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(scores, order), both [N, P, K, K], of the candidates of N blocks under N roots; not corrected: as they
    are."""
    scores, ids, gates = blocks
    n, p, k = scores.shape
    if not corrected or model.bigram is None:
        plain, unmoved = scores.cpu().numpy()[:, :, None], np.arange(k)
        return np.broadcast_to(plain, (n, p, k, k)), np.broadcast_to(unmoved, (n, p, k, k))
    fronts = torch.tensor(roots, dtype=torch.int32, device=ids.device)
    scales = torch.tensor([correction_scale(sampling)], device=ids.device)
    temperatures = scales.new_full((1,), sampling.temperature)
    settings = scales, temperatures, torch.zeros_like(fronts)
    found = model.bigram.rerank(model.ops, scores, ids, gates, fronts, *settings, known)
    both, order = (x.cpu().numpy() for x in found)
    return both, order


def looked_up(tokens: Sequence[int], first: int) -> list[int]:
    """Tokens that a lookup cycle keeps whose root is token `first` of these, or a later one but the last:
    the root's, and what lookup drafts from the tokens up to the root, as far as it is what follows."""
    drafted = LOOKUP_ROWS - 1
    text = torch.tensor([*tokens, *[-1] * drafted])  # -1: behind the end no draft is right
    roots = torch.arange(first, len(tokens) - 1)
    # as if each root were that of a text in a slot of its own
    state = torch.zeros(len(roots), len(State), dtype=torch.int32)
    state[:, State.START] = roots
    drafts = torch.zeros(len(roots), drafted, dtype=torch.int64)
    history = text.int().expand(len(roots), -1)
    lookup(history, state, torch.arange(len(roots)), drafts, torch.zeros(drafts.shape))
    right = drafts == text.unfold(0, drafted, 1)[roots + 1]
    return (1 + right.long().cumprod(1).sum(1)).tolist()


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
        kept[LOOKUP] = looked_up(whole, n)
        for size in self.sizes if len(text) > 1 else ():
            blocks = lattice(model, cache, whole, n - 1, len(whole) - 1, size, s)
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
        mine, roots = blocks.under_roots(known), text[:-1]
        names = mine.ids.tolist()
        orders = [corrected for corrected in (False, True) if self.model.bigram or not corrected]
        for corrected in orders:
            trees = ranked(self.model, mine, roots, known, corrected, self.sampling)
            tally = self.tallies[size, known, corrected]
            for i in range(len(roots)):
                tree = trees[0][i], trees[1][i]
                truth = text[i + 1 : i + 1 + len(names[i])]
                ranks = ranks_of(names[i], tree[1], truth)
                tally.add(ranks, len(truth))
                if known and size == self.rows and corrected == orders[-1]:
                    kept[CHAIN].append(1 + next((d for d, rank in enumerate(ranks) if rank), len(ranks)))
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --prompts 100 --tokens 256 --json runs/trace.json",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, metavar="PROMPTS.jsonl",
                        help="a prompt a line (default: embedded held-out ones)")  # fmt: skip
    parser.add_argument(
        "--set", choices=SETS, help="the prompts and the temperature of a set of bench.budget"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of the texts (default: 0, greedy)")
    parser.add_argument("--model", default=EMBEDDED, help="an Orthrus-Qwen3: folder or hub id")
    parser.add_argument("--device", help="cuda, cpu (default: CUDA if there)")
    parser.add_argument("--dtype", help="float32, bfloat16 (default: the checkpoint's on CUDA)")
    parser.add_argument("--backend", default="auto", help="reference, triton, torch or auto")
    parser.add_argument("--prompts", type=positive, default=100, metavar="N", help="default: 100")
    parser.add_argument("--skip", type=positive, metavar="N", help="leave out the first N prompts")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="of a text (default: 256)")
    parser.add_argument("--blocks", nargs="*", type=positive, default=[16, 24], metavar="ROWS",
                        help="further sizes of blocks to count agreement of (default: 16 24)")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the trace to FILE")
    given = parser.parse_args(arguments)
    if given.set and (given.file or given.skip or given.temperature is not None):
        parser.error("--set has prompts and a temperature of its own: give it alone")
    began, skip = time.perf_counter(), given.skip or 0
    try:
        sampling = _sampling(given.temperature or 0.0)
        file, split = (given.file, None) if given.file else (EMBEDDED / "held_out.jsonl", "test")
        texts = [] if given.set else read_prompts(file, skip + given.prompts, split=split)[skip:]
        if not (texts or given.set):
            raise InputError(f"--skip {skip} leaves none of the prompts of {file}")
        model = Qwen3.from_pretrained(given.model, given.device, given.dtype, given.backend)
        if model.text is None:
            raise InputError("this checkpoint has no tokenizer.json, which prompts need")
        name = "embedded" if given.model == EMBEDDED else str(given.model)
        prompts = [model.text.encode(text) for text in texts]
        if skip:
            name += f", from prompt {skip + 1}"
        if given.temperature:
            name += f", T {given.temperature:g}"
        if given.set:
            chosen = next(of for of in prompt_sets(model, given.prompts) if of.name == given.set)
            prompts, name, sampling = chosen.prompts, f"{name}, {given.set}", _sampling(chosen.temperature)
        trace = record(model, prompts, given.tokens, name, given.blocks, _said, sampling)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    trace.made = {
        "machine": facts, "dtype": str(model.dtype).removeprefix("torch."), "backend": model.backend,
        "tokens": given.tokens,
    }  # fmt: skip
    report.print_tables(tables(trace))
    print(f"{model.dtype}, {model.backend}, {machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        trace_file.write(given.json, trace)
    return 0


def _sampling(temperature: float) -> Sampling:
    """Raises InputError for a temperature that cannot be."""
    try:
        return Sampling(temperature=temperature, seed=SEED)
    except ValueError as error:
        raise InputError(str(error)) from None


def tables(trace: Trace) -> list[tuple[str, list[str], list[list[str]]]]:
    """Means by kind, agreement by offset, ranks of misses."""
    passes = dict.fromkeys(trace.kinds, 2) | dict.fromkeys((ONE_PASS, LOOKUP), 1)
    said = trace.simulated or f"recorded from {trace.checkpoint}"
    lines = [
        [f"tree {kind}" if kind in map(str, TREES) else kind, f"{trace.mean(kind):.3f}",
         f"{trace.mean(kind) / passes[kind]:.3f}"]
        for kind in trace.kinds
    ]  # fmt: skip
    kept = f"cycles followed through {len(trace.texts)} texts, {said}", ["kind", "tokens/cycle", "a forward"]
    if not trace.tallies:
        return [(*kept, lines)]
    found = []
    for t in trace.tallies:
        shares = t.agreement()[:_OFFSETS]
        blocks = f"blocks of {t.rows}, {'at the root' if t.knows_root else 'one earlier'}"
        found.append([
            blocks + (", corrected" if t.corrected else ""),
            *(f"{share:.2f}" for share in shares), *[""] * (_OFFSETS - len(shares)),
            *(f"{share:.2f}" for share in (*t.shares()[:_RANKS], t.shares()[-1])),
        ])  # fmt: skip
    head = ["first candidates right at offset", *map(str, range(1, _OFFSETS + 1)),
            *(f"miss: {rank}." for rank in range(2, _RANKS + 2)), "none"]  # fmt: skip
    return [(*kept, lines), ("agreement while all before agreed; rank of the truth at a miss", head, found)]


def _said(done: int, of: int) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        end = "" if done < of else "\n"
        print(f"\r  {done} of {of} prompts   ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
