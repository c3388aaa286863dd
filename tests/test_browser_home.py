"""The home page, and the common parts of every page, as people see them in a browser."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.browser import LOOKS, NARROW, Browser, accessibility_violations, overflow, press_until, screenshot
from tests.processes import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server("--workers", "2")


def number(page: Page) -> int:
    shown = page.locator("#number")
    assert shown.get_attribute("data-number") == shown.inner_text()
    return int(shown.inner_text())


def test_each_visit_shows_its_number_the_last_visits_and_its_worker(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    assert number(page) == 1
    for expected in range(2, 9):
        page.reload()
        assert number(page) == expected
        expect(page.get_by_role("status")).to_have_text(f"You are visitor number {expected}.")
    rows = [row.split("\t") for row in page.locator("#visits tbody").inner_text().split("\n")]
    assert [int(row[0]) for row in rows] == [8, 7, 6, 5, 4]
    workers = server.children("worker")
    assert {int(row[1]) for row in rows} <= set(workers)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", row[2]) for row in rows)
    footer = re.fullmatch(r"Answered by worker process (\d+)\.", page.locator("footer").inner_text().strip())
    assert footer
    assert int(footer[1]) == int(rows[0][1])


def test_it_works_without_javascript(browser: Browser, server: Server) -> None:
    page = browser.open(server.url, javascript=False)
    assert number(page) == 1
    page.reload()
    assert number(page) == 2


def test_every_page_is_one_link_away_and_links_back_by_keyboard_alone(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    titles = page.locator("nav a").all_inner_texts()
    assert titles[0] == "Home"
    assert "Your own" in titles
    for title in titles[1:]:
        press_until(page, "Tab", f"nav a:text-is('{title}')")
        page.keyboard.press("Enter")
        expect(page.locator("nav a[aria-current=page]")).to_have_text(title)
        press_until(page, "Tab", "nav a:text-is('Home')")
        page.keyboard.press("Enter")
        expect(page.locator("nav a[aria-current=page]")).to_have_text("Home")
    page.keyboard.press("Tab")
    expect(page.locator("a.skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_the_visitors_own_counter_counts_by_keyboard(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/session")
    expect(page.locator("#sentence")).to_have_text("counter is 0")
    for expected in (1, 2):
        press_until(page, "Tab", "button:text-is('Add one')")
        page.keyboard.press("Enter")
        expect(page.locator("#sentence")).to_have_text(f"counter is {expected}")


@pytest.mark.parametrize("path", ["", "/session"])
@pytest.mark.parametrize(("width", "colours"), LOOKS)
def test_it_fits_and_is_accessible(browser: Browser, server: Server, path: str, colours: str, width: int) -> None:
    page = browser.open(server.url + path, width=width, colours=colours)  # type: ignore[arg-type]
    assert accessibility_violations(page) == []
    assert overflow(page) <= 0
    screenshot(page, f"{path[1:] or 'home'}-{colours}-{width}")


def test_the_largest_number_fits_on_a_telephone(browser: Browser, server: Server) -> None:
    page = browser.open(server.url, width=NARROW)
    status = page.request.put(
        f"{server.url}/api/v1/counters/visits",
        data='{"value": 9223372036854775806}',
        headers={"Content-Type": "application/json"},
    )
    assert status.ok
    page.reload()
    assert number(page) == 2**63 - 1
    assert overflow(page) <= 0
