"""The oracle and recall of bench.acceptance: by hand, and on a text beside the cycles that were decoded."""

import numpy as np
import pytest
import torch

from bench import oracle
from bench.oracle import Lattice, leading, per_forward, walked
from orthrus_kernels import Sampling
from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.lattice import ranks
from qwen3_model.prompts import read_prompts


def test_ranks_by_hand():
    """Three blocks of two proposals; the text has three tokens, so the last block sees one of them."""
    ids = torch.tensor([[[5, 6], [7, 8]], [[8, 7], [9, 9]], [[1, 2], [3, 4]]])
    assert ranks(ids, torch.tensor([6, 7, 2])).tolist() == [[1, 0], [1, 2], [1, -1]]


def test_leading_ranks():
    assert [leading(np.array(row), 4) for row in ([0, 3, 4], [4, 0], [1, 2, 3], [0, -1, 0])] == [2, 0, 3, 1]


def test_cycles_by_hand():
    """A text of five tokens: roots 0 to 3. Two-pass cycles keep as blocks 1 to 4 say; one-pass cycles as
    blocks 1 to 3 say without their first proposals, and nothing in the first."""
    two = np.array([[0, 0, 0], [0, 5, 16], [0, 0, 0], [16, 0, -1], [2, -1, -1]])
    found = Lattice(0.0, [two], [two])
    # root 0 keeps block 1's two and its own: root 3, where block 4 keeps the last token
    assert found.cycles().tolist() == [[4, 2]]
    # among the first four candidates block 1 keeps one; from root 2 block 3 keeps none, then block 4
    assert found.cycles(4).tolist() == [[4, 3]]
    # root 0 has no draft; root 1 keeps one of block 1's [5, 16], and root 3 the last token
    assert found.passes().tolist() == [[4, 3]]
    # among the first four candidates root 1 keeps none, and root 2 all of block 2's
    assert found.passes(4).tolist() == [[4, 3]]
    assert found.recall(2, 4).tolist() == [[3, 4]] and found.recall(3, 16).tolist() == [[2, 3]]
    assert per_forward(np.array([[4, 2], [6, 2]]), 2) == 12 / 10
    assert walked([9]) == (1, 1)


@pytest.fixture(scope="module")
def measured():
    model = Qwen3.from_pretrained(EMBEDDED, "cpu", backend="torch", progress=False)
    prompt = model.text.encode(read_prompts(EMBEDDED / "held_out.jsonl", 1, split="test")[0])
    texts, kept = [], []
    for nodes in (0, 63):
        result = model.generate(prompt, "two-pass", 32, tree_nodes=nodes)
        texts.append(result.token_ids)
        kept.append(result.stats.tokens_per_cycle)
    assert texts[0] == texts[1]
    return oracle.measure(model, [prompt], texts[:1], [Sampling()]), kept


def test_no_draft_keeps_more(measured):
    """Than the oracle; the oracle of one candidate is the chain without the correction, which keeps less."""
    found, (chain, tree) = measured
    best, four, one = (tokens / cycles for width in (16, 4, 1) for tokens, cycles in found.cycles(width))
    assert 1 < one < chain < tree <= best and one < four < best
    (tokens, cycles), (_, passes) = found.cycles()[0], found.passes()[0]
    assert tokens == 31 and cycles < passes < 2 * cycles


def test_what_is_printed(measured):
    (_, head, lines), (title, offsets, shares) = oracle.tables(measured[0])
    assert len(head) == len(lines[0]) == 4 and "T 0, 1 prompts" in title
    assert [line[0] for line in shares] == list(map(str, oracle.OFFSETS)) and len(offsets) == len(shares[0])
    told = measured[0].to_dict()
    assert [row["draft"] for row in told["oracle"]] == [line[0] for line in lines]
    by = {(row["offset"], row["width"]): row["share"] for row in told["recall"]}
    assert all(by[o, 1] <= by[o, 4] <= by[o, 16] for o in oracle.OFFSETS) and by[1, 16] > by[8, 16]
