"""Kernels in Gluon without a GPU: their source runs over torch, a thread for each group of warps.

Triton has no interpreter for Gluon. Here a kernel's own source is loaded once more with names of this file
in place of Gluon's. What it shows: indices, masks, the order of blocks, and the protocol between warps.
Memory that a copy is under way to holds NaN; copies by TMA come late; products asked for read shared memory
when they are waited for, as late as they may. A wait that never ends raises. What it does not show: layouts,
races within a group of warps, and bits.

Pointers are addresses, int64: the number of a tensor, and a place in it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import orthrus_kernels

ATTENTION = "attention_gluon_copy", "attention_gluon_kernels"  # its own sources, the kernel's last
WIDE = "gluon_ring", "gluon_sums", "linear_gluon_wide"
PLACES = 1 << 40  # of one tensor
PATIENCE = 10.0  # seconds
_here = threading.local()  # products that a thread has asked for, and its copies
_memory: list[torch.Tensor] = []
_program = [0, 1]  # the one that runs, of how many


def address(tensor: torch.Tensor) -> torch.Tensor:
    """Where a tensor begins."""
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    _memory.append(flat)
    return torch.tensor((len(_memory) - 1) * PLACES + tensor.storage_offset())


def load(pointer, mask=None, other=0.0, **_):
    """Raises AssertionError outside of a tensor."""
    pointer = (
        pointer if mask is None else pointer + torch.zeros_like(torch.as_tensor(mask), dtype=torch.int64)
    )
    mask = torch.ones_like(pointer, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    mask = mask.broadcast_to(pointer.shape)
    numbers = (pointer[mask] // PLACES).unique().tolist()
    found = torch.full(pointer.shape, other, dtype=_memory[numbers[0]].dtype if numbers else torch.int32)
    for number in numbers:
        here = mask & (pointer // PLACES == number)
        places = pointer[here] % PLACES
        assert places.max() < len(_memory[number]), "what is read lies behind a tensor"
        found[here] = _memory[number][places]
    return found


def store(pointer, value, mask=None):
    mask = torch.ones_like(pointer, dtype=torch.bool) if mask is None else mask.broadcast_to(pointer.shape)
    value = torch.as_tensor(value).broadcast_to(pointer.shape)
    for number in (pointer[mask] // PLACES).unique().tolist():
        _memory[number][pointer[mask] % PLACES] = value[mask].to(_memory[number].dtype)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.shape = data, data.shape

    def index(self, i):
        return Shared(self.data[int(i)])

    def permute(self, order):
        return Shared(self.data.permute(order))

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)


class Barrier:
    """An mbarrier: a phase ends when so many have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.left = self.bytes = self.phase = 0

    def arrive(self, count: int, expected: int = 0, came: int = 0) -> None:
        with self.changed:
            self.left -= count
            self.bytes += expected - came
            assert self.left >= 0, "more arrivals than the barrier was made for"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase ^ 1
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != phase, PATIENCE):
                raise AssertionError("a wait that does not end")


class Barriers(list):
    def index(self, i):  # type: ignore[override]
        return self[int(i)]


def _one(barrier) -> Barrier:
    return barrier[0] if isinstance(barrier, Barriers) else barrier


def init(barrier, count):
    _one(barrier).count = _one(barrier).left = count


def wait(barrier, phase, pred=True):
    if pred:
        _one(barrier).wait(int(phase))


def allocate_shared_memory(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def tma_copy(described, place, barrier, target):
    """A block of a tensor; zeros outside of it. It comes a little later, from another thread."""
    target.data.fill_(float("nan"))
    base, place = described.base, [int(at) for at in place]

    def come() -> None:
        time.sleep(0.0005 * (place[0] % 3))
        whole = base.as_strided(described.shape, described.strides, base.storage_offset())
        part = whole[tuple(slice(at, at + n) for at, n in zip(place, described.block_shape, strict=True))]
        target.data.zero_()
        target.data[tuple(slice(0, n) for n in part.shape)] = part
        barrier.arrive(0, came=target.data.numel() * target.data.element_size())

    threading.Thread(target=come, daemon=True).start()


def plain_copy(target, pointer, mask=None):
    target.data.fill_(float("nan"))
    _here.copies.append((target, pointer, mask))


def come_in() -> None:
    for target, pointer, mask in _here.copies:
        target.data.copy_(load(pointer, mask))
    _here.copies.clear()


class Sums(torch.Tensor):
    """A block that Gluon's `split` takes apart."""

    def split(self):  # type: ignore[override]
        return self[..., 0], self[..., 1]


class Product:
    """One that is asked for."""

    def __init__(self, a, b, acc) -> None:
        self.a, self.b, self.acc, self.value = a, b, acc, None

    def run(self) -> None:
        a = self.a.data if isinstance(self.a, Shared) else self.a
        self.value = (a.float() @ self.b.data.float() + _value(self.acc)).as_subclass(Sums)


def _value(of):
    return of.value if isinstance(of, Product) else of


def multiply(a, b, acc, use_acc=True, is_async=False):
    _here.products.append(Product(a, b, acc if use_acc else 0.0))
    return _here.products[-1]


def multiply_wait(outstanding, deps):
    while len(_here.products) > outstanding:
        _here.products.pop(0).run()
    done = [of if _value(of) is None else _value(of) for of in deps]
    return done[0] if len(done) == 1 else done


def warp_specialize(parts, warps, registers):
    failed: list[BaseException] = []

    def run(function, arguments):
        _here.products, _here.copies = [], []
        try:
            function(*arguments)
            assert not _here.products and not _here.copies, "asked for and not waited for"
        except BaseException as error:  # of any thread, for the caller
            failed.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _where(condition, a, b):
    return torch.where(torch.as_tensor(condition), a, b)


def _both(op: Callable) -> Callable:
    return lambda a, b: op(torch.as_tensor(a), torch.as_tensor(b))


def _jit(function=None, **_):
    return (lambda inner: inner) if function is None else function


def _layout(*_, **__) -> None:
    return None


def _silu_times(gate, up, dtype):
    """As swiglu.py, whose sigmoid is Triton's."""
    return ((gate * gate.sigmoid()).to(dtype).float() * up).to(dtype)


def _in_gluon(function):
    return _silu_times if function.fn.__name__ == "silu_times" else function.fn


def gluon_names() -> ModuleType:
    """In place of `orthrus_kernels._gluon`."""
    layouts = (
        "NVMMASharedLayout",
        "SwizzledSharedLayout",
        "BlockedLayout",
        "SliceLayout",
        "DotOperandLayout",
    )
    gl = SimpleNamespace(
        constexpr=lambda value: value, tensor=object, shared_memory_descriptor=object, load=load, store=store,
        where=_where, maximum=_both(torch.maximum), minimum=_both(torch.minimum), exp2=torch.exp2,
        fma=lambda a, b, c: a * b + c, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        div_rn=lambda a, b: a / b, cdiv=lambda a, b: -(-a // b), static_range=range,
        arange=lambda first, last, layout: torch.arange(first, last),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        convert_layout=lambda value, layout: value, program_id=lambda axis: torch.tensor(_program[0]),
        num_programs=lambda axis: _program[1], to_tensor=torch.tensor, static_assert=lambda held: None,
        int32=torch.int32, int64=torch.int64, float32=torch.float32, bfloat16=torch.bfloat16,
        allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
        NVMMADistributedLayout=_layout, **dict.fromkeys(layouts, _layout),
    )  # fmt: skip
    names = ModuleType("orthrus_kernels._gluon")
    vars(names).update(
        gl=gl, gluon=SimpleNamespace(jit=_jit), constexpr_function=_jit, aggregate=_jit,
        in_gluon=_in_gluon, barrier=lambda: None, fence_async_shared=lambda: None,
        mbarrier=SimpleNamespace(
            MBarrierLayout=_layout, init=init, wait=wait,
            arrive=lambda barrier, count=1, pred=True: _one(barrier).arrive(count if pred else 0),
            expect=lambda barrier, size: _one(barrier).arrive(1, expected=size),
        ),
        tma=SimpleNamespace(tensor_descriptor=object, async_copy_global_to_shared=tma_copy),
        async_copy=SimpleNamespace(
            async_copy_global_to_shared=plain_copy, commit_group=lambda: None,
            wait_group=lambda outstanding: come_in(),
            mbarrier_arrive=lambda barrier, increment_count: (come_in(), _one(barrier).arrive(128)),
        ),
        warpgroup_mma=multiply, warpgroup_mma_wait=multiply_wait,
    )  # fmt: skip
    return names


@contextmanager
def _in_place(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def loaded(sources: Sequence[str]) -> ModuleType:
    """The module of a kernel, the last one of its sources, over torch."""
    modules = {"orthrus_kernels._gluon": gluon_names()}
    for source in sources:
        name, path = f"orthrus_kernels.{source}", Path(orthrus_kernels.__file__).with_name(f"{source}.py")
        spec = util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        modules[name] = util.module_from_spec(spec)
        with _in_place(modules):
            spec.loader.exec_module(modules[name])
        for constant, value in vars(modules[name]).items():  # those of layout.py are Triton's
            if constant.startswith("TILE_") and hasattr(value, "value"):
                setattr(modules[name], constant, int(value.value))
    return modules[name]


class Threads:
    """Stands for a kernel; programs run one after another."""

    def __init__(self, name: str, sources: Sequence[str]) -> None:
        self.kernel = getattr(loaded(sources), name)
        self.programs = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*, num_warps: int, enable_fp_fusion: bool = False, **arguments: Any) -> None:
            _memory.clear()
            given = {name: address(a) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
            _program[1] = grid[0]
            for _program[0] in range(grid[0]):
                self.kernel(**given)
            self.programs = grid[0]

        return launch
