"""The dashboard as people see and use it in a browser: live, by keyboard alone, on a telephone, in the dark."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from counter_server.operations import LARGEST, SMALLEST
from counter_server.state import State
from tests.browser import Browser, assert_looks, press_until
from tests.load import open_client
from tests.processes import Server, eventually

pytestmark = pytest.mark.slow

NAMES = {"tickets": 41, "a/b": 7, "100% sure?&#+": -3, "שלום עולם": 12, "計数器": 5, "<b>bold</b>": 1}
SOON = 2000  # milliseconds of the page's clock within which the page must ask for a change


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dashboard") / "data"


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[Server]:
    """Return a server for all tests; only the last one stops it."""
    with Server("--workers", "2", "--data-dir", data_dir) as server:
        yield server


@pytest.fixture
def elsewhere(server: Server, data_dir: Path) -> Iterator[State]:
    """Open a state as another program that uses the same counters: exactly those of `NAMES`."""
    with open_client(f"manager://{data_dir}") as state:
        for name, _ in state.counters().counters:
            state.counter(name).delete()
        for name, value in NAMES.items():
            state.counter(name).set(value)
        yield state


def row(page: Page, name: str) -> Locator:
    name_only = re.compile(f"^{re.escape(name)}$")
    return page.locator("#counters tbody tr").filter(has=page.locator("th bdi").filter(has_text=name_only))


def value(page: Page, name: str) -> Locator:
    return row(page, name).locator("[data-value]")


def names(page: Page) -> list[str]:
    return page.locator("#counters tbody th bdi").all_inner_texts()


def opened(browser: Browser, server: Server, query: str = "") -> Page:
    """Open the page, and wait until it is live."""
    page = browser.open(f"{server.url}/counters{query}")
    expect(page.locator("#updates")).to_have_text("Up to date.")
    return page


@pytest.fixture
def page(browser: Browser, server: Server, elsewhere: State) -> Page:
    return opened(browser, server)


def test_a_change_made_elsewhere_is_seen_within_two_seconds(browser: Browser, server: Server, elsewhere: State) -> None:
    """The page's own clock measures the time, as it stands still on a slow machine."""
    page = opened(browser, server)
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    page.reload()
    expect(page.locator("#updates")).to_have_text("Up to date.")
    expect(value(page, "tickets")).to_have_text("41")
    asked: list[Route] = []  # not answered yet, so the page sends only one
    page.route("**/counters.json*", lambda route: asked.append(route))

    def update() -> None:
        page.evaluate("true")  # delivers all events until now
        assert asked == [], "it should ask by its clock"
        page.clock.run_for(SOON)
        eventually(lambda: page.evaluate("true") and asked, "the page's question")
        asked.pop().continue_()

    elsewhere.counter("tickets").increment()
    update()
    expect(value(page, "tickets")).to_have_text("42")
    elsewhere.counter("new: one").increment()
    elsewhere.counter("a/b").delete()
    update()
    expect(value(page, "new: one")).to_have_text("1")
    assert names(page) == sorted({*NAMES, "new: one"} - {"a/b"})
    elsewhere.counter("tickets").set(LARGEST)
    update()
    expect(value(page, "tickets")).to_have_text(str(LARGEST))


def test_rates_the_manager_and_the_processes_are_live(page: Page, server: Server, elsewhere: State) -> None:
    expect(page.locator("[data-figure=Process]")).to_have_text(str(server.children("manager")[0]))
    expect(page.locator("[data-mean=batches]")).to_have_text("0.0/s")
    elsewhere.counter("another").increment()
    expect(page.locator("[data-figure=Counters]")).to_have_text(str(len(NAMES) + 1))
    expect(page.locator("[data-mean=batches]")).to_have_text(re.compile(r"^0\.[1-9]/s$"))
    expect(page.locator("[data-mean=batch]")).to_have_text("1.00 operations")
    expect(page.locator("[data-mean=commit]")).to_have_text(re.compile(r"^\d+\.\d\d ms$"))
    assert page.locator("#processes tbody th").all_inner_texts() == ["manager", "worker-1", "worker-2"]

    rate, line = (row(page, "tickets").locator(part) for part in ("[data-rate]", "polyline"))
    elsewhere.counter("tickets").increment(by=1000)
    expect(rate).to_have_text(re.compile(r"^[1-9]\d*(,\d+)?(\.\d)?/s$"))
    points = [point.split(",") for point in (line.get_attribute("points") or "").split()]
    assert float(points[-1][0]) == 60
    assert min(float(y) for _, y in points) == 1, "the highest point is at the top"
    elsewhere.counter("tickets").set(0)
    expect(rate).to_have_text(re.compile(r"^-[1-9]"))
    expect(row(page, "a/b").locator("[data-rate]")).to_have_text("0/s")


def test_everything_works_by_keyboard_alone(page: Page, elsewhere: State) -> None:
    press_until(page, "Tab", "#q")
    page.keyboard.type("ti")
    page.keyboard.press("Enter")
    page.wait_for_url("**/counters?q=ti")
    expect(page.locator("#updates")).to_have_text("Up to date.")
    assert names(page) == ["tickets"]

    press_until(page, "Tab", "td button:has-text('Take one')")
    page.keyboard.press("Enter")
    expect(value(page, "tickets")).to_have_text("42")
    expect(page.locator("#said")).to_contain_text("gave 42.")
    page.keyboard.press("Enter")  # the focus has not moved
    expect(value(page, "tickets")).to_have_text("43")

    press_until(page, "Tab", "summary")
    page.keyboard.press("Enter")
    press_until(page, "Tab", "td input[name=value]")
    page.keyboard.type("-7")
    page.keyboard.press("Enter")
    expect(value(page, "tickets")).to_have_text("-7")

    press_until(page, "Tab", "td button:has-text('Delete')")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_have_text("Delete tickets?")
    expect(page.locator("dialog button:text-is('Keep it')")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    expect(page.locator("td button:has-text('Delete')")).to_be_focused()
    page.keyboard.press("Enter")
    press_until(page, "Tab", "dialog button:text-is('Delete')")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("is deleted.")
    expect(page.locator("#said")).to_be_focused()
    expect(page.locator("#none")).to_be_visible()
    assert names(page) == []
    assert "tickets" not in dict(elsewhere.counters().counters)

    press_until(page, "Shift+Tab", "#name")
    page.keyboard.type("ti me")
    page.keyboard.press("Enter")
    expect(value(page, "ti me")).to_have_text("1")


def test_a_row_that_appears_later_works_like_the_others(page: Page, elsewhere: State) -> None:
    odd = "\"later\" & <i>'odd'</i> 50% #1"
    elsewhere.counter(odd).increment()
    row(page, odd).get_by_role("button", name="Take one").click()
    expect(value(page, odd)).to_have_text("2")
    row(page, odd).locator("summary").click()
    row(page, odd).get_by_role("button", name="Delete").click()
    expect(page.locator("dialog bdi")).to_have_text(odd)
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row(page, odd)).to_have_count(0)
    assert dict(elsewhere.counters().counters) == NAMES


def test_changes_do_not_disturb_typing(page: Page, elsewhere: State) -> None:
    row(page, "tickets").locator("summary").click()
    field = row(page, "tickets").get_by_label("New value")
    field.press_sequentially("12")
    elsewhere.counter("sooner").increment()
    elsewhere.counter("unicorns").increment()
    elsewhere.counter("a/b").delete()
    elsewhere.counter("tickets").increment()
    expect(value(page, "tickets")).to_have_text("42")
    expect(row(page, "unicorns")).to_have_count(1)
    assert names(page) == sorted({*NAMES, "sooner", "unicorns"} - {"a/b"})
    expect(field).to_be_focused()
    field.press_sequentially("3")
    expect(field).to_have_value("123")


def test_a_refusal_is_shown_in_words(browser: Browser, server: Server, elsewhere: State) -> None:
    elsewhere.counter("tickets").set(LARGEST)
    page = opened(browser, server)
    row(page, "tickets").get_by_role("button", name="Take one").click()
    expect(page.locator("#said")).to_contain_text("Not done: 'tickets' is 9223372036854775807")
    expect(value(page, "tickets")).to_have_text(str(LARGEST))
    # The browser itself complains of every answer with an error.
    assert [complaint for complaint in browser.complaints if "409" not in complaint] == []
    browser.complaints.clear()


def test_it_does_not_change_while_it_is_paused(page: Page, elsewhere: State) -> None:
    page.clock.install()
    page.reload()
    expect(page.locator("#updates")).to_have_text("Up to date.")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#updates")).to_have_text("Paused.")
    elsewhere.counter("tickets").increment()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    expect(value(page, "tickets")).to_have_text("41")
    page.get_by_role("button", name="Pause").click()
    expect(value(page, "tickets")).to_have_text("42")


def test_the_next_page_is_live_too(browser: Browser, server: Server, elsewhere: State) -> None:
    page = opened(browser, server, "?limit=3")
    assert names(page) == sorted(NAMES)[:3]
    page.get_by_role("link", name="Next page").click()
    expect(page.locator("#updates")).to_have_text("Up to date.")
    assert names(page) == sorted(NAMES)[3:]
    expect(page.get_by_role("link", name="Next page")).to_be_hidden()
    elsewhere.counter("計数器 2").increment()
    page.get_by_role("link", name="Next page").click()
    expect(value(page, "計数器 2")).to_have_text("1")


def test_it_works_without_javascript(browser: Browser, server: Server, elsewhere: State) -> None:
    page = browser.open(f"{server.url}/counters", javascript=False)
    expect(page.locator("td.rate").first).to_be_hidden()
    expect(page.locator("#pause")).to_be_hidden()
    row(page, "tickets").get_by_role("button", name="Take one").click()
    expect(page.locator("#said")).to_contain_text("gave 42.")


def test_every_part_fits_and_is_accessible(browser: Browser, server: Server, elsewhere: State) -> None:
    elsewhere.counter("x" * 255).set(LARGEST)
    elsewhere.counter("smallest").set(SMALLEST)
    page = opened(browser, server)
    elsewhere.counter("tickets").increment(by=100)
    expect(row(page, "tickets").locator("[data-rate]")).to_have_text(re.compile("^[1-9]"))
    assert_looks(page, "counters")
    row(page, "x" * 255).locator("summary").click()
    row(page, "x" * 255).get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert_looks(page, "counters-dialog")
    page.goto(f"{server.url}/counters/delete?name={'x' * 255}")
    assert_looks(page, "counters-delete")


def test_it_says_that_the_server_is_gone_and_continues_when_it_is_back(
    browser: Browser, server: Server, elsewhere: State, data_dir: Path, stack: ExitStack
) -> None:
    page = opened(browser, server)
    port = str(urlsplit(server.url).port)
    assert server.stop() == 0
    sentence = "Not up to date: the server does not answer. Still trying."
    expect(page.locator("#updates")).to_have_text(sentence)
    row(page, "tickets").get_by_role("button", name="Take one").click()
    expect(page.locator("#said")).to_have_text("Not done: the server does not answer.")
    expect(value(page, "tickets")).to_have_text("41")
    stack.enter_context(Server("--workers", "2", "--data-dir", data_dir, "--port", port))
    expect(page.locator("#updates")).to_have_text("Up to date.")
    elsewhere.counter("tickets").increment()
    expect(value(page, "tickets")).to_have_text("42")
    assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in browser.complaints)
    browser.complaints.clear()
