"""The scheduler of many texts: a state machine against a toy engine that checks every piece of work
(helpers/toy_engine.py), the same in 10^4 random steps, and the order of work in small cases."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from toy_engine import ToyEngine

from orthrus_kernels import PAGE
from qwen3_model import InputError
from qwen3_model.decode.pages import Pages
from qwen3_model.decode.scheduler import MOST_PARTS, Cycle, Grant, Prefill, Scheduler

SIZES = [
    # slots, pages, chunk, most tokens of a cycle, pieces of work in flight
    (4, 9, 50, 5, 1),
    (3, 7, 512, 2, 0),
    (8, 17, 33, 32, 1),
    (8, 40, 300, 90, 1),
    (1, 6, 64, 8, 1),
    (16, 40, 100, 3, 2),
]


@pytest.mark.parametrize("at_once", [1, 40])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ten_thousand_random_steps(sizes, at_once):
    """With arrivals, cancels, texts up to the whole pool, and many that begin as earlier ones did."""
    draw, pace = random.Random(str(sizes)), random.Random(1)
    slots, pages, most = sizes[0], sizes[1], sizes[3]
    rows = 25, sizes[2]
    engine = ToyEngine(*sizes, lambda: draw.randint(1, most), lambda: pace.choice(rows), min(rows), at_once)
    for _ in range(10_000):
        if len(engine.texts) < 2 * slots + 1 and draw.random() < 0.3:
            longest = pages * PAGE // draw.choice((1, 2, 2, 4))
            prompt = draw.randint(1, longest // draw.choice((2, 30)))
            like, cut = draw.randint(0, 9), draw.randint(0, 2 * longest)
            salt = draw.choice(("", "", "salt"))
            engine.add(prompt, draw.randint(1, longest - prompt), draw.randint(1, longest), like, cut, salt)
        if engine.texts and draw.random() < 0.01:
            engine.remove(draw.choice(list(engine.texts)), "cancelled")
        engine.step()
    engine.drain()
    for what in (
        "preempted", "paused", "ended, running", "cancelled, running", "cancelled, waiting", "several parts",
        "found", "found again", "shared", "parts beside",
    ):  # fmt: skip
        assert engine.seen[what] > 2 or slots == 1, engine.seen


class Texts(RuleBasedStateMachine):
    """Hypothesis's choice of sizes, texts, growth and cancels."""

    @initialize(data=st.data(), sizes=st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 200),
                                                st.integers(1, 40), st.integers(0, 2)),
                rows=st.integers(1, 200), at_once=st.integers(1, 200))  # fmt: skip
    def begin(self, data, sizes, rows, at_once):
        self.draw, self.each = random.Random(0), 1
        beside = lambda: self.draw.randint(rows, 2 * rows)  # noqa: E731
        self.engine = ToyEngine(*sizes, self.growth, beside, rows, at_once)

    def growth(self):
        return self.draw.randint(1, self.each)

    @rule(prompt=st.integers(1, 800), new=st.integers(1, 800), end=st.integers(1, 800),
          like=st.integers(0, 5), cut=st.integers(0, 800), salt=st.sampled_from(["", "s"]))  # fmt: skip
    def add(self, prompt, new, end, like, cut, salt):
        most = self.engine.pages * PAGE
        prompt = min(prompt, most - 1)
        self.engine.add(prompt, min(new, most - prompt), end, like, cut, salt)

    @rule(which=st.integers(0, 30))
    def cancel(self, which):
        if self.engine.texts:
            self.engine.remove(list(self.engine.texts)[which % len(self.engine.texts)], "cancelled")

    @rule(steps=st.integers(1, 60), each=st.integers(1, 40))
    def run(self, steps, each):
        self.each = min(each, self.engine.most)
        for _ in range(steps):
            self.engine.step()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=100, stateful_step_count=20)


class Lengths(Scheduler):
    """Of texts of which only the lengths count."""

    def __init__(self, slots, pages, chunk):
        super().__init__(slots, pages, chunk, reuse=False)

    def add(self, text, length, limit):
        super().add(text, range(length), limit)


def prefill(work):
    """(text, first token, end, whether it is its last) of the one part of a chunk."""
    (part,) = parts(work)
    return part


def parts(work):
    """The same of every part."""
    assert isinstance(work, Prefill), work
    return parts_of(work)


def parts_of(work):
    return [(part.text, part.first, part.end, part.last) for part in work.parts]


def texts(work):
    """Of a cycle that carries no prompt."""
    found, carried = both(work)
    assert not carried
    return found


def both(work):
    """The texts of a cycle, and what it carries."""
    assert isinstance(work, Cycle), work
    return [text for text, _ in work.texts], parts_of(work)


def test_cycles_carry_prompts_first_come_first_served():
    scheduler = Lengths(slots=2, pages=20, chunk=100)
    scheduler.add("a", 100, 200)
    scheduler.add("b", 250, 300)
    scheduler.add("c", 1, 10)
    assert prefill(scheduler.next(2)) == ("a", 0, 100, True)
    for first, end, last in ((0, 100, False), (100, 200, False), (200, 250, True)):
        work = scheduler.next(2)
        assert both(work) == (["a"], [("b", first, end, last)]) and work.all_texts == ("a", "b")
    assert texts(scheduler.next(2)) == ["a", "b"], "no slot is free"
    scheduler.remove("a")
    assert both(scheduler.next(2)) == (["b"], [("c", 0, 1, True)])
    assert (scheduler.running, scheduler.waiting, scheduler.paused) == (2, 0, 0)
    scheduler.remove("b")
    scheduler.remove("c")
    assert scheduler.next(2) is None and scheduler.pages_used == 0


def test_chunks_follow_each_other_where_no_text_is_in_cycles():
    scheduler = Lengths(slots=2, pages=20, chunk=100)
    scheduler.add("a", 201, 300)
    assert [prefill(scheduler.next(2))[1:3] for _ in range(3)] == [(0, 100), (100, 200), (200, 201)]


def test_a_step_reads_as_little_as_it_is_told_while_texts_decode():
    """Its rest is not admitted before the older text has it; alone, prompts are read as fast as ever."""
    scheduler = Lengths(slots=3, pages=20, chunk=100)
    scheduler.beside = 30
    for text, length in (("a", 160), ("b", 50), ("c", 20)):
        scheduler.add(text, length, length + 50)
    assert prefill(scheduler.next(2)) == ("a", 0, 100, False)
    assert parts(scheduler.next(2)) == [("a", 100, 160, True), ("b", 0, 40, False)]
    assert both(scheduler.next(2)) == (["a"], [("b", 40, 50, True), ("c", 0, 20, True)])
    scheduler.remove("a")
    assert texts(scheduler.next(2)) == ["b", "c"]
    scheduler.add("d", 500, 600)
    scheduler.beside = 1000
    assert both(scheduler.next(2)) == (["b", "c"], [("d", 0, 100, False)])
    scheduler.remove("b"), scheduler.remove("c")
    scheduler.beside = 1
    assert [prefill(scheduler.next(2))[1:3] for _ in range(4)] == [(n, n + 100) for n in range(100, 500, 100)]


def test_few_tokens_of_several_steps_are_saved_up():
    scheduler = Lengths(slots=3, pages=20, chunk=100)
    scheduler.add("a", 50, 100)
    assert prefill(scheduler.next(2)) == ("a", 0, 50, True)
    scheduler.beside, scheduler.at_once = 30, 70
    assert [both(scheduler.next(2)) for _ in range(9)] == 9 * [(["a"], [])]
    scheduler.add("b", 290, 300)
    found = [[part[1:3] for part in both(scheduler.next(2))[1]] for _ in range(10)]
    assert found[:2] == [[(0, 70)], []], "saved up while nobody waited, and no more than that"
    assert found[2:5] == [[(70, 140)], [], [(140, 210)]] and found[5:7] == [[], [(210, 280)]], "30 a step"
    assert found[7:] == [[], [], [(280, 290)]], "what ends a prompt waits likewise"
    scheduler.at_once = 30
    scheduler.add("c", 95, 100)
    ends = [part[2] for _ in range(4) for part in both(scheduler.next(2))[1]]
    assert ends == [30, 60, 90, 95]
    scheduler.beside, scheduler.at_once = 64, 1000
    scheduler.add("d", 150, 200)
    scheduler.remove("a")
    found = [[part[1:3] for part in both(scheduler.next(2))[1]] for _ in range(4)]
    assert [part for step in found for part in step] == [(0, 100), (100, 150)], "a chunk at most"


@pytest.mark.parametrize("beside, at_once", [(64, 1), (64, 128), (40, 64), (300, 64), (12, 160)])
def test_pages_last_until_a_prompt_has_been_read_and_its_text_has_run(beside, at_once):
    """Whatever the others add in all the cycles that this takes; with fewer pages it is not admitted."""
    admitted = []
    for pages in range(16, 60):
        scheduler, length = Lengths(slots=2, pages=pages, chunk=512), 21
        scheduler.add("old", 20, pages * PAGE)
        assert prefill(scheduler.next(20)) == ("old", 0, 20, True)
        scheduler.beside, scheduler.at_once = beside, at_once
        for _ in range(1 + at_once // beside):
            assert both(scheduler.next(20)) == (["old"], []), "tokens are saved up for what comes"
        scheduler.add("young", 1000, 1010)
        work = both(scheduler.next(20))
        admitted.append(bool(work[1]))
        while admitted[-1] and "young" not in work[0]:
            assert "old" in work[0] and not scheduler.preemptions
            length += 20
            scheduler.grown("old", length)
            work = both(scheduler.next(20))
        assert not admitted[-1] or work[0] == ["old", "young"]
    assert admitted == sorted(admitted) and 0 < sum(admitted) < len(admitted)


def test_a_text_that_lacks_pages_is_looked_up_once_until_some_come_back(monkeypatch):
    scheduler, ids = Scheduler(slots=3, pages=9, chunk=512), list(range(400))
    scheduler.add("old", ids[:90], 300)
    scheduler.add("long", ids, 500)
    found, find = [], Pages.find
    monkeypatch.setattr(Pages, "find", lambda *given: found.append(1) or find(*given))
    assert prefill(scheduler.next(2)) == ("old", 0, 90, True)
    before = len(found)
    for _ in range(20):
        assert texts(scheduler.next(2)) == ["old"]
    assert len(found) <= before + 1, "the first chunk had fewer rows left"
    scheduler.remove("old")
    assert prefill(scheduler.next(2)) == ("long", 0, 400, True)


def test_a_chunk_holds_the_prompts_of_waiting_texts_while_slots_pages_and_rows_last():
    scheduler = Lengths(slots=40, pages=100, chunk=100)
    for text, length in (("a", 30), ("b", 1), ("c", 90), ("d", 5)):
        scheduler.add(text, length, length + 50)
    work = scheduler.next(2)
    assert parts(work) == [("a", 0, 30, True), ("b", 0, 1, True), ("c", 0, 69, False)]
    assert len({part.slot for part in work.parts}) == len(work.grants) == 3
    rest = [("c", 69, 90, True), ("d", 0, 5, True)]
    assert both(scheduler.next(2)) == (["a", "b"], rest), "the rest comes first"
    for text in range(MOST_PARTS + 1):
        scheduler.add(text, 1, 9)
    assert [part[0] for part in both(scheduler.next(2))[1]] == list(range(MOST_PARTS))


def test_no_text_joins_a_chunk_without_a_slot_or_pages():
    for slots, pages in ((2, 9), (9, 5)):  # six would hold the prompt and a page's worth of tokens of each
        scheduler = Lengths(slots, pages, chunk=100)
        for text in "abc":
            scheduler.add(text, 20, 300)
        assert [part[0] for part in parts(scheduler.next(2))] == ["a", "b"]


def test_a_text_owns_the_pages_of_what_a_cycle_may_add_and_none_behind_its_limit():
    scheduler = Lengths(slots=1, pages=9, chunk=512)
    scheduler.add("a", PAGE - 2, 3 * PAGE)
    work = scheduler.next(1)
    slot = work.parts[0].slot
    assert work.grants == (Grant(slot, 0, (0,)),), "62 of the prompt, one behind it, one more"
    assert scheduler.next(1).grants == ()
    scheduler.grown("a", PAGE)
    assert scheduler.next(1).grants == (Grant(slot, 1, (1,)),)
    scheduler.grown("a", 3 * PAGE - 1)
    assert scheduler.next(200).grants == (Grant(slot, 2, (2,)),)
    assert scheduler.pages_used == 3


def short_of_pages():
    """Two texts of two pages each in a pool of four, whose next tokens need a third."""
    scheduler = Lengths(slots=3, pages=4, chunk=512)
    for text in ("old", "young"):
        scheduler.add(text, 70, 4 * PAGE)
    assert parts(scheduler.next(2)) == [("old", 0, 70, True)]
    assert texts(scheduler.next(2)) == ["old"]
    assert scheduler.pages_used == 2
    return scheduler


def test_no_text_is_admitted_that_older_ones_would_soon_push_out():
    scheduler = short_of_pages()
    assert texts(scheduler.next(2)) == ["old"], "a page's worth of tokens for each would not fit"
    scheduler.remove("old")
    assert prefill(scheduler.next(2)) == ("young", 0, 70, True)


def running_three():
    """Three texts, of a page each in a pool of six, in the middle of their cycles."""
    scheduler = Lengths(slots=3, pages=6, chunk=512)
    for text in "abc":
        scheduler.add(text, 20, 6 * PAGE)
    assert parts(scheduler.next(2)) == [(text, 0, 20, True) for text in "abc"]
    assert texts(scheduler.next(2)) == ["a", "b", "c"]
    assert scheduler.pages_used == 3
    return scheduler


def test_free_pages_are_kept_for_the_oldest_text_that_lacks_some():
    scheduler = running_three()
    scheduler.grown("a", 4 * PAGE)
    scheduler.grown("b", PAGE)
    assert texts(scheduler.next(2)) == ["c"], "four for a where three are free; b would need one"
    assert (scheduler.paused, scheduler.pages_used) == (2, 3)


def test_a_text_without_a_page_pauses_and_the_youngest_is_preempted_when_none_can_go_on():
    scheduler = running_three()
    scheduler.grown("a", 3 * PAGE)
    assert texts(scheduler.next(2)) == ["a", "b", "c"] and scheduler.pages_used == 6
    scheduler.grown("b", PAGE - 1)
    assert texts(scheduler.next(2)) == ["a", "c"] and scheduler.paused == 1
    scheduler.grown("c", PAGE)
    assert texts(scheduler.next(2)) == ["a"] and scheduler.paused == 2
    scheduler.grown("a", 5 * PAGE)
    work = scheduler.next(2)
    assert texts(work) == ["a"] and work.preempted == ("c", "b"), "the youngest first"
    assert [(grant.first, len(grant.pages)) for grant in work.grants] == [(4, 2)]
    assert (scheduler.running, scheduler.waiting, scheduler.preemptions) == (1, 2, 2)
    assert texts(scheduler.next(2)) == ["a"]
    scheduler.remove("a")
    again = [("b", 0, PAGE - 2, True), ("c", 0, PAGE - 1, True)]
    assert parts(scheduler.next(2)) == again, "the last token of each is its root"


def test_a_preempted_text_whose_first_token_was_not_read_is_a_new_one():
    scheduler = running_three()
    scheduler.grown("a", 3 * PAGE)
    scheduler.next(2)
    scheduler.grown("a", 3 * PAGE + 1)
    assert scheduler.next(PAGE).preempted == ("c",)
    scheduler.remove("a")
    assert both(scheduler.next(PAGE)) == (["b"], [("c", 0, 20, True)])


def test_a_text_that_can_never_fit_is_refused_with_both_sizes():
    scheduler = Lengths(slots=2, pages=3, chunk=64)
    scheduler.add("fits", 100, 192)
    with pytest.raises(InputError) as refused:
        scheduler.add("too long", 100, 193)
    for said in ("193 tokens, 4 pages of 64", "3 pages, 192 tokens", "shorten the prompt", "cache_tokens"):
        assert said in str(refused.value)
    assert (scheduler.running, scheduler.waiting) == (0, 1)


def test_pages_are_taken_once_and_come_back():
    pages = Pages(5)
    first, second = pages.take(2), pages.take(3)
    assert sorted(first + second) == list(range(5)) and pages.free == 0
    pages.give(first)
    assert pages.free == 2 and sorted(pages.take(2)) == sorted(first)
    with pytest.raises(AssertionError):
        pages.take(1)


def known(pages, *texts):
    """Take and know the pages of texts, each a list of numbers that stand for a page's tokens."""
    found = []
    for text in texts:
        chain, taken = "", pages.take(len(text))
        for page, of in zip(taken, text, strict=True):
            chain = pages.know(page, chain, [of] * PAGE)
        found.append(taken)
    return found


def tokens(*numbers):
    return [number for number in numbers for _ in range(PAGE)]


def test_a_page_is_found_by_its_tokens_and_by_all_in_front_of_it():
    pages = Pages(9)
    (first,) = known(pages, [1, 2, 1])
    assert pages.find(tokens(1, 2, 1, 1), "")[0] == first
    assert pages.find(tokens(1, 2)[:-1], "")[0] == first[:1], "whole pages"
    assert pages.find(tokens(2), "")[0] == pages.find(tokens(1, 2), "salt")[0] == []
    assert pages.find([1] * (PAGE - 1) + tokens(2, 1), "")[0] == [], "exactly"
    assert pages.find(tokens(1, 1), "")[0] == first[:1]


def test_of_known_pages_the_end_of_the_text_that_nobody_has_had_for_longest_goes_first():
    pages = Pages(6)
    old, new, mine = known(pages, [1, 2], [3, 4], [5])
    for text in (old, new):
        pages.give(text)
    pages.own(old), pages.give(old)
    blank = pages.take(1)
    assert not {*blank} & {*old, *new, *mine} and pages.free == 4, "one that is known by nothing goes first"
    assert [pages.take(1) for _ in range(4)] == [[new[1]], [new[0]], [old[1]], [old[0]]]
    assert pages.find(tokens(3), "")[0] == pages.find(tokens(1), "")[0] == []
    assert pages.find(tokens(5), "")[0] == mine and pages.free == 0


def test_nothing_is_found_behind_a_page_that_was_taken():
    """Two texts have computed the same beginning side by side; one's first page stays its own."""
    pages = Pages(3)
    ((first,),), second = known(pages, [1]), pages.take(2)
    chain = pages.know(second[0], "", tokens(1))
    pages.know(second[1], chain, tokens(2))
    assert pages.find(tokens(1, 2), "")[0] == [first, second[1]]
    pages.give([first])
    assert pages.take(1) == [first]
    assert pages.find(tokens(1, 2), "")[0] == []
    pages.give([first])
    pages.know(pages.take(1)[0], "", tokens(1))
    assert pages.find(tokens(1, 2), "")[0] == [first], "a new number"


def reading(scheduler):
    """The next piece of work that reads prompts, alone or beside a cycle."""
    return next(work for _ in range(9) if (work := scheduler.next(2)).parts)


def read(scheduler):
    """(text, first token, end, whether it is its last) of the one part that is read next."""
    (part,) = parts_of(reading(scheduler))
    return part


def talk():
    """A scheduler, and the tokens of a text of 180, answered up to 200, that has ended."""
    scheduler, ids = Scheduler(slots=3, pages=20, chunk=512), list(range(180))
    scheduler.add("first", ids, 200)
    assert prefill(scheduler.next(20)) == ("first", 0, 180, True)
    ids += range(180, 200)
    scheduler.grown("first", 200)
    scheduler.remove("first")
    assert scheduler.pages_used == 0
    return scheduler, ids


def test_the_next_turn_of_a_chat_reads_its_new_tokens():
    scheduler, ids = talk()
    scheduler.add("second", ids + [7] * 30, 300)
    work = scheduler.next(2)
    assert parts(work) == [("second", 3 * PAGE, 230, True)]
    ((slot, first, pages),) = work.grants
    assert first == 0 and len(pages) == scheduler.pages_used == 4, "the table holds what was found as well"
    scheduler.add("third", [*ids[:150], 7], 300)
    work = reading(scheduler)
    assert parts_of(work) == [("third", 2 * PAGE, 151, True)]
    assert work.grants[0].pages[:2] == pages[:2] and scheduler.pages_used == 5


@pytest.mark.parametrize("length", [2 * PAGE, 2 * PAGE + 1])
def test_one_token_is_always_read(length):
    """The state behind it chooses the first token."""
    scheduler, ids = talk()
    scheduler.add("again", ids[:length], 300)
    assert read(scheduler) == ("again", (length - 1) // PAGE * PAGE, length, True)


@pytest.mark.parametrize("salt, reuse, first", [("", True, 128), ("salt", True, 0), ("", False, 0)])
def test_texts_of_another_salt_share_nothing(salt, reuse, first):
    scheduler = Scheduler(slots=2, pages=20, chunk=512, reuse=reuse)
    for text, of in (("a", ""), ("b", salt)):
        scheduler.add(text, list(range(150)), 300, of)
        assert read(scheduler)[1] == (first if text == "b" else 0)
        scheduler.grown(text, 151)


def test_a_page_is_known_when_the_host_knows_that_it_is_full():
    """All tokens but the last are in the cache; what was launched and not told may be dropped."""
    scheduler, ids = Scheduler(slots=3, pages=20, chunk=512), list(range(PAGE - 1))
    scheduler.add("a", ids, 300)
    scheduler.next(2)
    for nth, (length, first) in enumerate(((PAGE, 0), (PAGE + 1, PAGE))):
        ids += range(len(ids), length)
        scheduler.grown("a", length)
        scheduler.add(nth, list(range(PAGE + 9)), 300)
        assert read(scheduler)[1] == first


def test_texts_that_begin_alike_side_by_side_have_pages_of_their_own():
    scheduler = Scheduler(slots=3, pages=20, chunk=512)
    for text in "ab":
        scheduler.add(text, [5] * 100, 300)
    assert [part[1] for part in parts_of(reading(scheduler))] == [0, 0] and scheduler.pages_used == 4
    for text in "ab":
        scheduler.grown(text, 101)
    scheduler.remove("a")
    scheduler.add("c", [5] * 100, 300)
    assert read(scheduler)[1] == PAGE and scheduler.pages_used == 4, "the one that is known is a's"
    scheduler.remove("b")
    assert scheduler.pages_used == 2


def test_a_preempted_text_finds_its_own_pages():
    scheduler, told = Scheduler(slots=2, pages=6, chunk=512), {"a": [1] * 20, "b": [2] * 20}
    for text, ids in told.items():
        scheduler.add(text, ids, 6 * PAGE)
    assert [part[1] for part in parts(scheduler.next(2))] == [0, 0]
    for length in (PAGE, 2 * PAGE, 3 * PAGE):
        for text, ids in told.items():
            ids += range(length - len(ids))
            scheduler.grown(text, length)
        work = scheduler.next(2)
    assert (work.preempted, texts(work)) == (("b",), ["a"])
    scheduler.remove("a")
    assert prefill(scheduler.next(2)) == ("b", 2 * PAGE, 3 * PAGE - 1, True), "its last token is the root"
