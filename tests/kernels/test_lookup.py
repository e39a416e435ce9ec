"""Prompt lookup: kernel and twin draft what followed the last tokens of each seat's text, exactly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels.layout import State
from orthrus_kernels.lookup import AGREES, MOST, lookup, lookup_triton

SLOTS, ROWS = 4, 7
BOTH = pytest.mark.parametrize("how, device", [(lookup_triton, DEVICE), (lookup, "cpu")])
NONSENSE = 10**6  # behind the end of a text
TEXTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, 2), min_size=1, max_size=40),  # repeats itself soon
        st.lists(st.integers(0, 90), min_size=1, max_size=12),
        st.builds(list.__mul__, st.lists(st.integers(0, 9), min_size=1), st.integers(1, 4)),
    ),
    min_size=SLOTS, max_size=SLOTS,
)  # fmt: skip


def drafted(texts, slots, how=lookup_triton, device=DEVICE, rows=ROWS, room=3):
    """(drafts, how many tokens each place matches, as the scores say) for the texts of slots, lists. Of an
    empty seat -8 and MOST + 1."""
    capacity = max(map(len, texts)) + room
    history = [[*text, *[NONSENSE] * (capacity - len(text))] for text in texts]
    state = [[len(text) - 1, text[-1], 9, 0, 999, 9] for text in texts]
    history, state, slots = (
        torch.tensor(t, dtype=torch.int32, device=device) for t in (history, state, slots)
    )
    lines = torch.full((len(slots), 1 + rows), -8, dtype=torch.int64, device=device)
    scores = torch.full((len(slots), 1 + rows), -9.0, device=device)
    assert state.shape[1] == len(State)
    how(history, state, slots, lines[:, 1:], scores[:, 1:])
    assert set(lines[:, 0].tolist()) <= {-8} and set(scores[:, 0].tolist()) <= {-9.0}, "the roots'"
    logs = [math.log(share) for share in AGREES]
    wanted = torch.tensor([[logs[min(n + i, MOST)] for i in range(rows)] for n in range(MOST + 1)]).cumsum(1)
    wanted = torch.cat([wanted, torch.full((1, rows), -9.0)]).to(device)  # the last one: nothing is written
    near = torch.isclose(scores[:, None, 1:], wanted).all(-1).int()
    assert near.sum(1).tolist() == [1] * len(slots)
    return lines[:, 1:].tolist(), near.argmax(1).tolist()


def by_definition(text, rows=ROWS):
    """Every length and place tried, the longest and latest first; then the tokens behind it, round and
    round."""
    for length in range(MOST, 0, -1):
        for place in range(len(text) - 2, length - 2, -1):
            if text[place - length + 1 : place + 1] == text[len(text) - length :]:
                behind = text[place + 1 :]
                return (behind * rows)[:rows], length
    return [text[-1]] * rows, 0


@BOTH
@examples(80)
@given(texts=TEXTS, slots=st.permutations(range(SLOTS)), empty=st.integers(0, 2 * SLOTS))
def test_what_followed_the_longest_and_latest_match(how, device, texts, slots, empty):
    """Of each seat's own text, whatever stands behind its end; an empty seat keeps what it had."""
    slots = [-1 if seat == empty else slot for seat, slot in enumerate(slots)]
    drafts, matched = drafted(texts, slots, how, device)
    for slot, draft, length in zip(slots, drafts, matched, strict=True):
        assert (draft, length) == (by_definition(texts[slot]) if slot >= 0 else ([-8] * ROWS, MOST + 1))


@BOTH
def test_known_drafts(how, device):
    texts = [[5, 6, 7, 5, 6], [1, 2, 3, 9, 1, 2, 4, 8, 2], [7, 7, 7], [3]]
    drafts, matched = drafted(texts, [0, 1, 2, 3], how, device, rows=5)
    assert drafts == [[7, 5, 6, 7, 5], [4, 8, 2, 4, 8], [7] * 5, [3] * 5] and matched == [2, 1, 2, 0]


@pytest.mark.parametrize("last", [31, 32, 33, 34, 64, 65, 66, 100])
def test_texts_of_several_tiles(last, monkeypatch):
    """Matches in every tile, and over the border of two."""
    monkeypatch.setitem(lookup_triton.__globals__, "_TILE", 32)
    text = [n % 13 + (n * n) % 3 for n in range(100)][:last]
    draft, length = by_definition(text)
    assert drafted([text], [0]) == ([draft], [length])
    unlike = [*range(last), 7]  # nothing but the place of one token
    assert drafted([unlike], [0]) == ([(unlike[8:] * ROWS)[:ROWS]], [1])


@BOTH
def test_a_match_of_more_tokens_counts_as_one_of_most(how, device):
    """So the latest place wins, though an earlier one matches more."""
    last = [1, 2, 3, 4, 5]
    text = [*last, 8, 9, *last[1:], 7, 0, *last]
    drafts, matched = drafted([text], [0], how, device, rows=2)
    assert MOST == 4 and matched == [4] and drafts == [[7, 0]]


def test_what_is_not_looked_up():
    """Fewer scores than seats; rows that do not follow one another."""
    history, state = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, len(State), dtype=torch.int32)
    slots, drafts = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 6, dtype=torch.int64)
    for lines, scores in ((drafts, torch.zeros(1, 6)), (drafts[:, ::2], torch.zeros(2, 3))):
        with pytest.raises(AssertionError):
            lookup_triton(history, state, slots, lines, scores)
