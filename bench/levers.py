"""Which training levers bring tokens a cycle? Each is taken alone beside the recipe, at equal steps, with
pairs of seeds; what a combination makes is another arm.

    recipe     a quarter of own text, weights 0.9^offset, KL, short blocks of 8 rows in every other step
    own        all of the text the base's own
    survival   offsets weighed by measured survival, at least 0.15
    ce         cross-entropy of the AR view's likeliest token
    short16    short blocks of 16 rows
    own+ce     and so on: several at once

All arms go on from the checkpoint's own diffusion view (--start ar: from its AR weights). So the checkpoint
would be made anew, and from the AR weights the minute or less that an arm has would show which lever learns
fastest, not which one ends best. Behind each training the bigram tables are learnt on alike, from those of
the checkpoint, and the scores are calibrated anew on greedy texts of the development prompts. Then cycles
are followed along greedy texts of the test prompts, which are the same for all arms: the AR view stays.

one-pass 16 is estimated twice: with blocks of 16 rows at every node of the tree of 19 (340 rows of a pass),
and at the 10 nodes for which 192 rows have room, as `--block-size 16` decodes. Gains are over the recipe,
all seeds together, with intervals paired by prompt."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthrus_kernels.rerank import LEAST_REST, changes
from qwen3_model import InputError, bigram
from qwen3_model.checkpoint import EMBEDDED, tensor_names
from qwen3_model.config import Qwen3Config
from qwen3_model.decode.one_pass import Shape
from qwen3_model.prompts import read_prompts
from qwen3_model.training.base import dev_prompts, document_end, load_tokenizer
from qwen3_model.training.bigram import learn_bigram
from qwen3_model.training.calibration import Blocks as Observed
from qwen3_model.training.calibration import fit
from qwen3_model.training.dataset import corpus_files, read_corpus
from qwen3_model.training.distill import Blocks, distill, start_from_ar
from qwen3_model.training.folder import load_network
from qwen3_model.training.followed import Drafts, Texts, along, by_tables, drafts_of, follow, greedy_texts
from qwen3_model.training.loop import Plan
from qwen3_model.training.memory import training_device
from qwen3_model.training.network import Network
from qwen3_model.training.objective import Objective
from qwen3_model.training.recipe import BIGRAM, BIGRAM_BLOCKS, BLOCKS, DISTILL, say
from qwen3_model.training.rollout import with_own_text

from . import report
from .bootstrap import gain, gain_interval, interval, ratio
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line
from .oracle import Table, of_drafts

COMMAND = "bench.levers"
LEVERS = "own", "survival", "ce", "short16"
RECIPE, QUARTER = "recipe", 0.25
RATE, BIGRAM_RATE = 2e-3, 2e-3  # peaks; the embedded checkpoint's last distillation had 2e-3
TREES = (31, 63)
REHEARSED = 24  # steps whose time says how many an arm gets


@dataclass(frozen=True)
class Arm:
    """A named combination of levers."""

    name: str

    @staticmethod
    def of(text: str) -> Arm:
        """As `--arms` has it: "recipe", or levers with a + between them."""
        parts = text.split("+")
        if text != RECIPE and (set(parts) - set(LEVERS) or len(set(parts)) < len(parts)):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {RECIPE!r} or some of {', '.join(LEVERS)} with a + between them"
            )
        return Arm(text)

    def has(self, lever: str) -> bool:
        return lever in self.name.split("+")

    @property
    def own_text(self) -> float:
        return 1.0 if self.has("own") else QUARTER

    @property
    def objective(self) -> Objective:
        return Objective("ce" if self.has("ce") else "kl", "survival" if self.has("survival") else "decay")

    def blocks(self, recipe: Blocks) -> Blocks:
        return dataclasses.replace(recipe, short=16) if self.has("short16") else recipe


@dataclass(frozen=True)
class Bench:
    """What all arms share. start: the `_diff` weights; tables: the correction to go on from; texts: training
    text by its share of own text; prompts [B, P]: for weights by survival; dev, test: greedy texts."""

    network: Network
    start: Mapping[str, Tensor]
    tables: bigram.Bigram
    texts: Mapping[float, Tensor]
    prompts: Tensor | None
    dev: Texts
    test: Texts
    plan: Plan
    blocks: Blocks
    correction: tuple[Plan, Blocks]

    def train(self, arm: Arm, steps: int, seed: int) -> tuple[float, list[float]]:
        """The arm's weights in the network. Returns seconds, and the chances measured for its weights."""
        with torch.no_grad():
            for name, weight in self.network.named_parameters():
                if name in self.start:
                    weight.copy_(self.start[name])
        plan = dataclasses.replace(self.plan, steps=steps, seed=seed)
        kept: dict[str, list[float]] = {}
        _, seconds = distill(
            self.network, self.texts[arm.own_text], plan, arm.blocks(self.blocks),
            objective=arm.objective, prompts=self.prompts, kept=kept,
        )  # fmt: skip
        return seconds, next(iter(kept.values()), [])

    def measure(self, seed: int) -> dict[str, np.ndarray]:
        """(tokens, cycles) of each test prompt by draft, [B, 2], with the network's weights as they are."""
        plan, blocks = self.correction
        start = {"before": self.tables.before, "after": self.tables.after}
        learnt, _, _ = learn_bigram(
            self.network, self.texts[QUARTER], dataclasses.replace(plan, seed=seed), blocks,
            self.tables.before.shape[1], start=start,
        )  # fmt: skip
        before, after = learnt["before"], learnt["after"]
        size = self.network.config.block_size
        dev = drafts_of(along(self.network, self.dev, size), self.dev.counts, True)
        calibration = calibrated(dev, before, after)
        ranked = by_tables(bigram.Bigram.of(before, after, torch.stack([calibration, calibration])))
        two = drafts_of(along(self.network, self.test, size), self.test.counts, True)
        kept = follow(two, ranked, TREES)
        found = {"chain": kept.pairs(0), **{f"tree {n}": kept.pairs(n) for n in TREES}}
        for rows in (8, 16):
            one = drafts_of(along(self.network, self.test, min(rows, size)), self.test.counts, False)
            shape = Shape.of(rows, "auto")
            found[f"one-pass {rows}"] = follow(one, ranked, [shape.nodes]).pairs(shape.nodes)
            if shape.anchors <= shape.nodes:  # not a block at every node
                few = follow(one, ranked, [shape.nodes], shape.anchors).pairs(shape.nodes)
                found[f"one-pass {rows}, {shape.anchors} blocks"] = few
        return found | {"oracle": of_drafts(two)}


def calibrated(drafts: Drafts, before: Tensor, after: Tensor) -> Tensor:
    """The calibration [P, 2] of two-pass drafts by tables [V, R], as training/calibration.py fits it."""
    b = drafts.blocks
    change = changes(b.fronts.clamp(min=0)[..., None], b.ids, before, after)[:, :, 0]
    change[:, 0] = 0  # the block has seen its root
    rest = (1 - b.logs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
    tensors = torch.cat([b.logs, rest], -1), torch.cat([change, torch.zeros_like(rest)], -1), drafts.ranks
    return fit([
        Observed(*text) for text in zip(*(t.split(drafts.each) for t in tensors), strict=True)
    ])  # fmt: skip


Runs = dict[str, dict[int, dict[str, np.ndarray]]]  # by arm, seed and draft


def pooled(runs: Mapping[int, Mapping[str, np.ndarray]], draft: str, seeds: Sequence[int]) -> np.ndarray:
    """(tokens, cycles) of each prompt, of several seeds together."""
    return sum((runs[seed][draft] for seed in seeds), np.zeros((1, 2), dtype=int))


def gains(runs: Runs, arm: str, draft: str) -> dict[str, Any] | None:
    """Over the recipe, of the seeds that both have: the ratio of sums, its paired interval, each seed's."""
    seeds = sorted(set(runs[arm]) & set(runs.get(RECIPE, {})))
    if not seeds:
        return None
    new, old = (pooled(runs[name], draft, seeds) for name in (arm, RECIPE))
    each = [gain(runs[arm][seed][draft], runs[RECIPE][seed][draft]) for seed in seeds]
    return {"gain": gain(new, old), "interval_95": list(gain_interval(new, old)), "by_seed": each}


def tables_of(runs: Runs) -> list[Table]:
    """What is printed."""
    drafts = list(next(iter(next(iter(runs.values())).values())))
    lines, over = [], []
    for arm, mine in runs.items():
        lines.append([arm, str(len(mine)), *(f"{ratio(pooled(mine, d, list(mine))):.3f}" for d in drafts)])
        for draft in drafts:
            said = gains(runs, arm, draft)
            if arm != RECIPE and said is not None:
                low, high = said["interval_95"]
                seeds = " ".join(f"{x:.3f}" for x in said["by_seed"])
                over.append([arm, draft, f"{said['gain']:.3f}", f"{low:.3f} to {high:.3f}", seeds])
    return [
        ("tokens a cycle, seeds together", ["arm", "seeds", *drafts], lines),
        ("over the recipe, paired by prompt", ["arm", "draft", "gain", "95 %", "by seed"], over),
    ]


def facts_of(runs: Runs) -> dict[str, Any]:
    """Ready for JSON."""
    return {
        arm: {
            draft: {
                "by_seed": {seed: round(ratio(pairs[draft]), 4) for seed, pairs in mine.items()},
                "interval_95": [round(x, 4) for x in interval(pooled(mine, draft, list(mine)))],
                "over_recipe": gains(runs, arm, draft),
            }
            for draft in next(iter(mine.values()))
        }
        for arm, mine in runs.items()
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --arms recipe own survival --seeds 0 1 --seconds 40",
    )  # fmt: skip
    add = found.add_argument
    add("--model", type=Path, default=EMBEDDED, help="an Orthrus with tables (default: the embedded one)")
    add("--arms", type=Arm.of, nargs="+", default=[Arm(n) for n in (RECIPE, *LEVERS)], metavar="ARM",
        help="(default: recipe and every lever alone)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="(default: 0 1)")
    add("--seconds", type=float, default=18.0, metavar="S",
        help="of training an arm: as many steps as the first one makes in them (default: 18)")  # fmt: skip
    add("--steps", type=positive, metavar="N", help="of every arm, in place of --seconds")
    add("--limit", type=float, default=520.0, metavar="S",
        help="start no run that would end later than that (default: 520)")  # fmt: skip
    add("--start", choices=("view", "ar"), default="view", help="where the arms begin (default: view)")
    add("--batch", type=positive, default=DISTILL.batch, metavar="N", help="rows (default: %(default)s)")
    add(
        "--length", type=positive, default=DISTILL.length, metavar="N", help="of a row (default: %(default)s)"
    )
    add("--blocks", type=positive, default=BLOCKS.count, metavar="N", help="of a row (default: %(default)s)")
    add("--bigram-steps", type=positive, default=200, metavar="N", help="of the tables (default: 200)")
    add("--prompts", type=positive, default=100, metavar="N", help="test prompts (default: 100)")
    add("--dev", type=positive, default=50, metavar="N", help="development prompts (default: 50)")
    add("--new", type=positive, default=256, metavar="N", help="tokens of a text (default: 256)")
    add("--corpus-mb", type=float, default=100.0, metavar="MB", help="of the default corpus (default: 100)")
    add("--text", type=Path, nargs="+", default=[], metavar="PATH", help="train on this text instead")
    add("--json", type=writable, metavar="FILE", help="write all figures there")
    return found


def prepared(given: argparse.Namespace, began: float) -> Bench:
    """Everything but the runs. Raises InputError."""
    device = training_device()
    config, tokenizer = (
        Qwen3Config.from_folder(given.model, tensor_names(given.model)),
        load_tokenizer(given.model),
    )
    tables = bigram.load(given.model, config, device, torch.float32)
    if tables is None:
        raise InputError(f"{given.model} has no bigram tables: orthrus bigram learns them")
    blocks = dataclasses.replace(BLOCKS, count=given.blocks)
    plan = Plan(DISTILL.steps, given.batch, given.length, RATE)
    blocks.check(plan.length)
    end = document_end(tokenizer, config)
    corpus = read_corpus(
        corpus_files(int(given.corpus_mb * 1e6), given.text), tokenizer, bool(given.text), end
    )
    tokens = torch.from_numpy(corpus.training).to(device)
    say(began, f"{len(tokens) / 1e6:.1f}M training tokens")
    network = load_network(given.model, config).requires_grad_(False).to(device)
    if given.start == "ar":
        start_from_ar(network)
    start = {name: w.detach().clone() for name, w in network.named_parameters() if "_diff" in name}
    shares = {QUARTER, *(arm.own_text for arm in given.arms)}
    texts = {share: with_own_text(network, tokens, share, end, 0)[0] for share in sorted(shares)}
    say(began, f"own text written: {', '.join(f'{len(t) / 1e6:.1f}M tokens' for t in texts.values())}")
    found = [
        greedy_texts(network, [e.ids for e in tokenizer.encode_batch(
            read_prompts(EMBEDDED / "held_out.jsonl", count, split=split))], given.new, config.block_size)
        for split, count in (("dev", given.dev), ("test", given.prompts))
    ]  # fmt: skip
    say(began, f"greedy texts of {len(found[0].counts)} and {len(found[1].counts)} held-out prompts")
    prompts = dev_prompts(EMBEDDED, tokenizer, config.vocab_size)
    prompts = None if prompts is None else prompts[: given.dev].to(device)
    small = Plan(given.bigram_steps, given.batch, given.length, BIGRAM_RATE, BIGRAM.weight_decay)
    correction = small, dataclasses.replace(BIGRAM_BLOCKS, count=given.blocks)
    return Bench(network, start, tables, texts, prompts, *found, plan, blocks, correction)


def runs_of(bench: Bench, given: argparse.Namespace, began: float) -> tuple[Runs, int]:
    """Every arm of every seed, as far as the limit allows, seed by seed; and the steps that each had."""
    steps, runs, took = given.steps, Runs(), 0.0
    if steps is None:
        bench.train(given.arms[0], 2, 0)  # compiles blocks of both sizes
        seconds, _ = bench.train(given.arms[0], REHEARSED, 0)
        steps = max(int(given.seconds / seconds * REHEARSED), 1)
        say(began, f"{seconds / REHEARSED * 1e3:.0f} ms a step: {steps} steps an arm")
    for seed in given.seeds:
        for arm in given.arms:
            clock = time.perf_counter()
            if runs and clock - began + took > given.limit:
                say(began, f"no time for {arm.name}, seed {seed}: the last run took {took:.0f} s")
                continue
            seconds, measured = bench.train(arm, steps, seed)
            found = bench.measure(seed)
            runs.setdefault(arm.name, {})[seed] = found
            took = time.perf_counter() - clock
            said = ", ".join(f"{draft} {ratio(pairs):.3f}" for draft, pairs in found.items())
            say(began, f"{arm.name}, seed {seed}: trained {seconds:.0f} s; {said}")
            if measured:
                say(began, f"agreement while all before agreed {[round(x, 3) for x in measured[:8]]}")
    return runs, steps


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given, began = parser().parse_args(arguments), time.perf_counter()
    if not 0 < given.seconds < 1e6:
        fail(COMMAND, f"--seconds is {given.seconds}; above 0 was expected")
    torch._dynamo.config.recompile_limit = 64  # for as many kinds of blocks, with a gradient and without
    try:
        bench = prepared(given, began)
        runs, steps = runs_of(bench, given, began)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    report.print_tables(tables_of(runs))
    print(f"{steps} steps an arm; {machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        report.write_json(given.json, {"machine": facts, "steps": steps, "arms": facts_of(runs)})
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
