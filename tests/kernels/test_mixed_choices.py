"""Rows of several texts in one pass, each with settings of its own: a row's token, candidates and sums are
those that it has alone, bit for bit, whatever is beside it and in whichever slot its text is. What no row may
read holds numbers that would show."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from lookup import lookup_model
from strategies import hard

from orthrus_kernels import Form, Sampling, SamplingTable, alike, backend_ops
from orthrus_kernels.layout import Settings, Takes
from qwen3_model.decode.choice import Choice

INF, V = float("inf"), 300
BACKENDS = {"reference": backend_ops("reference"), "triton": backend_ops("triton")}
# One of each algorithm, with and without tables.
KINDS = [
    {}, {"repetition_penalty": 1.3}, {"logit_bias": {7: 3.0, 2: -INF}}, {"temperature": 0.7},
    {"temperature": 1.7, "logit_bias": {3: 2.5}}, {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 20, "repetition_penalty": 0.5},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.731, "min_p": 0.0137, "logit_bias": {0: -1.0}},
    {"temperature": 1.7, "top_p": 0.973}, {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 2.0},
    {"presence_penalty": 1.5}, {"temperature": 0.9, "frequency_penalty": 0.8, "presence_penalty": -1.0},
    {"temperature": 1.0, "top_k": 200, "top_p": 0.731},
]  # fmt: skip
samplings = st.builds(
    lambda kind, seed: Sampling(seed=seed, **kind), st.sampled_from(KINDS), st.integers(0, 2**64 - 1)
)


def table_of(texts, device) -> SamplingTable:
    """A table in which what no row may read is NaN: the biases of slots that have none."""
    table = SamplingTable(len(texts), V, device)
    for slot, sampling in enumerate(texts):
        table.put(slot, sampling)
    table.form = table.form_of(range(len(texts)))
    if table.bias is not None:
        for slot, sampling in enumerate(texts):
            if not sampling.logit_bias:
                table.bias[slot] = math.nan
    return table


@examples(15)
@given(texts=st.lists(samplings, min_size=1, max_size=5), data=st.data(), seed=st.integers(0, 99))
def test_a_row_is_chosen_as_it_is_alone(texts, data, seed):
    slots = data.draw(st.lists(st.integers(-1, len(texts) - 1), min_size=1, max_size=6))
    rows, k = len(slots), data.draw(st.sampled_from([1, 16]))
    g = torch.Generator().manual_seed(seed)
    logits, positions = hard("normal", rows, V, seed=seed) * 3, torch.randint(0, 40_000, (rows,), generator=g)
    seen = torch.randint(0, 12, (rows, V), generator=g, dtype=torch.int32)
    seen *= torch.rand(rows, V, generator=g) < 0.3
    unused = torch.tensor(slots) < 0
    logits[unused], positions[unused] = math.nan, -(2**62)
    logits, positions, seen = logits.to(DEVICE), positions.to(DEVICE), seen.to(DEVICE)
    of = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    table, chosen = table_of(texts, DEVICE), []
    for ops in BACKENDS.values():
        got = ops.choose(logits, positions, table, of, seen)
        scores, ids = ops.candidates(logits, positions, table, of, k, seen)
        chosen.append(got.tolist())
        for row, slot in enumerate(slots):
            one = slice(row, row + 1)
            if slot < 0:
                assert got[row] == 0 and not scores[row].any() and not ids[row].any()
                continue
            given_ = logits[one], positions[one], *alike(texts[slot], logits[one])
            assert torch.equal(got[one], ops.choose(*given_, seen[one])), (row, texts[slot])
            alone, alone_ids = ops.candidates(*given_, k, seen[one])
            assert torch.equal(scores[one], alone) and torch.equal(ids[one], alone_ids), (row, texts[slot])
    assert chosen[0] == chosen[1], "the twin's"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_form_that_covers_more_changes_nothing(kind):
    """Such as the union of mixed passes, and one of the few forms of several slots."""
    logits = hard("normal", 3, V).to(DEVICE) * 3
    positions, seen = torch.arange(3, 6, device=DEVICE), logits.clamp(min=0).int()
    one, slots = alike(Sampling(seed=3, **kind), logits)
    every = table_of([Sampling(seed=9, **other) for other in KINDS], DEVICE)
    every.put(4, Sampling(seed=3, **kind))
    union = every.form_of(range(len(KINDS))) | one.form
    ops = BACKENDS["triton"]
    want = (
        ops.choose(logits, positions, one, slots, seen),
        *ops.candidates(logits, positions, one, slots, 16, seen),
    )
    for every.form in (union, one.form.rounded()):
        got = ops.choose(logits, positions, every, slots + 4, seen)
        found = got, *ops.candidates(logits, positions, every, slots + 4, 16, seen)
        for ours, alone in zip(found, want, strict=True):
            assert torch.equal(ours, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_greedy_row_beside_others_has_the_bits_of_the_fused_head(backend):
    """Token, logit and log-sum-exp of the target; log-probabilities and ids of a draft."""
    model = lookup_model(0.5, backend, vocab_size=97, mask_token_id=96)
    model.ops = BACKENDS[backend]
    choice, alone = Choice(model, 3), Choice(model)
    for slot, sampling in enumerate(
        [Sampling(temperature=0.8, top_k=5, seed=1), Sampling(), Sampling(repetition_penalty=1.5)]
    ):
        choice.put(slot, sampling, [5, 6, 7], 2)
    choice.form = choice.form_of(range(3))
    assert not choice.form.plain and choice.form_of([1]).plain and alone.form.plain
    states = torch.randn(6, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    slots = torch.tensor([0, 1, 2, -1, 1, 0], dtype=torch.int32, device=DEVICE)
    rows = [1, 4]
    positions, zero = torch.arange(4, 10, device=DEVICE), torch.zeros(6, dtype=torch.int32, device=DEVICE)
    tree = torch.full((6,), 9, device=DEVICE), torch.tensor([-1] * 6, dtype=torch.int32, device=DEVICE)
    got, want = (
        (of.of_tree(of.scores(states), positions, *tree, rows_of), of.candidates(states, positions, rows_of))
        for of, rows_of in ((choice, slots), (alone, zero))
    )
    for ours, theirs in zip([*got[0][:3], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(ours[rows], theirs[rows])
    assert all(x[3].isfinite().all() for x in (*got[0], got[1][0])), "a padding row"
    assert got[1][1][rows, 0].tolist() == want[0][0][rows].tolist(), "the first candidate is the choice"


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_are_counted_apart(backend):
    """What one walk keeps is penalised in its own text alone, and a text put anew forgets the one before."""
    model = lookup_model(0.5, backend, vocab_size=40, mask_token_id=39)
    choice = Choice(model, 3)
    choice.put(0, Sampling(repetition_penalty=2.0), [5, 5, 5], 1)
    choice.put(2, Sampling(frequency_penalty=1.0), [6], 1)
    choice.form = choice.form_of([0, 1, 2])

    def ints(*numbers, dtype=torch.int32):
        return torch.tensor(numbers, dtype=dtype, device=DEVICE)

    slots, accepted = ints(2, 2, 0, 0, -1), ints(0, 1, 2, -1).view(2, 2)
    choice.note(ints(7, 6, 8, 9, 2**40, dtype=torch.int64), accepted, slots)
    counts = [{token: int(row[token]) for token in row.nonzero().flatten().tolist()} for row in choice.counts]
    assert counts == [{5: 5, 8: 2}, {}, {6: 3, 7: 2}]
    choice.put(0, Sampling(repetition_penalty=2.0), [1], 1)
    assert choice.counts[0].nonzero().flatten().tolist() == [1]


def test_what_a_launch_follows_from():
    """The union of what the choices take; settings that filter nothing take no filter."""
    table = table_of(
        [Sampling(), Sampling(temperature=1.0, top_k=20), Sampling(temperature=1.0, top_k=V)], "cpu"
    )
    assert table.form_of([0]).plain and table.form_of([2]) == (Takes.SAMPLED, 0)
    assert table.form_of([0, 1]) == (Takes.GREEDY | Takes.BEST | Takes.TOP_K, 32)
    banned = replace(table.samplings[1], logit_bias={3: -INF})
    table.put(0, banned)
    assert table.form_of([0, 1, 2]) == (
        Takes.BEST | Takes.TOP_K | Takes.SAMPLED | Takes.BIAS, 32,
    )  # fmt: skip
    assert table.numbers[0, Settings.TAKES] == Takes.BEST | Takes.TOP_K | Takes.BIAS


def test_what_a_form_covers_is_there_before_a_text_needs_it():
    """A graph that was captured for it finds the biases and counts of later texts."""
    choice = Choice(lookup_model(0.5, "reference", vocab_size=40, mask_token_id=39), 2)
    assert choice.table.bias is None and choice.counts is None
    choice.form = Form(Takes.GREEDY | Takes.BIAS | Takes.PENALTY, 0)
    held = choice.table.bias, choice.counts
    choice.put(1, Sampling(logit_bias={3: 2.0}, repetition_penalty=2.0), [7], 1)
    assert choice.table.bias is held[0] and choice.counts is held[1]
    assert choice.table.bias[1, 3] == 2.0 and choice.counts[1, 7] == 1
