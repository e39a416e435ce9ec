"""Numbers of the host on their way to a device, without a wait."""

from __future__ import annotations

from torch import Tensor


def put_down(place: Tensor, numbers: Tensor) -> None:
    """Copy numbers of the host into a place on a device, in turn on its stream: launches before the copy do
    not see them, launches behind it do, and the host goes on at once.

    place: any shape and dtype, not contiguous where it is a part of a table; numbers: as `Tensor.copy_`
    takes them, on the CPU."""
    gpu = place.is_cuda
    place.copy_(numbers.pin_memory() if gpu else numbers, non_blocking=gpu)
