"""bench.trace: what it says cycles keep is what cycles keep."""

import dataclasses
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model

from bench import replay, trace, trace_file
from bench.trace import indices, looked_up, ranked, ranks_of, record
from bench.trace_file import CHAIN, KINDS, LOOKUP, ONE_PASS, Tally, Text, followed
from orthrus_kernels import Rows, Sampling, draft_tree
from qwen3_model import InputError, Qwen3
from qwen3_model.bigram import Bigram
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.decode.choice import Choice
from qwen3_model.decode.one_pass import NODES
from qwen3_model.lattice import Candidates
from qwen3_model.prompts import read_prompts


def walked(tree, truth):
    """Nodes of the walk down a draft tree whose target says truth[d] behind depth d."""
    path = [0]
    while True:
        last = path[-1]
        child = next((i for i, parent in enumerate(tree.parents)
                      if parent == last and tree.tokens[i] == truth[tree.depths[last]]), None)  # fmt: skip
        if child is None:
            return path
        path.append(child)


@settings(max_examples=100)
@given(depths=st.integers(1, 6), width=st.integers(1, 5), nodes=st.integers(1, 60), few=st.booleans(),
       ordered=st.booleans(), banned=st.booleans(), seed=st.integers(0, 10**6))  # fmt: skip
def test_the_walk_is_that_of_the_grown_tree(depths, width, nodes, few, ordered, banned, seed):
    """few: log-probabilities of three values, so that scores are often equal. banned: some are impossible."""
    g = torch.Generator().manual_seed(seed)
    shape = (depths, width, width) if ordered else (depths, width)
    scores = -torch.randint(0, 3, shape, generator=g).float() if few else -5 * torch.rand(shape, generator=g)
    if banned:
        scores[torch.rand(shape, generator=g) < 0.2] = float("-inf")
    scores = scores.sort(-1, descending=True).values
    order = torch.rand(shape, generator=g).argsort(-1).int() if ordered else None
    ids = torch.stack([torch.randperm(50, generator=g)[:width] for _ in range(depths)])
    tree = draft_tree(7, scores, ids, nodes, order=order)
    if not ordered:
        scores = scores[:, None].expand(depths, width, width)
        order = torch.arange(width).expand(depths, width, width)
    truth = [int(names[torch.randint(width, (), generator=g)]) for names in ids]
    if torch.rand((), generator=g) < 0.5:
        truth[-1] = 99  # no candidate
    ranks = ranks_of(ids.tolist(), order.numpy(), truth)
    assert len(ranks) == depths - (truth[-1] == 99)
    assert indices(scores.numpy(), order.numpy(), ranks, nodes) == walked(tree, [*truth, -1])[1:]


@pytest.mark.parametrize("known", [True, False])
def test_blocks_ranked_together_are_those_ranked_alone(known):
    """Behind their own roots; each number of the one call is that of a call of its own."""
    model, g = small_model(), torch.Generator().manual_seed(2)
    model.bigram = Bigram.of(*(torch.randn(97, 6, generator=g) for _ in "uw"))
    scores = torch.randn(3, 4, 5, generator=g).sort(-1, descending=True).values.log_softmax(-1)
    ids = torch.stack([torch.randperm(97, generator=g)[:5] for _ in range(12)]).view(3, 4, 5)
    together = ranked(model, Candidates(scores, ids, None), [11, 12, 13], known, corrected=True)
    for i, root in enumerate((11, 12, 13)):
        front, slot = torch.tensor([[root], [0]], dtype=torch.int32)
        one = scores[i : i + 1], ids[i : i + 1]
        tables = model.bigram.before, model.bigram.after, model.bigram.calibration
        alone = model.ops.rerank(*one, front, *tables, torch.ones(1), torch.zeros(1), slot, known)
        assert np.array_equal(together[0][i], alone[0][0]) and np.array_equal(together[1][i], alone[1][0])
    plain = ranked(model, Candidates(scores, ids, None), [11, 12, 13], known, corrected=False)
    assert np.array_equal(plain[0][1, 2, 3], scores[1, 2]) and plain[1][0, 0, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def embedded():
    model = Qwen3.from_pretrained(EMBEDDED, "cpu", backend="torch", progress=False)
    prompts = [model.text.encode(p) for p in read_prompts(EMBEDDED / "held_out.jsonl", 2, split="test")]
    return model, prompts, record(model, prompts, 24, "embedded")


@pytest.fixture(scope="module")
def sampled(embedded):
    model, prompts, _ = embedded
    sampling = Sampling(temperature=1.2, seed=5)
    return model, prompts, record(model, prompts, 24, "embedded", sampling=sampling)


@pytest.mark.parametrize("kind", [CHAIN, "15"])
@pytest.mark.parametrize("of", ["embedded", "sampled"])
def test_a_trace_says_what_two_pass_cycles_keep(of, kind, request, monkeypatch):
    """Cycles of texts longer than the trace by a block, so that none is drafted shorter; what is behind the
    trace's end does not count. Trees are the drafter's own, without a branch that lookup finds."""
    model, prompts, found = request.getfixturevalue(of)
    monkeypatch.setattr(model, "ops", dataclasses.replace(model.ops, branch=lambda *_: None))
    for prompt, text in zip(prompts, found.texts, strict=True):
        nodes, runs = 0 if kind == CHAIN else int(kind), []
        model.generate(
            prompt, "two-pass", 24 + 32, tree_nodes=nodes, seed=5, temperature=found.temperature,
            on_run=lambda run, _, runs=runs: runs.append(run.tokens),
            on_tokens=lambda *_, runs=runs: sum(map(len, runs)) < 24,
        )  # fmt: skip
        at, kept, wanted = 0, [], []
        for tokens in runs[1:]:
            if at < 23:
                kept.append(min(len(tokens), 23 - at))
                wanted.append(min(text.kept[kind][at], 23 - at))
            at += len(tokens)
        assert kept == wanted == followed(text, kind) and sum(kept) == 23 and max(kept) > 2
        assert text.prompt_tokens == len(prompt) and text.tokens == 24


def lookup_cycles(model, prompt, count, temperature):
    """(tokens, tokens of each cycle); the first run of a text is the prefill's token."""
    runs = []
    result = model.generate(
        prompt, "lookup", count, seed=5, temperature=temperature,
        on_run=lambda run, _: runs.append(len(run.tokens)),
    )  # fmt: skip
    return result.token_ids, runs[1:]


@pytest.mark.parametrize("of", ["embedded", "sampled"])
def test_a_trace_says_what_lookup_cycles_keep(of, request):
    model, prompts, found = request.getfixturevalue(of)
    for prompt, text in zip(prompts, found.texts, strict=True):
        _, runs = lookup_cycles(model, prompt, 24, found.temperature)
        assert followed(text, LOOKUP) == runs and max(text.kept[LOOKUP]) > 1


def test_lookup_cycles_of_a_text_that_repeats_itself(embedded):
    """Two of its cycles keep all that is drafted, or all but one."""
    model, (prompt, _), _ = embedded
    tokens, runs = lookup_cycles(model, prompt, 80, 0.0)
    kept = [*looked_up([*prompt, *tokens], len(prompt)), 1]
    assert followed(Text(len(prompt), {CHAIN: kept, LOOKUP: kept}), LOOKUP) == runs
    assert sorted(runs)[-2:] == [15, 16]


def test_what_lookup_keeps_by_hand():
    """Drafts go round where the text does, end with the text, and are 15 tokens at most."""
    text = [5, 6, 7, 5, 6, 7, 5, 6]
    assert looked_up(text, 2) == [1, 5, 4, 3, 2]
    assert looked_up([*text, 9], 2) == [1, 5, 4, 3, 2, 1]
    assert looked_up([3] * 40, 0) == [min(16, 40 - i) for i in range(39)]
    assert looked_up([5, 6, 7], 2) == []


def test_a_trace_says_what_a_tree_of_a_one_pass_cycle_keeps(embedded):
    """From a block anchored one position before the root, without its first proposal."""
    model, prompts, found = embedded
    prompt, text = prompts[0], found.texts[0]
    tokens = model.generate(prompt, "autoregressive", 24, seed=0).token_ids
    whole = [*prompt, *tokens]
    cache = model.new_cache(len(whole))
    model.prefill(whole, cache)
    choice = Choice(model)
    choice.put(0, trace.GREEDY, whole, 0)
    for i in (0, 5, 11):
        start = len(prompt) + i
        cache.lengths[0] = start - 1
        block = Rows.block(whole[start - 1], found.one_pass_rows, start - 1, model.config.mask_token_id)
        wanted = torch.arange(1, found.one_pass_rows - 1)
        given = model.new_pass(block, cache, logits_of=wanted)
        model.ops.lay(given.plan, given.tables)
        states, _, _ = model.states(given, cache)
        root, slots = torch.tensor([whole[start]]), torch.zeros(len(wanted), dtype=torch.int32)
        scores, ids, order = choice.ranked(states, start + wanted, root, slots, known=False)
        tree = draft_tree(whole[start], scores[0], ids[0], NODES, order=None if order is None else order[0])
        assert text.kept[ONE_PASS][i] == len(walked(tree, (whole + [-1] * 9)[start + 1 :]))


def test_tables_are_of_one_length_and_end_with_the_text(embedded):
    _, _, found = embedded
    assert found.kinds == KINDS
    for text in found.texts:
        for kind in KINDS:
            assert len(text.kept[kind]) == 24 and text.kept[kind][-1] == 1
            assert all(1 <= n <= 24 - i for i, n in enumerate(text.kept[kind]))
        for small, large in zip(("15", "31", "63"), ("31", "63", "127"), strict=True):
            assert all(a <= b for a, b in zip(text.kept[small], text.kept[large], strict=True))
    assert {(t.rows, t.knows_root, t.corrected) for t in found.tallies} == {
        (rows, known, corrected) for rows in (8, 32) for known in (True, False) for corrected in (True, False)
    }
    root, earlier = found.tally(32, True, False), found.tally(32, False, False)
    assert root.trials[0] == earlier.trials[0] == 46 and root.hits[0] > earlier.hits[0]
    misses = sum(n - hits for n, hits in zip(root.trials, [*root.hits, 0], strict=False))
    assert misses == sum(root.misses)


def test_a_trace_from_before_lookup_is_read(embedded, tmp_path):
    """Without that kind, of which its tables have no line."""
    trace_file.write(tmp_path / "t.json", embedded[2])
    content = json.loads((tmp_path / "t.json").read_text())
    for text in content["texts"]:
        del text["kept"][LOOKUP]
    (tmp_path / "t.json").write_text(json.dumps(content))
    old = trace_file.read(tmp_path / "t.json")
    assert old.kinds == tuple(kind for kind in KINDS if kind != LOOKUP)
    assert "lookup" not in str(trace.tables(old)) and old.mean(CHAIN) > 1


def test_blocks_are_given_as_the_kernel_takes_them(embedded, monkeypatch):
    """Of blocks anchored one position earlier as well, whose first proposals are cut off."""
    model, prompts, _ = embedded
    seen, rerank = [], model.ops.rerank

    def checked(scores, ids, *rest):
        if len(scores) > 1:  # a cycle has one block
            seen.append(scores.is_contiguous() and ids.is_contiguous())
        return rerank(scores, ids, *rest)

    monkeypatch.setattr(model, "ops", dataclasses.replace(model.ops, rerank=checked))
    record(model, prompts[:1], 3, "embedded")
    assert len(seen) >= 4 and all(seen)


def test_a_tally_by_hand():
    """Right twice, then the third candidate; never right, with none of the candidates; a short text."""
    tally = Tally(8, True, False)
    tally.add([0, 0, 2], 7)
    tally.add([], 7)
    tally.add([0], 1)
    assert tally.hits == [2, 1] and tally.trials == [3, 1, 1]
    assert tally.misses == [0, 1] + [0] * 13 + [1] and tally.shares()[1] == 0.5
    assert tally.agreement(least=1) == [2 / 3, 1.0, 0.0] and tally.agreement(least=2) == [2 / 3]


def test_following_a_trace_by_hand():
    text = Text(3, {CHAIN: [3, 1, 1, 2, 9, 1], ONE_PASS: [4, 2, 1, 3, 1, 1]})
    assert followed(text, CHAIN) == [3, 2] and followed(text, ONE_PASS) == [1, 2, 2]


def test_a_trace_comes_back_from_its_file(embedded, tmp_path):
    path = tmp_path / "trace.json"
    trace_file.write(path, embedded[2])
    assert trace_file.read(path) == embedded[2]
    for text in ("[]", "{}", "no json", json.dumps({"texts": [], "tallies": []})):
        path.write_text(text)
        with pytest.raises(InputError, match="is no trace"):
            trace_file.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        trace_file.read(tmp_path / "none")


@pytest.mark.parametrize(
    "harm",
    [lambda d: d["texts"][0]["kept"].update(chain=[0] * len(d["texts"][0]["kept"]["chain"])),
     lambda d: d["texts"][0]["kept"]["15"].__setitem__(0, 1.5),
     lambda d: d["texts"][0]["kept"]["lookup"].pop(), lambda d: d["texts"][0]["kept"].pop("15"),
     lambda d: d["texts"][0]["kept"].pop("lookup"),
     lambda d: d["texts"][0]["kept"]["lookup"].__setitem__(0, 17),
     lambda d: [text["kept"].update(Lookup=text["kept"].pop("lookup")) for text in d["texts"]],
     lambda d: d.update(block_rows="32"),
     lambda d: d["texts"][0].update(prompt_tokens="5"), lambda d: d.update(made=None),
     lambda d: d.update(made={"one_pass": "x"}), lambda d: d.update(temperature=-1),
     lambda d: d.update(temperature="1"), lambda d: d.update(temperature=True),
     lambda d: d.update(temperature=10**400), lambda d: d["tallies"][0].update(rows=0),
     lambda d: d["tallies"][0]["hits"].extend([1] * 99)],
)  # fmt: skip
def test_numbers_that_no_recording_gives(embedded, tmp_path, harm):
    path = tmp_path / "trace.json"
    trace_file.write(path, embedded[2])
    content = json.loads(path.read_text())
    harm(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is no trace"):
        trace_file.read(path)
    path.write_text("[" * 200_000)
    with pytest.raises(InputError, match="is no trace"):
        trace_file.read(path)


def test_a_sampled_text_keeps_less(embedded, sampled):
    """Noise is in the text and in what is drafted: another text, and what comes next is found less often."""
    assert sampled[2].temperature == 1.2 and embedded[2].temperature == 0.0
    assert sampled[2].mean(CHAIN) < embedded[2].mean(CHAIN)


def test_the_command_records_a_set(tmp_path, capsys, refused):
    out, options = tmp_path / "t.json", ["--prompts", "1", "--tokens", "9", "--device", "cpu"]
    assert trace.main([*options, "--set", "noise", "--json", str(out)]) == 0
    found = trace_file.read(out)
    assert (found.checkpoint, found.temperature) == ("embedded, noise", 1.5)
    assert found.texts[0].prompt_tokens == 64 and "embedded, noise" in capsys.readouterr().out
    for more in (["p.jsonl"], ["--temperature", "1"], ["--skip", "1"]):
        assert "--set has prompts" in refused(trace.main, *options, "--set", "noise", *more)
    assert trace.main([*options, "--temperature", "0.7", "--json", str(out)]) == 0
    assert trace_file.read(out).checkpoint == "embedded, T 0.7"
    assert "temperature is -1" in refused(trace.main, *options, "--temperature", "-1")


def test_the_command_leaves_prompts_out(tmp_path, refused):
    prompts, rest = tmp_path / "p.jsonl", tmp_path / "rest.jsonl"
    prompts.write_text('"one, two"\n"def first(x):"\n"# third"\n')
    rest.write_text('"def first(x):"\n"# third"\n')
    found = []
    for options in ([str(prompts), "--skip", "1"], [str(rest)]):
        out = tmp_path / "t.json"
        assert trace.main([*options, "--tokens", "5", "--device", "cpu", "--json", str(out)]) == 0
        found.append(trace_file.read(out))
    assert found[0].texts == found[1].texts and found[0].checkpoint == "embedded, from prompt 2"
    said = refused(trace.main, str(prompts), "--skip", "3", "--device", "cpu")
    assert "--skip 3 leaves none of the prompts" in said


def test_the_command(tmp_path, capsys):
    out = tmp_path / "t.json"
    assert trace.main(["--prompts", "1", "--tokens", "9", "--device", "cpu", "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, trace_file.read(out)
    assert "recorded from embedded" in said and "one-pass" in said and "one earlier" in said
    (line,) = [line for line in said.splitlines() if "lookup" in line]
    assert line.split()[-1] == line.split()[-2], "one pass a cycle"
    assert found.checkpoint == "embedded" and found.made["tokens"] == 9 and found.texts[0].tokens == 9
    with pytest.raises(SystemExit):
        trace.main(["--prompts", "0"])


def test_traces_that_cannot_be_replayed_together(embedded, tmp_path):
    """Before any model is made; --strong takes a greedy trace."""
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        trace_file.write(path, embedded[2])
    with pytest.raises(InputError, match="a.json and .*b.json are both of embedded"):
        list(replay.traces(Namespace(replay=paths, strong=False)))
    trace_file.write(paths[0], dataclasses.replace(embedded[2], temperature=0.5))
    given = Namespace(replay=paths[:1], strong=True, shape=None, prompts=1, tokens=9)
    with pytest.raises(InputError, match="of a greedy trace"):
        list(replay.traces(given))
    one = Text(3, {kind: [1] for kind in KINDS})
    trace_file.write(paths[1], dataclasses.replace(embedded[2], texts=[one]))
    with pytest.raises(InputError, match="b.json: the trace's texts end"):
        list(replay.traces(Namespace(replay=paths[1:], strong=False)))


def test_a_model_without_a_diffusion_view_is_refused():
    with pytest.raises(InputError):
        record(small_model(block_size=0, mask_token_id=None), [[5, 6]], 3, "plain")
