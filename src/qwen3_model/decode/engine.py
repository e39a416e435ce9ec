"""The engine: it owns a model's cache and graphs, takes requests, and decodes them step by step.

    engine = Engine(model, slots=32)
    texts = [engine.submit(ids, Request(max_new_tokens=100)) for ids in prompts]
    while engine.step():
        pass
    print(texts[0].result().text)

As many texts run at once as there are slots; the others wait in the order in which they came. Which of them
does what next, scheduler.py says. A text's tokens and log-probabilities do not depend on those beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from functools import partial
from typing import TYPE_CHECKING

import torch

from orthrus_kernels import pages_for

from ..errors import InputError, in_memory, one_line, quoted
from ..model import PREFILL_ROWS, checked_prompt
from ..request import Request, whole_up_to
from . import rejection
from .cycle import Outcome
from .cycles import Launched
from .runner import Runner, cache_size, replays
from .scheduler import Cycle, Load, Prefill, Scheduler, check_fits
from .sequence import OnRun, Result, Run, Sequence
from .stream import OnTokens, TokenStream
from .warm import Warmed, WarmStart

if TYPE_CHECKING:
    from ..model import Network

_SMALLER = "shorten it, or ask for fewer tree_nodes"
MOST_SLOTS, MOST_TOKENS = 256, 1 << 40


class Engine:
    """Decodes requests with one model. On CUDA one thread and stream at a time: kernels share a workspace."""

    def __init__(self, model: Network, slots: int = 1, cache_tokens: int | None = None) -> None:
        """slots: texts that may run at once, up to 256. cache_tokens: positions that the cache holds for all
        of them; None: with one slot what its text needs, else what 0.9 of the free memory holds. Raises
        InputError for what is out of range."""
        self.model, self.slots = model, whole_up_to("slots", slots, MOST_SLOTS)
        if cache_tokens is not None:
            cache_tokens = whole_up_to("cache_tokens", cache_tokens, MOST_TOKENS)
        self._fixed = cache_tokens is not None or self.slots > 1  # whether the cache keeps its size
        self._tokens = cache_tokens
        self.runner: Runner | None = None
        self._scheduler: Scheduler | None = None
        self._waiting: deque[Sequence] = deque()  # for the scheduler
        self._unread: deque[Ids[Launched]] = deque()  # the cycles of each step
        self._alone: tuple[Sequence, Iterator[Run]] | None = None  # by rejection sampling
        self._warm = WarmStart(model, self.slots)

    def warm(self, progress: bool | None = None) -> Warmed:
        """Compile what texts will need, in parallel, and with several slots capture it (warm.py); else the
        first text waits for that. progress: a bar on stderr; None: where that is a terminal. Without CUDA
        graphs nothing is done. Raises InputError where memory runs out."""
        if self.slots > 1 and replays(self.model):
            self.model.grammars.prepare()
            return self._warm.several(self.runner_for(1), progress)
        return self._warm.alone(self._tokens, progress)

    def submit(
        self,
        prompt_ids: Ids[int],
        request: Request | None = None,
        on_tokens: OnTokens | None = None,
        on_run: OnRun | None = None,
    ) -> Sequence:
        """Queue a text; nothing is computed before `step`.

        on_tokens(ids, text): called with each accepted run; returning False stops the text. on_run(run,
        kept): called with the prompt's run and each cycle's, and how many of its tokens were kept, before
        on_tokens; runs then tell their trees and the target's choices, at the cost of speed. Raises
        InputError for impossible settings, for a prompt that is empty or does not fit, and for what cannot
        run beside other texts."""
        for name, callback in (("on_tokens", on_tokens), ("on_run", on_run)):
            if callback is not None and not callable(callback):
                raise InputError(f"{name} is {quoted(callback)}; a function was expected")
        prompt, fitted = self.fitted(prompt_ids, request)
        model, most = self.model, fitted.max_new_tokens
        assert most is not None
        ends, least = fitted.end_tokens(model.config), fitted.min_tokens
        stream = TokenStream(model.text, ends, fitted.stop, most, on_tokens, least)
        matcher = None if fitted.grammar is None else model.grammars.matcher(fitted.grammar)
        text = Sequence(prompt, fitted, stream, on_run, matcher)
        if self._fixed and fitted.verify != "rejection":
            self._schedule(text)
        else:
            self._waiting.append(text)
        return text

    def fitted(self, prompt_ids: Ids[int], request: Request | None = None) -> tuple[list[int], Request]:
        """A prompt as whole numbers, and its request with nothing left open. Raises the InputErrors of
        `submit`, but for one: where nobody has said how large the cache is, only `submit` knows."""
        if not isinstance(request, Request | None):
            raise InputError(f"request is {quoted(request)}; a Request was expected")
        model, prompt = self.model, checked_prompt(prompt_ids, self.model.config.vocab_size)
        fitted = (request or Request()).fit(model.config, len(prompt), model.text is not None)
        self._check_beside(fitted)
        assert fitted.max_new_tokens is not None
        if self._tokens is not None:
            check_fits(len(prompt) + fitted.max_new_tokens, pages_for(self._tokens))
        return prompt, fitted

    def _check_beside(self, request: Request) -> None:
        """Raises InputError for what cannot run beside other texts."""
        if self.slots > 1 and request.verify == "rejection":
            raise InputError('verify "rejection" runs alone: use an Engine of one slot')

    def step(self) -> tuple[Sequence, ...]:
        """Do the next piece of work: a cycle of texts that run, with parts of others' prompts, or such parts.

        Returns the texts that it was for, none if there is nothing to do. Raises InputError when a text's
        logits are not numbers or a pass does not fit into memory, and whatever a callback raises: the texts
        concerned have then ended, for the reason "error", and the engine goes on with the others. Ctrl-C
        ends all texts that run, for the reason "interrupted"; those that wait go on waiting."""
        try:
            with torch.inference_mode():
                self._feed()
                return self._work()
        except KeyboardInterrupt as error:
            self._fail(error)
            raise

    def generate(
        self,
        prompt_ids: Ids[int],
        request: Request | None = None,
        on_tokens: OnTokens | None = None,
        on_run: OnRun | None = None,
    ) -> Result:
        """Submit a text and step until it has ended; arguments and errors are those of `submit` and `step`,
        and an error of another text's step ends this one too. Ctrl-C ends it with what has been decoded."""
        text = self.submit(prompt_ids, request, on_tokens, on_run)
        try:
            while not text.finished:
                self.step()
        except KeyboardInterrupt:
            self.cancel(text, "interrupted")
        except BaseException:
            self.cancel(text, "error")
            raise
        return text.result()

    def cancel(self, text: Sequence, reason: str = "cancelled") -> None:
        """End a text, whether it runs or waits, with what has been decoded. An ended text stays as it is."""
        text.end(reason or "cancelled")
        self._drop(text)

    def forget(self) -> None:
        """Free the cache and its graphs; the next text makes them anew. Raises InputError while a text is
        there that needs them."""
        if self._scheduler:
            raise InputError(
                "texts of this engine have not ended: call step() until they have, or cancel them"
            )
        self.runner, self._scheduler = None, None
        self._unread.clear()

    @property
    def load(self) -> Load:
        """How busy slots and pages are."""
        return Load() if self._scheduler is None else self._scheduler.load

    @property
    def cache_tokens(self) -> int:
        """Positions that the cache holds for all texts together; 0 before the first text."""
        return 0 if self.runner is None else self.runner.cache.positions

    def _feed(self) -> None:
        """Hand texts that wait to the scheduler: one at a time where the cache grows with its texts."""
        while self._waiting and self._alone is None and not self._scheduler:
            text = self._waiting.popleft()
            try:
                if text.request.verify == "rejection":
                    self._alone = text, rejection.runs(self.model, text)
                else:
                    self._schedule(text)
            except BaseException as error:
                self._end(text, error)
                raise

    def _schedule(self, text: Sequence) -> None:
        """Give a text to the scheduler, with a cache that may hold it. Raises InputError where none can."""
        self.runner_for(text.limit)
        assert self._scheduler is not None
        self._scheduler.add(text, text.tokens, text.limit, text.request.cache_salt)

    def runner_for(self, limit: int) -> Runner:
        """The runner for a text of so many positions: the last one where that is large enough and its graphs
        are wanted, since they stay good."""
        runner, scheduler = self.runner, self._scheduler
        if runner is not None and scheduler is not None:
            fits = self._fixed or runner.cache.capacity >= limit
            if scheduler or (fits and runner.graphs == self.model.use_graphs):
                return runner
        runner = None
        self.forget()  # frees the memory before more is taken
        capacity, pages = cache_size(self.model, self.slots, self._tokens, limit)
        self.runner = runner = Runner(self.model, self.slots, capacity, pages)
        self._scheduler = Scheduler(self.slots, pages, PREFILL_ROWS, reuse=self._fixed)
        return runner

    def _work(self) -> tuple[Sequence, ...]:
        if self._alone is not None:
            text, runs = self._alone
            return self._all(((text, lambda: self._tell(text, *self._add(text, next(runs)))),))
        if self._scheduler is None:
            return ()
        assert self.runner is not None
        try:
            pace = self.runner.cycles.pace
            self._scheduler.beside, self._scheduler.at_once = pace.rows(), pace.at_once
            # what is in flight and the next cycle may add this much to a text
            work = self._scheduler.next((len(self._unread) + 1) * self.runner.cycles.slots.standing.reach)
            if work is not None:
                self.runner.grant(work.grants)
            if isinstance(work, Cycle):
                self._launch(work)
        except Exception as error:
            self._fail(error)
            raise
        texts = () if work is None else work.all_texts
        if isinstance(work, Prefill):
            self._prefill(work)
        watched = any(text.on_run is not None for text in texts)
        if isinstance(work, Cycle) and self.runner.ahead and not watched and len(self._unread) == 1:
            return self._work()
        found = self._read()
        while watched and self._unread:  # the newest cycle is told before it is launched again
            found += self._read()
        return tuple(dict.fromkeys(found)) or texts

    def _launch(self, work: Cycle[Sequence]) -> None:
        """Launch a cycle with what it carries. An error ends all texts that run."""
        assert self.runner is not None
        for text in work.preempted:
            text.epoch += 1
            self.runner.cycles.end(text)
        with in_memory("a pass of these texts", _SMALLER):
            for part in work.parts:
                part.text.begin(cached=part.first)
            self._unread.append(self.runner.cycle(work.texts, work.parts))

    def _prefill(self, work: Prefill[Sequence]) -> None:
        """Launch a chunk, and the choice of first tokens behind it. An error ends the texts of the chunk."""
        assert self.runner is not None
        texts = [part.text for part in work.parts]
        try:
            with in_memory(f"a pass of {'this text' if len(texts) == 1 else 'these texts'}", _SMALLER):
                for part in work.parts:
                    self._warm.before(part.text, self.runner)
                    part.text.begin(cached=part.first)
                launched = self.runner.prefill(work.parts)
        except BaseException as error:
            for text in texts:
                self._end(text, error)
            raise
        if launched:
            self._unread.append(launched)

    def _read(self) -> tuple[Sequence, ...]:
        """Read what was launched first, the cycles of a step or first tokens, and hand its texts what came.
        It does not count where its texts have all ended. All texts have it before a callback is called, which
        may make the engine step."""
        assert self.runner is not None
        ends: list[tuple[Sequence, Outcome]] = []
        try:
            while self._unread and not ends:
                ends = self.runner.cycles.read(self._unread.popleft())
            added = [self._add(text, end.run) for text, end in ends]
        except Exception as error:
            self._fail(error)
            raise

        def tell(text: Sequence, end: Outcome, run: Run, kept: int) -> None:
            if run.tokens:
                self._tell(text, run, kept)
            if end.wrong and not text.finished:
                raise InputError(end.wrong)

        self._all(
            (text, partial(tell, text, end, *what))
            for (text, end), what in zip(ends, added, strict=True)
            if text.has_callbacks or text.finished or end.wrong
        )
        return tuple(text for text, _ in ends)

    def _add(self, text: Sequence, run: Run) -> tuple[Run, int]:
        """Add a run to a text, and let go of it where that has ended it; returns the run and how many of its
        tokens were kept."""
        kept = text.add(run) if run.tokens else 0
        if run.tokens and self._scheduler is not None and text in self._scheduler:
            self._scheduler.grown(text, len(text.tokens))
        if text.finished:
            self._drop(text)
        return run, kept

    def _tell(self, text: Sequence, run: Run, kept: int) -> None:
        """Hand a run to a text's callbacks, and let go of the text where they have ended it."""
        text.tell(run, kept)
        if text.finished:
            self._drop(text)

    def _all(self, parts: Iterable[tuple[Sequence, Callable[[], None]]]) -> tuple[Sequence, ...]:
        """Do every text's part, even if an earlier one fails; a text whose part fails ends for the reason
        "error", or "interrupted". Raises the first error."""
        failed: list[BaseException] = []
        texts = []
        for text, part in parts:
            texts.append(text)
            try:
                part()
            except BaseException as error:
                self._end(text, error)
                failed.append(error)
        if failed:
            raise failed[0]
        return tuple(texts)

    def _fail(self, error: BaseException) -> None:
        """End all texts that run: host and device may have parted."""
        self._unread.clear()
        running = [] if self._scheduler is None else self._scheduler.texts
        for text in [*running, *([] if self._alone is None else [self._alone[0]])]:
            self._end(text, error)

    def _end(self, text: Sequence, error: BaseException) -> None:
        text.error = text.error or one_line(error, 200)
        self.cancel(text, "interrupted" if isinstance(error, KeyboardInterrupt) else "error")

    def _drop(self, text: Sequence) -> None:
        """Let go of a text that has ended."""
        if text in self._waiting:
            self._waiting.remove(text)
        if self._alone is not None and self._alone[0] is text:
            self._alone = None
        if self._scheduler is not None and self.runner is not None:
            if text in self._scheduler:
                self._scheduler.remove(text)
            self.runner.cycles.end(text)
