"""generate: prompt in, tokens, text and statistics out, by any strategy."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .captured import lent_cache
from .decode import Decoding, Run, cycles
from .decode.stream import OnTokens, TokenStream
from .errors import InputError, in_memory, quoted
from .request import Request

if TYPE_CHECKING:
    from .model import Qwen3

OnRun = Callable[[Run, int], None]


@dataclass
class GenerationStats:
    """Counts and times of one generation. A forward is a pass of any kind; the prefill counts as one."""

    strategy: str
    seed: int
    forwards: int = 0
    cycles: int = 0
    tokens: int = 0  # new tokens kept, the end token included if it came
    cycle_tokens: int = 0  # those of them that cycles committed: all but the prefill's first
    nodes: int = 0  # proposals verified by cycles
    accepted_histogram: list[int] = field(
        default_factory=list
    )  # [n]: cycles that kept n proposals beside their last token
    seconds: float = 0.0
    seconds_in: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # drafts, trees, verification
    finish_reason: str = ""  # end_token, stop_string, length, callback or interrupted
    verify: str = "coupled"  # or "rejection"
    cycles_of: dict[str, int] = field(default_factory=dict)  # by kind: plain, two-pass, one-pass

    @property
    def tokens_per_forward(self) -> float:
        """Tokens / forwards (TPF); 1.0 for plain decoding."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed by cycles / cycles; a cut last cycle counts what was kept."""
        return self.cycle_tokens / self.cycles if self.cycles else 0.0

    @property
    def nodes_per_cycle(self) -> float:
        """Proposals verified / cycles."""
        return self.nodes / self.cycles if self.cycles else 0.0

    @property
    def time_shares(self) -> dict[str, float]:
        """Of the cycles' time: in drafts with what ranks their tokens, in growing trees, in verification."""
        return shares_of(self.seconds_in)

    def count_cycle(self, kept: int, kind: str) -> None:
        """Record a cycle of which `kept` tokens were kept."""
        self.cycles += 1
        self.cycles_of[kind] = self.cycles_of.get(kind, 0) + 1
        self.cycle_tokens += kept
        self.accepted_histogram += [0] * (kept - len(self.accepted_histogram))
        self.accepted_histogram[kept - 1] += 1

    def to_dict(self) -> dict[str, object]:
        """All counts, ratios and shares, ready for JSON."""
        return asdict(self) | {
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_cycle": self.tokens_per_cycle,
            "nodes_per_cycle": self.nodes_per_cycle,
            "time_shares": self.time_shares,
        }


def shares_of(seconds: Sequence[float]) -> dict[str, float]:
    """Shares of seconds spent in drafts, trees and verification."""
    whole = sum(seconds) or 1.0
    return {name: part / whole for name, part in zip(("draft", "tree", "verify"), seconds, strict=True)}


@dataclass
class Result:
    """A finished generation."""

    token_ids: list[int]
    text: str
    logprobs: list[
        float
    ]  # the model's log-probability of each token, before bias, penalty, temperature and filters
    stats: GenerationStats

    def whole(self) -> Result:
        """Itself, for who compares or times texts. Raises KeyboardInterrupt for half a text, which Ctrl-C
        ended."""
        if self.stats.finish_reason == "interrupted":
            raise KeyboardInterrupt
        return self


@torch.inference_mode()
def generate(
    model: Qwen3,
    prompt_ids: Sequence[int],
    strategy: str = "auto",
    max_new_tokens: int | None = None,
    *,
    on_tokens: OnTokens | None = None,
    on_run: OnRun | None = None,
    **settings: Any,
) -> Result:
    """Decode after `prompt_ids`. The text depends on weights, prompt, settings and seed, never on strategy or
    block size (but for verify="rejection").

    strategy, max_new_tokens, settings: those of `Request` (request.py), which says what each is.
    on_tokens(ids, text): called with each accepted run; returning False stops.
    on_run(run, kept): called with the prefill and each cycle and how many of its tokens were kept, before
    on_tokens; cycles are then the host's loop, which tells their trees and the target's choices
    (decode/state.py). Ctrl-C ends a generation with what it has.
    On CUDA one thread and stream at a time: kernels share a workspace.
    Raises InputError for impossible settings, a prompt that is empty or does not fit, logits that are not
    numbers, and a pass that does not fit into memory."""
    for name, callback in (("on_tokens", on_tokens), ("on_run", on_run)):
        if callback is not None and not callable(callback):
            raise InputError(f"{name} is {quoted(callback)}; a function was expected")
    asked = Request(strategy=strategy, max_new_tokens=max_new_tokens, **settings)
    prompt = _checked_prompt(model, prompt_ids)
    request = asked.fit(model.config, len(prompt), model.text is not None)
    budget, block_size, seed = request.max_new_tokens, request.block_size, request.seed
    assert budget is not None and block_size is not None and seed is not None, request
    stream = TokenStream(model.text, model.config.eos_token_ids, request.stop, budget, on_tokens)
    stats = GenerationStats(request.strategy, seed, verify=request.verify)
    with lent_cache(model, len(prompt) + budget) as cache:
        decoding = Decoding(
            model, cache, prompt, budget, request.sampling, block_size, request.tree_nodes, request.verify
        )
        decoding.watched = on_run is not None
        with in_memory("a pass of this text", "shorten it, or ask for fewer tree_nodes"):
            logprobs = _run(decoding, cycles(decoding, request.strategy), stream, stats, on_run)
    return Result(stream.token_ids, stream.text, logprobs, stats)


def _run(
    decoding: Decoding,
    runs: Iterator[Run],
    stream: TokenStream,
    stats: GenerationStats,
    on_run: OnRun | None,
) -> list[float]:
    """Prefill, then cycles until the stream ends; fills in `stats` and returns the kept tokens' log-
    probabilities.
    """
    began = time.perf_counter()
    logprobs: list[float] = []
    try:
        run = decoding.prefill()
        stats.forwards += run.forwards
        kept = stream.push(run.tokens)
        logprobs += run.logprobs[:kept]
        if on_run is not None:
            on_run(run, kept)
        stream.release()  # last: Ctrl-C in the callback leaves tokens, log-probabilities and counts in step
        while not stream.finish_reason:
            run = next(runs)
            stats.forwards += run.forwards
            kept = stream.push(run.tokens)
            stats.count_cycle(kept, run.kind)
            stats.nodes += run.nodes
            stats.seconds_in = [a + b for a, b in zip(stats.seconds_in, run.seconds, strict=True)]
            logprobs += run.logprobs[:kept]
            if on_run is not None:
                on_run(run, kept)
            stream.release()
    except KeyboardInterrupt:
        stream.finish("interrupted")
    stats.seconds = time.perf_counter() - began
    stats.tokens = len(stream.token_ids)
    stats.finish_reason = stream.finish_reason
    return logprobs[: stats.tokens]


def _checked_prompt(model: Qwen3, prompt_ids: Sequence[int]) -> list[int]:
    try:
        prompt = [operator.index(token) for token in prompt_ids]
    except TypeError:
        raise InputError(
            "the prompt must be a list of token ids: encode text first (model.text.encode)"
        ) from None
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    check_ids(prompt, model.config.vocab_size)
    return prompt


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raises InputError for a token id past the vocabulary: a kernel would read past the embedding."""
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(
            f"the prompt holds token id {quoted(wrong)}; ids of this checkpoint are 0..{vocabulary - 1}"
        )
