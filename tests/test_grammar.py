"""Texts with a grammar: they are plain decoding of permitted tokens, token for token, however they are
drafted and whoever runs beside them, and drafts are accepted. What cannot go with a grammar is refused."""

import json

import numpy as np
import pytest
from small import small_config, small_model
from test_many_texts import engine_of

pytest.importorskip("llguidance", reason="grammars need llguidance")

from writer import END, NUMBER, OBJECT, PERSON, SAID, VOCABULARY, Writer, by_definition, text

from orthrus_kernels import PAGE
from qwen3_model import Engine, Grammar, InputError, Request
from qwen3_model import grammar as grammar_file
from qwen3_model.decode.scheduler import Scheduler
from qwen3_model.matcher import Grammars

WAYS = [
    {"strategy": "autoregressive"}, {"strategy": "lookup"}, {"strategy": "two-pass", "tree_nodes": 0},
    {"strategy": "two-pass", "tree_nodes": 9}, {"strategy": "one-pass", "tree_nodes": 5}, {},
]  # fmt: skip
PROMPT = [40, 50, 60]
CHOICES = [
    {}, {"temperature": 0.8}, {"temperature": 1.2, "top_k": 30, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_p": 0.7, "logit_bias": {300: 4.0, 20: -100.0}},
]  # fmt: skip


CASES = [(PERSON, CHOICES[0]), (PERSON, CHOICES[2]), (NUMBER, CHOICES[1])]
RARE = [(PERSON, CHOICES[1]), (PERSON, CHOICES[3]), (OBJECT, CHOICES[1])]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in RARE]


@pytest.mark.parametrize(("grammar", "choice"), CASES)
def test_every_strategy_equals_plain_decoding_of_permitted_tokens(grammar, choice):
    model, want = Writer(), None
    for way in WAYS:
        request = Request(grammar=grammar, max_new_tokens=40, seed=11, **choice, **way)
        want = want or by_definition(model, PROMPT, request)
        try:
            got = Engine(model).generate(PROMPT, request)
        except InputError as error:  # of a text that is no longer in its grammar
            raise AssertionError(f"{way}: {error}") from error
        assert got.token_ids == want, (way, got.text)
        assert got.stats.finish_reason == ("end_token" if want[-1] == END else "length")
        assert want.count(END) == (want[-1] == END)
        if want[-1] == END:
            json.loads(got.text)


def test_drafts_are_accepted():
    """As many as of the same text without a grammar; where it forbids what would be said, fewer."""
    model, most = Writer(skill=1.0), len(text().encode(SAID)) + 1
    for way in ({"tree_nodes": 9}, {"tree_nodes": 0}):
        ways = {"strategy": "two-pass", "max_new_tokens": most, **way}
        begin = [*PROMPT, model.said[-1]]
        free = model.run(begin, Request(**ways)).stats
        bound = model.run(begin, Request(grammar=OBJECT, **ways))
        assert bound.text == SAID and bound.stats.tokens_per_cycle == free.tokens_per_cycle > 4
    person = model.run(begin, Request(grammar=PERSON, **ways | {"max_new_tokens": 60}))
    assert json.loads(person.text)["age"] < 100 and person.stats.tokens_per_cycle > 2


@pytest.mark.parametrize("ahead", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_texts_side_by_side_have_their_own(ahead):
    """With grammars and without, in cycles of their own and in shared ones."""
    model, asked = Writer(), []
    for nth, way in enumerate(WAYS):
        grammar = (PERSON, None, OBJECT, NUMBER)[nth % 4]
        choice = {"max_new_tokens": 25, "temperature": 0.8 * (nth % 2), "seed": nth, **way}
        asked.append((PROMPT[: 1 + nth % 3] * 8, Request(grammar=grammar, **choice)))
    want = [model.run(prompt, request).token_ids for prompt, request in asked]
    engine = engine_of(model, 4, 9, ahead)
    texts = [engine.submit(prompt, request) for prompt, request in asked]
    while engine.step():
        pass
    assert [one.result().token_ids for one in texts] == want


def test_a_preempted_text_goes_on_in_its_grammar(monkeypatch):
    """Both are admitted at once, and there are pages for the second half of one of them."""

    def fits(self, rows, ahead):
        return bool(self._waiting and self._slots) and self._waiting[0].missing(ahead) <= self._pages.free

    monkeypatch.setattr(Scheduler, "_admissible", fits)
    model, many = Writer(), {"type": "array", "items": {"type": "integer"}, "minItems": 90}
    asked = {"max_new_tokens": 30, "grammar": Grammar.json_schema(many), "temperature": 0.5}
    requests = [Request(seed=seed, **asked, **WAYS[3 * seed]) for seed in range(2)]
    want = [model.run(PROMPT * 15, request).token_ids for request in requests]
    engine = engine_of(model, 2, 2)
    texts = [engine.submit(PROMPT * 15, request) for request in requests]
    while engine.step():
        pass
    assert [one.result().token_ids for one in texts] == want and engine.load.preemptions > 0


@pytest.mark.parametrize("spent", [False, True])
def test_masks_of_a_tree_are_those_of_each_path(spent, monkeypatch):
    """A node's by a matcher that has read its path alone. Nodes behind a forbidden token, behind an end, and
    with an earlier sibling's token are nobody's. spent: one matcher cannot walk the tree."""
    from qwen3_model.matcher import Matcher

    if spent:
        monkeypatch.setattr(Matcher, "_walked", lambda self, masks, tokens, children: False)
    grammars = Grammars(text(), small_config(vocab_size=VOCABULARY))
    said = text().encode('{"name": "A')
    other, end = text().encode("1")[0], END
    tokens = [9, said[0], other, said[0], said[1], said[1], other, end, said[2], said[2], said[3]]
    parents = [-1, 0, 0, 0, 1, 3, 2, 1, 4, -2, 8]
    masks = np.full((len(tokens), -(-VOCABULARY // 32)), -1, np.int32)
    matcher = grammars.matcher(PERSON)
    matcher.begin([7, 8, 9], 3)
    for _ in "01":  # it stands where it stood
        matcher.fill(masks, tokens, parents)
    reached = {0: [], 1: said[:1], 4: said[:2], 8: said[:3], 10: said[:4]}
    for node, mask in enumerate(masks):
        alone, want = grammars.matcher(PERSON), np.full((1, masks.shape[1]), -1, np.int32)
        if node in reached:
            alone.begin([7, 8, 9, *reached[node]], 3)
            alone.fill(want, [0], [-1])
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            assert 0 < bits.sum() < VOCABULARY and not bits[2048:].any() and not bits[:4].any()
        assert (mask == want[0]).all(), node


def test_a_grammar_that_cannot_go_on_ends_its_text_alone(monkeypatch):
    from qwen3_model.matcher import Matcher

    model, request = Writer(), Request(grammar=PERSON, max_new_tokens=30)
    engine = Engine(model, 2, 4 * PAGE)
    bound, free = (
        engine.submit(PROMPT, request),
        engine.submit(PROMPT, Request(max_new_tokens=30, ignore_eos=True)),
    )
    for _ in range(4):
        engine.step()
    kept = list(bound.stream.token_ids)
    monkeypatch.setattr(Matcher, "_fill", lambda self, matcher, mask: False)
    with pytest.raises(InputError, match="no token is permitted"):
        engine.step()
    while engine.step():
        pass
    assert bound.result().stats.finish_reason == "error" and "cannot go on" in bound.result().error
    assert bound.result().token_ids == kept and free.result().stats.finish_reason == "length"


def test_what_failed_before_fails_nobody_else(monkeypatch):
    """A text without a grammar, in the place in which a first token was not to be had."""
    from qwen3_model.matcher import Matcher

    engine = Engine(Writer(), 2, 4 * PAGE)
    fill = Matcher._fill
    monkeypatch.setattr(Matcher, "_fill", lambda self, matcher, mask: False)
    bound = engine.submit(PROMPT, Request(grammar=PERSON, max_new_tokens=5))
    with pytest.raises(InputError, match="cannot go on"):
        while engine.step():
            pass
    monkeypatch.setattr(Matcher, "_fill", fill)
    free = engine.submit(PROMPT, Request(max_new_tokens=5, ignore_eos=True))
    while engine.step():
        pass
    assert bound.result().stats.finish_reason == "error" and len(free.result().token_ids) == 5


def test_a_spent_budget_is_one_texts_own():
    """Of what llguidance may meet: neither another text with the grammar nor drafts have a part in it."""
    grammars = Grammars(text(), small_config(vocab_size=VOCABULARY))
    grammar = Grammar.json_schema({"type": "string", "pattern": "^(.*a.{0,400}){1,60}$"})
    letters = text().encode('"' + "ab" * 40)

    def reaches(matcher):
        masks = np.full((1, -(-VOCABULARY // 32)), -1, np.int32)
        matcher.begin([], 0)
        for nth, token in enumerate(letters):
            matcher.go_on([token])
            matcher.fill(masks, [token], [-1])
            if matcher.failed:
                return nth
        return len(letters)

    found = [reaches(grammars.matcher(grammar)) for _ in range(2)]
    assert found[0] == found[1] > 1, found


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"verify": "rejection", "temperature": 1.0, "strategy": "two-pass"}, "rejection takes no grammar"),
     ({"min_tokens": 3}, "min_tokens is 3"), ({"ignore_eos": True}, "ignore_eos"),
     ({"logit_bias": {5: -float("inf")}}, "logit_bias of token 5 is -inf")],
)  # fmt: skip
def test_what_cannot_go_with_a_grammar_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Engine(Writer()).submit(PROMPT, Request(grammar=OBJECT, max_new_tokens=9, **settings))


def test_models_that_cannot_have_one_refuse_it(monkeypatch):
    with pytest.raises(InputError, match="needs a tokenizer"):
        small_model().generate([5], grammar=OBJECT)
    with pytest.raises(InputError, match="needs an end token"):
        Request(grammar=OBJECT).fit(small_config(eos_token_ids=()), 3, has_text=True)
    for module in ("qwen3_model.matcher", "qwen3_model.grammar"):
        monkeypatch.setattr(f"{module}.is_there", lambda: False)
    for refused in (lambda: Writer().run(PROMPT, Request(grammar=OBJECT)), OBJECT.check):
        with pytest.raises(InputError, match=r"pip install 'orthrus-kernels\[serve\]'"):
            refused()


UNSUPPORTED = [
    ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]$'),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"), ({"$ref": "http://x/y"}, "http://x/y"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported$"),
    ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "not"), ({"type": "foo"}, "foo"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "said"), UNSUPPORTED)
def test_what_llguidance_does_not_apply_is_refused_by_its_name(schema, said):
    with pytest.raises(InputError, match=said) as caught:
        Grammars(text(), small_config(vocab_size=VOCABULARY)).matcher(Grammar.json_schema(schema))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [([], "an object was expected"), ({"minProperties": 3, "required": ["a"]}, "minProperties"),
     ({"enum": ["x" * 2**16]}, "at most 65536"), ({"enum": ["\ud800"]}, "cannot be written as JSON"),
     ({"a": {1, 2}}, "cannot be written as JSON")],
)  # fmt: skip
def test_schemas_that_are_none_or_too_large(schema, said):
    with pytest.raises(InputError, match=said):
        Grammar.json_schema(schema)
    deep: dict = {}
    for _ in range(70):
        deep = {"items": deep}
    with pytest.raises(InputError, match="deeper than 64"):
        Grammar.json_schema(deep)


def test_a_check_takes_a_process_and_remembers(monkeypatch):
    PERSON.check()
    with pytest.raises(InputError, match="uniqueItems"):
        Grammar.json_schema(UNSUPPORTED[0][0]).check()
    monkeypatch.setattr(grammar_file.subprocess, "run", None)
    PERSON.check()


@pytest.mark.slow
def test_a_schema_that_would_compile_for_hours_is_refused_in_seconds():
    with pytest.raises(InputError, match="too long"):
        Grammar.json_schema({"type": "integer", "multipleOf": 9999991}).check()


def test_white_space_is_bounded_and_names_are_written_plainly():
    grammars = Grammars(text(), small_config(vocab_size=VOCABULARY))

    def permits(said):
        matcher = grammars.matcher(OBJECT)
        matcher.begin(text().encode(said), 0)
        return not matcher.failed

    assert all(map(permits, ['{"a":1}', '{"a": 1, "b": [1,2]}', '{\n    "a": {\n  "b": null\n}\n}']))
    for said in ('{"a":  1}', '{\n\n"a": 1}', "{\n" + " " * 17 + '"a": 1}', '{"\\u0061": 1}', ' {"a": 1}'):
        assert not permits(said), said


def test_a_command_reads_a_schema_of_a_file(tmp_path):
    from qwen3_model import cli

    parser = cli._parser()
    (tmp_path / "person.json").write_text(json.dumps({"type": "object"}))
    args = parser.parse_args(["generate", "x", "--grammar", str(tmp_path / "person.json")])
    assert args.grammar == OBJECT
    with pytest.raises(InputError, match="other.json is missing"):
        parser.parse_args(["generate", "x", "--grammar", str(tmp_path / "other.json")])
