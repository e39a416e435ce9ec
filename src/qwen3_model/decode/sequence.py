"""One text being decoded: its tokens, what its cycles said, and what its caller gets to see."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import asdict, dataclass, field

from orthrus_kernels import DraftTree

from ..errors import InputError
from ..matcher import Matcher
from ..request import Request
from .stream import TokenStream

# (id, log-probability) of the model's likeliest tokens at a place, before any setting: likeliest first, and
# the lowest id first of equal ones
Likeliest = list[tuple[int, float]]


@dataclass(slots=True)
class Run:
    """What a cycle adds to a text: accepted proposals, then the bonus token."""

    tokens: list[int]
    logprobs: list[float]
    forwards: int
    kind: str = "plain"  # of the cycle: or "two-pass", "one-pass", "lookup"; "prompt": the pass of the prompt
    nodes: int = 0  # proposals that were verified
    path: Ids[int] = (0,)  # accepted nodes, the root first
    seconds: Ids[float] = (0.0, 0.0, 0.0)  # of draft, tree and verification
    # for a caller that watches, else not filled in
    rows: Ids[int] = (1,)  # of each forward pass
    tree: DraftTree | None = None  # what was verified
    choices: Ids[int] = ()  # the target's token after each node
    # for a request that asks for them: the likeliest tokens where each token stands, as in `Result`
    top_logprobs: Ids[Likeliest] = ()


OnRun = Callable[[Run, int], None]


@dataclass
class GenerationStats:
    """Counts and times of one generation. A forward is a pass of any kind; the prompt's counts as one."""

    strategy: str
    seed: int
    forwards: int = 0
    cycles: int = 0
    tokens: int = 0  # new tokens kept, the end token included if it came
    cycle_tokens: int = 0  # those of them that cycles committed: all but the first
    nodes: int = 0  # proposals verified by cycles
    accepted_histogram: list[int] = field(
        default_factory=list
    )  # [n]: cycles that kept n proposals beside their last token
    seconds: float = 0.0
    seconds_in: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # drafts, trees, verification
    finish_reason: str = ""  # end_token, stop_string, length, callback, cancelled, interrupted or error
    verify: str = "coupled"  # or "rejection"
    cycles_of: dict[str, int] = field(default_factory=dict)  # by kind, as in `Run`
    cached_tokens: int = 0  # of the prompt: found in pages that other texts had filled

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

    def count(self, run: Run, kept: int) -> None:
        """Record a run of which `kept` tokens were kept."""
        self.forwards += run.forwards
        if run.kind == "prompt":
            return
        self.cycles += 1
        self.cycles_of[run.kind] = self.cycles_of.get(run.kind, 0) + 1
        self.cycle_tokens += kept
        if kept > len(self.accepted_histogram):
            self.accepted_histogram += [0] * (kept - len(self.accepted_histogram))
        self.accepted_histogram[kept - 1] += 1
        self.nodes += run.nodes
        for part, seconds in enumerate(run.seconds):
            self.seconds_in[part] += seconds

    def to_dict(self) -> dict[str, object]:
        """All counts, ratios and shares, ready for JSON."""
        return asdict(self) | {
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_cycle": self.tokens_per_cycle,
            "nodes_per_cycle": self.nodes_per_cycle,
            "time_shares": self.time_shares,
        }


def shares_of(seconds: Ids[float]) -> dict[str, float]:
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
    error: str = ""  # why the text ended for the reason "error"
    # with request.top_logprobs: at each token
    top_logprobs: list[Likeliest] = field(default_factory=list)

    def whole(self) -> Result:
        """Return self, or raise KeyboardInterrupt if Ctrl-C cut the text short. Call it before comparing or
        timing texts."""
        if self.stats.finish_reason == "interrupted":
            raise KeyboardInterrupt
        return self


class Sequence:
    """A text and its request. Its last token, the **root** of the next cycle, is not in the cache yet: that
    cycle's pass computes its keys. So the text's length says all: how many positions are committed, where
    the root stands, and how many tokens may follow."""

    def __init__(
        self, prompt: Ids[int], request: Request, stream: TokenStream, on_run: OnRun | None = None,
        matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        """request: fitted, with nothing open. on_run(run, kept): called with every run, before the stream's
        callback; the runs then tell their trees and the target's choices. matcher: of the request's
        grammar."""
        budget, block, seed = request.max_new_tokens, request.block_size, request.seed
        assert budget is not None and block is not None and seed is not None, request
        self.tokens, self.request, self.stream, self.on_run = list(prompt), request, stream, on_run
        self.matcher, self.prompt = matcher, len(prompt)  # prompt: tokens of it
        self.limit = self.prompt + budget  # length of the finished text at most
        # No end token stands below this position; 0: any token may be one.
        self.least = self.prompt + request.min_tokens if request.min_tokens else 0
        self.block_size, self.sampling = block, request.sampling
        self.stats = GenerationStats(request.strategy, seed, verify=request.verify)
        self.epoch = 0  # how often it was preempted
        self.error = ""
        self.logprobs: list[float] = []  # of the tokens kept
        self.top_logprobs: list[Likeliest] = []  # likewise
        self.last_run: Run | None = None
        self._began = 0.0

    @property
    def root(self) -> int:
        """The last known token."""
        return self.tokens[-1]

    @property
    def start(self) -> int:
        """The root's position, which is also the committed length."""
        return len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        """How many tokens may still be added."""
        return self.limit - len(self.tokens)

    @property
    def has_callbacks(self) -> bool:
        """Whether somebody hears of each run."""
        return self.on_run is not None or self.stream.on_tokens is not None

    @property
    def finished(self) -> bool:
        """Whether the text has ended, for whatever reason."""
        return bool(self.stream.finish_reason)

    def begin(self, cached: int = 0) -> None:
        """Start the clock, if it does not run: the text's first pass comes now. cached: tokens of the prompt
        that it does not read."""
        if not self._began:
            self._began, self.stats.cached_tokens = time.perf_counter(), cached

    def add(self, run: Run) -> int:
        """Add a run to the text; returns how many of its tokens were kept. `tell` comes behind it."""
        self.tokens += run.tokens
        kept = self.stream.push(run.tokens)
        self.stats.count(run, kept)
        self.logprobs += run.logprobs[:kept]
        self.top_logprobs += run.top_logprobs[:kept]
        self.last_run = run
        return kept

    def tell(self, run: Run, kept: int) -> None:
        """Hand a run that was added to the caller, and end the text where that has ended it.

        An exception of a callback leaves tokens, log-probabilities and counts in step, and a callback may
        make the engine step."""
        if self.on_run is not None:
            self.on_run(run, kept)
        self.stream.release()
        if self.finished:
            self.end(self.stream.finish_reason)

    def end(self, reason: str) -> None:
        """End the text, keeping what has been decoded; an ended text keeps its first reason."""
        self.stream.finish(reason)
        if not self.stats.finish_reason:
            self.stats.seconds = time.perf_counter() - self._began if self._began else 0.0
            self.stats.finish_reason = self.stream.finish_reason

    def result(self) -> Result:
        """What has been decoded. Raises InputError for a text that has not ended."""
        if not self.finished:
            raise InputError("the text has not ended yet: call step() until it has, or cancel it")
        self.stats.tokens = len(self.stream.token_ids)
        return Result(
            self.stream.token_ids, self.stream.text, self.logprobs[: self.stats.tokens], self.stats,
            self.error, self.top_logprobs[: self.stats.tokens],
        )  # fmt: skip
