"""The corpus as token ids, its held-out part kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..errors import InputError, foreign
from .corpus import HELD_OUT_SHARE, Source, own_texts, sources

TOKENIZER_BYTES = 15_000_000  # of text that the tokenizer is trained on


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training and held-out parts, and the files."""

    training: np.ndarray
    held_out: np.ndarray
    files: list[Source]
    own: bool  # the user's text: its end is held out, not files chosen by their content


def corpus_files(corpus_bytes: int, text: Sequence[Path] = ()) -> list[Source]:
    """The user's text, or the corpus every machine has. Raises InputError."""
    if text:
        return own_texts(text)
    if corpus_bytes < 1:
        raise InputError(f"the corpus is to have {corpus_bytes} bytes; more than none was expected")
    return sources(corpus_bytes)


def read_corpus(files: list[Source], tokenizer: Tokenizer, own: bool = False, end: int | None = 0) -> Corpus:
    """Tokenise every file, each followed by the end token if there is one."""

    def joined(side: list[Source]) -> np.ndarray:
        texts = [_text(file) for file in side]
        with foreign("the text cannot be encoded", "check the base's tokenizer.json"):
            encodings = tokenizer.encode_batch(texts)
        ends = [] if end is None else [end]
        return np.concatenate([np.zeros(0, np.int32), *(np.array(e.ids + ends, np.int32) for e in encodings)])

    if own:
        tokens = joined(files)
        cut = len(tokens) - len(tokens) // HELD_OUT_SHARE
        return Corpus(tokens[:cut], tokens[cut:], files, own)
    sides = [joined([file for file in files if file.held_out == side]) for side in (False, True)]
    return Corpus(sides[0], sides[1], files, own)


def tokenizer_texts(files: list[Source], own: bool) -> list[str]:
    """The texts to train a tokenizer on, held-out ones left out."""
    texts, total = [], 0
    for file in files:
        if (own or not file.held_out) and total < TOKENIZER_BYTES:
            texts.append(_text(file))
            total += file.size
    return texts


def _text(file: Source) -> str:
    with foreign(f"{file.path} cannot be read any more"):
        return file.path.read_text("utf-8")
