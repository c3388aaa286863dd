"""A real browser for tests: Debian's Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import Page, expect, sync_playwright

from tests.processes import PATIENCE, ROOT

SCREENSHOTS = ROOT / "build" / "screenshots"
NARROW = 360  # pixels: a small phone
_WIDE = 1280
_LOOKS: list[tuple[int, Literal["light", "dark"]]] = [(NARROW, "dark"), (_WIDE, "light")]
_AXE = Path(__file__).parent / "axe_core" / "axe.min.js"
# As root it cannot have a sandbox; and it may talk only to our server.
_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
_OPTIONS += ["--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

expect.set_options(timeout=PATIENCE * 1000)


class Browser:
    """Opens pages, each as a new visitor, and records their errors."""

    def __init__(self, chromium: Chromium) -> None:
        self._chromium = chromium
        self.complaints: list[str] = []  # console errors, exceptions, and requests to other hosts

    def open(self, url: str, *, width: int = _WIDE, javascript: bool = True) -> Page:
        """Open `url` as a new visitor, without cookies."""
        context = self._chromium.new_context(
            viewport={"width": width, "height": 900},
            java_script_enabled=javascript,
            reduced_motion="reduce",
        )
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        own = urlsplit(url).netloc
        page.on("console", lambda message: self._note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", lambda asked: self._note(asked.url) if urlsplit(asked.url).netloc != own else None)
        page.goto(url)
        return page

    def _note(self, complaint: str) -> None:
        self.complaints.append(complaint)

    def close(self) -> None:
        """Close every page."""
        for context in self._chromium.contexts:
            context.close()


def assert_looks(page: Page, name: str) -> None:
    """Check that the page is accessible and fits into the window, on a telephone in the dark, and on a wide screen.

    A picture of each is saved in `build/screenshots`.
    """
    page.evaluate(_AXE.read_text())
    for width, colours in _LOOKS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=colours)
        found: dict[str, Any] = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        assert len(found["passes"]) > 5, "axe-core checked nothing"
        broken = [(violation["id"], [node["html"] for node in violation["nodes"]]) for violation in found["violations"]]
        assert broken == [], (name, width, colours)
        assert overflow(page) <= 0, (name, width, colours)
        page.screenshot(path=SCREENSHOTS / f"{name}-{colours}-{width}.png")


def overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than the window."""
    width = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert isinstance(width, int)
    return width


def press_until(page: Page, key: str, selector: str, most: int = 60) -> None:
    """Press a key until the element has the focus, as a person without a mouse does."""
    wanted = page.locator(selector)
    for _ in range(most):
        page.keyboard.press(key)
        if wanted.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"{selector} does not have the focus after pressing {key} {most} times")


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Run the browser's process, or skip the test if Chromium is not installed."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: install the Debian package chromium")
    with sync_playwright() as playwright:
        process = playwright.chromium.launch(executable_path=program, args=_OPTIONS)
        try:
            yield process
        finally:
            process.close()
