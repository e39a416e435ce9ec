"""The embedded checkpoint made again from nothing: all trainings one after another."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from functools import partial
from pathlib import Path

from ..config import Qwen3Config
from ..errors import InputError
from .calibration import TEXTS, run_calibration
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
    LOSS,
    OWN_TEXT,
    PRETRAIN,
    TINY,
    UNREPEAT,
    run_bigram,
    run_distill,
    run_pretrain,
    run_unrepeat,
)
from .selector_fit import Limits
from .selector_run import TOKENS, check_tokens, run_select
from .unlikelihood import Continuations

STAGES = "first", "base", "orthrus", "ranked", "calibrated", "selected"
SELECTION = Limits()


def run_tiny(
    out: Path | OutFolder,
    pretrain_seconds: float,
    unrepeat_seconds: float,
    distill_seconds: float,
    bigram_seconds: float,
    select_seconds: float,
    corpus_bytes: int = CORPUS_BYTES,
    seed: int = 0,
    *,
    config: Qwen3Config = TINY,
    plans: tuple[Plan, Plan, Plan, Plan] = (PRETRAIN, UNREPEAT, DISTILL, BIGRAM),
    own: Continuations = CONTINUATIONS,
    blocks: Blocks = BLOCKS,
    selection: Limits = SELECTION,
    select_tokens: int = TOKENS,
    texts: int = TEXTS,
    overwrite: bool = False,
) -> None:
    """The whole recipe of the embedded checkpoint: the trainings of both views, tables and a selector of
    drafts, held-out prompts, model card. Raises InputError; where only what ranks drafts could not be fitted,
    or was interrupted, the checkpoint is written without it first.

    select_tokens: of own text that the selector is fitted on. texts: at each temperature, of calibrations."""
    limits = pretrain_seconds, unrepeat_seconds, distill_seconds, bigram_seconds
    selection = dataclasses.replace(selection, seconds=select_seconds, seed=seed)
    selection.check()
    for plan, seconds in zip(plans, limits, strict=True):
        dataclasses.replace(plan, seconds=seconds, seed=seed).check(config.context_length)
    with claimed(out, overwrite) as place, tempfile.TemporaryDirectory(prefix="orthrus-") as folder:
        check_tokens(config, select_tokens, "use fewer --select-tokens")  # before all else is trained
        first, base, orthrus, ranked, calibrated, selected = (Path(folder) / name for name in STAGES)
        run_pretrain(first, limits[0], corpus_bytes, seed, plan=plans[0], config=config)
        run_unrepeat(first, base, limits[1], corpus_bytes, seed, plan=plans[1], own=own)
        run_distill(
            base, orthrus, limits[2], corpus_bytes, seed, plan=plans[2], blocks=blocks, objective=LOSS,
            own_text=OWN_TEXT,
        )  # fmt: skip
        run_bigram(
            orthrus, ranked, limits[3], corpus_bytes, seed, plan=plans[3],
            blocks=dataclasses.replace(blocks, size=min(blocks.size, BIGRAM_BLOCKS.size), short=0),
            own_text=OWN_TEXT,
        )  # fmt: skip
        made, failed = ranked, None
        try:
            run_calibration(ranked, calibrated, texts, corpus_bytes, seed)
            made = calibrated
            run_select(calibrated, selected, selection, corpus_bytes, tokens=select_tokens, texts=texts)
            made = selected
        except (InputError, KeyboardInterrupt) as error:
            failed = error
        place.put(partial(shutil.copytree, made, dirs_exist_ok=True))  # the trainings are not lost
        if isinstance(failed, InputError):
            lacks = "selector, which orthrus select can fit"
            if made is ranked:
                lacks = "calibration, which orthrus bigram --calibrate fits, and no selector"
            raise InputError(f"{out} has no {lacks}: {failed}")
        if failed is not None:
            raise failed
