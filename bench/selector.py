"""Is a selector of draft candidates worth a kernel? Fitted on text that the target writes, and followed on
held-out prompts beside what decoding has today.

The target writes greedy text behind pieces of a corpus: the stop rule is at temperature 0, and the texts
differ by their prompts. Blocks along it are kept in memory. A selector (selector_fit.py) is fitted on them
once for every rank and rate asked for, and the tables alone are fitted further; the selector that is best on
the development prompts is judged. Then every way to rank candidates is followed along greedy texts of the
test prompts: tokens a cycle of chains, trees of 31 and 63 nodes and one-pass cycles (trees of 19, a block of
8 rows at every node).

Gains are over the tables with the calibration that the checkpoint has, with intervals paired by prompt. The
stop rule asks for 3 % of trees of 31, 5 % of chains and 3 % of one-pass."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3_model import InputError, bigram
from qwen3_model.checkpoint import EMBEDDED, tensor_names
from qwen3_model.config import Qwen3Config
from qwen3_model.prompts import read_prompts
from qwen3_model.training.base import document_end, load_tokenizer
from qwen3_model.training.dataset import corpus_files, read_corpus
from qwen3_model.training.folder import load_network
from qwen3_model.training.held_out import SPAN, span_hashes
from qwen3_model.training.loop import Rows
from qwen3_model.training.memory import training_device
from qwen3_model.training.network import Network
from qwen3_model.training.recipe import say
from qwen3_model.training.rollout import OWN_PROMPT, OWN_TOKENS, texts_at_once

from . import report
from .bootstrap import gain, gain_interval, interval, ratio
from .command import Parser, fail, positive, run, writable
from .followed import Drafts, Ranked, by_tables, follow, oracle
from .measure import machine, machine_line
from .oracle import Table
from .selector_fit import (
    FORMS,
    NODES,
    ONE_PASS,
    TWO_PASS,
    Data,
    Fitted,
    Selector,
    data_of,
    fit_selector,
    held_out,
    losses,
    put_together,
    record,
)

COMMAND = "bench.selector"
TREES = (31, 63)
LEAST = {"chain": 1.05, "tree 31": 1.03, "one-pass": 1.03}  # the stop rule
CALIBRATED = "tables, calibrated"
REFITTED = "tables, calibrated anew"
TABLES = "tables fitted further"
CALIBRATION_TEXTS = 256  # windows of the fitted texts on which factors and rests are fitted alone
OFFSETS = 8  # that are told


@dataclass(frozen=True)
class Followed:
    """What a way to rank keeps: (tokens, cycles) of each prompt by draft, and how often its first candidate
    behind the text's token is right, by offset."""

    pairs: dict[str, np.ndarray]
    recall: list[float]

    @staticmethod
    def of(test: Sequence[Drafts], ranked: Ranked) -> Followed:
        """Along drafts of both forms."""
        two = follow(test[TWO_PASS], ranked, TREES)
        one = follow(test[ONE_PASS], ranked, NODES[ONE_PASS:])
        pairs = {"chain": two.pairs(0), **{f"tree {n}": two.pairs(n) for n in TREES}}
        pairs |= {"one-pass": one.pairs(NODES[ONE_PASS]), "one-pass chain": one.pairs(0)}
        right, counts = two.first[:OFFSETS].T
        return Followed(pairs, (right / np.maximum(counts, 1)).tolist())


def apart(pieces: Tensor, held: Sequence[Sequence[int]]) -> Tensor:
    """The pieces [n, P] of which no run of SPAN tokens is in a held-out prompt."""
    if pieces.shape[1] < SPAN:
        return pieces
    theirs = np.concatenate([span_hashes(np.array(prompt)) for prompt in held])
    hashes = span_hashes(pieces.numpy().reshape(-1))
    every = np.arange(len(pieces))[:, None] * pieces.shape[1] + np.arange(pieces.shape[1] - SPAN + 1)
    return pieces[torch.from_numpy(~np.isin(hashes, theirs)[every].any(1))]


def recorded(
    network: Network, pieces: Tensor, new: int, tokens: int, window: int, ranked: Ranked, began: float
) -> tuple[list[Data], int]:
    """The data of own text behind pieces [n, P] in turn, `tokens` tokens of it. Raises InputError where the
    pieces do not suffice."""
    wanted, device = -(-tokens // new), network.frequencies.device
    if wanted > len(pieces):
        raise InputError(
            f"{tokens} tokens take {wanted} pieces of text, and there are {len(pieces)}: use a larger "
            "--corpus-mb, more --text, or fewer --tokens"
        )
    passes = -(-wanted // texts_at_once(network, pieces.shape[1] + new))
    generator, parts = torch.Generator().manual_seed(0), []
    for some in pieces[:wanted].tensor_split(passes):
        parts.append(record(network, some.to(device), new, window, generator, ranked))
        say(began, f"{sum(len(p[0].each) for p in parts) * new / 1e6:.2f}M tokens of own text")
    return put_together(parts), wanted * new


@dataclass(frozen=True)
class Ways:
    """Ways to rank candidates by name, each with what it keeps; the judged one, and how each was fitted."""

    found: dict[str, Followed]
    fits: dict[str, dict[str, Any]]
    judged: str

    def gains(self, name: str) -> dict[str, tuple[float, float, float]]:
        """Over decoding today, by draft: gain and its paired interval."""
        old, new = self.found[CALIBRATED].pairs, self.found[name].pairs
        return {k: (gain(new[k], old[k]), *gain_interval(new[k], old[k])) for k in new}

    @property
    def passes(self) -> bool:
        """The stop rule."""
        gains = self.gains(self.judged)
        return all(gains[draft][0] >= least for draft, least in LEAST.items())


def compare(
    network: Network, tables: bigram.Bigram, data: Sequence[Data], dev: Sequence[Data],
    test: Sequence[Drafts], ranks: Sequence[int], rates: Sequence[float], seconds: float, began: float,
) -> Ways:  # fmt: skip
    """Fit and follow every way to rank."""
    embedding = network.model.embed_tokens.weight.detach()
    none = torch.zeros_like(tables.before[:, :1])
    plain = bigram.Bigram.of(tables.before, tables.after).calibration
    found = {
        "no tables": Followed.of(test, by_tables(none, none, plain)),
        "tables": Followed.of(test, by_tables(tables.before, tables.after, plain)),
        CALIBRATED: Followed.of(test, by_tables(*tables.tables)),
    }
    torch.manual_seed(0)
    fits, best = dict[str, dict[str, Any]](), dict[str, float]()
    wanted = [(REFITTED, 0, 0.0, False), (TABLES, 0, rates[0], True)]
    for rank in ranks:
        for rate in rates:
            wanted += [(f"selector, rank {rank}, rate {rate:g}", rank, rate, False)]
    wanted += [(f"selector, rank {ranks[0]}, rate {rates[0]:g}, tables too", ranks[0], rates[0], True)]
    for name, rank, rate, learnt in wanted:
        selector = Selector(embedding, tables.before, tables.after, tables.calibration, rank, learnt)
        fitted = Fitted(0, 0, losses(selector, dev), losses(selector, dev))
        if rate:
            fitted = fit_selector(selector, data, dev, seconds, rate)
        for form in FORMS:
            selector.calibrate(form, data[form], CALIBRATION_TEXTS)
        loss = losses(selector, dev)
        fits[name] = {"steps": fitted.steps, "best": fitted.best, "dev_loss_before": fitted.before,
                      "dev_loss_best": fitted.after, "dev_loss": loss}  # fmt: skip
        with torch.no_grad():
            found[name] = Followed.of(test, selector.ranked)
        if rank:
            best[name] = sum(loss)
        say(began, f"{name}: {fitted.steps} steps, best at {fitted.best}, dev loss "
            f"{sum(fitted.before):.4f} -> {sum(fitted.after):.4f}, calibrated {sum(loss):.4f}")  # fmt: skip
    return Ways(found, fits, min(best, key=lambda name: best[name]))


def tables_of(ways: Ways, test: Sequence[Drafts]) -> list[Table]:
    """What is printed."""
    drafts = list(ways.found[CALIBRATED].pairs)
    lines, gains = [], []
    for name, mine in ways.found.items():
        lines.append([name, *(f"{ratio(mine.pairs[d]):.3f}" for d in drafts)])
        said = [f"{g:.3f} ({low:.3f} to {high:.3f})" for g, low, high in ways.gains(name).values()]
        gains.append([name + (", judged" if name == ways.judged else ""), *said])
    ceiling = [ratio(oracle(test[form])) for form in FORMS]
    two, one = (f"{x:.3f}" for x in ceiling)
    lines.append(["oracle of 16", two, two, two, one, one])
    recall = [[name, *(f"{x:.3f}" for x in mine.recall)] for name, mine in ways.found.items()]
    count = f"{len(test[TWO_PASS].each)} held-out prompts"
    heads = [f"offset {i + 1}" for i in range(len(recall[0]) - 1)]
    return [
        (f"tokens a cycle, {count}", ["candidates ranked by", *drafts], lines),
        (
            "the first candidate is the text's, behind the text's token in front",
            ["ranked by", *heads],
            recall,
        ),
        (f"over {CALIBRATED}, paired by prompt, 95 %", ["candidates ranked by", *drafts], gains),
    ]


def facts_of(ways: Ways, test: Sequence[Drafts]) -> dict[str, Any]:
    """Ready for JSON."""

    def said(name: str) -> dict[str, Any]:
        mine, gains = ways.found[name], ways.gains(name)
        return {
            draft: {
                "tokens_per_cycle": round(ratio(pairs), 4),
                "interval_95": [round(x, 4) for x in interval(pairs)],
                "gain": [round(x, 4) for x in gains[draft]],
            }
            for draft, pairs in mine.pairs.items()
        } | {"recall_1": [round(x, 4) for x in mine.recall], "fit": ways.fits.get(name)}

    return {
        "ways": {name: said(name) for name in ways.found},
        "oracle": {form: round(ratio(oracle(test[i])), 4) for i, form in enumerate(("two-pass", "one-pass"))},
        "judged": ways.judged, "stop_rule": LEAST, "passes": ways.passes,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --tokens 10000000 --seconds 40 --json runs/selector.json",
    )  # fmt: skip
    add = found.add_argument
    add("--model", type=Path, default=EMBEDDED, help="an Orthrus with tables (default: the embedded one)")
    add("--tokens", type=positive, default=10_000_000, metavar="N", help="of own text (default: 10000000)")
    add("--window", type=positive, default=64, metavar="N",
        help="neighbouring tokens of each text that have blocks (default: 64)")  # fmt: skip
    add("--seconds", type=float, default=40.0, metavar="S", help="of each fit (default: 40)")
    add("--ranks", type=positive, nargs="+", default=[32, 64], metavar="R", help="(default: 32 64)")
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3], metavar="LR", help="(default: 1e-3 3e-3)")
    add("--prompts", type=positive, default=100, metavar="N", help="test prompts (default: 100)")
    add("--dev", type=positive, default=50, metavar="N", help="development prompts (default: 50)")
    add("--new", type=positive, default=OWN_TOKENS, metavar="N", help="tokens of a text (default: 256)")
    add("--corpus-mb", type=float, default=60.0, metavar="MB", help="of the default corpus (default: 60)")
    add("--text", type=Path, nargs="+", default=[], metavar="PATH", help="take this text's pieces instead")
    add("--device", choices=("cuda", "cpu"), help="default: CUDA if there")
    add("--json", type=writable, metavar="FILE", help="write all figures there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given, began = parser().parse_args(arguments), time.perf_counter()
    if not all(0 < rate < 1 for rate in given.rates) or not 0 < given.seconds < 1e6:
        fail(COMMAND, "--rates are above 0 and below 1, --seconds above 0")
    if given.window + 16 > given.new:
        fail(
            COMMAND, f"--window is {given.window}; texts of {given.new} tokens take {given.new - 16} at most"
        )
    try:
        device = torch.device(given.device) if given.device else training_device()
        config = Qwen3Config.from_folder(given.model, tensor_names(given.model))
        tables = bigram.load(given.model, config, device, torch.float32)
        if tables is None:
            raise InputError(f"{given.model} has no bigram tables: orthrus bigram learns them")
        tokenizer = load_tokenizer(given.model)
        network = load_network(given.model, config).requires_grad_(False).to(device)
        prompts = {
            split: [e.ids for e in tokenizer.encode_batch(
                read_prompts(EMBEDDED / "held_out.jsonl", count, split=split))]
            for split, count in (("dev", given.dev), ("test", given.prompts))
        }  # fmt: skip
        end = document_end(tokenizer, config)
        corpus = read_corpus(
            corpus_files(int(given.corpus_mb * 1e6), given.text), tokenizer, bool(given.text), end
        )
        rows = Rows(torch.from_numpy(corpus.training), OWN_PROMPT, 0)
        taken = min(rows.count, -(-given.tokens // given.new) * 5 // 4 + 8)
        pieces = apart(rows.batch(0, taken)[:, :-1], [*prompts["dev"], *prompts["test"]])
        say(began, f"{len(pieces)} of {taken} pieces share nothing with held-out prompts")
        ranked = by_tables(*tables.tables)
        test, tested = held_out(network, prompts["test"], given.new)
        dev, _ = held_out(network, prompts["dev"], given.new)
        held = [data_of(d.blocks, d.each, form, ranked) for form, d in zip(FORMS, dev, strict=True)]
        say(began, f"{tested} tokens of {len(test[TWO_PASS].each)} test prompts")
        data, tokens = recorded(network, pieces, given.new, given.tokens, given.window, ranked, began)
        say(began, f"{len(data[TWO_PASS].weight)} blocks of each form recorded")
        ways = compare(network, tables, data, held, test, given.ranks, given.rates, given.seconds, began)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    report.print_tables(tables_of(ways, test))
    word = "passes" if ways.passes else "does not pass"
    print(f"{ways.judged} {word} the stop rule; fitted on {tokens} tokens of the target's own text")
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        beside = {"machine": facts, "tokens": tokens, "blocks": len(data[TWO_PASS].weight)}
        report.write_json(given.json, beside | facts_of(ways, test))
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
