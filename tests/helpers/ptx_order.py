"""What compiled code does before `griddepcontrol.wait` (pdl.py): read from PTX, and from SASS beside it."""

from __future__ import annotations

import re

WAIT = "griddepcontrol.wait"
_GLOBAL = re.compile(
    r"(?:ld|st|atom|red)\.(?:\w+\.)*?global|cp\.(?:async|reduce)(?:\.\w+)*|wgmma|prefetch\.global\.L2"
)
_SASS = re.compile(r"\b(?:LDG|STG|LDGSTS|ATOMG?|REDG?|RED|LD|ST|UTMALDG|UTMASTG|UBLKPF|UBLKCP|CCTL)\b[.\w]*")
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"_param_(\d+)\b")


def touches_before_wait(ptx: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """(opcode, names of the parameters its address is made of) of every instruction that touches global
    memory and stands before the wait. names: of the kernel's parameters, in order.

    Raises ValueError unless there is one wait, without a predicate, that no path through the kernel avoids:
    nothing in front of it returns, nor branches to behind it. So what stands before it is what may run before
    it."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    at = [i for i, line in enumerate(lines) if WAIT in line]
    if len(at) != 1 or not lines[at[0]].startswith(WAIT):
        raise ValueError(f"one wait without a predicate expected: {[lines[i] for i in at]}")
    head = lines[: at[0]]
    labels = {line[:-1] for line in head if line.endswith(":")}
    for line in head:
        if re.search(r"\b(?:ret|exit|brx|call)\b", line):
            raise ValueError(f"leaves before the wait: {line}")
        if (jump := re.search(r"\bbra(?:\.uni)?\s+(\$?\w+)", line)) and jump[1] not in labels:
            raise ValueError(f"jumps over the wait: {line}")
    made_of: dict[str, set[str]] = {}
    found = []
    for line in head:
        line = re.sub(r"^@!?%\w+\s+", "", line)
        parameters = {names[int(i)] if int(i) < len(names) else "?" for i in _PARAMETER.findall(line)}
        if touch := _GLOBAL.search(line):
            address = _REGISTER.findall(line[line.index("[") :])
            found.append((touch[0], sorted(parameters.union(*(made_of.get(r, set()) for r in address)))))
        # One target, or several in braces; a loop's second round may write it again, of more.
        left, _, right = line.partition("}" if "{" in line.partition(",")[0] else ",")
        sources = parameters.union(*(made_of.get(r, set()) for r in _REGISTER.findall(right)))
        for target in _REGISTER.findall(left):
            made_of[target] = made_of.get(target, set()) | sources
    return found


def sass_before_wait(sass: str) -> list[str]:
    """Opcodes that touch global memory before the wait (ACQBULK) in disassembled code."""
    head, found, _ = sass.partition("ACQBULK")
    if not found:
        raise ValueError("no ACQBULK")
    return _SASS.findall(head)
