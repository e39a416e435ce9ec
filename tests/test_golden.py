"""The plain twins give yesterday's bits on a CPU whose record is there (golden.py)."""

from __future__ import annotations

import json

import pytest
import torch
from golden import STRATEGIES, TEMPERATURES, embedded, logits_hash, record_file, texts_hash

FILE = record_file("cpu")
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no golden record of this CPU: {FILE.name}")


@pytest.fixture(scope="module")
def record():
    torch.set_num_threads(1)  # bits are promised for one number of threads
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def model():
    return embedded("cpu")


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_texts(model, record, name, temperature):
    found = texts_hash(model, record["prompts"], record["tokens"], temperature, **STRATEGIES[name])
    assert found == record["texts"][str(temperature)]


def test_logits(model, record):
    """They have rows of the diffusion view, so that a new view makes them anew."""
    if "logits" not in record:
        pytest.skip("not recorded on this CPU since the diffusion view was trained last")
    assert logits_hash(model) == record["logits"]["embedded"]
