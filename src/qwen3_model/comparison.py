"""Is a strategy lossless here, and what does it gain? Every prompt is decoded plainly and with the strategy,
and tokens and log-probabilities are compared bit for bit.
"""

from __future__ import annotations

import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from .decode import many
from .decode.sequence import GenerationStats, Result, shares_of
from .errors import InputError
from .request import Request

if TYPE_CHECKING:
    from .qwen3 import Qwen3

GRAM = 8  # tokens; a text that repeats itself has few different runs of this length and flatters a drafter


@dataclass(frozen=True)
class Pair:
    """A prompt decoded both ways with the same seed."""

    prompt: int  # index, from 0
    seed: int
    prompt_ids: list[int]
    plain: Result
    drafted: Result

    @property
    def diverges_at(self) -> int | None:
        """Index of the first new token that differs, in itself or in a bit of its log-probability."""
        both = zip_longest(_bits(self.plain), _bits(self.drafted))
        return next((i for i, (plain, drafted) in enumerate(both) if plain != drafted), None)

    @property
    def same_tokens(self) -> bool:
        """Whether the texts agree, whatever the bits of their log-probabilities."""
        return self.plain.token_ids == self.drafted.token_ids


@dataclass(frozen=True)
class Side:
    """A strategy's token at a divergence, None where its text had ended."""

    token: int | None
    text: str | None
    logprob: float | None  # as that strategy returned it
    logit: float | None  # recomputed after the common text


@dataclass(frozen=True)
class Divergence:
    """Where two decodings of a prompt part."""

    prompt: int
    seed: int
    position: int  # index of the new token
    plain: Side
    drafted: Side


@dataclass(frozen=True)
class Report:
    """The comparison of a strategy with plain decoding over all prompts."""

    strategy: str
    pairs: list[Pair]
    divergence: Divergence | None  # the first
    together: float | None = None  # seconds of all texts of the strategy, decoded side by side

    @property
    def identical(self) -> int:
        """How many pairs agree in every bit."""
        return sum(pair.diverges_at is None for pair in self.pairs)

    @property
    def accepted_histogram(self) -> list[int]:
        """[n]: cycles that kept n proposals beside the bonus token."""
        counts = Counter[int]()
        for pair in self.pairs:
            counts.update(dict(enumerate(pair.drafted.stats.accepted_histogram)))
        return [counts[n] for n in range(max(counts, default=-1) + 1)]

    @property
    def distinct_8grams(self) -> float | None:
        """Share of different runs of 8 tokens in the plain text, mean over the texts that have such runs."""
        shares = []
        for pair in self.pairs:
            ids = pair.plain.token_ids
            grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
            shares += [len(set(grams)) / len(grams)] if grams else []
        return sum(shares) / len(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the texts, ready for JSON: ratios of sums, and the per-prompt means beside them."""
        stats = [pair.drafted.stats for pair in self.pairs]
        per = {
            "tokens_per_cycle": [(s.cycle_tokens, s.cycles) for s in stats],
            "tokens_per_forward": [(s.tokens, s.forwards) for s in stats],
        }
        return {
            "strategy": self.strategy,
            "compared": len(self.pairs),
            "identical": self.identical,
            "same_tokens": sum(pair.same_tokens for pair in self.pairs),
            "different_prompts": sorted({p.prompt for p in self.pairs if p.diverges_at is not None}),
            "first_divergence": asdict(self.divergence) if self.divergence else None,
            **{name: _ratio(pairs) for name, pairs in per.items()},
            **{f"{name}_mean_per_prompt": _mean_ratio(pairs) for name, pairs in per.items()},
            "nodes_per_cycle": _ratio([(s.nodes, s.cycles) for s in stats]),
            "time_shares": shares_of(
                [sum(part) for part in zip(*(s.seconds_in for s in stats), strict=True)]
            ),
            "accepted_histogram": self.accepted_histogram,
            "distinct_8grams": self.distinct_8grams,
            "tokens": sum(s.tokens for s in stats),
            "forwards": sum(s.forwards for s in stats),
            "cycles": sum(s.cycles for s in stats),
            "tokens_per_second": self._tokens_per_second(stats),
            "tokens_per_second_plain": _ratio(
                [(pair.plain.stats.tokens, pair.plain.stats.seconds) for pair in self.pairs]
            ),
        }

    def _tokens_per_second(self, stats: Sequence[GenerationStats]) -> float:
        """Of one text at a time, or of all together."""
        if self.together is None:
            return _ratio([(s.tokens, s.seconds) for s in stats])
        return sum(s.tokens for s in stats) / self.together


def compare(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    strategy: str,
    seed: int = 0,
    seeds: int = 1,
    on_pair: Callable[[Pair], None] | None = None,
    load: Callable[[], Qwen3] | None = None,
    jobs: int = 1,
    batch: int = 1,
    **settings: Any,
) -> Report:
    """Decode every prompt (token ids) with "autoregressive" and with `strategy`, `seeds` times.

    Round r decodes prompt i with seed `seed + r * len(prompts) + i`. settings: those of `generate`. A short
    decoding of each kind comes first, so that speeds do not hold what only a first call pays. With jobs > 1
    so many processes share the work, each with a model of its own from the picklable `load`. With batch > 1
    so many texts of the strategy run side by side, and plain decoding, one text at a time, comes behind.
    Raises InputError, with the prompt's number or where both would be the same, and KeyboardInterrupt."""
    if strategy == "autoregressive" and batch == 1:
        raise InputError("plain decoding would be compared with itself: name another strategy")
    _warm_up(model, prompts[0], strategy, settings)
    tasks = [(nth % len(prompts), seed + nth) for nth in range(seeds * len(prompts))]
    pairs: list[Pair] = []
    found: Iterable[Pair]
    jobs, together = min(jobs, len(tasks)), None
    if batch > 1:
        began = time.perf_counter()
        drafted = _side_by_side(model, prompts, strategy, tasks, batch, settings)
        together = time.perf_counter() - began
        found = (
            Pair(
                i,
                seed,
                list(prompts[i]),
                _decode(model, i, prompts[i], "autoregressive", seed, **settings),
                of,
            )
            for (i, seed), of in zip(tasks, drafted, strict=True)
        )
    elif jobs > 1 and load is not None:
        found = _spread(tasks, jobs, load, prompts, strategy, settings)
    else:
        found = map(partial(_pair, model, prompts, strategy, settings), tasks)
    for pair in found:
        pairs.append(pair)
        if on_pair:
            on_pair(pair)
    different = next((pair for pair in pairs if pair.diverges_at is not None), None)
    divergence = _explain(model, different) if different else None
    return Report(pairs[0].drafted.stats.strategy, pairs, divergence, together)


def _side_by_side(
    model: Qwen3, prompts: Sequence[Sequence[int]], strategy: str, tasks: Sequence[tuple[int, int]],
    slots: int, settings: Mapping[str, Any],
) -> list[Result]:  # fmt: skip
    """The strategy's results of all tasks, `slots` texts at a time."""
    jobs = [(prompts[i], Request(strategy=strategy, seed=seed, **settings)) for i, seed in tasks]
    engine = model.engine_of(slots)
    for (i, _), job in zip(tasks, jobs, strict=True):
        try:
            engine.fitted(*job)
        except InputError as error:
            raise InputError(f"prompt {i + 1}: {error}") from None
    apart = [(prompt, replace(request, cache_salt="a first call")) for prompt, request in jobs[:slots]]
    for result in many.results(engine, apart):  # what only a first call pays
        result.whole()
    return [result.whole() for result in many.with_bar(many.results(engine, jobs), len(jobs), None)]


def _warm_up(model: Qwen3, prompt: Sequence[int], strategy: str, settings: Mapping[str, Any]) -> None:
    short = {**settings, "max_new_tokens": min(4, settings["max_new_tokens"])}
    for name in (strategy, "autoregressive"):  # a refusal names the strategy that was asked for
        _decode(model, 0, prompt, name, 0, **short)


def _pair(
    model: Qwen3,
    prompts: Sequence[Sequence[int]],
    strategy: str,
    settings: Mapping[str, Any],
    task: tuple[int, int],
) -> Pair:
    """A task's (prompt, seed), decoded both ways."""
    i, seed = task
    plain, drafted = (
        _decode(model, i, prompts[i], name, seed, **settings) for name in ("autoregressive", strategy)
    )
    return Pair(i, seed, list(prompts[i]), plain, drafted)


_worker: Callable[[tuple[int, int]], Pair]  # of a worker process


def _start_worker(
    load: Callable[[], Qwen3],
    threads: int,
    prompts: Sequence[Sequence[int]],
    strategy: str,
    settings: Mapping[str, Any],
) -> None:
    global _worker
    torch.set_num_threads(threads)  # on a CPU the bits are promised for one number of threads
    model = load()
    _warm_up(model, prompts[0], strategy, settings)
    _worker = partial(_pair, model, prompts, strategy, settings)


def _pair_of_worker(task: tuple[int, int]) -> Pair:
    return _worker(task)


def _spread(
    tasks: list[tuple[int, int]], jobs: int, load: Callable[[], Qwen3], *shared: Any
) -> Iterator[Pair]:
    """The pairs of the tasks, in order, from `jobs` processes."""
    context = get_context("spawn")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is this process's
    try:
        pool = ProcessPoolExecutor(jobs, context, _start_worker, (load, torch.get_num_threads(), *shared))
        waiting = [pool.submit(_pair_of_worker, task) for task in tasks]
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for future in waiting:
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            f"a process of --jobs {jobs} ended before its work: memory may not do for so many models"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):
            process.terminate()


def _decode(
    model: Qwen3, index: int, prompt: Sequence[int], strategy: str, seed: int, **settings: Any
) -> Result:
    try:
        return model.generate(prompt, strategy=strategy, seed=seed, **settings).whole()
    except InputError as error:
        raise InputError(f"prompt {index + 1}: {error}") from None


def _bits(result: Result) -> list[tuple[int, bytes]]:
    return [(t, struct.pack("<d", p)) for t, p in zip(result.token_ids, result.logprobs, strict=True)]


def _explain(model: Qwen3, pair: Pair) -> Divergence:
    """Both tokens at the divergence of a pair, with the logits that plain decoding has for them there."""
    at = pair.diverges_at
    assert at is not None
    logits = model.logits([*pair.prompt_ids, *pair.plain.token_ids[:at]])

    def side(result: Result) -> Side:
        if at >= len(result.token_ids):
            return Side(None, None, None, None)
        token = result.token_ids[at]
        text = model.text.decode([token]) if model.text else None
        return Side(token, text, result.logprobs[at], float(logits[token]))

    return Divergence(pair.prompt, pair.seed, at, side(pair.plain), side(pair.drafted))


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Ratio of sums; 0 where nothing was counted."""
    over, under = (sum(column) for column in zip(*pairs, strict=True))
    return over / under if under else 0.0


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Mean of the ratios of those prompts that have one."""
    ratios = [over / under for over, under in pairs if under]
    return sum(ratios) / len(ratios) if ratios else None
