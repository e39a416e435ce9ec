"""What compiled code must be like where an interpreter cannot tell: no contraction where two forms of a
launch must agree, and partials of other CTAs read past L1. Four small kernels, compiled for sm_90."""

import pytest
from compiled import compiled_by


@pytest.fixture(scope="module")
def compiled(triton_cache):
    lines = compiled_by("compile_options.py", triton_cache)
    return {line["kernel"]: line for line in lines}


def test_norms_are_not_contracted(compiled):
    assert not compiled["rms_norm"]["fma"] and not compiled["qk_norm_rope"]["fma"]
    assert compiled["fold"]["fma"], "where one is meant, the kernel says so"


def test_partials_are_read_past_l1(compiled):
    """L1 may hold an older launch's: the linear loads nothing else into registers, the fold its row's first
    and last segment besides."""
    linear, fold = compiled["linear"]["loads"], compiled["fold"]["loads"]
    assert linear and all(".cg" in load for load in linear), linear
    assert sum(n for load, n in fold.items() if ".cg" not in load) == 2 < sum(fold.values()), fold
