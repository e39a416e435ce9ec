"""Each fuzzer with its own small number of cases finds nothing; `tests/fuzz/run.py` runs any number."""

from __future__ import annotations

import pytest
from fuzzing import NAMES, fuzz, fuzzer


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_fuzzer_finds_nothing(name):
    report = fuzz(name, seed=0, count=fuzzer(name).COUNT)
    assert report.cases == fuzzer(name).COUNT > 0
    assert not report.findings, report.findings[:5]
