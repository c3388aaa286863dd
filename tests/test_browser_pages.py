"""The home page, the visitor's own, the API's and the one to sign in, as people see them in a browser."""

import os
import re
import signal
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser import NARROW, Browser, assert_looks, overflow, press_until
from tests.processes import Program, Server, eventually, frozen
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
    """Return the visitor's own number; with others the page counts on."""
    own = int(page.locator("#number").get_attribute("data-number") or "")
    assert int(page.locator("#number").inner_text().replace(",", "")) >= own
    return own


def processes(page: Page) -> list[int]:
    """Return the pids in the commands of the home page: the manager's, then the workers'."""
    return [int(code.removeprefix("kill -9 ")) for code in page.locator(".kill code").all_inner_texts()]


def test_each_visit_shows_its_number_the_last_visits_and_its_worker(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    first = number(page)
    for expected in range(first + 1, first + 7):
        page.reload()
        assert number(page) == expected
    expect(page.get_by_role("status")).to_have_text(f"You are visitor number {first + 6}.")
    rows = [row.split("\t") for row in page.locator("#visits tbody").inner_text().split("\n")]
    assert [int(row[0]) for row in rows] == list(range(first + 6, first + 1, -1))
    workers = dict(zip("AB", processes(page)[1:], strict=True))
    assert {*workers.values()} == set(server.children("worker"))
    assert {row[1] for row in rows} <= {f"{letter} · {pid}" for letter, pid in workers.items()}
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", row[2]) for row in rows)
    assert page.locator("footer").inner_text().strip() == f"Answered by worker process {rows[0][1][4:]}."


def test_the_number_counts_up_when_others_come_and_shows_their_workers(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    own = number(page)
    for _ in range(3):
        other = browser.open(server.url)
    expect(page.locator("#number")).to_have_text(f"{own + 3:,}")
    expect(page.locator("#visits tbody tr").first).to_contain_text(f"{own + 3:,}")
    before = processes(page)
    os.kill(before[1], signal.SIGKILL)  # a worker
    expect(page.locator(".kill").get_by_text(f"kill -9 {before[1]}", exact=True)).to_have_count(0)
    expect(page.locator(".kill button")).to_have_count(len(before))
    expect(page.get_by_role("status")).to_have_text(f"You are visitor number {own:,}.")
    assert [number(page), number(other)] == [own, own + 3]
    page.get_by_role("link", name="Take another number").click()
    expect(page.get_by_role("status")).to_have_text(f"You are visitor number {own + 4:,}.")


def test_a_hidden_page_asks_nothing(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    change = "document.dispatchEvent(new Event('visibilitychange'))"
    page.clock.install()
    with page.expect_response("**/visits.json?after=*"):
        page.evaluate(hide % "false" + change)
    page.evaluate(hide % "true" + change)
    asked.clear()
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_response("**/visits.json?after=*"):
        page.evaluate(hide % "false" + change)


def test_a_killed_worker_and_manager_change_nothing_that_a_visitor_sees(
    browser: Browser, start_server: Callable[..., Server]
) -> None:
    server = start_server("--workers", "2")
    page = browser.open(server.url)
    first, (manager, worker, _) = number(page), processes(page)
    page.goto("about:blank")  # or it asks while there is no manager
    for pid, kind in ((worker, "worker"), (manager, "manager")):
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid, kind=kind: pid not in server.children(kind), f"the end of a {kind}")  # type: ignore[misc]
    eventually(lambda: len(server.children("worker")) == 2 and server.children("manager"), "their successors")
    page.goto(server.url)
    assert number(page) == first + 1
    assert not {manager, worker} & set(processes(page))


def test_a_command_is_copied(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".kill button").first.click()
    expect(page.locator(".kill button").first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == f"kill -9 {processes(page)[0]}"


def test_without_scripts_no_button_promises_what_needs_one(browser: Browser, server: Server) -> None:
    page = browser.open(server.url, javascript=False)
    assert len(processes(page)) == 3
    assert page.locator("main button").count() == 0
    page.goto(f"{server.url}/docs")
    assert page.locator("main button:visible, main form:visible").count() == 0
    expect(page.locator("section:has(#api_put) pre").first).to_contain_text("curl --request PUT")


def test_a_page_has_at_most_60_kilobytes(browser: Browser, server: Server) -> None:
    loaded = "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
    for path in ("/", "/session", "/docs", "/sign-in", "/nowhere"):
        page = browser.open(server.url + path)
        sizes = page.evaluate(f"{loaded}.map(entry => [entry.name, entry.transferSize])")
        assert 8_000 < sum(size for _, size in sizes) <= 60_000, sizes
        assert any("style.css" in name for name, _ in sizes)
    browser.complaints.clear()  # Chromium complains of the status 404


def test_a_lab_that_is_off_says_how_to_turn_it_on(browser: Browser, start_server: Callable[..., Server]) -> None:
    page = browser.open(f"{start_server('--workers', '1', '--no-lab').url}/lab")
    expect(page.locator("main")).to_contain_text("counter-server run --lab")
    assert_looks(page, "lab-off")
    browser.complaints.clear()  # Chromium complains of the status 404


def test_every_page_is_one_link_away_and_links_back_by_keyboard_alone(browser: Browser, server: Server) -> None:
    page = browser.open(server.url)
    titles = page.locator("nav li a").all_inner_texts()
    assert titles[0] == "Home"
    assert "Your counter" in titles
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


def test_a_request_is_tried_by_keyboard_and_its_command_is_written(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/docs")
    form = page.get_by_role("form", name="Try: Increment a counter")
    for field, text in (
        ("name", "it's/a test"),
        ("Idempotency-Key", "key-1"),
        ("by", "9223372036854775806"),
        ("minimum", "1"),
    ):
        form.get_by_label(field, exact=True).fill(text)
    command = page.locator("section:has(#api_increment) .copy code")
    expect(command).to_have_text(
        "curl --request POST --header 'Idempotency-Key: key-1' --json '{\"by\":9223372036854775806,\"minimum\":1}'"
        " 'THE/api/v1/counters/it'\\''s%2Fa%20test/increment'".replace("THE", server.url)
    )
    for replayed in (False, True):
        page.keyboard.press("Enter")
        expect(form.locator(".answer p")).to_have_text("200 OK")
        expect(form.locator(".answer pre")).to_contain_text('{"counter":"it\'s/a test","value":9223372036854775806}')
        if replayed:
            expect(form.locator(".answer pre")).to_contain_text("Idempotent-Replayed: true")
    assert_looks(page, "docs-answered")
    form.get_by_label("by", exact=True).fill("one")
    form.get_by_role("button", name="Send").click()
    expect(form.locator(".answer p")).to_have_text("400 BAD REQUEST")
    expect(form.locator(".answer pre")).to_contain_text('"outcome":"not_applied"')
    browser.complaints[:] = [said for said in browser.complaints if "400" not in said]


def test_the_command_on_the_page_runs(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/docs")
    form = page.get_by_role("form", name="Try: Set a counter")
    form.get_by_label("name", exact=True).fill("it's ü/%")
    form.get_by_label("value", exact=True).fill("7")
    command = page.locator("section:has(#api_put) .copy code").inner_text()
    with Program("-c", command, program="/bin/sh", environment={"COUNTER_SERVER_TOKEN": TOKEN}) as shell:
        assert shell.wait() == 0
        assert shell.output == ['{"counter":"it\'s ü/%","value":7}']
    form.get_by_role("button", name="Send").click()
    expect(form.locator(".answer p")).to_have_text("401 UNAUTHORIZED")
    browser.complaints[:] = [said for said in browser.complaints if "401" not in said]


def test_each_error_looks_like_a_page_and_503_asks_again_by_itself(
    browser: Browser, start_server: Callable[..., Server]
) -> None:
    server = start_server("--workers", "1")
    page = browser.open(f"{server.url}/nowhere")
    assert_looks(page, "error-404")
    page.goto(f"{server.url}/session")
    title = page.get_by_role("heading", level=1)
    with frozen(*server.children("manager")):
        page.get_by_role("button", name="Add one").click()
        expect(title).to_have_text("Not available at this moment")
        assert_looks(page, "error-503")  # a page that answers a form stays
        page.goto(server.url)
        expect(title).to_have_text("Not available at this moment")
    expect(page.get_by_role("status")).to_contain_text("You are visitor number")
    browser.complaints.clear()  # Chromium complains of each status


def test_an_operator_signs_in_and_out_by_keyboard_alone(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/sign-in?next=/session")
    press_until(page, "Tab", "#token")
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("nav a[aria-current=page]")).to_have_text("Your counter")
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
    lines = "(n => n.getBoundingClientRect().height / parseFloat(getComputedStyle(n).lineHeight))"
    for value in (9_998, 99_998, 9_999_998, 999_999_998, 2**63 - 2):
        status = page.request.put(
            f"{server.url}/api/v1/counters/visits",
            data=f'{{"value": {value}}}',
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"},
        )
        assert status.ok
        page.reload()
        assert number(page) == value + 1
        assert overflow(page) <= 0
        is_in_one_line = page.evaluate(f"{lines}(document.getElementById('number'))") < 1.5
        assert is_in_one_line or value > 10**12, value
