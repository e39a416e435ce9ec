"""Prompts in chunks of fixed rows, padded or not, alone or beside others, have the bits of `prefill` by any
other chunking."""

from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from small import small_model

from orthrus_kernels import attention_triton
from qwen3_model.decode import prompt
from qwen3_model.decode.cycle import Slots
from qwen3_model.decode.prompt import Prompts, rows_for
from qwen3_model.decode.prompt_rows import Piece


@pytest.fixture
def captured(monkeypatch):
    """Passes that are 'captured': run again from the same tensors."""
    runs = []

    def again(run, pool):
        runs.append(run)
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(prompt, "captured", again)
    return runs


@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [("reference", "bfloat16", False), ("triton", "float32", False), ("triton", "bfloat16", True)],
)
def test_any_chunks_have_the_same_bits(captured, monkeypatch, backend, dtype, whole):
    """Prompts in turn: the second chunk of as many rows is a replay, and nothing of the first is left.
    Places that are not the prompt's keep what they hold. whole: by attention's form for prompts."""
    monkeypatch.setattr(attention_triton, "PROMPT_ROWS", 0 if whole else 1 << 20)
    model = small_model(dtype, backend=backend, device=DEVICE, num_hidden_layers=1)
    g = torch.Generator().manual_seed(1)
    ours, theirs = model.new_cache(100), model.new_cache(100)
    slots = Slots(model, ours, 1)
    slots = Slots(model, ours, 1)
    padded, exact = Prompts(slots, "a pool"), Prompts(slots, None)
    for prompts, length in ((padded, 45), (padded, 16), (exact, 37), (padded, 65)):
        for cache in (ours, theirs):
            cache.keys.fill_(float("nan"))
            cache.values.fill_(7.0)
        tokens, theirs.lengths = torch.randint(0, 96, (length,), generator=g).tolist(), [0]
        with torch.inference_mode():
            for first in range(0, length, 32):
                states = prompts.run([Piece(tokens[first : first + 32], first, 0)])
            logits = model.ops.linear(states, model.head, out_dtype=torch.float32)[0]
            assert torch.equal(logits, model.prefill(tokens, theirs, chunk=27)), length
        for got, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert len(captured) == 2, "chunks of 16 and of 32 rows"


@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [("reference", "bfloat16", False), ("triton", "float32", False), ("triton", "bfloat16", True)],
)
def test_several_texts_in_a_chunk(captured, monkeypatch, backend, dtype, whole):
    """Of which one begins in the first chunk and ends in the second, both of one shape. A chunk writes no
    place of the cache but its own."""
    monkeypatch.setattr(attention_triton, "PROMPT_ROWS", 0 if whole else 1 << 20)
    model = small_model(dtype, backend=backend, device=DEVICE, num_hidden_layers=1)
    g = torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randint(0, 96, (n,), generator=g).tolist() for n in (9, 1, 30, 5))
    ours = model.new_cache(100, sequences=5)
    for cache in (ours.keys, ours.values):
        cache.fill_(float("nan"))
    prompts = Prompts(Slots(model, ours, 5), "a pool")
    chunks = (
        [Piece(a, 0, 3), Piece(b, 0, 0), Piece(c[:7], 0, 4)],
        [Piece(c[7:], 7, 4), Piece(d, 0, 1)],
    )
    with torch.inference_mode():
        of_a, of_b, _, of_c, of_d = (
            state for pieces in chunks for state in prompts.run(pieces)[: len(pieces)].clone()
        )
    assert len(captured) == 1, "the second chunk, of 28 rows, is a replay of the first, of 17"
    for tokens, state, slot in ((a, of_a, 3), (b, of_b, 0), (c, of_c, 4), (d, of_d, 1)):
        alone = model.new_cache(100)
        with torch.inference_mode():
            logits = model.ops.linear(state[None], model.head, out_dtype=torch.float32)[0]
            assert torch.equal(logits, model.prefill(tokens, alone)), slot
        for got, want in zip(ours.read(slot, len(tokens)), alone.read(0, len(tokens)), strict=True):
            assert torch.equal(got, want), slot
        assert ours.read(slot, len(tokens) + 1)[0][:, :, -1].isnan().all()
    assert ours.read(2, 100)[0].isnan().all()


def test_rows_of_chunks():
    """Few shapes, so few graphs: powers of two from 16 to 128, then multiples of 128."""
    assert [rows_for(n) for n in (1, 16, 17, 100, 128, 129, 2000, 2048)] == [
        16, 16, 32, 128, 128, 256, 2048, 2048
    ]  # fmt: skip
