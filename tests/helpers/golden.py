"""Yesterday's bits: hashes of texts and logits that only an entry of the CHANGELOG may change.

A record is of one processor and the builds that made its kernels, since bits are promised for those alone. To
make the record of this machine: `python tests/helpers/golden.py`, with --gpu for the GPU's."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import struct
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orthrus_kernels import Rows
from qwen3_model import Qwen3, Qwen3Config
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.prompts import read_prompts

FOLDER = Path(__file__).parents[1] / "gpu/golden"
SEED = 11
TEMPERATURES = (0.0, 0.8)
STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "autoregressive"},
    "chain": {"strategy": "two-pass", "tree_nodes": 0},
    "tree": {"strategy": "two-pass", "tree_nodes": 31},
    "one-pass": {"strategy": "one-pass"},
    "auto": {"strategy": "auto"},
}
SHAPES = {  # hidden, MLP, layers, heads, tied
    "1.7B": (2048, 6144, 28, 16, True),
    "8B": (4096, 12288, 36, 32, False),
}


def record_file(device: str) -> Path:
    """The record of this machine's processor and builds, whether it is there or not."""
    if device == "cuda":
        import triton

        words = [torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}"]
    else:
        words = [_cpu(), f"torch {torch.__version__}"]
    return FOLDER / ("-".join(re.sub(r"[^a-z0-9.+]+", "-", word.lower()) for word in words) + ".json")


def _cpu() -> str:
    """The processor's kind: its name and the instructions that torch takes."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def texts_hash(model: Qwen3, prompts: int, tokens: int, temperature: float, **strategy: Any) -> str:
    """The hash of tokens and bits of log-probabilities of held-out prompts' texts."""
    assert model.text is not None
    digest = hashlib.sha256()
    for i, prompt in enumerate(read_prompts(EMBEDDED / "held_out.jsonl", prompts, None, "test")):
        result = model.generate(
            model.text.encode(prompt), max_new_tokens=tokens, temperature=temperature, seed=SEED + i,
            **strategy,
        )  # fmt: skip
        pairs = zip(result.token_ids, result.logprobs, strict=True)
        digest.update(b"".join(struct.pack("<id", token, logprob) for token, logprob in pairs) + b"|")
    return digest.hexdigest()


def logits_hash(model: Qwen3, prompt: int = 333) -> str:
    """The hash of the logits of a pass over a tree's rows and two blocks' behind a prompt, and of the
    prompt's last row."""
    c, digest = model.config, hashlib.sha256()
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, c.vocab_size - 1, (prompt + 14,), generator=generator).tolist()
    cache = model.new_cache(prompt + 64)
    _update(digest, [model.prefill(ids[:prompt], cache)])
    parents = [-1, 0, 1, 2, 0, 4, 4, 6, 1, 8, 9, 3, 11, 12]
    rows = Rows.tree_with_blocks(ids[prompt:], parents, prompt, [13, 4], 8, c.mask_token_id)
    with torch.inference_mode():
        _update(digest, [model.forward(rows, cache).logits])
    return digest.hexdigest()


def _update(digest: Any, tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())


def seeded_model(name: str, device: str, layers: int | None = None) -> Qwen3:
    """Random weights of a fixed seed at the shapes of a published model. layers: fewer of them."""
    hidden, mlp, depth, heads, tied = SHAPES[name]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rope_theta=1e6, tie_word_embeddings=tied, eos_token_ids=(151645,), dtype="bfloat16", block_size=32,
        mask_token_id=151669,
    )  # fmt: skip
    return Qwen3.from_config(replace(config, num_hidden_layers=layers or depth), SEED, device, "bfloat16")


def embedded(device: str) -> Qwen3:
    """The embedded checkpoint as `generate` runs it there."""
    return Qwen3.from_pretrained(EMBEDDED, device, progress=False)


def make(device: str, prompts: int, tokens: int) -> dict[str, Any]:
    """A machine's record: a hash a temperature, which every strategy has, and one a shape."""
    model = embedded(device)
    record: dict[str, Any] = {"prompts": prompts, "tokens": tokens, "texts": {}, "logits": {}}
    for temperature in TEMPERATURES:
        found = {
            name: texts_hash(model, prompts, tokens, temperature, **how) for name, how in STRATEGIES.items()
        }
        assert len(set(found.values())) == 1, found
        record["texts"][str(temperature)] = found["plain"]
    record["logits"]["embedded"] = logits_hash(model)
    del model
    for name in SHAPES if device == "cuda" else ():
        record["logits"][name] = logits_hash(seeded_model(name, device))
        torch.cuda.empty_cache()
    return record


def main() -> int:
    """Write the record of this machine."""
    parser = argparse.ArgumentParser(
        description="Write the golden record of this machine.",
        epilog="example: python tests/helpers/golden.py --gpu",
    )
    parser.add_argument("--gpu", action="store_true", help="of the GPU's kernels (default: the CPU's twins)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args()
    device = "cuda" if args.gpu else "cpu"
    torch.set_num_threads(1)
    record = make(device, *((20, 128) if args.gpu else (3, 12)))
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / record_file(device).name
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
