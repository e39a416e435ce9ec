"""Tokens that a checkpoint declares outside tokenizer.json, registered as transformers registers them.

A tokenizer.json saved with its checkpoint knows all of them, and nothing changes. One that lacks some would
split them into pieces of text without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .chat_template import TOKENIZER_CONFIG, special_tokens, tokenizer_config
from .errors import InputError, quoted
from .reading import read_json_object

ADDED_TOKENS = "added_tokens.json"
LISTS = ("additional_special_tokens", "extra_special_tokens")


def register_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Make a folder's declared tokens known to its tokenizer; a new one gets the next free id. Raises
    InputError where that is not the id it is declared with, and for settings that nothing here applies."""
    config = tokenizer_config(folder)
    if config.get("split_special_tokens"):
        raise InputError(f"{TOKENIZER_CONFIG}: split_special_tokens is not supported: remove it")
    known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    for token, wanted in _declared(folder, config):
        if known.get(token.content, False) or (token.content in known and not token.special):
            continue
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        known[token.content] = token.special
        found = tokenizer.token_to_id(token.content)
        if wanted is not None and found != wanted:
            raise InputError(
                f"{folder} declares token {quoted(token.content)} as {wanted}, its tokenizer.json makes it "
                f"{found}: save the tokenizer anew"
            )


def _declared(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[AddedToken, int | None]]:
    """Declared tokens in the order in which they get ids, those with an id of their own first."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries = {int(key): entry for key, entry in decoder.items() if key.isdecimal()}
        for number, entry in sorted(entries.items()):
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                yield _token(entry, bool(entry.get("special"))), number
    elif os.path.lexists(folder / ADDED_TOKENS):
        added = read_json_object(folder / ADDED_TOKENS)
        for content, number in sorted(added.items(), key=lambda pair: str(pair[1]).zfill(12)):
            yield AddedToken(content, special=False, normalized=False), number
    for content in special_tokens(config).values():
        yield AddedToken(content, special=True, normalized=False), None
    for entry in (entry for name in LISTS if isinstance(config.get(name), list) for entry in config[name]):
        if isinstance(entry, str):
            yield AddedToken(entry, special=True, normalized=False), None
        elif isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield _token(entry, True), None


def _token(entry: Mapping[str, Any], special: bool) -> AddedToken:
    flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip")}
    return AddedToken(
        entry["content"], special=special, normalized=bool(entry.get("normalized", not special)), **flags
    )
