"""Strategy "auto": tokens a second against every fixed kind, on recorded texts and on made-up ones."""

import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.forced_walk import walks
from bench.trace import looked_up
from bench.trace_file import read
from orthrus_kernels import draft_tree
from qwen3_model.decode import controller
from qwen3_model.decode.controller import (
    AWAKE,
    CHAIN,
    FIRST_FOUND,
    LAST_TIMES,
    LOOK,
    LOOKUP,
    LOSS,
    PLAIN,
    ROUNDS,
    TREES,
    TWIN_TIMES,
    WALKED,
    WALKS,
    Controller,
    Times,
    measured_times,
)
from qwen3_model.decode.cycle import IN_FLIGHT
from qwen3_model.decode.foreseen import Followed, Foreseen
from qwen3_model.decode.groups import MOST_ROWS
from qwen3_model.decode.kinds import OWN_ROWS, SHARED_ROWS, seat_counts, trees_for

RESULTS = Path(__file__).parents[1] / "bench/results"
KINDS = (PLAIN, *TREES)
# ms of a cycle of each kind, 2026-11-27: bench/results/replay-*, decode-* and budget-*.json.
TIMES = {
    "8B H100": {PLAIN: 6.0, 31: 12.7, 63: 13.4},
    "8B H200": {PLAIN: 4.49, 31: 9.65, 63: 10.37},
    "1.7B H100": {PLAIN: 1.81, 31: 4.19, 63: 4.60},
    "1.7B H200": {PLAIN: 1.50, 31: 3.55, 63: 4.04},
    "0.6B H200": {PLAIN: 0.926, 31: 2.26, 63: 2.53},
    "embedded H100": {PLAIN: 0.170, 31: 0.400, 63: 0.470},
}
SMALL = TIMES["1.7B H100"]
# The same beside lookup, 2026-11-30 (bench/LOG.md, 151).
LOOKUP_TIMES = {
    "8B H200": {PLAIN: 4.30, LOOKUP: 4.47, 31: 9.25, 63: 9.55},
    "0.6B H200": {PLAIN: 0.95, LOOKUP: 1.07, 31: 2.39, 63: 2.65},
}


@cache
def recorded(name):
    """Texts, each as the walks of every kind from each of its tokens."""
    texts = [text for text in read(RESULTS / f"trace-{name}.json").texts if text.tokens > 1]
    return [{kind: walks(kind, text.kept, text.tokens) for kind in KINDS} for text in texts]


def made_up(tokens, kept):
    """A text whose trees all keep so many tokens."""
    return {PLAIN: [[0]] * tokens} | {kind: [list(range(kept))] * tokens for kind in TREES}


def rate(costs, texts, choose=None, clock=None, first=None):
    """(tokens a ms through texts from begin to end, kinds of the cycles). choose: a kind; None: a controller,
    which learns of a cycle when the next one is launched, as on the device. clock: what it is told that a
    cycle of a kind took. first: its first times."""
    total, spent, before, kinds = 0, 0.0, None, []
    times = Times({kind: (first or costs)[kind] for kind in costs})
    for text in texts:
        before, at, unread = Controller(times, before), 0, None
        while at < len(text[PLAIN]):
            kind = before.next() if choose is None else choose
            if unread is not None:
                before.observe(*unread)
                times.observe(unread[0], clock(unread[0]) if clock else costs[unread[0]])
            path = text[kind][at][: len(text[PLAIN]) - at]
            unread = kind, path
            total, spent, at = total + len(path), spent + costs[kind], at + len(path)
            kinds.append(kind)
    return total / spent, kinds


def best(costs, texts):
    return max(rate(costs, texts, kind)[0] for kind in costs)


def shuffled(texts, seed):
    return random.Random(seed).sample(texts, len(texts))


@pytest.mark.parametrize("name", ["predictable", "h100", "noise", "unseen"])
@pytest.mark.parametrize("of", TIMES)
def test_near_the_best_kind_on_recorded_texts(of, name):
    """In three orders, timed by a clock: cycles scatter by 0.5 %, one in a hundred is held up."""
    costs, shares = TIMES[of], []
    for seed in range(3):
        rng, texts = random.Random(seed), shuffled(recorded(name), seed)

        def clock(kind, rng=rng):
            return costs[kind] * rng.gauss(1, 0.005) * (rng.uniform(1.2, 4) if rng.random() < 0.01 else 1)

        shares.append(rate(costs, texts, clock=clock)[0] / best(costs, texts))
    assert min(shares) > 0.97 and sum(shares) / 3 > 0.98, shares


@pytest.mark.parametrize("of", TIMES)
def test_a_text_that_cannot_be_drafted_costs_little(of):
    """Behind one that can be: the first tokens tell, then a draft at times takes 2 % at most."""
    costs = TIMES[of]
    times = Times(costs)
    one, kinds, spent = Controller(times), [], 0.0
    for i in range(3000):
        kind = one.next()
        one.observe(kind, None if kind == PLAIN else [0])
        times.observe(kind, costs[kind])
        kinds.append(kind)
        spent += costs[kind] if i >= 100 else 0.0
    assert PLAIN not in kinds[:2], "a first text begins with drafts"
    tried = [i for i, kind in enumerate(kinds) if kind != PLAIN and i >= 100]
    assert (1 - LOSS) * spent < 2900 * costs[PLAIN] < spent, "bounded, and tried at all"
    assert {kinds[i] for i in tried} == set(TREES), "in turn"
    assert max(b - a for a, b in zip(tried, tried[1:], strict=False)) < 1 + 2 / LOSS


def test_it_follows_a_text_that_changes():
    """Noise, then code, then noise: plain cycles, trees, plain cycles."""
    bad, good = made_up(400, 1), recorded("predictable")[0]
    _, kinds = rate(SMALL, [bad, good, bad])
    first, last = kinds[:350], kinds[-250:]
    assert first.count(PLAIN) > 330 and last.count(PLAIN) > 230
    drafts = [i for i, kind in enumerate(kinds[380:-380]) if kind != PLAIN]
    assert len(drafts) > 20 and drafts[-1] - drafts[0] < 1.2 * len(drafts)


def test_what_was_learnt_stays_for_the_next_text():
    """Texts too short for a try of their own: plain from the first cycle on, tried all the same."""
    short, many = made_up(10, 1), 40
    _, kinds = rate(SMALL, [made_up(60, 1)] + [short] * many)
    behind = kinds[-10 * many :]
    assert 0 < len(behind) - behind.count(PLAIN) <= 1 + LOSS * 10 * many
    times = Times(SMALL)
    old = Controller(times)
    for _ in range(300):
        old.observe(63, [0, *range(1, 4), *range(40, 44)])
    new = Controller(times, old)
    assert new.tokens(63) == old.tokens(63) == pytest.approx(8, rel=0.05)
    assert new.tokens(31) == pytest.approx(4, rel=0.01) and new.next() == 63
    new.observe(31, [0])
    assert old.tokens(31) == pytest.approx(4, rel=0.01), "texts that run together learn apart"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [0.5, 1.4, 10.0])
def test_a_time_that_was_wrong_is_found(kind, wrong):
    """On a text of which the kind is the best, or nearly: LOOK cycles three times over, then all is well."""
    costs = SMALL | {63: 4.3}
    texts = [made_up(1000, 1)] * 4 if kind == PLAIN else [made_up(1000, 4)] * 20
    right, kinds = rate(costs, texts)
    mended, found = rate(costs, texts, first=costs | {kind: wrong * costs[kind]})
    late = 4 * LOOK
    assert found[late:].count(kind) > 0.9 * kinds[late:].count(kind)
    assert mended > 0.7 * right


def test_cycles_that_were_held_up_do_not_count():
    """Two of the last LAST_TIMES say nothing, three do; what is not measured leaves the time as it is."""
    times = Times(SMALL)
    times.observe(31, 900.0), times.observe(31, 900.0), times.observe(31, None)
    assert times[31] == SMALL[31] and LAST_TIMES == 5
    times.observe(31, 5.0)
    assert times[31] == 5.0
    assert times.unused(31) == 0 and times.unused(PLAIN) == times.unused(63) == 4


def test_a_kind_whose_cycles_are_not_timed_does_not_take_all_turns():
    """As the first two of each kind in a new room, which are not replays of a graph."""
    _, kinds = rate(SMALL, [made_up(4000, 4)], clock=lambda kind: None if kind == 63 else SMALL[kind])
    assert 2 <= kinds.count(63) <= 4 * len(kinds) / LOOK + 2 and kinds.count(PLAIN) >= 2


def test_on_the_twins_chains_run_where_they_pay():
    for kept, wanted in ((4, CHAIN), (1, PLAIN)):
        one, kinds = Controller(Times(TWIN_TIMES)), []
        for _ in range(300):
            kinds.append(one.next())
            one.observe(kinds[-1], None if kinds[-1] == PLAIN else list(range(kept)))
        late = kinds[20:]
        assert kinds[0] == CHAIN and late.count(wanted) >= (1 - LOSS) * len(late)


def followed(costs, tokens, tree, first=10):
    """(ms, kinds of the cycles) of a text whose tokens are known, behind its `first` ones: lookup keeps what
    it finds, trees as many tokens as `tree` says of each root."""
    kept, at, spent, kinds, unread = looked_up(tokens, 0), first, 0.0, [], 0
    times, known = Times(costs), tokens[: first + 1]
    one = Controller(times, None, Foreseen(known))
    while at < len(tokens) - 1:
        kinds.append(one.next())
        size = {PLAIN: 1, LOOKUP: kept[at]}.get(kinds[-1], tree(at))
        known += tokens[len(known) : len(known) + unread]  # of the cycle before, as on the device
        one.observe(kinds[-1], None if kinds[-1] == PLAIN else list(range(size)))
        times.observe(kinds[-1], costs[kinds[-1]])
        unread = min(size, len(tokens) - 1 - at)
        at, spent = at + unread, spent + costs[kinds[-1]]
    return spent, kinds


@pytest.mark.parametrize("of", LOOKUP_TIMES)
def test_lookup_runs_while_a_text_repeats_itself(of):
    """Noise of which trees get a token more, then a loop, then noise again."""
    rng, costs = random.Random(1), LOOKUP_TIMES[of]
    noise = [rng.randrange(10**5) for _ in range(500)]
    loop = [5, 6, 7, 8, 9] * 100
    text = noise[:250] + loop + noise[250:]
    spent, kinds = followed(costs, text, lambda at: 3)
    looked = [i for i, kind in enumerate(kinds) if kind == LOOKUP]
    assert kinds[0] in TREES and 80 < looked[0] < 80 + 8, "240 tokens by trees, and few of the loop"
    assert 30 <= len(looked) <= 30 + 40, "16 tokens each, and of the noise until what was found has aged"
    assert looked[-1] - looked[0] < len(looked) + 4 and set(kinds[looked[-1] + 1 :]) <= {*TREES, PLAIN}
    fixed = [followed({kind: costs[kind]}, text, lambda at: 3)[0] for kind in costs]
    assert spent < 0.8 * min(fixed)


@pytest.mark.parametrize("of", LOOKUP_TIMES)
def test_a_text_that_nobody_drafts_costs_little_beside_lookup_too(of):
    """Nothing is found in noise, and it is known without a cycle of lookup."""
    rng, costs = random.Random(2), LOOKUP_TIMES[of]
    text = [rng.randrange(10**5) for _ in range(3000)]
    spent, kinds = followed(costs, text, lambda at: 1)
    assert (1 - LOSS) * spent < len(kinds) * costs[PLAIN] * 1.01
    assert set(kinds[1000:]) == {PLAIN, LOOKUP, *TREES}, "tried all the same"
    assert kinds.count(LOOKUP) < 3000 / LOOK + 20


class Told:
    """Foresees what it is told to."""

    def __init__(self, *kept, at_least=0, prompt=0):
        self.kept, self.at_least, self.unread, self.calls = kept, at_least, prompt, 0

    def follow(self, rows, most):
        walked, self.calls = min(self.unread, most), self.calls + 1
        self.unread -= walked
        kept, self.kept = self.kept, ()
        return Followed(kept, self.at_least, walked)


def test_trees_are_tried_beside_lookup():
    """Where it keeps two tokens a cycle, and trees one, then seven: one try tells."""
    times, told = Times(LOOKUP_TIMES["8B H200"]), Told()
    one, kinds = Controller(times, None, told), []
    for i in range(2000):
        told.kept = (2,)
        kinds.append(one.next())
        times.observe(kinds[-1], None)
        one.observe(kinds[-1], None if kinds[-1] <= PLAIN else list(range(7 if i > 1000 else 1)))
    tried = [i for i, kind in enumerate(kinds) if kind in TREES and 100 < i <= 1000]
    assert kinds[100:1000].count(LOOKUP) > 870 and {kinds[i] for i in tried} == set(TREES)
    late = [kind for kind in kinds[1100:] if kind in TREES]
    assert len(late) > 0.95 * 900


def test_what_lookup_keeps_is_its_own():
    """Trees learn nothing from its cycles, nor it from theirs; the next text begins with it; the cycle that
    has not ended counts where it is the better one."""
    times = Times(LOOKUP_TIMES["8B H200"])
    old = Controller(times, None, Told(*[4] * 90))
    assert old.tokens(LOOKUP) == FIRST_FOUND
    trees = old.tokens(31), old.tokens(63)
    old.next()
    assert old.tokens(LOOKUP) == pytest.approx(4, rel=0.01) and (old.tokens(31), old.tokens(63)) == trees
    old.observe(LOOKUP, list(range(9)))
    assert (old.tokens(31), old.tokens(63)) == trees and old.next() == LOOKUP
    new = Controller(times, old, Told())
    assert new.tokens(LOOKUP) == old.tokens(LOOKUP)
    new.observe(63, list(range(9)))
    assert new.tokens(LOOKUP) == old.tokens(LOOKUP) and new.tokens(31) > trees[0]
    for at_least, more in ((0, False), (3, False), (12, True)):
        one = Controller(times, old, Told(at_least=at_least))
        one.next()
        assert (one.tokens(LOOKUP) > old.tokens(LOOKUP)) == more


def test_a_text_that_asks_for_no_lookup_takes_none():
    """Beside one that does it takes what suits both."""
    times = Times(LOOKUP_TIMES["8B H200"])
    asks, other = Controller(times, None, Told(*[16] * 20)), Controller(times)
    assert [other.next() for _ in range(3 * LOOK)].count(LOOKUP) == 0
    assert other.next(asks) == LOOKUP == asks.next(other)
    trees = Controller(times)
    for _ in range(300):
        trees.observe(31, [0])
    others = [Controller(times, trees) for _ in range(3)]  # nobody drafts them
    asks = Controller(times, None, Told(*[2] * 60))
    kinds = [asks.next(*others) for _ in range(LOOK)]  # 5 tokens in 4.47 ms, or 4 in 4.30
    assert kinds.count(LOOKUP) > 0.9 * len(kinds), "a cycle of lookup keeps a token of each of them"


def test_what_a_step_walks_over_is_bounded():
    """Of many texts some in turn, and of a long prompt what shorter ones leave."""
    times = Times(LOOKUP_TIMES["8B H200"])
    told = [Told() for _ in range(64)]
    first, *beside = [Controller(times, None, one) for one in told]
    for step in range(1, 9):
        first.next(*beside), times.observe(PLAIN, None)
        assert sum(one.calls for one in told) == step * WALKS
    assert {one.calls for one in told} == {1}
    told = longest, short, long = Told(prompt=2 * WALKED), Told(prompt=9), Told(prompt=WALKED)
    first, *beside = [Controller(times, None, one) for one in told]
    for unread in ((2 * WALKED, 0, 9), (WALKED + 9, 0, 0), (9, 0, 0), (0, 0, 0)):
        first.next(*beside)
        assert (longest.unread, short.unread, long.unread) == unread


@given(kind=st.sampled_from(TREES), sure=st.floats(0.2, 4), seed=st.integers(0, 10**6))
def test_a_walk_tells_what_a_smaller_tree_would_keep(kind, sure, seed):
    """One text, which a target and trees of both sizes from the same distributions see."""
    generator = torch.Generator().manual_seed(seed)
    depth = 31
    logits = sure * torch.randn(depth, 16, generator=generator).sort(-1, descending=True).values
    scores, ids = logits.log_softmax(-1), torch.arange(16).expand(depth, 16)
    text = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0].tolist() + [16]

    def walk(nodes):
        tree, path = draft_tree(0, scores, ids, nodes), [0]
        while agreed := [
            i for i, p in enumerate(tree.parents) if p == path[-1] and tree.tokens[i] == text[len(path) - 1]
        ]:
            path += agreed[:1]
        return path

    one, other = (Controller(Times(SMALL)) for _ in range(2))
    one.observe(kind, walk(kind)), other.observe(TREES[0], walk(TREES[0]))
    assert one.tokens(TREES[0]) == other.tokens(TREES[0])


class Gpu:
    """Takes its time by SMALL and as much again after idling, ever less; its clock stands still otherwise."""

    def __init__(self, awake_after, blip=None):
        """In cycles. blip: a cycle that takes ten times as long."""
        self.awake_after, self.blip = awake_after, blip
        self.launched, self.read, self.most, self.now = [], 0, 0, 0.0

    def launch(self, kind):
        i = len(self.launched)
        self.launched.append(kind)
        self.most = max(self.most, i + 1 - self.read)

        def read():
            assert self.read == i, "a record is read in the order of the launches"
            self.read += 1
            slow = 1 + max(0.0, 1 - i / self.awake_after)
            milliseconds = SMALL[kind] * (10.0 if i == self.blip else slow)
            self.now += milliseconds / 1e3
            return milliseconds

        return read


def found_by(gpu, monkeypatch, awake=AWAKE):
    monkeypatch.setattr(controller, "time", SimpleNamespace(perf_counter=lambda: gpu.now))
    monkeypatch.setattr(controller, "AWAKE", awake)
    return measured_times(KINDS, gpu.launch)


@pytest.mark.parametrize("awake_after", [10, 30, 60])
def test_a_gpu_that_wakes_up_slows_all_kinds_alike(awake_after, monkeypatch):
    """Apart from what one round takes of it."""
    gpu = Gpu(awake_after)
    found = found_by(gpu, monkeypatch, awake=0)
    assert gpu.launched == ROUNDS * list(KINDS) and gpu.read == len(gpu.launched) and gpu.most == IN_FLIGHT
    ratios = [found[kind] / SMALL[kind] for kind in KINDS]
    assert max(ratios) / min(ratios) <= 1 + (len(KINDS) - 1) / awake_after


def test_rounds_go_on_until_the_gpu_is_awake(monkeypatch):
    """Slow for half of 0.1 s: only the last rounds count."""
    gpu = Gpu(awake_after=12)
    found = found_by(gpu, monkeypatch)
    assert gpu.now >= AWAKE >= 0.05 and len(gpu.launched) > 12 and len(gpu.launched) % len(KINDS) == 0
    assert found == pytest.approx(SMALL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", range(ROUNDS))
def test_one_cycle_that_was_held_up_does_not_count(kind, which, monkeypatch):
    blip = which * len(KINDS) + KINDS.index(kind)
    assert found_by(Gpu(1e-9, blip), monkeypatch, awake=0) == pytest.approx(SMALL)


def test_trees_shrink_with_the_texts_beside():
    """The rows of a pass grow more slowly than the texts in it."""
    assert trees_for(1) == TREES and trees_for(8) == (11, 15) and trees_for(64) == trees_for(32) == (5, 7)
    for seats in seat_counts(256):
        trees = trees_for(seats)
        assert trees == tuple(sorted({*trees})) and len(trees) == (2 if seats <= 80 else 1)
        assert seats * (trees[-1] + 1) <= OWN_ROWS * seats + SHARED_ROWS
        assert seats * (trees[-1] + 1) <= MOST_ROWS or trees == (3,), "a chain of three, however many texts"
