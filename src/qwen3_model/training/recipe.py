"""The recipe of the embedded checkpoint: corpus, tokenizer, pretraining, distillation, held-out prompts,
model card.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from ..config import Qwen3Config
from . import card
from .agreement import Estimate, estimate
from .corpus import Source, sources
from .distill import Blocks, distill, start_from_ar
from .folder import load_network, save_distilled, save_pretrained
from .held_out import PROMPT_TOKENS, held_out_prompts
from .loop import Plan
from .network import Network
from .pretrain import held_out_loss, pretrain
from .tokenizer import MASK_TOKEN_ID, train_tokenizer

TINY = Qwen3Config(
    vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, rope_theta=10_000.0,
    tie_word_embeddings=True, eos_token_ids=(0,), dtype="bfloat16",
)  # fmt: skip
BLOCK_SIZE = 32
PRETRAIN = Plan(steps=20_000, batch=96, length=1024, lr=5e-3, weight_decay=0.05)
DISTILL = Plan(steps=20_000, batch=48, length=1024, lr=3e-3)
BLOCKS = Blocks(count=32, size=BLOCK_SIZE, offset_decay=0.9)
TOKENIZER_BYTES = 15_000_000


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training and held-out files, and the files."""

    training: np.ndarray
    held_out: np.ndarray
    files: list[Source]


def read_corpus(files: list[Source], tokenizer: Tokenizer) -> Corpus:
    """Tokenise every file, each followed by the end token."""
    sides = {
        side: np.concatenate([
            np.array([*encoding.ids, 0], dtype=np.int32)
            for encoding in tokenizer.encode_batch([s.path.read_text("utf-8") for s in files if s.held_out == side])
        ])
        for side in (False, True)
    }  # fmt: skip
    return Corpus(sides[False], sides[True], files)


def run_pretrain(out: Path, seconds: float, corpus_bytes: int, seed: int = 0) -> None:
    """Train tokenizer and AR view; writes a plain Qwen3 folder with the held-out prompts and `training.json`."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = sources(corpus_bytes)
    say(began, f"{len(files)} files, {sum(f.size for f in files) / 1e6:.0f} MB")
    texts, total = [], 0
    for file in files:
        if not file.held_out and total < TOKENIZER_BYTES:
            texts.append(file.path.read_text("utf-8"))
            total += file.size
    tokenizer = train_tokenizer(texts, TINY.vocab_size)
    say(began, "tokenizer trained")
    corpus = read_corpus(files, tokenizer)
    say(
        began,
        f"{len(corpus.training) / 1e6:.1f}M training tokens, {len(corpus.held_out) / 1e3:.0f}k held out",
    )
    prompts = held_out_prompts([f for f in files if f.held_out], tokenizer, corpus.training)
    say(began, f"{len(prompts)} held-out prompts")
    network = Network(TINY)
    network.initialise(seed)
    network.to(device)
    plan = dataclasses.replace(PRETRAIN, seconds=seconds, seed=seed)
    steps, spent = pretrain(network, torch.from_numpy(corpus.training).to(device), plan)
    loss = held_out_loss(network, torch.from_numpy(corpus.held_out).to(device), plan.length)
    say(began, f"pretrained {steps} steps in {spent:.0f} s, held-out loss {loss:.3f}")
    facts = machine() | {
        "pretrain": {"steps": steps, "seconds": round(spent), "tokens": steps * plan.batch * plan.length,
                     "held_out_loss": round(loss, 4), **dataclasses.asdict(plan)},
        "corpus": {"bytes": sum(f.size for f in files), "training_tokens": len(corpus.training),
                   "distributions": _distributions(files)},
    }  # fmt: skip
    save_pretrained(out, network, tokenizer, prompts, facts)
    say(began, f"wrote {out}")


def run_distill(base: Path, out: Path, seconds: float, corpus_bytes: int, seed: int = 0) -> Estimate:
    """Distil a diffusion view onto the folder `base`; writes an Orthrus folder with model card."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    corpus = read_corpus(sources(corpus_bytes), tokenizer)
    say(began, f"{len(corpus.training) / 1e6:.1f}M training tokens")
    config = dataclasses.replace(
        Qwen3Config.from_folder(base), block_size=BLOCK_SIZE, mask_token_id=MASK_TOKEN_ID
    )
    network = load_network(base, config).to(device)
    start_from_ar(network)
    plan = dataclasses.replace(DISTILL, seconds=seconds, seed=seed)
    steps, spent = distill(network, torch.from_numpy(corpus.training).to(device), plan, BLOCKS)
    say(began, f"distilled {steps} steps in {spent:.0f} s")
    found = estimate(network, dev_prompts(base, tokenizer).to(device))
    say(began, f"dev prompts: {found.tokens_per_cycle:.3f} tokens/cycle, distinct 8-grams {found.distinct_8grams:.3f}, "
        f"agreement {[round(x, 3) for x in found.by_offset[:8]]}")  # fmt: skip
    facts = json.loads((base / "training.json").read_text()) | machine() | {
        "distill": {"steps": steps, "seconds": round(spent), "tokens_per_cycle_dev": round(found.tokens_per_cycle, 3),
                    "distinct_8grams_dev": round(found.distinct_8grams, 3),
                    "agreement_dev": [round(x, 3) for x in found.by_offset],
                    **dataclasses.asdict(plan), **dataclasses.asdict(BLOCKS)},
    }  # fmt: skip
    save_distilled(base, out, network, facts)
    (out / "README.md").write_text(card.write(facts))
    say(began, f"wrote {out}")
    return found


def dev_prompts(folder: Path, tokenizer: Tokenizer) -> torch.Tensor:
    """The development prompts, their last tokens only so that all are equally long: [B, shortest prompt]."""
    lines = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    length = PROMPT_TOKENS[0]
    return torch.tensor(
        [tokenizer.encode(row["prompt"]).ids[-length:] for row in lines if row["split"] == "dev"]
    )


def machine() -> dict[str, str]:
    """What a figure was measured with."""
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {"machine": on, "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def say(began: float, words: str) -> None:
    """A line of progress with the seconds since `began`."""
    print(f"[{time.perf_counter() - began:6.1f}] {words}", flush=True)


def _distributions(files: list[Source]) -> list[dict[str, object]]:
    sizes, licences = Counter[str](), {}
    for file in files:
        sizes[file.distribution] += file.size
        licences[file.distribution] = file.licence
    return [{"name": name, "licence": licences[name], "bytes": size} for name, size in sizes.most_common()]
