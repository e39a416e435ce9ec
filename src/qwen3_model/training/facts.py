"""What `training.json` says of a training: machine, corpus, plan, figures."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..reading import read_json_object
from .agreement import Estimate
from .corpus import Source
from .dataset import Corpus
from .distill import Blocks
from .loop import Plan


def machine() -> dict[str, str]:
    """What a figure was measured with."""
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {"machine": on, "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def facts_of(folder: Path) -> dict[str, Any]:
    """A folder's `training.json`; nothing if it has none. Raises InputError for one that cannot be read."""
    path = folder / "training.json"
    return read_json_object(path) if os.path.lexists(path) else {}


def distill_facts(
    base: Path, corpus: Corpus, plan: Plan, blocks: Blocks, steps: int, spent: float, found: Estimate | None
) -> dict[str, Any]:
    """What `training.json` says: the base's facts if it has any, and those of this training."""
    facts = facts_of(base)
    if not facts or corpus.own:
        facts["distill_corpus"] = corpus_facts(corpus)
    figures: dict[str, object] = {"steps": steps, "seconds": round(spent)}
    if found:
        figures |= {
            "tokens_per_cycle_dev": round(found.tokens_per_cycle, 3),
            "distinct_8grams_dev": round(found.distinct_8grams, 3),
            "agreement_dev": [round(x, 3) for x in found.by_offset],
        }
    said = dataclasses.asdict(plan) | dataclasses.asdict(blocks) | figures | machine()
    if "distill_corpus" not in facts and corpus_facts(corpus) != facts.get("corpus"):
        said["corpus"] = corpus_facts(corpus)  # another machine's packages
    return machine() | facts | {"distill": said}  # the base's facts say where that was trained


def started_from(start: Path) -> object:
    """The facts of the earlier distillation, or where its weights came from."""
    return facts_of(start).get("distill", start.name)


def corpus_facts(corpus: Corpus) -> dict[str, object]:
    """What a corpus was made of, with the licences."""
    return {
        "bytes": sum(file.size for file in corpus.files),
        "training_tokens": len(corpus.training),
        "distributions": _distributions(corpus.files),
    }


def _distributions(files: list[Source]) -> list[dict[str, object]]:
    sizes, licences = Counter[str](), {}
    for file in files:
        sizes[file.distribution] += file.size
        licences[file.distribution] = file.licence
    return [{"name": name, "licence": licences[name], "bytes": size} for name, size in sizes.most_common()]
