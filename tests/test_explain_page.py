"""The page of orthrus explain in a browser: complete, and no wider than the window."""

from __future__ import annotations

import html
import json
import re
import subprocess

import pytest

from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli.explain_page import page
from qwen3_model.explain import explain
from tools.browser import CHROMIUM, QUIET

PROMPT = 'def f(x):  # <b>&amp;</b><script>document.title = "hacked"</script> ' + "wide" * 60 + "\n"
WIDTHS = 400, 1200
# The page in a frame of each width; a frame of the same origin may be measured from outside.
HARNESS = """<!DOCTYPE html><title>-</title>%s<pre id="found"></pre><script>
onload = () => {
  found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
    return {
      width: frame.clientWidth, shown: page.documentElement.clientWidth,
      needed: page.documentElement.scrollWidth, text: page.getElementById("text").textContent,
      news: all("mark").map(mark => mark.textContent), articles: all("article").length,
      kept: all("g.kept").length, own: all("g.own").length, left: all("g.left").length,
      links: all("#text a").every(a => page.querySelector(a.getAttribute("href"))),
      foreign: all("script, img, link, iframe, b").length, title: page.title,
    };
  }));
};
</script>"""


@pytest.fixture(scope="module")
def model():
    return Qwen3.from_pretrained(EMBEDDED, device="cpu")


def in_browser(source: str, folder) -> list[dict]:
    """What a browser finds in the page at each width."""
    frame = '<iframe style="border:0;width:{}px;height:700px" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, html.escape(source)) for width in WIDTHS)
    file = folder / "harness.html"
    file.write_text(HARNESS % frames, encoding="utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("nodes", [0, 63])
def test_a_page_is_complete_and_fits_its_window(model, tmp_path, nodes):
    settings = {"max_new_tokens": 12, "tree_nodes": nodes, "temperature": 0.7, "seed": 1}
    result, cycles = explain(model, model.text.encode(PROMPT), **settings)
    pages = in_browser(page(model.text, PROMPT, result, cycles, "embedded"), tmp_path)
    drafts = [cycle for cycle in cycles if cycle.run.tree is not None]
    proposed = sum(len(cycle.run.tree) - 1 for cycle in drafts)
    kept = sum(len(cycle.path) - 1 for cycle in drafts)
    assert [found["width"] for found in pages] == [*WIDTHS] and drafts
    for found in pages:
        assert found["needed"] <= found["shown"] <= found["width"]
        assert found["text"] == PROMPT + result.text
        assert "".join(found["news"]) == result.text
        assert found["articles"] == 1 + result.stats.cycles and found["links"]
        assert (found["kept"], found["left"]) == (kept, proposed - kept)
        assert found["own"] == sum(cycle.bonus is not None for cycle in drafts)
        assert found["foreign"] == 0 and found["title"] == "orthrus explain"


def test_a_page_asks_for_nothing(model):
    result, cycles = explain(model, model.text.encode("def f():"), max_new_tokens=6, tree_nodes=5)
    source = page(model.text, "def f():", result, cycles, "embedded")
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link", source)
    assert "default-src 'none'" in source and "prefers-color-scheme: dark" in source
