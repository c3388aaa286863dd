"""The shared cache follows the contract of cachelib, whose simple cache is the reference."""

import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import partial
from itertools import chain, pairwise, repeat
from operator import ge
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, patch

import pytest
from cachelib import BaseCache, FileSystemCache, SimpleCache
from cachelib.serializers import BaseRedisSerializer, JSONSerializer
from flask import Flask, session
from flask_caching import Cache
from flask_session import Session  # type: ignore[import-untyped]

from counter_server import CounterServerError, SharedState, StoreOptions, open_state
from counter_server.caching import ManagerCache
from counter_server.dicts import BoundedDict
from counter_server.errors import DeadlineExceeded, InvalidRequest, StateLost, Unsupported
from counter_server.manager.directory import DataDirectory
from counter_server.operations import LARGEST_VALUE
from tests.hosted_classes import SomeObj
from tests.load import at_once, spawn
from tests.processes import PATIENCE, end_manager, eventually, holder
from tests.test_dicts import Clock

Make = Callable[..., BaseCache]
Open = Callable[..., ManagerCache]


@pytest.fixture(scope="module")
def shared_manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a manager for all tests that do not disturb it. It hosts caches of these names."""
    data_dir = tmp_path_factory.mktemp("caches") / "data"
    url = DataDirectory(data_dir).url
    sizes = {"cache": 10_000, "flask-caching": 500, "one": 10, "other": 20, "small": 3}
    caches = [ManagerCache(url, name, threshold=size, deadline=PATIENCE) for name, size in sizes.items()]
    caches[0].clear()  # starts it; its open connection keeps it running
    yield url
    caches[0].close()
    end_manager(data_dir / "manager.lock")


@pytest.fixture(params=["SimpleCache", "memory", "manager"])
def make(request: pytest.FixtureRequest, stack: ExitStack) -> Make:
    """Return a function that makes empty caches: the reference, and ours in this process and in a manager."""
    if request.param == "SimpleCache":
        return SimpleCache
    url = "memory://" if request.param == "memory" else request.getfixturevalue("shared_manager")
    state = stack.enter_context(open_state(url, deadline=PATIENCE))
    ManagerCache(state).clear()
    return lambda **options: ManagerCache(state, **options)


without_the_reference = pytest.mark.parametrize("make", ["memory", "manager"], indirect=True)


@pytest.fixture
def cache(make: Make) -> BaseCache:
    return make()


@pytest.fixture
def opened(stack: ExitStack) -> Open:
    """Return a function that opens our cache at a URL until the test ends."""

    def opened(url: str, *arguments: Any, **options: Any) -> ManagerCache:
        cache = ManagerCache(url, *arguments, **{"deadline": PATIENCE, **options})
        stack.callback(cache.close)
        return cache

    return opened


@dataclass
class Point:
    """A class whose instances only pickle can encode."""

    x: int
    y: "Point | None" = None


class Key(StrEnum):
    """A subclass of `str`."""

    ONE = "one"


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 2**64, -(2**200), 10**1000, 0.0, -0.0, 1.5, float("inf"), float("nan"), 1j),
    *("", "text", "ключ \N{GRINNING FACE}", b"", b"\x00\xff", [], [1, [2, (3, {"a": {4}})]], (1, (2,))),
    *({1: 2, None: 3, "a": b"x"}, frozenset({1}), timedelta(days=1), Point(1, Point(2))),
]
KEYS: list[Any] = ["", "key", "a b/c?d=é&f", "\N{GRINNING FACE}" * 1000, "\x00", 1, ("a", 1), b"bytes"]


# The contract of cachelib


def test_a_value_is_returned_unchanged(cache: BaseCache) -> None:
    for value in VALUES:
        assert cache.set("key", value) is True
        for back in (cache.get("key"), *cache.get_many("key"), *cache.get_dict("key").values()):
            assert (type(back), repr(back)) == (type(value), repr(value))
        assert cache.has("key") is True
        assert cache.add("key", "other") is False
        assert repr(cache.get("key")) == repr(value)
        assert cache.delete("key") is True
        assert cache.has("key") is False
    mutable = {"list": [1]}
    cache.set("key", mutable)
    mutable["list"].append(2)
    cache.get("key")["list"].append(3)
    assert cache.get("key") == {"list": [1]}


def test_a_missing_key_is_none_and_only_add_sets_it(cache: BaseCache) -> None:
    assert cache.get("missing") is None
    assert (cache.has("missing"), cache.delete("missing")) == (False, False)
    assert (cache.get_many(), cache.get_dict(), cache.set_many({}), cache.delete_many()) == ([], {}, [], [])
    assert cache.clear() is True
    assert [cache.add("key", 1), cache.add("key", 2), cache.get("key")] == [True, False, 1]
    assert [cache.delete("key"), cache.add("key", 3), cache.get("key")] == [True, True, 3]


def test_a_key_may_be_any_plain_data(cache: BaseCache) -> None:
    for key in KEYS:
        assert cache.add(key, "value") is True
        assert cache.get(key) == "value"
        assert cache.get_dict(key, "other") == {key: "value", "other": None}
        assert cache.delete(key) is True
        assert cache.inc(key) == 1
        assert cache.has(key) is True
    assert cache.set(Key.ONE, "value") is True
    assert cache.get("one") == cache.get(Key.ONE) == "value"
    assert cache.get_dict(Key.ONE) == {"one": "value"}
    assert (cache.has(Key.ONE), cache.add(Key.ONE, "other"), cache.delete(Key.ONE)) == (True, False, True)
    assert (cache.inc(Key.ONE), cache.dec("one")) == (1, 0)


def test_many_keys_are_set_read_deleted_and_cleared(make: Make) -> None:
    for ignore in (True, False):
        cache = make(ignore_delete_many_errors=ignore)
        assert cache.ignore_delete_many_errors is ignore
        assert cache.set_many({"a": 1, "b": [2], "c": None}) == ["a", "b", "c"]
        assert cache.get_many("c", "b", "missing", "a", "a") == [None, [2], None, 1, 1]
        assert list(cache.get_dict("b", "missing", "a").items()) == [("b", [2]), ("missing", None), ("a", 1)]
        assert cache.delete_many("a", "missing", "c") == ["a", "missing", "c"]
        assert cache.get_many("a", "b", "c") == [None, [2], None]
        assert cache.clear() is True
        assert [cache.has("b"), cache.add("b", "new")] == [False, True]


def test_inc_and_dec_return_the_new_number_and_start_at_0(cache: BaseCache) -> None:
    ups: list[tuple[int, ...]] = [(), (), (5,), (-3,), (0,)]
    assert [cache.inc("up", *by) for by in ups] == [1, 2, 7, 4, 4]
    assert [cache.dec("down", *by) for by in ups] == [-1, -2, -7, -4, -4]
    assert (cache.inc("zero", 0), cache.has("zero")) == (0, True)
    cache.set_many({"int": 2**64, "float": 0.5})
    assert cache.inc("int", 2**70) == 2**64 + 2**70
    assert cache.dec("int", 2**64 + 2**70) == 0
    assert cache.dec("float", 1) == -0.5
    assert cache.inc("float", 0.25) == -0.25  # type: ignore[arg-type]
    assert cache.get_many("up", "down", "int", "float") == [4, -4, 0, -0.25]


def test_inc_and_dec_of_other_values_change_nothing(cache: BaseCache) -> None:
    values = ["text", "7", b"bytes", [1], {"a": 1}, (1,), Point(1)]
    if isinstance(cache, ManagerCache):  # the reference counts false values as 0, and True as 1
        values += [None, True, False, "", b"", 0j]
    for value in values:
        cache.set("key", value)
        for change in (cache.inc, cache.dec):
            with pytest.raises(TypeError):
                change("key")
        assert repr(cache.get("key")) == repr(value)


def clocked(cache: ManagerCache, entries: int = 100) -> Clock:
    """Replace the hosted object of a cache by one with the test's clock."""
    clock = Clock()
    cache._entries = BoundedDict(entries, clock)
    return clock


@pytest.mark.parametrize("make", ["SimpleCache", "memory"], indirect=True)
def test_a_timeout_is_seconds_or_a_timedelta_rounded_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(default_timeout=1)
    clock = clocked(cache) if isinstance(cache, ManagerCache) else Clock()
    monkeypatch.setattr("cachelib.simple.time", clock)
    brief: dict[str, Any] = {"by default": None, "1": 1, "1 s": timedelta(seconds=1), "up": timedelta(milliseconds=1)}
    long: dict[str, Any] = {"0": 0, "0 s": timedelta(0), "long": 10**9, "days": timedelta(days=400)}
    for key, timeout in {**brief, **long}.items():
        cache.set(key, key, timeout)
        cache.add(f"added, {key}", key, timeout)
    cache.set_many({"many": 1}, timeout=1)
    cache.set_many({"many kept": 1}, timeout=0)
    cache.inc("increased")
    for second, alive in ((0.999, True), (1, False)):
        clock.now = second
        for key in (*brief, *(f"added, {key}" for key in brief), "many", "increased"):
            assert (cache.has(key), cache.get(key) is not None) == (alive, alive)
    clock.now = 86400
    assert cache.get_many(*long, *(f"added, {key}" for key in long), "many kept") == [*long, *long, 1]
    assert [cache.add("1", "again", 0), cache.inc("increased")] == [True, 1]


def test_an_entry_with_a_negative_timeout_expires_at_once(make: Make) -> None:
    timeout = timedelta(seconds=-1)
    cache, expired = make(), make(default_timeout=-1)
    assert [cache.set("set", 1, -1), cache.add("added", 1, timeout), cache.set_many({"many": 1}, -1)] == [
        *(True, True, ["many"])
    ]
    cache.set("replaced", 1)
    cache.set("replaced", 2, timeout)
    for key in ("set", "added", "many", "replaced"):
        assert (cache.has(key), cache.get(key)) == (False, None)
    assert (expired.set("by default", 1), expired.get("by default")) == (True, None)
    assert [expired.inc("number"), expired.inc("number")] == [1, 1]
    assert (expired.add("for ever", 1, 0), expired.get("for ever")) == (True, 1)


def test_an_invalid_timeout_is_refused_and_a_float_is_rounded_up(make: Make) -> None:
    cache: Any = make()
    for wrong in ("1", [1], 1j):
        for use in (
            lambda: make(default_timeout=wrong),
            lambda: cache.set("key", 1, wrong),
            lambda: cache.add("key", 1, wrong),
        ):
            with pytest.raises(TypeError, match="timeout must be"):
                use()
    assert cache.has("key") is False
    with pytest.warns(DeprecationWarning, match="Float timeouts"):
        assert cache.set("key", 1, 1000.5) is True
    assert cache.get("key") == 1


def test_a_serializer_can_be_replaced(cache: Any) -> None:
    cache.serializer = JSONSerializer()
    for value in (None, True, 5, 1.5, "é", [1, {"a": None}]):
        cache.set("key", value)
        assert (type(cache.get("key")), cache.get("key")) == (type(value), value)
    cache.set("key", (1, 2))
    assert cache.get("key") == [1, 2]  # a tuple comes back as a list from JSON
    cache.set("number", 1)
    assert cache.inc("number") == 2
    if isinstance(cache, ManagerCache):
        cache.serializer = BaseRedisSerializer()
        for value in VALUES:
            cache.set("key", value)
            assert repr(cache.get("key")) == repr(value)


def test_threads_lose_no_increment_and_exactly_one_adds_a_key(cache: BaseCache) -> None:
    values = at_once(16, lambda: [cache.inc("number") for _ in range(25)])
    assert sorted(value or 0 for some in values for value in some) == list(range(1, 401))
    assert cache.get("number") == 400
    answers = at_once(16, lambda: [cache.add(f"key {n}", threading.get_ident()) for n in range(25)])
    assert [sum(added) for added in zip(*answers, strict=True)] == [1] * 25
    assert {cache.get(f"key {n}") is not None for n in range(25)} == {True}


# Intended differences from the reference


def test_inc_renews_an_entry_with_the_default_timeout_as_set_does() -> None:
    cache, forever = ManagerCache("memory://", default_timeout=10), ManagerCache("memory://", default_timeout=0)
    clock = clocked(cache)
    forever._entries = cache._entries
    cache.set("brief", 1, 5)
    cache.set("long", 1, 0)
    assert (cache.inc("brief"), cache.dec("long")) == (2, 0)
    assert (forever.set("set", 1), forever.inc("increased")) == (True, 1)
    clock.now += 9.999
    assert cache.get_many("brief", "long") == [2, 0]
    clock.now += 0.001
    assert cache.get_many("brief", "long") == [None, None]
    assert cache.inc("brief") == 1
    clock.now += 10**9
    assert cache.get_many("brief", "set", "increased") == [None, 1, 1]


def test_a_full_cache_evicts_expired_entries_then_the_least_recently_used() -> None:
    cache = ManagerCache("memory://", default_timeout=0)
    clock = clocked(cache, entries=3)
    cache.set_many({"a": 1, "b": 2})
    cache.set("brief", 3, 5)
    clock.now += 5
    cache.set("c", 3)
    assert cache.get_many("a", "b", "brief", "c") == [1, 2, None, 3]
    assert cache.get("a") == 1
    cache.set("d", 4)
    cache.inc("c")
    cache.add("e", 5)
    assert cache.get_many("a", "b", "c", "d", "e") == [None, None, 4, 4, 5]


@without_the_reference
def test_a_delta_that_is_not_a_number_changes_nothing(cache: BaseCache) -> None:
    """The reference creates a new entry for some of them."""
    cache.set_many({"number": 1, "bytes": "pickled"})
    deltas: list[Any] = ["1", b"1", [1], None, {}]
    for delta in deltas:
        for key in ("number", "bytes", "missing"):
            for change in (cache.inc, cache.dec):
                with pytest.raises(TypeError):
                    change(key, delta)
    assert cache.get_many("number", "bytes", "missing") == [1, "pickled", None]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(({"threshold": threshold}, "the most entries") for threshold in (0, -1, 1.5, True, None, "many")),
        ({"url": "nonsense://localhost"}, "nonsense"),
        ({"deadline": 0}, "deadline"),
        ({"name": ""}, "empty"),
    ],
    ids=str,
)
def test_an_invalid_option_is_refused_at_once(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        ManagerCache(**{"url": "memory://", **wrong})
    with pytest.raises(Unsupported, match="hosts no shared objects"):
        ManagerCache("redis://localhost")


@without_the_reference
def test_a_key_that_is_unhashable_or_cannot_be_sent_is_refused(cache: Any) -> None:
    unhashable = [(1, [2]), {"a": 1}]
    unsendable = [Point, {1}, "\ud800", "k" * (LARGEST_VALUE + 1)]
    for key in (*unhashable, *unsendable):
        for method in ("get", "has", "delete", "inc", "set", "add"):
            with pytest.raises(TypeError, match="unhashable") if key in unhashable else pytest.raises(InvalidRequest):
                getattr(cache, method)(key, *([1] if method in ("set", "add") else []))


class Unpicklable:
    """Refuses to be pickled, like pickle itself."""

    def __reduce__(self) -> str:
        raise pickle.PicklingError("refused")


@without_the_reference
def test_a_value_that_cannot_be_serialised_is_an_error_and_changes_nothing(cache: Any) -> None:
    """A serializer of cachelib logs the reason and returns None, which the reference stores and cannot read."""
    cache.set("key", "before")
    values: list[Any] = [threading.Lock(), lambda: None, (n for n in [1]), Unpicklable()]
    for value in values:
        changes: list[Callable[[], Any]] = [
            lambda: cache.set("key", value),
            lambda: cache.add("new", value),
            lambda: cache.set_many({"first": 1, "new": value, "third": 3}),
        ]
        for change in changes:
            with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
                change()
    with pytest.raises(pickle.PicklingError, match="Unpicklable"):
        cache.set("key", Unpicklable())
    cache.serializer = JSONSerializer()
    for change in (cache.set, cache.add):
        with pytest.raises(pickle.PicklingError, match="bytes"):
            change("new", b"no JSON")
    cache.serializer = ManagerCache.serializer
    assert cache.get_many("key", "new", "first", "third") == ["before", None, 1, None]


@without_the_reference
def test_a_too_large_value_is_refused_and_changes_nothing(cache: BaseCache) -> None:
    cache.set_many({"key": "before", "number": 1})
    for change in (
        lambda: cache.set("key", b"x" * LARGEST_VALUE),
        lambda: cache.add("new", "x" * LARGEST_VALUE),
        lambda: cache.set_many({"new": ["x" * 1000] * 1000 + [os.urandom(LARGEST_VALUE)]}),
        lambda: cache.inc("number", 2 ** (8 * LARGEST_VALUE)),
    ):
        with pytest.raises(InvalidRequest, match=f"at most {LARGEST_VALUE}") as error:
            change()
        assert error.value.outcome == "not_applied"
    assert cache.get_many("key", "new", "number") == ["before", None, 1]
    almost = os.urandom(LARGEST_VALUE - 1000)
    assert cache.set("key", almost) is True
    assert cache.get("key") == almost


class Marking:
    """A value that writes a file when it is unpickled, and becomes the pid of the process."""

    def __init__(self, marks: Path) -> None:
        self._marks = marks

    def __reduce__(self) -> tuple[Any, ...]:
        return _leave_a_mark, (str(self._marks),)


def _leave_a_mark(marks: str) -> int:
    with open(marks, "a") as file:
        print(os.getpid(), file=file)
    return os.getpid()


def test_the_manager_never_unpickles_a_value(shared_manager: str, tmp_path: Path, opened: Open) -> None:
    marks = tmp_path / "marks"
    cache, other = (opened(shared_manager, "small", threshold=3) for _ in range(2))
    for key in ("one", "two", "three", "four"):  # the first is evicted
        cache.set(key, Marking(marks))
    assert cache.add("two", Marking(marks)) is False
    assert cache.add("five", Marking(marks), timeout=-1) is True
    assert [other.has("one"), other.has("two"), other.delete("three")] == [False, True, True]
    with pytest.raises(TypeError):
        other.inc("two")
    assert not marks.exists()
    assert other.get("four") == os.getpid()
    cache.clear()
    assert marks.read_text() == f"{os.getpid()}\n"


def test_caches_of_one_name_share_their_entries_and_no_others(shared_manager: str, opened: Open) -> None:
    one, same = (opened(shared_manager, "one", threshold=10, default_timeout=timeout) for timeout in (300, 0))
    other = opened(shared_manager, "other", threshold=20)
    one.set("key", 1)
    assert [same.get("key"), other.get("key"), other.add("key", 2), same.inc("key")] == [1, None, True, 2]
    other.clear()
    assert one.get("key") == 2


def test_a_missing_manager_is_an_error(data_dir: Path, opened: Open) -> None:
    cache = opened(DataDirectory(data_dir).url, deadline=0.05, options=StoreOptions(start=False))
    for use in (lambda: cache.get("key"), lambda: cache.set("key", 1), lambda: cache.inc("key"), cache.clear):
        with pytest.raises(DeadlineExceeded, match="no manager is running") as error:
            use()
        assert isinstance(error.value, CounterServerError)


def test_a_closed_cache_reopens_at_the_next_call(shared_manager: str, opened: Open) -> None:
    cache = opened(shared_manager)
    cache.set("key", 1)
    before = os.listdir("/proc/self/fd")
    cache.close()
    assert len(os.listdir("/proc/self/fd")) < len(before)
    cache.close()
    assert cache.get("key") == 1


# Several processes

_starts: list[Any] = []  # in a process of `in_4_processes`: a barrier of all four


def _enter(start: Any) -> None:
    _starts.append(start)


def in_4_processes(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work` returns in each of four processes, which begin at the same time."""
    with ProcessPoolExecutor(4, spawn, initializer=_enter, initargs=(spawn.Barrier(4),)) as processes:
        done = [processes.submit(_begin, work, *arguments) for _ in range(4)]
        return [future.result() for future in done]


def _begin(work: Callable[..., Any], *arguments: Any) -> Any:
    _starts[0].wait(PATIENCE)
    return work(*arguments)


def use(url: str) -> tuple[list[Any], list[bool], Any]:
    cache = ManagerCache(url, deadline=PATIENCE)
    numbers = [cache.inc("number") for _ in range(100)]
    for _ in range(100):
        cache.inc("both ways", 3)
        cache.dec("both ways", 2)
    return numbers, [cache.add(f"key {n}", n) for n in range(100)], cache.get("point")


@pytest.mark.slow
def test_4_processes_lose_no_increment_and_exactly_one_adds_a_key(shared_manager: str, opened: Open) -> None:
    cache = opened(shared_manager)
    cache.clear()
    cache.set("point", Point(1, Point(2)))
    numbers, added, points = zip(*in_4_processes(use, shared_manager), strict=True)
    assert sorted(number for some in numbers for number in some) == list(range(1, 401))
    assert cache.get("both ways") == 400
    assert [sum(each) for each in zip(*added, strict=True)] == [1] * 100
    assert points == (Point(1, Point(2)),) * 4


class SimultaneousFiles(FileSystemCache):
    """A file cache whose threads have all read a number before any writes one."""

    barrier = threading.Barrier(4)

    def get(self, key: str) -> Any:
        value = super().get(key)
        if key == "number":
            self.barrier.wait(PATIENCE)
        return value


def test_a_file_cache_loses_increments_that_ours_counts(tmp_path: Path) -> None:
    """It uses cachelib's `inc`: get, then set."""
    files = SimultaneousFiles(str(tmp_path / "files"))
    assert at_once(4, lambda: files.inc("number")) == [1] * 4
    cache = ManagerCache("memory://")
    assert sorted(at_once(4, lambda: cache.inc("number"))) == [1, 2, 3, 4]


# A manager that is killed


def test_every_method_works_as_the_first_call_after_a_loss() -> None:
    """The state simulates the loss, as killing a manager for each method would take long."""
    arguments: dict[str, list[Any]] = {"set": ["a", 2], "add": ["a", 2], "clear": [], "set_many": [{"a": 1}]}
    for method in (
        *("get", "set", "add", "delete", "has", "inc", "dec", "clear"),
        *("get_many", "delete_many", "set_many"),
    ):
        state = open_state("memory://")
        lost = chain([StateLost("begins anew")], repeat(DEFAULT))
        caches = ManagerCache(state), ManagerCache("memory://")
        with patch.object(state, "invoke", wraps=state.invoke, side_effect=lost) as invoke:
            answer, of_a_new_cache = (getattr(cache, method)(*arguments.get(method, ["a"])) for cache in caches)
        assert answer == of_a_new_cache
        assert invoke.call_count >= 2


@pytest.mark.slow
def test_busy_clients_see_no_error_and_an_empty_cache_after_a_kill(
    on_demand: str, data_dir: Path, opened: Open
) -> None:
    """Each client counts its own key: the next number is one more, or 1 after the loss."""
    idle = [opened(on_demand, default_timeout=0) for _ in range(2)]
    assert all(cache.set("key", "value") for cache in idle)
    numbers: list[list[int]] = [[] for _ in range(4)]
    stop = threading.Event()

    def work(key: str, seen: list[int]) -> None:
        cache = opened(on_demand)
        while not stop.is_set():
            seen.append(cache.inc(key))
            cache.add(f"{key}, added", seen[-1])
            assert cache.set(f"{key}, set", [seen[-1]]) is True
            assert cache.get(f"{key}, set") in ([seen[-1]], None)
            assert cache.delete(f"{key}, added") in (True, False)
            assert cache.get(f"{key}, added") is None

    def kill() -> None:
        try:
            for _ in range(3):
                progress()
                end_manager(data_dir / "manager.lock")
                progress()
        finally:
            stop.set()

    def progress() -> None:
        goals = [len(seen) + 10 for seen in numbers]
        eventually(lambda: all(map(ge, map(len, numbers), goals)), "progress of all")

    works = [partial(work, str(number), seen) for number, seen in enumerate(numbers)]
    jobs: Iterator[Callable[[], None]] = iter([kill, *works])
    at_once(5, lambda: next(jobs)())
    for seen in numbers:
        assert seen[0] == 1
        steps = list(pairwise(seen))
        assert all(after in (before + 1, 1) for before, after in steps)
        assert sum(after == 1 for _, after in steps) == 3
    assert [idle[0].get("key"), idle[1].add("key", 1), idle[0].inc("key"), idle[1].get("key")] == [None, True, 2, 2]


# Flask-Caching

OURS = "counter_server.caching.ManagerCache"


def make_app(url: str = "memory://", **config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_DEADLINE=PATIENCE, **config)
    return app


def caching(app: Flask, stack: ExitStack, **config: Any) -> Cache:
    """Set up Flask-Caching with our cache in an app, until the test ends."""
    cache = Cache(app, config={"CACHE_TYPE": OURS, **config})
    stack.callback(app.extensions["cache"][cache].close)
    return cache


def in_context(stack: ExitStack, url: str = "memory://", **config: Any) -> Cache:
    """Set it up in a new app, which is current until the test ends."""
    app = make_app(url)
    stack.enter_context(app.app_context())
    return caching(app, stack, **config)


@pytest.mark.parametrize("cache_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_flask_caching_and_a_shared_state_use_one_manager(
    on_demand: str,
    data_dir: Path,
    stack: ExitStack,
    cache_first: bool,  # noqa: FBT001
) -> None:
    shared = SharedState()
    obj = shared.object("obj", SomeObj, 0)
    app = make_app(on_demand)
    if not cache_first:
        shared.init_app(app)
    cache = caching(app, stack)
    if cache_first:
        shared.init_app(app)
    with app.app_context():
        uses: list[Callable[[], Any]] = [
            lambda: cache.cache.inc("number"),
            obj.query,
            lambda: shared.counter("c").increment(),
        ]
        for number in (1, 2):
            assert [use() for use in (uses if cache_first else reversed(uses))] == [number] * 3
        assert holder(data_dir) is not None
        shared.state.close()


def test_a_view_cached_in_one_worker_is_cached_in_another(shared_manager: str, stack: ExitStack) -> None:
    """Two apps with a cache each represent two workers."""
    calls: list[str] = []

    def worker(name: str) -> Flask:
        app = make_app(shared_manager)
        cache = caching(app, stack)

        @app.get("/")
        @cache.cached(timeout=0)
        def home() -> str:
            calls.append(name)
            return f"made by {name}"

        app.add_url_rule("/clear", view_func=lambda: str(cache.clear()))
        return app

    one, other = worker("one").test_client(), worker("other").test_client()
    one.get("/clear")
    assert [client.get("/").text for client in (one, other, one, other)] == ["made by one"] * 4
    assert calls == ["one"]
    assert other.get("/clear").text == "True"
    assert [client.get("/").text for client in (other, one)] == ["made by other"] * 2
    assert calls == ["one", "other"]


def test_memoized_functions_run_once_for_each_argument_until_deleted(stack: ExitStack) -> None:
    cache = in_context(stack)
    calls: list[int] = []

    @cache.memoize(timeout=0, cache_none=True)
    def add(a: int, b: int = 1) -> int | None:
        calls.append(a)
        return a + b if a else None

    assert [add(1), add(1, 1), add(a=1), add(2), add(2), add(0), add(0)] == [2, 2, 2, 3, 3, None, None]
    assert calls == [1, 2, 0]
    cache.delete_memoized(add, 1)
    assert [add(1), add(2), add(0), *calls] == [2, 3, None, 1, 2, 0, 1]
    for delete in (lambda: cache.delete_memoized(add), cache.clear):
        delete()
        calls.clear()
        assert [add(1), add(2), add(2), *calls] == [2, 3, 3, 1, 2]


def test_the_configuration_of_flask_caching_and_its_defaults_are_used(stack: ExitStack) -> None:
    ours: Any = in_context(stack).cache
    assert (ours.default_timeout, ours.ignore_delete_many_errors) == (300, False)
    assert list(ours._state.declarations) == ["flask-caching"]
    ours.set_many({str(n): n for n in range(501)})
    assert [ours.has("0"), ours.has("1"), ours.has("500")] == [False, True, True]
    config: dict[str, Any] = {"CACHE_THRESHOLD": 2, "CACHE_DEFAULT_TIMEOUT": -1, "CACHE_IGNORE_ERRORS": True}
    own: dict[str, Any] = {"CACHE_SERIALIZER": JSONSerializer, "CACHE_OPTIONS": {"name": "own"}}
    ours = in_context(stack, **config, **own).cache
    assert isinstance(ours, ManagerCache)
    assert (ours.default_timeout, ours.ignore_delete_many_errors) == (-1, True)
    assert list(ours._state.declarations) == ["own"]
    assert (ours.set("over at once", 1), ours.get("over at once")) == (True, None)
    assert (ours.set("a", (1,), timeout=0), ours.get("a")) == (True, [1])
    ours.set_many({"b": 2, "c": 3}, timeout=0)
    assert ours.get_many("a", "b", "c") == [None, 2, 3]
    with pytest.raises(InvalidRequest, match="the most entries"):
        in_context(stack, CACHE_THRESHOLD=0)


def test_options_of_flask_caching_take_precedence_and_may_name_another_store(stack: ExitStack) -> None:
    options = {"deadline": PATIENCE, "threshold": 1, "default_timeout": 0}
    places: list[dict[str, Any]] = [
        {"CACHE_ARGS": ["memory://"], "CACHE_OPTIONS": options},
        {"CACHE_ARGS": ["memory://", "flask-caching"], "CACHE_OPTIONS": options},
        {"CACHE_OPTIONS": {"url": "memory://", **options}},
    ]
    for place in places:
        ours: Any = in_context(stack, "manager:///nowhere", CACHE_THRESHOLD=7, **place).cache
        ours.set_many({"a": 1, "b": 2})
        assert [ours.get("a"), ours.get("b"), ours.default_timeout] == [None, 2, 0]
        assert list(ours._state.declarations) == ["flask-caching"]


def test_a_view_works_without_its_cache_if_the_manager_is_missing(data_dir: Path, stack: ExitStack) -> None:
    """As with any cache, Flask-Caching logs the error and calls the view."""
    app = make_app(DataDirectory(data_dir).url, COUNTER_SERVER_START=False)
    app.config["COUNTER_SERVER_DEADLINE"] = 0.05
    app.add_url_rule("/", view_func=caching(app, stack).cached()(lambda: "here"))
    assert app.test_client().get("/").text == "here"


# Flask-Session


def session_app(cache: ManagerCache, **config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=cache, **config)
    Session(app)

    @app.get("/inc")
    def increment() -> dict[str, Any]:
        session["number"] = session.get("number", 0) + 1
        return {"number": session["number"]}

    @app.get("/clear")
    def clear() -> dict[str, Any]:
        session.clear()
        return {}

    app.add_url_rule("/read", view_func=lambda: dict(session))
    return app


def test_a_session_started_in_one_worker_continues_in_another(shared_manager: str, opened: Open) -> None:
    one, other = (session_app(opened(shared_manager)) for _ in range(2))
    anna, ben = one.test_client(), one.test_client()
    for number in (1, 2, 3):
        for browser in (anna, ben):
            assert browser.get("/inc").json == {"number": number}
            browser.application = other if browser.application is one else one
    assert anna.get("/inc").json == {"number": 4}
    assert anna.get_cookie("session") != ben.get_cookie("session")


def test_a_permanent_session_lives_for_its_lifetime_after_its_last_use() -> None:
    cache = ManagerCache("memory://", default_timeout=1)
    clock = clocked(cache)
    browser = session_app(cache, PERMANENT_SESSION_LIFETIME=timedelta(minutes=1)).test_client()
    assert browser.get("/inc").json == {"number": 1}
    for _ in range(3):
        clock.now += 59.9
        assert browser.get("/read").json == {"_permanent": True, "number": 1}
    clock.now += 60
    assert browser.get("/read").json == {"_permanent": True}
    assert browser.get("/inc").json == {"number": 1}


def test_a_cleared_session_is_removed_from_the_cache() -> None:
    cache = ManagerCache("memory://")
    browser = session_app(cache, SESSION_KEY_PREFIX="s:").test_client()
    browser.get("/inc")
    cookie = browser.get_cookie("session")
    assert cookie is not None
    key = f"s:{cookie.value}"
    assert cache.get(key) == {"_permanent": True, "number": 1}
    browser.get("/clear")
    assert cache.has(key) is False
    assert browser.get_cookie("session") is None
    browser.set_cookie("session", cookie.value)  # as a client that kept the old cookie
    assert browser.get("/inc").json == {"number": 1}
    assert cache.has(key) is False


def test_clearing_flask_caching_ends_no_session(shared_manager: str, stack: ExitStack, opened: Open) -> None:
    """Both have their default names."""
    app = session_app(opened(shared_manager))
    app.config.update(COUNTER_SERVER_STORE=shared_manager, COUNTER_SERVER_DEADLINE=PATIENCE)
    cache = caching(app, stack)
    browser = app.test_client()
    assert browser.get("/inc").json == {"number": 1}
    with app.app_context():
        cache.set("key", 1)
        cache.clear()
    assert browser.get("/inc").json == {"number": 2}
