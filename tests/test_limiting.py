"""The shared storage follows the contract of limits, whose memory storage is the reference."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from flask_limiter import Limiter
from flask_limiter.commands import cli as flask_limiter_command
from flask_limiter.util import get_remote_address
from hypothesis import example, given, settings
from hypothesis import strategies as st
from limits import (
    RateLimitItem,
    RateLimitItemPerMinute,
    RateLimitItemPerSecond,
    RateLimitItemPerYear,
)
from limits.errors import StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import STRATEGIES, RateLimiter

from counter_server import CounterServerError, SharedState, StoreOptions
from counter_server.errors import DeadlineExceeded, InvalidRequest, NotHosted, StartupError, Unsupported
from counter_server.limiting import ManagerStorage
from counter_server.manager.directory import DataDirectory
from counter_server.windows import Windows
from tests.hosted_classes import SomeObj
from tests.launchers import listening_port
from tests.load import at_once, spawn
from tests.processes import PATIENCE, ROOT, Program, end_manager, eventually, frozen, holder

LONG = RateLimitItemPerYear(3)  # none of its windows ends while a test runs
BEGINNING = 1_700_000_000.0  # seconds, at the start of a test's clock


@pytest.fixture(scope="module")
def shared_manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of an on-demand manager for all tests that do not disturb it."""
    data_dir = tmp_path_factory.mktemp("limits") / "data"
    yield DataDirectory(data_dir).url
    end_manager(data_dir / "manager.lock")


@pytest.fixture(params=["MemoryStorage", "memory", "manager"])
def storage(request: pytest.FixtureRequest, shared_manager: str) -> Storage:
    """Return an empty storage: the reference, or ours in this process or in a manager."""
    if request.param == "MemoryStorage":
        return MemoryStorage()
    storage = ManagerStorage("memory://" if request.param == "memory" else shared_manager, deadline=PATIENCE)
    storage.reset()
    return storage


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def limiter(storage: Storage, strategy: str) -> RateLimiter:
    return STRATEGIES[strategy](storage)


def hits(limiter: RateLimiter, times: int, limit: RateLimitItem = LONG, who: str = "anna") -> list[bool]:
    return [limiter.hit(limit, who) for _ in range(times)]


def remaining(limiter: RateLimiter, limit: RateLimitItem = LONG, who: str = "anna") -> int:
    return limiter.get_window_stats(limit, who).remaining


# The contract


def test_hits_up_to_the_limit_are_admitted(limiter: RateLimiter) -> None:
    assert hits(limiter, 6) == [True, True, True, False, False, False]


def test_test_predicts_hit_without_using_the_budget(limiter: RateLimiter) -> None:
    for left in (3, 2, 1, 0):
        for cost in (1, 2, 3, 4):
            assert limiter.test(LONG, "anna", cost=cost) is (cost <= left)
        assert remaining(limiter) == left
        assert limiter.hit(LONG, "anna") is (left > 0)


def test_the_stats_report_the_remaining_hits_and_the_reset_time(limiter: RateLimiter, strategy: str) -> None:
    assert remaining(limiter) == 3
    before = time.time()
    for left in (2, 1, 0):
        assert limiter.hit(LONG, "anna")
        stats = limiter.get_window_stats(LONG, "anna")
        assert stats.remaining == left
        # A sliding window begins by the calendar, the others with the first hit.
        length = 0 if strategy == "sliding-window-counter" else LONG.get_expiry()
        assert before + length <= stats.reset_time <= time.time() + LONG.get_expiry()


def test_a_hit_may_cost_more_than_1(limiter: RateLimiter, strategy: str) -> None:
    assert limiter.hit(LONG, "anna", cost=2)
    assert not limiter.hit(LONG, "anna", cost=2)
    left = 0 if strategy == "fixed-window" else 1  # a fixed window also counts refused hits
    assert remaining(limiter) == left
    assert limiter.hit(LONG, "anna") is bool(left)


def test_a_hit_that_costs_more_than_the_limit_is_refused(limiter: RateLimiter, strategy: str) -> None:
    assert not limiter.hit(LONG, "anna", cost=4)
    assert remaining(limiter) == (0 if strategy == "fixed-window" else 3)


@pytest.mark.parametrize("cost", [0, True, 10**30])
def test_an_unusual_cost_works_as_in_memory(storage: Storage, strategy: str, cost: int) -> None:
    def run(storage: Storage) -> list[object]:
        limiter = STRATEGIES[strategy](storage)
        first = limiter.hit(LONG, "anna", cost=cost)
        return [first, remaining(limiter), *hits(limiter, 4)]

    assert run(storage) == run(MemoryStorage())


@pytest.mark.parametrize("cost", ["1", None])
def test_a_cost_that_is_not_a_number_is_a_type_error_and_uses_no_budget(limiter: RateLimiter, cost: Any) -> None:
    with pytest.raises(TypeError):
        limiter.hit(LONG, "anna", cost=cost)
    assert hits(limiter, 4) == [True, True, True, False]


def test_a_limit_of_0_refuses_everything(limiter: RateLimiter) -> None:
    nothing = RateLimitItemPerYear(0)
    assert not limiter.test(nothing, "anna")
    assert hits(limiter, 2, nothing) == [False, False]


def test_clear_resets_one_identifier_only(limiter: RateLimiter) -> None:
    for who in ("anna", "ben"):
        assert hits(limiter, 4, who=who)[-1] is False
    limiter.clear(LONG, "anna")
    limiter.clear(LONG, "nobody")
    assert (remaining(limiter, who="anna"), remaining(limiter, who="ben")) == (3, 0)
    assert hits(limiter, 4) == [True, True, True, False]
    assert not limiter.hit(LONG, "ben")


def test_reset_clears_all_windows_and_returns_their_number(limiter: RateLimiter, storage: Storage) -> None:
    for who in ("anna", "ben"):
        hits(limiter, 4, who=who)
    assert storage.reset() == 2
    assert storage.reset() == 0
    for who in ("anna", "ben"):
        assert hits(limiter, 4, who=who) == [True, True, True, False]


def test_each_identifier_and_each_limit_has_its_own_budget(limiter: RateLimiter) -> None:
    who: list[tuple[str, ...]] = [
        (),
        ("anna",),
        ("anna", "page"),
        ("page", "anna"),
        ("ключ \N{GRINNING FACE}",),
        ("\0",),
        ("x" * 100_000,),
        ("::1", "/a/b"),
    ]
    limits = [LONG, RateLimitItemPerYear(2), RateLimitItemPerYear(3, 2), RateLimitItemPerYear(3, namespace="OTHER")]
    for _ in range(2):
        for identifiers in who:
            for limit in limits:
                assert limiter.hit(limit, *identifiers)
    for identifiers in who:
        for limit in limits:
            assert limiter.get_window_stats(limit, *identifiers).remaining == limit.amount - 2


def test_strategies_on_one_storage_have_separate_budgets(storage: Storage) -> None:
    for name in STRATEGIES:
        assert hits(STRATEGIES[name](storage), 4) == [True, True, True, False], name


def test_check_is_true_if_the_storage_answers(storage: Storage) -> None:
    assert storage.check() is True


def test_100_threads_have_one_budget(shared_manager: str, strategy: str) -> None:
    """The reference does not promise this."""
    storage = ManagerStorage(shared_manager, deadline=PATIENCE)
    storage.reset()
    admitted = at_once(100, lambda: STRATEGIES[strategy](storage).hit(RateLimitItemPerYear(30), "anna"))
    assert sorted(admitted) == [False] * 70 + [True] * 30


# Time


class Clock:
    """Replaces the module `time` where it is imported."""

    def __init__(self) -> None:
        self.now = BEGINNING

    def time(self) -> float:
        return self.now

    monotonic = time

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for module in ("limits.storage.memory", "limits.strategies", "counter_server.windows"):
            patch.setattr(f"{module}.time", self)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.install(monkeypatch)
    return clock


class NeverAgain(threading.Timer):
    """A timer that claims to be about to run, and never runs."""

    def is_alive(self) -> bool:
        return True


def reference() -> MemoryStorage:
    """Return the reference without its thread, so that its answers depend only on the times of the calls."""
    storage = MemoryStorage()
    storage.timer.cancel()
    storage.timer.join()
    storage.timer = NeverAgain(0, lambda: None)
    return storage


def over(windows: Windows) -> ManagerStorage:
    """Return a storage over these windows in this process."""
    storage = ManagerStorage("memory://")
    storage.storage = windows
    return storage


def held(windows: Windows) -> list[str]:
    """Return all keys of windows."""
    return sorted({*(windows.counts.keys(0, 1) or []), *(windows.events.keys(0, 1) or [])})


def test_a_window_ends_when_its_time_is_over(clock: Clock, strategy: str) -> None:
    clock.now -= clock.now % 60  # the beginning of a sliding window
    limiter = STRATEGIES[strategy](over(Windows()))
    limit = RateLimitItemPerMinute(3)
    assert hits(limiter, 4, limit) == [True, True, True, False]
    clock.now += 59.75
    assert hits(limiter, 1, limit) == [False]
    clock.now += 60 if strategy == "sliding-window-counter" else 0.5
    assert hits(limiter, 4, limit) == [True, True, True, False]


def test_expired_windows_are_removed_completely(clock: Clock, strategy: str) -> None:
    windows = Windows()
    limiter = STRATEGIES[strategy](over(windows))
    for number in range(100):
        assert hits(limiter, 4, RateLimitItemPerMinute(3), f"visitor {number}") == [True, True, True, False]
        limiter.test(RateLimitItemPerMinute(3), f"other {number}")
        limiter.get_window_stats(RateLimitItemPerMinute(3), f"other {number}")
        assert not limiter.hit(RateLimitItemPerMinute(3), f"greedy {number}", cost=4)
        limiter.hit(RateLimitItemPerMinute(3), f"free {number}", cost=0)
    assert len(held(windows)) >= 200
    clock.now += 130
    assert limiter.hit(LONG, "anna")
    (_the_last,) = held(windows)
    limiter.clear(LONG, "anna")
    assert held(windows) == []


def test_a_window_in_constant_use_does_not_grow(clock: Clock, strategy: str) -> None:
    """One client sends twice as many hits as the limit admits."""
    windows = Windows()
    limiter = STRATEGIES[strategy](over(windows))
    limit = RateLimitItemPerMinute(10)
    admitted = 0
    for _ in range(5_000):
        clock.now += 3
        admitted += limiter.hit(limit, "anna")
        assert sum(map(len, windows.events.find(limit.key_for("anna")))) <= 10
        assert len(held(windows)) <= 3
    assert admitted >= 2_000


def test_a_window_that_one_strategy_removes_is_kept_for_another(clock: Clock) -> None:
    """The key depends on the limit and the identifier, not on the strategy."""
    limit = RateLimitItemPerMinute(3)
    for first, second in (("fixed-window", "moving-window"), ("moving-window", "fixed-window")):
        windows = Windows()
        assert STRATEGIES[first](over(windows)).hit(limit, "anna")
        clock.now += 59
        assert hits(STRATEGIES[second](over(windows)), 3, limit) == [True, True, True]
        clock.now += 30
        assert STRATEGIES[first](over(windows)).hit(LONG, "ben")
        assert remaining(STRATEGIES[first](over(windows)), limit) == 3
        assert hits(STRATEGIES[second](over(windows)), 1, limit) == [False], f"{first} made {second} forget"


def test_windows_start_no_thread() -> None:
    before = threading.enumerate()
    windows = Windows()
    assert threading.enumerate() == before
    for _ in range(20):
        for strategy in STRATEGIES.values():
            limiter = strategy(over(windows))
            limiter.hit(LONG, "anna")
            limiter.test(LONG, "anna")
            limiter.get_window_stats(LONG, "anna")
            limiter.clear(LONG, "ben")
            assert threading.enumerate() == before
    windows.reset()
    assert threading.enumerate() == before


ITEMS = [RateLimitItemPerSecond(1), RateLimitItemPerMinute(3), RateLimitItemPerMinute(1)]
STEPS = st.tuples(
    # Exact fractions of a second, so that an edge is hit exactly.
    st.sampled_from([0.0, 0.0, 0.25, 0.75, 1.0, 1.0, 2.0, 29.0, 30.0, 31.0]),
    st.sampled_from(["hit", "hit", "hit", "hit", "hit", "test", "get_window_stats", "clear"]),
    st.sampled_from(sorted(STRATEGIES)),
    st.sampled_from(ITEMS),
    st.sampled_from(["anna", "ben"]),
    st.sampled_from([1, 1, 1, 2, 3, 0]),
)


def _steps(*steps: tuple[float, str, str]) -> list[tuple[float, str, str, RateLimitItem, str, int]]:
    return [(seconds, "hit", strategy, RateLimitItemPerMinute(1), who, 1) for seconds, strategy, who in steps]


# At the very edge of a window, and half a second before it.
@example(_steps((0.0, "moving-window", "anna"), (60.0, "moving-window", "anna")))
@example(_steps((0.0, "fixed-window", "anna"), (59.5, "fixed-window", "ben"), (0.0, "fixed-window", "anna")))
@settings(deadline=None, max_examples=300)
@given(st.lists(STEPS, min_size=50, max_size=50))
def test_windows_answer_like_the_reference_at_the_same_times(
    steps: list[tuple[float, str, str, RateLimitItem, str, int]],
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        clock.install(patch)
        windows = Windows()
        original, ours = reference(), over(windows)
        for number, (seconds, method, strategy, item, who, cost) in enumerate(steps):
            clock.now += seconds
            expected, answer = (
                _answer(STRATEGIES[strategy](storage), method, item, who, cost) for storage in (original, ours)
            )
            assert answer == expected, f"step {number}"
        clock.now += 3600
        windows.incr("the last", 1)
        assert held(windows) == ["the last"]


def _answer(limiter: RateLimiter, method: str, item: RateLimitItem, who: str, cost: int) -> object:
    if method in ("hit", "test"):
        return getattr(limiter, method)(item, who, cost=cost)
    answer = getattr(limiter, method)(item, who)
    if method == "get_window_stats" and answer.remaining == item.amount:
        return answer.remaining  # the end of an empty window is undefined
    return answer


# Several processes


def take(url: str, start: Any, results: Any) -> None:
    storage = ManagerStorage(url, deadline=PATIENCE)
    for strategy in STRATEGIES.values():
        limiter = strategy(storage)
        start.wait(PATIENCE)
        results.send(sum(limiter.hit(RateLimitItemPerYear(100), "anna") for _ in range(50)))


def test_4_processes_have_one_budget(on_demand: str) -> None:
    start = spawn.Barrier(4)
    clients = []
    for _ in range(4):
        reader, writer = spawn.Pipe(duplex=False)
        process = spawn.Process(target=take, args=(on_demand, start, writer))
        process.start()
        writer.close()  # only the child holds it: reading ends if the child dies
        clients.append((process, reader))
    admitted = []
    for process, reader in clients:
        with reader:
            admitted.append([reader.recv() for _ in STRATEGIES])
        process.join()
        process.close()
    totals = [sum(each) for each in zip(*admitted, strict=True)]
    assert dict(zip(STRATEGIES, totals, strict=True)) == dict.fromkeys(STRATEGIES, 100)


def test_after_a_fork_the_child_has_the_same_budget(shared_manager: str, strategy: str) -> None:
    storage = ManagerStorage(shared_manager, deadline=PATIENCE)
    storage.reset()
    limiter = STRATEGIES[strategy](storage)
    assert hits(limiter, 1) == [True]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, bytes(hits(limiter, 1)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert list(pipe.read()) == [True]
    os.waitpid(child, 0)
    assert hits(limiter, 2) == [True, False]


def test_storages_share_their_budgets_only_if_they_have_the_same_name(on_demand: str) -> None:
    storages = [ManagerStorage(on_demand, deadline=PATIENCE, name=name) for name in ("limits", "limits", "logins")]
    first, same, other = (STRATEGIES["fixed-window"](storage) for storage in storages)
    assert hits(first, 2) == [True, True]
    assert hits(same, 2) == [True, False]
    assert hits(other, 4) == [True, True, True, False]


# A manager that is killed or missing


def test_windows_lost_with_the_manager_restart_without_an_error(on_demand: str, data_dir: Path) -> None:
    storage = ManagerStorage(on_demand, deadline=PATIENCE)
    limiters = [strategy(storage) for strategy in STRATEGIES.values()]
    for limiter in limiters:
        assert hits(limiter, 4) == [True, True, True, False]
    end_manager(data_dir / "manager.lock")
    assert [remaining(limiter) for limiter in limiters] == [3, 3, 3]
    for limiter in limiters:
        assert hits(limiter, 4) == [True, True, True, False]


CALLS: dict[str, tuple[Any, ...]] = {
    "incr": ("key", 60),
    "get": ("key",),
    "get_expiry": ("key",),
    "reset": (),
    "clear": ("key",),
    "acquire_entry": ("key", 3, 60),
    "get_moving_window": ("key", 3, 60),
    "acquire_sliding_window_entry": ("key", 3, 60),
    "get_sliding_window": ("key", 60),
    "clear_sliding_window": ("key", 60),
}


def test_every_method_works_as_the_first_call_after_a_loss(on_demand: str, data_dir: Path) -> None:
    storages = {method: ManagerStorage(on_demand, deadline=PATIENCE) for method in [*CALLS, "check"]}
    for storage in storages.values():
        storage.incr("key", 60)
    end_manager(data_dir / "manager.lock")
    assert storages["check"].check() is True
    for method, arguments in CALLS.items():
        getattr(storages[method], method)(*arguments)


def test_busy_clients_see_no_error_when_the_manager_is_killed(on_demand: str, data_dir: Path) -> None:
    admitted: list[bool] = []
    done = threading.Event()

    def work() -> None:
        limiter = STRATEGIES["moving-window"](ManagerStorage(on_demand, deadline=PATIENCE))
        while not done.is_set():
            admitted.append(limiter.hit(RateLimitItemPerYear(100), "anna"))

    def kill() -> None:
        try:
            for _ in range(2):
                so_far = len(admitted)
                eventually(lambda: len(admitted) > so_far + 150, "progress")
                before = holder(data_dir)
                end_manager(data_dir / "manager.lock")
                eventually(lambda: holder(data_dir) not in (None, before), "another manager")
            so_far = len(admitted)
            eventually(lambda: len(admitted) > so_far + 150, "progress")
        finally:
            done.set()

    jobs = iter([kill, work, work, work, work])
    at_once(5, lambda: next(jobs)())
    assert sum(admitted) == 300  # the whole limit in each of three managers


@pytest.fixture
def nowhere(data_dir: Path) -> Iterator[str]:
    """Return the URL of a directory that managers refuse, as everybody may write to it."""
    data_dir.mkdir()
    data_dir.chmod(0o777)
    yield DataDirectory(data_dir).url
    end_manager(data_dir / "manager.lock")


@pytest.mark.parametrize("method", CALLS)
def test_a_manager_that_cannot_be_started_is_an_error(nowhere: str, method: str) -> None:
    with pytest.raises(StartupError, match="can be written by others"):
        getattr(ManagerStorage(nowhere), method)(*CALLS[method])
    wrapping = storage_from_string(nowhere, wrap_exceptions=True)
    with pytest.raises(StorageError) as error:
        getattr(wrapping, method)(*CALLS[method])
    assert isinstance(error.value.storage_error, StartupError)


@pytest.mark.parametrize("wrap", [False, True])
def test_check_is_false_if_the_storage_cannot_be_reached(
    nowhere: str,
    caplog: pytest.LogCaptureFixture,
    wrap: bool,  # noqa: FBT001
) -> None:
    assert ManagerStorage(nowhere, wrap_exceptions=wrap).check() is False
    assert "can be written by others" in caplog.text


def test_a_manager_that_does_not_answer_is_an_error_within_the_deadline(on_demand: str, data_dir: Path) -> None:
    storage = ManagerStorage(on_demand, deadline=PATIENCE)
    hasty = ManagerStorage(on_demand, deadline=0.1)
    wrapping = ManagerStorage(on_demand, wrap_exceptions=True, deadline=0.1)
    assert storage.incr("key", 60) == 1
    manager = holder(data_dir)
    assert manager is not None
    with frozen(manager):
        with pytest.raises(DeadlineExceeded):
            hasty.get("key")
        with pytest.raises(StorageError):
            wrapping.get("key")
        assert hasty.check() is False
    assert storage.get("key") == 1


def test_no_manager_is_started_if_the_option_forbids_it(on_demand: str, data_dir: Path) -> None:
    storage = ManagerStorage(on_demand, deadline=0.1, options=StoreOptions(start=False))
    assert storage.check() is False
    assert not data_dir.exists()
    assert ManagerStorage(on_demand, deadline=PATIENCE).check() is True


def test_a_manager_started_without_limits_names_the_objects_it_hosts(on_demand: str) -> None:
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=PATIENCE)
    shared = SharedState(app)
    obj = shared.object("obj", SomeObj, 0)
    with app.app_context():
        assert obj.query() == 1
    with pytest.raises(NotHosted, match=r"hosts obj = tests\.hosted_classes\.SomeObj"):
        ManagerStorage(on_demand, deadline=PATIENCE).incr("key", 60)


# Construction


def test_the_scheme_is_registered_and_memory_is_not_replaced() -> None:
    assert type(storage_from_string("manager:///somewhere")) is ManagerStorage
    assert type(storage_from_string("memory://")) is MemoryStorage


def test_the_storage_supports_everything_that_the_memory_storage_does() -> None:
    storage = ManagerStorage("memory://")
    for kind in MemoryStorage.__mro__[1:]:
        assert isinstance(storage, kind)
    assert storage.storage is not None


@pytest.mark.parametrize(
    "url", ["manager://host/data", "manager://localhost:1/data", "manager:/data", "manager:///data?x=1", "nonsense://"]
)
def test_an_invalid_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest):
        ManagerStorage(url)


@pytest.mark.parametrize("url", ["redis://localhost", "memcached://localhost"])
def test_a_store_without_shared_objects_is_refused_at_once(url: str) -> None:
    with pytest.raises(Unsupported, match="hosts no shared objects"):
        ManagerStorage(url)


def test_an_app_with_an_invalid_url_is_refused_at_once() -> None:
    with pytest.raises(InvalidRequest, match="three slashes"):
        Limiter(get_remote_address, app=Flask(__name__), storage_uri="manager://host/data")


@pytest.mark.parametrize("options", [{"deadlin": 1}, {"password": "secret"}], ids=str)
def test_an_unknown_option_is_refused_at_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        storage_from_string("manager:///data", **options)
    app = Flask(__name__)
    app.config["RATELIMIT_STORAGE_OPTIONS"] = options
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        Limiter(get_remote_address, app=app, storage_uri="manager:///data")


@pytest.mark.parametrize("options", [{"deadline": 0}, {"deadline": "soon"}, {"name": ""}, {"name": 7}], ids=str)
def test_an_invalid_option_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        storage_from_string("manager:///data", **options)


def test_without_limits_the_error_names_the_extra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['limits'] = None\nimport counter_server.limiting"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: a limit's storage needs limits: pip install 'counter-server[limits]'\n")


# Flask-Limiter


def limited(storage_uri: str, **options: Any) -> tuple[Flask, Limiter]:
    app = Flask("limited")
    app.testing = True  # so that errors are raised
    app.config["RATELIMIT_STORAGE_OPTIONS"] = {"deadline": PATIENCE}
    limiter = Limiter(get_remote_address, app=app, storage_uri=storage_uri, default_limits=["3 per year"], **options)
    app.add_url_rule("/", view_func=lambda: "here", endpoint="home")
    return app, limiter


def statuses(app: Flask, times: int) -> list[int]:
    client = app.test_client()
    return [client.get("/").status_code for _ in range(times)]


def test_a_view_sends_the_remaining_hits_in_headers(shared_manager: str, strategy: str) -> None:
    app, limiter = limited(shared_manager, strategy=strategy, headers_enabled=True)
    limiter.reset()
    client = app.test_client()
    answers = [client.get("/") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["X-RateLimit-Remaining"] for answer in answers] == ["2", "1", "0", "0"]
    assert int(answers[-1].headers["Retry-After"]) >= 0
    limiter.reset()
    assert statuses(app, 1) == [200]


def test_a_view_keeps_working_after_the_manager_was_killed(on_demand: str, data_dir: Path) -> None:
    app, _ = limited(on_demand)
    assert statuses(app, 4) == [200, 200, 200, 429]
    end_manager(data_dir / "manager.lock")
    assert statuses(app, 4) == [200, 200, 200, 429]


def test_without_a_manager_a_request_fails(nowhere: str) -> None:
    app, _ = limited(nowhere)
    with pytest.raises(CounterServerError):
        statuses(app, 1)


def test_without_a_manager_all_requests_are_admitted_if_errors_are_swallowed(nowhere: str) -> None:
    app, _ = limited(nowhere, swallow_errors=True)
    assert statuses(app, 5) == [200] * 5


def test_without_a_manager_the_fallback_limit_applies_until_one_starts(nowhere: str, data_dir: Path) -> None:
    app, _ = limited(nowhere, in_memory_fallback=["1 per year"])
    assert statuses(app, 3) == [200, 429, 429]
    data_dir.chmod(0o700)
    eventually(
        lambda: statuses(app, 1) == [200], "the return to the manager"
    )  # Flask-Limiter checks again after a second
    assert statuses(app, 3) == [200, 200, 429]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("config", "ManagerStorage"),
        ("limits", "3 per 1 year"),
        ("limits --key 127.0.0.1", "Fail (0 out of 3 remaining)"),
        ("limits --endpoint home --key 127.0.0.1", "Fail (0 out of 3 remaining)"),
        ("limits --path / --key 127.0.0.1", "Fail (0 out of 3 remaining)"),
        ("clear --key 127.0.0.1 -y", "Cleared"),
    ],
)
def test_every_command_of_flask_limiter_works(shared_manager: str, strategy: str, command: str, says: str) -> None:
    app, limiter = limited(shared_manager, strategy=strategy)
    limiter.reset()
    assert statuses(app, 4) == [200, 200, 200, 429]
    done = app.test_cli_runner().invoke(flask_limiter_command, command.split(), catch_exceptions=False)
    assert done.exit_code == 0
    assert says in done.output
    assert statuses(app, 1) == [200 if "clear" in command else 429]


APP = """
import counter_server.limiting
from flask import Flask
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from counter_server import SharedState

class SomeObj:
    def __init__(self, param):
        self.param = param
    def query(self):
        self.param += 1
        return self.param

app = Flask(__name__)
app.config.from_prefixed_env("APP")
app.config["COUNTER_SERVER_STORE"] = app.config["RATELIMIT_STORAGE_URI"]
shared = SharedState(app)
global_obj = shared.object("global_obj", SomeObj, 0)
limiter = Limiter(get_remote_address, app=app, default_limits=["30 per year"])

@app.get("/")
def home():
    return {"value": global_obj.query()}
"""


def knock(url: str) -> tuple[int, bytes]:
    """Return the response to a new client."""
    parts = urlsplit(url)
    client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE)
    try:
        client.request("GET", "/")
        response = client.getresponse()
        return response.status, response.read()
    finally:
        client.close()


def test_of_100_simultaneous_clients_of_4_workers_exactly_the_limit_is_admitted(
    on_demand: str, tmp_path: Path, stack: ExitStack, strategy: str
) -> None:
    (tmp_path / "app.py").write_text(APP)
    program = stack.enter_context(
        Program(
            *("-m", "gunicorn", "-w", "4", "-b", "127.0.0.1:0", "app:app"),
            cwd=tmp_path,
            environment={
                "PYTHONPATH": str(ROOT),
                "APP_RATELIMIT_STORAGE_URI": on_demand,
                "APP_RATELIMIT_STORAGE_OPTIONS": json.dumps({"deadline": PATIENCE}),
                "APP_COUNTER_SERVER_DEADLINE": json.dumps(PATIENCE),
                "APP_RATELIMIT_STRATEGY": strategy,
            },
        )
    )
    eventually(lambda: listening_port(program.pid), "gunicorn listens")
    url = f"http://127.0.0.1:{listening_port(program.pid)}"
    answers = at_once(100, lambda: knock(url))
    assert sorted(status for status, _ in answers) == [200] * 30 + [429] * 70, program.errors
    assert sorted(json.loads(body)["value"] for status, body in answers if status == 200) == list(range(1, 31))
    program.stop()
