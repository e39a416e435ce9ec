"""What a grammar permits behind each node: the logits of all other tokens become -inf, in place, before all
else of a choice. So bias, penalties, temperature, filters and noise see permitted tokens alone, in every form
of the choice and in the twin alike.

A mask has a bit a token, 32 in a word, the lowest first. Whose rows take one, the settings of their slots say
(`Takes.MASK`); of other rows neither mask nor logits are read."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .layout import TAKES_MASK, Settings, Takes, slot_and_takes
from .sampling_table import SamplingTable

WORD = 32  # tokens of a word of a mask
_TILE = 4096  # tokens a program


def mask_words(vocabulary: int) -> int:
    """Words of a mask."""
    return -(-vocabulary // WORD)


def permit(logits: Tensor, masks: Tensor, table: SamplingTable, slots: Tensor) -> None:
    """Make what the masks do not permit impossible, of rows whose text has a grammar.

    logits [T, V] fp32, changed; masks [T, ceil(V / 32)] int32; slots [T] int32: whose settings in the table
    each row has; -1: a padding row, which stays."""
    at = slots.clamp(min=0).long()
    masked = (table.numbers[at, Settings.TAKES] & Takes.MASK != 0) & (slots >= 0)
    o_v = torch.arange(logits.shape[1], device=logits.device)
    permitted = (masks[:, o_v // WORD] >> (o_v % WORD)) & 1
    logits.masked_fill_(masked[:, None] & (permitted == 0), float("-inf"))


@triton.jit
def _permit_kernel(
    logits, s_t, masks, numbers, slots, V, WORDS, BLOCK_WORDS: tl.constexpr, WORD: tl.constexpr
):  # fmt: skip
    """Program (tile, row)."""
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, takes = slot_and_takes(numbers, slots, i_r)
    if (takes & TAKES_MASK) != 0:
        o_w, o_b = i_n * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS), tl.arange(0, WORD)
        b_word = tl.load(masks + i_r * WORDS + o_w, mask=o_w < WORDS, other=0)
        o_v = o_w[:, None] * WORD + o_b[None, :]
        forbidden = ((b_word[:, None] >> o_b[None, :]) & 1) == 0
        b = tl.full((BLOCK_WORDS, WORD), float("-inf"), tl.float32)
        tl.store(logits + i_r * s_t + o_v, b, mask=forbidden & (o_v < V))


def permit_triton(logits: Tensor, masks: Tensor, table: SamplingTable, slots: Tensor) -> None:
    """`permit` in one launch; it writes forbidden logits and reads none. Rows of logits are contiguous."""
    (rows, v), numbers = logits.shape, table.numbers
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert masks.dtype == slots.dtype == torch.int32 and slots.shape == (rows,), (masks.dtype, slots.shape)
    assert masks.shape == (rows, mask_words(v)) and masks.is_contiguous(), (masks.shape, masks.stride())
    assert numbers.is_contiguous() and numbers.shape[1] == len(Settings) and v == table.vocabulary, v
    assert slots.is_contiguous(), slots.stride()
    if rows:
        words = min(_TILE // WORD, triton.next_power_of_2(mask_words(v)))
        _permit_kernel[(triton.cdiv(mask_words(v), words), rows)](
            logits=logits, s_t=logits.stride(0) if rows > 1 else v, masks=masks, numbers=numbers, slots=slots,
            V=v, WORDS=mask_words(v), BLOCK_WORDS=words, WORD=WORD, num_warps=4,
        )  # fmt: skip
