"""What a mask permits: kernel, twin and definition, exactly; and every form of the choice behind it chooses
as with a ban of all other tokens."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from strategies import hard
from test_mixed_choices import BACKENDS, KINDS

from orthrus_kernels import Sampling, SamplingTable, alike
from orthrus_kernels.layout import Takes
from orthrus_kernels.permit import mask_words

INF = math.inf


def masks_of(permitted: torch.Tensor) -> torch.Tensor:
    """[T, V] bool as words; the bits behind the vocabulary are set, and mean nothing."""
    rows, v = permitted.shape
    words = torch.full((rows, mask_words(v)), -1, dtype=torch.int32)
    for row, token in (~permitted).nonzero().tolist():
        left = (int(words[row, token // 32]) & 0xFFFFFFFF) & ~(1 << token % 32)
        words[row, token // 32] = left - (left >> 31 << 32)
    return words


@examples(15)
@given(
    slots=st.lists(st.integers(-1, 2), min_size=1, max_size=5), v=st.sampled_from([31, 32, 33, 300, 5003]),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_not_permitted_is_impossible(slots, v, share, seed):
    """Slots 0 and 2 have a grammar; what others have for a mask is not looked at, nor are their logits."""
    rows, g = len(slots), torch.Generator().manual_seed(seed)
    logits, permitted = hard("normal", rows, v, seed=seed), torch.rand(rows, v, generator=g) < share
    others = [row for row, slot in enumerate(slots) if slot in (-1, 1)]
    logits[others] = math.nan
    want = logits.masked_fill(~permitted, -INF)
    want[others] = math.nan
    of, masks = torch.tensor(slots, dtype=torch.int32, device=DEVICE), masks_of(permitted).to(DEVICE)
    table = SamplingTable(3, v, DEVICE)
    for slot in (0, 2):
        table.put(slot, Sampling(temperature=0.5 * slot), masked=True)
    for ops in BACKENDS.values():
        got = logits.to(DEVICE, copy=True)
        ops.permit(got, masks, table, of)
        assert torch.equal(got.cpu().nan_to_num(9.0), want.nan_to_num(9.0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_choice_is_that_of_a_ban(kind):
    """In every form: also where top-k keeps more tokens than are permitted, and where one alone is."""
    v, rows = 300, 4
    logits, g = hard("normal", rows, v).to(DEVICE) * 3, torch.Generator().manual_seed(5)
    positions, seen = torch.arange(3, 3 + rows, device=DEVICE), logits.clamp(min=0).int()
    permitted = torch.rand(rows, v, generator=g) < torch.tensor([[0.5], [0.02], [1.0], [0.0]])
    permitted[3, 270] = True
    sampling, chosen = Sampling(seed=7, **kind), []
    for ops in BACKENDS.values():
        table, slots = alike(sampling, logits)
        table.put(0, sampling, masked=True)
        assert table.form_of([0]).takes == table.form.takes | Takes.MASK
        masked = logits.clone()
        ops.permit(masked, masks_of(permitted).to(DEVICE), table, slots)
        got = ops.choose(masked, positions, table, slots, seen)
        scores, ids = ops.candidates(masked, positions, table, slots, 16, seen)
        for row in range(rows):
            banned = dict.fromkeys((~permitted[row]).nonzero().flatten().tolist(), -INF)
            ban = replace(sampling, logit_bias=dict(sampling.logit_bias) | banned)
            one = logits[row : row + 1], positions[row : row + 1], *alike(ban, logits[row : row + 1])
            its_seen = seen[row : row + 1]
            assert torch.equal(got[row], ops.choose(*one, its_seen)[0]) and permitted[row, got[row]]
            want, its_ids = ops.candidates(*one, 16, its_seen)
            possible = want[0] > -INF
            assert torch.equal(scores[row], want[0]) and torch.equal(ids[row][possible], its_ids[0][possible])
        chosen.append(got.tolist())
    assert chosen[0] == chosen[1], "the twin's"
