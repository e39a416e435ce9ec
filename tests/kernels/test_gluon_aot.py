"""The linears in Gluon, compiled for sm_90 without a GPU: registers, waits, and the arithmetic of SwiGLU."""

import pytest
from compiled import compiled_by


@pytest.fixture(scope="module")
def lines(triton_cache):
    return compiled_by("compile_gluon.py", triton_cache)


@pytest.fixture(scope="module")
def compiled(lines):
    return [line for line in lines if "case" in line and not {"codes", "rounded"} & set(line)]


@pytest.fixture(scope="module")
def coded(lines):
    return [line for line in lines if "codes" in line]


@pytest.fixture(scope="module")
def rounded(lines):
    return [line for line in lines if "rounded" in line]


def check(compiled):
    for line in compiled:
        assert line["spill_bytes"] == 0 and line["wgmma"] and line["tma"], line
        assert line["warnings"] == [], "products in turn, or registers that do not move between warps"
        assert line["shared"] <= 227 * 1024 and line["registers"] * line["warps"] * 32 <= 65536, line
        assert line["whole_stores"] and line["contraction"], line
        assert line["barriers_that_stay"] == [], "a place of the ring that is never free again"
        waits = line["segments"] > 1 and not line["wide"]
        assert bool(line["traps"]) == waits, "a wait for other programs is bounded"


def test_tiles_run_on_tensor_cores_and_spill_nothing(compiled):
    check(compiled)
    assert {line["segments"] for line in compiled} >= {1, 2, 3, 4}
    assert any(line["swiglu"] for line in compiled) and any(line["views"] == 2 for line in compiled)
    wide = [(line["segments"] > 1, line["swiglu"]) for line in compiled if line["wide"]]
    assert set(wide) == {(False, False), (False, True), (True, False)}


@pytest.mark.slow
def test_every_tile_of_the_table(triton_cache):
    lines = compiled_by("compile_gluon.py", triton_cache, "all")
    check([line for line in lines if "case" in line and not {"codes", "rounded"} & set(line)])
    check_codes([line for line in lines if "codes" in line])
    check_rounded([line for line in lines if "rounded" in line])
    kinds = [[line for line in lines if kind in line] for kind in ("codes", "rounded")]
    assert [len(kind) for kind in kinds] == [102, 57] and len(lines) - 159 > 40


def check_codes(coded):
    """Words come by ldmatrix or plain loads of shared memory and reach wgmma from registers, without a
    conversion. What is touched before rows are there is factors. Of 4 bits one warpgroup at least does half
    of what widens a group beside the products of the one before; of 8 bits ptxas does it behind them, and in
    tall tiles it stands there."""
    check(coded)
    for line in coded:
        assert line["wgmma_from_registers"] and line["ldmatrix"] and line["fma"] and line["fma_bf16x2"], line
        assert all(to.startswith("cvt.rn.bf16") for to in line["conversions"]), line
        assert [of for of in line["copied"] if of] == [["w"]] and line["waits"], line
        assert line["touched"] and all(touch.startswith("ld.global") for touch in line["touched"]), line
        assert line["widened"] >= 30 or line["codes"] == 8 or line["tall"], line


def test_codes_are_widened_in_registers_beside_products(coded):
    check_codes(coded)
    assert len(coded) == 8 and {line["codes"] for line in coded} == {4, 8}


def check_rounded(rounded):
    """Both operands reach wgmma from shared memory. A group's products are a dot from nothing, with no sum in
    between, and a number of its sum costs a multiply-add, beside products of scales: of a column where a
    block of weight rows has one scale, else of a number. What is touched before rows are there is factors."""
    check(rounded)
    for line in rounded:
        assert line["wgmma_e4m3"] and not line["wgmma_from_registers"], line
        assert all(to.startswith("cvt.rn.bf16") for to in line["conversions"]), line
        assert [of for of in line["copied"] if of] == [["w"]] and line["waits"], line
        assert line["touched"] and all(touch.startswith("ld.global") for touch in line["touched"]), line
        assert len(line["loops"]) == line["groups"], line
        dots = 8 if line["rows"].bit_count() > 1 else 4
        one = line["rounded"] == 128 and not line["swiglu"]
        for loop in line["loops"]:
            assert loop["QGMMA"] == dots and not {"LDL", "STL", "LDSM", "FADD"} & set(loop), line
            assert loop["FFMA"] == line["rows"] // 2 and loop["FMUL"] == line["rows"] // (4 if one else 2), (
                line
            )


def test_codes_times_codes_come_from_shared_memory(rounded):
    check_rounded(rounded)
    assert [line["rows"] for line in rounded] == [96, 192, 192, 192]


def test_weights_alone_are_copied_before_the_wait(compiled):
    """The copying warp asks for nothing else, and all other warps wait for the rows that it copies behind its
    wait."""
    for line in compiled:
        weights = [of for of in line["copied"] if of]
        assert weights == ([["w_diff"], ["w"]][2 - line["views"] :] if line["pdl"] else []), line
        assert line["touched"] == [] and bool(line["waits"]) == line["pdl"], line


def test_swiglu_rounds_as_in_triton(lines, compiled):
    """As many exponentials, divisions, products and conversions of each kind for each number."""
    (triton,) = (line["triton"] for line in lines if "triton" in line)
    ours = [line["arithmetic"] for line in compiled if line["swiglu"]]
    assert len(ours) > 3 and all(of == triton for of in ours)
    assert triton["div.full.f32"] == triton["ex2.approx.f32"] == 1


def test_a_race_of_the_hand_over_is_told_from_all_others(lines):
    """Triton's warps read one word in shared memory, which is written at the start and at the end. Nothing
    else is taken for it, nor two parts of a kernel that write one buffer."""
    found = [line for line in lines if "hand_over" in line]
    names = ["_linear_gluon_kernel", "_linear_gluon_wide_kernel", "_racing"]
    assert [line["hand_over"] for line in found] == names
    for line in found:
        assert [read.split()[0] for read in line["reads"]] == ["LDS.U8"], line
        assert len(line["writes"]) >= 2 and all(write.startswith("STS") for write in line["writes"]), line
        assert line["none"] and line["others"], line
