"""A cycle: passes, the choice of tokens, the walk and the commit, in one place for every device.

A cycle is written once, as operations on tensors, for the texts of all its seats. The plain twins run it on a
CPU; on a GPU the same launches are captured as one CUDA graph. Nothing in a cycle comes from the host: whose
text sits in a seat, where it stands, its root and its limit lie in tables that the walk moves on
(orthrus_kernels/walk.py). So a graph serves every text and every length. What passes a cycle has, its
strategy says: two_pass.py, one_pass.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthrus_kernels import DraftTree, put_down
from orthrus_kernels.clock import has_clock, seconds_between
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import RECORD, Record, State

from .choice import Choice
from .drafts import Drafts
from .graphs import Step, captured_parts
from .masks import MaskMemory, Masks, Standing
from .sequence import Run

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Network
    from ..passes import Pass

IN_FLIGHT = 4  # launches of a cycle that may be unread
LOOKUP_ROWS = 16  # of a chain that lookup has found: a tile of the tensor cores
NOT_NUMBERS = (
    "the model's logits are NaN or infinite: the checkpoint is damaged or overflows this dtype; try float32"
)
Walk = Callable[..., None]  # called as `walk` of walk.py is
Allot = Callable[..., None]  # called as `allot` of allot.py is


class Slots:
    """The texts that run, on the device, a slot each: what all cycles read and write."""

    def __init__(self, model: Network, cache: KVCache, count: int) -> None:
        """count: of the slots, as many as the cache has."""
        self.model, self.cache, self.choice = model, cache, Choice(model, count)
        self.state = torch.zeros(count, len(State), dtype=torch.int32, device=model.device)  # [S, columns]
        # The tokens of each text by position, [S, C]: `put` writes the first ones, walks go on.
        self.history = self.state.new_zeros(count, cache.capacity)
        self.standing = Standing(self.state, self.history, max(model.config.block_size or 0, LOOKUP_ROWS))
        self._drafts: dict[tuple[int, int, bool], Drafts] = {}
        self._masks: dict[int, MaskMemory] = {}

    def new_masks(self, seats: int, rows: int) -> Masks:
        """Of the rows of a cycle, in memory that cycles of about as many rows share."""
        most = 1 << (rows - 1).bit_length()
        if most not in self._masks:
            self._masks[most] = MaskMemory(most, self.model.config.vocab_size, self.state.device)
        return Masks(self.standing, self._masks[most], seats, rows)

    def drafts_of(self, depth: int, width: int, ordered: bool) -> Drafts:
        """The drafts of a kind (drafts.py), the same ones for all cycles that ask for it."""
        kind = depth, width, ordered
        if kind not in self._drafts:
            self._drafts[kind] = Drafts(len(self.state), *kind, self.state.device)
        return self._drafts[kind]

    def put(self, slot: int, columns: Mapping[State, int], tokens: Sequence[int]) -> None:
        """Put a text down in a slot: every column of its state, and its tokens. The copies take their turn on
        the stream: cycles launched before them do not see them. What was drafted for the slot is dropped: its
        root may stand where this text's does."""
        put_down(self.state[slot], torch.tensor([columns[column] for column in State], dtype=torch.int32))
        put_down(self.history[slot, : len(tokens)], torch.tensor(tokens, dtype=torch.int32))
        for drafts in self._drafts.values():
            drafts.at[slot].fill_(-1)

    def stand(self, slot: int, position: int, token: int) -> None:
        """The text in a slot is in its prompt, and its next token is read at this position, in turn on the
        stream. Nothing else is known of it: `put` comes behind its last one."""
        numbers = torch.tensor([position, token], dtype=torch.int32)
        put_down(self.state[slot, State.START : State.ROOT + 1], numbers)

    def make_room(self, slot: int, positions: int) -> None:
        """The pages of a slot hold so many positions from now on, in turn on the stream as well."""
        put_down(self.state[slot, State.ROOM :][:1], torch.tensor([positions], dtype=torch.int32))

    @property
    def start(self) -> Tensor:
        """Committed positions, [S] int32."""
        return self.state[:, State.START]

    @property
    def root(self) -> Tensor:
        """The last known token, [S] int32."""
        return self.state[:, State.ROOT]


class Outcome(NamedTuple):
    """What the host reads of a cycle. wrong: why the text cannot go on; "" as a rule. milliseconds: of its
    graphs; None where it had none or was not timed. likeliest: of each level of the tree, `Cycle.likeliest`
    of the seat, to be read before the next launches; None where no text has asked for it."""

    run: Run
    finished: bool
    wrong: str
    milliseconds: float | None
    likeliest: Tensor | None


Read = Callable[[], list[Outcome]]  # by seat


class Reading:
    """Where the host finds the record of one launch. Made once a cycle: making an event takes as long as
    recording it, and a launch is the host's only work while the GPU runs."""

    def __init__(self, record: Tensor) -> None:
        """record: int32, of the cycle; only its shape counts."""
        self.on_gpu = record.is_cuda
        self.target = self._memory(record)
        self.likeliest: Tensor | None = None
        if self.on_gpu:
            self.began, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _memory(self, of: Tensor) -> Tensor:
        return torch.zeros(of.shape, dtype=torch.int32, pin_memory=self.on_gpu)

    def fetch(self, record: Tensor, likeliest: Tensor | None) -> None:
        """Copy the record, and the likeliest tokens, behind what was launched so far."""
        self.target.copy_(record, non_blocking=True)
        if likeliest is not None:
            self.likeliest = self._memory(likeliest) if self.likeliest is None else self.likeliest
            self.likeliest.copy_(likeliest, non_blocking=True)
        if self.on_gpu:
            self.done.record()

    def wait(self) -> Tensor:
        """The record, when it is there."""
        if self.on_gpu:
            self.done.synchronize()
        return self.target

    def milliseconds(self) -> float:
        """From `began` to the end."""
        return self.began.elapsed_time(self.done)


class Cycle:
    """A cycle of fixed shape: what its strategy adds, then choice, walk and commit for the trees of B seats.

    Text b of a launch sits in seat b."""

    kind: str  # as in `Run`
    pass_rows: list[int]  # of each of its passes
    check: Pass  # that verifies, its first rows the trees
    trees: Trees

    def __init__(self, slots: Slots, seats: int, nodes: int, levels: int | None = None) -> None:
        """seats: B. nodes: of a tree at most, the root included. levels: of a tree, of each of which a walk
        keeps a node at most; None: as many as there are nodes."""
        self.slots, self.model = slots, slots.model
        device = slots.state.device
        self.nodes, self.levels, self.seated = nodes, min(nodes, levels or nodes), (-1,) * seats
        self.seats = slots.state.new_full((seats,), -1)  # [B]: the slot of each
        self.first = torch.arange(seats + 1, dtype=torch.int32, device=device) * nodes  # [B + 1] rows
        self.accepted = slots.state.new_zeros(seats, nodes)
        self.start = slots.state.new_zeros(seats)
        self.choices = torch.zeros(seats * nodes, dtype=torch.int64, device=device)  # of the last launch
        self.record = slots.state.new_zeros(seats, RECORD + 3 * nodes)
        # The likeliest tokens behind each node that a walk keeps, once a text has asked for them: ids and
        # bits of fp32 log-probabilities, [B, levels, 2, K] int32.
        self.likeliest: Tensor | None = None
        timed = self.model.backend != "triton" or has_clock(device)  # twins ask the host for the time
        self.clock = self.record[0, Record.BEGAN : Record.DONE_AT] if timed else None
        self.walk: Walk = self.model.ops.walk
        self.allot: Allot = self.model.ops.allot
        self.launches = 0
        self.new_readings()
        self.masks: Masks | None = None  # once a form of the choice takes some
        # Its parts, and what the host does behind each; none before they are captured.
        self.graphs: list[tuple[torch.cuda.CUDAGraph, Step]] = []

    def new_readings(self) -> None:
        """Launches from now on leave what an earlier one has left to be read."""
        self.readings = [Reading(self.record) for _ in range(IN_FLIGHT)]

    def seat(self, slots: Sequence[int]) -> None:
        """Seat the texts of slots, B at most; a seat behind them is empty."""
        seated = (*slots, *[-1] * (len(self.seated) - len(slots)))
        if seated != self.seated:
            put_down(self.seats, torch.tensor(seated, dtype=torch.int32))
            self.place()
            self.seated = seated  # last: Ctrl-C in between leaves it to the next launch

    def place(self) -> None:
        """Give the rows that never move to the slots of their seats."""

    def launch(self, pool: Any, timed: bool = False) -> Read:
        """Run the cycle once more. Returns how to read it, before IN_FLIGHT more launches.

        pool: of CUDA graphs; the second launch is captured, when its kernels are compiled. None: nothing is
        captured. timed: take the time of the graph."""
        reading = self.readings[self.launches % IN_FLIGHT]
        timed = timed and bool(self.graphs)
        if timed:
            reading.began.record()
        if pool is None or self.launches == 0:
            for step in self.run():
                step()
        else:
            if not self.graphs:
                self.graphs = captured_parts(self.run, pool)
            for graph, step in self.graphs:
                graph.replay()
                step()
        self.launches += 1
        reading.fetch(self.record, self.likeliest)
        masked = self.masks is not None and self.slots.choice.masks  # else `failed` is of an earlier launch
        failed = self.masks.failed if masked and self.masks else [""] * len(self.seated)

        def read() -> list[Outcome]:
            record = reading.wait()
            milliseconds, heads = reading.milliseconds() if timed else None, record[:, :RECORD].tolist()
            tokens, logprobs, nodes = (part[:, : self.levels] for part in record[:, RECORD:].chunk(3, 1))
            seconds = [seconds_between(a, b) for a, b in pairwise(heads[0][Record.BEGAN :])]
            told = [None] * len(heads) if reading.likeliest is None else reading.likeliest
            parts = heads, tokens.tolist(), logprobs.view(torch.float32).tolist(), nodes.tolist(), told
            each = zip(zip(*parts, strict=True), failed, strict=True)
            return [self._outcome(*of_seat, why, seconds, milliseconds) for of_seat, why in each]

        return read

    def _outcome(
        self, head: list[int], tokens: list[int], logprobs: list[float], path: list[int],
        likeliest: Tensor | None, failed: str, seconds: list[float], milliseconds: float | None,
    ) -> Outcome:  # fmt: skip
        """What the record of a seat says: its head, and of each level of its tree what a walk kept there.
        failed: why nothing of that counts."""
        if failed:
            head = [0] * len(head)
        kept, nodes = head[Record.KEPT], head[Record.NODES] - 1 if head[Record.DRAFTED] else 0
        run = Run(
            tokens[:kept], logprobs[:kept], len(self.pass_rows), self.kind, nodes, path[:kept], seconds,
            self.pass_rows,
        )  # fmt: skip
        wrong = failed or (NOT_NUMBERS if head[Record.DAMAGED] else "")
        return Outcome(run, bool(head[Record.FINISHED]), wrong, milliseconds, likeliest)

    def run(self) -> Iterator[Step]:
        """The launches of a cycle. Nothing comes from the host but the masks of texts that have a grammar: it
        yields what the host does between its parts, where the form of the choice takes masks."""
        raise NotImplementedError

    def tell(self, seat: int, run: Run) -> None:
        """Fill in what a caller that watches wants to know of the launch that was just read."""
        begin, plan = int(self.first[seat]), self.check.plan
        rows = slice(begin, begin + 1 + run.nodes)
        depths = (plan.positions[rows] - plan.positions[begin]).tolist()
        parents = [parent if parent < 0 else parent - begin for parent in plan.parents[rows].tolist()]
        scores = self.trees.scores[seat, : 1 + run.nodes].tolist()
        run.tree = DraftTree(plan.tokens[rows].tolist(), parents, depths, scores)
        run.choices = self.choices[rows].tolist()

    def ask(self, tokens: Tensor, parents: Tensor) -> Iterator[Step]:
        """Have the host make masks of the T nodes of the seats' trees, in front of the pass that gives their
        states: `choose` waits for them. tokens [T] int64; parents [T] int32."""
        if self.slots.choice.masks:
            if self.masks is None:  # before the launch that is captured
                self.masks = self.slots.new_masks(len(self.seated), len(tokens))
            masks = self.masks
            masks.note(self.seats, self.first, tokens, parents)
            yield lambda: masks.fetch(self.seated)

    def verify(self, parents: Tensor, states: Tensor, keys: Tensor, values: Tensor) -> Iterator[Step]:
        """Choose behind the T first rows of `check`, which are the trees, walk, and commit what the walks
        accepted. parents [T] int32; states [T, E]; keys and values [L, >= T, G, D] of the pass."""
        n, plan, cache = len(parents), self.check.plan, self.slots.cache
        yield from self.choose(states, plan.positions[:n], plan.tokens[:n], parents, plan.sequences[:n])
        accepted = self.accepted[:, : self.levels]
        self.model.ops.commit(
            cache.keys, cache.values, cache.pages, self.seats, keys, values, accepted, self.start
        )

    def choose(
        self, states: Tensor, positions: Tensor, tokens: Tensor, parents: Tensor, owners: Tensor
    ) -> Iterator[Step]:
        """Choose behind the T nodes of the seats' trees, and walk. states [T, E]; positions, tokens [T]
        int64; parents and owners, their slots, [T] int32."""
        slots, masks = self.slots, None
        scores = slots.choice.scores(states)
        if slots.choice.masks and self.masks is not None:
            yield self.masks.fill
            masks = self.masks.words
        chosen = slots.choice.of_tree(scores, positions + 1, tokens, parents, owners, masks)
        self.choices, logits, sums, *likeliest = chosen
        self.walk(
            slots.state, self.seats, self.first, tokens, parents, self.choices, logits, sums,
            slots.choice.ends, slots.history, self.accepted, self.start, self.record,
            timed=self.clock is not None,
        )  # fmt: skip
        slots.choice.note(self.choices, self.accepted[:, : self.levels], owners)
        if likeliest:
            self._tell_likeliest(likeliest, sums)

    def _tell_likeliest(self, likeliest: list[Tensor], sums: Tensor) -> None:
        """Take the likeliest tokens [T, K] of the nodes that the walks have kept; what stands behind those
        means nothing."""
        kept = self.accepted[:, : self.levels].clamp(min=0).long()
        logits, ids = likeliest
        parts = torch.stack((ids.int(), (logits - sums[:, None]).view(torch.int32)), 1)[kept]
        if self.likeliest is None:  # before the launch that is captured
            self.likeliest = torch.zeros_like(parts)
        self.likeliest.copy_(parts)


def pairs_of(likeliest: Tensor, n: int) -> list[list[tuple[int, float]]]:
    """The n likeliest tokens of each position and their log-probabilities, of `Cycle.likeliest` [P, 2, K]."""
    ids, bits = likeliest[:, :, :n].contiguous().unbind(1)
    logprobs = bits.contiguous().view(torch.float32)
    return [list(zip(*both, strict=True)) for both in zip(ids.tolist(), logprobs.tolist(), strict=True)]
