"""What a selector of draft candidates keeps, on held-out prompts, beside the tables that it stands beside.

Ways to rank candidates are followed along greedy texts of the test prompts: tokens a cycle of chains, trees
of 31, 63 and 127 nodes and one-pass cycles (trees of 19, a block of 8 rows at every node). Gains are over the
tables with their calibration, with intervals paired by prompt. `orthrus select` fits the selector; a folder
without one shows what its tables keep."""

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

from qwen3_model import InputError, bigram, selector
from qwen3_model.bigram import FORMS, ONE_PASS, TWO_PASS, Bigram
from qwen3_model.checkpoint import EMBEDDED, tensor_names
from qwen3_model.config import Qwen3Config
from qwen3_model.prompts import read_prompts
from qwen3_model.request import ONE_PASS_BLOCK
from qwen3_model.training.base import load_tokenizer
from qwen3_model.training.folder import load_network
from qwen3_model.training.followed import Drafts, Ranked, along, by_tables, drafts_of, follow, greedy_texts
from qwen3_model.training.memory import training_device
from qwen3_model.training.network import Network
from qwen3_model.training.recipe import say
from qwen3_model.training.rollout import OWN_TOKENS
from qwen3_model.training.selector_fit import NODES

from . import report
from .bootstrap import gain, gain_interval, interval, ratio
from .command import Parser, fail, positive, run, writable
from .measure import machine, machine_line
from .oracle import Table, of_drafts

COMMAND = "bench.selector"
TREES = (31, 63, 127)
CALIBRATED, SELECTED = "tables, calibrated", "tables and selector"
OFFSETS = 8  # that are told


def held_out(network: Network, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[Drafts], int]:
    """All drafts of the greedy texts behind prompts, of both forms, and the texts' tokens."""
    size = network.config.block_size
    texts = greedy_texts(network, prompts, tokens, size)
    found = [
        drafts_of(along(network, texts, rows, states=True), texts.counts, form == TWO_PASS)
        for form, rows in zip(FORMS, (size, min(ONE_PASS_BLOCK, size)), strict=True)
    ]
    return found, int(texts.counts.sum())


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


Ways = dict[str, Followed]


def ways_of(test: Sequence[Drafts], tables: Bigram, selected: Bigram) -> Ways:
    """Ways to rank by name. tables: without a selector; selected: with it, if there is one."""
    nothing = torch.zeros_like(tables.before[:, :1])
    found = {
        "no tables": Followed.of(test, by_tables(Bigram.of(nothing, nothing))),
        "tables": Followed.of(test, by_tables(Bigram.of(tables.before, tables.after))),
        CALIBRATED: Followed.of(test, by_tables(tables)),
    }
    if selected.gate is not None:
        found[SELECTED] = Followed.of(test, by_tables(selected))
    return found


def gains(ways: Ways, name: str) -> dict[str, tuple[float, float, float]]:
    """Over the calibrated tables, by draft: gain and its paired interval."""
    old, new = ways[CALIBRATED].pairs, ways[name].pairs
    return {k: (gain(new[k], old[k]), *gain_interval(new[k], old[k])) for k in new}


def tables_of(ways: Ways, test: Sequence[Drafts]) -> list[Table]:
    """What is printed."""
    drafts = list(ways[CALIBRATED].pairs)
    kept = [[name, *(f"{ratio(mine.pairs[d]):.3f}" for d in drafts)] for name, mine in ways.items()]
    two, one = (f"{ratio(of_drafts(test[form])):.3f}" for form in FORMS)
    kept.append(["oracle of 16", *[two] * (1 + len(TREES)), one, one])
    over = [
        [name, *(f"{g:.3f} ({low:.3f} to {high:.3f})" for g, low, high in gains(ways, name).values())]
        for name in ways
    ]
    recall = [[name, *(f"{x:.3f}" for x in mine.recall)] for name, mine in ways.items()]
    heads = [f"offset {i + 1}" for i in range(len(recall[0]) - 1)]
    count = f"{len(test[TWO_PASS].each)} held-out prompts"
    first = "the first candidate is the text's, behind the text's token in front"
    return [
        (f"tokens a cycle, {count}", ["candidates ranked by", *drafts], kept),
        (first, ["ranked by", *heads], recall),
        (f"over {CALIBRATED}, paired by prompt, 95 %", ["candidates ranked by", *drafts], over),
    ]


def facts_of(ways: Ways, test: Sequence[Drafts]) -> dict[str, Any]:
    """Ready for JSON."""

    def said(name: str) -> dict[str, Any]:
        found = {
            draft: {
                "tokens_per_cycle": round(ratio(pairs), 4),
                "interval_95": [round(x, 4) for x in interval(pairs)],
                "gain": [round(x, 4) for x in gains(ways, name)[draft]],
            }
            for draft, pairs in ways[name].pairs.items()
        }
        return found | {"recall_1": [round(x, 4) for x in ways[name].recall]}

    named = zip(("two-pass", "one-pass"), FORMS, strict=True)
    return {
        "ways": {name: said(name) for name in ways},
        "oracle": {name: round(ratio(of_drafts(test[form])), 4) for name, form in named},
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = Parser(
        prog=f"python -m {COMMAND}", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m {COMMAND} --model runs/selected --json runs/selector.json",
    )  # fmt: skip
    add = found.add_argument
    add("--model", type=Path, default=EMBEDDED, help="an Orthrus with tables (default: the embedded one)")
    add("--prompts", type=positive, default=100, metavar="N", help="test prompts (default: 100)")
    add("--new", type=positive, default=OWN_TOKENS, metavar="N", help="tokens of a text (default: 256)")
    add("--device", choices=("cuda", "cpu"), help="default: CUDA if there")
    add("--json", type=writable, metavar="FILE", help="write all figures there")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given, began = parser().parse_args(arguments), time.perf_counter()
    if given.new < 3:
        fail(COMMAND, f"--new is {given.new}; 3 or more was expected: shorter texts have no one-pass drafts")
    try:
        device = torch.device(given.device) if given.device else training_device()
        config = Qwen3Config.from_folder(given.model, tensor_names(given.model))
        tables = bigram.load(given.model, config, device, torch.float32)
        if tables is None:
            raise InputError(f"{given.model} has no bigram tables: orthrus bigram learns them")
        tokenizer = load_tokenizer(given.model)
        network = load_network(given.model, config).requires_grad_(False).to(device)
        selected = selector.load(given.model, config, tables, network.model.embed_tokens.weight)
        assert selected is not None
        prompts = read_prompts(EMBEDDED / "held_out.jsonl", given.prompts, split="test")
        test, tokens = held_out(network, [e.ids for e in tokenizer.encode_batch(prompts)], given.new)
        say(began, f"{tokens} tokens of {len(test[TWO_PASS].each)} test prompts")
        with torch.no_grad():
            ways = ways_of(test, tables, selected)
    except InputError as error:
        fail(COMMAND, str(error))
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    report.print_tables(tables_of(ways, test))
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    if given.json:
        report.write_json(given.json, {"machine": facts} | facts_of(ways, test))
    return 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
