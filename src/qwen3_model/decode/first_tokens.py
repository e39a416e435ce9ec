"""The first tokens of texts, chosen behind their prompts by the walk, as every other token is.

The last token of a prompt is the root of a tree of one node. The pass of the prompt has given that node's
state and committed its keys, so what is left of a cycle is the choice and the walk. A text takes part in the
next cycle before the host has read which token came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .controller import PLAIN
from .cycle import Cycle, Outcome, Slots, Step
from .cycles import Launched
from .sequence import Sequence as Text


class FirstTokens(Cycle):
    """The end of a cycle behind a pass that was launched: choice and walk for the texts of its seats."""

    kind, pass_rows = "prompt", [1]  # one pass; its rows are as many as the prompt's tokens

    def __init__(self, slots: Slots, seats: int) -> None:
        """seats: texts at most."""
        super().__init__(slots, seats, nodes=1)
        self.parents = slots.state.new_full((seats,), -1)
        self.states: Tensor  # [seats, E], of the last launch

    def launch_behind(self, states: Tensor, seated: Sequence[tuple[Text, int]]) -> Launched:
        """Choose the first tokens of texts in slots, whose prompts have been committed, of the states
        [seats, E] of their last tokens: those of the texts come first."""
        slots, self.states = [slot for _, slot in seated], states
        self.slots.choice.form = self.slots.choice.form_of(slots)
        self.seat(slots)
        read, lengths = self.launch(pool=None), [len(text.tokens) for text, _ in seated]

        def ends() -> list[Outcome]:
            found = read()[: len(lengths)]
            for end, length in zip(found, lengths, strict=True):
                end.run.rows, end.run.seconds = (length,), (0.0, 0.0, 0.0)  # no draft, no tree
            return found

        epochs, nobody = tuple(text.epoch for text, _ in seated), (None,) * len(seated)
        return Launched(PLAIN, self, seated, epochs, nobody, ends)

    def run(self) -> Iterator[Step]:
        """The launches."""
        slots, at = self.slots, self.seats.clamp(min=0).long()
        tokens, positions = slots.root[at].long(), slots.start[at].long()
        yield from self.ask(tokens, self.parents)
        yield from self.choose(self.states, positions, tokens, self.parents, self.seats)
