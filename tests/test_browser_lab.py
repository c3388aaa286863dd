"""The lab in a browser: duplicates with the plain global, none with ours, in colours and in words."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from playwright.sync_api import Page, Route, expect

from counter_server.server.strategies import YIELD_SECONDS
from tests.browser import Browser, assert_looks, press_until
from tests.processes import PATIENCE, Server

pytestmark = pytest.mark.slow

CLIENTS = 30
SUMMARY = re.compile(
    r"(?P<title>\w[^:]*): (?P<different>\d+) (?:different )?numbers?,"
    r" (?:(?P<repeated>\d+) given twice or more|given \d+ times|each once|given once)(?:, (?P<skipped>\d+) skipped)?\."
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
        with Server("--workers", "2", "--data-dir", tmp_path_factory.mktemp("server") / "data") as server:
            yield server


@dataclass(frozen=True)
class Side:
    """The figures of one side, as the status announces them."""

    title: str
    different: int
    repeated: int
    skipped: int


def finished(page: Page) -> tuple[Side, Side]:
    """Return the figures of both sides, the wrong one first."""
    expect(page.locator("#status")).to_contain_text("counter_server: ", timeout=PATIENCE * 1000)
    wrong, ours = (
        Side(title, int(different), int(repeated or 0), int(skipped or 0))
        for title, different, repeated, skipped in SUMMARY.findall(page.locator("#status").inner_text())
    )
    assert ours.title == "counter_server"
    return wrong, ours


def choose(page: Page, strategy: str) -> None:
    if not page.locator(f"#strategy-{strategy}").is_visible():
        page.click("#lab summary")
    page.check(f"#strategy-{strategy}")


def play(page: Page, strategy: str) -> tuple[Side, Side]:
    choose(page, strategy)
    page.click("#start")
    return finished(page)


def cells(page: Page, side: str, state: str) -> list[str]:
    return page.locator(f"#{side} .cells li.{state} .visually-hidden").all_inner_texts()


def story(page: Page, side: str) -> list[str]:
    return page.locator(f"#{side}-story .steps li").all_text_contents()


def test_a_plain_global_gives_a_number_twice_and_ours_does_not(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab?clients={CLIENTS}")
    assert len(cells(page, "wrong", "awaited")) == len(cells(page, "ours", "awaited")) == CLIENTS
    assert_looks(page, "lab-before")
    for _ in range(2):  # the second run begins at 1 too
        wrong, ours = play(page, "global")
        assert wrong.title == "A global"
        assert wrong.repeated > 0
        assert wrong.different + wrong.skipped == CLIENTS
        counts = {"unique": wrong.different - wrong.repeated, "duplicate": wrong.repeated, "skipped": wrong.skipped}
        for state, count in counts.items():
            words = cells(page, "wrong", state)
            assert len(words) == count
            assert all(re.match(rf"\d+: {state}\b", text) for text in words)
        expect(page.locator("#wrong .verdict")).to_have_text(
            f"✗ {wrong.different} different numbers {wrong.repeated} given twice or more"
        )
        assert ours == Side("counter_server", CLIENTS, 0, 0)
        expect(page.locator("#ours .verdict")).to_have_text(f"✓ {CLIENTS} different numbers each once")
        for text in cells(page, "ours", "unique"):
            assert re.fullmatch(r"\d+: unique, by worker [AB]", text)
        assert len(cells(page, "ours", "unique")) == page.locator("#wrong .cells li").count() == CLIENTS
    check_story(page, server)
    expect(page.locator("#ours-story .why")).to_contain_text("No client can come between")
    assert len(story(page, "ours")) == 4
    expect(page.locator("#ours-story .expected")).to_have_text(re.compile(r"\d+ and \d+, as expected\."))
    assert_looks(page, "lab-wrong-and-right")
    lock, ours = play(page, "lock")  # it holds in its own process
    workers = set(re.findall("[AB]$", "\n".join(cells(page, "wrong", "unique")), re.MULTILINE))
    both = lock.repeated > 0 or len(workers) == 2
    assert (lock.repeated > 0) == both
    why = "each worker process has a lock of its own" if both else "One worker process answered every client"
    expect(page.locator("#wrong-story .why")).to_contain_text(why)
    assert ours.different == CLIENTS


def check_story(page: Page, server: Server) -> None:
    """Check the steps of two clients that got the same number: in words, in the picture, and in the table."""
    first, second, third, fourth = story(page, "wrong")
    asked = re.fullmatch(r"Client (\d+) asks worker ([AB]), which reads (\d+) from its own global\.", first)
    assert asked
    client, worker, read = asked[1], asked[2], int(asked[3])
    between = re.fullmatch(
        rf"Before client {client} has its answer, client (\d+) asks worker {worker},"
        rf" which reads {read} from its own global\.",
        second,
    )
    assert between
    writes = f"Worker {worker} writes {read + 1} to its own global: client {{}} gets {read + 1}."
    assert {third, fourth} == {writes.format(client), writes.format(between[1])}
    expected = f"They should get {read + 1} and {read + 2}, and got {read + 1} and {read + 1}."
    expect(page.locator("#wrong-story .expected")).to_have_text(expected)
    check_lanes(page, [client, between[1]], worker, read)
    page.click("#every summary")
    rows = [row.split("\t") for row in page.locator("#answers").inner_text().split("\n")]
    assert [row[0] for row in rows] == [str(number) for number in range(1, CLIENTS + 1)]
    numbers = {row[0]: row[1] for row in rows}
    assert numbers[client] == numbers[between[1]] == str(read + 1)
    assert sorted(int(row[3]) for row in rows) == list(range(1, CLIENTS + 1))
    assert {int(row[side].split()[-1]) for row in rows for side in (2, 4)} <= set(server.children("worker"))


def check_lanes(page: Page, clients: list[str], worker: str, read: int) -> None:
    picture = page.locator("#wrong-story .lanes")
    for lane, client in zip(picture.locator("g").all(), clients, strict=True):
        steps = [f"{read} + 1 = {read + 1}", f"reads {read}", f"writes {read + 1}"]
        assert lane.locator("text").all_text_contents() == [f"Client {client} · {worker}", *steps]
        expect(lane.locator("rect.lost")).to_have_count(1)
    passed = [float(text.strip("+ ms")) for text in picture.locator("text.time").all_text_contents()]
    assert passed == sorted(passed)
    assert passed[2] >= YIELD_SECONDS * 1000  # it wrote that long after it had read
    tops = picture.locator(".time").evaluate_all("texts => texts.map(text => Number(text.getAttribute('y')))")
    assert tops == sorted(tops)


def test_the_keyboard_alone_is_enough_and_results_are_announced(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab")
    press_until(page, "Tab", "#clients")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    assert finished(page)[1] == Side("counter_server", 7, 0, 0)
    assert page.locator("#wrong .cells li").count() == page.locator("#ours .cells li").count() == 7
    press_until(page, "Tab", "#lab summary")
    page.keyboard.press("Enter")
    press_until(page, "Tab", "#strategy-global")
    press_until(page, "ArrowDown", "#strategy-session")
    expect(page.locator("#wrong-title")).to_have_text("A Flask session")
    expect(page.locator("#status")).to_have_text("7 clients will ask each side at the same moment.")
    press_until(page, "Shift+Tab", "#start")
    page.keyboard.press("Space")
    expect(page.locator("#wrong-story .why")).to_contain_text("A session is a cookie in your browser")
    expect(page.locator("#start")).to_be_focused()
    assert page.get_by_role("status").inner_text() == page.locator("#status").inner_text()
    press_until(page, "Tab", "#wrong-story summary")
    page.keyboard.press("Enter")
    expect(page.locator("#wrong-story .steps")).to_be_visible()
    press_until(page, "Tab", "#every summary")
    page.keyboard.press("Enter")
    expect(page.locator("#answers")).to_be_visible()
    assert_looks(page, "lab-all-open")


def test_a_link_repeats_the_choices_of_a_run(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#clients", "9")
    play(page, "value")
    assert page.url == f"{server.url}/lab?clients=9&strategy=value"
    page.click("#copy")
    expect(page.locator("#status")).to_contain_text("is copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    again = browser.open(page.url)
    expect(again.locator("#wrong-title")).to_have_text("A multiprocessing.Value")
    expect(again.locator("#status")).to_have_text("9 clients will ask each side at the same moment.")
    again.click("#start")  # nothing was sent before
    wrong, ours = finished(again)
    assert (wrong.title, wrong.different + wrong.skipped) == ("A multiprocessing.Value", 9)
    assert ours == Side("counter_server", 9, 0, 0)


def test_a_link_can_be_copied_without_the_clipboard(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab")
    page.evaluate("delete Navigator.prototype.clipboard")  # as on http, on another machine than this one
    page.fill("#clients", "101")  # which the server would refuse
    page.click("#copy")
    assert page.evaluate("location.search") == ""
    expect(page.locator("#status")).not_to_contain_text("copy the link")
    page.fill("#clients", "100")
    page.click("#copy")
    expect(page.locator("#status")).to_contain_text("copy the link from the address bar")
    assert page.url == f"{server.url}/lab?clients=100&strategy=global"


def test_clients_without_an_answer_are_counted_and_their_numbers_skipped(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab?strategy=global&clients=1")
    page.click("#start")
    told = "A global: 1 number, given once. counter_server: 1 number, given once."
    expect(page.locator("#status")).to_have_text(told)
    assert story(page, "wrong") == story(page, "ours") == []
    page.goto(f"{server.url}/lab?strategy=global&clients=5")
    cut: list[Route] = []

    def cut_two_of_each(route: Route) -> None:
        if len(cut) < 4:  # the sides take turns
            cut.append(route)
            route.abort()
        else:
            route.continue_()

    page.route("**/clients", cut_two_of_each)
    page.click("#start")
    expect(page.locator("#status")).to_contain_text(
        "counter_server: 3 different numbers, each once, 2 skipped. 2 clients got no number: the server did not answer."
    )
    expect(page.locator("#ours .failed")).to_have_text("2 clients got no number: the server did not answer.")
    expect(page.locator("#wrong .failed")).to_be_visible()
    expect(page.locator("#ours .verdict")).to_have_text("3 different numbers each once")
    assert_looks(page, "lab-failed-clients")
    assert [text for text in browser.complaints if "net::ERR_FAILED" not in text] == []
    browser.complaints.clear()


def test_a_stopped_server_is_reported(browser: Browser, start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "1")
    page = browser.open(f"{server.url}/lab")
    server.stop()
    page.click("#start")
    expect(page.locator("#status")).to_contain_text("This race ended early: the server did not answer")
    expect(page.locator("#start")).not_to_have_attribute("aria-disabled", "true")
    assert_looks(page, "lab-no-server")
    browser.complaints.clear()


def test_without_javascript_the_form_says_what_is_missing(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab", javascript=False)
    page.fill("#clients", "42")
    page.click("#start")
    expect(page.locator("#clients")).to_have_value("42")
    expect(page.locator("#copy")).to_be_hidden()
    expect(page.locator("noscript p")).to_contain_text("Nothing is sent")
    expect(page.locator("#result")).to_be_hidden()
