"""What requests are read for: a checkpoint by the name that answers give it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Qwen3Config
from ..errors import InputError
from ..reading import read_json_object
from ..request import Request
from ..text import Text

GENERATION_CONFIG = "generation_config.json"
# Settings that a checkpoint's generation_config.json recommends: those that vLLM takes from it
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Served:
    """A checkpoint that requests may name. defaults: settings of a request that does not give them.
    fingerprint: two answers with the same one and the same seed have the same text; None: nobody says.
    longest: tokens of a text, prompt and answer, that the engine has a place for; None: as the context."""

    name: str
    config: Qwen3Config
    text: Text
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    longest: int | None = None

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return min(self.config.context_length, self.longest or self.config.context_length)


def recommended(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint's generation_config.json that become defaults of requests, as with vLLM;
    like there, `do_sample` is not looked at. Raises InputError for a file or a value that is none."""
    file = folder / GENERATION_CONFIG
    raw = read_json_object(file) if os.path.lexists(file) else {}
    found = {name: raw[name] for name in RECOMMENDED if raw.get(name) is not None}
    if found.get("top_k") == -1:  # vLLM's word for off
        found["top_k"] = 0
    try:
        Request(**found)
    except InputError as error:
        raise InputError(f"{file}: {error}: correct it, or use --generation-config none") from None
    return found
