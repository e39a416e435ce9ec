"""Where and how a model runs: device, dtype and backend, with the defaults."""

from __future__ import annotations

import os

import torch

from orthrus_kernels import gluon_is_on, triton_runs_on
from orthrus_kernels.tables import device_key

from .errors import InputError, quoted

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("auto", "reference", "triton", "torch")
FP8 = "fp8"  # activations in 8 bits
# On a CPU, models up to this hidden size run on one thread unless OMP_NUM_THREADS says otherwise: their
# matrices gain little from a second one, and on a busy machine torch's threads wait for each other (the demo
# took 34 s on one thread and 456 s on two, beside other work on 2 cores, 2026-11-25).
ONE_THREAD_HIDDEN = 512


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or CUDA if there, else the CPU. Raises InputError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"unknown device {quoted(device)}: use cpu, cuda or cuda:N") from None
    if picked.type not in ("cpu", "cuda", "meta"):
        raise InputError(f"device {picked} is not supported: use cpu, cuda or cuda:N")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(
            f"device {picked} is not there ({found} CUDA device(s) found): use --device cpu, or leave it out"
        )
    return picked


def pick_dtype(
    dtype: str | torch.dtype | None, device: torch.device, stored: str, backend: str, quantised: bool
) -> torch.dtype:
    """The dtype asked for, else the checkpoint's on CUDA and fp32 on a CPU. Raises InputError for another
    one.

    Rows that quantised weights multiply are bf16, whatever the checkpoint says: in it their codes are exact.
    The twins take any dtype. backend: a resolved one."""
    only_bf16 = quantised and backend == "triton"
    if dtype is None and quantised:
        stored = "bfloat16"
    if dtype is None:
        dtype = "float32" if device.type == "cpu" and not only_bf16 else stored
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {name} is not supported: use {', '.join(DTYPES)}")
    if only_bf16 and name != "bfloat16":
        raise InputError(
            f"dtype {name} is not supported with quantised weights on backend triton: use bfloat16, or "
            "--backend reference"
        )
    return DTYPES[name]


def pick_backend(backend: str, device: torch.device) -> str:
    """Resolve "auto". Raises InputError for a backend that is unknown or cannot run on the device, and where
    ORTHRUS_GLUON is neither on nor off."""
    try:
        gluon_is_on()
    except ValueError as error:
        raise InputError(error) from None
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {quoted(backend)}: use {', '.join(BACKENDS)}")
    can = triton_runs_on(device)
    if backend == "triton" and not can:
        raise InputError(
            f"backend triton cannot run on {device} here: it takes a CUDA device and the package triton; use "
            "--backend reference"
        )
    chosen = backend
    if backend == "auto":
        chosen = "triton" if can and device.type == "cuda" else "reference"
    if (
        chosen == "triton"
        and device.type == "cuda"
        and device.index not in (None, torch.cuda.current_device())
    ):
        raise InputError(
            f"backend triton runs on the current CUDA device, not on {device}: choose it with "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    return chosen


def pick_activations(activations: str | None, device: torch.device, backend: str) -> str | None:
    """What the rows between linears become before they are multiplied: FP8; None: nothing else. Raises
    InputError for any other, and where they cannot. backend: a resolved one.

    On a GPU the instruction decides the bits of a sum of 8-bit products, and Hopper's alone is pinned."""
    if activations is None:
        return None
    if activations != FP8:
        raise InputError(f"activations {quoted(activations)} are not supported: use {FP8}, or leave them out")
    if backend == "torch":
        raise InputError(f"activations {FP8} are not for backend torch: use --backend triton or reference")
    if backend == "triton" and device.type == "cuda" and device_key(device) != "sm_90":
        raise InputError(
            f"activations {FP8} on backend triton are for GPUs of type sm_90 (H100, H200), and {device} is "
            f"{device_key(device)}: leave them out, or use --backend reference"
        )
    return activations


def pick_threads(device: torch.device, hidden_size: int) -> None:
    """Let this process run a small model of a CPU on one thread, unless OMP_NUM_THREADS is set."""
    if device.type == "cpu" and hidden_size <= ONE_THREAD_HIDDEN and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
