"""tokenizer.json of every kind, its parts exchanged and damaged: it encodes and decodes, or one line says why
not.

Left out by construction is what aborts the process inside the tokenizer library (docs/checkpoints.md): a
hostile `Precompiled` character map."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuzzing import LONGEST_LINE, Finding

COUNT = 2500
KINDS = {
    "traceback": "whatever the library raises is an InputError",
    "not one line": "a message is one printable line of bounded length",
    "words on stderr": "a tokenizer that panics when it is loaded leaves no stack on stderr",
    "cut or padded": "truncation and padding left in the file are not obeyed, by texts and by trainings",
    "specials": "without added specials a text has no tokens beside its own",
    "pieces": "token by token a byte-level tokenizer writes what it writes at once",
}
TEXTS = [
    "",
    " ",
    "a",
    "ab ab b",
    "Hello  world\n",
    "é日🙂",
    "<s>a</s>",
    "\x00\ufffd\u0301",
    "aaaa" * 40,
    "x1 -2.5\t!",
    5,
    "\ud800",
    None,
]
WORDS = [
    "a",
    "b",
    "ab",
    "Ġ",
    "Ġa",
    "▁",
    "▁a",
    "##a",
    "##b",
    "<s>",
    "</s>",
    "[UNK]",
    "<unk>",
    "é",
    "日",
    "Ã",
    "©",
    "ð",
    "Ł",
    "<0x41>",
    "<0xC3>",
    "<0xFF>",
    "1",
    "x",
    " ",
    "\n",
    "Ċ",
    "hello",
    "",
    ".",
]
ODD: list[Any] = [
    None,
    0,
    1,
    -1,
    7,
    2**31,
    2**70,
    1.5,
    "",
    "a",
    "[UNK]",
    "\x1b[31m",
    [],
    {},
    True,
    "x" * 2000,
]


def case(rng: random.Random, folder: Path) -> list[Finding]:
    """One tokenizer and a few texts."""
    raw = _tokenizer(rng)
    content = json.dumps(raw)
    if rng.random() < 0.1:
        at = rng.randrange(len(content))
        content = content[:at] + rng.choice(["", "\\", '"', "}", "9", "\ufeff"]) + content[at + 1 :]
    (folder / "tokenizer.json").write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + content.encode())
    with _stderr():  # a panic on a text leaves its stack there
        return list(_found(rng, folder, raw))


def _found(rng: random.Random, folder: Path, raw: dict[str, Any]) -> Iterator[Finding]:
    from qwen3_model.text import Detokenizer, Text

    with _stderr() as said:
        text, *found = _tried(Text, folder)
    yield from found
    if "panicked" in said[0]:
        yield Finding("words on stderr", said[0][:200])
    if text is None:
        return
    byte_level = (raw.get("decoder") or {}).get("type") == "ByteLevel"
    for prompt in rng.sample(TEXTS, 4):
        ids, *found = _tried(text.encode, prompt)
        yield from found
        if ids is not None:
            yield from _specials(text, prompt, ids, raw)
            yield from _readers(folder, prompt, ids)
    ids = [rng.randrange(0, 40) for _ in range(rng.randrange(12))]
    whole, *found = _tried(text.decode, ids)
    yield from found
    detokenizer = Detokenizer(text)
    pieces, *found = _tried(lambda: [detokenizer.push(token) for token in ids] + [detokenizer.flush()])
    yield from found
    if byte_level and pieces is not None and whole is not None and "".join(pieces) != whole:
        yield Finding("pieces", f"{ids}: {pieces} is not {whole!r}")
    for token in rng.sample([-1, 0, 5, 10**6, 2**40], 2):
        yield from _tried(text.label, token)[1:]


def _tried(call: Any, *args: Any) -> list[Any]:
    """What a call gave (None where it was refused) and findings about how it was refused."""
    from qwen3_model import InputError

    try:
        return [call(*args)]
    except InputError as error:
        message = str(error)
        good = 0 < len(message) <= LONGEST_LINE and all(c.isprintable() for c in message)
        return [None] if good else [None, Finding("not one line", ascii(message[:200]))]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [None, Finding("traceback", f"{type(error).__name__}: {str(error)[:150]!r}")]


def _specials(text: Any, prompt: str, ids: list[int], raw: dict[str, Any]) -> Iterator[Finding]:
    post = raw.get("post_processor") or {}
    if post.get("type") != "TemplateProcessing":
        return
    try:
        bare = text.encode(prompt, added_specials=False)
    except TypeError:  # code that knows no such thing
        bare = ids
    except ValueError:
        return
    if raw["model"].get("dropout") is None and len(ids) > len(bare) + 2 or (ids == bare and _adds(post)):
        yield Finding("specials", f"{prompt!r}: {ids} with, {bare} without")


def _adds(post: dict[str, Any]) -> bool:
    """Whether a post-processor certainly adds tokens."""
    return any(
        "SpecialToken" in part and post["special_tokens"][part["SpecialToken"]["id"]]["ids"]
        for part in post["single"]
    )


def _readers(folder: Path, prompt: str, ids: list[int]) -> Iterator[Finding]:
    """Trainings read the same file; dropout makes two encodings differ."""
    from qwen3_model.training.base import load_tokenizer

    if '"dropout": 0' in (folder / "tokenizer.json").read_text("utf-8-sig"):
        return
    theirs, *found = _tried(lambda: load_tokenizer(folder).encode(prompt).ids)
    yield from found
    if theirs is not None and theirs != ids:
        yield Finding("cut or padded", f"{len(ids)} tokens for texts, {len(theirs)} for trainings")


@contextmanager
def _stderr() -> Iterator[list[str]]:
    """Catches what is written to file descriptor 2, where Rust writes."""
    said = [""]
    before = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            said[0] = kept.read().decode("utf-8", "replace")


# a tokenizer


def _tokenizer(rng: random.Random) -> dict[str, Any]:
    words = rng.sample(WORDS, rng.randrange(3, len(WORDS)))
    raw = {
        "version": "1.0",
        "truncation": rng.choice(
            [
                None,
                None,
                {
                    "direction": rng.choice(["Right", "Left"]),
                    "max_length": rng.choice([1, 3]),
                    "strategy": "LongestFirst",
                    "stride": 0,
                },
            ]
        ),
        "padding": rng.choice(
            [
                None,
                None,
                {
                    "strategy": {"Fixed": 9},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "a",
                },
            ]
        ),
        "added_tokens": [_added(rng, words, place) for place in range(rng.randrange(3))],
        "normalizer": _part(rng, NORMALIZERS),
        "pre_tokenizer": _part(rng, PRE_TOKENIZERS),
        "post_processor": _post_processor(rng),
        "decoder": _part(rng, DECODERS),
        "model": _model(rng, words),
    }
    for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
        _damage(rng, raw)
    return raw


def _added(rng: random.Random, words: list[str], place: int) -> dict[str, Any]:
    return {
        "id": len(words) + place,
        "content": rng.choice(["<s>", "</s>", "<|x|>", " ", "é", ""]),
        "single_word": rng.random() < 0.2,
        "lstrip": rng.random() < 0.2,
        "rstrip": rng.random() < 0.2,
        "normalized": rng.random() < 0.5,
        "special": rng.random() < 0.5,
    }


def _model(rng: random.Random, words: list[str]) -> dict[str, Any]:
    vocab = {word: place for place, word in enumerate(words)}
    unknown = rng.choice([None, "[UNK]", "<unk>", "gone", words[0]])
    kind = rng.choice(["BPE", "BPE", "WordPiece", "WordLevel", "Unigram"])
    if kind == "BPE":
        pairs = [[a, b] for a in words for b in words if a and b and a + b in vocab]
        return {
            "type": kind,
            "vocab": vocab,
            "merges": pairs,
            "unk_token": unknown,
            "dropout": rng.choice([None, 0.5]),
            "continuing_subword_prefix": rng.choice([None] * 6 + ["##", ""]),
            "end_of_word_suffix": rng.choice([None, "b"]),
            "fuse_unk": rng.random() < 0.5,
            "byte_fallback": rng.random() < 0.5,
            "ignore_merges": rng.random() < 0.5,
        }
    if kind == "WordPiece":
        return {
            "type": kind,
            "vocab": vocab,
            "unk_token": unknown or "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": rng.choice([100, 0, 1]),
        }
    if kind == "WordLevel":
        return {"type": kind, "vocab": vocab, "unk_token": unknown or "[UNK]"}
    scores = [[word, rng.choice([0.0, -1.0, -9.5, 3.0])] for word in words]
    return {
        "type": kind,
        "vocab": scores,
        "unk_id": rng.choice([None, 0, 1, 1, 0, 99]),
        "byte_fallback": rng.random() < 0.5,
    }


PATTERNS = 2 * [
    {"String": " "},
    {"String": ""},
    {"String": "a"},
    {"Regex": "\\s+"},
    {"Regex": ""},
    {"Regex": "(?=a)"},
] + [{"Regex": "("}]
BEHAVIORS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def _replace(rng: random.Random) -> dict[str, Any]:
    return {"type": "Replace", "pattern": rng.choice(PATTERNS), "content": rng.choice(["", "x", "▁"])}


def _metaspace(rng: random.Random) -> dict[str, Any]:
    return {
        "type": "Metaspace",
        "replacement": rng.choice(["▁", "_"]),
        "split": rng.random() < 0.5,
        "prepend_scheme": rng.choice(["always", "never", "first"]),
    }


def _strip(rng: random.Random) -> dict[str, Any]:
    return {
        "type": "Strip",
        "content": rng.choice([" ", "a", "x"]),
        "start": rng.choice([0, 1, 5]),
        "stop": rng.choice([0, 1, 5]),
    }


NORMALIZERS = [
    lambda rng: None,
    lambda rng: {"type": rng.choice(["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"])},
    _replace,
    lambda rng: {"type": "Prepend", "prepend": rng.choice(["▁", ""])},
    lambda rng: {"type": "Strip", "strip_left": rng.random() < 0.5, "strip_right": True},
    lambda rng: {"type": "ByteLevel"},
    lambda rng: {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": rng.random() < 0.5,
    },
]
PRE_TOKENIZERS = [
    lambda rng: None,
    lambda rng: BYTE_LEVEL | {"add_prefix_space": rng.random() < 0.5},
    lambda rng: BYTE_LEVEL,
    _metaspace,
    lambda rng: {"type": rng.choice(["Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts"])},
    lambda rng: {"type": "Digits", "individual_digits": rng.random() < 0.5},
    lambda rng: {"type": "Punctuation", "behavior": rng.choice(BEHAVIORS)},
    lambda rng: {
        "type": "Split",
        "pattern": rng.choice(PATTERNS),
        "behavior": rng.choice(BEHAVIORS),
        "invert": rng.random() < 0.3,
    },
    lambda rng: {"type": "FixedLength", "length": rng.choice([0, 1, 5])},
    lambda rng: {"type": "CharDelimiterSplit", "delimiter": rng.choice([" ", "a"])},
]
DECODERS = [
    lambda rng: None,
    lambda rng: BYTE_LEVEL,
    lambda rng: BYTE_LEVEL,
    _metaspace,
    _replace,
    _strip,
    lambda rng: {"type": rng.choice(["ByteFallback", "Fuse"])},
    lambda rng: {"type": "BPEDecoder", "suffix": rng.choice(["", "b"])},
    lambda rng: {"type": "WordPiece", "prefix": rng.choice(["##", ""]), "cleanup": rng.random() < 0.5},
    lambda rng: {
        "type": "CTC",
        "pad_token": rng.choice(["", "a"]),
        "word_delimiter_token": "",
        "cleanup": True,
    },
]
LISTS = {id(NORMALIZERS): "normalizers", id(PRE_TOKENIZERS): "pretokenizers", id(DECODERS): "decoders"}


def _part(rng: random.Random, kinds: list[Any]) -> dict[str, Any] | None:
    if rng.random() < 0.2:
        parts = [part for _ in range(rng.randrange(4)) if (part := rng.choice(kinds)(rng)) is not None]
        return {"type": "Sequence", LISTS[id(kinds)]: parts}
    return rng.choice(kinds)(rng)


def _post_processor(rng: random.Random) -> dict[str, Any] | None:
    pair = ["</s>", rng.choice([0, 1, 9999])]
    kind = rng.choice([None, "ByteLevel", "BertProcessing", "RobertaProcessing", "Template", "Template"])
    if kind == "ByteLevel":
        return BYTE_LEVEL
    if kind == "BertProcessing":
        return {"type": kind, "sep": pair, "cls": ["<s>", 1]}
    if kind == "RobertaProcessing":
        return {
            "type": kind,
            "sep": pair,
            "cls": ["<s>", 1],
            "trim_offsets": True,
            "add_prefix_space": rng.random() < 0.5,
        }
    if kind == "Template":
        ids = rng.choice([[0], [0, 1], [9999], []])
        sequence = {"Sequence": {"id": rng.choice(["A", "A", "A", "B"]), "type_id": 0}}
        return {
            "type": "TemplateProcessing",
            "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "single": rng.choice([[{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence], [sequence]]),
            "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}},
        }
    return None


def _damage(rng: random.Random, raw: dict[str, Any]) -> None:
    """Take something out somewhere, or put something odd there."""
    place: Any = raw
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and rng.random() < 0.7:
            place = place[key]
        elif rng.random() < 0.3:
            del place[key]
            return
        else:
            place[key] = rng.choice(ODD)
            return
