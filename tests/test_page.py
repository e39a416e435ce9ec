"""The files of the page at `/`: what is sent with them, what is in them, and who gets them. What they do in a
browser: test_page_browser.py."""

from __future__ import annotations

import ast
import re
import struct
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from serving import ScriptedEngine, Serving

from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.config import Qwen3Config
from qwen3_model.openai.served import Served
from qwen3_model.serve import page
from qwen3_model.serve.guard import Access
from qwen3_model.serve.limits import Limits
from qwen3_model.text import Text
from tools.docs import page as picture

KEY = "k" * 20
SOURCES = {file.name: file.read_text(encoding="utf-8") for file in page.FILES.values()}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}


def server(access=None):
    """A server whose engine says nothing."""

    async def start():
        return ScriptedEngine()

    served = Served("embedded", Qwen3Config.from_folder(EMBEDDED), Text(EMBEDDED))
    return Serving(served, start, Limits(), access)


@pytest.fixture(scope="module")
def http():
    with server() as serving, httpx.Client(base_url=serving.url) as client:
        yield client


def test_each_file_is_sent_with_its_type_and_a_policy(http):
    kinds = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml",
             "js": "text/javascript; charset=utf-8"}  # fmt: skip
    assert {"/", "/page/page.css", "/page/page.js"} < set(page.FILES)
    for path, file in page.FILES.items():
        answer, head = http.get(path), http.head(path)
        assert answer.status_code == head.status_code == 200 and not head.content
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"] == kinds[file.suffix[1:]] == head.headers["content-type"]
        policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert policy.pop("require-trusted-types-for") == "'script'"
        nothing = {"default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"}
        assert {rule for rule, whose in policy.items() if whose == "'none'"} == nothing
        assert {whose for rule, whose in policy.items() if rule not in nothing} == {"'self'"}
        assert {"script-src", "style-src", "connect-src"} <= set(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") or name == "set-cookie" for name in answer.headers)


def test_there_are_no_other_files_and_nothing_is_counted_by_path(http):
    for path in ("/page", "/page/", "/page/nothing.js", "/page/index.html", "/index.html", "/page/../page.py",
                 "/page/%2e%2e/page.py", "/page//page.js", "/page/page.js/", "/web/page.js"):  # fmt: skip
        assert http.get(path).status_code == 404, path
    assert http.post("/", json={}).status_code == http.post("/page/page.js", json={}).status_code == 405
    assert http.post("/", content=b"{}").status_code == 415
    for path in page.FILES:
        assert http.get(path, headers={"host": "evil.com"}).status_code == 403, path
    counted = re.findall(r"^orthrus_refused_total(.*) ", http.get("/metrics").text, re.M)
    assert sorted(counted) == [f'{{status="{status}"}}' for status in (403, 404, 405, 415)]


def test_the_page_needs_no_key_and_what_it_asks_for_does():
    with server(Access(keys=(KEY.encode(),))) as serving, httpx.Client(base_url=serving.url) as client:
        for path in page.FILES:
            assert client.get(path).status_code == 200, path
            assert client.get(path, headers={"host": "evil.com"}).status_code == 403, path
        for path in ("/v1/models", "/page/nothing.js", "/page/", "/metrics"):
            assert client.get(path).status_code == 401, path
        card = client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).json()["data"][0]
        assert (card["id"], card["max_model_len"], card["converses"]) == ("embedded", 1000, False)


def test_every_file_is_packaged():
    """And every file of the folder is sent."""
    config = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    patterns = ast.literal_eval(re.search(r"^qwen3_model = (\[.*\])$", config, re.M)[1])
    assert set(page.FOLDER.iterdir()) == set(page.FILES.values())
    for file in page.FILES.values():
        name = str(file.relative_to(EMBEDDED.parent))
        assert any(fnmatch(name, pattern) for pattern in patterns), name


class Elements(HTMLParser):
    """All elements of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_nothing_in_the_page_is_a_script_but_its_files():
    elements = Elements(SOURCES["index.html"]).found
    named = set()
    for tag, attributes in elements:
        assert tag != "style" and not any(name == "style" or name.startswith("on") for name in attributes)
        assert tag != "script" or attributes.get("src"), "no script stands in the page"
        named |= {value for name, value in attributes.items() if name in ("src", "href")}
    assert re.findall(r"<script[^>]*>(.*?)</script>", SOURCES["index.html"], re.S) == [""]
    for script in SCRIPTS.values():
        named |= {f"page/{name}" for name in re.findall(r' from "\./(.*?)"', script)}
    assert {f"/{name}" for name in named} == set(page.FILES) - {"/"}
    for name, source in SOURCES.items():
        addresses = source.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:|data:(?! )", addresses), name


def test_text_enters_the_document_as_text_alone():
    parses = (
        r"HTML|\beval\b|Function\(|document\.write|ContextualFragment|DOMParser|setAttribute|srcdoc|\.src\b"
    )
    for name, script in SCRIPTS.items():
        assert not re.search(parses, script), name
        assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", script), f"{name} keeps nothing"
        assert len(script.splitlines()) <= 350
    assert sum("textContent" in script for script in SCRIPTS.values()) >= 2


def test_the_scripts_know_the_pages_elements():
    elements = [attributes for _, attributes in Elements(SOURCES["index.html"]).found]
    ids = [attributes["id"] for attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = set(re.findall(r'(?:part|typed)\("(\w[\w-]*)"\)', SCRIPTS["page.js"]))
    assert len(asked) > 10 and asked <= set(ids)
    for attributes in elements:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            assert attributes.get(name) is None or attributes[name] in ids
    assert [attributes for attributes in elements if {"aria-live", "role"} & set(attributes)] == [
        {"id": "compare", "type": "checkbox", "role": "switch", "checked": None},
        {"id": "status", "role": "status"},
    ], "one region is read out, and politely"


def test_the_picture_is_of_the_page_as_it_is(monkeypatch, refused):
    """What is typed for it has its places still; and a machine without Chromium gets one line."""
    assert set(picture.SETTINGS) <= set(
        re.findall(r"<label for=\"[^>]*>(.*?)</label>", SOURCES["index.html"])
    )
    header = picture.PICTURE.read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and struct.unpack(">II", header[16:]) == (1200, picture.HEIGHT)
    assert picture.PICTURE.stat().st_size < 2**18
    monkeypatch.setattr(picture, "CHROMIUM", None)
    assert "apt-get install chromium" in refused(picture.main)


# Contrast, as WCAG 2.2 defines it


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


TEXTS = [
    *[(ink, ground) for ink in ("ink", "quiet", "good", "bad") for ground in ("ground", "card")],
    ("ink", "odd"), ("ink", "even"), ("on-accent", "accent"), ("good", "good-ground"), ("bad", "bad-ground"),
]  # fmt: skip
SHAPES = [
    *[(line, ground) for line in ("edge", "accent") for ground in ("ground", "card")],
    *[(f"{run}-line", ground) for run in ("odd", "even") for ground in ("odd", "even", "card")],
]


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(dark):
    assert contrast("#000000", "#ffffff") == 21
    schemes = re.findall(r":root \{(.*?)\}", SOURCES["page.css"], re.S)
    light, other = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme)) for scheme in schemes)
    assert set(light) == set(other) == {name for pair in [*TEXTS, *SHAPES] for name in pair} | {"rule"}
    colours = other if dark else light
    for pairs, least in ((TEXTS, 4.5), (SHAPES, 3.0)):
        for one, two in pairs:
            assert contrast(colours[one], colours[two]) >= least, (one, two)
