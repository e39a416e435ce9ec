"""A tokenizer for random weights, so that a server makes text of their tokens: byte-level BPE of any size.

Its entries are the 256 bytes and, from a seed, longer and longer words of small letters, half of them behind
a space: each is an entry with one letter more, which is its merge. Every id decodes to some bytes. A word
that is an entry is one token, so that a prompt has as many tokens as words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPACE = "Ġ"  # as byte-level BPE writes it
LONGEST = 7  # characters of an entry


def entries(count: int, seed: int = 0) -> tuple[list[str], list[tuple[str, str]]]:
    """(entries in the order of their ids, merges in theirs)."""
    rng = random.Random(seed)
    found = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = set(found), list[tuple[str, str]]()
    begun = [SPACE], [*ascii_lowercase]  # what a longer word may begin with
    while len(found) < count:
        stems = begun[len(found) % 2]
        stem = rng.choice(stems)
        word = stem + (letter := rng.choice(ascii_lowercase))
        if word in known or len(word) > LONGEST:
            continue
        known.add(word)
        found.append(word)
        merges.append((stem, letter))
        stems.append(word)
    return found, merges


def write(folder: Path, count: int, seed: int = 0) -> None:
    """tokenizer.json of so many entries, at least 256."""
    found, merges = entries(count, seed)
    vocabulary = {word: i for i, word in enumerate(found)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def words(folder: Path) -> list[str]:
    """Texts that are one token each, wherever they stand: a space and letters."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return [" " + word[1:] for word in vocabulary if word.startswith(SPACE) and len(word) > 1
            and set(word[1:]) <= set(ascii_lowercase)]  # fmt: skip
