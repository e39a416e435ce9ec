"""Text: decoding token by token equals decoding at once, whatever the bytes; templates run in a sandbox."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen3_model import InputError
from qwen3_model import text as text_module
from qwen3_model.text import LONGEST_WAIT, Detokenizer, Text, read_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "Zażółć gęślą jaźń, 日本語のテキスト 🙂🙃",
    "the quick brown fox " * 4,
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b> é!"}]
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small byte-level BPE whose merges cross characters, so that tokens hold halves of them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>"])  # added, not special: part of the text, as in Qwen3
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(folder) -> Text:
    return Text(folder)


@pytest.fixture(scope="module")
def byte_tokens(text) -> list[int]:
    """The token of each byte; together they spell anything, valid UTF-8 or not."""
    letters = json.loads(text._tokenizer.to_str())["model"]["vocab"]
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in alphabet]
    spelled = {byte: chr(byte) for byte in alphabet} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [letters[spelled[byte]] for byte in range(256)]


def pieces(text: Text, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(text)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


# tokens


TEXTS = st.text().filter(lambda text: not any(token in text for token in SPECIAL))  # they are left out


@given(TEXTS)
def test_any_text_comes_back(text, prompt):
    assert text.decode(text.encode(prompt)) == prompt


def test_settings_of_training_do_not_cut_or_pad(text):
    prompt = CORPUS[0] * 3
    assert text.decode(text.encode(prompt)) == prompt
    assert len(text.encode("a")) == 1 and text.encode("") == []


def test_special_tokens_are_read_in_text_and_left_out_of_it(text):
    ids = text.encode("<|im_start|>a<think><|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 4
    assert text.decode(ids) == "a<think>"
    assert [text.is_visible(token) for token in ids] == [False, True, True, False]
    assert not text.is_visible(10**6)


def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(InputError, match="surrogate"):
        text.encode("a\ud800")


@pytest.mark.parametrize("prompt", [5, None, b"a", ["a"]])
def test_what_is_no_text_is_refused(text, prompt):
    with pytest.raises(InputError, match="a string was expected"):
        text.encode(prompt)


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], 5, [None]])
def test_what_are_no_tokens_is_refused(text, ids):
    with pytest.raises(InputError, match="cannot decode these tokens"):
        text.decode(ids)
    for ask in (text.is_visible, text.label, Detokenizer(text).push):
        with pytest.raises(InputError):
            ask(ids[0] if isinstance(ids, list) else "a")


# token by token


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("é日🙂👩‍👩‍👧🏳️‍🌈\ufffd\u0301\x00")))
def test_pieces_of_any_text_make_the_whole(text, prompt):
    ids = text.encode(prompt)
    parts = pieces(text, ids)
    assert "".join(parts) == prompt
    for i, part in enumerate(parts[:-1]):  # never half a character, and held back at most one
        assert "\ufffd" in prompt or "\ufffd" not in part
        assert "".join(parts[: i + 1]) in (text.decode(ids[: i + 1]), text.decode(ids[: i + 1])[:-1])


@given(st.lists(st.integers(0, 450)))
def test_pieces_of_any_tokens_make_the_whole(text, ids):
    """Special tokens and ids past the vocabulary among them."""
    assert "".join(pieces(text, ids)) == text.decode(ids)


@given(
    st.lists(
        st.integers(128, 255) | st.sampled_from(list("🙂日é".encode()) + [0xE2, 0xF0, 0x41]), max_size=60
    )
)
def test_pieces_of_any_bytes_make_the_whole(text, byte_tokens, data):
    ids = [byte_tokens[byte] for byte in data]
    assert text.decode(ids) == bytes(data).decode("utf-8", "replace")
    assert "".join(pieces(text, ids)) == text.decode(ids)


def test_a_character_split_over_four_tokens_comes_whole(text, byte_tokens):
    parts = pieces(text, [byte_tokens[byte] for byte in "a🙂b".encode()])
    assert parts == ["a", "", "", "", "🙂", "b", ""]


def test_special_tokens_do_not_break_a_character(text, byte_tokens):
    first, *rest = (byte_tokens[byte] for byte in "日".encode())
    ids = [first] + [0] * 20 + rest
    assert pieces(text, ids)[-2:] == ["日", ""]


def test_an_unfinished_character_is_flushed_and_the_next_text_starts_anew(text, byte_tokens):
    detokenizer = Detokenizer(text)
    assert detokenizer.push(byte_tokens[0xF0]) == "" and detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == "" and detokenizer.push(byte_tokens[0x41]) == "A"


@pytest.mark.parametrize("data", [b"\xff", b"\x80", b"\xe2", b"\xe2\x82", b"\xf0\x9f\x99", b"\xff\xf0\x9f"])
def test_invalid_bytes_never_block(text, byte_tokens, data, monkeypatch):
    """Output keeps within one character of what has come, from windows that stay short."""
    ids = [byte_tokens[byte] for byte in data * (300 // len(data))]
    longest, plain = [0], Text.decode

    def watched(self, window):
        longest[0] = max(longest[0], len(window))
        return plain(self, window)

    monkeypatch.setattr(Text, "decode", watched)
    detokenizer, returned = Detokenizer(text), ""
    for i, token in enumerate(ids):
        returned += detokenizer.push(token)
        assert len(plain(text, ids[: i + 1])) - len(returned) <= 1
    assert longest[0] <= LONGEST_WAIT + 4
    assert returned + detokenizer.flush() == plain(text, ids)


def test_the_work_per_token_does_not_grow(text, monkeypatch):
    decoded, plain = [], Text.decode
    monkeypatch.setattr(Text, "decode", lambda self, ids: decoded.append(len(ids)) or plain(self, ids))
    ids = text.encode(CORPUS[1] * 40)
    assert "".join(pieces(text, ids)) == CORPUS[1] * 40
    assert sum(decoded) <= 8 * len(ids)


# bad tokenizers


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="tokenizer.json is missing"):
        Text(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": null}', b"\xff", b"[" * 9999])
def test_malformed_tokenizers_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="is no tokenizer") as caught:
        Text(tmp_path)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, tmp_path: Path, **changes) -> Path:
    """A copy of the tokenizer with parts of its file replaced."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | changes))
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"decoder": {"type": "Strip", "content": "x", "start": 0, "stop": 5}},
        {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                            "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}]}},
    ],
    ids=["encode", "decode", "specials"],
)  # fmt: skip
def test_a_panic_on_loading_is_one_line(folder, tmp_path, capfd, changes):
    with pytest.raises(InputError, match="is no tokenizer") as caught:
        Text(damaged(folder, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the library's own words and its stack


def test_what_a_library_says_on_loading_is_passed_on(folder, monkeypatch, capfd):
    monkeypatch.setattr(text_module, "_probe", lambda tokenizer: os.write(2, b"a warning\n"))
    Text(folder)
    assert capfd.readouterr().err == "a warning\n"


def test_loading_in_many_threads_leaves_stderr_where_it_was(folder, capfd):
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(Text, [folder] * 32))) == 32
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


@pytest.mark.parametrize("blocked", ["dup", "TemporaryFile"])
def test_a_tokenizer_loads_where_stderr_cannot_be_kept(folder, monkeypatch, blocked):
    def fails(*args):
        raise OSError("no")

    monkeypatch.setattr(os if blocked == "dup" else text_module.tempfile, blocked, fails)
    assert Text(folder).encode("a")


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram"])
def test_a_text_that_a_tokenizer_has_no_token_for_is_one_line(folder, tmp_path, kind):
    model = {
        "WordLevel": {"vocab": {"a": 0}, "unk_token": "gone"},
        "WordPiece": {"vocab": {"a": 0}, "unk_token": "gone", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100},
        "Unigram": {"unk_id": None, "vocab": [["a", 0.0]]},
    }[kind]  # fmt: skip
    changes = {"model": {"type": kind} | model, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    text = Text(damaged(folder, tmp_path, **changes))
    assert text.encode("a") == [0]
    with pytest.raises(InputError, match="cannot encode this text") as caught:
        text.encode("b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_devices_pipes_and_pointers_are_refused(folder, tmp_path, name):
    def refused() -> str:
        with pytest.raises(InputError) as caught:
            Text(tmp_path).chat(MESSAGES)
        return str(caught.value)

    with_template(folder, tmp_path, CHATML, {})
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "not a regular file" in refused()
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refused()
    (tmp_path / name).unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in refused()


def test_trainings_and_texts_read_a_tokenizer_alike(folder, text):
    ids = read_tokenizer(folder).encode(CORPUS[1]).ids
    assert ids == text.encode(CORPUS[1]) and text.decode(ids) == CORPUS[1]


# chat


def with_template(folder: Path, tmp_path: Path, template: str | None, config: object = None) -> Text:
    """The tokenizer in a folder of its own with chat_template.jinja and tokenizer_config.json."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Text(tmp_path)


@pytest.mark.parametrize(
    ("template", "converses"),
    [
        (CHATML, True), ("{% for m in messages %}{{ m.content }}\n{% endfor %}", False), (None, False),
        ("{{ raise_exception('a system message first') }}", False), ("User: {{ messages[0].content }}", True),
    ],
)  # fmt: skip
def test_which_templates_make_a_conversation(folder, tmp_path, template, converses):
    assert with_template(folder, tmp_path, template).converses is converses


def chat_refusal(text: Text) -> str:
    with pytest.raises(InputError) as caught:
        text.chat(MESSAGES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_chatml(folder, tmp_path):
    chat = with_template(folder, tmp_path, CHATML).chat
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b> é!<|im_end|>\n"
    prompt = turns + "<|im_start|>assistant\n"
    assert chat(MESSAGES) == chat(MESSAGES, thinking=True) == prompt
    assert chat(MESSAGES, thinking=False) == prompt + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "template",
    [CHATML, [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": CHATML}]],
    ids=["string", "list"],
)
def test_templates_of_tokenizer_config(folder, tmp_path, template):
    text = with_template(folder, tmp_path, None, {"chat_template": template})
    assert text.chat(MESSAGES[1:]) == "<|im_start|>user\nHi <b> é!<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_file_wins(folder, tmp_path):
    assert with_template(folder, tmp_path, "file", {"chat_template": "config"}).chat(MESSAGES) == "file"


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}, {"chat_template": []},
                                    {"chat_template": [{"name": "rag", "template": "x"}]}])  # fmt: skip
def test_no_template_is_refused(folder, tmp_path, config):
    assert "has no chat template" in chat_refusal(with_template(folder, tmp_path, None, config))


@pytest.mark.parametrize(
    "config", [{"chat_template": 3}, {"chat_template": [{"name": "default", "template": 3}]}, []]
)
def test_malformed_settings_are_refused(folder, tmp_path, config):
    with pytest.raises(InputError, match="tokenizer_config.json"):
        with_template(folder, tmp_path, None, config).chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(folder, tmp_path, template):
    assert "failed: " in chat_refusal(with_template(folder, tmp_path, template))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must alternate"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ missing.field }}", "failed: 'missing' is undefined"),
        ("{{ 'a' + 1 }}", "failed: "),
        ("{% if %}", "cannot be read: "),
        ("{% unknown %}", "cannot be read: "),
        ("{{ strftime_now('%Y') }}{{ raise_exception(strftime_now('%%')) }}", "failed: %"),
    ],
)
def test_errors_of_templates_are_one_line(folder, tmp_path, template, says):
    assert says in chat_refusal(with_template(folder, tmp_path, template))


@pytest.mark.parametrize(
    "messages",
    [[], "hello", {"role": "user", "content": "a"}, ["hello"], [{"content": "a"}], 5, None,
     [{"role": 1, "content": "a"}], [{"role": "user", "content": 5}], [{"role": "user", "content": {}}],
     [{"role": "user", "content": "a", "x": object()}]],
)  # fmt: skip
def test_malformed_conversations_are_refused(folder, tmp_path, messages):
    with pytest.raises(InputError, match="conversation"):
        with_template(folder, tmp_path, CHATML).chat(messages)


@pytest.mark.parametrize("names", [{"eos_token": "x"}, {"range": 5}, {"add_generation_prompt": False},
                                   {"tools": "x"}, {"tools": [5]}, {"documents": {}},
                                   {"x": object()}, {"thinking": True, "enable_thinking": True}])  # fmt: skip
def test_names_that_are_taken_and_values_of_no_use_are_refused(folder, tmp_path, names):
    text = with_template(folder, tmp_path, CHATML, {"eos_token": "<|im_end|>"})
    with pytest.raises(InputError):
        text.chat(MESSAGES, **names)


def test_a_template_gets_names_of_the_callers_own(folder, tmp_path):
    text = with_template(folder, tmp_path, "{{ mode }} {{ enable_thinking }} {{ limits.most }}")
    assert text.chat(MESSAGES, thinking=False, mode="fast", limits={"most": 3}) == "fast False 3"
