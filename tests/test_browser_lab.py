"""The lab in a browser: duplicates with the plain global, none with the manager, in colours and in words."""

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser import Browser, assert_looks, press_until
from tests.processes import PATIENCE, Server

pytestmark = pytest.mark.slow

CLIENTS = 30
SUMMARY = re.compile(
    r"(?P<clients>\d+) clients?: (?P<unique>\d+) unique, (?P<duplicates>\d+) duplicates?"
    r"(?: \(given to (?P<unlucky>\d+) clients\))?, (?P<skipped>\d+) skipped\."
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
        with Server("--workers", "2", "--data-dir", tmp_path_factory.mktemp("server") / "data") as server:
            yield server


def summed(page: Page) -> dict[str, int]:
    """Return the figures of the final status."""
    expect(page.locator("#status")).to_contain_text("skipped", timeout=PATIENCE * 1000)
    match = SUMMARY.fullmatch(page.locator("#status").inner_text())
    assert match
    return {name: int(number or 0) for name, number in match.groupdict().items()}


def play(page: Page, strategy: str) -> dict[str, int]:
    page.check(f"#strategy-{strategy}")
    page.click("#start")
    return summed(page)


def cells(page: Page, state: str) -> list[str]:
    return page.locator(f"#grid li.{state} .visually-hidden").all_inner_texts()


def story(page: Page) -> list[str]:
    return page.locator("#steps li").all_inner_texts()


def test_a_plain_global_gives_a_number_twice_and_the_manager_does_not(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab?clients={CLIENTS}")
    for _ in range(2):  # the second run begins at 1 too
        found = play(page, "global")
        assert found["duplicates"] > 0
        assert found["skipped"] == found["unlucky"] - found["duplicates"]
        assert found["unique"] + found["unlucky"] == found["clients"] == CLIENTS
        for state, count in (("unique", "unique"), ("duplicate", "duplicates"), ("skipped", "skipped")):
            words = cells(page, state)
            assert len(words) == found[count]
            assert all(re.match(rf"\d+: {state}\b", text) for text in words)
        assert page.locator("#grid li").count() == CLIENTS
    check_story(page, server)
    assert_looks(page, "lab-global")
    found = play(page, "manager")
    assert found == {"clients": CLIENTS, "unique": CLIENTS, "duplicates": 0, "unlucky": 0, "skipped": 0}
    assert len(cells(page, "unique")) == CLIENTS
    expect(page.locator("#why")).to_contain_text("No client can come between")
    assert len(story(page)) == 4
    expect(page.locator("#expected")).to_have_text(re.compile(r"\d+ and \d+, as expected\."))
    found = play(page, "lock")  # it holds in its own process
    workers = page.locator("#workers li").count()
    assert (found["duplicates"] > 0) == (workers == 2)
    why = "each worker process has a lock of its own" if workers == 2 else "One worker process answered every client"
    expect(page.locator("#why")).to_contain_text(why)


def check_story(page: Page, server: Server) -> None:
    """Check the four steps of two clients that got the same number."""
    first, second, third, fourth = story(page)
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
    expect(page.locator("#expected")).to_have_text(expected)
    page.click("summary")
    rows = [row.split("\t") for row in page.locator("#answers").inner_text().split("\n")]
    assert [row[0] for row in rows] == [str(number) for number in range(1, CLIENTS + 1)]
    numbers = {row[0]: row[1] for row in rows}
    assert numbers[client] == numbers[between[1]] == str(read + 1)
    assert {int(row[2].split()[0]) for row in rows} <= set(server.children("worker"))


def test_the_keyboard_alone_is_enough_and_results_are_announced(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab")
    press_until(page, "Tab", "#strategy-global")
    press_until(page, "ArrowDown", "#strategy-manager")
    press_until(page, "Tab", "#clients")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    assert summed(page)["clients"] == summed(page)["unique"] == 7
    assert page.locator("#grid li").count() == 7
    press_until(page, "Shift+Tab", "#strategy-manager")
    press_until(page, "ArrowUp", "#strategy-global")
    press_until(page, "Tab", "#start")
    page.keyboard.press("Space")
    expect(page.locator("#why")).to_contain_text("A global is safe in no way")
    expect(page.locator("#start")).to_be_focused()
    assert page.get_by_role("status").inner_text() == page.locator("#status").inner_text()
    press_until(page, "Tab", "summary")
    page.keyboard.press("Enter")
    expect(page.locator("#answers")).to_be_visible()
    assert_looks(page, "lab")


def test_clients_without_an_answer_are_counted_and_their_numbers_skipped(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab?strategy=global&clients=1")
    page.click("#start")
    expect(page.locator("#status")).to_have_text("1 client: 1 unique, 0 duplicates, 0 skipped.")
    assert story(page) == []
    page.goto(f"{server.url}/lab?strategy=store&clients=5")
    cut: list[Route] = []

    def cut_two(route: Route) -> None:
        if len(cut) < 2:
            cut.append(route)
            route.abort()
        else:
            route.continue_()

    page.route("**/clients", cut_two)
    page.click("#start")
    expect(page.locator("#status")).to_contain_text(
        "5 clients: 3 unique, 0 duplicates, 2 skipped. 2 clients got no number"
    )
    assert [text for text in browser.complaints if "net::ERR_FAILED" not in text] == []
    browser.complaints.clear()


def test_a_stopped_server_is_reported(browser: Browser, start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "1")
    page = browser.open(f"{server.url}/lab")
    server.stop()
    page.click("#start")
    expect(page.locator("#status")).to_contain_text("The run failed")
    expect(page.locator("#start")).not_to_have_attribute("aria-disabled", "true")
    browser.complaints.clear()


def test_without_javascript_the_form_says_what_is_missing(browser: Browser, server: Server) -> None:
    page = browser.open(f"{server.url}/lab", javascript=False)
    page.fill("#clients", "42")
    page.click("#start")
    expect(page.locator("#clients")).to_have_value("42")
    expect(page.locator("noscript p")).to_contain_text("Nothing is sent")
    expect(page.locator("#result")).to_be_hidden()
