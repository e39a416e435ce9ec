"""The tiny checkpoint's tokenizer: byte-level BPE over source text, digits one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import InputError

END, MASK = "<|endoftext|>", "<|mask|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>", MASK)
MASK_TOKEN_ID = SPECIAL.index(MASK)
# Words with their leading space, single digits, punctuation, line ends with the indentation that follows.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+[ \t]*|\s+"
# The model completes code: a conversation is one growing source text.
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary` tokens, the special ones first; fewer if the texts do not have
    that many. Any text round-trips. Raises InputError for a vocabulary without room for all bytes.
    """
    if vocabulary < len(SPECIAL) + 256:
        raise InputError(f"the vocabulary is to have {vocabulary} tokens; at least {len(SPECIAL) + 256}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into a folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": END,
        "pad_token": END,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n")
