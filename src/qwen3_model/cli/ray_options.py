"""Options of verbs whose engines may run on the machines of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, quoted

if TYPE_CHECKING:
    from ..serve.replicas import Replicas

MOST_REPLICAS = 1024


def add_ray_options(parser: argparse.ArgumentParser, autoscales: bool) -> None:
    """--ray and --replicas. autoscales: whether the number may follow what there is to do."""
    group = parser.add_argument_group("more GPUs and machines (docs/scaling.md)")
    group.add_argument(
        "--ray", action="store_true",
        help="run engines on the Ray cluster of RAY_ADDRESS, else of this machine, else on one that starts "
        "here and ends with the command",
    )  # fmt: skip
    group.add_argument(
        "--replicas", metavar="N|MIN:MAX" if autoscales else "N",
        help="with --ray: engines, each with a GPU of its own (default: 1)"
        + ("; MIN:MAX: as many as texts need" if autoscales else ""),
    )  # fmt: skip


def check(args: argparse.Namespace, autoscales: bool) -> None:
    """Raises InputError for what --ray cannot do, and for what nothing but --ray can."""
    if not args.ray:
        if args.replicas is not None:
            raise InputError("--replicas belongs to --ray: add it, or leave both out")
        return
    if find_spec("ray") is None:
        raise InputError(
            "--ray needs ray, which is not installed: pip install 'orthrus-kernels[cluster]', or make cluster"
        )
    if args.device not in (None, "cpu", "cuda"):
        raise InputError(
            f"--device is {quoted(args.device)}; with --ray cpu or cuda was expected: Ray chooses each GPU"
        )
    _numbers(args.replicas or "1", autoscales)


def _numbers(said: str, autoscales: bool) -> tuple[int, int]:
    """The least and the most of --replicas. Raises InputError."""
    found = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", said, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    wanted = f"1 to {MOST_REPLICAS}" + (", or MIN:MAX," if autoscales else "")
    if not 1 <= least <= most <= MOST_REPLICAS or (":" in said and not autoscales):
        raise InputError(f"--replicas is {quoted(said)}; {wanted} was expected")
    return least, most


def replicas(args: argparse.Namespace, name: str, slots: tuple[int, int], **times: float) -> Replicas:
    """What the options ask for, once they are checked. name: of the application. slots: the defaults on a GPU
    and on a CPU. times: as in Replicas. A folder is the same on all machines; a hub id is downloaded by
    each."""
    from ..serve.messages import EngineOptions
    from ..serve.replicas import Replicas
    from ..settings import pick_device

    device = args.device or pick_device(None).type
    least, most = _numbers(args.replicas or "1", autoscales=True)
    engine = EngineOptions(
        _anywhere(args.model), device, args.dtype, args.backend, args.revision,
        args.slots or slots[device == "cpu"], args.cache_tokens, _anywhere(args.diffusion), args.activations,
    )  # fmt: skip
    return Replicas(re.sub(r"[^\w.-]", "-", name), engine, least, most, **times)


def _anywhere(model: str | None) -> str | None:
    """A checkpoint's name as other machines, with other current folders, know it."""
    folder = None if model is None else Path(os.path.expanduser(model))
    return str(folder.resolve()) if folder is not None and folder.is_dir() else model
