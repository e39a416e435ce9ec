"""Make docs/page.png anew: the page of `orthrus serve` in Chromium, with a run of the embedded checkpoint on
this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.command import Parser, fail, writable
from tools.browser import CHROMIUM, QUIET

if TYPE_CHECKING:
    from playwright.sync_api import Browser

COMMAND = "tools.docs.page"
PICTURE = Path(__file__).resolve().parents[2] / "docs/page.png"
SERVE = "from qwen3_model.cli import main; raise SystemExit(main())"
HEIGHT = 860  # px of the window
SECONDS = 300  # that both texts may take, on a busy machine
PROMPT = "class Stack:\n    def __init__(self, items=None):\n"
SETTINGS = {"Most tokens": "90", "Temperature": "0.5", "Seed": "3"}


@contextmanager
def served() -> Iterator[str]:
    """The address of `orthrus serve` with the embedded checkpoint on the CPU. Raises ValueError where it
    does not start."""
    command = [sys.executable, "-c", SERVE, "serve", "--device", "cpu", "--port", "0", "--slots", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r" is served at (\S+) ", process.stdout.readline())
            if found is None:
                raise ValueError("orthrus serve does not start: try it by itself")
            yield found[1]
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


def shoot(browser: Browser, url: str, out: Path, width: int) -> None:
    """Ask the page once, with a comparison, and write what a window of `width` px shows then."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme="light")
    page.goto(url)
    page.get_by_text("tokens of context").wait_for()
    page.get_by_text("Settings").click()
    for label, value in SETTINGS.items():
        page.get_by_label(label).fill(value)
    page.get_by_text("Settings").click()
    page.locator("#prompt").fill(PROMPT)
    page.get_by_role("button", name="Send").click()
    page.locator(".verdict").wait_for(timeout=SECONDS * 1000)
    page.screenshot(path=out)
    page.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split()),
        epilog="example: make page-picture",
    )
    parser.add_argument("--out", type=writable, default=PICTURE, help="the file; default: docs/page.png")
    parser.add_argument("--width", type=int, default=1200, help="px of the window; default: %(default)s")
    given = parser.parse_args(arguments)
    if CHROMIUM is None:
        fail(COMMAND, "Chromium is not installed (Debian: apt-get install chromium)")
    try:
        with chromium() as browser, served() as url:
            shoot(browser, url, given.out, given.width)
    except (ImportError, ValueError) as error:
        fail(COMMAND, " ".join(str(error).split()))
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
