"""The word that a kernel leaves for the host before it stops the GPU by a fault.

A fault ends everything that this process has on the GPU: its next call there fails, with an error that names
no kernel. The word lies in the host's memory, where it can be read all the same."""

from __future__ import annotations

import atexit
import sys

import torch
from torch import Tensor

STOPPED = (
    "linear_gluon stopped the GPU: programs of one tile did not all run within a second. "
    "ORTHRUS_GLUON=off runs Triton's kernels in its place"
)
_words: dict[torch.device, Tensor] = {}


def late_word(device: torch.device) -> Tensor:
    """int32 [1], 0 until a kernel on the device has given up. In pinned memory of the host, which kernels can
    write; made on first use. What is said of it is said at the end of the process too."""
    if device not in _words:
        if not _words:
            atexit.register(_say)
        made = {"pin_memory": True} if device.type == "cuda" else {"device": device}
        _words[device] = torch.zeros(1, dtype=torch.int32, **made)
    return _words[device]


def stopped() -> str:
    """Which kernel stopped the GPU, and what to do; "" where none did."""
    return STOPPED if any(word.device.type == "cpu" and bool(word) for word in _words.values()) else ""


def _say() -> None:
    if stopped():
        print(stopped(), file=sys.stderr)
