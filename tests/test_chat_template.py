"""Chat templates that do not end, or fill the memory, or cannot be compiled: one line each, and soon."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import thread_time

import pytest

from qwen3_model import InputError
from qwen3_model.bounded_jinja import SECONDS
from qwen3_model.chat_template import ChatTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
HI = ([{"role": "user", "content": "hi"}], None, None, {})


def with_template(folder: Path, template: str) -> ChatTemplate:
    """A folder's template."""
    (folder / "chat_template.jinja").write_text(template)
    return ChatTemplate(folder)


def refusal(call, *args) -> str:
    """The one line that a call ends with."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


# templates that jinja accepts and Python does not


@pytest.mark.parametrize(
    "template",
    [
        "{% break %}",
        "{{ namespace(a=1, a=2) }}",
        "{% macro f(a, a) %}{% endmacro %}",
        "{% for a in b %}" * 25 + "{% endfor %}" * 25,
        "{% if a %}" * 120 + "{% endif %}" * 120,
        "{{ " + "9" * 5000 + " }}",
        "{{ " + "(" * 9000 + ")" * 9000 + " }}",
        "{{ " + "not " * 5000 + "a }}",
        "x" * 100_001,
        "{% generation %}",
        "{% extends 5 %}{% block a %}{% endblock %}{% block a %}{% endblock %}",
    ],
)
def test_templates_that_cannot_be_compiled_are_one_line(tmp_path, template):
    assert "cannot be read: " in refusal(with_template(tmp_path, template).compile)
    assert "cannot be read: " in refusal(with_template(tmp_path, template).render, *HI)


# templates that run for ever or fill the memory


DOUBLE = "{%% set ns = namespace(s='x') %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.s }}"
DOUBLINGS = [
    "{% set ns.s = ns.s ~ ns.s %}",
    "{% set ns.s = ns.s + ns.s %}",
    "{% set ns.s = ns.s * 2 %}",
    "{% set ns.s = [ns.s, ns.s] %}",
    "{% set ns.s = {1: ns.s, 2: ns.s} %}",
    "{% set ns.s = dict(a=ns.s, b=ns.s) %}",
    "{% set ns.s = '%s%s' % (ns.s, ns.s) %}",
    "{% set ns.s = '%(s)s%(s)s' | format(s=ns.s) %}",
    "{% set ns.s = '{0}{0}'.format(ns.s) %}",
    "{% set ns.s = '{s}{s}'.format_map({'s': ns.s}) %}",
    "{% set ns.s = ns.s.join([ns.s, ns.s]) %}",
    "{% set ns.s = [ns.s, ns.s] | join %}",
    "{% set ns.s = ns.s.replace('x', 'xx') %}",
    "{% set ns.s = ns.s | replace('x', 'xx') %}",
    "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}",
    "{% set ns.s = [[ns.s], [ns.s]] | sum(start=[]) %}",
    "{% set ns.s = [ns.s] | tojson | tojson | tojson %}",
]
LARGE = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * [1] }}",
    "{{ ('9' * 4000) | int ** 4000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.zfill(width=10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' | format(1.5) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=9999999999) }}",
    "{{ ('x\\n' * 1000000) | indent(10**6) }}",
    "{{ ('x' * 1000000).replace('', 'y' * 1000000) }}",
    "{{ ('\\t' * 1000).expandtabs(10**9) }}",
    "{{ (5).to_bytes(10**10, 'big') }}",
    "{{ range(9) | batch(10**9, 'x') | list }}",
    "{{ range(9) | slice(10**9) | list }}",
    "{{ 5 | round(-10**9) }}",
    "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
    "{{ ['x'] | map('center', 10**10) | list }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ [1, 2, 3] | tojson(separators=('y' * 4 * 10**6, '')) }}",
    "{% set s = 'x' * 4000000 %}{{ [s[1:], s[1:]] }}",
    "{{ ('a' * 4000000) | wordwrap(1) }}",
    "{{ ('\\r' * 1000000) | wordwrap }}",
    "{{ ('a ' * 10**6) | wordwrap(1, wrapstring='x' * 10**6) }}",
    "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
    "{{ ('a' * 4000000).rfind('b' + 'a' * 2000000) }}",
    "{% filter center(10**10) %}x{% endfilter %}",
    "{% autoescape 'x' | center(10**10) %}{% endautoescape %}",
    "{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}",
    "{{ dict.fromkeys(range(99999), 'x' * 99999) }}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}{% endset %}{{ x | length }}",
    "{% set ns = namespace(s=[]) %}{% for i in range(999) %}{% set ns.s = [ns.s] %}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.s = ns %}{{ ns }}",
    "{{ lipsum(n=10**7) }}",
    "{{ raise_exception('x' * 10**6) }}",
]


@pytest.mark.parametrize("template", LARGE)
def test_templates_that_make_too_much_are_one_line(tmp_path, template):
    began = thread_time()
    assert "failed: " in refusal(with_template(tmp_path, template).render, *HI)
    assert thread_time() - began < SECONDS  # refused before it was made


@pytest.mark.parametrize("line", DOUBLINGS)
def test_what_doubles_ends(tmp_path, monkeypatch, line):
    monkeypatch.setattr("qwen3_model.bounded_jinja.LARGEST", 2**16)  # lists are slow to count
    assert "more than 65536 characters" in refusal(with_template(tmp_path, DOUBLE % line).render, *HI)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% set s = 'x' * 4000000 %}{{ (['y'] * 99999) | select('in', s) | list | length }}",
    ],
)
def test_templates_that_run_too_long_are_one_line(tmp_path, monkeypatch, template):
    monkeypatch.setattr("qwen3_model.bounded_jinja.SECONDS", 0.1)
    assert "takes longer than" in refusal(with_template(tmp_path, template).render, *HI)


def test_a_long_conversation_is_within_the_bounds(tmp_path):
    messages = [{"role": "user", "content": "word " * 400}] * 1000
    began = thread_time()
    assert len(with_template(tmp_path, CHATML).render(messages, None, None, {})) > 2_000_000
    assert thread_time() - began < SECONDS / 4


def test_many_threads_render_one_template(tmp_path):
    template = with_template(
        tmp_path,
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
    )
    conversations = [[{"role": "user", "content": "x" * n}] * 40 for n in range(32)]
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda messages: template.render(messages, None, None, {}), conversations)
        assert list(texts) == [str(40 * n) for n in range(32)]


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        ("{{ messages[0].content }}", False), ("{# tools #}{{ 'tools' }}{{ messages[0].tools }}", False),
        ("{% set tools = 1 %}", False), ("{% if tools %}x{% endif %}", True),
        ("{% if tools is not defined %}{% set tools = none %}{% endif %}", True),
        ("{% for message in messages %}{{ tools | tojson }}{% endfor %}", True),
    ],
)  # fmt: skip
def test_which_templates_know_tools(tmp_path, template, takes):
    assert with_template(tmp_path, template).takes_tools() is takes
