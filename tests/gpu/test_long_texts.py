"""Prompts of 32k and, stretched by YaRN, of 120k tokens beside eight short texts, in a pool that just holds
them: bits as alone, and how long the short texts wait.

Random weights at the shapes of 0.6B. ORTHRUS_LONG: tokens of the two prompts ("32000 120000"); `-s` shows
the times."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from statistics import mean, median, quantiles

import pytest
import torch
from waits import gaps

from orthrus_kernels import PAGE, pages_for
from qwen3_model import Engine, Qwen3, Qwen3Config, Request
from qwen3_model.decode.prompt_rows import PromptRows
from qwen3_model.rope_config import YarnScaling

CONFIG = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rope_theta=1e6,
    tie_word_embeddings=True, eos_token_ids=(), block_size=32, mask_token_id=151669,
)  # fmt: skip
LONG = tuple(int(tokens) for tokens in os.environ.get("ORTHRUS_LONG", "32000 120000").split())
SHORT, MOST = 8, 64  # texts; new tokens of a long one


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 151000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("tokens", LONG)
def test_a_long_prompt_beside_short_texts(tokens, monkeypatch):
    stretched = tokens + MOST > CONFIG.context_length
    config = replace(CONFIG, yarn=YarnScaling(4.0, 32768) if stretched else None)
    model = Qwen3.from_config(config, 3, "cuda", "bfloat16")
    cycles = max(tokens // 40, 800)
    plain = Request(strategy="autoregressive", max_new_tokens=cycles)
    jobs = [(prompt(20 + 9 * n, n), replace(plain, seed=n, temperature=0.9 * (n % 2))) for n in range(SHORT)]
    long = prompt(tokens, 99), Request(strategy="two-pass", max_new_tokens=MOST, seed=9, temperature=0.8)
    pages = sum(pages_for(len(ids) + request.max_new_tokens) for ids, request in (*jobs, long))
    engine = Engine(model, SHORT + 1, pages * PAGE)
    engine.warm()
    rows, fill = [], PromptRows.fill
    monkeypatch.setattr(
        PromptRows, "fill", lambda self, of: rows.append(sum(len(p.tokens) for p in of)) or fill(self, of)
    )
    texts = [engine.submit(*job) for job in jobs]
    while min(len(text.stream.token_ids) for text in texts) < 200:
        engine.step()
    usual = gaps(engine, texts[0], lambda: len(texts[0].stream.token_ids) >= 400)
    rows.clear()
    texts.append(engine.submit(*long))
    began = time.perf_counter()
    beside = gaps(engine, texts[0], lambda: bool(texts[-1].stream.token_ids))
    seconds, still = time.perf_counter() - began, not texts[0].finished
    most = quantiles(beside, n=20)[-1]
    print(
        f"\n{tokens} tokens: first token after {seconds:.2f} s, beside texts all the time: {still}; pieces "
        f"of {sorted(set(rows))} tokens; a cycle takes {1e3 * median(usual):.1f} ms, beside the prompt "
        f"{1e3 * median(beside):.1f} ({1e3 * mean(beside):.1f} on average), 95 % below {1e3 * most:.1f}, at "
        f"most {1e3 * max(beside):.1f}; chunks alone (ms): {engine.runner.cycles.pace.first}"
    )
    while engine.step():
        pass
    found = [text.result() for text in texts]
    engine.forget()
    for result, job in zip(found, (*jobs, long), strict=True):
        alone = model.engine.generate(*job)
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)
    assert median(beside) < 3 * median(usual), "the host's clock, and its time too"
    assert mean(beside) < 3.5 * median(usual), "waits are uneven behind long contexts"
