"""Greenlets in place of threads: a server that patches sockets and locks (gevent) keeps the same promises."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines import start
from tests.launchers import listening_port
from tests.load import at_once, visit
from tests.processes import PATIENCE, ROOT, Program, eventually, frozen, holder

pytestmark = pytest.mark.slow

_PROGRAM = """
import json, os, sys, time
url, when, go = sys.argv[1:]

def patch():
    from gevent import monkey
    monkey.patch_all()

if when == "before the import":
    patch()
from counter_server import CounterServerError, StoreOptions, open_state
state = open_state(url, deadline=30, options=StoreOptions(start=False))
counter = state.counter("c")
if when == "after the first use":
    counter.increment()
if when != "before the import":
    patch()
import gevent

def taken(call):
    began = time.monotonic()
    try:
        call()
        error = None
    except CounterServerError as refused:
        error = type(refused).__name__
    return error, time.monotonic() - began

def tick():
    global ticks
    while True:
        gevent.sleep(0.01)
        ticks += 1

counter.increment()
print("ready", flush=True)
while not os.path.exists(go):
    gevent.sleep(0.01)
ticks, state._deadline = 0, 1.0
gevent.spawn(tick)
calls = [gevent.spawn(taken, call) for call in [counter.increment] * 4 + [lambda: state.counters()]]
gevent.joinall(calls, timeout=25)
print("result", json.dumps([ticks, [call.value for call in calls]]), flush=True)
state._deadline = 30
while os.path.exists(go):
    gevent.sleep(0.01)
counter.increment()
numbers = [gevent.spawn(counter.increment) for _ in range(20)]
gevent.joinall(numbers)
print("numbers", json.dumps([number.value for number in numbers]), flush=True)
"""


@pytest.mark.parametrize(
    ("store", "when"),
    [
        ("manager", "before the import"),
        ("manager", "before the first use"),
        ("manager", "after the first use"),
        *((store, "before the import") for store in ("redis", "memcached", "postgresql")),
        ("postgresql", "after the first use"),
    ],
)
def test_greenlets_keep_their_deadline_while_the_store_is_frozen(
    store: str, when: str, stack: ExitStack, tmp_path: Path
) -> None:
    engine = stack.enter_context(start(store, tmp_path))
    go = tmp_path / "go"
    program = stack.enter_context(Program("-c", _PROGRAM, engine.url, when, go))
    program.expect("ready")
    with ExitStack() as ice:
        for pid in engine.serving():
            ice.enter_context(frozen(pid))
        go.touch()
        ticks, calls = json.loads(program.expect("result"))
    assert None not in calls, "a greenlet waits for ever"
    assert ticks > 2  # the others went on
    for error, seconds in calls:
        assert error in ("DeadlineExceeded", "OutcomeUnknown", "Unsupported")  # memcached: no lists, no second try
        assert seconds < 10  # of a deadline of one
    go.unlink()
    numbers = json.loads(program.expect("numbers"))
    assert len(set(numbers)) == 20
    # A manager or memcached may count the four calls of the frozen time meanwhile, as their outcome is unknown.
    late = max(numbers) - min(numbers) - 19
    assert 0 <= late <= (4 if store in ("manager", "memcached") else 0)


_APP = """
from flask import Flask
from counter_server import SharedState

app = Flask(__name__)
app.config.update(COUNTER_SERVER_DEADLINE=30, COUNTER_SERVER_STORE={url!r})
shared = SharedState(app)
app.add_url_rule("/", "home", lambda: dict(value=0))
app.add_url_rule("/count", "count", lambda: dict(value=shared.counter("visits").increment()))
"""


def test_gevent_workers_answer_while_the_manager_is_frozen(stack: ExitStack, tmp_path: Path, on_demand: str) -> None:
    (tmp_path / "app.py").write_text(_APP.format(url=on_demand))
    command = ("-m", "gunicorn", "-k", "gevent", "-w", "2", "-b", "127.0.0.1:0", "--preload", "app:app")
    server = stack.enter_context(Program(*command, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}))
    url = f"http://127.0.0.1:{eventually(lambda: listening_port(server.pid), 'gunicorn listens')}"

    def count() -> int:
        return int(visit(url, "/count")["value"])

    assert sorted(at_once(20, count)) == [*range(1, 21)]
    with ThreadPoolExecutor(20) as clients:
        with frozen(holder(tmp_path / "data") or 0):
            waiting = [clients.submit(count) for _ in range(20)]
            assert at_once(20, lambda: visit(url)) == [{"value": 0}] * 20
            assert not any(answer.done() for answer in waiting)
        assert sorted(answer.result(PATIENCE) for answer in waiting) == [*range(21, 41)]


_PATCHING_APP = """
{patching}
import socket, threading, time
from flask import Flask
from counter_server import SharedState

class Counted:
    def __init__(self):
        self.number = 0

    def query(self):
        self.number += 1
        return self.number

    def primitives(self):
        return [threading.Lock.__module__, socket.socket.__module__, time.sleep.__module__]

app = Flask(__name__)
app.config.update(COUNTER_SERVER_DEADLINE=30, COUNTER_SERVER_STORE={url!r})
shared = SharedState(app)
counted = shared.object("counted", Counted)
"""
_USE = """
import json, threading
from app import app, counted
numbers = []

def use():
    with app.app_context():
        numbers.append(counted.query())

users = [threading.Thread(target=use) for _ in range(20)]
for user in users:
    user.start()
for user in users:
    user.join()
with app.app_context():
    print("numbers", json.dumps([sorted(numbers), counted.primitives(), threading.Lock.__module__]))
"""


@pytest.mark.parametrize(
    ("patching", "hosting"),
    [
        ("from gevent import monkey; monkey.patch_all()", False),
        ("import gevent; from gevent.monkey import patch_thread as t, patch_socket as s; t(); s()", True),
    ],
)
def test_a_manager_that_imports_a_patching_app_is_not_patched(
    on_demand: str, data_dir: Path, stack: ExitStack, tmp_path: Path, patching: str, *, hosting: bool
) -> None:
    (tmp_path / "app.py").write_text(_PATCHING_APP.format(patching=patching, url=on_demand))
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    if hosting:
        options = ("--hosting", "app:app", "--data-dir", data_dir)
        manager = Program("-m", "counter_server", "manager", *options, cwd=tmp_path, environment=environment)
        stack.enter_context(manager).expect("Manager ready:")
    user = stack.enter_context(Program("-c", _USE, cwd=tmp_path, environment=environment))
    numbers, primitives, ours = json.loads(user.expect("numbers"))
    assert numbers == list(range(1, 21))
    assert primitives == ["_thread", "socket", "time"]
    assert ours.startswith("gevent")  # the app itself is
