"""Held-out prompts: beginnings of functions from files the model never saw, sharing no 50-token span with
those it did.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import foreign
from .corpus import Source

SPAN = 50  # tokens
PROMPT_TOKENS = range(128, 321)
PER_FILE, DISTRIBUTION_SHARE = 3, 0.25
FUNCTION = re.compile(r"^[ \t]*(?:async )?def [^\n]*(?=\n)", re.M)


def span_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every run of SPAN tokens, [len(tokens) - SPAN + 1]; equal runs have equal hashes."""
    if len(tokens) < SPAN:
        return np.zeros(0, np.uint64)
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    hashes, base = np.zeros(len(tokens) - SPAN + 1, np.uint64), np.uint64(0xD6E8FEB86659FD93)
    for offset in range(SPAN):  # Horner's rule modulo 2^64 over all runs at once
        hashes = hashes * base + mixed[offset : offset + len(hashes)]
    return hashes


def apart(pieces: Tensor, held: Sequence[Sequence[int]]) -> Tensor:
    """The pieces [n, P] of which no run of SPAN tokens is in a held-out prompt."""
    if pieces.shape[1] < SPAN or not held:
        return pieces
    theirs = np.concatenate([span_hashes(np.array(prompt)) for prompt in held])
    hashes = span_hashes(pieces.numpy().reshape(-1))
    every = np.arange(len(pieces))[:, None] * pieces.shape[1] + np.arange(pieces.shape[1] - SPAN + 1)
    return pieces[torch.from_numpy(~np.isin(hashes, theirs)[every].any(1))]


def candidates(source: Source, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Prompts of one file that end behind a function's head, as long as PROMPT_TOKENS allow.

    The line's end is left out: it is one token with the indentation that follows, and alone it would say that
    the function is over.
    """
    with foreign(f"{source.path} cannot be read any more"):
        text = source.path.read_text("utf-8")
    found = []
    for head in FUNCTION.finditer(text):
        before = text[: head.end()].rstrip()
        lines = before.splitlines(keepends=True)
        # start at a line so that the prompt has at most the longest length; a token is rarely under 1.5
        # characters
        tail = ""
        while lines and len(tail) + len(lines[-1]) < 2.6 * PROMPT_TOKENS[-1]:
            tail = lines.pop() + tail
        if len(tokenizer.encode(tail).ids) in PROMPT_TOKENS:
            found.append({"prompt": tail, "source": source.name, "licence": source.licence})
    step = max(len(found) // PER_FILE, 1)
    return found[::step][:PER_FILE]


def held_out_prompts(
    held_out: list[Source], tokenizer: Tokenizer, training: np.ndarray, test: int = 200, dev: int = 50
) -> list[dict[str, str]]:
    """`test` prompts and `dev` more for tuning, of different files, none sharing a span of SPAN tokens with
    `training`.
    """
    rows, share = [], Counter[str]()
    for source in held_out:
        for row in candidates(source, tokenizer):
            if share[source.distribution] < DISTRIBUTION_SHARE * (test + dev) * 1.5:
                share[source.distribution] += 1
                rows.append(row)
    hashes = [np.unique(span_hashes(np.array(tokenizer.encode(row["prompt"]).ids))) for row in rows]
    wanted = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)
    seen = np.zeros(0, np.uint64)
    for start in range(
        0, len(training), 4_000_000
    ):  # in parts: hashes take four times the room of the tokens
        part = span_hashes(training[start : start + 4_000_000 + SPAN - 1])
        seen = np.union1d(seen, part[np.isin(part, wanted)])
    clean = [row for row, own in zip(rows, hashes, strict=True) if not np.isin(own, seen).any()]
    files = sorted({row["source"] for row in clean})
    dev_files = set(files[:: max(len(files) * PER_FILE // dev - 1, 2)])
    split = {"test": [r for r in clean if r["source"] not in dev_files][:test],
             "dev": [r for r in clean if r["source"] in dev_files][:dev]}  # fmt: skip
    return [row | {"split": name} for name, part in split.items() for row in part]
