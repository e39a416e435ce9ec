"""Races that racecheck tells of warp-specialised kernels (Gluon), and that are none: the hand-over of parts.

Triton's default warps write into shared memory which part each other warp takes, and all threads meet at
barrier 1; behind it the other warps read the word (Triton's lowering of `warp_specialize`). So a write of the
hand-over is a store with barrier 1 of all threads right behind it, and a read of it a load right behind that
barrier. compute-sanitizer 2025.3 tells a race there as soon as a kernel has another barrier besides, also of
a CUDA program that does nothing else (bench/LOG.md, #156).

What an access is, its machine code says. A race with any other access is one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

ACCESS = re.compile(r"\b(Read|Write) access at (\w+)\+0x([0-9a-f]+)")
_CODE = re.compile(r"^\s*(?:/\*([0-9a-f]+)\*/\s+(.*?)\s*;|(\.L\w+):)", re.MULTILINE)
_ALL_THREADS = re.compile(r"BAR\.SYNC\S* 0x1")
_LEAVES = re.compile(r"(?:@!?U?P\d+ )?(?:BAR|BRA|BRX|BSYNC|CALL|EXIT|RET|JMP|WARPSYNC)\b|\.L")
_SHARED = {
    "Read": re.compile(r"\b(?:LDS|LDSM|ATOMS)\b"),
    "Write": re.compile(r"\b(?:STS|STSM|ATOMS|LDGSTS)\b"),
}


def races(said: str) -> list[str]:
    """Each race that racecheck tells, with all its accesses."""
    found = list[str]()
    for line in (line.strip("= ") for line in said.splitlines()):
        if "Race reported between" in line:
            found.append(line)
        elif found and line.startswith("and "):
            found[-1] += " " + line
    return found


def is_hand_over(race: str, cubins: Path) -> bool:
    """Whether all accesses of a race are Triton's hand-over. cubins: a cache folder of Triton's that holds
    what the process compiled, and nothing else.

    A kernel may be compiled in several forms. All of them that touch shared memory at the addresses of the
    race must have the hand-over there, and one at least must."""
    accesses = [(kind, name, int(offset, 16)) for kind, name, offset in ACCESS.findall(race)]
    if len(accesses) != race.count(" access at ") or len({name for _, name, _ in accesses}) != 1:
        return False
    found = list[bool]()
    for cubin in sorted(cubins.rglob(f"{accesses[0][1]}.cubin")):
        code = disassembled(cubin)
        kinds = [access_kind(code, kind, offset) for kind, _, offset in accesses]
        if None not in kinds:
            found.append(all(kinds))
    return bool(found) and all(found)


def disassembled(cubin: Path) -> list[tuple[int, str]]:
    """(offset, instruction) of a kernel in order; a label has offset -1. Nothing without nvdisasm."""
    try:
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return []
    return instructions(sass)


def instructions(sass: str) -> list[tuple[int, str]]:
    return [
        (int(offset, 16), " ".join(text.split())) if offset else (-1, label)
        for offset, text, label in _CODE.findall(sass)
    ]


def access_kind(code: list[tuple[int, str]], kind: str, offset: int) -> bool | None:
    """Whether the instruction at `offset` is an access of the hand-over; None where it does not touch shared
    memory as `kind`, "Read" or "Write", does."""
    at = next((i for i, (o, _) in enumerate(code) if o == offset), None)
    if at is None or not _SHARED[kind].search(code[at][1]):
        return None
    way = code[at + 1 :] if kind == "Write" else code[:at][::-1]
    first = next((text for _, text in way if _LEAVES.match(text)), "")
    return _ALL_THREADS.fullmatch(first) is not None
