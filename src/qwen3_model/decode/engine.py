"""The engine: it owns a model's cache and graphs, takes requests, and decodes them step by step.

    engine = Engine(model)
    text = engine.submit(prompt_ids, Request(max_new_tokens=100))
    while not text.finished:
        engine.step()
    print(text.result().text)

One text runs at a time; the others wait in the order in which they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING

import torch

from ..errors import InputError, in_memory, quoted
from ..model import Network, checked_prompt
from ..request import Request
from . import rejection
from .cycles import NOT_NUMBERS, Cycles
from .prompt import Prompts
from .sequence import OnRun, Result, Run, Sequence
from .stream import OnTokens, TokenStream

if TYPE_CHECKING:
    from ..kv_cache import KVCache

_SMALLER = "shorten it, or ask for fewer tree_nodes"
CAPACITY_STEP = 1024  # positions; capacities of caches are multiples of it


class Slot:
    """A cache with all that is captured over it."""

    def __init__(self, model: Network, capacity: int) -> None:
        graphs = model.use_graphs
        self.cache: KVCache = model.new_cache(-(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        pool = torch.cuda.graph_pool_handle() if graphs and model.device.type == "cuda" else None
        self.graphs, self.prompts = graphs, Prompts(model, self.cache, pool)
        self.cycles = Cycles(model, self.cache, pool)


class Engine:
    """Decodes requests with one model. On CUDA one thread and stream at a time: kernels share a workspace."""

    def __init__(self, model: Network) -> None:
        self.model = model
        self.slot: Slot | None = None
        self._waiting: deque[Sequence] = deque()
        self._running: tuple[Sequence, Iterator[Run]] | None = None

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
        InputError for impossible settings, and for a prompt that is empty or does not fit."""
        for name, callback in (("on_tokens", on_tokens), ("on_run", on_run)):
            if callback is not None and not callable(callback):
                raise InputError(f"{name} is {quoted(callback)}; a function was expected")
        if not isinstance(request, Request | None):
            raise InputError(f"request is {quoted(request)}; a Request was expected")
        model, prompt = self.model, checked_prompt(prompt_ids, self.model.config.vocab_size)
        fitted = (request or Request()).fit(model.config, len(prompt), model.text is not None)
        assert fitted.max_new_tokens is not None
        stream = TokenStream(
            model.text, model.config.eos_token_ids, fitted.stop, fitted.max_new_tokens, on_tokens
        )
        self._waiting.append(Sequence(prompt, fitted, stream, on_run))
        return self._waiting[-1]

    def step(self) -> Sequence | None:
        """Do the next piece of work: the prompt of a text that waits, or a cycle of the one that runs.

        Returns the text it was for, None if there is nothing to do. Raises InputError when logits are not
        numbers or a pass does not fit into memory, and whatever a callback raises: the text has then ended,
        for the reason "error", and the engine goes on with the next one."""
        self._drop_finished()  # by a step inside the callback of its last run
        if self._running is None:
            if not self._waiting:
                return None
            sequence = self._waiting.popleft()
            self._running = sequence, self._runs(sequence)
        sequence, runs = self._running
        try:
            with torch.inference_mode(), in_memory("a pass of this text", _SMALLER):
                run = next(runs)
            sequence.take(run)
        except BaseException as error:
            self.cancel(sequence, "interrupted" if isinstance(error, KeyboardInterrupt) else "error")
            raise
        self._drop_finished()
        return sequence

    def generate(
        self,
        prompt_ids: Ids[int],
        request: Request | None = None,
        on_tokens: OnTokens | None = None,
        on_run: OnRun | None = None,
    ) -> Result:
        """Submit a text and step until it has ended; arguments and errors are those of `submit` and `step`,
        and an error of another text's step ends this one too. Ctrl-C ends it with what has been decoded."""
        sequence = self.submit(prompt_ids, request, on_tokens, on_run)
        try:
            while not sequence.finished:
                self.step()
        except KeyboardInterrupt:
            self.cancel(sequence, "interrupted")
        except BaseException:
            self.cancel(sequence, "error")
            raise
        return sequence.result()

    def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
        """End a text, whether it runs or waits, with what has been decoded. An ended text stays as it is."""
        if self._running is not None and self._running[0] is sequence:
            self._running = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.end(reason or "cancelled")

    def _drop_finished(self) -> None:
        if self._running is not None and self._running[0].finished:
            self._running = None

    def forget(self) -> None:
        """Free the cache and its graphs; the next text makes them anew."""
        self.slot = None

    def _runs(self, sequence: Sequence) -> Iterator[Run]:
        """The prompt's run, then those of the cycles."""
        sequence.begin()
        slot = self._slot(sequence.limit)
        yield self._prompt(slot, sequence)
        if sequence.request.verify == "rejection":
            slot.cache.lengths = [sequence.start]
            yield from rejection.runs(self.model, slot.cache, sequence)
        else:
            yield from slot.cycles.runs(sequence)

    def _slot(self, capacity: int) -> Slot:
        """The last text's cache where that is large enough and its graphs are wanted: they stay good."""
        slot = self.slot
        if slot is None or slot.cache.capacity < capacity or slot.graphs != self.model.use_graphs:
            self.slot = slot = None  # frees the memory before more is taken
            self.slot = slot = Slot(self.model, capacity)
        return slot

    def _prompt(self, slot: Slot, sequence: Sequence) -> Run:
        """Run the prompt through the AR view and choose the first token behind it."""
        choice, prompt, device = slot.cycles.text.choice, sequence.tokens, self.model.device
        choice.begin(sequence.sampling, prompt)
        states = slot.prompts.run(prompt)
        root, position = (torch.tensor([x], device=device) for x in (prompt[-1], len(prompt)))
        above = torch.full((1,), -1, dtype=torch.int32, device=device)
        chosen, logits, sums = choice.of_tree(states, position, root, above)
        token, log_sum_exp = int(chosen), float(sums)
        if not abs(log_sum_exp) < float("inf"):
            raise InputError(NOT_NUMBERS)
        return Run([token], (logits - sums).tolist(), 1, "prompt", rows=(len(prompt),))
