"""`SharedState`, the Flask extension, in anybody's app."""

import gc
import math
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from flask import Flask

from counter_server import SharedState
from counter_server.errors import CounterServerError, InvalidRequest
from counter_server.manager.client import StateProxy
from counter_server.state import Counter
from tests.processes import Manager

STORE = "COUNTER_SERVER_STORE"
DATA_DIR = "COUNTER_SERVER_DATA_DIR"
DEADLINE = "COUNTER_SERVER_DEADLINE"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer has set is not part of these tests."""
    monkeypatch.delenv(STORE, raising=False)
    monkeypatch.delenv(DATA_DIR, raising=False)


def make_app(shared: SharedState, **config: object) -> Flask:
    app = Flask(__name__)
    app.config.update(config)
    shared.init_app(app)
    return app


def memory_app(shared: SharedState) -> Flask:
    return make_app(shared, COUNTER_SERVER_STORE="memory://")


def directory_of(app: Flask) -> Path:
    """The data directory that the app's store looks into."""
    with app.app_context():
        store = SharedState().state.store
    assert isinstance(store, StateProxy)
    return store.directory.path


def test_an_app_that_is_there_is_given_to_the_extension() -> None:
    app = Flask(__name__)
    app.config[STORE] = "memory://"
    shared = SharedState(app)
    with app.app_context():
        assert shared.counter("x").increment() == 1


def test_an_app_that_comes_later_is_given_to_init_app() -> None:
    shared = SharedState()
    visits = shared.counter("visits")  # at import time, before there is any app

    def create_app() -> Flask:
        app = Flask(__name__)
        app.config[STORE] = "memory://"
        shared.init_app(app)

        @app.get("/")
        def home() -> str:
            return str(visits.increment())

        return app

    client = create_app().test_client()
    assert [client.get("/").text for _ in range(3)] == ["1", "2", "3"]


def test_two_apps_with_one_shared_state_are_separate() -> None:
    shared = SharedState()
    one, two = memory_app(shared), memory_app(shared)
    counter = shared.counter("x")
    with one.app_context():
        assert counter.increment(5) == 5
        with two.app_context():
            assert counter.increment() == 1
            assert shared.counters().counters == [("x", 1)]
        assert counter.increment() == 6
    assert one.extensions["counter_server"] is not two.extensions["counter_server"]


def test_any_shared_state_speaks_for_the_current_app() -> None:
    app = memory_app(SharedState())
    with app.app_context():
        assert SharedState().counter("x").increment() == 1
        assert SharedState().counter("x").increment() == 2


def test_a_second_shared_state_for_one_app_is_refused_and_the_first_goes_on() -> None:
    shared = SharedState()
    app = memory_app(shared)
    with app.app_context():
        shared.counter("x").increment()
    with pytest.raises(RuntimeError, match="already"):
        SharedState(app)
    with pytest.raises(RuntimeError, match="already"):
        shared.init_app(app)
    with app.app_context():
        assert shared.counter("x").increment() == 2


def test_an_init_app_that_failed_can_be_done_again() -> None:
    app = Flask(__name__)
    app.config[STORE] = "nonsense://"
    shared = SharedState()
    with pytest.raises(InvalidRequest, match="nonsense"):
        shared.init_app(app)
    app.config[STORE] = "memory://"
    shared.init_app(app)
    with app.app_context():
        assert shared.counter("x").increment() == 1


def test_use_without_an_app_context_is_a_clear_error() -> None:
    shared = SharedState()
    memory_app(shared)
    counter = shared.counter("x")
    for use in (counter.increment, lambda: counter.value, counter.delete, shared.counters, lambda: shared.state):
        with pytest.raises(RuntimeError, match="application context"):
            use()


def test_use_in_an_app_without_a_shared_state_is_a_clear_error() -> None:
    shared = SharedState()
    memory_app(shared)
    with Flask(__name__).app_context(), pytest.raises(RuntimeError, match=r"init_app\(app\)"):
        shared.counter("x").increment()


def test_a_thread_without_the_app_context_is_told_so_and_one_with_it_counts() -> None:
    shared = SharedState()
    app = memory_app(shared)
    told: list[str] = []

    def count() -> None:
        try:
            shared.counter("x").increment()
        except RuntimeError as error:
            told.append(str(error))
        with app.app_context():
            shared.counter("x").increment()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8
    assert all("application context" in message for message in told)
    with app.app_context():
        assert shared.counter("x").value == 8


def test_a_bad_name_is_refused_where_it_is_written() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        SharedState().counter("")


def test_it_holds_no_reference_to_the_app() -> None:
    shared = SharedState()
    app = memory_app(shared)
    counter = shared.counter("x")
    with app.app_context():
        assert counter.increment() == 1
    gone, state = weakref.ref(app), weakref.ref(app.extensions["counter_server"])
    del app
    gc.collect()
    assert gone() is None
    assert state() is None
    with memory_app(shared).app_context():
        assert counter.increment() == 1
    assert vars(shared) == {"declarations": {}}
    assert isinstance(counter, Counter)


# Configuration


def test_without_configuration_the_data_directory_is_in_the_apps_instance_folder(tmp_path: Path) -> None:
    app = Flask(__name__, instance_path=str(tmp_path / "instance"))
    SharedState(app)
    assert app.config[STORE] == "manager://"
    assert app.config[DEADLINE] == 5
    assert directory_of(app) == tmp_path / "instance" / "counter-server"
    assert list(tmp_path.iterdir()) == []  # nothing is made before its use


def test_the_environment_names_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_DIR, str(tmp_path / "data"))
    assert directory_of(make_app(SharedState())) == tmp_path / "data"


def test_a_relative_data_directory_begins_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DATA_DIR, "data")
    app = make_app(SharedState())
    monkeypatch.chdir("/")
    assert directory_of(app) == tmp_path / "data"


def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_DIR, str(tmp_path / "ignored"))
    monkeypatch.setenv(STORE, f"manager://{tmp_path}/data")
    assert directory_of(make_app(SharedState())) == tmp_path / "data"


def test_the_apps_configuration_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE, "nonsense://")
    app = make_app(SharedState(), COUNTER_SERVER_STORE=f"manager://{tmp_path}/data")
    assert directory_of(app) == tmp_path / "data"


@pytest.mark.parametrize("variable", [STORE, DATA_DIR])
def test_an_empty_variable_is_one_that_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "")
    app = Flask(__name__, instance_path=str(tmp_path))
    SharedState(app)
    assert directory_of(app) == tmp_path / "counter-server"


@pytest.mark.parametrize("name", ["two words", "50%", "100%25", "größe", "a;b", "a&b", "a[b", "[v1]"])
def test_a_url_names_its_directory_with_escapes_where_they_are_needed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    app = make_app(SharedState(), COUNTER_SERVER_STORE=f"manager://{str(path).replace('%', '%25')}")
    assert directory_of(app) == path


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense://",
        "memory://x",
        "memory:",
        "manager://relative/path",
        "manager://host:1/path",
        "manager:///path?query",
        "manager:///path#fragment",
        "manager://[",
        "http://[::1",
        "/just/a/path",
        "redis",
    ],
)
def test_a_store_that_there_is_not_is_refused_by_init_app_with_its_name(url: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make_app(SharedState(), COUNTER_SERVER_STORE=url)
    assert repr(url) in str(refused.value)


@pytest.mark.parametrize("deadline", [0, -1, 60.1, math.inf, math.nan, "5", None])
def test_a_deadline_that_cannot_be_kept_is_refused_by_init_app(deadline: object) -> None:
    with pytest.raises(InvalidRequest, match="deadline"):
        make_app(SharedState(), COUNTER_SERVER_STORE="memory://", COUNTER_SERVER_DEADLINE=deadline)


def test_the_deadline_of_the_configuration_holds(tmp_path: Path) -> None:
    app = make_app(SharedState(), COUNTER_SERVER_STORE=f"manager://{tmp_path}", COUNTER_SERVER_DEADLINE=0.05)
    with app.app_context(), pytest.raises(CounterServerError) as late:
        SharedState().counter("x").increment()
    assert late.value.outcome == "not_applied"
    assert "\n" not in str(late.value)


# With a manager


def test_apps_with_one_manager_share_their_counters(stack: ExitStack, start_manager: Callable[[], Manager]) -> None:
    url = start_manager().url
    shared = SharedState()
    one, two = (make_app(shared, COUNTER_SERVER_STORE=url) for _ in range(2))
    for app in (one, two):
        stack.callback(app.extensions["counter_server"].close)
    counter = shared.counter("x")
    numbers: list[int] = []
    for app in (one, two, one):
        with app.app_context():
            numbers.append(counter.increment())
    assert numbers == [1, 2, 3]


def test_an_app_finds_the_manager_of_its_instance_folder(
    stack: ExitStack, data_dir: Path, start_manager: Callable[[], Manager]
) -> None:
    start_manager()
    app = Flask(__name__, instance_path=str(data_dir.parent / "instance"))
    (data_dir.parent / "instance").mkdir()
    os.symlink(data_dir, data_dir.parent / "instance" / "counter-server")
    shared = SharedState(app)
    stack.callback(app.extensions["counter_server"].close)
    with app.app_context():
        assert shared.counter("x").increment() == 1


def test_an_app_goes_on_with_the_next_manager_after_one_was_killed(
    stack: ExitStack, start_manager: Callable[[], Manager]
) -> None:
    manager = start_manager()
    app = make_app(SharedState(), COUNTER_SERVER_STORE=manager.url, COUNTER_SERVER_DEADLINE=30)
    stack.callback(app.extensions["counter_server"].close)
    with app.app_context():
        assert SharedState().counter("x").increment() == 1
        manager.kill()
        start_manager()
        assert SharedState().counter("x").increment() == 2


def test_a_closed_state_has_no_connection_and_the_next_use_opens_one(start_manager: Callable[[], Manager]) -> None:
    url = start_manager().url
    shared = SharedState()

    def open_sockets() -> int:
        found = 0
        for descriptor in Path("/proc/self/fd").iterdir():
            try:
                found += os.readlink(descriptor).startswith("socket:")
            except OSError:
                continue
        return found

    before = open_sockets()
    app = make_app(shared, COUNTER_SERVER_STORE=url)
    with app.app_context():
        shared.counter("x").increment()
    assert open_sockets() == before + 1
    app.extensions["counter_server"].close()
    assert open_sockets() == before
    with app.app_context():
        assert shared.counter("x").increment() == 2
    assert open_sockets() == before + 1
    app.extensions["counter_server"].close()
