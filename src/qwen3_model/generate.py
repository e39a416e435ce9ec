"""generate: prompt in, tokens, text and statistics out, by any strategy."""

from __future__ import annotations

import math
import operator
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from orthrus_kernels import Sampling

from .captured import lent_cache
from .decode import STRATEGIES, VERIFY, Decoding, Run, cycles, one_pass
from .decode.stream import OnTokens, TokenStream
from .errors import InputError, one_line

if TYPE_CHECKING:
    from .model import Qwen3

OnRun = Callable[[Run, int], None]

MOST_NODES = 255  # of a draft tree, its root besides: rows of a pass that kernels are tuned for


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
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    on_tokens: OnTokens | None = None,
    block_size: int | None = None,
    tree_nodes: int | Literal["auto"] = "auto",
    verify: str = "coupled",
    on_run: OnRun | None = None,
) -> Result:
    """Decode after `prompt_ids`. The text depends on weights, prompt, settings and seed, never on strategy or
    block size (but for verify="rejection").

    strategy: "autoregressive", "two-pass", "one-pass" (a pass verifies a draft and makes the next one), or
    "auto": for an Orthrus what is fastest, from cycle to cycle (the statistics' cycles_of tell what it was),
    else autoregressive. max_new_tokens: None is what fits the context.
    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 turn these off; logit_bias is
    added per token id. seed: None draws one, returned in the statistics. stop: the text ends before the
    first of these strings; token_ids end with the token that completed it. on_tokens(ids, text): called with
    each accepted run; returning False stops. block_size: rows of a diffusion block, the checkpoint's at most
    and by default; 8 by default in one-pass. tree_nodes: proposals of a cycle's draft tree, the likeliest
    paths through the block; 0 is the chain; "auto" what is fastest, from cycle to cycle, and no draft where
    none pays. verify: "coupled" compares proposals with the target's choices; "rejection", for comparison,
    is rejection sampling (arXiv 2211.17192) of a two-pass chain at a temperature above 0: text distributed
    as plain sampling's, but not the same for a seed, and dependent on the drafter and the block size.
    on_run(run, kept): called with the prefill and each cycle and how many of its tokens were kept, before
    on_tokens; cycles are then the host's loop, which tells their trees and the target's choices
    (decode/state.py). Ctrl-C ends a generation with what it has.
    On CUDA one thread and stream at a time: kernels share a workspace.
    Raises InputError for impossible settings, a prompt that is empty or does not fit, and logits that are not
    numbers."""
    prompt = _checked_prompt(model, prompt_ids)
    budget = _checked_budget(model, len(prompt), max_new_tokens)
    name = _checked_strategy(model, strategy)
    if verify == "rejection" and name == "auto":
        name = "two-pass"
    stop = _checked_stop(model, stop)
    seed = secrets.randbits(32) if seed is None else seed
    sampling = _checked_sampling(
        model, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, logit_bias=dict(logit_bias or {}), seed=seed,
    )  # fmt: skip
    block_size = checked_block_size(model, block_size, name)
    tree_nodes = 0 if verify == "rejection" and tree_nodes == "auto" else _checked_tree_nodes(tree_nodes)
    _check_verify(verify, name, sampling, tree_nodes)
    stream = TokenStream(model.text, model.config.eos_token_ids, stop, budget, on_tokens)
    stats = GenerationStats(name, seed, verify=verify)
    with lent_cache(model, len(prompt) + budget) as cache:
        decoding = Decoding(model, cache, prompt, budget, sampling, block_size, tree_nodes, verify)
        decoding.watched = on_run is not None
        logprobs = _run(decoding, cycles(decoding, name), stream, stats, on_run)
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
        raise InputError(f"the prompt holds token id {wrong}; ids of this checkpoint are 0..{vocabulary - 1}")


def _checked_budget(model: Qwen3, prompt: int, max_new_tokens: int | None) -> int:
    context = model.config.context_length
    if prompt >= context:
        raise InputError(f"the prompt has {prompt} tokens and the context only {context}: shorten the prompt")
    if max_new_tokens is None:
        return context - prompt
    if not isinstance(max_new_tokens, int):
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; a whole number was expected")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if prompt + max_new_tokens > context:
        raise InputError(
            f"prompt ({prompt} tokens) + max_new_tokens ({max_new_tokens}) is past the context of {context}: "
            f"ask for at most {context - prompt} new tokens"
        )
    return max_new_tokens


def _checked_strategy(model: Qwen3, strategy: str) -> str:
    if strategy == "auto":
        return "auto" if model.config.has_diffusion_view else "autoregressive"
    if strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {strategy!r}: use {', '.join(STRATEGIES)}")
    if strategy != "autoregressive" and not model.config.has_diffusion_view:
        raise InputError(
            f"strategy {strategy} needs an Orthrus; this is a plain Qwen3 without a diffusion view: "
            "use autoregressive, or distil one (orthrus distill)"
        )
    return strategy


def _checked_stop(model: Qwen3, stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not isinstance(text, str) for text in stop):
        raise InputError(f"stop is {stop!r}; strings were expected")
    if any(not text for text in stop):
        raise InputError("a stop string is empty: leave it out, or give at least one character")
    if stop and model.text is None:
        raise InputError("stop strings need a tokenizer, and this model has none")
    return stop


def _checked_sampling(model: Qwen3, **settings) -> Sampling:
    try:
        sampling = Sampling(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(one_line(error)) from None
    for token in sampling.logit_bias:
        if not 0 <= token < model.config.vocab_size:
            raise InputError(
                f"logit_bias names token {token}; this checkpoint's are 0..{model.config.vocab_size - 1}"
            )
    if sum(bias == -math.inf for bias in sampling.logit_bias.values()) == model.config.vocab_size:
        raise InputError("logit_bias bans every token: leave at least one")
    return sampling


def checked_block_size(model: Qwen3, block_size: int | None, strategy: str) -> int:
    """Rows of a strategy's blocks, its default for None. Raises InputError."""
    least, most = 2, model.config.block_size
    if strategy == "one-pass":  # the first proposal of its blocks is dropped
        least, most = one_pass.LEAST_BLOCK, min(most, one_pass.MOST_BLOCK)
        if most < least:
            raise InputError(
                f"strategy one-pass takes blocks of {least} rows or more, this checkpoint's have {most}"
            )
    if block_size is None or not most:
        return min(most, one_pass.BLOCK) if strategy == "one-pass" else most
    if not least <= block_size <= most:
        raise InputError(f"block_size is {block_size}; {strategy} of this checkpoint takes {least} to {most}")
    return block_size


def _checked_tree_nodes(nodes: int | str) -> int | Literal["auto"]:
    if nodes == "auto":
        return "auto"
    if not isinstance(nodes, int) or not 0 <= nodes <= MOST_NODES:
        raise InputError(
            f'tree_nodes is {nodes!r}; "auto" or a whole number from 0 (a chain) to {MOST_NODES} was expected'
        )
    return nodes


def _check_verify(verify: str, strategy: str, sampling: Sampling, tree_nodes: int | str) -> None:
    if verify not in VERIFY:
        raise InputError(f"verify is {verify!r}; use {' or '.join(VERIFY)}")
    if verify == "coupled":
        return
    if strategy != "two-pass":
        raise InputError(f"verify {verify} takes strategy two-pass of an Orthrus, not {strategy}")
    if sampling.temperature == 0:
        raise InputError(f"verify {verify} takes a temperature above 0: a greedy choice is not a sample")
    if tree_nodes != 0:
        raise InputError(f"verify {verify} takes a chain, not a tree: tree_nodes is {tree_nodes}, use 0")
