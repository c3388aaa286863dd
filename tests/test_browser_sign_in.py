"""The form to sign in, as people see and use it in a browser."""

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from tests.browser import LOOKS, NARROW, Browser, accessibility_violations, overflow, press_until, screenshot
from tests.processes import Server
from tests.test_access import TOKEN

pytestmark = pytest.mark.slow


@pytest.fixture
def server(start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    return start_server("--workers", "2")


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


@pytest.mark.parametrize(("width", "colours"), LOOKS)
def test_the_form_fits_and_is_accessible(browser: Browser, server: Server, colours: str, width: int) -> None:
    page = browser.open(f"{server.url}/sign-in", width=width, colours=colours)  # type: ignore[arg-type]
    assert accessibility_violations(page) == []
    assert overflow(page) <= 0
    screenshot(page, f"sign-in-{colours}-{width}")


def test_an_error_is_announced_and_shown_at_the_field(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/sign-in", javascript=False, width=NARROW)
    page.locator("#token").fill("not the token of this server")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("That is not this server's token.")
    expect(page.locator("#token")).to_have_accessible_description("That is not this server's token.")
    assert overflow(page) <= 0
    browser.complaints[:] = [said for said in browser.complaints if "401" not in said]  # Chromium complains of it
