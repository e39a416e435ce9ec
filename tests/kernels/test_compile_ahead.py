"""What engines launch is recorded without running anything, compiled by other processes, and found on disk by
the launch itself: for an H100, by Triton's compiler, on a CPU."""

import pytest
from compiled import compiled_by


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return compiled_by("compile_recorded.py", tmp_path_factory.mktemp("triton"))


def test_a_recording_has_every_kernel_of_the_cycles(told):
    """One layer launches what all launch. A text alone with plain decoding has a few kernels of them."""
    names, whole, plain = told[0]["names"], told[0]["whole"], told[1]["plain"]
    assert whole, "the recording of one layer is that of all"
    for kernel in ("grow", "allot", "lay", "walk", "commit", "choose_top_k", "edge", "tile_best"):
        assert names[f"_{kernel}_kernel"] >= 1, kernel
    assert names["_linear_kernel"] > 3 < names["_head_kernel"], "a tile by rows"
    assert not plain.keys() - names.keys() and "_grow_kernel" not in plain and sum(plain.values()) < 20


def test_what_other_processes_compile_is_found(told):
    """One of them in Gluon. One that cannot be compiled does not count and stops nobody."""
    found = told[2]
    assert found["zeros"], "nothing ran, and fresh memory was zeros"
    assert found["compiled"] == 4 and found["told"] == 5, found
    assert found["still"] == 0 and found["left"] == found["lacked"] - 4 > 50, found
    assert found["hits"] == [True], "of the launch itself"
    assert found["asked"] == [True, False], "what another thread launches meanwhile runs"
