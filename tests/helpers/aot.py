"""Compile every kernel ahead of time, for GPUs that are not here, and print one JSON line a compilation.

Run by test_aot.py in a process without TRITON_INTERPRET: `python tests/helpers/aot.py TARGET ...`. The real
launchers run on meta tensors; a recorder in the kernel's place keeps the arguments of the launch and compiles
what Triton would have compiled for them. So a launcher and this file cannot disagree.

Registers and spills of the NVIDIA targets are those that `ptxas -v` reports (cuobjdump: fewer), which Triton
runs and, asked for it, prints."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path

assert not os.environ.get("TRITON_INTERPRET"), "this process compiles"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor  # noqa: E402
from triton.runtime.cache import get_cache_manager  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TARGETS["sm_90 too"] = TARGETS["sm_90"]  # of launches that another one on sm_90 stands for
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
    torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Recorder:
    """Takes a kernel's place: remembers the launches of its launcher."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append(arguments)


@contextmanager
def recorded(module, name: str):
    """Replace the kernel `name` of a module by a Recorder, and all others, which its launcher may launch
    besides, by ones that nobody reads."""
    modules = [m for path, m in sys.modules.items() if path.split(".")[0] == "orthrus_kernels"]
    kernels = [(m, k, v) for m in modules for k, v in vars(m).items() if isinstance(v, triton.JITFunction)]
    try:
        for owner, attribute, kernel in kernels:
            if attribute.endswith("_kernel"):
                setattr(owner, attribute, Recorder(kernel))
        yield getattr(module, name)
    finally:
        for owner, attribute, kernel in kernels:
            setattr(owner, attribute, kernel)


def specialise(kernel, arguments: dict) -> tuple[dict, dict, dict, dict]:
    """(signature, constexprs, attributes, options) that a launch with these arguments compiles."""
    arguments = dict(arguments)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        pinned = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not pinned):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, (TensorDescriptor, GluonDescriptor)):
            kind, tile = _TYPES[value.base.dtype], ",".join(map(str, value.block_shape))
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature[parameter.name], aligned = f"tensordesc<{kind}[{tile}]{layout}>", False
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = "*" + _TYPES[value.dtype], True
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not pinned
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, arguments


def built_for(kernel, arguments: dict, target: GPUTarget):
    """What Triton compiles for a launch, what ptxas said, and the names of the compiled kernel's
    parameters."""
    signature, constants, attributes, options = specialise(kernel, arguments)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constants, attributes)
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    return *built_from(source, target, options), names


def built_from(source: ASTSource, target: GPUTarget, options: dict):
    """What Triton compiles, and what ptxas said."""
    with redirect_stdout(io.StringIO()) as said:
        built = triton.compile(source, target=target, options=options)
    if target.backend != "cuda":
        return built, ""
    log = said.getvalue()  # empty where the kernel lay in Triton's cache
    return built, kept(built, "ptxas.log", lambda: log or assembled(built.asm["ptx"], target))


def kept(built, name: str, make: Callable[[], str]) -> str:
    """What a tool says of a compiled kernel, kept beside the kernel in Triton's cache."""
    entry = get_cache_manager(built.hash)
    path = entry.get_file(name) or entry.put(make(), name)
    return Path(path).read_text()


def assembled(ptx: str, target: GPUTarget) -> str:
    """What `ptxas -v` says."""
    name = re.search(r"\.target (\w+)", ptx).group(1)
    ptxas = _BIN / ("ptxas-blackwell" if target.arch >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def disassembled(cubins: Sequence[bytes]) -> list[str]:
    """The machine code of kernels for sm_90, an instruction a line. All by one run of nvdisasm, which takes a
    quarter of a second to begin: their code one behind another, where addresses and jumps go on."""
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [_BIN / "nvdisasm", "-b", "SM90a", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = iter([line for line in said.splitlines() if re.match(r"\s*/\*[0-9a-f]+\*/", line)])
    found = ["\n".join(islice(lines, len(code) // 16)) for code in codes]  # 16 bytes an instruction
    assert all(found) and next(lines, None) is None, "an instruction a line"
    return found


def machine_code(cubin: bytes) -> bytes:
    """The section of an ELF file that holds its kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + nth * size) for nth in range(count)]
    (code,) = (
        cubin[offset : offset + length]
        for name, offset, length in sections
        if cubin.startswith(b".text.", sections[names][1] + name)
    )
    return code


def registers(log: str) -> int:
    """Registers a thread, as ptxas said."""
    return int(re.search(r"Used (\d+) registers", log).group(1))


def spilled(log: str) -> int:
    """Bytes of spill stores and loads, as ptxas said."""
    return sum(int(b) for b in re.findall(r"(\d+) bytes spill", log))


def compile_for(kernel, arguments: dict, target: GPUTarget) -> dict:
    """Compile a launch; what came out: registers, spills, shared memory, instructions seen."""
    return described(*built_for(kernel, arguments, target)[:2], target)


def described(built, log: str, target: GPUTarget) -> dict:
    """Registers, spills, shared memory and instructions seen of a compiled kernel."""
    report = {"shared": built.metadata.shared, "warps": built.metadata.num_warps}
    if target.backend == "hip":
        text = built.asm["amdgcn"]
        counts = {n: re.search(rf"\.{n}:\s+(\d+)", text) for n in ("vgpr_count", "vgpr_spill_count")}
        return report | {n: int(m.group(1)) for n, m in counts.items() if m}
    ptx = built.asm["ptx"]
    return report | {
        "registers": registers(log),
        "spill_bytes": spilled(log),
        "wgmma": "wgmma.mma_async" in ptx,
        "wgmma_e4m3": bool(re.search(r"wgmma\.mma_async\S+\.f32\.e4m3\.e4m3\b", ptx)),
        "wgmma_from_registers": bool(re.search(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*\{", ptx)),
        "ldmatrix": "ldmatrix" in ptx,
        "mma": "mma.sync" in ptx,
        "fma": "fma.rn.f32" in ptx,
        "fma_bf16x2": "fma.rn.bf16x2" in ptx,
        "conversions": sorted(set(re.findall(r"\bcvt\.r[nz]\S+", ptx))),
        "cp_async_16": "cp.async.cg" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        "loads": len(re.findall(r"\bld\.global(?!\.cg)", ptx)),  # .cg: partials of other programs
        "packed": sorted(set(re.findall(r"packed_element = (\d+)", built.asm["ttgir"]))),
        "before_wait": before_wait(ptx),
    }


def before_wait(ptx: str) -> list[str] | None:
    """Instructions of a kernel that touch global memory before its griddepcontrol.wait; None: no wait."""
    head, found, _ = ptx.partition("griddepcontrol.wait")
    touch = r"\b(?:(?:ld|st|atom|red)\.(?:\w+\.)*?global|prefetch\.global\.L2|cp\.async(?:\.\w+)*)"
    return sorted(set(re.findall(touch, head))) if found else None


def main() -> None:
    import aot_launches

    for name, module, kernel, launch, targets in aot_launches.launches():
        asked = [target for target in targets if target in sys.argv[1:]]
        if not asked:
            continue
        with recorded(module, kernel) as recorder:
            launch()
        (arguments,) = recorder.launches
        for target in asked:
            line = {"kernel": kernel.strip("_"), "case": name, "target": target.removesuffix(" too")}
            try:
                line |= compile_for(recorder.kernel, arguments, TARGETS[target])
            except Exception as error:  # every other compilation still reports
                line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
