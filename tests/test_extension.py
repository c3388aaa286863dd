"""`SharedState`, the Flask extension, in anybody's app."""

import gc
import math
import os
import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from flask import Flask
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from counter_server import SharedState, plain
from counter_server.errors import (
    AccessDenied,
    CounterServerError,
    DeadlineExceeded,
    DirectoryHeld,
    InvalidRequest,
    KeyReused,
    LimitReached,
    NotHosted,
    OutcomeUnknown,
    RemoteError,
    StateLost,
    StorageFull,
    Unsupported,
)
from counter_server.manager.client import StateProxy
from counter_server.state import Counter
from tests.hosted_classes import SomeObj
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, Manager, Program, open_in

STORE = "COUNTER_SERVER_STORE"
DATA_DIR = "COUNTER_SERVER_DATA_DIR"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer has set is not part of these tests."""
    monkeypatch.delenv(STORE, raising=False)
    monkeypatch.delenv(DATA_DIR, raising=False)
    monkeypatch.setenv("COUNTER_SERVER_LARGEST_VALUE", "")
    monkeypatch.setattr(plain, "_largest_value", None)  # which an app may raise, for the whole process


def make_app(shared: SharedState, **config: object) -> Flask:
    app = Flask(__name__)
    app.config.update({STORE: "memory://", **config})
    shared.init_app(app)
    return app


def test_an_app_is_given_to_the_extension_or_later_to_init_app() -> None:
    app = Flask(__name__)
    app.config[STORE] = "memory://"
    shared = SharedState(app)
    with app.app_context():
        assert shared.counter("x").increment() == 1
    shared = SharedState()
    visits = shared.counter("visits")  # at import time, before there is any app
    app = make_app(shared)
    app.add_url_rule("/", view_func=lambda: str(visits.increment()))
    client = app.test_client()
    assert [client.get("/").text for _ in range(3)] == ["1", "2", "3"]


def test_apps_with_one_shared_state_are_separate_and_any_one_serves_the_current_app() -> None:
    shared = SharedState()
    one, two = make_app(shared), make_app(shared)
    counter = shared.counter("x")
    with one.app_context():
        assert counter.increment(5) == 5
        with two.app_context():
            assert counter.increment() == 1
            assert shared.counters().counters == [("x", 1)]
        assert counter.increment() == 6
        assert SharedState().counter("x").increment() == 7
    assert one.extensions["counter_server"] is not two.extensions["counter_server"]


def test_a_second_init_app_is_refused_unless_the_first_failed() -> None:
    shared = SharedState()
    app = Flask(__name__)
    app.config[STORE] = "nonsense://"
    with pytest.raises(InvalidRequest, match="nonsense"):
        shared.init_app(app)
    app.config[STORE] = "memory://"
    shared.init_app(app)
    with app.app_context():
        shared.counter("x").increment()
    for again in (lambda: SharedState(app), lambda: shared.init_app(app)):
        with pytest.raises(RuntimeError, match="already"):
            again()
    with app.app_context():
        assert shared.counter("x").increment() == 2


def test_use_without_an_app_context_or_init_app_is_a_clear_error() -> None:
    shared = SharedState()
    app, _ = make_app(shared), make_app(shared)
    counter = shared.counter("x")
    for use in (counter.increment, lambda: counter.value, counter.delete, shared.counters, lambda: shared.state):
        with pytest.raises(RuntimeError, match=r"has 2 apps, not one: use it within 'with app\.app_context\(\):'"):
            use()
    with pytest.raises(RuntimeError, match="has 0 apps"):
        SharedState().counter("x").increment()
    with Flask(__name__).app_context(), pytest.raises(RuntimeError, match=r"init_app\(app\)"):
        counter.increment()
    with pytest.raises(InvalidRequest, match="empty"):
        shared.counter("")

    def count_in_a_thread() -> None:
        with pytest.raises(RuntimeError, match="application context"):
            counter.increment()
        with app.app_context():
            counter.increment()

    with app.app_context():  # which threads do not inherit
        at_once(8, count_in_a_thread)
        assert counter.value == 8


def test_without_an_application_context_the_only_app_is_meant() -> None:
    shared = SharedState()
    counter, obj = shared.counter("x"), shared.object("obj", SomeObj, 0)
    app = make_app(shared, COUNTER_SERVER_REQUEST_DEADLINE=0.001)
    numbers: list[object] = []

    @app.get("/")
    def view() -> str:
        at_once(4, lambda: numbers.extend((counter.increment(), obj.query(), counter.value > 0)))
        return str(shared.state is app.extensions["counter_server"])

    assert app.test_client().get("/").text == "True"
    assert (len(numbers), counter.value, obj.query()) == (12, 4, 5)


def answer(app: Flask, error: Exception, **headers: str) -> TestResponse:
    """Return the app's answer to a request whose view raises an error."""

    def view() -> str:
        raise error

    app.add_url_rule("/fails", view_func=view)
    return app.test_client().get("/fails", headers=headers)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *(
            (kind("the disk of /srv", "unknown"), 503)
            for kind in (DeadlineExceeded, StateLost, StorageFull, OutcomeUnknown)
        ),
        *((kind("the disk of /srv"), 503) for kind in (DirectoryHeld, AccessDenied, NotHosted)),
        *((LimitReached("visits: at most 5"), 409), (KeyReused("another request"), 422)),
        *((InvalidRequest("a name"), 500), (Unsupported("on redis"), 500), (RemoteError("Own", "text", ""), 500)),
    ],
    ids=repr,
)
def test_an_error_that_no_view_handles_is_answered_with_its_outcome(error: Exception, status: int) -> None:
    app = make_app(SharedState())
    response = answer(app, error)
    assert response.status_code == status
    assert response.headers.get("Retry-After") == ("1" if status == 503 else None)
    if status != 500:
        assert response.mimetype == "text/plain"
        assert f"outcome: {cast(CounterServerError, error).outcome} (" in response.text
        assert ("/srv" in response.text, "at most 5" in response.text) == (False, isinstance(error, LimitReached))
        as_json = app.test_client().get("/fails", headers={"Accept": "application/json"})
        assert (as_json.status_code, as_json.headers.get("Retry-After")) == (
            status,
            response.headers.get("Retry-After"),
        )
        body = as_json.get_json()
        assert (body["title"], body["outcome"]) == (type(error).__name__, cast(CounterServerError, error).outcome)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("kind", "status"),
    [(CounterServerError, 200), (StateLost, 200), (Exception, 200), (503, 503), (HTTPException, 503)],
)
def test_a_handler_of_the_app_is_left_alone(kind: Any, status: int, *, first: bool) -> None:
    app = Flask(__name__)
    app.config[STORE] = "memory://"
    seen: list[Exception] = []

    def handle(error: Exception) -> tuple[str, int]:
        seen.append(error)
        return "of the app", status

    if first:
        app.register_error_handler(kind, handle)
    SharedState(app)
    if not first:
        app.register_error_handler(kind, handle)
    error = StateLost("lost")
    response = answer(app, error)
    assert (response.status_code, response.text) == (status, "of the app")
    assert (seen == [error]) is (status == 200)


def test_the_error_handler_can_be_switched_off() -> None:
    app = make_app(SharedState(), COUNTER_SERVER_ERROR_HANDLER=False)
    assert answer(app, StateLost("lost")).status_code == 500


def test_it_holds_no_reference_to_the_app() -> None:
    shared = SharedState()
    app = make_app(shared)
    counter = shared.counter("x")
    with app.app_context():
        assert counter.increment() == 1
    gone, state = weakref.ref(app), weakref.ref(app.extensions["counter_server"])
    del app
    gc.collect()
    assert (gone(), state()) == (None, None)
    with pytest.raises(RuntimeError, match="application context"):
        counter.increment()
    with make_app(shared).app_context():
        assert counter.increment() == 1
    assert [app() for app in shared._apps] == [None, None]
    assert isinstance(counter, Counter)


@pytest.mark.parametrize(
    ("environment", "config", "directory"),
    [
        ({}, None, "instance/counter-server"),
        ({STORE: ""}, None, "instance/counter-server"),
        ({DATA_DIR: ""}, None, "instance/counter-server"),
        ({DATA_DIR: "{}/data"}, None, "data"),
        ({DATA_DIR: "data"}, None, "data"),
        ({DATA_DIR: "{}/ignored", STORE: "manager://{}/data"}, None, "data"),
        ({STORE: "nonsense://"}, "manager://{}/data", "data"),
    ],
)
def test_the_configuration_or_the_environment_names_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], config: str | None, directory: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    app = Flask(__name__, instance_path=str(tmp_path / "instance"))
    if config is not None:
        app.config[STORE] = config.format(tmp_path)
    SharedState(app)
    monkeypatch.chdir("/")
    with app.app_context():
        store = SharedState().state.store
    assert isinstance(store, StateProxy)
    assert store.directory.path == tmp_path / directory
    assert app.config["COUNTER_SERVER_DEADLINE"] == 5
    if not any(environment.values()):
        assert app.config[STORE] == "manager://"
    assert list(tmp_path.iterdir()) == []  # nothing is made before its use


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *(
            (STORE, url, rf"^COUNTER_SERVER_STORE: .*{re.escape(repr(url))}")
            for url in ("", "nonsense://", "memory:", "manager://[", "redis")
        ),
        *((STORE, url, "^COUNTER_SERVER_STORE in the app's .* a str, not ") for url in (None, 5, b"memory://")),
        *(
            ("COUNTER_SERVER_DATA_DIR", path, "^COUNTER_SERVER_DATA_DIR in the app's .* must be a path")
            for path in (5, b"/x", ["x"], True)
        ),
        *(("COUNTER_SERVER_DEADLINE", seconds, "deadline") for seconds in (0, 60.1, math.nan, "5", None)),
    ],
)
def test_an_invalid_store_or_deadline_is_refused_by_init_app(name: str, value: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        make_app(SharedState(), **{name: value})


ENVIRONMENT: list[tuple[str, str, object]] = [
    *(
        ("DEADLINE", "2.5", 2.5),
        ("REQUEST_DEADLINE", "7", 7.0),
        ("IDLE_TIMEOUT", "5", 5.0),
        ("DURABILITY", "none", "none"),
    ),
    *((name, "off", False) for name in ("TIMING", "START", "ERROR_HANDLER")),
    *(("START", text, True) for text in ("1", "true", "True", "yes", "on")),
    *(
        ("LARGEST_VALUE", "2097152", 2097152),
        ("DATA_DIR", "/srv/data", "/srv/data"),
        ("LOG", "stderr", "stderr"),
        ("DEADLINE", "", 5.0),
    ),
]


@pytest.mark.parametrize(("name", "text", "value"), ENVIRONMENT)
def test_the_environment_sets_what_the_configuration_does_not(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = f"COUNTER_SERVER_{name}"
    monkeypatch.setenv(setting, text)
    assert make_app(SharedState()).config[setting] == value
    monkeypatch.setenv(setting, "nonsense")
    assert make_app(SharedState(), **{setting: value}).config[setting] == value
    assert setting in (SharedState.__doc__ or "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            (name, "nonsense")
            for name in ("DEADLINE", "REQUEST_DEADLINE", "IDLE_TIMEOUT", "DURABILITY", "TIMING", "START")
        ),
        *(("LARGEST_VALUE", text) for text in ("1000", "1.5", "99999999999")),
        *(("DEADLINE", "61"), ("DEADLINE", "nan"), ("ERROR_HANDLER", "2"), ("LOG", "syslog")),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_by_its_name(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = f"COUNTER_SERVER_{name}"
    for config in ({setting: text}, {}):
        with pytest.raises(InvalidRequest, match=f"{setting}.*{re.escape(repr(text))}") as refused:
            make_app(SharedState(), **config)
        assert "\n" not in str(refused.value)
        monkeypatch.setenv(setting, text)


def test_apps_with_one_manager_share_their_counters(
    stack: ExitStack, data_dir: Path, start_manager: Callable[[], Manager]
) -> None:
    """One finds it in its instance folder. A closed state has no connection, and the next use opens one."""
    url = start_manager().url
    instance = data_dir.parent / "instance"
    instance.mkdir()
    (instance / "counter-server").symlink_to(data_dir)
    by_folder = Flask(__name__, instance_path=str(instance))
    by_folder.config["COUNTER_SERVER_DEADLINE"] = PATIENCE
    shared = SharedState(by_folder)
    apps = by_folder, *(make_app(shared, COUNTER_SERVER_STORE=url, COUNTER_SERVER_DEADLINE=PATIENCE) for _ in range(2))
    before = open_in(os.getpid())
    counter = shared.counter("x")
    numbers: list[int] = []
    for app in 2 * apps:
        with app.app_context():
            numbers.append(counter.increment())
        assert len(open_in(os.getpid()) - before) == 1
        app.extensions["counter_server"].close()
        assert open_in(os.getpid()) <= before
    assert numbers == [1, 2, 3, 4, 5, 6]


WARNING = """
import gc, os, threading, warnings
from flask import Flask
from counter_server import SharedState, open_state
from tests.hosted_classes import SomeObj

app = Flask(__name__)
shared = SharedState(app)
obj, entries = shared.object("obj", SomeObj, 0), shared.dict("entries")

@app.get("/")
def home():
    entries["a"] = 1
    thread = threading.Thread(target=shared.counter("c").increment)
    thread.start()
    thread.join()
    return f"{shared.counter('c').increment()} {obj.query()}"

if __name__ == "__main__":
    client = app.test_client()
    print(client.get("/").text, flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is this program's
        child = os.fork()
    status = os.waitpid(child, 0)[1] if child else 0
    print(client.get("/").text, status, flush=True)
    if child:
        other = open_state(app.config["COUNTER_SERVER_STORE"])
        other.counter("c").increment()
        del other
        gc.collect()
"""


def test_an_app_works_with_warnings_as_errors(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    """Neither it nor its child, nor its manager, has anything to warn of, resources left open included."""
    (tmp_path / "app.py").write_text(WARNING)
    environment = {STORE: on_demand, "COUNTER_SERVER_DEADLINE": str(PATIENCE), "PYTHONPATH": str(ROOT)}
    with Program("-X", "dev", "-W", "error", "app.py", cwd=tmp_path, environment=environment) as program:
        assert program.wait() == 0
    assert program.errors == []
    assert program.output == ["2 1", "4 2 0", "6 3 0"]
    assert (data_dir / "manager.log").read_text() == ""
