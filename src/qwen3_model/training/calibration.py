"""The calibration of draft scores (orthrus_kernels/rerank.py), fitted on texts that the target writes.

Scores are the view's log-probabilities, changed by the bigram tables. The target of a greedy text says its
likeliest token, so they are too modest, at each offset in another measure. Fitted are a factor and a weight
of the rest for each offset, by the likelihood of what the target said there: one of the candidates, or the
rest.

What counts is what a draft meets. A block counts up to where its tree ends: to the offset at which the path
of the text falls below `LEAST_PATH`. Blocks at which cycles begin count whole: they stand behind tokens that
an earlier draft has missed, where drafts are right less often. All other blocks count little (`BESIDE`).
Which they are follows from the calibration itself, so it is fitted a few times."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels import Sampling
from orthrus_kernels.rerank import LEAST_REST, changes
from orthrus_kernels.sampling import correction_scale

from .. import bigram
from ..bigram import CALIBRATION, ONE_PASS, TWO_PASS, Bigram
from ..errors import InputError, in_memory
from ..lattice import Candidates, lattice_of, ranks
from ..prompts import read_prompts
from ..request import block_rows
from . import card
from .base import HELD_OUT, document_end, load_tokenizer
from .dataset import corpus_files, read_corpus
from .facts import corpus_facts, facts_of, machine
from .folder import save_corrected, without_selector
from .held_out import apart
from .loop import Rows
from .memory import ADVICE
from .out_folder import OutFolder, claimed
from .recipe import CORPUS_BYTES, say
from .rollout import OWN_PROMPT, OWN_TOKENS

if TYPE_CHECKING:
    from ..qwen3 import Qwen3

TEXTS = 96  # at each temperature: the promise of 48 scattered by 2 % (embedded checkpoint, 2026-11-29)
ABOVE_0 = 0.8  # the temperature that the set for all temperatures above 0 is fitted at
LEAST_PATH = math.log(0.008)  # about where a tree of 63 nodes ends (embedded checkpoint)
BESIDE = 0.1
ROUNDS = 3
_SMOOTH = 20.0  # nats a squared step of the factors from one offset to the next


@dataclass(frozen=True)
class Blocks:
    """What the view proposed behind each root of a text, and what the target said: N blocks, P offsets.

    logs [N, P, K + 1] fp32: log-probabilities of candidates, then of the rest; change [N, P, K + 1]: what the
    tables add behind the text's own tokens; said [N, P] int64: K is the rest, -1 unknown."""

    logs: Tensor
    change: Tensor
    said: Tensor

    def scores(self, calibration: Tensor) -> Tensor:
        """Log-probabilities [N, P, K + 1] of what may be said, by a calibration [P, 2]."""
        return _scores(self.logs, self.change, calibration)

    def reached(self, calibration: Tensor) -> tuple[Tensor, Tensor]:
        """Which offsets count, [N, P] bool, and the blocks at which cycles begin, [N] bool."""
        step = self.scores(calibration).gather(-1, self.said.clamp(min=0)[..., None])[..., 0]
        right = (self.said >= 0) & (self.said < self.logs.shape[-1] - 1)
        kept = (right & (step.cumsum(1) >= LEAST_PATH)).int().cumprod(1).sum(1)
        runs, begins, at = kept.tolist(), [False] * len(kept), 0
        while at < len(runs):
            begins[at] = True
            at += runs[at] + 1
        offsets = torch.arange(self.said.shape[1], device=kept.device)
        reached = (offsets <= kept[:, None]) & (self.said >= 0)
        return reached, torch.tensor(begins, device=kept.device)


def _scores(logs: Tensor, change: Tensor, calibration: Tensor) -> Tensor:
    """logs, change [..., K + 1]; calibration [..., 2]."""
    factor, weight = calibration.unbind(-1)
    candidates = logs[..., :-1] * factor[..., None] + change[..., :-1]
    rest = logs[..., -1:] * factor[..., None] + weight[..., None]
    return torch.log_softmax(torch.cat([candidates, rest], -1), -1)


def blocks_of(tables: Bigram, lattice: Candidates, text: Tensor, sampling: Sampling, form: int) -> Blocks:
    """Of the lattice of a text [N], as cycles of a form meet it. On the host."""
    scores, ids, gates = lattice.under_roots(form == TWO_PASS)
    scores = scores.clamp(min=-1e4)  # impossible ones stay finite
    said, depth = ranks(ids, text[1:]), ids.shape[1]
    fronts = torch.cat([text, text.new_zeros(depth)]).unfold(0, depth, 1)[: len(ids)]
    places = None if tables.gate is None else tables.gate.places[form, form : form + depth]
    change = changes(fronts[..., None], ids, tables.before, tables.after, gates, places)[:, :, 0]
    change = change * correction_scale(sampling)
    if form == TWO_PASS:
        change[:, 0] = 0  # the block has seen its root
    rest = (1 - scores.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
    change = torch.cat([change, torch.zeros_like(rest)], -1)
    return Blocks(torch.cat([scores, rest], -1).cpu(), change.cpu(), said.cpu())


def fit(texts: Sequence[Blocks]) -> Tensor:
    """The calibration [P, 2] of texts at one temperature. Offsets that no text has reached follow those in
    front of them."""
    offsets = texts[0].said.shape[1]
    found = torch.tensor([1.0, 0.0], device=texts[0].said.device).repeat(offsets, 1)
    for _ in range(ROUNDS):
        parts = []
        for text in texts:
            counts, begins = text.reached(found)
            block, offset = counts.nonzero(as_tuple=True)
            weight = torch.where(begins[block], 1.0, BESIDE)
            parts.append((text.logs[counts], text.change[counts], text.said[counts], offset, weight))
        found = _likeliest(found, *(torch.cat(part) for part in zip(*parts, strict=True)))
    return found


def _likeliest(
    start: Tensor, logs: Tensor, change: Tensor, said: Tensor, offset: Tensor, weight: Tensor
) -> Tensor:
    """The calibration under which M observations [M, ...] are likeliest, smooth over offsets."""
    # the factor as its logarithm: it stays above 0
    free = torch.stack([start[:, 0].log(), start[:, 1]], -1).double().requires_grad_()
    logs, change = logs.double(), change.double()
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        calibration = torch.stack([free[:, 0].exp(), free[:, 1]], -1)
        found = _scores(logs, change, calibration[offset]).gather(-1, said[:, None])[:, 0]
        steps = calibration.diff(dim=0).square()  # offset 0 knows its root: its rest is another one's
        rough = _SMOOTH * (steps[:, 0].sum() + 0.1 * steps[1:, 1].sum())
        total = (rough - (weight * found).sum()) / weight.sum()
        total.backward()
        return total

    optimizer.step(loss)
    return torch.stack([free[:, 0].exp(), free[:, 1]], -1).detach().float()


def calibrate(model: Qwen3, prompts: Sequence[Sequence[int]], tokens: int, began: float) -> Tensor:
    """The calibration [2, block - 1, 2] of a model with tables, of a selector that of both forms of cycles,
    [2, 2, block - 1, 2], by `tokens` tokens that it writes behind each prompt at temperature 0 and at
    ABOVE_0, text i with seed i. Raises InputError."""
    tables, config = model.bigram, model.config
    if tables is None:
        raise InputError("the Orthrus has no bigram tables to calibrate: orthrus bigram learns them first")
    sizes = {TWO_PASS: config.block_size}
    if tables.gate is not None:
        sizes[ONE_PASS] = block_rows(config, None, "one-pass")
    found: dict[int, list[Tensor]] = {form: [] for form in sizes}
    for temperature in (0.0, ABOVE_0):
        texts = {form: list[Blocks]() for form in sizes}
        for i, prompt in enumerate(prompts):
            sampling = Sampling(temperature=temperature, seed=i)
            result = model.generate(
                prompt, "two-pass", tokens, temperature=temperature, seed=i, tree_nodes=63
            ).whole()
            text = torch.tensor(result.token_ids)
            for form, size in sizes.items() if len(text) > 1 else ():
                blocks = lattice_of(model, prompt, text.tolist(), size, sampling)
                texts[form].append(blocks_of(tables, blocks, text.to(model.device), sampling, form))
        if not texts[TWO_PASS]:
            raise InputError("every text ended at once: give more text to calibrate on")
        for form in sizes:
            fitted = fit(texts[form])
            if not fitted.isfinite().all():  # what was never said, or always, has no likeliest weight
                raise InputError(f"{len(texts[form])} texts are too few to calibrate on: use more --texts")
            found[form].append(_by_offset(fitted, form, config.block_size - 1))
        say(began, f"fitted {len(texts[TWO_PASS])} texts at temperature {temperature:g}")
    whole = torch.stack([torch.stack(of_form) for of_form in found.values()])
    return whole[TWO_PASS] if tables.gate is None else whole


def _by_offset(fitted: Tensor, form: int, offsets: int) -> Tensor:
    """A calibration of positions as one of so many offsets: one-pass blocks are shorter, and their first
    proposals are dropped."""
    at = (torch.arange(offsets) - form).clamp(0, len(fitted) - 1)
    return fitted[at]


def run_calibration(
    base: Path, out: Path | OutFolder, texts: int = TEXTS, corpus_bytes: int = CORPUS_BYTES, seed: int = 0,
    *, text: Sequence[Path] = (), overwrite: bool = False,
) -> None:  # fmt: skip
    """Calibrate the drafts of the Orthrus folder `base`, which has bigram tables, on texts that it writes
    behind pieces of the training part of a corpus; writes a folder like it with the calibration in place of
    the one it had. Raises InputError."""
    from ..qwen3 import Qwen3

    began = time.perf_counter()
    if texts < 1:
        raise InputError(f"texts is {texts}; 1 or more was expected")
    with claimed(out, overwrite, base) as place, in_memory("this calibration", ADVICE):
        on_gpu = torch.cuda.is_available()
        model = Qwen3.from_pretrained(base, backend="auto" if on_gpu else "torch", progress=False)
        config = model.config
        if model.text is None or not config.has_diffusion_view:
            raise InputError(f"{base} is no Orthrus with a tokenizer: a calibration takes one")
        model.bigram = bigram.load(base, config, model.device, model.dtype)  # without a selector
        if model.bigram is None:
            raise InputError(f"{base} has no bigram tables to calibrate: orthrus bigram learns them first")
        if config.context_length < OWN_PROMPT + OWN_TOKENS + config.block_size:
            raise InputError(f"{base} has a context of {config.context_length}: too short for its own text")
        facts, tokenizer = without_selector(base, facts_of(base)), load_tokenizer(base)
        corpus = read_corpus(
            corpus_files(corpus_bytes, text), tokenizer, bool(text), document_end(tokenizer, config)
        )
        rows = Rows(torch.from_numpy(corpus.training), OWN_PROMPT, seed)
        held = base / HELD_OUT
        prompts = [model.text.encode(line) for line in read_prompts(held, 10**6)] if held.exists() else []
        pieces = apart(rows.batch(0, min(texts, rows.count))[:, :-1], prompts).tolist()
        calibration = calibrate(model, pieces, OWN_TOKENS, began)
        said = machine() | {
            "texts": len(pieces), "tokens": OWN_TOKENS, "temperatures": [0.0, ABOVE_0], "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."), "corpus": corpus_facts(corpus),
        }  # fmt: skip
        facts["bigram"] = facts.get("bigram", {}) | {CALIBRATION: said}
        facts.pop("verify", None)  # measured without it
        save = partial(bigram.save, before=model.bigram.before, after=model.bigram.after,
                       calibration=calibration)  # fmt: skip
        tiny = not corpus.own and "distill_corpus" not in facts and held.exists()
        save_corrected(base, place, save, facts, card.write_if_whole(facts) if tiny else None)
        say(began, f"wrote {out}")
