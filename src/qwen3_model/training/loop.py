"""The training loop of both trainings: schedule by steps or time, progress, resuming."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..errors import InputError, in_memory, quoted
from .interrupts import late_interruption
from .optimizer import make_optimizers, set_rate
from .state import MOST_STEPS, load_state, read_progress, save_state

# Settings that states of earlier versions do not tell, as they had no others.
SAVED_BEFORE = {"loss": "kl", "offset_weights": "decay"}


@dataclass(frozen=True)
class Plan:
    """How long to train and how. The schedule follows whichever of steps and seconds ends first."""

    steps: int
    batch: int  # rows of text a step
    length: int  # tokens of a row
    lr: float
    weight_decay: float = 0.0
    seconds: float | None = None
    clip: float = 1.0
    seed: int = 0
    save_every: float = 300.0  # seconds between state files

    def check(self, context: int) -> None:
        """Raises InputError for a plan that cannot be carried out in a context of so many tokens."""
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be above 0")
            if value > MOST_STEPS:
                raise InputError(f"{name} is {quoted(value)}; at most {MOST_STEPS} was expected")
        if not 0 < self.lr < 10:
            raise InputError(f"lr is {self.lr}; above 0 and below 10 was expected")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InputError(f"seconds is {self.seconds}; it must be above 0")
        if not 2 <= self.length <= context:
            raise InputError(f"length is {self.length}; this model takes rows of 2 to {context} tokens")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}; 0 to {2**31 - 1} was expected")


class Rows:
    """Rows of `length` tokens of a long text, shuffled without replacement, cut at another offset every
    epoch.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = self.count_in(len(tokens), length)
        self._epoch, self._starts = -1, torch.empty(0)
        if self.count < 1:
            raise InputError(
                f"the text has {len(tokens)} tokens, too few for two rows of {length}: give more text, "
                "or shorter rows"
            )

    @staticmethod
    def count_in(tokens: int, length: int) -> int:
        """How many rows a text of so many tokens gives, at any offset."""
        return (tokens - 1) // length - 1

    def batch(self, step: int, size: int) -> Tensor:
        """The rows of a step, [size, length + 1] int64: a function of (seed, step) alone, so a resumed run
        sees the same.
        """
        starts = torch.cat([self._start(n) for n in range(step * size, (step + 1) * size)])
        index = starts[:, None] + torch.arange(self.length + 1)
        return self.tokens[index.to(self.tokens.device)].long()

    def _start(self, n: int) -> Tensor:
        epoch, place = divmod(n, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            offset = torch.randint(0, self.length, (1,), generator=generator)
            self._starts = torch.randperm(self.count, generator=generator) * self.length + offset
            self._epoch = epoch
        return self._starts[place : place + 1]


# step -> (loss, a function that words the step's figures)
Loss = Callable[[int], tuple[Tensor, Callable[[], str]]]


def train(
    name: str,
    weights: Mapping[str, nn.Parameter],
    loss_of: Loss,
    plan: Plan,
    about: Mapping[str, Any],
    state: Path | None = None,
    resume: bool = False,
    kept: dict[str, list[float]] | None = None,
) -> tuple[int, float]:
    """Minimise `loss_of(step)` over `weights`; returns steps done and seconds spent.

    The first step warms up compilation outside the clock. With `resume`, goes on from the file `state` if it
    is there, which must be of the same training `about` the same things. kept: what `loss_of` keeps from step
    to step beside the weights, saved with them and filled from a state. Ctrl-C and SIGTERM save the state
    first. Raises InputError when the state does not fit, memory does not suffice, or the weights stop being
    numbers."""
    optimizers = make_optimizers(weights.items(), plan.lr, plan.weight_decay)
    tensors = {key: weight.data for key, weight in weights.items()}
    kind = {"name": name, **about, **dataclasses.asdict(plan)}
    kind = {key: value for key, value in kind.items() if key not in ("steps", "seconds", "save_every")}
    step, spent = 0, 0.0
    if resume and state and state.exists():
        progress = read_progress(state)
        _check_same(state, progress["of"], kind)
        load_state(state, tensors, optimizers)
        step, spent = progress["step"], progress["seconds"]
        if kept is not None:
            kept.update(progress.get("kept", {}))

    def save(seconds: float) -> None:
        if state:
            save_state(
                state, tensors, optimizers, {"step": step, "seconds": seconds, "of": kind, "kept": kept or {}}
            )

    with in_memory("a step of this training", "use a smaller --batch, --length or --blocks"):
        loss_of(step)[0].backward()  # compiles
        for weight in weights.values():
            weight.grad = None
        clock = time.perf_counter()
        began, saved = clock - spent, clock
        with _Report(name, plan) as report, late_interruption(state is not None) as interruption:
            while step < plan.steps and (plan.seconds is None or clock - began < plan.seconds):
                share = max(step / plan.steps, (clock - began) / plan.seconds if plan.seconds else 0.0)
                set_rate(optimizers, share)
                loss, words = loss_of(step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights.values(), plan.clip)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                step, clock = step + 1, time.perf_counter()
                report.show(step, share, clock - began, loss, words)
                if interruption.asked or clock - saved > plan.save_every:
                    save(clock - began)
                    saved = clock
                interruption.go_on()
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise InputError(f"the weights are no longer numbers after {step} steps: use a smaller --lr")
    save(time.perf_counter() - began)
    return step, time.perf_counter() - began


def _check_same(state: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        found = saved.get(key, SAVED_BEFORE.get(key))
        if found != value:
            raise InputError(
                f"{state} is of a run whose {key} was {quoted(found)}, not {quoted(value)}: resume "
                "with the same settings, or delete it to start anew"
            )


class _Report:
    """A progress bar in a terminal, else a line every ten seconds. Reads the loss, a host sync, no more often
    than that.
    """

    def __init__(self, name: str, plan: Plan) -> None:
        self.name, self.plan, self.last = name, plan, 0.0
        self.live = sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True)) if self.live else None

    def __enter__(self) -> _Report:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=1.0, words="")
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, step: int, share: float, seconds: float, loss: Tensor, words: Callable[[], str]) -> None:
        """Show a step if enough time has passed since the last one shown."""
        if seconds - self.last < (1.0 if self.live else 10.0):
            return
        self.last = seconds
        rate = step * self.plan.batch * self.plan.length / seconds
        line = f"step {step}  loss {loss.item():.4f}  {words()}  {rate / 1e3:.0f}k tok/s"
        if self.bar:
            self.bar.update(self.task, completed=share, words=line)
        else:
            print(f"{self.name} {share:4.0%}  {line}", file=sys.stderr, flush=True)
