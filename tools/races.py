"""Races that racecheck tells of warp-specialised kernels (Gluon), and that are none: the hand-over of parts.

By Triton's lowering of `warp_specialize` the default warps write a word into shared memory that has a byte
for each other warp, which part it takes, and all threads meet at barrier 1. Behind it each of those warps
reads its byte. At the end of the parts all threads meet at barrier 1 again, and only behind that the word is
written anew. So write and read of it are always ordered. compute-sanitizer 2025.3 tells a race there all the
same as soon as a kernel has another barrier besides, also of a CUDA program that does nothing else
(bench/LOG.md, #156).

What an access is, its machine code says; that the word is written anew only behind the end of the parts is
taken from Triton's lowering. A read of the hand-over is `LDS.U8` with barrier 1 of all threads right in
front, the kernel's only one; a write is `STS` at a uniform address with that barrier right behind; and their
addresses are those of one word. A race with any other access is one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

ACCESS = re.compile(r"\b(Read|Write) access at (\w+)\+0x([0-9a-f]+)")
DEFAULT_WARPS, BYTES = 4, 16  # of our Gluon kernels; of the word at most
_CODE = re.compile(r"^\s*(?:/\*([0-9a-f]+)\*/\s+(.*?)\s*;|(\.L\w+):)", re.MULTILINE)
_ALL_THREADS = re.compile(r"BAR\.SYNC\S* 0x1")
_LEAVES = re.compile(r"(?:@!?U?P\d+ )?(?:BAR|BRA|BRX|BSYNC|CALL|EXIT|RET|JMP|WARPSYNC)\b|\.L")
_SHARED = re.compile(r"\b(?:LDS|LDSM|STS|STSM|ATOMS|LDGSTS|LD|ST|ATOM|UTMA\w*|UBLK\w*|[HQI]GMMA|SYNCS)\b")
_ACCESS = {
    "Read": re.compile(r"LDS\.U8 R\d+, \[[\w+]*?(?:\+(0x[0-9a-f]+))?\]"),
    "Write": re.compile(r"STS(?:\.64|\.128)? \[UR\d+(?:\+(0x[0-9a-f]+))?\], R(?:\d+|Z)"),
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

    A kernel may be compiled in several forms. One must have the hand-over at all addresses of the race, and
    none anything else that touches shared memory there."""
    accesses = [(kind, name, int(offset, 16)) for kind, name, offset in ACCESS.findall(race)]
    names = {name for _, name, _ in accesses}
    if len(accesses) != race.count(" access at ") or len(names) != 1:
        return False
    found = list[bool]()
    for cubin in sorted(cubins.rglob(f"{names.pop()}.cubin")):
        code = disassembled(cubin)
        if not code:
            return False
        if all(touches_shared(code, offset) for _, _, offset in accesses):
            words = [(kind, word_at(code, kind, offset)) for kind, _, offset in accesses]
            reads = [o for o, text in code if "LDS" in text and word_at(code, "Read", o) is not None]
            found.append(len(reads) == 1 and one_word(words))
    return bool(found) and all(found)


def one_word(accesses: list[tuple[str, int | None]]) -> bool:
    """Whether these are reads and writes of one hand-over: of each "Read" or "Write", and its `word_at`."""
    places = [place for _, place in accesses]
    if None in places:
        return False
    reads = {place for kind, place in accesses if kind == "Read"}
    writes = [place for kind, place in accesses if kind == "Write"]
    return len(reads) == 1 and bool(writes) and all(0 <= place - min(reads) < BYTES for place in writes)


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


def touches_shared(code: list[tuple[int, str]], offset: int) -> bool:
    """Whether the instruction at `offset` accesses shared memory, or any that may be shared."""
    return any(o == offset and _SHARED.search(text) for o, text in code)


def word_at(code: list[tuple[int, str]], kind: str, offset: int) -> int | None:
    """Where in shared memory the instruction at `offset` has the byte of the first warp that is handed a
    part; None if it is no access of the hand-over. kind: "Read" or "Write"."""
    at = next(i for i, (o, _) in enumerate(code) if o == offset)
    access = _ACCESS[kind].fullmatch(code[at][1])
    way = code[at + 1 :] if kind == "Write" else code[:at][::-1]
    first = next((text for _, text in way if _LEAVES.match(text)), "")
    if access is None or not _ALL_THREADS.fullmatch(first):
        return None
    place = int(access[1] or "0", 16)
    return place + DEFAULT_WARPS if kind == "Read" else place  # a warp reads at its number
