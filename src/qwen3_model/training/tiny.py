"""The embedded checkpoint made again from nothing: all trainings one after another."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from ..config import Qwen3Config
from .distill import Blocks
from .loop import Plan
from .out_folder import OutFolder, claimed
from .recipe import (
    BIGRAM,
    BIGRAM_BLOCKS,
    BLOCKS,
    CONTINUATIONS,
    CORPUS_BYTES,
    DISTILL,
    OWN_TEXT,
    PRETRAIN,
    TINY,
    UNREPEAT,
    run_bigram,
    run_distill,
    run_pretrain,
    run_unrepeat,
)
from .unlikelihood import Continuations


def run_tiny(
    out: Path | OutFolder,
    pretrain_seconds: float,
    unrepeat_seconds: float,
    distill_seconds: float,
    bigram_seconds: float,
    corpus_bytes: int = CORPUS_BYTES,
    seed: int = 0,
    *,
    config: Qwen3Config = TINY,
    plans: tuple[Plan, Plan, Plan, Plan] = (PRETRAIN, UNREPEAT, DISTILL, BIGRAM),
    own: Continuations = CONTINUATIONS,
    blocks: Blocks = BLOCKS,
    overwrite: bool = False,
) -> None:
    """The whole recipe of the embedded checkpoint: the trainings of both views, held-out prompts, model card.
    Raises InputError.
    """
    limits = pretrain_seconds, unrepeat_seconds, distill_seconds, bigram_seconds
    for plan, seconds in zip(plans, limits, strict=True):
        dataclasses.replace(plan, seconds=seconds, seed=seed).check(config.context_length)
    with claimed(out, overwrite) as place, tempfile.TemporaryDirectory(prefix="orthrus-") as folder:
        first, base, orthrus = (Path(folder) / name for name in ("first", "base", "orthrus"))
        run_pretrain(first, limits[0], corpus_bytes, seed, plan=plans[0], config=config)
        run_unrepeat(first, base, limits[1], corpus_bytes, seed, plan=plans[1], own=own)
        run_distill(
            base, orthrus, limits[2], corpus_bytes, seed, plan=plans[2], blocks=blocks, own_text=OWN_TEXT
        )
        run_bigram(
            orthrus, place, limits[3], corpus_bytes, seed, plan=plans[3],
            blocks=dataclasses.replace(blocks, size=min(blocks.size, BIGRAM_BLOCKS.size), short=0),
            own_text=OWN_TEXT,
        )  # fmt: skip
