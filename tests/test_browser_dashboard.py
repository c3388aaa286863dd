"""The dashboard as people see and use it in a browser: live, by keyboard alone, on a telephone, in the dark."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from counter_server.operations import LARGEST, SMALLEST
from counter_server.state import State
from tests.browser import Browser, assert_looks, overflow, press_until
from tests.load import open_client
from tests.processes import Manager, Server, eventually
from tests.test_dashboard_command import Dashboard

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
    expect(page.locator("[data-mean=operations]")).to_have_text("0.0/s")
    elsewhere.counter("another").increment()
    expect(page.locator("[data-figure=Counters]")).to_have_text(str(len(NAMES) + 1))
    expect(page.locator("[data-mean=operations]")).to_have_text(re.compile(r"^0\.[1-9]/s$"))
    page.get_by_text("All figures of the manager").click()
    expect(page.locator("[data-mean=batches]")).to_have_text(re.compile(r"^0\.[1-9]/s$"))
    expect(page.locator("[data-mean=batch]")).to_have_text("1.00 operations")
    expect(page.locator("[data-mean=commit]")).to_have_text(re.compile(r"^\d+\.\d\d ms$"))
    assert page.locator("#processes tbody th").all_inner_texts() == ["manager", "worker-1", "worker-2"]

    rate = row(page, "tickets").locator("[data-rate]")
    elsewhere.counter("tickets").increment(by=1000)
    expect(rate).to_have_text(re.compile(r"^[1-9]\d*(,\d+)?(\.\d)?/s$"))
    elsewhere.counter("tickets").set(0)
    expect(rate).to_have_text(re.compile(r"^-[1-9]"))
    expect(row(page, "a/b").locator("[data-rate]")).to_have_text("0/s")


def heights(page: Page, name: str) -> list[float]:
    """Return the heights of a chart's points: 0 is the bottom of the scale, 1 its top."""
    points = row(page, name).locator("polyline").get_attribute("points") or ""
    return [(19 - float(point.split(",")[1])) / 18 for point in points.split()]


def test_all_charts_have_one_scale_which_the_page_says(page: Page, elsewhere: State) -> None:
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    page.reload()
    expect(page.locator("#updates")).to_have_text("Up to date.")
    asked: list[Route] = []
    page.route("**/counters.json*", lambda route: asked.append(route))
    for amount in (0, 400, 100):
        elsewhere.counter("tickets").increment(by=amount or 1)
        elsewhere.counter("a/b").increment(by=4 * amount or 1)
        page.clock.run_for(SOON)
        eventually(lambda: page.evaluate("true") and asked, "the page's question")
        with page.expect_response("**/counters.json*"):
            asked.pop().continue_()
        expect(value(page, "tickets")).to_have_text(str(elsewhere.counter("tickets").value))
    expect(page.locator("#scale")).to_have_text(re.compile("^Charts: the last 60 seconds, each from 0 to [\\d,]+ per"))
    (highest,) = re.findall(r"to ([\d,]+) per", page.locator("#scale").inner_text())
    number = int(highest.replace(",", ""))
    assert str(number).rstrip("0") in ("1", "2", "5"), "a round number"
    higher, lower = heights(page, "a/b"), heights(page, "tickets")
    assert 0.4 <= max(higher) <= 1, "the scale fits the highest rate of the page"
    assert max(lower) == pytest.approx(max(higher) / 4, rel=0.02), "400 looks four times lower than 1600"
    assert heights(page, "計数器")[-1] == 0

    chart = row(page, "a/b").get_by_role("slider", name="Rate of a/b")
    chart.focus()
    expect(page.locator("#words")).to_be_visible()
    said = chart.get_attribute("aria-valuetext") or ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d: [\d,.]+/s", said)
    expect(page.locator("#words")).to_have_text(said)
    page.keyboard.press("ArrowLeft")
    earlier = chart.get_attribute("aria-valuetext") or ""
    assert earlier < said, "the left one is an earlier time"
    assert float(earlier.split()[1].removesuffix("/s").replace(",", "")) == pytest.approx(
        max(higher) * number, rel=0.02
    )
    page.keyboard.press("Escape")
    expect(page.locator("#words")).to_be_hidden()
    row(page, "tickets").locator(".chart").hover()
    expect(page.locator("#words")).to_be_visible()
    page.locator("h1").hover()
    expect(page.locator("#words")).to_be_hidden()


def test_objects_entries_and_processes_are_live(browser: Browser, server: Server, elsewhere: State) -> None:
    page = opened(browser, server)
    named = page.locator("#objects tbody tr").filter(has_text="visitor counter")
    before = int(named.locator("[data-cell=calls]").inner_text().replace(",", ""))
    numbers = page.locator("#entries tbody tr").filter(has_text="visitor counter").locator("[data-cell=now]")
    entries = int(numbers.inner_text())
    expect(named.locator("[data-rate]")).to_have_text("0/s")
    visitor = browser.open(f"{server.url}/session")
    visitor.locator("main form button").first.click()
    expect(named.locator("[data-cell=calls]")).not_to_have_text(f"{before:,}")
    expect(numbers).to_have_text(f"{entries + 1:,}")
    expect(named.locator("[data-rate]")).to_have_text(re.compile(r"^[\d.]*[1-9]"))
    connected = page.locator("#connected tbody tr")
    pids = {*map(str, server.children("worker")), str(os.getpid())}
    assert {*connected.locator("[data-cell=name]").all_inner_texts()} == pids
    elsewhere.close()
    expect(connected).to_have_count(2)


def test_everything_works_by_keyboard_alone(page: Page, browser: Browser, elsewhere: State) -> None:
    press_until(page, "Tab", "#q")
    page.keyboard.type("ti")
    page.wait_for_url("**/counters?q=ti")
    expect(row(page, "a/b")).to_have_count(0)
    assert names(page) == ["tickets"]
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#updates")).to_have_text("Up to date.")
    assert names(page) == ["tickets"]

    press_until(page, "Tab", "td button:has-text('Add one')")
    page.keyboard.press("Enter")
    expect(value(page, "tickets")).to_have_text("42")
    expect(page.locator("#said")).to_contain_text("is now 42.")
    page.keyboard.press("Enter")  # the focus has not moved
    expect(value(page, "tickets")).to_have_text("43")

    button = page.locator("[data-edit]:visible")
    press_until(page, "Tab", "td [data-edit]")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Edit tickets")
    expect(dialog).to_contain_text("Its value is 43.")
    expect(dialog.get_by_label("New value")).to_be_focused()
    page.keyboard.type("9" * 19)
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("Not done: value must be an integer")
    browser.complaints[:] = [each for each in browser.complaints if "400" not in each]
    dialog.get_by_label("New value").fill("-7")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(value(page, "tickets")).to_have_text("-7")
    expect(button).to_be_focused()

    page.keyboard.press("Enter")
    press_until(page, "Tab", "[data-sure]")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Delete tickets?")).to_be_visible()
    expect(page.locator("dialog button:text-is('Keep it')")).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog).to_be_visible()
    expect(page.locator("[data-sure]")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    press_until(page, "Tab", "[data-sure]")
    page.keyboard.press("Enter")
    press_until(page, "Tab", "dialog button:text-is('Delete')")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("is deleted.")
    expect(page.locator("#said")).to_be_focused()
    expect(page.locator("#no-match")).to_be_visible()
    expect(page.locator("[data-way=curl]")).to_contain_text("/api/v1/counters/ti/increment")
    assert names(page) == []
    assert "tickets" not in dict(elsewhere.counters().counters)

    press_until(page, "Shift+Tab", "#name")
    page.keyboard.type("ti me")
    page.keyboard.press("Enter")
    expect(value(page, "ti me")).to_have_text("1")


def test_a_row_that_appears_later_works_like_the_others(page: Page, elsewhere: State) -> None:
    odd = "\"later\" & <i>'odd'</i> 50% #1"
    elsewhere.counter(odd).increment()
    row(page, odd).get_by_role("button", name="Add one").click()
    expect(value(page, odd)).to_have_text("2")
    row(page, odd).get_by_role("button", name="Edit").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#question bdi")).to_have_text(odd)
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row(page, odd)).to_have_count(0)
    assert dict(elsewhere.counters().counters) == NAMES


def test_changes_do_not_disturb_typing(page: Page, elsewhere: State) -> None:
    row(page, "tickets").get_by_role("button", name="Edit").click()
    field = page.get_by_label("New value")
    field.press_sequentially("12")
    elsewhere.counter("sooner").increment()
    elsewhere.counter("unicorns").increment()
    elsewhere.counter("a/b").delete()
    elsewhere.counter("tickets").increment()
    expect(value(page, "tickets")).to_have_text("42")
    expect(page.locator("#edit-value")).to_have_text("42")
    expect(row(page, "unicorns")).to_have_count(1)
    assert names(page) == sorted({*NAMES, "sooner", "unicorns"} - {"a/b"})
    expect(field).to_be_focused()
    field.press_sequentially("3")
    expect(field).to_have_value("123")


def test_a_refusal_is_shown_in_words(browser: Browser, server: Server, elsewhere: State) -> None:
    elsewhere.counter("tickets").set(LARGEST)
    page = opened(browser, server)
    row(page, "tickets").get_by_role("button", name="Add one").click()
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
    expect(page.locator(".rate").first).to_be_hidden()
    expect(page.get_by_role("button", name="Edit")).to_have_count(0)
    expect(page.get_by_role("button", name="Copy")).to_have_count(0)
    expect(page.locator("#pause")).to_be_hidden()
    row(page, "tickets").get_by_role("button", name="Add one").click()
    expect(page.locator("#said")).to_contain_text("is now 42.")
    assert page.url.endswith("/counters#row-tickets"), "the browser shows the row again"
    page.get_by_role("link", name="tickets", exact=True).click()
    expect(page.locator("#value")).to_have_text("42")
    expect(page.locator("#rates")).to_be_hidden()
    page.get_by_label("New value").fill("7")
    page.get_by_role("button", name="Set").click()
    expect(page.locator("#value")).to_have_text("7")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#said")).to_contain_text("is deleted.")
    assert "tickets" not in names(page)


def test_the_place_in_the_list_is_kept(browser: Browser, server: Server, elsewhere: State) -> None:
    for number in range(60):
        elsewhere.counter(f"shop/{number:02}").set(number)
    page = opened(browser, server, "?limit=50")
    page.get_by_label("Names that begin with").press_sequentially("shop/")
    page.wait_for_url("**/counters?limit=50&q=shop%2F")
    expect(page.locator("#counters tbody tr")).to_have_count(50)
    page.get_by_label("Names that begin with").fill("shop")  # finds the same
    page.wait_for_url("**/counters?limit=50&q=shop")
    expect(page.get_by_role("link", name="Next page")).to_have_attribute("href", re.compile(r"q=shop&"))
    page.get_by_label("Names that begin with").fill("shop/")
    expect(page.get_by_role("link", name="Next page")).to_have_attribute("href", re.compile(r"q=shop%2F&"))
    page.get_by_role("link", name="Next page").click()
    expect(page.locator("#updates")).to_have_text("Up to date.")
    place = page.url
    assert names(page) == [f"shop/{number:02}" for number in range(50, 60)]
    row(page, "shop/55").get_by_role("button", name="Add one").click()
    expect(value(page, "shop/55")).to_have_text("56")
    row(page, "shop/56").get_by_role("button", name="Edit").click()
    page.get_by_label("New value").fill("7")
    page.get_by_role("button", name="Set").click()
    expect(value(page, "shop/56")).to_have_text("7")
    assert page.url == place
    page.get_by_role("link", name="shop/57").click()
    page.get_by_role("button", name="Add one").click()
    expect(page.locator("#value")).to_have_text("58")
    page.get_by_role("link", name="Back to the counters").click()
    expect(page).to_have_url(re.compile(re.escape("#row-shop%2F57") + "$"))
    assert names(page)[0] == "shop/50"
    expect(row(page, "shop/57")).to_be_in_viewport()
    assert page.get_by_label("Names that begin with").input_value() == "shop/"


def test_the_page_of_a_counter_is_live(browser: Browser, server: Server, elsewhere: State) -> None:
    elsewhere.counter("tickets").set(LARGEST - 100)
    page = browser.open(f"{server.url}/counters/detail?name=tickets")
    expect(page.locator("#updates")).to_have_text("Up to date.")
    assert_looks(page, "counter-unchanged")
    elsewhere.counter("tickets").increment(by=60)
    expect(page.locator("#value")).to_have_text(str(LARGEST - 40))
    expect(page.locator("#since")).to_have_text("+60")
    expect(page.locator("#changes tbody tr").first).to_contain_text("+60")
    page.get_by_label("Add", exact=True).fill("-5")
    page.get_by_label("Idempotency key").fill("order-1")
    for told in (
        "is now 9223372036854775762.",
        "became 9223372036854775762 with this key before, so nothing was added now.",
    ):
        page.get_by_role("button", name="Add", exact=True).click()
        expect(page.locator("#said")).to_contain_text(told)
    expect(page.locator("#since")).to_have_text("+55")
    expect(page.locator("#changes tbody td").nth(1)).to_have_text("9223372036854775762")
    expect(page.locator("#rate")).to_have_text(re.compile("/s$"))
    chart = page.get_by_role("slider", name="Rate of tickets")
    chart.focus()
    expect(page.locator("#words")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d: "))
    assert_looks(page, "counter")
    elsewhere.counter("tickets").delete()
    expect(page.locator("#value")).to_have_text("deleted")
    elsewhere.counter("tickets").increment()
    expect(page.locator("#value")).to_have_text("1")
    page.goto(f"{server.url}/counters/detail?name=nothing")
    expect(page.locator("h1")).to_have_text("There is no counter “nothing”")
    assert_looks(page, "counter-missing")
    browser.complaints[:] = [each for each in browser.complaints if "404" not in each]


def test_empty_lists_say_what_to_do(browser: Browser, server: Server, elsewhere: State) -> None:
    page = opened(browser, server, "?q=nothing")
    expect(page.locator("#no-match")).to_be_visible()
    assert_looks(page, "counters-no-match")
    page.get_by_role("link", name="Show all counters").click()
    expect(page.locator("#updates")).to_have_text("Up to date.")
    assert names(page) == sorted(NAMES)
    for name in NAMES:
        elsewhere.counter(name).delete()
    expect(page.locator("#nothing")).to_be_visible()
    expect(page.locator("#counters")).to_be_hidden()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-way=curl]").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("[data-way=curl] code").inner_text()
    assert_looks(page, "counters-empty")
    elsewhere.counter("visits").increment()
    expect(value(page, "visits")).to_have_text("1")
    expect(page.locator("#none")).to_be_hidden()
    assert_looks(page, "counters-one")


def test_who_may_not_operate_sees_one_sentence_and_no_controls(
    browser: Browser, tmp_path: Path, stack: ExitStack
) -> None:
    options = ("--workers", "1", "--data-dir", tmp_path / "data")
    server = stack.enter_context(Server(*options, environment={"COUNTER_SERVER_TOKEN": "t" * 32}))
    page = browser.open(f"{server.url}/counters")
    page.get_by_label("Counter, existing or new").fill("tickets")
    page.keyboard.press("Enter")
    expect(value(page, "tickets")).to_have_text("1")
    expect(page.get_by_role("button", name="Edit")).to_have_count(0)
    expect(page.get_by_text("You may count; set and delete are for operators")).to_have_count(1)
    assert_looks(page, "counters-not-operator")
    page.get_by_role("link", name="tickets").click()
    expect(page.get_by_label("New value")).to_have_count(0)
    expect(page.get_by_text("You may count; set and delete are for operators")).to_have_count(1)
    assert "manager:///" not in page.content()


def test_while_there_is_no_manager_the_dashboard_waits_for_one(
    browser: Browser, tmp_path: Path, stack: ExitStack
) -> None:
    dashboard = stack.enter_context(Dashboard("--data-dir", tmp_path / "data"))
    page = browser.open(f"{dashboard.url}/counters")
    expect(page.locator("#waiting")).to_contain_text("No manager is running")
    expect(page.locator("#waiting code")).to_contain_text("counter-server increment --data-dir")
    assert_looks(page, "counters-waiting")
    with open_client(stack.enter_context(Manager(tmp_path / "data")).url) as state:
        state.counter("visits").increment()
        expect(value(page, "visits")).to_have_text("1")


def test_every_part_fits_and_is_accessible(browser: Browser, server: Server, elsewhere: State) -> None:
    elsewhere.counter("x" * 255).set(LARGEST)
    elsewhere.counter("smallest").set(SMALLEST)
    for number in range(50 - len(NAMES) - 2):
        elsewhere.counter(f"orders/{'long-name-' * 6}{number:02}").set(LARGEST - number)
    page = opened(browser, server, "?limit=50")
    elsewhere.counter("tickets").increment(by=100)
    expect(row(page, "tickets").locator("[data-rate]")).to_have_text(re.compile("^[1-9]"))
    assert_looks(page, "counters")
    for width in (320, 641, 768, 830):
        page.set_viewport_size({"width": width, "height": 800})
        assert overflow(page) <= 0, width
    page.set_viewport_size({"width": 1280, "height": 800})
    row(page, "x" * 255).get_by_role("button", name="Edit").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert_looks(page, "counters-dialog")
    page.locator("[data-sure]").click()
    assert_looks(page, "counters-dialog-sure")
    page.goto(f"{server.url}/counters/delete?name={'x' * 255}")
    assert_looks(page, "counters-delete")
    page.goto(f"{server.url}/counters/detail?name={'x' * 255}")
    assert_looks(page, "counter-long")


def test_it_says_that_the_server_is_gone_and_continues_when_it_is_back(
    browser: Browser, server: Server, elsewhere: State, data_dir: Path, stack: ExitStack
) -> None:
    page = opened(browser, server)
    port = str(urlsplit(server.url).port)
    assert server.stop() == 0
    sentence = "Not up to date: the server does not answer. Still trying."
    expect(page.locator("#updates")).to_have_text(sentence)
    row(page, "tickets").get_by_role("button", name="Add one").click()
    expect(page.locator("#said")).to_have_text("Not done: the server does not answer.")
    expect(value(page, "tickets")).to_have_text("41")
    stack.enter_context(Server("--workers", "2", "--data-dir", data_dir, "--port", port))
    expect(page.locator("#updates")).to_have_text("Up to date.")
    elsewhere.counter("tickets").increment()
    expect(value(page, "tickets")).to_have_text("42")
    assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in browser.complaints)
    browser.complaints.clear()
