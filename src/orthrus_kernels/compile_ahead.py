"""Kernels compiled ahead of their launches, in processes side by side.

Triton compiles a kernel where it is first launched with arguments of a new kind, and so one kernel after
another. Here launches are **recorded** first: none of them runs, and nothing is compiled. What Triton's cache
on disk lacks of them is then compiled by processes, which put it there; a launch finds it. An entry of a
recording is a line of JSON: what Triton's own `JITFunction.preload` takes, the key of the kernel's source,
and the GPU. Processes build from it what `preload` builds, and touch no GPU.

Triton (3.6, 3.7.1) gives a kernel another key, and its code another place on disk, where a function that the
kernel calls got its key first. So all keys are asked for here in one order, before anything is launched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from threading import Thread, get_ident
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._triton import triton

_recording: set[int] = set()  # threads whose launches are recorded
_FRESH = {torch.empty, torch.empty_like, Tensor.new_empty}
_WORKER = f"from {__name__} import main; main()"


class _Zeros(TorchFunctionMode):
    """Fresh memory is zeros: what a recorded launch does not write may be taken for indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in _FRESH else made


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Launches of this thread inside do not run. The set takes an entry of each that this process would have
    to compile, or to read from Triton's cache on disk."""
    from triton.runtime.jit import JITFunction

    found: set[str] = set()
    _settle_keys()
    launch, hook = JITFunction.run, triton.knobs.runtime.jit_cache_hook
    target = vars(triton.runtime.driver.active.get_current_target())
    thread = get_ident()

    def note(**told: Any) -> bool:
        if get_ident() != thread:
            return False if hook is None else hook(**told)
        more = json.dumps({"source": told["fn"].jit_function.cache_key, "target": target})
        found.add(told["compile"]["specialization_data"][:-1] + ", " + more[1:])
        return True  # Triton does not compile it

    def without_running(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        warmup = warmup or get_ident() == thread
        return launch(kernel, *arguments, grid=grid, warmup=warmup, **named)

    try:
        _recording.add(thread)
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = without_running, note
        with _Zeros():
            yield found
    finally:
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = launch, hook
        _recording.discard(thread)


def is_recorded() -> bool:
    """Whether launches of this thread do not run now."""
    return get_ident() in _recording


def _settle_keys() -> None:
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] == __package__:
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    kernel.cache_key  # noqa: B018  a property that keeps what it has computed


def missing(entries: Collection[str]) -> list[str]:
    """The entries that Triton's cache on disk does not hold, those with most to compile first, as far as that
    shows."""
    return sorted((entry for entry in entries if not _on_disk(entry)), key=lambda entry: (-len(entry), entry))


def compile_all(
    entries: Collection[str], advance: Callable[[], object], processes: int | None = None
) -> None:
    """Compile entries into Triton's cache on disk, and call `advance` behind each, from several threads.

    processes: None: one a core that this process may use, no more than entries. What cannot be compiled is
    left out: its launch says what is wrong."""
    left = deque(entries)

    def feed(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None and worker.stdout is not None
        with suppress(IndexError, OSError, ValueError):  # nothing is left; the process has died, or was ended
            while True:
                worker.stdin.write(left.popleft() + "\n")
                worker.stdin.flush()
                if not worker.stdout.readline():
                    return
                advance()

    with ExitStack() as stack:
        count = min(processes or len(os.sched_getaffinity(0)), len(entries))
        workers = [_worker() for _ in range(count)]
        for worker in workers:  # also behind Ctrl-C
            stack.callback(_end, worker)
        threads = [Thread(target=feed, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _worker() -> subprocess.Popen[str]:
    """A process that compiles: an entry a line in, an empty line out when it is done. It is no child of
    `multiprocessing`, which would run the caller's script again."""
    told = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": triton.knobs.cache.dir, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER], env=os.environ | told, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _end(worker: subprocess.Popen[str]) -> None:
    """End a process, also one that has died and left what it was told unread."""
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        with suppress(OSError):
            assert pipe is not None
            pipe.close()
    worker.wait()


def main() -> None:
    """What a process of `compile_all` does until its input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers may print
    for line in sys.stdin:
        with suppress(Exception):
            source, target, options = _told(line)
            _compile_launcher(triton.compile(source, target=target, options=options))
        print(file=out, flush=True)


def _compile_launcher(built: Any) -> None:
    """The C code that launches a kernel: up to Triton 3.6 each signature has its own, compiled when it is
    first used as well."""
    if built.metadata.target.backend == "cuda":
        driver = import_module("triton.backends.nvidia.driver")
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(built.src, built.metadata)


def _told(entry: str) -> tuple[Any, Any, dict[str, Any]]:
    """(source, target, options) of an entry, as `triton.compile` takes them. Its kernel's constants are
    numbers, words and None."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    told = json.loads(entry)
    module, _, name = told["name"].rpartition(".")
    kernel = getattr(import_module(module), name)
    kernel.hash = told["source"]  # its `cache_key` from now on
    constants = dict(zip(map(tuple, told["constant_keys"]), told["constant_vals"], strict=True))
    attributes = dict(zip(map(tuple, told["attrs_keys"]), told["attrs_vals"], strict=True))
    options = {key: tuple(x) if isinstance(x, list) else x for key, x in told["options"].items()}
    kind: Any = ASTSource
    if kernel.is_gluon():
        kind = import_module("triton.experimental.gluon._runtime").GluonASTSource
    source = kind(kernel, told["signature"], constants, attributes)
    return source, GPUTarget(**told["target"]), options


def _on_disk(entry: str) -> bool:
    """Whether Triton's cache holds an entry, under the key that `triton.compile` gives it."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key, get_cache_manager

    source, target, options = _told(entry)
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    name = f"{source.name[:150]}.json"
    return name in (get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name) or {})
