"""The compiled kernels give yesterday's bits on a GPU whose record is there (golden.py)."""

from __future__ import annotations

import json

import pytest
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


@pytest.fixture(scope="module")
def record():
    file = record_file("cuda")
    if not file.exists():
        pytest.skip(f"no golden record of this GPU: {file.name}")
    return json.loads(file.read_text())


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
