"""Programs like the ones that led to this project become correct when the one line of their storage is changed.

One `app.py` serves each program of `tests/programs` under its name, and adds the answering process to the responses.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count, cycle

import pytest

from tests.launchers import LAUNCHERS, Answer, Browser, launch
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, end_manager

LINE = 'shared.object("global_obj", SomeObj, 0)'
PATIENT = {  # on a busy machine
    "app = Flask(__name__)\n": f"app = Flask(__name__)\napp.config['COUNTER_SERVER_DEADLINE'] = {PATIENCE}\n",
    "ManagerCache()": f"ManagerCache(deadline={PATIENCE})",
}
APP = """
import os
import caching_demo, plain_obj, session_demo, some_obj
import waitress
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

def sign(response):
    response.headers["X-Worker"] = str(os.getpid())
    return response

programs = caching_demo, plain_obj, session_demo, some_obj
for program in programs:
    program.app.after_request(sign)
app = Flask(__name__)
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {f"/{program.__name__}": program.app for program in programs})

if __name__ == "__main__":
    waitress.serve(app, listen="127.0.0.1:0", threads=8, _quiet=False)
"""
FAST = "gunicorn, gthread, preloaded"


@pytest.fixture(
    scope="module",
    params=[name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS],
)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Serve the programs under each launcher, with two servers if one is a single process, and return their URLs."""
    directory = tmp_path_factory.mktemp("programs")
    texts = {program.stem: program.read_text() for program in (ROOT / "tests" / "programs").glob("*.py")}
    assert LINE in texts["some_obj"]
    texts |= {"plain_obj": texts["some_obj"].replace(LINE, "SomeObj(0)"), "app": APP}
    for name, text in texts.items():
        for create, patient in PATIENT.items():
            text = text.replace(create, patient)
        (directory / f"{name}.py").write_text(text)
    with ExitStack() as stack:
        stack.callback(end_manager, directory / "instance" / "counter-server" / "manager.lock")
        times = 1 if LAUNCHERS[request.param].processes > 1 else 2
        yield [launch(stack, request.param, directory)[1] for _ in range(times)]


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
