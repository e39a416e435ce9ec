"""Attention in Gluon, compiled for sm_90 without a GPU: registers, the order of its loop, and what decides
the bits beside Triton's kernel."""

import pytest
from compiled import compiled_by

# softmax of a block beside the products of the block before it
LOOP = ["scores", "values", "wait1", "exp", "wait0"]


@pytest.fixture(scope="module")
def lines(triton_cache):
    return compiled_by("compile_attention_gluon.py", triton_cache)


@pytest.fixture(scope="module")
def compiled(lines):
    return [line for line in lines if line["kernel"] == "gluon"]


def test_it_runs_on_tensor_cores_and_spills_nothing(compiled):
    assert [line["whole"] for line in compiled] == [False, True]
    for line in compiled:
        assert line["spill_bytes"] == 0 and line["wgmma"] and line["tma"] and line["cp_async_16"], line
        assert line["warnings"] == [], "products in turn, or registers that do not move between warps"
        assert line["shared"] <= 227 * 1024 and line["registers"] * line["warps"] * 32 <= 65536, line


def test_a_softmax_runs_beside_products(compiled):
    """In both warpgroups: ptxas moves a wait in front of the exponentials where nothing holds it."""
    for line in compiled:
        steps = line["order"]
        found = sum(steps[i : i + len(LOOP)] == LOOP for i in range(len(steps)))
        assert found == 2, steps


def test_sums_and_products_have_the_layouts_of_triton(lines, compiled):
    """The order of the numbers of a sum follows from its layout."""
    (triton,) = (line["arithmetic"] for line in lines if line["kernel"] == "triton")
    assert len(triton) == 4
    assert all(line["arithmetic"] == triton for line in compiled)


def test_nothing_is_touched_before_the_wait(compiled):
    assert [line["before_wait"] for line in compiled] == [[], []]
