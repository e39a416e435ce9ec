"""`orthrus select`: the selector of an Orthrus, fitted on greedy text that the target writes behind pieces of
a corpus, then calibrated at temperature 0 and above on other such text (calibration.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import bigram, checkpoint, selector
from ..bigram import CALIBRATION, MOST_RANK
from ..config import Qwen3Config
from ..errors import InputError, in_memory
from ..prompts import read_prompts
from ..request import block_rows
from . import card, facts
from .base import HELD_OUT, dev_prompts, load_tokenizer
from .calibration import ABOVE_0, TEXTS, calibrate
from .dataset import Corpus
from .folder import load_network, save_corrected
from .followed import K, Ranked, by_tables
from .held_out import apart
from .loop import Rows
from .memory import check_recording, training_device
from .network import Network
from .out_folder import OutFolder, claimed
from .recipe import CORPUS_BYTES, corpus_for, say
from .rollout import OWN_PROMPT, OWN_TOKENS, texts_at_once
from .selector_fit import DEPTHS, Data, Fitted, Limits, Selector, bytes_of, fit_selector, put_together, record

TOKENS = 10_000_000  # of own text; 0.5 M were too few (embedded checkpoint, 2026-11-28)
RANK = 64  # 32 gave 0.997 of its tokens a cycle of a tree of 63 (embedded checkpoint, 2026-11-30)
WINDOW = 64  # neighbouring tokens of each text that have blocks
HELD_BACK = 20  # one text of so many more tells which step is best, where there are no development prompts
ADVICE = "use fewer --tokens, or a smaller model"


def run_select(
    base: Path, out: Path | OutFolder, limits: Limits, corpus_bytes: int = CORPUS_BYTES, *,
    tokens: int = TOKENS, rank: int = RANK, texts: int = TEXTS, text: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Fit a selector for the Orthrus folder `base`, which has bigram tables, on `tokens` tokens that it
    writes behind pieces of the training part of a corpus, and calibrate it on `texts` more texts at most at
    temperature 0 and as many above, behind the base's development prompts where it has some and no text is
    given. Writes a folder like it with the selector in place of the one it had. The
    best step is that of the base's development prompts, else of own text that is held back. Raises
    InputError."""
    began = time.perf_counter()
    with claimed(out, overwrite, base) as place, in_memory("this training", ADVICE):
        config = Qwen3Config.from_folder(base, checkpoint.tensor_names(base))
        _check(base, config, limits, rank, texts)
        device, said = training_device(), facts.facts_of(base)
        tables = bigram.load(base, config, device, torch.float32)
        if tables is None:
            raise InputError(f"{base} has no bigram tables: orthrus bigram learns them first")
        try:
            selector.stored(base, config, tables)  # the model that calibrates loads it first
        except InputError as error:
            raise InputError(f"{error}. Remove {base / selector.FILE} before it is fitted anew") from None
        check_tokens(config, tokens)
        tokenizer = load_tokenizer(base)
        dev = dev_prompts(base, tokenizer, config.vocab_size)
        held = read_prompts(base / HELD_OUT, 10**6) if (base / HELD_OUT).exists() else []
        corpus = corpus_for(config, tokenizer, corpus_bytes, text, began)
        count = -(-tokens // OWN_TOKENS)
        pieces = _pieces(corpus, [e.ids for e in tokenizer.encode_batch(held)], limits.seed,
                         [texts, count, count // HELD_BACK + 1 if dev is None else 0])  # fmt: skip
        network = load_network(base, config).requires_grad_(False).to(device)
        torch.manual_seed(limits.seed)
        made = Selector(network.model.embed_tokens.weight, tables, rank, config.block_size - 1)
        fitted, blocks = _fit(network, made, by_tables(tables), pieces[1], dev, pieces[2], limits, began)
        found = made.found()
        del network, made
        # A view keeps more of text that it has learnt, and tables and selector have learnt on the corpus.
        behind = pieces[0] if dev is None or text else dev[:texts]
        calibration, dtype = _calibration(base, found, behind, began)
        said.pop("verify", None)  # measured without it
        said["selector"] = facts.machine() | {
            "rank": rank, "tokens": count * OWN_TOKENS, "blocks": blocks, "lr": limits.rate,
            "batch": limits.batch, "seed": limits.seed, "steps": fitted.steps, "best_step": fitted.best,
            "seconds": round(fitted.seconds), "best_by": "own text" if dev is None else "dev prompts",
            "loss_before": [round(x, 4) for x in fitted.before],
            "loss": [round(x, 4) for x in fitted.after], "texts": len(behind), "temperatures": [0.0, ABOVE_0],
            "dtype": dtype, "corpus": facts.corpus_facts(corpus),
        }  # fmt: skip
        tiny = not corpus.own and "distill_corpus" not in said and bool(held)
        save = partial(selector.save, found=found | {CALIBRATION: calibration})
        save_corrected(base, place, save, said, card.write_if_whole(said) if tiny else None)
        say(began, f"wrote {out}")


def check_tokens(config: Qwen3Config, tokens: int, advice: str = ADVICE) -> None:
    """Raises InputError for less than one token of own text, and, with advice, where the data of so many has
    no room."""
    _check_count("tokens", tokens)
    needed = bytes_of(config.hidden_size, K, tokens * WINDOW // OWN_TOKENS)
    check_recording(needed, training_device(), advice)


def _check(base: Path, config: Qwen3Config, limits: Limits, rank: int, texts: int) -> None:
    """Raises InputError for what cannot be done."""
    if not config.has_diffusion_view:
        raise InputError(f"{base} is a plain Qwen3: a selector takes an Orthrus (orthrus distill)")
    block_rows(config, None, "one-pass")
    most = min(MOST_RANK, config.hidden_size)
    if not 1 <= rank <= most:
        raise InputError(f"selector rank is {rank}; 1 to {most} was expected")
    _check_count("texts", texts)
    limits.check()
    wanted = OWN_PROMPT + OWN_TOKENS + config.block_size
    if config.context_length < wanted:
        raise InputError(f"{base} has a context of {config.context_length}: own text takes {wanted}")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} is {value}; 1 or more was expected")


def _pieces(corpus: Corpus, held: list[list[int]], seed: int, counts: Sequence[int]) -> list[Tensor]:
    """Pieces [n, P] of a corpus that share nothing with held-out prompts, in parts of so many. Raises
    InputError where there are fewer."""
    rows, wanted = Rows(torch.from_numpy(corpus.training), OWN_PROMPT, seed), sum(counts)
    taken = min(rows.count, wanted + wanted // 4 + 8)  # held-out prompts share text with few of them
    found = apart(rows.batch(0, taken)[:, :-1], held)
    if len(found) < wanted:
        raise InputError(
            f"{counts[1] * OWN_TOKENS} tokens and {counts[0]} texts take {wanted} pieces of text, and there "
            f"are {len(found)}: give more text (--text, --corpus-mb), or fewer --tokens or --texts"
        )
    return list(found[:wanted].split(list(counts)))


def _fit(
    network: Network, made: Selector, ranked: Ranked, pieces: Tensor, dev: Tensor | None, held_back: Tensor,
    limits: Limits, began: float,
) -> tuple[Fitted, int]:  # fmt: skip
    """Record the data and fit. Returns how that went, and the blocks of each form."""
    data = _recorded(network, pieces, WINDOW, ranked, limits.seed, began)
    if dev is not None:
        say(began, f"texts of {len(dev)} development prompts")
    window = OWN_TOKENS - DEPTHS[0] if dev is not None else WINDOW
    looks = _recorded(network, held_back if dev is None else dev, window, ranked, limits.seed, None)
    say(began, f"{len(data[0].weight)} blocks of each form recorded")
    fitted = fit_selector(
        made, data, looks, limits, lambda step, loss: say(began, f"step {step}: loss {loss:.4f}")
    )
    if fitted.best == 0:
        raise InputError(
            f"none of {fitted.steps} steps was better than the tables alone: use more --tokens or --seconds, "
            "or a smaller --lr"
        )
    words = f"{sum(fitted.before):.4f} -> {sum(fitted.after):.4f}, best at step {fitted.best}"
    say(began, f"fitted {fitted.steps} steps in {fitted.seconds:.0f} s: loss {words}")
    return fitted, len(data[0].weight)


def _recorded(
    network: Network, pieces: Tensor, window: int, ranked: Ranked, seed: int, began: float | None
) -> list[Data]:
    """The data of own text behind pieces. began: of the progress that is told."""
    passes = -(-len(pieces) // texts_at_once(network, pieces.shape[1] + OWN_TOKENS))
    generator, parts = torch.Generator().manual_seed(seed), list[list[Data]]()
    device = network.frequencies.device
    for some in pieces.tensor_split(passes):
        parts.append(record(network, some.to(device), OWN_TOKENS, window, generator, ranked))
        if began is not None:
            written = sum(len(part[0].each) for part in parts) * OWN_TOKENS
            say(began, f"{written / 1e3:.0f}k tokens of own text")
    return put_together(parts)


def _calibration(
    base: Path, found: dict[str, Tensor], pieces: Tensor, began: float
) -> tuple[Tensor, str]:  # fmt: skip
    """The calibration [2, 2, block - 1, 2] of what was found, and the dtype that it was decoded in."""
    from ..qwen3 import Qwen3

    backend = "auto" if torch.cuda.is_available() else "torch"
    model = Qwen3.from_pretrained(base, backend=backend, progress=False)
    tables = bigram.load(base, model.config, model.device, model.dtype)
    assert tables is not None, base
    rounded = {
        name: t.bfloat16() if name in selector.MATRICES else t for name, t in found.items()
    }  # as stored
    model.bigram = selector.joined(tables, rounded, model.embedding)
    dtype: Any = model.dtype
    return calibrate(model, pieces.tolist(), OWN_TOKENS, began), str(dtype).removeprefix("torch.")
