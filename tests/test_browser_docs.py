"""The API's page as people see it in a browser."""

from collections.abc import Callable
from typing import Literal

import pytest
from playwright.sync_api import expect

from tests.browser import LOOKS, Browser, accessibility_violations, overflow, press_until, screenshot
from tests.processes import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server("--workers", "1", "--rate-limit", "100/minute")


def test_each_operation_has_its_parameters_answers_and_an_example(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/docs", javascript=False)
    assert page.locator("h1").inner_text() == "API"
    increment = page.locator("section", has=page.locator("#api_increment"))
    expect(increment).to_contain_text("Idempotency-Key")
    expect(increment).to_contain_text("429")
    expect(increment).to_contain_text("Retry-After")
    expect(increment.locator("pre")).to_contain_text(f"{server.url}/api/v1/counters/visits/increment")
    expect(page.locator("section", has=page.locator("#api_put"))).to_contain_text("operators")
    headings = page.locator("section h2").all_inner_texts()
    assert headings == page.locator("nav[aria-label=Operations] a").all_inner_texts()
    assert {"List counters", "Increment a counter", "Set a counter", "Show a counter as a picture"} <= set(headings)


def test_every_part_is_reached_by_keyboard_alone(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/docs")
    press_until(page, "Tab", "nav[aria-label=Operations] a[href='#api_delete']")
    page.keyboard.press("Enter")
    expect(page.locator("#api_delete")).to_be_in_viewport()
    press_until(page, "Tab", "section:has(#api_delete) pre")


@pytest.mark.parametrize(("width", "colours"), LOOKS)
def test_it_fits_and_is_accessible(
    browser: Browser, server: Server, colours: Literal["light", "dark"], width: int
) -> None:
    page = browser.open(f"{server.url}/docs", width=width, colours=colours)
    assert accessibility_violations(page) == []
    assert overflow(page) == 0
    screenshot(page, f"documentation-{colours}-{width}")


def test_a_badge_is_shown_as_a_picture(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    width = page.evaluate(
        """async url => {
            const picture = new Image();
            picture.src = url;
            document.body.append(picture);
            await picture.decode();
            return picture.naturalWidth;
        }""",
        "/badge/visits.svg?label=visitors&color=green",
    )
    assert 60 < width < 90
