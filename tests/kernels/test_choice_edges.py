"""The tokens that top-p and top-k keep, exactly: by definition in whole numbers, one token at a time,
whatever the row looks like; and the bins that bound where an edge lies."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from strategies import hard

from orthrus_kernels import Sampling, alike
from orthrus_kernels._triton import tl, triton
from orthrus_kernels.choice_triton import _arguments, _by_tiles
from orthrus_kernels.logit_summary import ordered
from orthrus_kernels.scores_triton import mass, target_mass

INF = math.inf


@triton.jit
def _masses_kernel(scores, masses, V, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(scores + o, mask=o < V, other=float("-inf"))
    tl.store(masses + o, mass(ordered(b), tl.max(b, axis=0)), mask=o < V)


@triton.jit
def _target_kernel(total, target, top_p):
    tl.store(target, target_mass(tl.load(total), top_p))


def kept_by_definition(scores, sampling) -> set[int]:
    """Of scores [V], finite or -inf: the shortest first part that reaches top-p's mass of the top-k."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    order = order[: sampling.top_k or None]
    masses = torch.empty(len(scores), dtype=torch.int64, device=DEVICE)
    block = triton.next_power_of_2(len(scores))
    _masses_kernel[(1,)](scores=scores, masses=masses, V=len(scores), BLOCK=block, enable_fp_fusion=False)
    masses, target = masses.tolist(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    total = torch.tensor([sum(masses[i] for i in order)], device=DEVICE)
    _target_kernel[(1,)](total=total, target=target, top_p=sampling.top_p)
    wanted, kept, reached = min(target.item(), total.item()), set(), 0
    for i in order if sampling.top_p < 1 else ():
        kept, reached = kept | {i}, reached + masses[i]
        if reached >= wanted:
            return kept
    return set(order)


def kept_by_kernels(logits, sampling) -> list[set[int]]:
    """Of logits [T, V]: what is left to compare."""
    table, slots = alike(sampling, logits)
    perturbed, positions = torch.full_like(logits, math.nan), torch.arange(len(logits), device=DEVICE)
    shared = _arguments(logits, positions, table, slots, None)
    _by_tiles(shared, table.form.takes, torch.empty_like(positions), perturbed)
    return [set((row > -INF).nonzero().flatten().tolist()) for row in perturbed]


ROWS = {
    "normal": lambda v, seed: hard("normal", 1, v, seed=seed)[0] * 3,
    "heavy": lambda v, seed: hard("heavy", 1, v, seed=seed)[0],
    "flat": lambda v, seed: torch.full((v,), -2.5),
    "nearly flat": lambda v, seed: hard("normal", 1, v, seed=seed)[0] * 1e-4,
    "ties": lambda v, seed: (hard("normal", 1, v, seed=seed)[0] * 2).round(),
    "one": lambda v, seed: torch.where(torch.arange(v) == seed, 1.0, -INF),
    "half": lambda v, seed: torch.where(
        torch.arange(v) % 2 == 0, hard("normal", 1, v, seed=seed)[0], torch.tensor(-INF)
    ),
    "far": lambda v, seed: hard("normal", 1, v, seed=seed)[0] * 1e30,
}


@examples(16)
@example(row="ties", v=2100, seed=50, temperature=30.0, k=0, top_p=1e-30)
@given(
    row=st.sampled_from(sorted(ROWS)), v=st.sampled_from([150, 700, 2100]), seed=st.integers(0, 99),
    temperature=st.sampled_from([1e-4, 0.6, 1.0, 30.0, 1e6]), k=st.sampled_from([0, 0, 129, 140, 650]),
    top_p=st.sampled_from([1.0, 1 - 1e-9, 0.99999, 0.95, 0.5, 0.1, 1e-6, 1e-30]),
)  # fmt: skip
def test_the_tokens_kept(row, v, seed, temperature, k, top_p):
    sampling = Sampling(temperature=temperature, top_k=k, top_p=top_p)
    if not sampling.filters or k >= v:
        return
    logits = ROWS[row](v, seed)[None].repeat(2, 1).to(DEVICE)
    logits[1] = logits[1].flip(0)
    for got, scores in zip(kept_by_kernels(logits, sampling), logits / temperature, strict=True):
        possible = set((scores > -INF).nonzero().flatten().tolist())
        assert got == kept_by_definition(scores, sampling) & possible


@pytest.mark.parametrize("top_p", [0.9, 0.95, 0.99, 0.999])
def test_few_tokens_are_listed(top_p, monkeypatch):
    """What one program has to look through: a few bins, also where top-p leaves out little."""
    from orthrus_kernels import choice_edges_triton

    states = []
    kernel = choice_edges_triton._edge_kernel

    class Noted:
        def __getitem__(self, grid):
            return lambda **given: (states.append(given["state"]), kernel[grid](**given))

    monkeypatch.setattr(choice_edges_triton, "_edge_kernel", Noted())
    logits = torch.cat([hard("normal", 2, 8192) * torch.tensor([[1.0], [4.0]])]).to(DEVICE)
    kept_by_kernels(logits, Sampling(temperature=1.0, top_p=top_p))
    first, last, _, _, listed = states[0][:, :5].T.tolist()
    assert all(0 <= end - begin <= 8 for begin, end in zip(first, last, strict=True))
    assert all(0 < n < 8192 // 8 for n in listed)
