"""Hypothesis strategies for passes, and inputs that make sums hard."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from orthrus_kernels import Rows


@st.composite
def parent_lists(draw, max_nodes: int = 12) -> list[int]:
    """Parents of a random draft tree with one root."""
    n = draw(st.integers(1, max_nodes))
    return [-1] + [draw(st.integers(0, i - 1)) for i in range(1, n)]


@st.composite
def mixed_passes(draw, sequence: int = 0, max_start: int = 40) -> Rows:
    """A tree with blocks at some of its nodes, on a random context."""
    parents = draw(parent_lists())
    anchors = draw(st.lists(st.integers(0, len(parents) - 1), max_size=3, unique=True))
    tokens = draw(st.lists(st.integers(0, 95), min_size=len(parents), max_size=len(parents)))
    return Rows.tree_with_blocks(
        tokens, parents, draw(st.integers(0, max_start)), anchors, draw(st.integers(2, 5)), 96, sequence
    )


KINDS = ("normal", "heavy", "massive")


def hard(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """fp32 inputs: normal, heavy-tailed (scaled by 2^-15 .. 2^15), or with one massive channel."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g)
    if kind == "heavy":
        x = x * torch.exp2(torch.randint(-15, 16, shape, generator=g).float())
    if kind == "massive":
        x[..., shape[-1] // 3] *= 3000
    return x
