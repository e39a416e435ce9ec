"""How everything here is measured: CUDA graph replays, cold L2, median and spread in microseconds.

A case calls its operation on one copy of its inputs after another; the calls are captured into one CUDA
graph, so no host time is inside. Before each replay a read of a large buffer empties the L2 cache, and each
copy is used once in a replay: weights and caches come from memory, whatever their size. A time is a replay's,
divided by its calls; median, p20 and p80 are over replays. The read roof is what a plain Triton kernel reads
of random numbers on this machine (zeros read faster: they cost less power)."""

from __future__ import annotations

import gc
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels._triton import tl, triton

Call = Callable[[int], Any]  # on copy i of the inputs
NotRun = str  # in a call's place: why a peer is not run
OURS = "ours"  # the name of our call among its peers
GIB = 1 << 30
BURST = 10  # replays one behind another that `time_replays` launches before it waits


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and spread over replays."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """From at least one sample; percentiles between neighbours by linear interpolation."""
        q = torch.quantile(torch.tensor(samples, dtype=torch.float64), torch.tensor([0.5, 0.2, 0.8]).double())
        return Timing(*(round(value, 3) for value in q.tolist()))


class Pool:
    """One large block of random bf16 numbers, handed out in pieces that do not overlap until `reset`.

    Making inputs anew for every case would take longer than measuring it."""

    def __init__(self, device: torch.device, elements: int) -> None:
        self.numbers = torch.empty(elements, dtype=torch.bfloat16, device=device)
        for part in self.numbers.split(1 << 28):
            part.normal_()
        self.used = 0

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    def reset(self) -> None:
        """Hand out everything anew. Cases do not write into what they take, but for key caches."""
        self.used = 0

    def take(self, *shape: int) -> Tensor:
        """The next piece as a contiguous tensor, 256-byte aligned. Raises ValueError when too little is
        left."""
        size = torch.Size(shape).numel()
        if self.used + size > self.numbers.numel():
            raise ValueError(f"the pool has no {size} numbers left for {shape}")
        piece = self.numbers[self.used : self.used + size].view(shape)
        self.used += -(-size // 128) * 128
        return piece

    def copies(self, elements: int) -> int:
        """How many copies of inputs of `elements` to rotate through: 2 GiB of them, 2 to 64, if the pool has
        that many left. Several calls a replay hide what starting it costs."""
        most = (self.numbers.numel() - self.used) // (elements + 1024)  # pieces are aligned
        return max(1, min(64, most, max(2, GIB // max(elements, 1))))


@triton.jit
def _read_kernel(x, y, n, BLOCK: tl.constexpr):
    """Exclusive or of x, int32, by programs that stride through it."""
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.program_id(0), n // BLOCK, tl.num_programs(0)):
        total ^= tl.load(x + tl.cast(i, tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y + tl.program_id(0), tl.xor_sum(total, axis=0))


class Meter:
    """Times calls on one GPU. `seconds`: how long the replays of one call may take, warm-up aside."""

    def __init__(self, pool: Pool, seconds: float = 0.03) -> None:
        self.pool, self.seconds = pool, seconds
        self.sm = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self.read = torch.empty(16 * self.sm, dtype=torch.int32, device=pool.device)
        l2 = torch.cuda.get_device_properties(pool.device).L2_cache_size
        self.flushed = torch.randint(2**31 - 1, (max(l2, 1 << 26),), dtype=torch.int32, device=pool.device)

    def flush(self) -> None:
        """Empty the L2 cache of what cases read: four times its size goes through it."""
        self._read(self.flushed, 8, 4096, 4)

    def _read(self, x: Tensor, programs: int, block: int, warps: int) -> None:
        _read_kernel[(programs * self.sm,)](x=x, y=self.read, n=x.numel(), BLOCK=block, num_warps=warps)

    def time(self, call: Call, copies: int) -> Timing:
        """Time call(0), ..., call(copies - 1). Raises what the call raises."""
        for i in range(min(copies, 2)):  # compiles, makes plans and workspaces
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(copies):
                call(i)
        first = self._replay(graph)
        count = max(5, min(25, int(self.seconds * 1e6 / max(first, 1))))
        return Timing.of([self._replay(graph) / copies for _ in range(count)])

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        """Microseconds of one replay with a cold L2."""
        self.flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000

    def read_roof(self) -> float:
        """GB/s of reading the whole pool once, by the best of three settings."""
        x = self.pool.numbers.view(torch.int32)
        settings = ((8, 4096, 4), (16, 4096, 4), (8, 8192, 8))
        best = min(self.time(lambda i, s=s: self._read(x, *s), 1).median for s in settings)  # type: ignore
        return x.numel() * 4 / best / 1e3

    def matmul_roof(self, size: int = 8192) -> float:
        """TFLOP/s of cuBLAS in bf16 on square matrices."""
        self.pool.reset()
        a, b = (self.pool.take(size, size) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / self.time(lambda i: torch.mm(a, b.t(), out=out), 4).median / 1e6


def replayable(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On a GPU the replay of a call that only launches, captured after it ran once; on a CPU the call."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_replays(replay: Callable[[], Any], seconds: float = 0.4, most: int = 100) -> Timing:
    """Time a long replay as decoding repeats it: one behind another, each between two events.

    The GPU is busy with one while the host launches the next, and the L2 cache holds what the last one left.
    For what takes longer than its launch and reads more than the cache holds."""
    first = min(_burst(replay))
    samples: list[float] = []
    while len(samples) < max(BURST, min(most, int(seconds * 1e6 / max(first, 1)))):
        samples += _burst(replay)
    return Timing.of(samples)


def _burst(replay: Callable[[], Any]) -> list[float]:
    """Microseconds of each of BURST replays behind one that is not timed."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(BURST + 1)]
    replay()
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1000 for a, b in pairwise(events)]


def free_memory() -> None:
    """Give a dropped model's memory back."""
    gc.collect()
    torch.cuda.empty_cache()


def machine(command: str) -> dict[str, str | None]:
    """GPU, driver, versions, commit, date and the command a figure came from."""
    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _said("git", "describe", "--always", "--dirty"),
        "command": command,
    }


def machine_line(facts: dict[str, str | None]) -> str:
    """The machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value)


def _said(*command: str) -> str | None:
    """First line that a command prints, or None."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None
