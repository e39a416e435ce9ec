"""Chat templates of a grammar, some damaged, some that blow up: each renders as transformers renders it, or
one line says why not, soon and without filling the memory.

Every case runs in a forked process with limits of time and memory, so that code without bounds is judged and
not waited for."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import resource
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from chat_cases import CONVERSATIONS
from fuzzing import LONGEST_LINE, Finding

COUNT = 100
SECONDS, GIBIBYTES = 10, 2  # of one rendering
KINDS = {
    "traceback": "whatever a template or jinja raises is an InputError",
    "other text": "what transformers renders is rendered as transformers renders it",
    "other ids": "and encoded as transformers encodes it",
    "other refusal": "what transformers renders within the bounds is not refused",
    "missed refusal": "what transformers refuses is refused",
    "too long": f"a rendering ends within {SECONDS} seconds",
    "too much": f"a rendering takes at most {GIBIBYTES} GiB",
    "not one line": "a message is one printable line of bounded length",
}
BOUNDS = re.compile(
    r"makes|takes longer|nests lists|more than|searches a long|cannot be printed|escaped text"
)
# jinja folds a slice of a literal to nothing where it is put out and raises elsewhere; here it always raises
FOLDED = re.compile(r"\(?\b(none|true|[\d.]+)\)?\[[^\]]*:")
ADDRESS = re.compile(r"at 0x[0-9a-f]+")
SMALL = 20_000  # characters that are within any bounds
PEER_SECONDS = 3  # of transformers, after ours


def case(rng: random.Random, folder: Path) -> list[Finding]:
    """One template and one conversation."""
    template = _template(rng)
    messages, settings = rng.choice(CONVERSATIONS)
    _write(folder, template)
    ours, theirs, status = _forked(
        lambda: _ours(folder, messages, settings), lambda: _theirs(folder, messages, settings)
    )
    return list(_judged(ours, theirs, status, template))


def _judged(ours: Any, theirs: Any, status: int, template: str) -> Any:
    if ours is None:
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        yield Finding("too long" if killed == 24 else "too much", f"signal {killed}: {template[:150]!r}")
        return
    how, said, ids = ours
    if how == "raised":
        yield Finding("traceback", f"{said[:100]!r} of {template[:150]!r}")
    elif how == "refused" and "MemoryError" in said:
        yield Finding("too much", template[:150])
    elif how == "refused":
        if len(said) > LONGEST_LINE or any(not c.isprintable() for c in said):
            yield Finding("not one line", ascii(said[:150]))
        known = BOUNDS.search(said) or len(template) > 5000
        if (
            theirs
            and theirs[0] == "text"
            and not (known and len(theirs[1]) > SMALL)
            and "'lipsum'" not in said
            and not FOLDED.search(template)
        ):
            yield Finding("other refusal", f"{said[-90:]!r}, not {theirs[1][:60]!r}, of {template!r}")
    elif theirs and theirs[0] == "refused":
        yield Finding("missed refusal", f"{theirs[1][:90]!r} of {template!r}")
    elif theirs and ADDRESS.sub("", theirs[1]) != ADDRESS.sub("", said):
        yield Finding("other text", f"{said[:120]!r} is not {theirs[1][:120]!r} of {template!r}")
    elif theirs and theirs[1] == said and theirs[2] != ids:
        yield Finding("other ids", f"{ids[:9]} is not {theirs[2][:9]} of {template!r}")


def _ours(folder: Path, messages: Any, settings: dict[str, Any]) -> tuple[str, str, list[int]]:
    from qwen3_model import InputError
    from qwen3_model.text import Text

    text = Text(folder)
    known = inspect.signature(text.chat).parameters
    given = dict(settings)
    if "names" not in known:  # code that knows no tools
        given = {"thinking": given["enable_thinking"]} if "enable_thinking" in given else {}
    try:
        rendered = text.chat(messages, **given)
    except InputError as error:
        return "refused", str(error), []
    specials = (
        {"added_specials": False} if "added_specials" in inspect.signature(text.encode).parameters else {}
    )
    return "text", rendered, text.encode(rendered, **specials)


def _theirs(folder: Path, messages: Any, settings: dict[str, Any]) -> tuple[str, str, list[int]]:
    peer = _peer()
    source = (folder / "chat_template.jinja").read_text("utf-8")
    given = {"chat_template": source, "add_generation_prompt": True} | settings
    try:
        rendered = peer.apply_chat_template(messages, tokenize=False, **given)
        return "text", rendered, peer(rendered, add_special_tokens=False).input_ids
    except Exception as error:
        return "refused", repr(error), []


def _forked(*calls: Callable[[], Any]) -> tuple[Any, Any, int]:
    """What each call gave, None where the process ended before, and how it ended."""
    _peer()  # imported once, before
    come, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(come)
        _run_limited(calls, go)
    os.close(go)
    with os.fdopen(come, encoding="utf-8") as lines:
        results = [json.loads(line) for line in lines.read().splitlines() if line.endswith("]")]
    _, status = os.waitpid(child, 0)
    return (*results, None, None)[:2] + (status,)


def _run_limited(calls: tuple[Callable[[], Any], ...], go: int) -> None:
    """In the child: never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + GIBIBYTES * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for call, seconds in zip(calls, (SECONDS, PEER_SECONDS), strict=True):
            used = sum(os.times()[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds, resource.RLIM_INFINITY))
            try:
                result = call()
            except BaseException as error:
                result = ("raised", f"{type(error).__name__}: {error}"[:300], [])
            os.write(go, (json.dumps(result) + "\n").encode())
    finally:
        os._exit(0)


@cache
def _peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<|bos|>": 256}, merges=[]))
    tokenizer.add_special_tokens(["<|bos|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>")


def _write(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "tokenizer.json").write_text(_peer().backend_tokenizer.to_str(), "utf-8")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>", "added_tokens_decoder": {}}')


# templates


def _words(text: str) -> list[str]:
    return re.split(r";\s+", text.strip())


BLOWUPS = (Path(__file__).parent / "template_blowups.txt").read_text("utf-8").splitlines()
NAMES = _words("""
messages; message; m; tools; documents; bos_token; eos_token; add_generation_prompt; enable_thinking;
missing; ns.x; ns.y; loop.index; loop.last; loop.length; item; key; messages[0].role;
messages[-1].content; messages[0]""")
LITERALS = _words("""
0; 1; -2; 3.5; 'a'; '</think>'; ' b '; "é🙂"; true; none; []; [1, 'a']; {}; {'k': 1}; (); '%s-%s'""")
ATTRIBUTES = _words("""
role; content; tool_calls; function; name; reasoning_content; text; missing; __class__; items""")
FILTERS = _words("""
upper; trim; length; list; string; tojson; tojson(indent=2); first; last; join(', '); default('d');
default('d', true); int; float; abs; round(1); reverse; reverse | list; sort; unique | list; e; safe;
replace('a', 'bb'); indent(2); center(9); title; capitalize; map('upper') | list;
map(attribute='role') | list; selectattr('content') | list; rejectattr('content', 'string') | list;
select('string') | list; dictsort; items | list; batch(2) | list; slice(2) | list; sum; min; max;
truncate(9); wordcount; wordwrap(5); urlencode; striptags; attr('role'); groupby('role') | length;
format(1, 2); pprint; filesizeformat; xmlattr; forceescape""")
METHODS = _words("""
strip(); split('a'); split('</think>')[-1]; startswith('a'); rstrip('\n'); upper(); items(); keys();
get('role'); replace('a', 'b'); append(1); format(1, 2); join(['a', 'b']); count('a'); find('a');
zfill(6); ljust(6); splitlines(); title(); encode(); index('a'); values() | list; copy(); lstrip('a')""")
TESTS = _words("""
defined; none; string; mapping; iterable; number; sequence; true; odd; in [1, 2]; equalto 1; boolean""")
OPERATORS = _words("""
+; -; *; /; //; %; ~; ==; !=; <; >=; in; not in; and; or; **""")
TEXT = [
    "<|im_start|>",
    "\n",
    "  \n",
    " x ",
    "é🙂",
    "{# note #}",
    "{% raw %}{{ x }}{% endraw %}",
    "<b>&",
    "\\n",
    "\t",
]
# A and B are expressions, the others are words.
EXPRESSIONS = _words("""
A.@attribute; (A)['role']; (A)[0]; (A)[-1]; (A)[B]; (A)[1:]; (A)[:-1]; (A)[::-1]; (A)[1:3]; (A)[B:];
(A) | @filter; (A) | @filter; (A) | @filter; (A).@method; (A).@method; (A @operator B); (A @operator B);
(A is @test); (A is not @test); (A if B else @name); [A, B]; {'k': A, 'l': B}; dict(a=A, b=B); range(3);
(A, B); not A; strftime_now('%Y'); (A | string ~ B)""")
CHOICES = {
    "@attribute": ATTRIBUTES,
    "@filter": FILTERS,
    "@method": METHODS,
    "@operator": OPERATORS,
    "@test": TESTS,
    "@name": NAMES,
}
STATEMENTS = (Path(__file__).parent / "template_statements.txt").read_text("utf-8").splitlines()


def _template(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return _blowup(rng)
    source = "".join(_statement(rng, 3) for _ in range(rng.randrange(1, 5)))
    if rng.random() < 0.5:
        source = "{%- set ns = namespace(x=0, y='') %}" + source
    if rng.random() < 0.1:
        at = rng.randrange(len(source) + 1)
        source = (
            source[:at]
            + rng.choice(["", "{", "%}", "'", "(", "|", "\x00", "-", "{% endfor %}"])
            + source[at + 1 :]
        )
    return source


def _blowup(rng: random.Random) -> str:
    source = rng.choice(BLOWUPS)
    times = rng.choice([3, 30, 300, 9000])
    source = re.sub("`([^`]*)`", lambda found: found[1] * times, source)
    while "NNN" in source or re.search(r"N", source):
        source = re.sub("NNN|N", lambda _: str(rng.choice([3, 9, 12, 60, 4000])), source, count=1)
    return source.replace("@", "9" * rng.choice([50, 4000, 5000]))


def _expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.25:
        return rng.choice(rng.choice([NAMES, NAMES, LITERALS]))
    parts = {"A": _expression(rng, depth - 1), "B": _expression(rng, depth - 1)}
    parts |= {mark: rng.choice(words) for mark, words in CHOICES.items()}
    return re.sub(r"\b[AB]\b|@\w+", lambda found: parts[found[0]], rng.choice(EXPRESSIONS))


def _statement(rng: random.Random, depth: int) -> str:
    expression = _expression(rng, rng.choice([0, 1, 1, 2]))
    start, end = rng.choice([("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")])
    if depth == 0 or rng.random() < 0.4:
        return rng.choice([f"{{{{ {expression} }}}}", f"{{{{- {expression} -}}}}", rng.choice(TEXT)])
    body = "".join(_statement(rng, depth - 1) for _ in range(rng.randrange(1, 4)))
    other = _statement(rng, depth - 1)
    form = rng.choice(STATEMENTS)
    marks = {
        "{S}": start,
        "{E}": end,
        "{B}": body,
        "{O}": other,
        " X ": f" {expression} ",
        "(X)": f"({expression})",
    }
    for mark, text in marks.items():
        form = form.replace(mark, text)
    return form
