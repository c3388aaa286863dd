"""The home page, the visitor's own, the API's and the one to sign in, as people see them in a browser."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser import NARROW, Browser, assert_looks, overflow, press_until
from tests.processes import Server
from tests.test_access import TOKEN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("server") / "data"
    options = ("--workers", "2", "--data-dir", data_dir, "--rate-limit", "1000/minute")
    with Server(*options, environment={"COUNTER_SERVER_TOKEN": TOKEN}) as server:
        yield server


@pytest.mark.parametrize("path", ["", "session", "docs", "sign-in"])
def test_it_fits_and_is_accessible(browser: Browser, server: Server, path: str) -> None:
    assert_looks(browser.open(f"{server.url}/{path}"), path or "home")


def number(page: Page) -> int:
    shown = page.locator("#number")
    assert shown.get_attribute("data-number") == shown.inner_text()
    return int(shown.inner_text())


def test_each_visit_shows_its_number_the_last_visits_and_its_worker(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    first = number(page)
    for expected in range(first + 1, first + 7):
        page.reload()
        assert number(page) == expected
    expect(page.get_by_role("status")).to_have_text(f"You are visitor number {first + 6}.")
    rows = [row.split("\t") for row in page.locator("#visits tbody").inner_text().split("\n")]
    assert [int(row[0]) for row in rows] == list(range(first + 6, first + 1, -1))
    assert {int(row[1]) for row in rows} <= set(server.children("worker"))
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", row[2]) for row in rows)
    assert page.locator("footer").inner_text().strip() == f"Answered by worker process {rows[0][1]}."


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


def test_every_part_is_reached_by_keyboard_alone(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/docs")
    press_until(page, "Tab", "nav[aria-label=Operations] a[href='#api_delete']")
    page.keyboard.press("Enter")
    expect(page.locator("#api_delete")).to_be_in_viewport()
    press_until(page, "Tab", "section:has(#api_delete) pre")


def test_an_operator_signs_in_and_out_by_keyboard_alone(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/sign-in?next=/session")
    press_until(page, "Tab", "#token")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("nav a[aria-current=page]")).to_have_text("Your own")
    assert "session" not in page.evaluate("document.cookie")
    request = "{method: 'PUT', headers: {'Content-Type': 'application/json'}, body: '{\"value\": 7}'}"
    assert page.evaluate(f"async () => (await fetch('/api/v1/counters/x', {request})).status") == 200
    page.goto(f"{server.url}/sign-in")
    press_until(page, "Tab", "button:text-is('Sign out')")
    page.keyboard.press("Enter")
    expect(page.locator("#number")).to_be_visible()
    page.goto(f"{server.url}/sign-in")
    expect(page.locator("#token")).to_be_visible()


def test_an_error_is_announced_and_shown_at_the_field(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/sign-in", javascript=False, width=NARROW)
    page.locator("#token").fill("not the token of this server")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("That is not this server's token.")
    expect(page.locator("#token")).to_have_accessible_description("That is not this server's token.")
    assert overflow(page) <= 0
    browser.complaints[:] = [said for said in browser.complaints if "401" not in said]  # Chromium complains of it


def test_the_largest_number_fits_on_a_telephone(browser: Browser, server: Server) -> None:
    page = browser.open(server.url, width=NARROW)
    status = page.request.put(
        f"{server.url}/api/v1/counters/visits",
        data='{"value": 9223372036854775806}',
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
    )
    assert status.ok
    page.reload()
    assert number(page) == 2**63 - 1
    assert overflow(page) <= 0
