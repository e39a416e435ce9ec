"""The rows of a pass in tensors, as kernels read and write them; visibility.py says what the numbers mean.

A pass has a **shape**, which is static and which every launch and CUDA graph follows from, and a **plan**:
what stands in its rows. A plan may be written on the device (allot.py, blocks.py, lay.py), and may leave rows
unused: a padding row has sequence -1, and does not stand inside a block."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .visibility import Rows


@dataclass(frozen=True)
class PassShape:
    """Static facts of a pass; two passes of one shape differ in the numbers of their tensors alone.

    lines: paths that the rows make, at most: 1 for a chain or a block, N for a tree of N nodes, one more for
    each block beside it. depth: rows that stand one above the other, at most: those of a chain, the levels of
    a tree and the rows of a block below it."""

    n_rows: int  # T
    n_ar: int  # AR rows, which come first
    lines: int
    depth: int
    sequences: int  # S, running or not

    @property
    def branches(self) -> bool:
        """Whether rows of a sequence may lie beside one another. They do not where there is no line too many
        and either every line may have its full depth (rows of texts that decode, drafts) or one line all rows
        (prompts)."""
        return self.lines > self.sequences or self.n_rows not in (self.depth, self.lines * self.depth)

    @staticmethod
    def of(rows: Rows) -> PassShape:
        """The exact shape of rows."""
        inner = {parent for parent in rows.parents[: rows.n_ar] if parent >= 0}
        lines = rows.n_ar - len(inner) + len(set(rows.blocks) - {-1})
        depths = [
            position - rows.contexts[s] for position, s in zip(rows.positions, rows.sequences, strict=True)
        ]
        return PassShape(len(rows), rows.n_ar, lines, max(depths) + 1, max(rows.contexts) + 1)


@dataclass(frozen=True)
class PassPlan:
    """The rows of a pass on one device: T rows, of which AR rows come first, and S sequences."""

    shape: PassShape
    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    parents: Tensor  # [T] int32, as in `Rows`
    blocks: Tensor  # [T] int32, as in `Rows`
    sequences: Tensor  # [T] int32: slot of the cache, and place in `start`; -1: a padding row
    start: Tensor  # [S] int32, any stride: committed positions of each sequence

    @staticmethod
    def of(rows: Rows, device: torch.device | str = "cpu") -> PassPlan:
        """The plan of rows. Raises ValueError for a pass without rows."""
        if not len(rows):
            raise ValueError("a pass needs at least one row")
        shape = PassShape.of(rows)
        start = [rows.contexts.get(s, 0) for s in range(shape.sequences)]
        ids = torch.tensor([rows.tokens, rows.positions]).to(device)
        columns = torch.tensor([rows.parents, rows.blocks, rows.sequences], dtype=torch.int32).to(device)
        at = torch.tensor(start, dtype=torch.int32).to(device)
        return PassPlan(shape, ids[0], ids[1], columns[0], columns[1], columns[2], at)

    def on(self, device: torch.device | str) -> PassPlan:
        """A copy on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shape"}
        return replace(self, **{name: t.to(device, copy=True) for name, t in tensors.items()})

    def head(self, n: int) -> PassPlan:
        """The first n AR rows, in the same memory."""
        shape = replace(self.shape, n_rows=n, n_ar=n)
        of_rows = [f.name for f in fields(self) if f.name not in ("shape", "start")]
        return replace(self, shape=shape, **{name: getattr(self, name)[:n] for name in of_rows})

    def rows(self) -> Rows:
        """The rows read back, without padding."""
        sequences, parents = self.sequences.tolist(), self.parents.tolist()
        used = [i for i, sequence in enumerate(sequences) if sequence >= 0]
        place = {-1: -1} | {row: i for i, row in enumerate(used)}
        tokens, positions, blocks = (t.tolist() for t in (self.tokens, self.positions, self.blocks))
        start = self.start.tolist()
        return Rows(
            [tokens[i] for i in used], [place[parents[i]] for i in used], [blocks[i] for i in used],
            [positions[i] for i in used], [sequences[i] for i in used],
            {s: start[s] for s in sorted({sequences[i] for i in used})},
        )  # fmt: skip

    def stand(self, root: Tensor) -> None:
        """Put the rows of each sequence, which follow one another, behind its committed positions: the first
        one's token becomes root, [S] integers."""
        used, index = self.sequences >= 0, torch.arange(len(self.sequences), device=self.sequences.device)
        first = used.clone()
        first[1:] &= self.sequences[1:] != self.sequences[:-1]
        behind = index - torch.where(first, index, 0).cummax(0).values
        sequence = self.sequences.clamp(min=0).long()
        self.tokens.copy_(torch.where(first, root[sequence].long(), self.tokens))
        self.positions.copy_(torch.where(used, self.start[sequence] + behind, self.positions))
