"""The page at `/` in a browser: what it asks, what it shows, and who can use it. `make test-browser` installs
what drives Chromium."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from serving import ScriptedEngine, Serving, with_engine

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.config import Qwen3Config
from qwen3_model.openai.served import Served
from qwen3_model.serve.guard import Access
from qwen3_model.serve.limits import Limits
from qwen3_model.serve.messages import EngineOptions
from qwen3_model.text import Text
from tools.browser import CHROMIUM
from tools.docs import page as picture

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here (make test-browser)")
axe = pytest.importorskip("axe_playwright_python", reason="no axe here (make test-browser)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

KEY = "k" * 20
HOSTILE = (
    "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\"></div>&lt;b&gt;"
)
PROMPT = "def mean(values):\n"
PLAIN = "autoregressive"
SEED = 2**64 - 1  # which no number of JavaScript holds


@pytest.fixture(scope="module")
def served():
    """The embedded checkpoint's words, without its weights."""
    return Served("embedded", Qwen3Config.from_folder(EMBEDDED), Text(EMBEDDED))


@pytest.fixture(scope="module")
def chromium():
    with picture.chromium() as browser:
        yield browser


@pytest.fixture
def opened(chromium):
    """Opens the page in a window of its own. What went wrong in it must be what the test expects: `wrong`."""
    contexts, wrong = [], []

    def call(url, width=1000, height=800, **how):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **how))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        return page

    call.wrong = wrong
    yield call
    for context in contexts:
        context.close()
    assert not wrong


def scripted(served, script, access=None):
    """A server whose engine a test plays."""

    async def start():
        return ScriptedEngine(slots=4, script=script)

    return Serving(served, start, Limits(), access)


def says(served, *texts):
    """What an engine does that answers each request with the next of these, three tokens a run."""
    left = list(texts)

    def script(text):
        ids = served.text.encode(left.pop(0))
        for at in range(0, len(ids), 3):
            text.run(ids[at : at + 3])
        text.run([0])
        text.end("end_token")

    return script


def ask(page, prompt, **settings):
    """Send a prompt. settings: what is typed, by label."""
    page.get_by_text("tokens of context").wait_for()
    if settings:
        page.get_by_text("Settings").click()
        for label, value in settings.items():
            page.get_by_label(label.replace("_", " ")).fill(str(value))
        page.get_by_text("Settings").click()
    page.locator("#prompt").fill(prompt)
    page.get_by_role("button", name="Send").click()


def bodies(page):
    """The bodies of the requests from here on, as they are sent."""
    sent = []
    page.on("request", lambda request: sent.append(request.post_data) if request.method == "POST" else None)
    return sent


def overflow(page):
    """Pixels by which something is wider than the window."""
    return page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")


def runs(answer):
    """The texts of an answer's runs, and their classes."""
    return answer.locator(":scope > .text .run").evaluate_all(
        "all => all.map(run => [run.textContent, run.className])"
    )


@pytest.fixture(scope="module")
def real(served):
    """A server of the embedded checkpoint, and the checkpoint itself."""
    options = EngineOptions(device="cpu", slots=1, cache_tokens=1024)
    with with_engine(served, options, Limits()) as serving:
        yield serving


def test_a_text_streams_in_runs_and_is_that_of_plain_decoding(real, opened):
    page = opened(real.url, width=400)
    sent = bodies(page)
    ask(page, PROMPT, Most_tokens=30, Seed=7, Temperature=0.6)
    page.locator(".verdict").wait_for()
    drafted, plain = page.locator(".answer").all()
    model = Qwen3.from_pretrained(EMBEDDED, device="cpu", progress=False)
    text = model.generate(model.text.encode(PROMPT), max_new_tokens=30, seed=7, temperature=0.6).text
    for answer in (drafted, plain):
        assert answer.locator(".lead").text_content() == PROMPT
        assert "".join(run for run, _ in runs(answer)) == text
        for (_, one), (_, other) in zip(runs(answer), runs(answer)[1:], strict=False):
            assert {one, other} == {"run odd", "run even"}
    assert 2 * len(runs(drafted)) < len(runs(plain)) <= 30
    figures = [dict(zip(*(each.locator(tag).all_text_contents() for tag in ("dt", "dd")), strict=True))
               for each in (drafted, plain)]  # fmt: skip
    for figure in figures:
        assert (figure["tokens"], figure["seed"]) == ("30", "7") and float(figure["tokens/s"]) > 0
        assert float(figure["tokens a cycle"]) == pytest.approx(29 / int(figure["cycles"]), abs=0.005)
    assert int(figures[0]["cycles"]) < int(figures[1]["cycles"]) == 29
    verdict = page.locator(".verdict.same").text_content()
    assert verdict.startswith(f"Identical: all 30 tokens, all {len(text)} characters. With drafts: ")
    assert page.get_by_role("status").text_content() == verdict
    first, second = map(json.loads, sent)
    assert (first.pop("strategy"), second.pop("strategy")) == ("auto", PLAIN) and first == second
    assert first["seed"] == 7 and first["stream_options"] == {"include_runs": True}
    assert overflow(page) == 0


def test_a_difference_is_told(served, opened):
    """And is not what the page looks for: an engine that lies is found out."""
    with scripted(served, says(served, "return total", "return totals", "a b", "a b c")) as serving:
        page = opened(serving.url)
        ask(page, PROMPT)
        verdict = page.locator(".verdict.parts")
        verdict.wait_for()
        said = verdict.text_content()
        at = len("return total") + 1
        assert (
            said.startswith("Not identical. They part at token ") and f"character {at} of the content" in said
        )
        assert "ended by “stop”" in said
        ask(page, PROMPT)
        page.locator(".verdict.parts").nth(1).wait_for()


HERE = {"tokens": [1, 2], "content": "ab", "reasoning": "", "reason": "stop"}
PAIRS = [
    ({}, {}, "Identical: all 2 tokens, all 2 characters."),
    ({"reasoning": "x"}, {"reasoning": "x"}, "Identical: all 2 tokens, all 3 characters."),
    ({"content": "a\u0000🙂"}, {"content": "a\u0000🙂"}, "Identical: all 2 tokens, all 3 characters."),
    ({"tokens": [1], "content": "a"}, {"tokens": [1], "content": "a"}, "Identical: all 1 token, all 1 char"),
    ({}, {"reason": "length"}, "Not identical. With drafts: 2 tokens, ended by “stop”; plainly: 2 tokens"),
    ({}, {"tokens": [1, 3]}, "Not identical. They part at token 2. "),
    ({}, {"content": "aB"}, "Not identical. They part at character 2 of the content (“b”, plainly “B”). "),
    ({}, {"tokens": [1]}, "Not identical. They part at token 2. With drafts: 2 tokens, ended by “stop”"),
    ({"content": "b", "reasoning": "a"}, {}, "Not identical. They part at character 1 of the reasoning ("),
    ({}, {"tokens": [1], "content": "a", "reason": ""}, "Identical as far as both go, 1 token: one was"),
    ({"tokens": [], "content": "", "reason": ""}, {}, "Identical as far as both go, 0 tokens: one"),
    ({}, {"tokens": [3], "content": "a", "reason": ""}, "Not identical. They part at token 1. With"),
    ({}, {"tokens": [1], "content": "b", "reason": ""}, "Not identical. They part at character 1 of"),
]  # fmt: skip


def test_what_counts_as_identical(served, opened):
    with scripted(served, None) as serving:
        page = opened(serving.url)
        page.get_by_text("tokens of context").wait_for()
        ask = "async ([one, other]) => (await import('/page/answer.js')).compared(one, other)"
        for one, other, line in PAIRS:
            found = page.evaluate(ask, [HERE | one, HERE | other])
            assert found["line"].startswith(line), (found, line)
            assert found["same"] == line.startswith("Identical")


def test_a_drawn_seed_is_sent_again_and_a_long_one_is_not_rounded(served, opened):
    with scripted(served, says(served, *["return"] * 4)) as serving:
        page = opened(serving.url)
        sent = bodies(page)
        ask(page, PROMPT)
        page.locator(".verdict.same").wait_for()
        assert "seed" not in json.loads(sent[0])
        drawn = page.locator(".answer dd").nth(4).text_content()
        assert json.loads(sent[1])["seed"] == int(drawn)
        assert [text.request.seed for text in serving.engine.texts] == [int(drawn)] * 2
        ask(page, PROMPT, Seed=SEED)
        page.locator(".verdict.same").nth(1).wait_for()
        assert [text.request.seed for text in serving.engine.texts[2:]] == [SEED] * 2


def test_a_chat_of_several_turns(served, opened):
    with scripted(served, says(served, *["a = 1", "a = 1", "b = 2"])) as serving:
        page = opened(serving.url)
        page.get_by_label("Chat").check()
        sent = bodies(page)
        ask(page, "first")
        page.locator(".verdict.same").wait_for()
        page.get_by_role("switch").uncheck()
        ask(page, "second")
        page.get_by_text(re.compile("^Answered: .* tokens a cycle")).wait_for()
        said = [json.loads(body)["messages"] for body in sent]
        first = [{"role": "user", "content": "first"}]
        told = [*first, {"role": "assistant", "content": "a = 1"}, {"role": "user", "content": "second"}]
        assert said == [first, first, told]
        assert page.locator(".asked").all_text_contents() == ["first", "second"]
        page.get_by_role("button", name="Start anew").click()
        assert page.locator("article").count() == 0 and page.locator("#intro").is_visible()


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_text_in_the_engine(served, opened, how):
    with scripted(served, lambda text: text.run([5, 6, 7])) as serving:
        page = opened(serving.url)
        ask(page, PROMPT)
        page.locator(".answer .run").wait_for()
        (text,) = serving.engine.texts
        assert not text.cancelled.is_set() and page.get_by_role("button", name="Start anew").is_disabled()
        if how == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        assert text.cancelled.wait(10)
        page.get_by_text("Stopped.").wait_for()
        assert page.locator(".answer").count() == 1, "what was stopped is kept, and not compared"
        assert page.evaluate("() => document.activeElement.id") in ("prompt", "send")
        page.get_by_role("button", name="Send").wait_for()


def test_a_comparison_that_is_stopped_says_how_far_it_went(served, opened):
    def script(text):
        text.run([5, 6, 7])
        if text.request.strategy != PLAIN:
            text.run([0])
            text.end("end_token")

    with scripted(served, script) as serving:
        page = opened(serving.url)
        ask(page, PROMPT)
        page.locator(".answer").nth(1).locator(".run").wait_for()
        page.get_by_role("button", name="Stop").click()
        verdict = page.locator(".verdict")
        verdict.wait_for()
        assert verdict.text_content() == "Identical as far as both go, 3 tokens: one was stopped."
        assert "same" in verdict.get_attribute("class").split()


@pytest.mark.parametrize("mode", ["Chat", "Continue text"])
def test_text_that_is_html_stays_text(served, opened, mode):
    with scripted(served, says(served, HOSTILE, HOSTILE)) as serving:
        page = opened(serving.url, width=400)
        page.get_by_label(mode).check()
        ask(page, HOSTILE + "wide" * 60)
        page.locator(".verdict.same").wait_for()
        answer = page.locator(".answer").first
        assert "".join(run for run, _ in runs(answer)) == HOSTILE
        shown = page.locator(".asked" if mode == "Chat" else ".lead").first
        assert shown.text_content() == HOSTILE + "wide" * 60
        assert page.locator("#talk img, #talk script, #talk b").count() == 0
        assert page.title() == "orthrus serve" and overflow(page) == 0


def test_the_policy_refuses_html(served, opened):
    """What test_page.py's search of the scripts would overlook."""
    with scripted(served, None) as serving:
        page = opened(serving.url)
        page.get_by_text("tokens of context").wait_for()
        with pytest.raises(playwright.Error, match="TrustedHTML"):
            page.evaluate("() => { document.getElementById('talk').innerHTML = '<b>x</b>'; }")
        assert any("TrustedHTML" in error for error in opened.wrong)
        opened.wrong.clear()


def test_what_the_server_refuses_is_told_in_its_line(served, opened):
    with scripted(served, None) as serving:
        page = opened(serving.url)
        ask(page, PROMPT, Temperature="hot")
        page.locator("#status.error").wait_for()
        assert "temperature is 'hot'" in page.get_by_role("status").text_content()
        assert page.locator("article").count() == 0 and page.locator("#prompt").input_value() == PROMPT
        serving.engine.alive = False
        ask(page, PROMPT, Temperature="")
        page.get_by_text("the engine's process has died").wait_for()
        assert len(opened.wrong) == 2 and all("Failed to load resource" in line for line in opened.wrong)
        opened.wrong.clear()


def test_a_key_is_asked_for_where_one_is_needed_and_kept_nowhere(served, opened):
    with scripted(served, says(served, "x", "x"), Access(keys=(KEY.encode(),))) as serving:
        page = opened(serving.url)
        page.get_by_text("a key of this server is needed").wait_for()
        key = page.get_by_label("API key")
        assert page.evaluate("() => document.activeElement.id") == "key"
        key.fill(KEY)
        key.press("Tab")
        ask(page, PROMPT)
        page.locator(".verdict.same").wait_for()
        assert page.get_by_label("Continue text").is_checked(), "which the model is for, as is known by now"
        kept = page.evaluate("() => localStorage.length + sessionStorage.length + document.cookie.length")
        assert kept == 0 and KEY not in page.url and not page.context.cookies()
        page.reload()
        page.get_by_text("a key of this server is needed").wait_for()
        assert page.get_by_label("API key").input_value() == ""
        assert all("401" in line for line in opened.wrong)
        opened.wrong.clear()


def test_no_key_is_asked_for_where_none_is_needed(served, opened):
    with scripted(served, None) as serving:
        page = opened(serving.url)
        page.get_by_text("tokens of context").wait_for()
        assert page.get_by_label("API key").is_hidden()
        assert page.get_by_label("Continue text").is_checked(), "the embedded checkpoint is no chat's"


def test_the_keyboard_is_enough(served, opened):
    with scripted(served, says(served, *["x"] * 4)) as serving:
        page = opened(serving.url)
        page.get_by_text("tokens of context").wait_for()
        order = []
        for _ in range(6):
            page.keyboard.press("Tab")
            order.append(page.evaluate("() => document.activeElement.id || document.activeElement.localName"))
            ring = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert ring == "solid", order
        assert order == ["input", "prompt", "send", "new", "compare", "summary"]
        page.keyboard.press("Enter")
        for wanted in ("temperature", "most", "seed", "strategy"):
            page.keyboard.press("Tab")
            assert page.evaluate("() => document.activeElement.id") == wanted
        page.locator("#prompt").focus()
        page.keyboard.type("def f")
        page.keyboard.press("Enter")
        page.keyboard.type("(x):")
        page.keyboard.press("Control+Enter")
        page.locator(".verdict.same").wait_for()
        assert page.locator(".lead").first.text_content() == "def f\n(x):"
        page.get_by_label("Chat").check()
        page.locator("#prompt").focus()
        page.keyboard.type("hello")
        page.keyboard.press("Enter")
        page.locator(".verdict.same").nth(1).wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_axe_finds_nothing(served, opened, scheme, width):
    """Empty, answered, with all settings, and with an error."""
    source = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    with scripted(served, says(served, HOSTILE, HOSTILE, "a", "b"), Access(keys=(KEY.encode(),))) as serving:
        page = opened(serving.url, width=width, color_scheme=scheme)
        page.get_by_text("a key of this server is needed").wait_for()
        page.evaluate(source)
        opened.wrong.clear()
        found = [page.evaluate("() => axe.run()")]
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Tab")
        for verdict in (".same", ".parts"):
            ask(page, PROMPT)
            page.locator(f".verdict{verdict}").wait_for()
        page.get_by_text("Settings").click()
        found.append(page.evaluate("() => axe.run()"))
        assert overflow(page) == 0
    for result in found:
        assert len(result["passes"]) > 15
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in result["violations"]] == []


def test_the_picture_is_taken_when_both_texts_are_there(served, chromium, tmp_path):
    with scripted(served, says(served, "x", "x")) as serving:
        picture.shoot(chromium, serving.url, tmp_path / "page.png", 500)
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        asked = [text.request for text in serving.engine.texts]
        assert [request.strategy for request in asked] == ["auto", PLAIN]
        assert {request.seed for request in asked} == {int(picture.SETTINGS["Seed"])}


def test_nothing_moves_for_those_who_want_that(served, opened):
    def marks(page):
        return page.locator(".waits > .text").evaluate(
            "text => getComputedStyle(text, '::after').animationName"
        )

    with scripted(served, None) as serving:
        for motion, name in (("reduce", "none"), ("no-preference", "wait")):
            page = opened(serving.url, reduced_motion=motion)
            ask(page, PROMPT)
            assert marks(page) == name
            page.keyboard.press("Escape")
            page.get_by_text("Stopped.").wait_for()
