"""Chat prompts are transformers' chat prompts: text and token ids, template by template, side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chat_cases import CONVERSATIONS, NAMED, TEMPLATES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qwen3_model import InputError
from qwen3_model.text import Text

transformers = pytest.importorskip("transformers")

SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|image|>"]
CONFIG = {
    "bos_token": "<|bos|>",
    "eos_token": {"__type": "AddedToken", "content": "<|eos|>", "lstrip": False, "normalized": False,
                  "rstrip": False, "single_word": False, "special": True},
    "unk_token": None,
    "sep_token": "<|eos|>",
    "extra_special_tokens": {"image_token": "<|image|>"},
    "added_tokens_decoder": {},
    "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A byte-level tokenizer whose post-processor adds a BOS and an EOS, and special tokens by name."""
    folder = tmp_path_factory.mktemp("peer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([json.dumps(CONVERSATIONS, ensure_ascii=False, default=str)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


def write_template(base: Path, folder: Path, template) -> Path:
    """A copy of the base's folder with a template, or several by name."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
    else:
        named = [{"name": name, "template": text} for name, text in template.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"chat_template": named}))
    return folder


def both(folder: Path, messages, settings):
    """What transformers and we make of a conversation: (text, ids), None where it is refused."""
    peer, text = transformers.PreTrainedTokenizerFast.from_pretrained(folder), Text(folder)
    try:
        rendered = peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
        ids = peer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **settings)
        theirs = rendered, ids
    except Exception:
        theirs = None
    try:
        rendered = text.chat(messages, **settings)
        ours = rendered, text.encode(rendered, added_specials=False)
    except InputError as error:
        assert "\n" not in str(error)
        ours = None
    return theirs, ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_twenty_conversations_are_rendered_and_encoded_as_in_transformers(base, tmp_path, name):
    folder = write_template(base, tmp_path / "model", TEMPLATES[name])
    rendered = 0
    for messages, settings in CONVERSATIONS:
        theirs, ours = both(folder, messages, settings)
        assert ours == theirs, messages
        rendered += ours is not None
    assert rendered == {"strict": 11, "thinking": 18}.get(name, 20)  # these two refuse some


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %} {% if loop.last %}{% continue %}{% endif %}\n{{ m.content }}\n{% endfor %}",
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{{ unk_token }}{{ eos_token }}|{{ missing }}|{% set ns = namespace(n=0) %}{{ ns.n }}",
        "   {# note #}\n{{ messages[::-1][0].content.split(' ')[-1].strip('!') }}\n",
    ],
)
def test_templates_render_as_in_transformers(base, tmp_path, template):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b> é!"}]
    theirs, ours = both(write_template(base, tmp_path / "model", template), messages, {})
    assert ours == theirs is not None


def test_a_conversation_has_the_templates_bos_only(base, tmp_path):
    text = Text(write_template(base, tmp_path / "model", TEMPLATES["strict"]))
    rendered = text.chat([{"role": "user", "content": "hi"}])
    assert text.encode(rendered, added_specials=False).count(0) == 1
    assert text.encode("hi")[0] == 0 and text.encode("hi")[-1] == 1  # a text has the tokenizer's own
    assert text.encode("hi", added_specials=False) == text.encode("hi")[1:-1]


@pytest.mark.parametrize("where", ["file", "folder", "file and folder", "config", "older tokens"])
def test_templates_and_tokens_are_found_where_transformers_finds_them(base, tmp_path, where):
    folder = write_template(base, tmp_path / "model", {"default": "config {{ bos_token }}"})
    if "file" in where:
        (folder / "chat_template.jinja").write_text("file {{ bos_token }}")
    if "folder" in where:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(NAMED["tool_use"])
    if "older" in where:
        plain = {key: value for key, value in CONFIG.items() if key != "added_tokens_decoder"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps(plain | {"chat_template": "{{ bos_token }}"})
        )
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|image|>"}}))
    for settings in ({}, {"tools": []}, {"tools": [{"name": "x"}]}):
        theirs, ours = both(folder, [{"role": "user", "content": "hi"}], settings)
        assert ours == theirs and (ours is not None or where == "folder")


def test_a_byte_order_mark_is_not_part_of_a_template(base, tmp_path):
    folder = write_template(base, tmp_path / "model", "{{ messages[0].content }}\n\n")
    (folder / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}\r\n\r\n")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert Text(folder).chat([{"role": "user", "content": "hi"}]) == "hi\n"


DECLARED = [
    {"additional_special_tokens": ["<X>"]},
    {"eos_token": "<X>"},
    {"extra_special_tokens": {"video_token": "<X>"}},
    {"extra_special_tokens": ["<X>", "<Y>"]},
    {"added_tokens_decoder": {"400": {"content": "<X>", "special": True, "lstrip": True},
                              "401": {"content": "<Y>", "special": False}}},
    {"additional_special_tokens": ["he"]},
    {"additional_special_tokens": ["<|image|>"]},
]  # fmt: skip


@pytest.mark.parametrize("declared", DECLARED, ids=[str(i) for i in range(len(DECLARED))])
def test_tokens_that_other_files_declare_are_tokens(base, tmp_path, declared):
    folder = shutil.copytree(base, tmp_path / "declared")
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    declared = json.loads(
        json.dumps(declared).replace('"400"', f'"{size}"').replace('"401"', f'"{size + 1}"')
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | declared))
    text, theirs = Text(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in ("def f <X>(x): <Y> he", "<X><X>the <|image|>"):
        ids = text.encode(prompt)
        assert ids == theirs(prompt)["input_ids"]
        assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_declared_id_that_cannot_be_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "wrong")
    declared = {"added_tokens_decoder": {"9999": {"content": "<X>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | declared))
    with pytest.raises(InputError, match="declares token '<X>' as 9999"):
        Text(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | {"split_special_tokens": True}))
    with pytest.raises(InputError, match="split_special_tokens"):
        Text(folder)
