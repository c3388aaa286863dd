"""The shared storage follows the contract of limits, whose memory storage is the reference."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from flask import Flask
from flask_limiter import Limiter
from flask_limiter.commands import cli as flask_limiter_command
from flask_limiter.util import get_remote_address
from hypothesis import example, given, settings
from hypothesis import strategies as st
from limits import RateLimitItem, RateLimitItemPerMinute, RateLimitItemPerSecond, RateLimitItemPerYear
from limits.errors import StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import STRATEGIES, RateLimiter

from counter_server import StoreOptions
from counter_server.errors import DeadlineExceeded, InvalidRequest, Unsupported
from counter_server.limiting import ManagerStorage
from counter_server.manager.directory import DataDirectory
from counter_server.windows import Windows
from tests.launchers import SYNC, Browser, launch
from tests.load import at_once
from tests.processes import PATIENCE, end_manager

LONG = RateLimitItemPerYear(3)  # none of its windows ends while a test runs
MINUTE = RateLimitItemPerMinute(3)
ADMITTED = [True, True, True, False]  # of four hits, with one of these limits


@pytest.fixture(scope="module")
def shared_manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a manager that hosts storages of two names."""
    data_dir = tmp_path_factory.mktemp("limits") / "data"
    url = DataDirectory(data_dir).url
    storages = [ManagerStorage(url, name=name, deadline=PATIENCE) for name in ("limits", "logins")]
    storages[0].reset()  # starts it; its open connection keeps it running
    yield url
    end_manager(data_dir / "manager.lock")


@pytest.fixture
def empty(shared_manager: str) -> str:
    """Return the URL of this manager without windows."""
    ManagerStorage(shared_manager, deadline=PATIENCE).reset()
    return shared_manager


@pytest.fixture(params=["MemoryStorage", "memory", "manager"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """Return an empty storage: the reference, or ours in this process or in a manager."""
    if request.param == "MemoryStorage":
        return MemoryStorage()
    url = "memory://" if request.param == "memory" else request.getfixturevalue("empty")
    return ManagerStorage(url, deadline=PATIENCE)


each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(params=STRATEGIES)
def limiter(request: pytest.FixtureRequest, storage: Storage) -> RateLimiter:
    return STRATEGIES[request.param](storage)


def hits(limiter: RateLimiter, times: int = 4, limit: RateLimitItem = LONG, who: str = "anna") -> list[bool]:
    return [limiter.hit(limit, who) for _ in range(times)]


def remaining(limiter: RateLimiter, limit: RateLimitItem = LONG, who: str = "anna") -> int:
    return limiter.get_window_stats(limit, who).remaining


def test_hits_up_to_the_limit_are_admitted(limiter: RateLimiter, storage: Storage) -> None:
    """`test` predicts it, and the stats report it, without using the budget."""
    before = time.time()
    for left in (3, 2, 1, 0, 0):
        for cost in (1, 2, 3, 4):
            assert limiter.test(LONG, "anna", cost=cost) is (cost <= left)
        stats = limiter.get_window_stats(LONG, "anna")
        assert stats.remaining == left
        if left < 3:
            # A sliding window begins by the calendar, the others with the first hit.
            length = 0 if isinstance(limiter, STRATEGIES["sliding-window-counter"]) else LONG.get_expiry()
            assert before + length <= stats.reset_time <= time.time() + LONG.get_expiry()
        assert limiter.hit(LONG, "anna") is (left > 0)
    nothing = RateLimitItemPerYear(0)
    assert [limiter.test(nothing, "anna"), *hits(limiter, 2, nothing)] == [False] * 3
    assert [(storage.reset() or 0) > 0, storage.reset(), storage.check()] == [True, 0, True]
    assert hits(limiter) == ADMITTED


@each_strategy
def test_100_threads_have_one_budget(empty: str, strategy: str) -> None:
    """The reference does not promise this."""
    limiter = STRATEGIES[strategy](ManagerStorage(empty, deadline=PATIENCE))
    admitted = at_once(100, lambda: limiter.hit(RateLimitItemPerYear(30), "anna"))
    assert sorted(admitted) == [False] * 70 + [True] * 30


class Clock:
    """Replaces the module `time` where it is imported."""

    now = 1_700_000_000.0

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


def reference() -> MemoryStorage:
    """Return the reference without its thread, so that its answers depend only on the times of the calls."""
    storage = MemoryStorage()
    storage.timer.cancel()
    storage.timer.join()
    storage.timer = create_autospec(threading.Timer, instance=True)  # whose `is_alive` is true
    return storage


def over(windows: Windows) -> ManagerStorage:
    """Return a storage over these windows in this process."""
    storage = ManagerStorage("memory://")
    storage.storage = windows
    return storage


def held(windows: Windows) -> list[str]:
    """Return all keys of windows."""
    return sorted({*(windows.counts.keys(0, 1) or []), *(windows.events.keys(0, 1) or [])})


@each_strategy
def test_expired_windows_are_removed_completely(clock: Clock, strategy: str) -> None:
    clock.now -= clock.now % 60  # the beginning of a sliding window
    windows = Windows()
    limiter = STRATEGIES[strategy](over(windows))
    threads = threading.enumerate()
    for number in range(100):
        assert hits(limiter, 4, MINUTE, f"visitor {number}") == ADMITTED
        limiter.test(MINUTE, f"other {number}")
        limiter.get_window_stats(MINUTE, f"other {number}")
        assert not limiter.hit(MINUTE, f"greedy {number}", cost=4)
        limiter.hit(MINUTE, f"free {number}", cost=0)
    assert len(held(windows)) >= 200
    clock.now += 59.75
    assert hits(limiter, 1, MINUTE, "visitor 0") == [False]
    clock.now += 60 if strategy == "sliding-window-counter" else 0.5
    assert hits(limiter, 4, MINUTE, "visitor 0") == ADMITTED
    clock.now += 130
    assert limiter.hit(LONG, "anna")
    assert len(held(windows)) == 1
    limiter.clear(LONG, "anna")
    assert held(windows) == []
    assert threading.enumerate() == threads  # the reference starts one


@each_strategy
def test_a_window_in_constant_use_does_not_grow(clock: Clock, strategy: str) -> None:
    """One client sends twice as many hits as the limit admits."""
    windows = Windows()
    limiter = STRATEGIES[strategy](over(windows))
    limit = RateLimitItemPerMinute(10)
    admitted = 0
    for _ in range(500):
        clock.now += 3
        admitted += limiter.hit(limit, "anna")
        assert sum(map(len, windows.events.find(limit.key_for("anna")))) <= 10
        assert len(held(windows)) <= 3
    assert admitted >= 200


Step = tuple[float, str, str, RateLimitItem, str, int]
STEPS = st.tuples(
    # Exact fractions of a second, so that an edge is hit exactly.
    st.sampled_from([0.0, 0.0, 0.25, 0.75, 1.0, 1.0, 2.0, 29.0, 30.0, 31.0]),
    st.sampled_from(["hit", "hit", "hit", "hit", "hit", "test", "get_window_stats", "clear"]),
    st.sampled_from(sorted(STRATEGIES)),
    st.sampled_from([RateLimitItemPerSecond(1), MINUTE, RateLimitItemPerMinute(1)]),
    st.sampled_from(["anna", "ben"]),
    st.sampled_from([1, 1, 1, 2, 3, 0, 10**30]),
)


def _hits(*steps: tuple[float, str, str], then: str = "hit") -> list[Step]:
    hits = [(seconds, "hit", strategy, RateLimitItemPerMinute(1), who, 1) for seconds, strategy, who in steps]
    return [*hits, (60.0, then, *hits[-1][2:])]


def _both(one: str, other: str) -> list[Step]:
    return [
        *_hits((0.0, one, "anna"), (59.0, other, "anna"), (30.0, one, "ben"))[:3],
        (0.0, "hit", other, RateLimitItemPerMinute(1), "anna", 1),
    ]


@pytest.mark.parametrize("examples", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_windows_answer_like_the_reference_at_the_same_times(examples: int) -> None:
    # At the very edge of a window, and half a second before it.
    @example(_hits((0.0, "moving-window", "anna")))
    @example(_hits((0.0, "moving-window", "anna"), then="get_window_stats"))
    @example(_hits((0.0, "fixed-window", "anna"), (59.5, "fixed-window", "ben"), (0.0, "fixed-window", "anna")))
    # The windows of two strategies have one key: removing one keeps the other.
    @example(_both("fixed-window", "moving-window"))
    @example(_both("moving-window", "fixed-window"))
    @settings(max_examples=examples)
    @given(st.lists(STEPS, min_size=50, max_size=50))
    def compare(steps: list[Step]) -> None:
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

    compare()


def _answer(limiter: RateLimiter, method: str, item: RateLimitItem, who: str, cost: int) -> object:
    if method in ("hit", "test"):
        return getattr(limiter, method)(item, who, cost=cost)
    answer = getattr(limiter, method)(item, who)
    if method == "get_window_stats" and answer.remaining == item.amount:
        return answer.remaining  # the end of an empty window is undefined
    return answer


def test_storages_of_one_name_share_their_budgets_and_no_others(empty: str) -> None:
    storages = [ManagerStorage(empty, deadline=PATIENCE, name=name) for name in ("limits", "limits", "logins")]
    first, same, other = (STRATEGIES["fixed-window"](storage) for storage in storages)
    assert (hits(first, 2), hits(same, 2), hits(other)) == ([True, True], [True, False], ADMITTED)


CALLS: dict[str, tuple[Any, ...]] = {
    "reset": (),
    "incr": ("key", 60),
    "get": ("key",),
    "get_expiry": ("key",),
    "clear": ("key",),
    "acquire_entry": ("key", 3, 60),
    "get_moving_window": ("key", 3, 60),
    "acquire_sliding_window_entry": ("key", 3, 60),
    "get_sliding_window": ("key", 60),
    "clear_sliding_window": ("key", 60),
}


@pytest.mark.slow
def test_after_a_kill_every_method_works_and_the_windows_restart(on_demand: str, data_dir: Path) -> None:
    storages = {method: ManagerStorage(on_demand, deadline=PATIENCE) for method in [*CALLS, "check", "limits"]}
    limiters = [strategy(storages["limits"]) for strategy in STRATEGIES.values()]
    for storage in storages.values():
        storage.incr("key", 60)
    assert [hits(limiter) for limiter in limiters] == [ADMITTED] * 3
    end_manager(data_dir / "manager.lock")
    assert [remaining(limiter) for limiter in limiters] == [3, 3, 3]
    assert [hits(limiter) for limiter in limiters] == [ADMITTED] * 3
    assert storages["check"].check() is True
    for method, arguments in CALLS.items():
        getattr(storages[method], method)(*arguments)


def test_a_missing_manager_is_an_error(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = DataDirectory(data_dir).url
    options: dict[str, Any] = {"deadline": 0.05, "options": StoreOptions(start=False)}
    ours, wrapping = ManagerStorage(url, **options), ManagerStorage(url, wrap_exceptions=True, **options)
    for method, arguments in CALLS.items():
        with pytest.raises(DeadlineExceeded):
            getattr(ours, method)(*arguments)
        with pytest.raises(StorageError) as error:
            getattr(wrapping, method)(*arguments)
        assert isinstance(error.value.storage_error, DeadlineExceeded)
    assert caplog.text == ""
    for storage in (ours, wrapping):
        assert storage.check() is False
        assert "no manager is running" in caplog.text
        caplog.clear()
    assert not data_dir.exists()


def test_the_scheme_is_registered_and_memory_is_not_replaced() -> None:
    assert type(storage_from_string("manager:///somewhere")) is ManagerStorage
    assert type(storage_from_string("memory://")) is MemoryStorage
    storage = ManagerStorage("memory://")
    for kind in MemoryStorage.__mro__[1:]:
        assert isinstance(storage, kind)
    assert storage.storage is not None


@pytest.mark.parametrize(
    ("url", "options", "error", "says"),
    [
        ("manager://host/data", {}, InvalidRequest, "three slashes"),
        ("sqlite:////nowhere/counters.db", {}, Unsupported, "hosts no shared objects"),
        ("manager:///data", {"password": "secret"}, TypeError, "unexpected keyword argument 'password'"),
        ("manager:///data", {"deadline": 0}, InvalidRequest, "deadline"),
        ("manager:///data", {"name": ""}, InvalidRequest, "name"),
    ],
)
def test_an_invalid_option_is_refused_at_once(
    url: str, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ManagerStorage(url, **options)
    app = Flask(__name__)
    app.config["RATELIMIT_STORAGE_OPTIONS"] = options
    if url.startswith("manager"):  # the only scheme that reaches this storage by its URL
        with pytest.raises(error, match=says):
            Limiter(get_remote_address, app=app, storage_uri=url)


@each_strategy
def test_the_commands_of_flask_limiter_work(empty: str, strategy: str) -> None:
    app = Flask("limited")
    app.config["RATELIMIT_STORAGE_OPTIONS"] = {"deadline": PATIENCE}
    Limiter(get_remote_address, app=app, storage_uri=empty, default_limits=["3 per year"], strategy=strategy)
    app.add_url_rule("/", view_func=lambda: "here")
    client = app.test_client()
    assert [client.get("/").status_code for _ in range(4)] == [200, 200, 200, 429]
    for command, output in {
        "config": "ManagerStorage",
        "limits --key 127.0.0.1": "Fail (0 out of 3 remaining)",
        "clear --key 127.0.0.1 -y": "Cleared",
    }.items():
        assert client.get("/").status_code == 429
        done = app.test_cli_runner().invoke(flask_limiter_command, command.split(), catch_exceptions=False)
        assert done.exit_code == 0
        assert output in done.output
    assert client.get("/").status_code == 200


APP = """
import counter_server.limiting
from flask import Flask
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from counter_server import SharedState
from tests.hosted_classes import SomeObj

app = Flask(__name__)
app.config.update(COUNTER_SERVER_STORE={url!r}, COUNTER_SERVER_DEADLINE=30)
app.config.update(RATELIMIT_STORAGE_URI={url!r}, RATELIMIT_STORAGE_OPTIONS=dict(deadline=30))
shared = SharedState(app)
obj = shared.object("obj", SomeObj, 0)
limiter = Limiter(get_remote_address, app=app, default_limits=["30 per year"], strategy="moving-window")

@app.get("/")
def home():
    return dict(value=obj.query())
"""


@pytest.mark.slow
def test_of_100_simultaneous_clients_of_4_workers_exactly_the_limit_is_admitted(
    on_demand: str, tmp_path: Path, stack: ExitStack
) -> None:
    (tmp_path / "app.py").write_text(APP.format(url=on_demand))
    program, url = launch(stack, SYNC, tmp_path)
    answers = at_once(100, lambda: Browser(url).visit())
    assert sorted(answer.status for answer in answers) == [200] * 30 + [429] * 70, program.errors
    assert sorted(answer.content["value"] for answer in answers if answer.status == 200) == list(range(1, 31))
