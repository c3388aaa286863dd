"""The level of pages: what Chromium's tracing says of each page, opened by a new visitor without anything stored."""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from playwright.sync_api import Browser

from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results
from tests.browser import chromium
from tests.processes import Server

CASE = "page"
PAGES = ("/", "/lab", "/counters", "/session", "/docs", "/sign-in")
_CATEGORIES = ["loading", "blink.user_timing", "devtools.timeline"]
_PAINTED = "() => performance.getEntriesByName('first-contentful-paint').length"


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Open all pages in turn, each in a new context of the browser."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except pytest.skip.Exception as reason:
            results.missing["the pages"] = str(reason.msg)
            return
        root = stack.enter_context(tempfile.TemporaryDirectory())
        environment = {"COUNTER_SERVER_TOKEN": "the-token-of-the-benchmark"}
        server = stack.enter_context(Server("--data-dir", Path(root) / "data", environment=environment))
        for number in range(plan.rounds(bar=True)):
            for path in in_turn(PAGES, number):
                say(f"pages, round {number + 1}: {path}")
                results.add(Place("pages", CASE, path), _open(browser, server.url + path))


def _open(browser: Browser, url: str) -> dict[str, float]:
    """Open a page; return the milliseconds until it was painted and until all of it was there, and its size."""
    with closing(browser.new_context(viewport={"width": 1280, "height": 900})) as context:
        page = context.new_page()
        page.goto(urljoin(url, "/openapi.json"))  # starts the browser's process of the site, and stores nothing
        browser.start_tracing(page=page, categories=_CATEGORIES)
        page.goto(url)
        page.wait_for_function(_PAINTED)
        events = json.loads(browser.stop_tracing())["traceEvents"]
    starts = (event for event in events if event["name"] == "navigationStart")
    (start,) = (event for event in starts if _data(event).get("documentLoaderURL") == url)
    navigation = _data(start)["navigationId"]
    after = [event for event in events if event["pid"] == start["pid"] and event["ts"] >= start["ts"]]

    def until(name: str) -> float:
        ends = (event for event in after if event["name"] == name and event["args"]["frame"] == start["args"]["frame"])
        (end,) = (event for event in ends if _data(event).get("navigationId", navigation) == navigation)
        return float(end["ts"] - start["ts"]) / 1e3

    return {
        "first paint ms": until("firstPaint"),
        "load ms": until("loadEventEnd"),
        "kB": sum(_data(event)["encodedDataLength"] for event in after if event["name"] == "ResourceFinish") / 1e3,
    }


def _data(event: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = event["args"].get("data", {})
    return data
