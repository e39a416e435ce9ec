"""The recipe of the embedded checkpoint: corpus, tokenizer, pretraining, distillation, held-out prompts,
model card.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .. import bigram, checkpoint
from ..config import Qwen3Config
from ..errors import InputError, in_memory
from . import card
from .agreement import Estimate, estimate
from .base import (
    HELD_OUT,
    base_config,
    check_ids,
    dev_prompts,
    document_end,
    load_tokenizer,
    pick_mask,
    text_prompts,
)
from .bigram import check_rank, learn_bigram
from .dataset import Corpus, corpus_files, read_corpus, tokenizer_texts
from .distill import Blocks, check_start, distill, start_from, start_from_ar
from .facts import corpus_facts, distill_facts, facts_of, machine, started_from
from .folder import (
    load_network,
    save_corrected,
    save_distilled,
    save_pretrained,
    save_retrained,
    without_selector,
)
from .held_out import held_out_prompts
from .loop import Plan, Rows
from .memory import ADVICE, check_distillation, check_pretraining, training_device
from .network import Network
from .objective import OBJECTIVE, Objective
from .out_folder import OutFolder, claimed
from .pretrain import held_out_loss, pretrain
from .rollout import check_own_text, distinct_share, lengths, rollout, with_own_text
from .tokenizer import train_tokenizer
from .unlikelihood import Continuations, unrepeat

TINY = Qwen3Config(
    vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, rope_theta=10_000.0,
    tie_word_embeddings=True, eos_token_ids=(0,), dtype="bfloat16",
)  # fmt: skip
BLOCK_SIZE = 32
PRETRAIN = Plan(steps=20_000, batch=96, length=1024, lr=5e-3, weight_decay=0.05)
DISTILL = Plan(steps=20_000, batch=48, length=1024, lr=3e-3)
UNREPEAT = Plan(steps=5_000, batch=48, length=1024, lr=1e-3, weight_decay=0.05)
BIGRAM = Plan(steps=5_000, batch=48, length=1024, lr=5e-3)
CONTINUATIONS = Continuations()
# Over a quarter of own text and KL: chains 1.016 and 1.011, at equal steps (bench/LOG.md, 139).
OWN_TEXT, LOSS = 1.0, Objective(loss="ce")
# Short ones too: 1.15 times the tokens of a one-pass cycle, 1.03 of a chain (210 s more, H100, 2026-11-26).
BLOCKS = Blocks(count=32, size=BLOCK_SIZE, offset_decay=0.9, short=8)
BIGRAM_BLOCKS = Blocks(count=32, size=16, offset_decay=0.9)  # between a one-pass cycle's 8 and 32
BIGRAM_RANK = 32  # 64 gave 1.003 times the tokens a pass (embedded checkpoint, 2026-11-26)
CORPUS_BYTES = 200_000_000
ESTIMATED_TOKENS = 256  # of every prompt


def run_pretrain(
    out: Path | OutFolder,
    seconds: float | None,
    corpus_bytes: int = CORPUS_BYTES,
    seed: int = 0,
    *,
    plan: Plan = PRETRAIN,
    config: Qwen3Config = TINY,
    text: Sequence[Path] = (),
    state: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train tokenizer and AR view; writes a plain Qwen3 folder with `training.json` and, from the common
    corpus, held-out prompts. Raises InputError.

    seconds: None trains all steps of the plan. text: the user's files and folders instead of the corpus.
    """
    began = time.perf_counter()
    plan = dataclasses.replace(plan, seconds=seconds, seed=seed)
    with claimed(out, overwrite) as place, in_memory("this training", ADVICE):
        plan.check(config.context_length)
        check_pretraining(config, plan)
        device = training_device()
        files, own = corpus_files(corpus_bytes, text), bool(text)
        say(began, f"{len(files)} files, {sum(f.size for f in files) / 1e6:.0f} MB")
        tokenizer = train_tokenizer(tokenizer_texts(files, own), config.vocab_size)
        say(began, "tokenizer trained")
        corpus = read_corpus(files, tokenizer, own)
        held = len(corpus.held_out)
        say(began, f"{len(corpus.training) / 1e6:.1f}M training tokens, {held / 1e3:.0f}k held out")
        prompt_files = [] if own else [file for file in files if file.held_out]
        prompts = held_out_prompts(prompt_files, tokenizer, corpus.training)
        say(began, f"{len(prompts)} held-out prompts")
        network = Network(config)
        network.initialise(seed)
        network.to(device)
        steps, spent = pretrain(network, torch.from_numpy(corpus.training).to(device), plan, state, resume)
        say(began, f"pretrained {steps} steps in {spent:.0f} s")
        figures: dict[str, object] = {"seconds": round(spent), "tokens": steps * plan.batch * plan.length}
        figures |= _held_out_figures(network, corpus, plan, began)
        facts = machine() | {
            "pretrain": dataclasses.asdict(plan) | {"steps": steps} | figures,
            "corpus": corpus_facts(corpus),
        }
        save_pretrained(place, network, tokenizer, prompts, facts)
        say(began, f"wrote {out}")


def run_distill(
    base: Path, out: Path | OutFolder, seconds: float | None, corpus_bytes: int = CORPUS_BYTES, seed: int = 0,
    *, plan: Plan = DISTILL,
    blocks: Blocks = BLOCKS, objective: Objective = OBJECTIVE, text: Sequence[Path] = (),
    mask_token_id: int | None = None, name: str | None = None, start: Path | None = None,
    own_text: float = 0.0, state: Path | None = None, resume: bool = False, overwrite: bool = False,
) -> Estimate | None:  # fmt: skip
    """Distil a diffusion view onto the folder `base`, any dense Qwen3; writes an Orthrus folder with model
    card. Returns the estimate on held-out text, None if there is none. Raises InputError.

    seconds: None trains all steps of the plan. text: the user's files and folders instead of the corpus.
    mask_token_id: by default the tokenizer's own, else the first row of the embedding behind its tokens.
    name: what the card calls the base. start: an Orthrus folder whose diffusion weights to start from, in
    place of the base's AR weights. own_text: the share of the base's own greedy continuations in the text, 1:
    all of it. objective: weights by survival are measured on the base's development prompts, else on the
    text's held-out end."""
    began = time.perf_counter()
    plan = dataclasses.replace(plan, seconds=seconds, seed=seed)
    with claimed(out, overwrite, base) as place, in_memory("this training", ADVICE):
        config, tokenizer = base_config(base), load_tokenizer(base)
        plan.check(config.context_length)
        blocks.check(plan.length)
        objective.check()
        check_own_text(own_text, config.context_length)
        check_distillation(config, plan, blocks)
        if start is not None:
            check_start(start, config)
        prompts = dev_prompts(base, tokenizer, config.vocab_size)
        facts_of(base)  # refused before the training if it cannot be read, as the prompts are
        mask = pick_mask(tokenizer, config.vocab_size, mask_token_id)
        config = dataclasses.replace(config, block_size=blocks.size, mask_token_id=mask)
        device = training_device()
        corpus = corpus_for(config, tokenizer, corpus_bytes, text, began)
        tokens = torch.from_numpy(corpus.training)
        Rows(tokens, plan.length, seed)  # refuses a text that is too short before the weights are loaded
        network = load_network(base, config)
        if start is None:
            start_from_ar(network)
        else:
            start_from(network, start)
        network.to(device)
        end = document_end(tokenizer, config)
        tokens, own_share = with_own_text(network, tokens.to(device), own_text, end, seed)
        say(began, f"{own_share:.0%} of the text is the base's own")
        prompts = _on(device, text_prompts(corpus.held_out) if prompts is None else prompts)
        started, kept = None if start is None else str(start.resolve()), dict[str, list[float]]()
        steps, spent = distill(
            network, tokens, plan, blocks, state, resume, started, objective, prompts, kept
        )
        say(began, f"distilled {steps} steps in {spent:.0f} s")
        found = _estimate(network, prompts)
        if found:
            say(began, _estimate_words(found))
        facts = distill_facts(base, corpus, plan, blocks, steps, spent, found)
        facts["distill"] |= dataclasses.asdict(objective) | {"own_text": round(own_share, 3)}
        facts["distill"] |= {name: [round(x, 3) for x in shares] for name, shares in kept.items()}
        facts["distill"] |= {} if start is None else {"started_from": started_from(start)}
        tiny = "pretrain" in facts and (base / HELD_OUT).exists() and not corpus.own and found is not None
        words = card.write_if_whole(facts) if tiny else None
        words = words or card.write_short(facts, name or base.resolve().name)
        save_distilled(base, place, network, facts, words)
        say(began, f"wrote {out}")
        return found


def run_unrepeat(
    base: Path,
    out: Path | OutFolder,
    seconds: float | None,
    corpus_bytes: int = CORPUS_BYTES,
    seed: int = 0,
    *,
    plan: Plan = UNREPEAT,
    own: Continuations = CONTINUATIONS,
    text: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:
    """Train the folder `base`, a plain dense Qwen3, against repeating itself; writes one like it. Raises
    InputError.

    seconds: None trains all steps of the plan. text: the user's files and folders instead of the corpus."""
    began = time.perf_counter()
    plan = dataclasses.replace(plan, seconds=seconds, seed=seed)
    with claimed(out, overwrite, base) as place, in_memory("this training", ADVICE):
        config, tokenizer = base_config(base), load_tokenizer(base)
        plan.check(config.context_length)
        own.check(config.context_length)
        check_pretraining(config, plan)
        prompts, facts = dev_prompts(base, tokenizer, config.vocab_size), facts_of(base)
        device = training_device()
        corpus = corpus_for(config, tokenizer, corpus_bytes, text, began)
        network = load_network(base, config).to(device)
        tokens = torch.from_numpy(corpus.training).to(device)
        steps, spent, share = unrepeat(network, tokens, plan, own)
        say(
            began,
            f"trained {steps} steps in {spent:.0f} s; distinct 8-grams of the last continuations {share:.3f}",
        )
        figures: dict[str, object] = {
            "steps": steps,
            "seconds": round(spent),
            "share_reached": round(share, 3),
        }
        figures |= _held_out_figures(network, corpus, plan, began)
        if prompts is not None:
            new = rollout(network, prompts.to(device), ESTIMATED_TOKENS)[:, prompts.shape[1] :]
            found = distinct_share(new, lengths(new, config.eos_token_ids))
            figures["distinct_8grams_dev"] = round(found, 3)
            say(began, f"dev prompts: distinct 8-grams {found:.3f}")
        said = dataclasses.asdict(plan) | dataclasses.asdict(own) | figures | machine()
        if corpus.own or not facts:
            said["corpus"] = corpus_facts(corpus)
        save_retrained(base, place, network, facts | {"unrepeat": said})
        say(began, f"wrote {out}")


def run_bigram(
    base: Path, out: Path | OutFolder, seconds: float | None, corpus_bytes: int = CORPUS_BYTES,
    seed: int = 0, *, plan: Plan = BIGRAM, blocks: Blocks = BIGRAM_BLOCKS, rank: int = BIGRAM_RANK,
    text: Sequence[Path] = (), own_text: float = 0.0, overwrite: bool = False,
) -> None:  # fmt: skip
    """Learn the bigram correction of the Orthrus folder `base`; writes one like it with the tables. Raises
    InputError.

    seconds: None trains all steps of the plan. text, own_text: as for `run_distill`."""
    began = time.perf_counter()
    plan = dataclasses.replace(plan, seconds=seconds, seed=seed)
    with claimed(out, overwrite, base) as place, in_memory("this training", ADVICE):
        config, tokenizer = Qwen3Config.from_folder(base, checkpoint.tensor_names(base)), load_tokenizer(base)
        if not config.has_diffusion_view:
            raise InputError(
                f"{base} is a plain Qwen3: a bigram correction takes an Orthrus (orthrus distill)"
            )
        plan.check(config.context_length)
        blocks = dataclasses.replace(blocks, size=min(blocks.size, config.block_size))
        blocks.check(plan.length)
        check_distillation(config, plan, blocks)
        if blocks.size < 3:
            raise InputError(
                f"block size is {blocks.size}: the correction begins at a block's second proposal; use 3"
            )
        facts = without_selector(base, facts_of(base))  # refused before the training if it cannot be read
        facts.pop("verify", None)  # measured without these tables
        check_rank(rank, config.vocab_size)
        check_own_text(own_text, config.context_length)
        device = training_device()
        corpus = corpus_for(config, tokenizer, corpus_bytes, text, began)
        network = load_network(base, config).to(device)
        tokens = torch.from_numpy(corpus.training).to(device)
        tokens, own_share = with_own_text(network, tokens, own_text, document_end(tokenizer, config), seed)
        tables, steps, spent = learn_bigram(network, tokens, plan, blocks, rank)
        say(began, f"learnt the correction in {steps} steps, {spent:.0f} s")
        said = dataclasses.asdict(plan) | dataclasses.asdict(blocks) | machine() | {
            "steps": steps, "seconds": round(spent), "rank": rank, "own_text": round(own_share, 3),
            "corpus": corpus_facts(corpus),
        }  # fmt: skip
        facts |= {"bigram": said}
        tiny = not corpus.own and "distill_corpus" not in facts and (base / HELD_OUT).exists()
        save = partial(bigram.save, before=tables["before"], after=tables["after"])
        save_corrected(base, place, save, facts, card.write_if_whole(facts) if tiny else None)
        say(began, f"wrote {out}")


def say(began: float, words: str) -> None:
    """A line of progress on stderr with the seconds since `began`."""
    print(f"[{time.perf_counter() - began:6.1f}] {words}", file=sys.stderr, flush=True)


def corpus_for(
    config: Qwen3Config, tokenizer: Tokenizer, corpus_bytes: int, text: Sequence[Path], began: float
) -> Corpus:
    """The corpus in the tokens of a base. Raises InputError."""
    end = document_end(tokenizer, config)
    corpus = read_corpus(corpus_files(corpus_bytes, text), tokenizer, bool(text), end)
    say(began, f"{len(corpus.training) / 1e6:.1f}M training tokens")
    check_ids(corpus.training, config.vocab_size)
    return corpus


def _held_out_figures(network: Network, corpus: Corpus, plan: Plan, began: float) -> dict[str, object]:
    """The loss on the held-out part, where it is long enough for one."""
    if Rows.count_in(len(corpus.held_out), plan.length) < 1:
        return {}
    held_out = torch.from_numpy(corpus.held_out).to(network.frequencies.device)
    loss = held_out_loss(network, held_out, plan.length)
    say(began, f"held-out loss {loss:.3f} nats a token")
    return {"held_out_loss": round(loss, 4)}


def _on(device: torch.device, prompts: torch.Tensor | None) -> torch.Tensor | None:
    return None if prompts is None else prompts.to(device)


def _estimate(network: Network, prompts: torch.Tensor | None) -> Estimate | None:
    """The estimate on prompts on the network's device, as far as the context allows."""
    if prompts is None:
        return None
    config = network.config
    room = config.context_length - prompts.shape[1] - config.block_size
    return estimate(network, prompts, min(room, ESTIMATED_TOKENS)) if room >= 8 else None


def _estimate_words(found: Estimate) -> str:
    return (
        f"dev prompts: {found.tokens_per_cycle:.3f} tokens/cycle, "
        f"distinct 8-grams {found.distinct_8grams:.3f}, "
        f"agreement {[round(x, 3) for x in found.by_offset[:8]]}"
    )
