"""Library calls with any settings: refused by name in one line, or the text of plain decoding with the same
settings, whatever the strategy and however damaged the drafter."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import LONGEST_LINE, Finding
from small import small_model
from tiny_folder import write_tiny

from qwen3_model import InputError, Qwen3

COUNT = 300
KINDS = {
    "foreign error": "a wrong type or value raises InputError",
    "nameless": "the message names the setting",
    "long line": f"a message has {LONGEST_LINE} characters at most",
    "text differs": "tokens and log-probabilities are those of plain decoding",
    "damaged drafter": "NaN in the diffusion view alone leaves the text as it is",
    "stop string": "no text holds one of its stop strings",
}
torch.set_num_threads(1)
# Of every type, good for some setting and bad for others
ODD: list[Any] = [
    None, True, "auto", "0.7", "", "\udcff", b"x", 5, -1, 0, 2.0, 1.5, 10**400, -(10**5000), math.nan,
    math.inf, -math.inf, 1e-320, [], [4], [""], ("a", 3), {}, {5: 10**400}, {1.5: 1.0}, {"5": 1.0},
    {"x": 1.0}, {5: math.nan}, {5: "1"}, {5: None}, {10**30: 1.0}, {-1: 1.0}, {"5": 1.0, 5: 2.0}, object(),
    np.float32(0.7), np.int64(3),
    torch.tensor(3), torch.tensor([1.0, 2.0]), 3 + 4j, "x" * 10**6, lambda: 0, range(10**9), "\x1b[2J",
]  # fmt: skip
NAMES = ("strategy", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
         "frequency_penalty", "presence_penalty", "logit_bias", "seed", "stop", "block_size", "tree_nodes",
         "verify", "ignore_eos", "stop_token_ids")  # fmt: skip
STOPS = ["e", "\ufffd", "a\ufffd", "\ufffd\ufffd", "n", " ", "the", "\n"]


@cache
def tokenized() -> Qwen3:
    """A small Orthrus with a tokenizer, whose random text is full of half characters."""
    return Qwen3.from_pretrained(
        write_tiny(Path(tempfile.mkdtemp(prefix="fuzz-settings-")) / "tiny"), device="cpu"
    )


@cache
def damaged(where: str) -> Qwen3:
    """A small model whose diffusion view alone holds a NaN."""
    model = small_model(seed=1)
    getattr(model.layers[0].diffusion, where).data.view(-1)[0] = math.nan
    return model


def valid(rng: random.Random, model: Qwen3) -> dict[str, Any]:
    """Settings that are possible for a model."""
    settings: dict[str, Any] = {"max_new_tokens": rng.randint(1, 14), "seed": rng.randrange(2**64)}
    if rng.random() < 0.5:
        settings["temperature"] = rng.choice([0.0, 0.3, 0.8, 1.0, 2.5])
        settings["top_k"] = rng.choice([0, 0, 1, 5, 90])
        settings["top_p"] = rng.choice([1.0, 1.0, 0.9, 1e-6])
        settings["min_p"] = rng.choice([0.0, 0.0, 0.05, 1.0])
    if rng.random() < 0.3:
        settings["repetition_penalty"] = rng.choice([0.01, 0.9, 1.3, 100])
    for name in ("frequency_penalty", "presence_penalty"):
        if rng.random() < 0.3:
            settings[name] = rng.choice([-2, -0.3, 0.7, 2])
    if rng.random() < 0.3:
        tokens = rng.sample(range(model.config.vocab_size), rng.randint(0, 8))
        settings["logit_bias"] = {token: rng.choice([-math.inf, -5, 3.5, 1e30]) for token in tokens}
    if rng.random() < 0.3:
        settings["ignore_eos"] = rng.random() < 0.5
        settings["stop_token_ids"] = rng.sample(range(model.config.vocab_size), rng.randint(0, 16))
    if model.text is not None and rng.random() < 0.6:
        settings["stop"] = rng.sample(STOPS, rng.randint(0, 3))
    return settings


def case(rng: random.Random, folder: Path) -> Iterator[Finding]:
    """One call with an odd setting, or one pair of texts."""
    if rng.random() < 0.4:
        yield from odd_call(rng)
        return
    model = rng.choice([tokenized(), tokenized(), damaged("qkv"), damaged("o")])
    settings = valid(rng, model)
    prompt = [rng.randrange(4, 90) for _ in range(rng.randint(1, 12))]
    how: dict[str, Any] = {"strategy": rng.choice(["auto", "two-pass", "two-pass", "one-pass", "lookup"])}
    how["block_size"] = rng.choice([None, None, 3, 5, 8])
    how["tree_nodes"] = rng.choice(["auto", 0, 0, 1, 6, 20])
    kind = "text differs" if model is tokenized() else "damaged drafter"
    plain = model.generate(prompt, strategy="autoregressive", **settings)
    try:
        drafted = model.generate(prompt, **how, **settings)
    except InputError as error:
        yield Finding(kind, f"{how} {settings}: {error}")
        return
    same = drafted.token_ids == plain.token_ids and drafted.logprobs == plain.logprobs
    if not same or drafted.text != plain.text or drafted.stats.finish_reason != plain.stats.finish_reason:
        yield Finding(kind, f"{prompt} {how} {settings}")
    if any(stop in plain.text for stop in settings.get("stop", ())):
        yield Finding("stop string", f"{plain.text!r} holds one of {settings['stop']}")


def odd_call(rng: random.Random) -> Iterator[Finding]:
    """A call one setting of which is odd; it may be possible all the same."""
    name, value = rng.choice(NAMES), rng.choice(ODD)
    settings: dict[str, Any] = {"max_new_tokens": 2, name: value}
    try:
        tokenized().generate([5, 6, 7], **settings)
    except InputError as error:
        said = str(error)
        if name not in said:
            yield Finding("nameless", f"{name}: {said!r}")
        if len(said) > LONGEST_LINE or "\n" in said:
            yield Finding("long line", f"{name}: {len(said)} characters")
    except Exception as error:
        yield Finding(
            "foreign error", f"{name}={type(value).__name__}: {type(error).__name__}: {error}"[:200]
        )
