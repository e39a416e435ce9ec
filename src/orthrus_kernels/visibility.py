"""Who sees whom: the one definition of visibility, and the rows of a forward pass.

A pass is a list of rows. **AR rows** come first: nodes of the draft trees, each the child of another or a
root; a prompt chunk and a draft chain are trees without branches. **Diffusion rows** follow in blocks: a
block stands at an anchor, its first row is the anchor's token, the rest are mask tokens. Every row belongs to
a sequence and stands on top of its committed context.

The rules (arXiv 2605.12825, section 3; trees and mixed passes are ours):

- every row sees the committed context of its own sequence, and nothing crosses sequences;
- an AR row sees its ancestors' AR keys and its own;
- a diffusion row sees the AR keys of its anchor's strict ancestors and all rows of its own block.

`visible` is the definition. Four rules say the same of one row at a time. `row_above` names the row above a
row; a row's **path** is the context, then the rows above it from the top down, then the row itself and, in a
block, the rows behind it. A row sees the positions of its path from `row_begin` on and below `row_limit`;
`row_sees` puts both bounds in one. The tables of attention (lay.py), attention's masks and training's are
made by these rules alone: what a row sees changes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import tl, triton


@dataclass(frozen=True)
class Rows:
    """The rows of one pass. All lists have one entry a row; AR rows first.

    parents: for an AR row, the row index of its parent; for a diffusion row, that of its anchor's parent. -1
        means that the row stands directly on the committed context.
    blocks: -1 for an AR row, else the index of the row's block.
    contexts: committed length of each sequence; the cache holds the keys of positions [0, contexts[s]).
    """

    tokens: list[int]
    parents: list[int]
    blocks: list[int]
    positions: list[int]
    sequences: list[int]
    contexts: dict[int, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_ar(self) -> int:
        """How many of the rows are AR rows; they come first."""
        return self.blocks.index(0) if 0 in self.blocks else len(self.blocks)

    @staticmethod
    def chain(tokens: Sequence[int], start: int, sequence: int = 0) -> Rows:
        """Consecutive AR rows at positions start, start + 1, ...: a prompt chunk, one decoded token or a
        draft chain under its root.
        """
        return Rows.tree(tokens, range(-1, len(tokens) - 1), start, sequence)

    @staticmethod
    def tree(tokens: Sequence[int], parents: Sequence[int], start: int, sequence: int = 0) -> Rows:
        """A draft tree. Node i's parent is node parents[i] < i, or -1 for the root, which stands at position
        `start`.
        """
        return Rows.tree_with_blocks(tokens, parents, start, (), 0, 0, sequence)

    @staticmethod
    def block(anchor: int, size: int, start: int, mask_token: int, sequence: int = 0) -> Rows:
        """One diffusion block of `size` rows whose anchor, the last known token, is at position `start`."""
        return Rows([anchor] + [mask_token] * (size - 1), [-1] * size, [0] * size,
                    list(range(start, start + size)), [sequence] * size, {sequence: start})  # fmt: skip

    @staticmethod
    def tree_with_blocks(
        tokens: Sequence[int],
        parents: Sequence[int],
        start: int,
        anchors: Sequence[int],
        size: int,
        mask_token: int,
        sequence: int = 0,
    ) -> Rows:
        """A mixed pass: a draft tree to verify and one diffusion block of `size` rows anchored at each of the
        nodes `anchors`.
        """
        depths: list[int] = []
        for i, parent in enumerate(parents):
            if not -1 <= parent < i:
                raise ValueError(
                    f"node {i} of the tree has parent {parent}: parents must come before their children"
                )
            depths.append(0 if parent < 0 else depths[parent] + 1)
        all_tokens, all_parents, blocks = list(tokens), list(parents), [-1] * len(tokens)
        positions = [start + depth for depth in depths]
        for b, anchor in enumerate(anchors):
            all_tokens += [tokens[anchor]] + [mask_token] * (size - 1)
            all_parents += [parents[anchor]] * size
            blocks += [b] * size
            positions += range(positions[anchor], positions[anchor] + size)
        return Rows(
            all_tokens, all_parents, blocks, positions, [sequence] * len(all_tokens), {sequence: start}
        )

    @staticmethod
    def batch(passes: Sequence[Rows]) -> Rows:
        """Several sequences in one pass. Every pass must be of another sequence."""
        tokens, parents, blocks, positions, sequences = [], [], [], [], []
        contexts: dict[int, int] = {}
        moved = [
            [0] * len(p) for p in passes
        ]  # where each row goes: AR rows of all passes, then diffusion rows of all
        order = [(p, i) for ar in (True, False) for p, rows in enumerate(passes)
                 for i in range(len(rows)) if (rows.blocks[i] < 0) == ar]  # fmt: skip
        for new, (p, i) in enumerate(order):
            moved[p][i] = new
        first_block = [0] * len(passes)
        for p in range(1, len(passes)):
            first_block[p] = first_block[p - 1] + 1 + max(passes[p - 1].blocks, default=-1)
        for p, i in order:
            rows = passes[p]
            tokens.append(rows.tokens[i])
            parents.append(-1 if rows.parents[i] < 0 else moved[p][rows.parents[i]])
            blocks.append(-1 if rows.blocks[i] < 0 else rows.blocks[i] + first_block[p])
            positions.append(rows.positions[i])
            sequences.append(rows.sequences[i])
        for rows in passes:
            if contexts.keys() & rows.contexts.keys():
                raise ValueError(
                    f"sequences {sorted(contexts.keys() & rows.contexts.keys())} appear in two passes"
                )
            contexts.update(rows.contexts)
        return Rows(tokens, parents, blocks, positions, sequences, contexts)

    def ancestors(self, row: int) -> list[int]:
        """The AR rows above a row (above the anchor, for a diffusion row), root first."""
        chain: list[int] = []
        parent = self.parents[row]
        while parent >= 0:
            chain.append(parent)
            parent = self.parents[parent]
        return chain[::-1]


def visible(rows: Rows) -> Tensor:
    """In-flight visibility, bool [T, T]: row i sees the key of row j. The committed context is visible on top
    of it.

    The definition that tables, masks, tests and pictures are held against; it is not on any hot path.
    """
    seen = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    blocks = torch.tensor(rows.blocks)
    for i, block in enumerate(rows.blocks):
        seen[i, rows.ancestors(i)] = True
        seen[i, i if block < 0 else blocks == block] = True
    return seen


def row_above(row: int, parent: int, block: int, block_before: int) -> int:
    """The row above a row in its path, -1 for the context: the first of the rules that tables are built by.

    An AR row stands below its parent. A row of a diffusion block stands below the row before it, and the
    first row of the block below the anchor's parent. parent, block: as in `Rows`; block_before: block of the
    row before, -1 where that is of another sequence."""
    return row - 1 if block >= 0 and block == block_before else parent


@triton.jit
def row_above_triton(row, parent, block, block_before):
    """`row_above` in a kernel, for vectors."""
    return tl.where((block >= 0) & (block == block_before), row - 1, parent)


def row_limit(position: int, block: int, block_end: int) -> int:
    """Up to where a row sees its path: the positions below its limit. The second of the rules.

    An AR row sees itself and all that stands above it; a diffusion row sees its whole block. block_end: the
    position behind the block's last row."""
    return position + 1 if block < 0 else block_end


@triton.jit
def row_limit_triton(position, block, block_end):
    """`row_limit` in a kernel, for vectors."""
    return tl.where(block < 0, position + 1, block_end)


def row_begin(limit: int) -> int:
    """From where on a row of a limit sees its path, the third of the rules: from its beginning."""
    return 0


@triton.jit
def row_begin_triton(limit):
    """`row_begin` in a kernel, for vectors."""
    return limit * 0


def row_sees(position: Tensor, limit: Tensor) -> Tensor:
    """Whether a row of a limit sees a position of its path, bool: the two bounds together, for attention."""
    return position < limit


@triton.jit
def row_sees_triton(position, limit):
    """`row_sees` in a kernel, for blocks."""
    return position < limit
