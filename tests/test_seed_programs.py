"""Programs like the ones that led to this project become correct when the one line of their storage is changed.

One `app.py` serves each program of `tests/programs` under its name, and adds the answering process to the responses.
"""

import http.client
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count, cycle
from pathlib import Path

import pytest

from counter_server.history import Operation, assert_exactly_once
from tests.launchers import LAUNCHERS, SYNC, Answer, Browser
from tests.launchers import launch as launch_app
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, end_manager, eventually, holder

PROGRAMS = ROOT / "tests" / "programs"
LINE = 'shared.object("global_obj", SomeObj, 0)'
INSTEAD = {"plain_obj": "SomeObj(0)", "durable_obj": 'shared.object("durable", SomeObj, 0, durable=True)'}
PATIENT = {  # on a busy machine
    "app = Flask(__name__)\n": f"app = Flask(__name__)\napp.config['COUNTER_SERVER_DEADLINE'] = {PATIENCE}\n",
    "ManagerCache()": f"ManagerCache(deadline={PATIENCE})",
}
DATA_DIR = Path("instance", "counter-server")
LOST = {"lost": True}

APP = """
import itertools
import os
import caching_demo, durable_obj, plain_obj, session_demo, some_obj
import waitress
from counter_server.errors import StateLost
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

answers = itertools.count()

def lost(error):
    return {"lost": True}, 503

def sign(response):
    response.headers.update({"X-Worker": str(os.getpid()), "X-Number": str(next(answers))})
    return response

programs = caching_demo, durable_obj, plain_obj, session_demo, some_obj
for program in programs:
    program.app.register_error_handler(StateLost, lost)
    program.app.after_request(sign)
app = Flask(__name__)
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {f"/{program.__name__}": program.app for program in programs})

if __name__ == "__main__":
    waitress.serve(app, listen="127.0.0.1:0", threads=8, _quiet=False)
"""


def launch(stack: ExitStack, directory: Path, launcher: str) -> list[str]:
    """Serve the programs in a directory until the stack closes, with two servers if one is a single process."""
    texts = {program.stem: program.read_text() for program in PROGRAMS.glob("*.py")}
    assert LINE in texts["some_obj"]
    texts.update({name: texts["some_obj"].replace(LINE, instead) for name, instead in INSTEAD.items()})
    for name, text in {**texts, "app": APP}.items():
        for create, patient in PATIENT.items():
            text = text.replace(create, patient)
        (directory / f"{name}.py").write_text(text)
    stack.callback(end_manager, directory / DATA_DIR / "manager.lock")
    servers = 1 if LAUNCHERS[launcher].processes > 1 else 2
    return [launch_app(stack, launcher, directory)[1] for _ in range(servers)]


FAST = "gunicorn, gthread, preloaded"


@pytest.fixture(
    scope="module",
    params=[name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS],
)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Return the URLs of the programs' servers under each launcher."""
    with ExitStack() as stack:
        yield launch(stack, tmp_path_factory.mktemp("programs"), request.param)


def ask_until_two_answer(servers: list[str], path: str, *, clients: int = 100) -> list[Answer]:
    """Ask with many simultaneous clients, usually once, unless one quick worker answers them all."""
    urls = cycle(servers)
    answers: list[Answer] = []
    while len({answer.worker for answer in answers}) < 2:
        answers += at_once(clients, lambda: Browser(next(urls)).visit(path))
    return answers


def test_the_object_gives_100_simultaneous_clients_the_numbers_1_to_100(servers: list[str]) -> None:
    answers = ask_until_two_answer(servers, "/some_obj/")
    assert sorted(answer.content for answer in answers) == list(range(1, len(answers) + 1))


def test_a_plain_global_object_returns_numbers_twice(servers: list[str]) -> None:
    """This shows that the other tests can fail."""
    answers = ask_until_two_answer(servers, "/plain_obj/", clients=20)
    assert [answer.content for answer in answers].count(1) >= 2


def test_a_session_counts_correctly_whichever_worker_answers(servers: list[str]) -> None:
    anna, ben = Browser(*servers), Browser(*servers)
    workers: set[str] = set()
    number = 0
    while number < 20 or len(workers) < 2:
        number += 1
        assert number < 1000, "one worker has answered all"
        ups, downs = anna.visit("/session_demo/inc"), ben.visit("/session_demo/dec")
        assert (ups.content, downs.content) == ({"counter": number}, {"counter": -number})
        workers |= {ups.worker, downs.worker}
    for browser, path, expected in (
        (anna, "dec", number - 1),
        (anna, "", 0),
        (anna, "inc", 1),
        (ben, "inc", 1 - number),
        (Browser(*servers), "dec", -1),
    ):
        assert browser.visit(f"/session_demo/{path}").content == {"counter": expected}


def test_a_value_cached_by_one_worker_is_read_by_another(servers: list[str]) -> None:
    browser = Browser(*servers)
    assert browser.visit("/caching_demo/get").content == {"found": None}
    readers = defaultdict(set)
    for value in count():
        stored = browser.visit(f"/caching_demo/set/{value}")
        assert stored.content == {"stored": True}
        for _ in range(3):
            read = browser.visit("/caching_demo/get")
            assert read.content == {"found": {"value": value}}
            readers[stored.worker].add(read.worker)
        if value >= 5 and any(read_by - {writer} for writer, read_by in readers.items()):
            break
        assert value < 1000, "only one worker has answered"


class Load:
    """Browsers that send requests repeatedly; each request is one operation."""

    def __init__(self, urls: list[str], path: str, browsers: int) -> None:
        self.history: list[Operation] = []  # append is atomic
        self.answers: list[Answer] = []
        self._urls, self._path = urls, path
        self._stop = threading.Event()
        self._barrier = threading.Barrier(browsers)
        self._threads = ThreadPoolExecutor(browsers)
        self._works = [self._threads.submit(self._ask, number) for number in range(browsers)]

    def _ask(self, number: int) -> None:
        self._barrier.wait(PATIENCE)
        for turn in count():
            if self._stop.is_set():
                return
            self.ask_once(f"{number}-{turn}")

    def ask_once(self, key: str) -> None:
        invoked = time.monotonic()
        try:
            answer = Browser(*self._urls).visit(self._path)
        except (OSError, http.client.HTTPException):
            self.history.append(Operation(key, invoked))
            return
        returned = time.monotonic()
        self.answers.append(answer)
        assert answer.status in (200, 500, 503)
        answered = answer.status == 200
        operation = Operation(key, invoked, returned, (answer.content,)) if answered else Operation(key, invoked)
        self.history.append(operation)

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


@pytest.mark.slow
def test_a_durable_object_survives_the_killing_of_its_manager(stack: ExitStack, tmp_path: Path) -> None:
    load = Load(launch(stack, tmp_path, SYNC), "/durable_obj/", 8)
    try:
        for _ in range(3):
            load.progress(50)
            end_manager(tmp_path / DATA_DIR / "manager.lock")
        load.progress(50)
    finally:
        load.finish()
    load.ask_once("last")
    (final,) = load.history[-1].answers
    assert_exactly_once(load.history, final, tmp_path / "history.json")
    assert len({answer.worker for answer in load.answers}) > 1
    assert not any(answer.content == LOST for answer in load.answers)


@pytest.mark.slow
def test_each_worker_reports_a_lost_object_once_before_it_counts_from_1_again(stack: ExitStack, tmp_path: Path) -> None:
    """A sync worker answers one request at a time, so it can number its responses."""
    urls = launch(stack, tmp_path, SYNC)

    def answers_until(complete: Callable[[dict[str, list[Answer]]], bool]) -> dict[str, list[Answer]]:
        by_worker: dict[str, list[Answer]] = defaultdict(list)

        def ask() -> bool:
            for answer in at_once(8, lambda: Browser(*urls).visit("/some_obj/")):
                by_worker[answer.worker].append(answer)
            return complete(by_worker)

        eventually(ask, "answers of all four workers")
        return {worker: sorted(some, key=lambda answer: answer.number) for worker, some in by_worker.items()}

    def numbers(by_worker: dict[str, list[Answer]]) -> list[int]:
        return sorted(answer.content for some in by_worker.values() for answer in some if answer.status == 200)

    before = answers_until(lambda by_worker: len(by_worker) == 4)
    assert numbers(before) == list(range(1, sum(map(len, before.values())) + 1))
    assert holder(tmp_path / DATA_DIR) is not None
    end_manager(tmp_path / DATA_DIR / "manager.lock")
    after = answers_until(lambda by_worker: len(by_worker) == 4 and min(map(len, by_worker.values())) >= 2)
    assert set(after) == set(before)
    for some in after.values():
        assert [answer.content == LOST for answer in some] == [True] + [False] * (len(some) - 1)
        assert some[0].status == 503
    assert numbers(after) == list(range(1, sum(map(len, after.values())) - 4 + 1))
