"""Which races of racecheck are none: the hand-over of parts to warps, by the machine code of its accesses."""

import subprocess

import pytest

from tools import races

CODE = """
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00f0*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0100*/                   ULEA UR16, UR4, UR16, 0x18 ;
        /*0110*/                   LDS.U8 R2, [R2+UR28+0x2389c] ;
        /*0120*/               @P0 BRA `(.L_x_1) ;
        /*0130*/                   LDS.U8 R3, [R2] ;
        /*0200*/                   BAR.SYNC.DEFER_BLOCKING 0x0, 0x80 ;
        /*0210*/                   LDS R4, [R2] ;
        /*0220*/                   STS [UR24], R2 ;
        /*0230*/                   BAR.SYNC.DEFER_BLOCKING 0x1, 0x80 ;
        /*0240*/                   LDS R5, [R2] ;
        /*0250*/                   STS [UR24], R2 ;
.L_x_2:
        /*0260*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*0270*/                   STS.64 [UR24+0x238a0], R2 ;
        /*0280*/                   STS [UR24+0x238a8], R3 ;
        /*0290*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*02a0*/                   STS [UR24], R2 ;
        /*02b0*/               @P1 BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*02c0*/                   LDS R5, [R2] ;
        /*02d0*/                   STS [UR24], R2 ;
        /*02e0*/                   EXIT ;
"""
READ, WRITE, OTHER = (
    "Read access at _kernel+0x110",
    "Write access at _kernel+0x270",
    "Write access at _kernel+0x220",
)


def race(*accesses):
    first, *more = accesses
    lines = [f"========= Error: Race reported between {first} in a.py:7"]
    return "\n".join([*lines, *(f"=========     and {access} in a.py:51 [87 hazards]" for access in more)])


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A cache folder of so many forms of `_kernel`, whose code is what is in the file."""

    def compiled(*codes):
        for i, code in enumerate(codes):
            (tmp_path / str(i)).mkdir()
            (tmp_path / str(i) / "_kernel.cubin").write_text(code)
        return tmp_path

    monkeypatch.setattr(races, "disassembled", lambda cubin: races.instructions(cubin.read_text()))
    return compiled


def test_accesses_of_the_hand_over():
    """Behind barrier 1 of all threads, or in front of it, and nothing that leaves the way in between."""
    code = races.instructions(CODE)
    reads = {offset: races.access_kind(code, "Read", offset) for offset, text in code if "LDS" in text}
    assert reads == {0x110: True, 0x130: False, 0x210: False, 0x240: False, 0x2C0: False}
    writes = {offset: races.access_kind(code, "Write", offset) for offset, text in code if "STS" in text}
    assert writes == {
        0x220: False, 0x250: False, 0x270: True, 0x280: True, 0x2A0: False, 0x2D0: False
    }  # fmt: skip
    assert races.access_kind(code, "Read", 0x270) is None is races.access_kind(code, "Write", 0x118)


@pytest.mark.parametrize(
    "accesses, none",
    [
        ((READ, WRITE), True),
        ((READ, WRITE, "Write access at _kernel+0x280"), True),
        ((READ, OTHER), False),
        ((READ, WRITE, OTHER), False),
        (("Read access at _kernel+0x130", WRITE), False),
        ((READ, "Write access at _other+0x270"), False),
        ((READ, "Write access at 0x270"), False),
        ((READ, "Write access at _kernel+0x110"), False),
        (("Write access at _other+0x270", "Write access at _other+0x270"), False),
    ],
)
def test_a_race_is_none_if_all_its_accesses_are_the_hand_over(compiled, accesses, none):
    (told,) = races.races(race(*accesses))
    assert races.is_hand_over(told, compiled(CODE)) == none


def test_every_form_of_a_kernel_counts(compiled):
    """That touches shared memory at both addresses."""
    (told,) = races.races(race(READ, WRITE))
    elsewhere = CODE.replace("STS.64", "MOV")
    assert races.is_hand_over(told, compiled(CODE, elsewhere))


def test_no_form_that_touches_shared_memory_there(compiled):
    (told,) = races.races(race(READ, WRITE))
    assert not races.is_hand_over(told, compiled(CODE.replace("STS.64", "MOV")))


def test_a_form_with_another_access_there_is_no_hand_over(compiled):
    (told,) = races.races(race(READ, WRITE))
    assert not races.is_hand_over(
        told, compiled(CODE, CODE.replace("0x1 ;\n        /*0100*/", "0x0 ;\n        /*0100*/"))
    )


def test_without_machine_code_a_race_stays_one(tmp_path, monkeypatch):
    def missing(*command, **options):
        raise FileNotFoundError("nvdisasm")

    (told,) = races.races(race(READ, WRITE))
    assert not races.is_hand_over(told, tmp_path)
    (tmp_path / "_kernel.cubin").write_text("no cubin")
    assert not races.is_hand_over(told, tmp_path)
    monkeypatch.setattr(subprocess, "run", missing)
    assert not races.is_hand_over(told, tmp_path)
