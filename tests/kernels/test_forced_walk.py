"""bench's forced walks: the record and state of `walk_triton`, with the counts of a table, and whole
decoding that keeps what a trace says."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from scripted import ScriptedModel
from small import small_config, small_model

from bench import replay
from bench.forced_walk import WIDTH, Forced, Found, evenly, forced_walk, found_by_lookup, recorded, walk
from bench.replay import Measured, Way, run, tables, with_bigram
from bench.trace_file import CHAIN, KINDS, LOOKUP, ONE_PASS, TREES, Text, Trace, followed
from orthrus_kernels.allot import allot_triton
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import RECORD, Record, State
from orthrus_kernels.plan import PassPlan, PassShape
from orthrus_kernels.walk import walk_triton
from qwen3_model import Engine, InputError, Request
from qwen3_model.decode.controller import CHAIN as CHAIN_KIND
from qwen3_model.decode.controller import PLAIN
from qwen3_model.decode.one_pass import Shape
from qwen3_model.request import STRATEGIES


def table(values, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def walked(step, n, state, choices, tokens, rows=0, **more):
    """(states, accepted, start, record) after a cycle over a chain of the text in slot 1, whose root stands
    in row `rows`; n: nodes of a tree at most."""
    accepted, start, record = table([[9] * n]), table([-5]), table([[77] * (RECORD + 3 * n)])
    state, length = table([[3] * len(State), state]), len(tokens)
    numbers = [i / 3 for i in range(-rows, length)]
    step(
        state, table([1]), table([rows, rows + length]), table([0] * rows + tokens, torch.int64),
        table([-1] * rows + [-1, *range(rows, rows + length - 1)]), table([0] * rows + choices, torch.int64),
        table(numbers, torch.float32), table([2.0] * len(numbers), torch.float32), table([[-1], [-1]]),
        table([[0] * 99] * 2), accepted, start, record, **more,
    )  # fmt: skip
    return [x.flatten().tolist() for x in (state[1], state[0], accepted, start, record)]


@settings(max_examples=60)
@given(
    n=st.integers(1, 70), at=st.integers(0, 4), left=st.integers(0, 40), room=st.integers(0, 40),
    rows=st.sampled_from([0, 0, 3]), again=st.integers(0, 2), data=st.data(),
)  # fmt: skip
def test_it_writes_what_a_walk_of_as_many_tokens_would(n, at, left, room, rows, again, data):
    """On a chain, where accepted nodes are those of any walk; of the second slot, in any rows. With nothing
    left the text is finished; where its pages end it is not. A table is taken again from its begin."""
    count = data.draw(st.integers(1, min(n, WIDTH)))
    tokens = list(range(100, 100 + n))
    choices = tokens[1:count] + [7] * (n - count + 1)
    state = [20 + at, 100, left, int(left == 0), 20 + at + room, n]
    paths = [[[0] + [-1] * (WIDTH - 1)] * 5, [[0] + [-1] * (WIDTH - 1)] * 5]
    paths[1][at] = list(range(count)) + [-1] * (WIDTH - count)
    run = n + 2, state, choices, tokens, rows
    forced = walked(forced_walk, *run, paths=table(paths), texts=table([[0, 99], [1, 20 - again * 5]]))
    assert forced == walked(walk_triton, *run)
    *_, record = forced
    assert record[Record.KEPT] == min(count, left, room) and record[Record.NODES] == n
    assert record[Record.DRAFTED] == 77, "whether it is drafted is not its to say"


@pytest.mark.parametrize("drafted", [0, 1])
def test_a_cycle_without_a_draft_keeps_one_token(drafted):
    """At its root, whatever the trace says; with one, the walk of a one-pass tree ends there."""
    n, paths = 4, table([[[1, 2, 0] + [-1] * (WIDTH - 3)]])
    accepted, start, record = table([[9] * n]), table([0]), table([[0] * (RECORD + 3 * n)])
    record[0, Record.DRAFTED] = drafted
    state, choices, sums = table([[20, 5, 9, 0, 99, 9]]), table([6, 7, 8, 9], torch.int64), table([0.0] * n)
    seat, sums = (table([0]), table([0, n])), sums.float()
    forced_walk(state, *seat, choices, accepted, choices, sums, sums, start, start, accepted, start, record,
                paths=paths, texts=table([[0, 20]]))  # fmt: skip
    kept = 3 if drafted else 1
    assert state[0, :4].tolist() == [20 + kept, 6, 9 - kept, 0]
    assert record[0, : Record.BEGAN].tolist() == [kept, 0, 0, drafted, n]
    assert accepted[0].tolist() == ([1, 2, 0, -1] if drafted else [0, -1, -1, -1])
    assert record[0, RECORD:][:kept].tolist() == ([7, 8, 6] if drafted else [6])


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), kept=st.integers(0, 2**9 - 1),
    left=st.integers(1, 9), data=st.data(),
)  # fmt: skip
def test_each_seat_has_the_walk_of_the_text_in_its_slot(counts, kept, left, data):
    """Trees of several sizes, seats without a text among them: each has what it has alone, and keeps the
    nodes of its row that its tree has, without gaps. What belongs to no seat stays as it is."""
    seats, n = len(counts), 9
    slots = data.draw(st.permutations(range(seats)))
    slots = [slot if count else -1 for slot, count in zip(slots, counts, strict=True)]
    rows = [sum(counts[:b]) for b in range(seats + 1)]
    row = [node for node in range(n) if kept >> node & 1]
    paths = [[(row[i:] + row[:i]) + [-1] * (WIDTH - len(row))] for i in range(seats)]
    paths = table(paths)
    texts = table([[seats - 1 - slot, 0] for slot in range(seats)])
    state = table([[10 * slot, 50 + slot, left, 0, 99, 9] for slot in range(seats)])
    choices, sums = table(range(100, 101 + rows[-1]), torch.int64), table([0.5] * (rows[-1] + 1)).float()

    def step(state, slots, first):
        many = len(slots)
        accepted, start = table([[-7] * n] * many), table([-5] * many)
        record = table([[77] * (RECORD + 3 * n)] * many)
        seats = state, table(slots), table(first)
        forced_walk(*seats, choices, accepted, choices, sums, sums, start, start, accepted, start, record,
                    paths=paths, texts=texts)  # fmt: skip
        return accepted, start, record

    together = state.clone()
    accepted, start, record = step(together, slots, rows)
    for b, slot in enumerate(slots):
        if slot < 0:
            assert accepted[b].tolist() == [-1] * n and start[b] == -5
            assert record[b, Record.KEPT] == 0 and record[b, RECORD:].tolist() == [77] * 3 * n
            continue
        alone = state.clone()
        mine = step(alone, [slot], rows[b : b + 2])
        assert all(torch.equal(a[b], c[0]) for a, c in zip((accepted, start, record), mine, strict=True))
        assert torch.equal(together[slot], alone[slot])
        of_text = [x for x in paths[seats - 1 - slot, 0].tolist() if 0 <= x < counts[b]][:left]
        assert accepted[b].tolist() == [rows[b] + x for x in of_text] + [-1] * (n - len(of_text))
        assert record[b, RECORD + 2 * n :][: len(of_text)].tolist() == of_text
        root = 100 + rows[b] + of_text[-1] if of_text else 50 + slot
        assert together[slot, : State.FINISHED].tolist() == [
            10 * slot + len(of_text), root, left - len(of_text)
        ]  # fmt: skip
    idle = [slot for slot in range(seats) if slot not in slots]
    assert torch.equal(together[idle], state[idle])


@given(steps=st.lists(st.integers(0, 15), min_size=4, max_size=4))
def test_a_walk_tells_what_the_trace_says_of_smaller_trees(steps):
    kept = [1 + sum(steps[: i + 1]) for i in range(4)]
    for kind, sizes in zip(TREES, range(1, 5), strict=True):
        nodes = walk(kept[:sizes])
        assert len(nodes) == kept[sizes - 1] and nodes == sorted(set(nodes)) and nodes[-1] <= kind
        assert [sum(node <= size for node in nodes) for size in TREES[:sizes]] == kept[:sizes]


TEXTS = [
    Text(2, {CHAIN: [2, 1, 3, 1, 2, 1], "15": [3, 1, 2, 4, 1, 1], "31": [4, 2, 2, 4, 2, 1],
             "63": [4, 2, 2, 4, 2, 1], "127": [4] * 6, ONE_PASS: [1, 2, 1, 2, 1, 1],
             LOOKUP: [1, 3, 1, 2, 1, 1]}),
    Text(3, {kind: [2, 3, 1, 1] for kind in KINDS}),
]  # fmt: skip
TRACE = Trace("tiny", 8, 8, True, TEXTS, [])
OLD = replace(TRACE, texts=[
    replace(text, kept={kind: kept for kind, kept in text.kept.items() if kind != LOOKUP}) for text in TEXTS
])  # fmt: skip


@pytest.fixture()
def model():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if DEVICE == "cpu" else {}
    found = small_model("float32", backend="triton", device=DEVICE, num_hidden_layers=1, block_size=4,
                        eos_token_ids=(), **heads)  # fmt: skip
    return with_bigram(found, 4)


def test_decoding_keeps_what_the_trace_says(model):
    """Of two texts, in turn with every way; blocks stand at all nodes of the one-pass tree. Where one token
    is left the cycle is plain."""
    compared = [Way("plain", "autoregressive", 0), Way("two-pass chain", "two-pass", 0),
                Way("tree", "two-pass", 15), Way("one-pass", "one-pass", 3, 3), replay.LOOKED_UP]  # fmt: skip
    found = run(model, TRACE, 2, 6, compared)
    for measured, kind in zip(found, (None, CHAIN, "15", ONE_PASS, LOOKUP), strict=True):
        steps = [followed(text, kind) if kind else [1] * (text.tokens - 1) for text in TEXTS]
        assert measured.tokens == [5, 3] and measured.cycles == [len(of_text) for of_text in steps]
        # a GPU launches a cycle before the host knows that one token is left
        last = 0 if DEVICE == "cuda" else 1
        plain = [last * int(kept[-1] == 1) if kind else len(kept) for kept in steps]
        both = 2 if kind in (CHAIN, "15") else 1
        forwards = [both * len(kept) - (both - 1) * n for kept, n in zip(steps, plain, strict=True)]
        assert measured.forwards == forwards and measured.cycles_of["plain"] == sum(plain)
    two, one = (sum(found[way].cycles) - found[way].cycles_of["plain"] for way in (2, 3))
    assert found[2].nodes == 15 * two and model.engine.runner is None
    assert found[3].nodes == 3 * (one - 2), "the first one of a text has no draft"
    looked_up = sum(found[4].cycles) - found[4].cycles_of["plain"]
    assert found[4].cycles_of["lookup"] == looked_up > 2 and found[4].nodes == 15 * looked_up
    rows = [measured.row("tiny", TRACE) for measured in found]
    assert rows[1]["tokens_per_cycle"] == 2.0
    assert DEVICE == "cuda" or rows[2]["tokens_per_forward"] == 1.1429
    ((title, head, lines),) = tables(rows)
    assert "tiny" in title and all(line[1] == "acceptance replayed" for line in lines)
    assert len(lines[0]) == len(head) and lines[0][-2] == "1.00x"


def test_an_engine_of_several_slots_keeps_what_the_trace_says(model):
    """Four texts in three slots, three of them beside an empty seat; the fourth joins when one has left. The
    last is the first recorded text again."""
    engine = Engine(model, 3, 3 * 64)
    texts = [*TEXTS, Text(2, {kind: [1, 2, 1, 3, 1] for kind in KINDS})]
    engine.runner_for(1).cycles.force(Forced(model.device, 3, recorded(texts, 6)))
    of = [0, 1, 2, 0]
    running = [
        engine.submit([1 + i, 2, 3][: 2 + i % 2],
                      Request(max_new_tokens=texts[n].tokens, strategy="two-pass", tree_nodes=0))
        for i, n in enumerate(of)
    ]  # fmt: skip
    while not all(text.finished for text in running):
        engine.step()
    for n, text in zip(of, running, strict=True):
        kept, found = followed(texts[n], CHAIN), text.result().stats.accepted_histogram
        assert found == [kept.count(1 + size) for size in range(max(kept))], n


class Untimed(Forced):
    """On a CPU the host has the time, and no kernel."""

    def walk(self, kind, block):
        step = super().walk(kind, block)
        return lambda *given, timed: step(*given)


@pytest.mark.skipif(DEVICE != "cpu", reason="a scripted model is on a CPU")
def test_auto_goes_by_what_the_trace_says_of_lookup():
    """Not by the tokens that random weights choose, which repeat nothing; where a trace does not know lookup,
    auto does not choose it."""
    text = Text(2, {kind: [1] * 40 for kind in KINDS} | {LOOKUP: [5, 1, 1, 1, 1] * 8})
    old = replace(text, kept={kind: kept for kind, kept in text.kept.items() if kind != LOOKUP})
    model = ScriptedModel(small_config(eos_token_ids=()), skill=0.0)
    for of in (text, old):
        engine, looks = Engine(model), LOOKUP in of.kept
        forced = Untimed(torch.device("cpu"), 1, recorded([of], 40), found_by_lookup([of], 40))
        engine.runner_for(64).cycles.force(forced)
        stats = engine.generate([3, 4], Request(max_new_tokens=40)).stats
        assert forced.looks == looks == ("lookup" in stats.cycles_of)
        assert stats.cycles < 25 if looks else stats.cycles == 39
        assert stats.accepted_histogram == ([stats.cycles] if not looks else stats.accepted_histogram[:5])
    running = SimpleNamespace(tokens=[3, 4, 5], prompt=2)
    found = Found(running, text.kept[LOOKUP])
    assert found.follow(16, 0) == ([], 1, 0), "behind the prompt its first token is known"
    running.tokens += [9] * 4
    assert found.follow(16, 0) == ([], 5, 0)
    running.tokens += [9]
    assert found.follow(16, 0) == ([5], 1, 5), "it has ended with the token that is known last"
    running.tokens += [9] * 2
    assert found.follow(16, 0) == ([], 3, 0), "three of the next five"
    assert Found(running, text.kept[LOOKUP]).follow(3, 0) == ([3, 1, 1], 3, 5), "of three rows"


@dataclass(eq=False)
class Running:
    limit: int
    request: SimpleNamespace


def test_texts_that_join_one_after_another_keep_what_the_trace_says():
    """In an engine of three slots, in slots that others have left: each text has the table of its number, and
    one that begins again has its own."""
    ended = Text(3, {kind: [2] * 4 for kind in KINDS})
    forced = Forced(torch.device(DEVICE), 3, recorded([*TEXTS, ended], 6))
    running = [Running(40 + i, SimpleNamespace(max_new_tokens=20)) for i in range(4)]

    def kept(slot, base, kind, at):
        n, state = 32, table([[0] * len(State)] * slot + [[base + at, 5, 9, 0, 99, 32]] * (3 - slot))
        accepted, start, record = table([[9] * n]), table([0]), table([[1] * (RECORD + 3 * n)])
        choices, sums = table([7] * n, torch.int64), table([0.0] * n, torch.float32)
        seats = state, table([slot]), table([0, n])
        forced.walk(kind, 4)(
            *seats, choices, accepted, choices, sums, sums, start, start, accepted, start, record
        )
        return int(record[0, Record.KEPT])

    def counts(slot, text, kind):
        return [kept(slot, running[text].limit - 20, kind, at) for at in range(4)]

    forced.begin(running[0], 1)
    assert counts(1, 0, 31) == TEXTS[0].kept["31"][:4]
    forced.begin(running[1], 0)
    forced.begin(running[2], 1)  # where the first one was
    assert counts(0, 1, 31) == TEXTS[1].kept["31"] and counts(1, 2, CHAIN_KIND) == [2] * 4
    forced.begin(running[3], 2)  # one after the last is the first
    assert counts(2, 3, Shape(19, 20)) == TEXTS[0].kept[ONE_PASS][:4] and counts(2, 3, PLAIN) == [1] * 4
    forced.begin(running[1], 1)  # it was preempted
    assert counts(1, 1, CHAIN_KIND) == TEXTS[1].kept[CHAIN]


def test_ctrl_c_ends_a_replay(model, monkeypatch):
    """In the prefill too. A run of the command keeps whole sets; half a text has no speed."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for what in ("new_pass", "states"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model, what, interrupted)
            run(model, TRACE, 2, 6, [Way("plain", "autoregressive", 0)])


def test_what_a_run_that_is_cut_short_keeps(monkeypatch, tmp_path, capsys):
    file, way = tmp_path / "r.json", Way("plain", "autoregressive", 0)
    sets = iter([[Measured(way, [2.0], [9], [9], [9], 0)], None])

    def measured(*args):
        found = next(sets)
        if found is None:
            raise KeyboardInterrupt
        return found

    other = replace(TRACE, checkpoint="other")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(replay, "machine", lambda command: {"gpu": "one", "command": command})
    monkeypatch.setattr(replay, "machine_line", lambda facts: facts["gpu"])
    monkeypatch.setattr(replay, "random_model", lambda name: small_model())
    monkeypatch.setattr(replay, "traces", lambda given: iter([OLD, other]))
    monkeypatch.setattr(replay, "run", measured)
    with pytest.raises(KeyboardInterrupt):
        replay.main(
            Namespace(
                models=["8B"], trees=[63], selectors=[0, 3], prompts=1, tokens=9, json=file, contexts=[20, 50]
            )
        )
    kept = json.loads(file.read_text())
    assert [row["of"] for row in kept["rows"]] == ["tiny"] and kept["sets_left_out"] == 7
    assert kept["rows"][0]["model"] == "8B, prompts of 20 tokens" and kept["rows"][0]["context"] == 20
    assert [trace["checkpoint"] for trace in kept["traces"]] == ["tiny", "other"]
    said = capsys.readouterr().out
    assert "4.5" in said and "no line of lookup: the trace is older" in said


def test_a_random_selector_ranks_too(model):
    """Cycles keep what the trace says; what they draft is another thing."""
    drafts = []
    for selected in (0, 3):
        with_bigram(model, 4, selected)
        (found,) = run(model, TRACE, 1, 6, [Way("tree", "two-pass", 15)])
        drafts.append((model.bigram.before.shape[1], found.cycles))
    assert [width for width, _ in drafts] == [4, 7] and drafts[0][1] == drafts[1][1]


@pytest.mark.parametrize("context, long", [(None, TRACE.texts[0].prompt_tokens), (19, 19)])
def test_prompts_of_another_length(model, monkeypatch, context, long):
    """They decode behind a longer cache; what cycles keep is as recorded."""
    given, generate = [], type(model).generate

    def noted(self, prompt, *args, **kwargs):
        given.append(len(prompt))
        return generate(self, prompt, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", noted)
    (found,) = run(model, TRACE, 1, 6, [Way("tree", "two-pass", 15)], context)
    assert set(given) == {long} and found.tokens[0] == 5


def test_what_cannot_be_replayed_is_refused(model):
    plain = small_model()
    with pytest.raises(InputError, match="on a GPU"):
        run(plain, TRACE, 1, 4, replay.ways(TRACE))
    short = Trace("tiny", 8, 8, True, [Text(2, {kind: [1] for kind in KINDS})], [])
    with pytest.raises(InputError, match="first token"):
        run(model, short, 1, 4, replay.ways(TRACE))


def test_ways_are_of_every_strategy_and_have_the_shape_of_the_trace():
    """Without lookup where the trace lacks it, which is said."""
    assert {way.strategy for way in replay.ways(TRACE)} == set(STRATEGIES)
    assert replay.ways(OLD) == [way for way in replay.ways(TRACE) if way.strategy != "lookup"]
    assert replay.without_lookup(TRACE) == [] and len(replay.without_lookup(OLD)) == 1
    (said,) = replay.without_lookup(replace(OLD, simulated="a curve"))
    assert "simulated texts" in said
    assert {way.tree_nodes for way in replay.ways(TRACE, TREES)} == {0, *TREES, "auto"}
    shaped = [
        Trace("strong", 8, 8, True, TEXTS, [], "simulated", {"one_pass": asdict(shape)})
        for shape in (Shape.of(24, 11), Shape.of(8, 19))
    ]
    assert replay.ways(shaped[0])[-2:] == [Way("one-pass", "one-pass", 11, 24), replay.ways(TRACE)[-1]]
    assert replay.ways(shaped[1]) == replay.ways(TRACE)


def test_texts_share_the_rows_of_a_pass_evenly():
    """Whatever the scores of random weights say; nothing else changes. The third seat is empty."""
    seats, n, rows = 4, 7, 12
    generator = torch.Generator().manual_seed(2)
    scores = -torch.rand(seats, n, generator=generator).cumsum(1).to(DEVICE)
    trees = Trees.new(seats, n, DEVICE)
    trees.scores.copy_(scores)
    columns = [torch.zeros(rows, dtype=kind, device=DEVICE) for kind in [torch.int64] * 2 + [torch.int32] * 3]
    state = table([[0, 7, 9, 0, 99, 1 << 15]] * seats)
    plan, first = PassPlan(PassShape(rows, rows, rows, n, seats), *columns, state[:, 0]), table([-7] * 5)
    for by_scores, counts in ((allot_triton, None), (evenly(allot_triton), [4, 4, 0, 4])):
        by_scores(plan, first, trees, state, table([2, 0, -1, 3]))
        found = first.diff().tolist()
        assert found == counts if counts else found != [4, 4, 0, 4], found
        assert torch.equal(trees.scores, scores)
