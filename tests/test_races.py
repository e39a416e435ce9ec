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
        /*0288*/                   STS.128 [UR24+0x238d0], R4 ;
        /*0290*/                   BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*02a0*/                   STS [UR24], R2 ;
        /*02b0*/               @P1 BAR.SYNC.DEFER_BLOCKING 0x1 ;
        /*02c0*/                   LDS R5, [R2] ;
        /*02d0*/                   STS [UR24], R2 ;
        /*02e0*/                   EXIT ;
"""
READ, WRITE, OTHER = (
    "Read access at _kernel+0x110", "Write access at _kernel+0x270", "Write access at _kernel+0x220"
)  # fmt: skip


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
    """Right behind barrier 1 of all threads, or in front of it, and of one word."""
    code = races.instructions(CODE)
    reads = {offset: races.word_at(code, "Read", offset) for offset, text in code if "LDS" in text}
    assert {offset for offset, place in reads.items() if place is not None} == {0x110}
    writes = {offset: races.word_at(code, "Write", offset) for offset, text in code if "STS" in text}
    assert {offset for offset, place in writes.items() if place is not None} == {0x270, 0x280, 0x288}
    assert reads[0x110] == writes[0x270] == writes[0x280] - 8 == 0x238A0, "the byte of warp 4 is the first"
    assert races.word_at(code, "Read", 0x270) is None is races.word_at(code, "Write", 0x110)
    assert [races.touches_shared(code, offset) for offset in (0x110, 0x270, 0x100, 0x260, 1)] == [
        True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "read, write",
    [
        ("LDS.U8 R2", "STSM.16.M88.4 [UR24+0x238a0]"), ("LDS.U8 R2", "ATOMS.ADD [UR24+0x238a0]"),
        ("LDS.U16 R2", "STS.64 [UR24+0x238a0]"), ("LDSM.16.M88 R2", "STS.64 [UR24+0x238a0]"),
        ("LDS R2", "STS.64 [UR24+0x238a0]"), ("LDS.U8 R2", "@P0 STS.64 [UR24+0x238a0]"),
        ("LDS.U8 R2", "STS.64 [UR24+0x2389f]"), ("LDS.U8 R2", "STS.64 [UR24+0x238b0]"),
        ("LDS.U8 R2", "STS.64 [UR24]"), ("LDS.U8 R2", "STS.64 [UR24+-0x238a0]"),
        ("LDS.U8 R2", "STS.64 [R24+0x238a0]"),
    ],
)  # fmt: skip
def test_other_instructions_and_other_places_are_no_hand_over(compiled, read, write):
    (told,) = races.races(race(READ, WRITE))
    other = CODE.replace("LDS.U8 R2", read, 1).replace("STS.64 [UR24+0x238a0]", write)
    assert other != CODE and not races.is_hand_over(told, compiled(other))


@pytest.mark.parametrize(
    "accesses, none",
    [
        ((READ, WRITE), True),
        ((READ, WRITE, "Write access at _kernel+0x280"), True),
        ((READ, OTHER), False),
        ((READ, WRITE, "Write access at _kernel+0x288"), False),
        ((READ, WRITE, OTHER), False),
        (("Read access at _kernel+0x130", WRITE), False),
        ((READ, "Write access at _other+0x270"), False),
        ((READ, "Write access at 0x270"), False),
        ((READ, "Write access at _kernel+0x110"), False),
        (("Write access at _kernel+0x270", "Write access at _kernel+0x280"), False),
        ((WRITE, READ), True),
        (("Read access at _kernel+0x110", "Read access at _kernel+0x110"), False),
        (("Write access at _other+0x270", "Read access at _other+0x110"), False),
    ],
)
def test_a_race_is_none_if_all_its_accesses_are_the_hand_over(compiled, accesses, none):
    (told,) = races.races(race(*accesses))
    assert races.is_hand_over(told, compiled(CODE)) == none


def test_every_form_of_a_kernel_counts(compiled):
    """That touches shared memory at both addresses."""
    (told,) = races.races(race(READ, WRITE))
    elsewhere = CODE.replace("STS.64 [UR24+0x238a0]", "MOV R1")
    assert races.is_hand_over(told, compiled(CODE, elsewhere))


def test_no_form_that_touches_shared_memory_there(compiled):
    (told,) = races.races(race(READ, WRITE))
    assert not races.is_hand_over(told, compiled(CODE.replace("STS.64 [UR24+0x238a0]", "MOV R1")))


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
    monkeypatch.setattr(races, "disassembled", lambda cubin: [])
    assert not races.is_hand_over(told, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", missing)
    assert not races.is_hand_over(told, tmp_path)


def test_a_form_whose_machine_code_cannot_be_read_may_be_the_one(compiled):
    (told,) = races.races(race(READ, WRITE))
    assert not races.is_hand_over(told, compiled(CODE, ""))


def test_a_kernel_has_one_place_where_parts_are_handed(compiled):
    """Another byte that is read right behind the barrier is the kernel's own, and nobody knows which."""
    last = "        /*02e0*/                   EXIT ;"
    again = "/*02d8*/ BAR.SYNC.DEFER_BLOCKING 0x1 ;\n /*02dc*/ LDS.U8 R9, [R9+UR4+0x2389c] ;"
    more = CODE.replace(last, f"{again}\n{last}")
    (told,) = races.races(race(READ, WRITE))
    assert more != CODE and not races.is_hand_over(told, compiled(more))
