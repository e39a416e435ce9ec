"""CUDA graphs of what a function launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Step = Callable[[], None]  # what the host does between two parts of a cycle


def captured(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The launches of a function as a CUDA graph, whole: an interrupted capture leaves none."""
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool):
        run()
    return graph


def captured_parts(run: Callable[[], Iterator[Step]], pool: Any) -> list[tuple[torch.cuda.CUDAGraph, Step]]:
    """The launches of a function as CUDA graphs, one up to each place where it yields what the host does
    there, and one behind the last; an interrupted capture leaves none."""
    found, steps = list[tuple[torch.cuda.CUDAGraph, Step]](), run()
    while not found or found[-1][1] is not nothing:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool):
            step = next(steps, nothing)
        found.append((graph, step))
    return found


def nothing() -> None:
    """What the host does behind the last part."""


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """`torch.cuda.graph` without garbage collection: what that finds dead may be another graph, and CUDA
    does not permit destroying one during a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        if collects:
            gc.enable()
