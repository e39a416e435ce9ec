"""What a distillation needs to know of its base: config, tokenizer, mask token, prompts to estimate on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from .. import checkpoint
from ..config import Qwen3Config
from ..errors import InputError, foreign, one_line
from ..reading import read_text
from ..text import read_tokenizer
from .held_out import PROMPT_TOKENS
from .tokenizer import END, MASK

HELD_OUT = "held_out.jsonl"


def base_config(base: Path) -> Qwen3Config:
    """The base's config. Raises InputError when it is an Orthrus already, by its config or its tensors."""
    config = Qwen3Config.from_folder(base, checkpoint.tensor_names(base))
    if config.has_diffusion_view:
        raise InputError(f"{base} is an Orthrus already: distil from a plain dense Qwen3")
    return config


def load_tokenizer(base: Path) -> Tokenizer:
    """The base's tokenizer, which reads a text whole whatever its file says. Raises InputError."""
    return read_tokenizer(base)


def pick_mask(tokenizer: Tokenizer, rows: int, wanted: int | None) -> int:
    """The token id that stands for a token not known yet: the one wanted, the tokenizer's own mask token, or
    the first of the embedding's `rows` behind the tokenizer's tokens. Raises InputError when there is none.
    """
    if wanted is not None:
        if not 0 <= wanted < rows:
            raise InputError(f"mask token id is {wanted}; this base has 0..{rows - 1}")
        return wanted
    own = tokenizer.token_to_id(MASK)
    if own is not None and own < rows:
        return own
    unused = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if unused >= rows:
        raise InputError(
            f"all {rows} rows of the embedding belong to tokens: name one to use as mask (--mask-token-id)"
        )
    return unused


def document_end(tokenizer: Tokenizer, config: Qwen3Config) -> int | None:
    """The token between two texts: <|endoftext|>, else the base's first end token, if any."""
    end = tokenizer.token_to_id(END)
    return end if end is not None else next(iter(config.eos_token_ids), None)


def check_ids(tokens: np.ndarray, rows: int) -> None:
    """Raises InputError when the tokenizer gave ids that the embedding has no row for."""
    if len(tokens) and tokens.max() >= rows:
        raise InputError(
            f"the tokenizer gives token {tokens.max()}, the embedding has {rows} rows: check that "
            "tokenizer.json belongs to the base"
        )


def dev_prompts(folder: Path, tokenizer: Tokenizer, rows: int) -> torch.Tensor | None:
    """The development prompts of a base, their last tokens only so that all are equally long: [B, shortest
    prompt]; None if it has none. Raises InputError for a file that is something else, and for tokens that
    the embedding's `rows` do not have.
    """
    path, length = folder / HELD_OUT, PROMPT_TOKENS[0]
    if not os.path.lexists(path):
        return None
    try:
        lines = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        texts = [line["prompt"] for line in lines if line["split"] == "dev"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold prompts, one JSON object a line: {one_line(error)}") from None
    with foreign(f"the prompts of {path} cannot be encoded"):
        prompts = [encoding.ids[-length:] for encoding in tokenizer.encode_batch(texts)]
    prompts = [prompt for prompt in prompts if len(prompt) == length]
    check_ids(np.array(prompts), rows)
    return torch.tensor(prompts) if prompts else None


def text_prompts(held_out: np.ndarray, most: int = 16) -> torch.Tensor | None:
    """Up to `most` pieces of a held-out text, evenly spread: [B, P]; None if it is too short for one."""
    length = PROMPT_TOKENS[0]
    count = min(len(held_out) // length, most)
    if count == 0:
        return None
    starts = np.linspace(0, len(held_out) - length, count).astype(int)
    return torch.from_numpy(np.stack([held_out[s : s + length] for s in starts])).long()
