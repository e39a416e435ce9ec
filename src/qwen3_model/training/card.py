"""The model card of the embedded checkpoint, written from the facts of its training."""

from __future__ import annotations

from typing import Any


def write(facts: dict[str, Any]) -> str:
    """Markdown from `training.json`."""
    pre, dis, corpus = facts["pretrain"], facts["distill"], facts["corpus"]
    rows = "\n".join(
        f"| {d['name']} | {d['licence']} | {d['bytes'] / 1e6:.2f} |" for d in corpus["distributions"]
    )
    agreement = ", ".join(f"{x:.2f}" for x in dis["agreement_dev"][:8])
    return f"""# Tiny Orthrus-Qwen3

A real, small Orthrus-Qwen3 in the official tensor names: a test fixture and a demonstration, not a coding assistant. It continues
Python source in the style of library code and knows nothing else.

Made by `make tiny-checkpoint` (`orthrus tiny-checkpoint`); every figure below is in `training.json`.

| | |
|---|---|
| machine | {facts["machine"]}, torch {facts["torch"]}, Python {facts["python"]}, {facts["date"]} |
| corpus | {corpus["bytes"] / 1e6:.0f} MB of Python source, {corpus["training_tokens"] / 1e6:.1f}M tokens, licences below |
| AR view | {pre["steps"]} steps of {pre["batch"]} x {pre["length"]} tokens in {pre["seconds"]} s, seed {pre["seed"]}; held-out loss {pre["held_out_loss"]:.3f} nats a token |
| diffusion view | {dis["steps"]} steps of {dis["batch"]} rows x {dis["count"]} blocks of {dis["size"]} in {dis["seconds"]} s, seed {dis["seed"]}, loss weight {dis["offset_decay"]}^offset |
| estimate on the dev prompts | {dis["tokens_per_cycle_dev"]} tokens a cycle (simulated on the proposal table, chain, greedy), distinct 8-grams {dis["distinct_8grams_dev"]}, agreement by offset {agreement} |

`orthrus verify` measures acceptance on the held-out prompts; the project's README states it.

Held-out files were chosen by the hash of their content. No prompt in `held_out.jsonl` shares a run of 50 tokens with the training
text. Its `source` and `licence` fields say where a prompt comes from.

## Corpus

Files of 2 to 200 kB from distributions that declare a permissive licence and nothing else; each content once.

| distribution | licence as declared | MB |
|---|---|---|
{rows}
"""
