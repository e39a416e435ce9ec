"""The draft tree: the best paths through a block's distributions, and text that does not depend on it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plainly import plainly
from scripted import ScriptedModel
from small import small_config, small_model

from orthrus_kernels import Rows, Sampling, draft_tree, visible
from qwen3_model import InputError, Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.choice import Choice
from qwen3_model.prompts import read_prompts


def distributions(depth, width, seed):
    """Sorted log-probabilities and distinct ids of `depth` positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(depth, width, generator=generator).sort(-1, descending=True).values
    ids = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(depth)])
    return logits.log_softmax(-1), ids


def every_path(scores, ids):
    """(score, tokens) of all paths from the root, summed in fp32 from the root down."""
    found = []
    for depth in range(1, len(scores) + 1):
        for ranks in itertools.product(range(scores.shape[1]), repeat=depth):
            total = torch.zeros(())
            for d, rank in enumerate(ranks):
                total = total + scores[d, rank]
            found.append((total.item(), tuple(ids[d, rank].item() for d, rank in enumerate(ranks))))
    return sorted(found, key=lambda path: -path[0])


@settings(max_examples=60)
@given(depth=st.integers(1, 4), width=st.integers(1, 4), nodes=st.integers(0, 40), seed=st.integers(0, 10**6),
       children=st.none() | st.integers(1, 5))  # fmt: skip
def test_it_holds_the_best_paths(depth, width, nodes, seed, children):
    """Of those that take the likeliest candidates, where a node may have so many children."""
    scores, ids = distributions(depth, width, seed)
    tree = draft_tree(7, scores, ids, nodes, children=children)
    wanted = every_path(scores[:, :children], ids[:, :children])[:nodes]
    assert len(tree) == len(wanted) + 1 and (tree.tokens[0], tree.parents[0]) == (7, -1)
    paths = [tuple(path) for path in tree.paths()[1:]]
    assert len(set(paths)) == len(paths), "no node twice"
    assert tree.scores[1:] == [score for score, _ in wanted], "best first"
    distinct = {score for score, _ in wanted}
    if len(distinct) == len(wanted):
        assert paths == [path for _, path in wanted]
    for i, (parent, depth_of) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        assert parent < i and depth_of == (tree.depths[parent] + 1 if i else 0)
    visible(Rows.tree(tree.tokens, tree.parents, 3))  # a tree that a pass takes


def test_a_drafts_penalty_sees_the_text():
    """And not the draft: two positions that want one token both get it, unless the text has it."""
    model = ScriptedModel(small_config())
    choice, at, slots = Choice(model), torch.tensor([4, 5]), torch.zeros(2, dtype=torch.int32)
    logits = torch.zeros(2, model.config.vocab_size)
    logits[:, 9], logits[:, 11] = 6.0, 5.0
    for text, wanted, score in (([5, 6], 9, 6.0), ([5, 9], 11, 5.0)):
        choice.put(0, Sampling(repetition_penalty=2.0), text, len(text))
        choice.form = choice.form_of([0])
        scores, ids, order = choice.ranked(logits, at[None], torch.tensor(text[-1:]), slots[None], known=True)
        scores, ids = scores[0], ids[0]
        assert ids[:, 0].tolist() == [wanted] * 2 and order is None
        penalised = logits.index_fill(1, torch.tensor([9]), 3.0) if 9 in text else logits
        assert scores[:, 0].tolist() == pytest.approx((score - penalised.logsumexp(-1)).tolist(), abs=1e-6)


def test_a_stop_string_inside_a_path():
    """The text ends where plain decoding ends it, with more of the path accepted than is kept."""
    model = Qwen3.from_pretrained(EMBEDDED, device="cpu", progress=False)
    prompt = model.text.encode(read_prompts(EMBEDDED / "held_out.jsonl", 1, split="test")[0])
    runs = []
    model.generate(prompt, "two-pass", 40, tree_nodes=24, on_tokens=lambda ids, text: runs.append(ids))
    longest = max(range(len(runs)), key=lambda i: len(runs[i]))
    before = [token for run in runs[:longest] for token in run]
    stop = model.text.decode(before + runs[longest][:2])[len(model.text.decode(before)) :]
    plain = model.generate(prompt, "autoregressive", 40, stop=stop)
    drafted = model.generate(prompt, "two-pass", 40, tree_nodes=24, stop=stop)
    assert plain.stats.finish_reason == drafted.stats.finish_reason == "stop_string"
    assert drafted.text == plain.text and drafted.token_ids == plain.token_ids
    assert drafted.logprobs == plain.logprobs


@pytest.mark.parametrize("width", [1, 4])
def test_one_child_a_node_is_a_chain(width):
    scores, ids = distributions(5, width, 0)
    tree = draft_tree(1, scores, ids, 9, children=1)
    assert tree.tokens == [1, *ids[:, 0].tolist()] and tree.parents == [-1, 0, 1, 2, 3, 4]
    assert tree.scores == pytest.approx([0.0, *scores[:, 0].cumsum(0).tolist()])


def test_a_chain_goes_by_what_stands_before():
    """Behind candidate 1 of the first position candidate 2 of the second is the likeliest, and so on down."""
    scores, ids = distributions(3, 3, 1)
    scores = scores[:, None].expand(3, 3, 3)
    order = torch.tensor([[[1, 0, 2]] * 3, [[0, 1, 2], [2, 0, 1], [0, 1, 2]], [[0, 1, 2]] * 2 + [[1, 0, 2]]])
    tree = draft_tree(5, scores, ids, 3, order, children=1)
    assert tree.tokens == [5, int(ids[0, 1]), int(ids[1, 2]), int(ids[2, 1])]


def test_equal_scores_go_by_what_was_known_first():
    """All paths of a depth are equal; a place is known once its parent or the sibling before is taken."""
    scores = torch.full((3, 2), -1.0)
    tree = draft_tree(0, scores, torch.tensor([[1, 2], [3, 4], [5, 6]]), 6)
    assert tree.tokens == [0, 1, 2, 3, 3, 4, 4] and tree.parents == [-1, 0, 0, 1, 2, 1, 2]


def test_impossible_candidates_are_left_out():
    scores = torch.tensor([[0.0, float("-inf")], [-1.0, float("-inf")]])
    assert draft_tree(0, scores, torch.tensor([[1, 2], [3, 4]]), 9).tokens == [0, 1, 3]
    assert len(draft_tree(0, torch.full((2, 2), float("-inf")), torch.zeros(2, 2, dtype=torch.int64), 9)) == 1
    with pytest.raises(ValueError, match="at least 0"):
        draft_tree(0, scores, torch.zeros(2, 2, dtype=torch.int64), -1)


SETTINGS = [
    {}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9, "top_k": 12},
    {"temperature": 0.9, "repetition_penalty": 1.3, "logit_bias": {5: 2.0, 9: -float("inf")}},
]  # fmt: skip


# In bf16 greedily and with penalties; the rest is slow.
CASES = [
    pytest.param(dtype, settings, marks=[pytest.mark.slow] if slow else [], id=f"{dtype}-{settings}")
    for dtype in ("float32", "bfloat16")
    for settings, slow in zip(SETTINGS, (False, dtype == "bfloat16", dtype == "bfloat16", False), strict=True)
]


@pytest.mark.parametrize("dtype, settings", CASES)
def test_any_tree_gives_the_text_of_plain_decoding(dtype, settings):
    """Tokens and log-probabilities, bit for bit, with end tokens in it and a context that gets full."""
    model = small_model(dtype, max_position_embeddings=32)
    prompt = [5, 6, 7]
    for seed in range(2 if settings else 1):  # without a temperature a seed is nothing
        plain = plainly(model, prompt, 29, seed=seed, **settings)
        for nodes in (1, 20, "auto"):
            drafted = model.generate(prompt, "two-pass", seed=seed, tree_nodes=nodes, **settings)
            assert (drafted.token_ids, drafted.logprobs) == plain
            assert (drafted.stats.finish_reason == "length") == (len(plain[0]) == 29)
            assert nodes == "auto" or drafted.stats.nodes <= nodes * drafted.stats.cycles


@pytest.mark.parametrize("nodes", [-1, 256, 1.5, "many"])
def test_impossible_trees(nodes):
    with pytest.raises(InputError, match="tree_nodes is .* 0 \\(a chain\\) to 255"):
        small_model().generate([5], "two-pass", max_new_tokens=2, tree_nodes=nodes)


def test_a_tree_accepts_more_than_a_chain():
    """On the embedded checkpoint: a broken builder keeps the text and loses this. A tree of 24, and of
    samples one of 60, beside a chain without the correction that both take and beside the corrected one."""
    model = Qwen3.from_pretrained(EMBEDDED, device="cpu", backend="torch", progress=False)
    prompts = [model.text.encode(p) for p in read_prompts(EMBEDDED / "held_out.jsonl", 2, split="test")]
    tables = model.bigram

    def cycles_a_token(nodes, corrected=True, **how):
        model.bigram = tables if corrected else None
        found = [model.generate(p, "two-pass", 36, tree_nodes=nodes, **how).stats for p in prompts]
        return sum(s.cycles for s in found) / sum(s.cycle_tokens for s in found)

    # 1.65 and 1.29, 1.74 and 1.35 here
    for how, nodes, gain in (({}, 24, 1.2), ({"temperature": 1.0, "seed": 1}, 60, 1.25)):
        tree = cycles_a_token(nodes, **how)
        assert cycles_a_token(0, corrected=False, **how) / tree > 1.2, how
        assert cycles_a_token(0, **how) / tree > gain, how
