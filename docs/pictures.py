"""The pictures in the README, taken of a running server: `python -m docs.pictures`, with the extra `dev`."""

import random
import tempfile
import threading
import urllib.request
from pathlib import Path

from playwright.sync_api import FloatRect, expect

from counter_server import open_state
from tests.browser import Browser, chromium
from tests.processes import Server

PICTURES = Path(__file__).parent / "pictures"
RATES = {
    "downloads/linux": 40.0,
    "downloads/mac": 15.0,
    "likes": 25.0,
    "orders": 4.0,
    "tickets": 1.0,
    "visits": 60.0,
}  # /s
WIDTH = 960  # pixels
SECONDS = 62.0  # of the dashboard's charts


def count(url: str, name: str, enough: threading.Event) -> None:
    with open_state(url) as state:
        counter = state.counter(name)
        while not enough.wait(random.expovariate(RATES[name])):
            counter.increment()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        chromium() as process,
        Server("--workers", "2", "--data-dir", directory) as server,
    ):
        browser = Browser(process)
        take_home(browser, server.url)
        take_lab(browser, server.url)
        take_counters(browser, server.url, directory)
        browser.close()
        assert browser.complaints == []


def take_home(browser: Browser, url: str) -> None:
    page = browser.open(url, width=WIDTH)
    for _ in range(6):  # other visitors come while this page is open
        urllib.request.urlopen(url).close()  # noqa: S310 - our own server
    expect(page.locator("#number")).to_have_text("7")
    expect(page.locator("#visits tbody tr")).to_have_count(5)
    page.screenshot(path=PICTURES / "home.png", full_page=True)


def take_lab(browser: Browser, url: str) -> None:
    page = browser.open(f"{url}/lab", width=WIDTH)
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#story")).to_be_visible()
    clip: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": 976}
    page.screenshot(path=PICTURES / "lab.png", clip=clip, full_page=True)


def take_counters(browser: Browser, url: str, directory: str) -> None:
    enough = threading.Event()
    threads = [threading.Thread(target=count, args=(f"manager://{directory}", name, enough)) for name in RATES]
    for thread in threads:
        thread.start()
    page = browser.open(f"{url}/counters", width=WIDTH)
    page.wait_for_timeout(SECONDS * 1000)
    clip: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": 920}
    page.screenshot(path=PICTURES / "counters.png", clip=clip, full_page=True)
    enough.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
