"""Programs like the ones that led to this project become correct when the one line of their storage is changed.

Each program runs as in `tests/programs`; an `app.py` beside it adds the answering process to the responses.
"""

import http.client
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest

from counter_server.history import Operation
from tests.history import assert_exactly_once
from tests.launchers import LAUNCHERS
from tests.launchers import launch as launch_app
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, end_manager, eventually, holder

PROGRAMS = ROOT / "tests" / "programs"
SYNC = "gunicorn, 4 sync workers"

APP = """
import itertools
import os

import waitress
from counter_server.errors import StateLost
from program import app

answers = itertools.count()

@app.errorhandler(StateLost)
def lost(error):
    return {"lost": True}, 503

@app.after_request
def sign(response):
    response.headers.update({"X-Worker": str(os.getpid()), "X-Number": str(next(answers))})
    return response

if __name__ == "__main__":
    waitress.serve(app, listen="127.0.0.1:0", threads=8, _quiet=False)
"""

LOST = {"lost": True}


@dataclass(frozen=True)
class Answer:
    """A response to a browser, and the worker that sent it."""

    status: int
    content: Any
    worker: str  # its pid
    number: int  # of this response among the worker's


class Browser:
    """A client with cookies that opens a new connection for each request, to each server in turn."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = cycle(urls)
        cookies = urllib.request.HTTPCookieProcessor()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)

    def visit(self, path: str = "/") -> Answer:
        try:
            response = self._opener.open(next(self._urls) + path, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            status, headers, body = response.status or 0, response.headers, response.read()
        worker, number = headers.get("X-Worker", ""), int(headers.get("X-Number", -1))
        return Answer(status, json.loads(body) if worker else body, worker, number)


Launch = Callable[..., list[str]]


@pytest.fixture
def launch(on_demand: str, tmp_path: Path, stack: ExitStack) -> Launch:
    """Serve a program, with two servers if one is a single process. All files are in `tmp_path`."""

    def launch(program: str, launcher: str, *, line: str = "", instead: str = "") -> list[str]:
        text = (PROGRAMS / f"{program}.py").read_text()
        assert line in text
        (tmp_path / "program.py").write_text(text.replace(line, instead) if line else text)
        (tmp_path / "app.py").write_text(APP)
        shutil.copy(PROGRAMS / "common.py", tmp_path)
        servers = 1 if LAUNCHERS[launcher].processes > 1 else 2
        return [launch_app(stack, launcher, tmp_path)[1] for _ in range(servers)]

    return launch


DATA_DIR = Path("instance", "counter-server")

under_each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS)


@under_each_launcher
def test_the_object_gives_100_simultaneous_clients_the_numbers_1_to_100(
    launch: Launch, tmp_path: Path, launcher: str
) -> None:
    urls = cycle(launch("some_obj", launcher))
    answers: list[Answer] = []
    while len({answer.worker for answer in answers}) < 2:  # usually at once, unless one quick worker answers them all
        answers += at_once(100, lambda: Browser([next(urls)]).visit())
        assert sorted(answer.content for answer in answers) == list(range(1, len(answers) + 1))
    assert holder(tmp_path / DATA_DIR) is not None


def test_a_plain_global_object_returns_numbers_twice(launch: Launch) -> None:
    """This shows that the other tests can fail."""
    urls = launch(
        "some_obj", SYNC, line='global_obj = shared.object("global_obj", SomeObj, 0)', instead="global_obj = SomeObj(0)"
    )
    answers: list[Answer] = []
    while len({answer.worker for answer in answers}) < 2:
        answers += at_once(20, lambda: Browser(urls).visit())
    assert [answer.content for answer in answers].count(1) >= 2


@under_each_launcher
def test_a_session_counts_correctly_whichever_worker_answers(launch: Launch, launcher: str) -> None:
    urls = launch("session_demo", launcher)
    anna, ben = Browser(urls), Browser(urls)
    workers: set[str] = set()
    number = 0
    while number < 20 or len(workers) < 2:
        number += 1
        assert number < 1000, "one worker has answered all"
        ups = anna.visit("/inc")
        downs = ben.visit("/dec")
        assert (ups.content, downs.content) == ({"counter": number}, {"counter": -number})
        workers |= {ups.worker, downs.worker}
    assert anna.visit("/dec").content == {"counter": number - 1}
    assert anna.visit("/").content == {"counter": 0}
    assert anna.visit("/inc").content == {"counter": 1}
    assert ben.visit("/inc").content == {"counter": 1 - number}
    assert Browser(urls).visit("/dec").content == {"counter": -1}


@under_each_launcher
def test_a_value_cached_by_one_worker_is_read_by_another(launch: Launch, launcher: str) -> None:
    urls = launch("caching_demo", launcher)
    browser = Browser(urls)
    assert browser.visit("/get").content == {"found": None}
    readers = defaultdict(set)
    for value in count():
        stored = browser.visit(f"/set/{value}")
        assert stored.content == {"stored": True}
        for _ in range(3):
            read = browser.visit("/get")
            assert read.content == {"found": {"value": value}}
            readers[stored.worker].add(read.worker)
        if value >= 5 and any(read_by - {writer} for writer, read_by in readers.items()):
            break
        assert value < 1000, "only one worker has answered"


class Load:
    """Browsers that send requests repeatedly; each request is one operation."""

    def __init__(self, urls: list[str], browsers: int) -> None:
        self.history: list[Operation] = []  # append is atomic
        self.answers: list[Answer] = []
        self._urls = urls
        self._stop = threading.Event()
        self._barrier = threading.Barrier(browsers)
        self._threads = ThreadPoolExecutor(browsers)
        self._works = [self._threads.submit(self._ask, number) for number in range(browsers)]

    def _ask(self, number: int) -> None:
        browser = Browser(self._urls)
        self._barrier.wait(PATIENCE)
        for turn in count():
            if self._stop.is_set():
                return
            self.ask_once(browser, f"{number}-{turn}")

    def ask_once(self, browser: Browser, key: str) -> None:
        invoked = time.monotonic()
        try:
            answer = browser.visit()
        except (OSError, http.client.HTTPException):
            self.history.append(Operation(key, invoked))
            return
        returned = time.monotonic()
        self.answers.append(answer)
        if answer.status == 200:
            self.history.append(Operation(key, invoked, returned, (answer.content,)))
        else:
            assert answer.status in (500, 503)
            self.history.append(Operation(key, invoked))

    def progress(self, answered: int) -> None:
        """Wait until this number of further requests returned a number."""

        def so_far() -> int:
            return sum(bool(operation.answers) for operation in self.history)

        goal = so_far() + answered
        eventually(lambda: so_far() >= goal or any(work.done() for work in self._works), f"{goal} answers")

    def finish(self) -> None:
        self._stop.set()
        self._threads.shutdown()
        for work in self._works:
            work.result()


def test_a_durable_object_survives_the_killing_of_its_manager(launch: Launch, tmp_path: Path) -> None:
    urls = launch("some_obj", SYNC, line="SomeObj, 0)", instead="SomeObj, 0, durable=True)")
    load = Load(urls, 8)
    try:
        for _ in range(3):
            load.progress(50)
            end_manager(tmp_path / DATA_DIR / "manager.lock")
        load.progress(50)
    finally:
        load.finish()
    load.ask_once(Browser(urls), "last")
    (final,) = load.history[-1].answers
    assert_exactly_once(load.history, final, tmp_path / "history.json")
    assert len({answer.worker for answer in load.answers}) > 1
    assert not any(answer.content == LOST for answer in load.answers)


def test_each_worker_reports_a_lost_object_once_before_it_counts_from_1_again(launch: Launch, tmp_path: Path) -> None:
    """A sync worker answers one request at a time, so it can number its responses."""
    urls = launch("some_obj", SYNC)

    def answers_until(complete: Callable[[dict[str, list[Answer]]], bool]) -> dict[str, list[Answer]]:
        by_worker: dict[str, list[Answer]] = defaultdict(list)

        def ask() -> bool:
            for answer in at_once(8, lambda: Browser(urls).visit()):
                by_worker[answer.worker].append(answer)
            return complete(by_worker)

        eventually(ask, "answers of all four workers")
        return {worker: sorted(some, key=lambda answer: answer.number) for worker, some in by_worker.items()}

    def numbers(by_worker: dict[str, list[Answer]]) -> list[int]:
        return sorted(answer.content for some in by_worker.values() for answer in some if answer.status == 200)

    before = answers_until(lambda by_worker: len(by_worker) == 4)
    assert numbers(before) == list(range(1, sum(map(len, before.values())) + 1))
    end_manager(tmp_path / DATA_DIR / "manager.lock")
    after = answers_until(lambda by_worker: len(by_worker) == 4 and min(map(len, by_worker.values())) >= 2)
    assert set(after) == set(before)
    for some in after.values():
        assert [answer.content == LOST for answer in some] == [True] + [False] * (len(some) - 1)
        assert some[0].status == 503
    assert numbers(after) == list(range(1, sum(map(len, after.values())) - 4 + 1))
