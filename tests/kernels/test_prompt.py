"""The prompt in chunks of fixed rows, padded or not, gives the bits of `prefill` by any other chunking."""

from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE
from small import small_model

from orthrus_kernels import attention_triton
from qwen3_model.decode import prompt
from qwen3_model.decode.prompt import Prompts, rows_for


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
    padded, exact = Prompts(model, ours, "a pool"), Prompts(model, ours, None)
    for prompts, length in ((padded, 45), (padded, 16), (exact, 37), (padded, 65)):
        for cache in (ours, theirs):
            cache.keys.fill_(float("nan"))
            cache.values.fill_(7.0)
        tokens, theirs.lengths = torch.randint(0, 96, (length,), generator=g).tolist(), [0]
        with torch.inference_mode():
            for first in range(0, length, 32):
                states = prompts.run(tokens[first : first + 32], first, 0)
            logits = model.ops.linear(states, model.head, out_dtype=torch.float32)[0]
            assert torch.equal(logits, model.prefill(tokens, theirs, chunk=27)), length
        for got, want in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert len(captured) == 2, "chunks of 16 and of 32 rows"


def test_rows_of_chunks():
    """Few shapes, so few graphs: powers of two from 16 to 128, then multiples of 128."""
    assert [rows_for(n) for n in (1, 16, 17, 100, 128, 129, 2000, 2048)] == [
        16, 16, 32, 128, 128, 256, 2048, 2048
    ]  # fmt: skip
