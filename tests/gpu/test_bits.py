"""The promise on a GPU, compiled: the embedded checkpoint, and random weights at the shapes of Qwen3-1.7B and
8B. `make gpu-check` runs it; `-s` shows the counts.
"""

import pytest
from golden import SHAPES, seeded_model
from promise import check_model, check_prefill

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED

CONTEXTS = [1, 127, 128, 129, 255, 256, 257, 4096]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("name", ["embedded", *SHAPES])
def test_bits(name):
    if name == "embedded":
        model = Qwen3.from_pretrained(EMBEDDED, "cuda", "bfloat16", progress=False)
    else:
        model = seeded_model(name, "cuda")
    assert model.backend == "triton"
    contexts = CONTEXTS[:-1] + [3900] if name == "embedded" else [*CONTEXTS, 32768]
    found = check_model(model, contexts, passes=120, graphs=True)
    prefill = check_prefill(model, 1300, [1, 100, 512])
    print(f"\n{name}: {found}\n{name}: prefill {prefill}")
    assert found.different == 0 and found.passes >= 900 and found.rows >= 1000, found
    assert prefill.different == 0, prefill
