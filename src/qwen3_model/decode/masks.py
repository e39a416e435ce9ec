"""The masks of a cycle's rows: what the grammars of its texts permit there (permit.py), made by the host
while the GPU runs the pass that verifies the trees.

`note` puts down what the host has to know, as a launch in front of that pass: where the texts stand, the
tokens that walks have added to them, and the trees. `fetch` copies it to the host, and `fill` waits for it,
makes the masks and copies them to where the choice behind the pass reads them. Whatever else is in flight,
the host learns from the device what the texts hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orthrus_kernels.layout import State
from orthrus_kernels.permit import mask_words

from ..matcher import Matcher


@dataclass
class Standing:
    """Where the texts of S slots stand, and in which grammars."""

    state: Tensor  # [S, columns of layout.State] int32
    history: Tensor  # [S, C] int32: their tokens by position
    reach: int  # tokens that a cycle adds to a text at most
    matchers: dict[int, Matcher | None] = field(default_factory=dict)  # by slot


class MaskMemory:
    """Masks of so many rows, [R, words] int32, and where the host writes them. Cycles share it."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        shape = rows, mask_words(vocabulary)
        self.words = torch.full(shape, -1, dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self.host = torch.full(shape, -1, dtype=torch.int32, pin_memory=True) if on_gpu else self.words


class Masks:
    """The masks of one cycle, whose trees have T rows."""

    def __init__(self, texts: Standing, memory: MaskMemory, seats: int, rows: int) -> None:
        """memory: of R >= rows masks."""
        self.words, self._host, device = memory.words[:rows], memory.host[:rows], texts.state.device
        self._texts, self._rows = texts, rows
        self._back = torch.arange(1 - texts.reach, 1, device=device)
        told = seats * (2 + texts.reach) + seats + 1 + 2 * rows
        self._told = torch.zeros(told, dtype=torch.int32, device=device)
        on_gpu = device.type == "cuda"
        self._read = torch.zeros(told, dtype=torch.int32, pin_memory=True) if on_gpu else self._told
        self._event = torch.cuda.Event() if on_gpu else None
        self._matchers: list[Matcher | None] = []
        self.failed: list[str] = []  # of the last launch, by seat: why a text cannot go on; "" as a rule

    def note(self, seats: Tensor, first: Tensor, tokens: Tensor, parents: Tensor) -> None:
        """Put down where the texts of seats [B] stand, and their trees, as in `walk`: a launch."""
        state, history, at = self._texts.state, self._texts.history, seats.clamp(min=0).long()
        stand = torch.stack((state[at, State.START], state[at, State.FINISHED]), 1)
        places = (stand[:, :1].long() + self._back).clamp(0, history.shape[1] - 1)
        parts = stand, history[at[:, None], places], first, tokens.int(), parents
        torch.cat([part.flatten() for part in parts], out=self._told)

    def fetch(self, seated: Sequence[int]) -> None:
        """Copy it to the host, behind what was launched so far. seated: the slot of each seat; -1: none."""
        self._matchers = [self._texts.matchers.get(slot) for slot in seated]
        self.failed = [""] * len(seated)
        if self._event is not None and any(self._matchers):
            self._read.copy_(self._told, non_blocking=True)
            self._event.record()

    def fill(self) -> None:
        """Make the masks of texts that have a grammar, and copy them to the device, behind what was launched
        so far."""
        if not any(self._matchers):
            return
        if self._event is not None:
            self._event.synchronize()
        seats, behind = len(self._matchers), self._texts.reach
        sizes = [2 * seats, seats * behind, seats + 1, self._rows, self._rows]
        stand, tail, first, tokens, parents = (part.tolist() for part in self._read.split(sizes))
        self._host.fill_(-1)
        masks = self._host.numpy()
        for seat, matcher in enumerate(self._matchers):
            start, finished = stand[2 * seat : 2 * seat + 2]
            begin, end = first[seat], first[seat + 1]
            if matcher is None or finished or begin == end:
                continue
            new = start + 1 - matcher.known
            assert 0 <= new <= behind, (new, behind)
            matcher.go_on(tail[(seat + 1) * behind - new : (seat + 1) * behind])
            above = [parent - begin for parent in parents[begin:end]]
            if not matcher.failed:
                matcher.fill(masks[begin:end], tokens[begin:end], above)
            self.failed[seat] = matcher.failed
        if self._event is not None:
            self.words.copy_(self._host, non_blocking=True)
