"""What crosses the pipe between a server and its engine's process: plain objects, pickled. Both ends are this
program, and nothing else can write there.

To the engine: EngineOptions first, then Submit, Cancel and, last, Stop. From it: Ready or Failed first, then
a Batch a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..decode.scheduler import Load as EngineLoad
from ..decode.sequence import GenerationStats, Likeliest
from ..request import Request

if TYPE_CHECKING:
    from ..decode.engine import Engine
    from ..qwen3 import Qwen3


@dataclass(frozen=True)
class EngineOptions:
    """The engine that a process makes. A bench may make another one: a subclass with a `made` of its own.

    model to revision, diffusion, activations: as in `Qwen3.from_pretrained`; model: None: the embedded one.
    slots, cache_tokens: as in `Engine`, but that the cache keeps its size with one slot too."""

    model: str | Path | None = None
    device: str | None = None
    dtype: str | None = None
    backend: str = "auto"
    revision: str | None = None
    slots: int = 1
    cache_tokens: int | None = None
    diffusion: str | None = None
    activations: str | None = None

    def made(self) -> tuple[Qwen3, Engine]:
        """A loaded model, and its engine, which does not keep it alive. Raises InputError."""
        from ..checkpoint import EMBEDDED
        from ..qwen3 import Qwen3
        from ..settings import pick_threads

        path = EMBEDDED if self.model is None else self.model
        model = Qwen3.from_pretrained(
            path, self.device, self.dtype, self.backend, self.revision, diffusion=self.diffusion,
            activations=self.activations,
        )  # fmt: skip
        pick_threads(model.device, model.config.hidden_size)
        tokens = self.cache_tokens
        if tokens is None:
            tokens = max(model.positions_that_fit(model.config.context_length * self.slots), 1)
        return model, model.engine_of(self.slots, tokens)


@dataclass(frozen=True)
class Submit:
    """Decode a text. number: its name in all messages. request: without stop strings."""

    number: int
    prompt_ids: list[int]
    request: Request


@dataclass(frozen=True)
class Cancel:
    """End a text before the next step. One that has ended already stays as it is."""

    number: int


@dataclass(frozen=True)
class Stop:
    """End the process, whatever runs."""


@dataclass(frozen=True)
class Ready:
    """The engine takes texts. cache_tokens: positions that the cache holds for all texts. longest: tokens of
    a text at most, prompt and answer: what the context and the cache hold. fingerprint: as in
    fingerprint.py. device: its name. warm_seconds: from the loaded model to here."""

    cache_tokens: int
    longest: int
    slots: int
    fingerprint: str
    device: str
    warm_seconds: float


@dataclass(frozen=True)
class Failed:
    """The engine cannot start. message: an InputError's line."""

    message: str


@dataclass(frozen=True)
class Ran:
    """What a cycle, or a prompt's pass, has added to a text. tokens: kept; forwards, kind, nodes: as in
    `Run`. top_logprobs: at each token, of a request that asks for them, else empty. cached: tokens of the
    prompt that were found in the cache."""

    tokens: list[int]
    logprobs: list[float]
    forwards: int
    kind: str
    nodes: int
    top_logprobs: list[Likeliest] = field(default_factory=list)
    cached: int = 0


@dataclass(frozen=True)
class Ended:
    """A text's end. reason: as in `GenerationStats.finish_reason`. error: why, where that is "error"."""

    reason: str
    stats: GenerationStats
    error: str


@dataclass(frozen=True)
class Load(EngineLoad):
    """How busy the engine is, and what it has done so far. cycles: of each text. tokens: of all texts."""

    cycles: int = 0
    tokens: int = 0


# a text's number, then the fields of Ran
Row = tuple[int, list[int], list[float], int, str, int, list[Likeliest], int]


@dataclass(frozen=True)
class Batch:
    """What texts got in one step, by number. ran: rows, which take a quarter of the time that objects take to
    be pickled. refused: with the InputError's line of `Engine.submit`."""

    ran: list[Row]
    ended: list[tuple[int, Ended]]
    refused: list[tuple[int, str]]
    load: Load
