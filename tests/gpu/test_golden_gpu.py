"""The compiled kernels give yesterday's bits on a GPU whose record is there (golden.py)."""

from __future__ import annotations

import json
import os

import pytest
import torch
from golden import (
    SHAPES,
    STRATEGIES,
    TEMPERATURES,
    embedded,
    logits_hash,
    record_file,
    seeded_model,
    texts_hash,
)

HERE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
FILE = record_file("cuda") if HERE else None
pytestmark = [
    pytest.mark.skipif(not HERE, reason="needs a GPU and compiled kernels"),
    pytest.mark.skipif(
        FILE is not None and not FILE.exists(), reason=f"no golden record of this GPU: {FILE and FILE.name}"
    ),
]


@pytest.fixture(scope="module")
def record():
    return json.loads(FILE.read_text())


def test_texts_and_logits_of_the_embedded_checkpoint(record):
    model = embedded("cuda")
    for temperature in TEMPERATURES:
        for name, how in STRATEGIES.items():
            found = texts_hash(model, record["prompts"], record["tokens"], temperature, **how)
            assert found == record["texts"][str(temperature)], (name, temperature)
    assert logits_hash(model) == record["logits"]["embedded"]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_random_weights(record, name):
    assert logits_hash(seeded_model(name, "cuda")) == record["logits"][name]
