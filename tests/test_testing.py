"""What people use to test their apps: late configuration, `reset`, `in_memory` and the pytest plugin."""

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
from flask import Flask, g
from flask_caching import Cache

from counter_server import SharedState, open_state, state
from counter_server.caching import ManagerCache
from counter_server.errors import InvalidRequest, KeyReused, LimitReached, NotHosted, StartupError, Unsupported
from counter_server.limiting import ManagerStorage
from counter_server.manager.client import StateProxy
from counter_server.manager.directory import DataDirectory
from counter_server.stores.memory import MemoryStore
from counter_server.testing import in_memory
from tests.hosted_classes import SomeObj
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, in_child
from tests.test_documentation import examples

STORE = "COUNTER_SERVER_STORE"
DATA_DIR = "COUNTER_SERVER_DATA_DIR"
DEADLINE = "COUNTER_SERVER_DEADLINE"
REQUEST_DEADLINE = "COUNTER_SERVER_REQUEST_DEADLINE"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("COUNTER_SERVER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    """Return an app with nothing configured. No directory may come into its instance folder."""
    app = Flask(__name__, instance_path=str(tmp_path / "instance"))
    yield app
    assert not (tmp_path / "instance").exists()


def visits(app: Flask, shared: SharedState) -> Callable[[], str]:
    """Give the app a view that counts, and return a function that asks for it."""
    app.add_url_rule("/", view_func=lambda: str(shared.counter("x").increment()))
    return lambda: app.test_client().get("/").text


class Unpicklable:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def query(self) -> bool:
        return self.lock.locked()


# The configuration may change until the first use.


def test_a_store_that_is_set_after_init_app_is_used(app: Flask) -> None:
    shared = SharedState(app)
    obj, cache = shared.object("obj", SomeObj, 0), Cache(app, config={"CACHE_TYPE": f"{__name__}.FoundCache"})
    assert str(state.declared_for(f"manager://{app.instance_path}/counter-server")).count("SomeObj") == 1
    app.config[STORE] = "memory://"
    count = visits(app, shared)
    assert [count(), count()] == ["1", "2"]
    assert obj.query() == 1
    assert cache.set("a", 1)
    assert cache.get("a") == 1
    assert isinstance(shared.state.store, MemoryStore)


class FoundCache(ManagerCache):
    """As a person may name a class of their own to Flask-Caching."""


def test_a_default_that_depends_on_the_deadline_follows_it(app: Flask) -> None:
    app.config[STORE] = "memory://"
    shared = SharedState(app)
    count, waits = visits(app, shared), list[float]()
    app.teardown_request(lambda _error: waits.append(g._counter_server.patience))
    assert app.config[REQUEST_DEADLINE] == 10
    app.config[DEADLINE] = 7
    assert count() == "1"
    assert waits == [14], "of the first request too"
    assert (app.config[DEADLINE], app.config[REQUEST_DEADLINE]) == (7, 14)


@pytest.mark.parametrize("own", [10.0, 3])
def test_a_requests_deadline_of_ones_own_stays(app: Flask, own: float) -> None:
    app.config[STORE] = "memory://"
    shared = SharedState(app)
    app.config.update({DEADLINE: 7, REQUEST_DEADLINE: own})
    assert visits(app, shared)() == "1"
    assert app.config[REQUEST_DEADLINE] == own


@pytest.mark.parametrize("late", [False, True])
def test_timing_and_the_error_handler_may_be_set_late(app: Flask, *, late: bool) -> None:
    early = {"COUNTER_SERVER_TIMING": not late, "COUNTER_SERVER_ERROR_HANDLER": not late}
    app.config.update({STORE: "memory://", **early})
    shared = SharedState(app)
    app.config.update({name: not value for name, value in early.items()})

    @app.get("/")
    def at_most_none() -> str:
        return str(shared.counter("x").increment(maximum=0))

    response = app.test_client().get("/")
    assert (response.status_code, "Server-Timing" in response.headers) == ((409, True) if late else (500, False))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({STORE: "nonsense://"}, InvalidRequest),
        ({STORE: "sqlite:////nowhere/counters.db"}, Unsupported),
        ({DEADLINE: 61}, InvalidRequest),
        ({"COUNTER_SERVER_TIMING": "perhaps"}, InvalidRequest),
    ],
    ids=str,
)
def test_what_is_wrong_when_it_is_set_late_is_refused_until_it_is_right(
    app: Flask, wrong: dict[str, object], error: type[Exception]
) -> None:
    shared = SharedState(app)
    obj = shared.object("obj", SomeObj, 0)
    before = dict(app.config)
    app.config.update(wrong)
    with app.app_context():
        for use in (obj.query, shared.counter("x").increment, lambda: shared.state.store) * 2:
            with pytest.raises(error):
                use()
        assert app.config == {**before, **wrong}
        app.config.update(before)
        app.config[STORE] = "memory://"
        assert (obj.query(), shared.counter("x").increment()) == (1, 1)


def test_an_object_is_declared_after_the_store_was_changed_to_one_that_hosts_it(app: Flask) -> None:
    app.config[STORE] = "sqlite:////nowhere/counters.db"
    shared = SharedState(app)
    with pytest.raises(Unsupported, match="sqlite"):
        shared.object("obj", SomeObj, 0)
    app.config[STORE] = "memory://"
    assert shared.object("obj", SomeObj, 0).query() == 1


def test_threads_at_the_first_use_get_one_state(app: Flask) -> None:
    for _ in range(50):
        one = Flask(__name__, instance_path=app.instance_path)
        shared = SharedState(one)
        one.config[STORE] = "memory://"
        numbers, counter = list[int](), shared.counter("x")

        def count() -> None:
            numbers.append(counter.increment())

        at_once(8, count)
        assert sorted(numbers) == list(range(1, 9))


def test_after_the_first_use_another_store_has_no_effect(app: Flask) -> None:
    app.config[STORE] = "memory://"
    shared = SharedState(app)
    count = visits(app, shared)
    assert count() == "1"
    app.config[STORE] = "nonsense://"
    assert count() == "2"


def test_the_child_of_a_fork_before_the_first_use_takes_the_late_configuration(app: Flask) -> None:
    shared = SharedState(app)
    app.config[STORE] = "memory://"

    def work() -> bytes:
        with app.app_context():
            return f"{shared.counter('x').increment()} {shared.state.store}".encode()

    assert in_child(work) == b"1 memory://"


# `reset`


def test_reset_empties_a_state_in_memory(app: Flask) -> None:
    app.config.update({STORE: "memory://", "SECRET_KEY": "for this test"})
    shared = SharedState(app)
    counter, obj, carts = shared.counter("x"), shared.object("obj", SomeObj, 0), shared.dict("carts")
    basket = shared.visitor_counter("basket")
    for _ in range(3):
        with app.test_request_context():
            used = (counter.increment(key="a"), obj.query(), len(carts), basket.increment())
            carts["anna"] = 1
            assert used == (1, 1, 0, 1)
        shared.reset()
        assert shared.counters().counters == []


def test_reset_of_any_other_store_is_refused_and_deletes_nothing(app: Flask, on_demand: str) -> None:
    app.config.update({STORE: on_demand, DEADLINE: PATIENCE})
    shared = SharedState(app)
    counter = shared.counter("x")
    assert counter.increment() == 1
    with pytest.raises(InvalidRequest, match=r"nothing was deleted: .*COUNTER_SERVER_STORE to memory://.*in_memory"):
        shared.reset()
    assert counter.increment() == 2
    shared.state.close()


def test_reset_in_a_block_empties_the_block_alone(app: Flask) -> None:
    shared = SharedState(app)
    counter = shared.counter("x")
    other = open_state(f"manager://{app.instance_path}/other").counter("x")
    with in_memory():
        assert (counter.increment(), other.increment()) == (1, 1)
        shared.reset()
        assert (counter.increment(), other.increment()) == (1, 2)
    assert isinstance(shared.state.store, StateProxy), "its own store again, after the block"


# `in_memory`


def test_everything_that_an_app_uses_is_in_memory_and_begins_empty(app: Flask) -> None:
    app.config["SECRET_KEY"] = "for this test"
    shared = SharedState(app)
    directory = f"manager://{app.instance_path}/counter-server"
    counter, obj, carts = shared.counter("x"), shared.object("obj", SomeObj, 0), shared.dict("carts")
    volatile, basket = shared.object("volatile", SomeObj, 0, durable=False), shared.visitor_counter("basket")
    cache, limits = ManagerCache(), ManagerStorage("manager://")
    for _ in range(2):
        with in_memory(), app.test_request_context():
            assert (counter.increment(key="a"), counter.increment(key="a"), counter.value) == (1, 1, 1)
            assert (obj.query(), obj.query(), volatile.query(), len(carts)) == (1, 2, 1, 0)
            assert (carts.incr("a"), basket.increment(), basket.increment()) == (1, 1, 2)
            with pytest.raises(LimitReached):
                counter.increment(maximum=1)
            with pytest.raises(LimitReached):
                basket.increment(maximum=2)
            with pytest.raises(KeyReused):
                counter.increment(2, key="a")
            assert (cache.get("a"), cache.set("a", [1]), cache.get("a")) == (None, True, [1])
            assert limits.incr("a", 60) == 1
            assert open_state(directory).counter("x").value == 1, "one store elsewhere is one store here"


def test_states_are_in_their_own_stores_again_after_the_block(app: Flask, on_demand: str) -> None:
    """Also those that were opened in it, and those whose first use was in it."""
    app.config.update({STORE: on_demand, DEADLINE: PATIENCE})
    before = open_state(on_demand, deadline=PATIENCE)
    assert before.counter("x").increment() == 1
    shared = SharedState(app)
    with in_memory():
        within = open_state(on_demand, deadline=PATIENCE)
        assert [each.counter("x").increment() for each in (before, shared, within)] == [1, 2, 3]
        assert [str(each.store) for each in (before, shared.state, within)] == ["memory://"] * 3
        within.close()
    assert [each.counter("x").increment() for each in (before, shared, within)] == [2, 3, 4]
    for each in (before, shared.state, within):
        assert isinstance(each.store, StateProxy)
        each.close()


def test_each_run_of_a_decorated_coroutine_is_in_memory_until_it_ends() -> None:
    with open_state("memory://") as state:

        @in_memory()
        async def count() -> int:
            await asyncio.sleep(0)
            return state.counter("x").increment()

        assert [asyncio.run(count()) for _ in range(2)] == [1, 1]
        assert state.counter("x").value == 0


def test_no_manager_starts_and_no_file_is_written(tmp_path: Path) -> None:
    directory, database = tmp_path / "data", tmp_path / "x.db"
    with in_memory():
        for url in (
            DataDirectory(directory).url,
            f"sqlite:///{database}",
            "sqlite:////nowhere/counters.db",
        ):
            assert open_state(url).counter("x").increment() == 1, url
    assert list(tmp_path.iterdir()) == []


def test_what_production_refuses_is_refused_in_a_block(app: Flask) -> None:
    app.config[STORE] = "sqlite:////nowhere/counters.db"
    shared = SharedState()
    obj = shared.object("obj", SomeObj, 0)
    with in_memory():
        for wrong in ("nonsense://", "manager://relative"):
            with pytest.raises(InvalidRequest):
                open_state(wrong)
        with pytest.raises(Unsupported, match="sqlite://"):
            shared.init_app(app)
        with pytest.raises(Unsupported, match="sqlite://"):
            open_state("sqlite:////nowhere/counters.db").object("obj", SomeObj, 0)
        with pytest.raises(StartupError, match="durable=False"):
            open_state("manager:///data").object("lock", Unpicklable).query()
        open_state("manager:///data").object("obj", SomeObj, 0).query()
        with pytest.raises(NotHosted, match="has that name"):
            open_state("manager:///data").object("obj", Unpicklable, durable=False).query()
        with pytest.raises(RuntimeError, match="init_app"), app.app_context():
            obj.query()


def test_blocks_are_nested_and_each_keeps_its_own(app: Flask) -> None:
    shared = SharedState(app)
    counter, obj = shared.counter("x"), shared.object("obj", SomeObj, 0)
    with in_memory():
        assert (counter.increment(), obj.query()) == (1, 1)
        with in_memory():
            assert (counter.increment(), obj.query()) == (1, 1)
        assert (counter.increment(), obj.query()) == (2, 2)

    @in_memory()
    def decorated() -> int:
        return counter.increment()

    assert [decorated(), decorated()] == [1, 1]


def test_blocks_of_two_threads_may_end_in_any_order(app: Flask) -> None:
    counter = SharedState(app).counter("x")
    with app.app_context(), ExitStack() as first, ExitStack() as second:
        first.enter_context(in_memory())
        second.enter_context(in_memory())
        assert counter.increment() == 1
        first.close()
        assert counter.increment() == 2, "the second block still holds"


def test_a_state_of_memory_keeps_its_numbers_outside_of_a_block() -> None:
    one, two = open_state("memory://").counter("x"), open_state("memory://").counter("x")
    assert one.increment() == 1
    with in_memory():
        assert (one.increment(), one.increment(), two.increment()) == (1, 2, 1)
    assert (one.increment(), two.increment()) == (2, 1)


def test_threads_that_count_while_blocks_come_and_go_stay_in_memory(app: Flask) -> None:
    """Whatever the order of the blocks' ends: each number is of some block, and none of the store outside."""
    shared = SharedState(app)
    counter, obj = shared.counter("x"), shared.object("obj", SomeObj, 0)

    def enter_and_count() -> None:
        for _ in range(20):
            with in_memory():
                assert counter.increment() > 0
                assert obj.query() > 0
                opened = open_state(f"manager://{app.instance_path}/other")
                assert opened.counter("x").increment() > 0

    with in_memory():
        at_once(4, enter_and_count)
        assert counter.increment() == obj.query() == 1
    assert isinstance(shared.state.store, StateProxy)


def test_the_child_of_a_fork_counts_in_a_copy(app: Flask) -> None:
    """Also if a thread of the parent was in the middle of a call."""
    shared = SharedState(app)
    counter, obj = shared.counter("x"), shared.object("obj", SomeObj, 0)
    with in_memory():
        assert (counter.increment(), obj.query()) == (1, 1)
        store = cast(MemoryStore, shared.state.store)
        with store._writing:  # a child that waits for that thread fails
            assert in_child(lambda: f"{counter.increment()} {obj.query()}".encode()) == b"2 2"
        assert (counter.increment(), obj.query()) == (2, 2)


# The plugin


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.usefixtures("memory_state")
def test_the_fixture_begins_each_test_empty(app: Flask, turn: int) -> None:
    assert SharedState(app).counter("x").increment() == 1, turn


def run_pytest(directory: Path, *arguments: str) -> str:
    """Return what pytest prints in a directory, whose tests must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_page_about_tests_is_true(tmp_path: Path) -> None:
    """Every file on it is run by pytest, as it is there; with unittest, so is the one for that."""
    files = dict[str, str]()
    for block in examples(ROOT / "docs" / "testing.md"):
        name = cast(re.Match[str], re.match(r"# ([\w.]+)\n", block))[1]
        files[name] = block
        (tmp_path / name).write_text(block)
    assert "8 passed" in run_pytest(tmp_path)
    (tmp_path / "pyproject.toml").unlink()
    assert "8 passed" in run_pytest(tmp_path), "the fixture is named by each test that needs it"
    command = [sys.executable, "-m", "unittest", "-q", "test_with_unittest"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Ran 2 tests" in done.stderr) == (0, True), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*files} - {"pyproject.toml"}, "nothing else was written"


@pytest.mark.slow
def test_an_app_that_is_imported_first_in_a_test_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "from flask import Flask\nfrom counter_server import SharedState\n"
        "app = Flask(__name__)\nshared = SharedState(app)\nvisits = shared.counter('visits')\n"
    )
    (tmp_path / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(autouse=True)\ndef _empty(memory_state):\n    pass\n"
    )
    (tmp_path / "test_late.py").write_text(
        "import pytest\n@pytest.mark.parametrize('turn', range(3))\ndef test_it(turn):\n"
        "    from late import visits\n    assert visits.increment() == 1\n"
    )
    assert "3 passed" in run_pytest(tmp_path)
    assert not (tmp_path / "instance").exists()


@pytest.mark.slow
def test_the_plugin_costs_nothing_until_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('counter_server')\n"
        "    names = [name for name in sys.modules if name.startswith('counter_server')]\n"
        "    assert sorted(names) == ['counter_server', 'counter_server.testing', 'counter_server.testing.plugin']\n"
        "    assert not {'flask', 'msgspec'} & {*sys.modules}\n"
    )
    assert "1 passed" in run_pytest(tmp_path)


def test_the_contract_is_still_found_in_the_package() -> None:
    from counter_server import testing
    from counter_server.testing import NAMES, Operation, StoreContract, violations

    assert StoreContract.__module__ == "counter_server.testing.contract"
    assert [violations([Operation("one", 0, 1, (1,))], 1), len(NAMES) > 5] == [[], True]
    assert not {name for name in testing.__all__ if not hasattr(testing, name)}
    with pytest.raises(AttributeError, match="nothing"):
        _ = testing.nothing
