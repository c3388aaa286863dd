"""The shared cache follows the contract of cachelib, whose simple cache is the reference."""

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

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
from counter_server.operations import LARGEST_VALUE, Invoke, Result
from tests.hosted_classes import SomeObj
from tests.load import at_once, spawn
from tests.processes import PATIENCE, ROOT, end_manager, eventually, holder

Make = Callable[..., BaseCache]


@pytest.fixture(scope="module")
def shared_manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of an on-demand manager for all tests that do not disturb it."""
    data_dir = tmp_path_factory.mktemp("caches") / "data"
    yield DataDirectory(data_dir).url
    end_manager(data_dir / "manager.lock")


@pytest.fixture(params=["SimpleCache", "memory", "manager"])
def make(request: pytest.FixtureRequest, shared_manager: str, stack: ExitStack) -> Make:
    """Return a function that makes empty caches: the reference, and ours in this process and in a manager."""
    return SimpleCache if request.param == "SimpleCache" else _ours(request.param, shared_manager, stack)


@pytest.fixture(params=["memory", "manager"])
def ours(request: pytest.FixtureRequest, shared_manager: str, stack: ExitStack) -> Make:
    """Return the same without the reference, for intended differences."""
    return _ours(request.param, shared_manager, stack)


def _ours(kind: str, url: str, stack: ExitStack) -> Make:
    state = stack.enter_context(open_state("memory://" if kind == "memory" else url, deadline=PATIENCE))
    ManagerCache(state).clear()
    return lambda **options: ManagerCache(state, **options)


@pytest.fixture
def cache(make: Make) -> BaseCache:
    return make()


@pytest.fixture
def opened(stack: ExitStack) -> Callable[..., ManagerCache]:
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


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    2**64,
    -(2**200),
    10**1000,
    0.0,
    -0.0,
    1.5,
    float("inf"),
    "",
    "text",
    "ключ \N{GRINNING FACE}",
    b"",
    b"\x00\xff",
    [],
    [1, [2, (3, {"a": {4}})]],
    (1, (2,)),
    {1: 2, None: 3, "a": b"x"},
    frozenset({1}),
    1j,
    timedelta(days=1),
    Point(1, Point(2)),
]


# The contract of cachelib


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_a_value_is_returned_unchanged(cache: BaseCache, value: object) -> None:
    assert cache.set("key", value) is True
    for back in (cache.get("key"), *cache.get_many("key"), *cache.get_dict("key").values()):
        assert (type(back), repr(back)) == (type(value), repr(value))
    assert cache.has("key") is True
    assert cache.add("key", "other") is False
    assert repr(cache.get("key")) == repr(value)


def test_nan_is_returned_unchanged(cache: BaseCache) -> None:
    cache.set("key", float("nan"))
    assert repr(cache.get("key")) == "nan"


def test_a_reader_gets_its_own_copy(cache: BaseCache) -> None:
    value = {"list": [1]}
    cache.set("key", value)
    value["list"].append(2)
    cache.get("key")["list"].append(3)
    assert cache.get("key") == {"list": [1]}


def test_a_missing_key_is_none_and_changes_nothing(cache: BaseCache) -> None:
    assert cache.get("missing") is None
    assert cache.has("missing") is False
    assert cache.delete("missing") is False
    assert cache.get_many() == []
    assert cache.get_dict() == {}
    assert cache.set_many({}) == []
    assert cache.delete_many() == []
    assert cache.clear() is True


def test_none_is_a_value(cache: BaseCache) -> None:
    cache.set("none", None)
    assert cache.get("none") is None
    assert cache.has("none") is True
    assert cache.add("none", 1) is False
    assert cache.delete("none") is True
    assert cache.has("none") is False


@pytest.mark.parametrize(
    "key", ["", "key", "a b/c?d=é&f", "\N{GRINNING FACE}" * 1000, "\x00", 1, ("a", 1), b"bytes"], ids=ascii
)
def test_a_key_may_be_any_plain_data(cache: BaseCache, key: Any) -> None:
    assert cache.add(key, "value") is True
    assert cache.get(key) == "value"
    assert cache.get_dict(key, "other") == {key: "value", "other": None}
    assert cache.delete(key) is True
    assert cache.inc(key) == 1
    assert cache.has(key) is True


class Key(StrEnum):
    """A subclass of `str`."""

    ONE = "one"


def test_a_key_of_a_subclass_of_str_equals_the_string(cache: BaseCache) -> None:
    assert cache.set(Key.ONE, "value") is True
    assert cache.get("one") == cache.get(Key.ONE) == "value"
    assert cache.get_dict(Key.ONE) == {"one": "value"}
    assert cache.has(Key.ONE) is True
    assert cache.add(Key.ONE, "other") is False
    assert cache.delete(Key.ONE) is True
    assert cache.inc(Key.ONE) == 1
    assert cache.dec("one") == 0


def test_add_sets_only_missing_keys(cache: BaseCache) -> None:
    assert cache.add("key", 1) is True
    assert cache.add("key", 2) is False
    assert cache.get("key") == 1
    cache.delete("key")
    assert cache.add("key", 3) is True
    assert cache.get("key") == 3


def test_get_many_returns_values_in_the_order_of_the_keys(cache: BaseCache) -> None:
    assert cache.set_many({"a": 1, "b": [2], "c": None}) == ["a", "b", "c"]
    assert cache.get_many("c", "b", "missing", "a", "a") == [None, [2], None, 1, 1]
    assert list(cache.get_dict("b", "missing", "a").items()) == [("b", [2]), ("missing", None), ("a", 1)]


@pytest.mark.parametrize("ignore", [True, False])
def test_delete_many_reports_missing_keys_as_deleted(make: Make, ignore: bool) -> None:  # noqa: FBT001
    cache = make(ignore_delete_many_errors=ignore)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    assert cache.delete_many("a", "missing", "b") == ["a", "missing", "b"]
    assert cache.get_many("a", "b", "c") == [None, None, 3]


def test_delete_many_reports_errors_unless_they_are_ignored(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a class that cannot delete can fail here."""
    for ignore in (True, False):
        cache = make(ignore_delete_many_errors=ignore)
        assert cache.ignore_delete_many_errors is ignore
        cache.set("key", 1)
        monkeypatch.setattr(cache, "delete", lambda _key: False)
        if ignore:
            assert cache.delete_many("key", "missing") == ["missing"]
        else:
            with pytest.raises(RuntimeError, match="key"):
                cache.delete_many("key", "missing")


def test_clear_removes_all(cache: BaseCache) -> None:
    cache.set_many({str(n): n for n in range(50)}, timeout=0)
    assert cache.clear() is True
    assert not any(cache.has(str(n)) for n in range(50))
    assert cache.add("0", "new") is True


def test_inc_and_dec_return_the_new_number_and_start_at_0(cache: BaseCache) -> None:
    assert [cache.inc("up"), cache.inc("up"), cache.inc("up", 5), cache.inc("up", -3), cache.inc("up", 0)] == [
        *(1, 2, 7, 4, 4)
    ]
    assert [cache.dec("down"), cache.dec("down"), cache.dec("down", 5), cache.dec("down", -3)] == [-1, -2, -7, -4]
    assert cache.inc("zero", 0) == 0
    assert cache.has("zero") is True
    assert cache.get_many("up", "down") == [4, -4]


def test_inc_and_dec_continue_from_a_set_value(cache: BaseCache) -> None:
    cache.set_many({"int": 2**64, "float": 0.5})
    assert cache.inc("int", 2**70) == 2**64 + 2**70
    assert cache.dec("int", 2**64 + 2**70) == 0
    assert cache.dec("float", 1) == -0.5
    assert cache.inc("float", 0.25) == -0.25  # type: ignore[arg-type]
    assert cache.get("float") == -0.25


@pytest.mark.parametrize("value", ["text", "7", b"bytes", [1], {"a": 1}, (1,), Point(1)], ids=repr)
def test_inc_and_dec_of_other_values_change_nothing(cache: BaseCache, value: object) -> None:
    cache.set("key", value)
    for change in (cache.inc, cache.dec):
        with pytest.raises(TypeError):
            change("key")
    assert cache.get("key") == value


def test_a_timeout_is_seconds_or_a_timedelta_rounded_up_and_0_means_forever(make: Make) -> None:
    cache, forever = make(default_timeout=1), make(default_timeout=0)
    brief: dict[str, Any] = {
        "default": None,
        "seconds": 1,
        "timedelta": timedelta(seconds=1),
        "rounded up": timedelta(milliseconds=1),
    }
    for key, timeout in brief.items():
        cache.set(key, key, timeout)
        cache.add(f"added, {key}", key, timeout)
    cache.set_many({"many": 1}, timeout=1)
    cache.inc("increased")
    long: dict[str, Any] = {"zero": 0, "no time": timedelta(0), "long": 10**9, "days": timedelta(days=400)}
    for kept, timeout in long.items():
        cache.set(kept, kept, timeout)
        forever.set(f"forever, {kept}", kept, timeout)
        cache.add(f"added, {kept}", kept, timeout)
    cache.set_many({"many kept": 1}, timeout=0)
    if isinstance(forever, ManagerCache):  # the reference makes another cache here
        forever.set("forever", "forever")
        forever.inc("forever, increased")
    keys = [*brief, *(f"added, {key}" for key in brief), "many", "increased"]
    eventually(lambda: not any(cache.has(key) for key in keys), "the end of a second")
    assert cache.get_many(*keys) == [None] * len(keys)
    assert cache.get_many("zero", "no time", "long", "days") == ["zero", "no time", "long", "days"]
    assert cache.get_many("added, zero", "added, long", "many kept") == ["zero", "long", 1]
    assert forever.get_many("forever, zero", "forever, days") == ["zero", "days"]
    if isinstance(forever, ManagerCache):
        assert forever.get_many("forever", "forever, increased") == ["forever", 1]
    assert cache.add("seconds", "again", 0) is True
    assert cache.inc("increased") == 1


@pytest.mark.parametrize("timeout", [-1, -(10**9), timedelta(seconds=-1)], ids=str)
def test_an_entry_with_a_negative_timeout_expires_at_once(make: Make, timeout: Any) -> None:
    cache, expired = make(), make(default_timeout=timeout)
    assert cache.set("set", 1, timeout) is True
    assert cache.add("added", 1, timeout) is True
    assert cache.set_many({"many": 1}, timeout) == ["many"]
    cache.set("replaced", 1)
    cache.set("replaced", 2, timeout)
    for key in ("set", "added", "many", "replaced"):
        assert cache.has(key) is False
        assert cache.get(key) is None
    assert expired.set("by default", 1) is True
    assert expired.get("by default") is None
    assert [expired.inc("number"), expired.inc("number")] == [1, 1]
    assert expired.add("for ever", 1, 0) is True
    assert expired.get("for ever") == 1


@pytest.mark.parametrize("wrong", ["1", [1], 1j], ids=repr)
def test_an_invalid_timeout_is_refused(make: Make, wrong: Any) -> None:
    cache = make()
    with pytest.raises(TypeError, match="timeout must be"):
        make(default_timeout=wrong)
    for change in (cache.set, cache.add):
        with pytest.raises(TypeError, match="timeout must be"):
            change("key", 1, wrong)
    assert cache.has("key") is False


def test_a_deprecated_float_timeout_is_rounded_up_with_a_warning(make: Make) -> None:
    cache = make()
    with pytest.warns(DeprecationWarning, match="Float timeouts"):
        assert cache.set("key", 1, 1000.5) is True  # type: ignore[arg-type]
    assert cache.get("key") == 1


def test_a_serializer_can_be_replaced(cache: BaseCache) -> None:
    cache.serializer = JSONSerializer()  # type: ignore[attr-defined]
    for value in (None, True, 5, 1.5, "é", [1, {"a": None}]):
        cache.set("key", value)
        assert (type(cache.get("key")), cache.get("key")) == (type(value), value)
    cache.set("key", (1, 2))
    assert cache.get("key") == [1, 2]  # a tuple comes back as a list from JSON
    cache.set("number", 1)
    assert cache.inc("number") == 2


def test_threads_lose_no_increment(cache: BaseCache) -> None:
    values = at_once(16, lambda: [cache.inc("number") for _ in range(25)])
    assert sorted(value or 0 for some in values for value in some) == list(range(1, 401))
    assert cache.get("number") == 400


def test_of_16_threads_that_add_a_key_exactly_one_succeeds(cache: BaseCache) -> None:
    answers = at_once(16, lambda: [cache.add(f"key {n}", threading.get_ident()) for n in range(50)])
    assert [sum(added) for added in zip(*answers, strict=True)] == [1] * 50
    assert {cache.get(f"key {n}") is not None for n in range(50)} == {True}


# Intended differences from the reference


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def clocked(cache: ManagerCache, entries: int = 100) -> Clock:
    """Replace the hosted object of a cache by one with the test's clock."""
    clock = Clock()
    cache._entries = BoundedDict(entries, clock)
    return clock


def test_an_entry_expires_exactly_when_its_timeout_is_over() -> None:
    cache = ManagerCache("memory://", default_timeout=10)
    clock = clocked(cache)
    start = clock.now
    cache.set("default", 1)
    cache.set("twenty", 1, 20)
    cache.add("thirty", 1, timedelta(seconds=30))
    cache.set("for ever", 1, 0)
    keys = ("default", "twenty", "thirty", "for ever")
    for seconds, alive in (
        (9.999, keys),
        (10, keys[1:]),
        (19.999, keys[1:]),
        (20, keys[2:]),
        (30, keys[3:]),
        (1e9, keys[3:]),
    ):
        clock.now = start + seconds
        assert tuple(key for key in keys if cache.has(key)) == alive
        assert tuple(key for key in keys if cache.get(key)) == alive
    assert cache.delete("default") is False
    assert cache.add("default", 2) is True


def test_inc_renews_an_entry_with_the_default_timeout_as_set_does() -> None:
    cache = ManagerCache("memory://", default_timeout=10)
    clock = clocked(cache)
    cache.set("brief", 1, 5)
    cache.set("for ever", 1, 0)
    assert (cache.inc("brief"), cache.dec("for ever")) == (2, 0)
    clock.now += 9.999
    assert cache.get_many("brief", "for ever") == [2, 0]
    clock.now += 0.001
    assert cache.get_many("brief", "for ever") == [None, None]
    assert cache.inc("brief") == 1


def test_a_full_cache_evicts_the_least_recently_used_entry(stack: ExitStack) -> None:
    cache = ManagerCache(stack.enter_context(open_state("memory://")), threshold=3, default_timeout=0)
    cache.set_many({"a": 1, "b": 2, "c": 3})
    assert cache.get("a") == 1
    cache.set("d", 4)
    assert cache.get_many("a", "b", "c", "d") == [1, None, 3, 4]
    cache.inc("a")
    cache.add("e", 5)
    assert cache.get_many("a", "c", "d", "e") == [2, None, 4, 5]
    cache.set("e", 6)
    assert [cache.has(key) for key in ("a", "d", "e")] == [True, True, True]


def test_expired_entries_are_evicted_before_live_ones() -> None:
    cache = ManagerCache("memory://", default_timeout=0)
    clock = clocked(cache, entries=3)
    cache.set_many({"oldest": 1, "old": 2})
    cache.set("brief", 3, 5)
    clock.now += 5
    cache.set("new", 4)
    assert cache.get_many("oldest", "old", "brief", "new") == [1, 2, None, 4]


@pytest.mark.parametrize("value", [None, True, False, "", "text", b"", 0j], ids=repr)
def test_only_an_int_or_a_float_is_a_number(ours: Make, value: object) -> None:
    """The reference counts false values as 0, and True as 1."""
    cache = ours()
    cache.set("key", value)
    for change in (cache.inc, cache.dec):
        with pytest.raises(TypeError):
            change("key")
    assert cache.get("key") == value


@pytest.mark.parametrize("delta", ["1", b"1", [1], None, {}], ids=repr)
def test_a_delta_that_is_not_a_number_changes_nothing(ours: Make, delta: Any) -> None:
    """The reference creates a new entry for some of them."""
    cache = ours()
    cache.set_many({"number": 1, "bytes": "pickled"})
    for key in ("number", "bytes", "missing"):
        for change in (cache.inc, cache.dec):
            with pytest.raises(TypeError):
                change(key, delta)
    assert cache.get_many("number", "bytes", "missing") == [1, "pickled", None]


@pytest.mark.parametrize("threshold", [0, -1, 1.5, True, None, "many"], ids=repr)
def test_an_invalid_threshold_is_refused_at_once(threshold: Any) -> None:
    with pytest.raises(InvalidRequest, match="the most entries"):
        ManagerCache("memory://", threshold=threshold)


def test_an_invalid_store_or_deadline_is_refused_at_once() -> None:
    for wrong in ({"url": "nonsense://localhost"}, {"deadline": 0}, {"name": ""}):
        with pytest.raises(InvalidRequest):
            ManagerCache(**{"url": "memory://", **wrong})  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="hosts no shared objects"):
        ManagerCache("redis://localhost")


@pytest.mark.parametrize("key", [(1, [2]), {"a": 1}], ids=repr)
def test_an_unhashable_key_is_refused(ours: Make, key: Any) -> None:
    cache = ours()
    for use in (
        cache.get,
        cache.has,
        cache.delete,
        cache.inc,
        lambda key: cache.set(key, 1),
        lambda key: cache.add(key, 1),
    ):
        with pytest.raises(TypeError, match="unhashable"):
            use(key)


@pytest.mark.parametrize("key", [Point, {1}, "\ud800", "k" * (LARGEST_VALUE + 1)], ids=lambda key: ascii(key)[:20])
def test_a_key_that_cannot_be_sent_is_refused(ours: Make, key: Any) -> None:
    cache = ours()
    for use in (
        cache.get,
        cache.has,
        cache.delete,
        cache.inc,
        lambda key: cache.set(key, 1),
        lambda key: cache.add(key, 1),
    ):
        with pytest.raises(InvalidRequest):
            use(key)


@pytest.mark.parametrize(
    "value", [threading.Lock(), lambda: None, iter(lambda: 1, 2)], ids=["lock", "lambda", "iterator"]
)
def test_a_value_that_cannot_be_pickled_is_an_error_and_changes_nothing(ours: Make, value: object) -> None:
    cache = ours()
    cache.set("key", "before")
    for change in (
        lambda: cache.set("key", value),
        lambda: cache.add("new", value),
        lambda: cache.set_many({"first": 1, "new": value, "third": 3}),
    ):
        with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
            change()
    assert cache.get_many("key", "new", "first", "third") == ["before", None, 1, None]


class Unpicklable:
    """Refuses to be pickled, like pickle itself."""

    def __reduce__(self) -> str:
        raise pickle.PicklingError("refused")


def test_a_value_that_the_serializer_refuses_is_an_error_and_changes_nothing(ours: Make) -> None:
    """A serializer of cachelib logs the reason and returns None, which the reference stores and cannot read."""
    cache: Any = ours()
    cache.set("key", "before")
    with pytest.raises(pickle.PicklingError, match="Unpicklable"):
        cache.set("key", Unpicklable())
    cache.serializer = JSONSerializer()
    for change in (cache.set, cache.add):
        with pytest.raises(pickle.PicklingError, match="bytes"):
            change("new", b"no JSON")
    assert cache.has("new") is False
    cache.serializer = ManagerCache.serializer
    assert cache.get("key") == "before"


def test_a_serializer_for_redis_works_too(ours: Make) -> None:
    cache: Any = ours()
    cache.serializer = BaseRedisSerializer()
    for value in VALUES:
        cache.set("key", value)
        assert repr(cache.get("key")) == repr(value)


def test_a_too_large_value_is_refused_and_changes_nothing(ours: Make) -> None:
    cache = ours()
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


def test_the_manager_never_unpickles_a_value(
    on_demand: str, data_dir: Path, tmp_path: Path, opened: Callable[..., ManagerCache]
) -> None:
    marks = tmp_path / "marks"
    cache, other = opened(on_demand, threshold=3), opened(on_demand, threshold=3)
    for key in ("one", "two", "three", "four"):  # the first is evicted
        cache.set(key, Marking(marks))
    assert cache.add("two", Marking(marks)) is False
    assert cache.add("five", Marking(marks), timeout=-1) is True
    assert [other.has("one"), other.has("two"), other.delete("three")] == [False, True, True]
    with pytest.raises(TypeError):
        other.inc("two")
    assert not marks.exists()
    assert other.get("four") == os.getpid() != holder(data_dir)
    assert marks.read_text() == f"{os.getpid()}\n"
    cache.clear()
    assert marks.read_text() == f"{os.getpid()}\n"


def test_values_may_come_from_modules_that_the_manager_cannot_import(
    on_demand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[..., ManagerCache]
) -> None:
    cache, other = opened(on_demand), opened(on_demand)
    cache.set("first", 1)  # the manager's search path for modules is complete now
    (tmp_path / "only_here.py").write_text("class Here:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    here = importlib.import_module("only_here").Here
    cache.set("key", here())
    assert type(other.get("key")) is here
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "only_here")
    assert other.has("key") is True
    with pytest.raises(ModuleNotFoundError):
        other.get("key")


def test_caches_are_shared_only_if_they_have_the_same_name(on_demand: str, opened: Callable[..., ManagerCache]) -> None:
    one, same, other = (
        opened(on_demand, name, default_timeout=timeout) for name, timeout in (("one", 300), ("one", 0), ("other", 300))
    )
    one.set("key", 1)
    assert [same.get("key"), other.get("key"), other.add("key", 2), same.inc("key")] == [1, None, True, 2]
    other.clear()
    assert one.get("key") == 2


def test_a_missing_manager_is_an_error(data_dir: Path, opened: Callable[..., ManagerCache]) -> None:
    cache = opened(DataDirectory(data_dir).url, deadline=0.05, options=StoreOptions(start=False))
    for use in (lambda: cache.get("key"), lambda: cache.set("key", 1), lambda: cache.inc("key"), cache.clear):
        with pytest.raises(DeadlineExceeded, match="no manager is running") as error:
            use()
        assert isinstance(error.value, CounterServerError)


def test_a_closed_cache_reopens_at_the_next_call(on_demand: str, opened: Callable[..., ManagerCache]) -> None:
    cache = opened(on_demand)
    cache.set("key", 1)
    before = os.listdir("/proc/self/fd")
    cache.close()
    assert len(os.listdir("/proc/self/fd")) < len(before)
    cache.close()
    assert cache.get("key") == 1


# Several processes


def open_cache(kind: str, place: str) -> BaseCache:
    return FileSystemCache(place) if kind == "files" else ManagerCache(place, deadline=PATIENCE)


def obey(start: Any, orders: Connection) -> None:
    """Run one process of a crew: each order is a cache, a method and the arguments of each call."""
    caches: dict[tuple[str, str], BaseCache] = {}
    while True:
        try:
            kind, place, method, calls = orders.recv()
        except EOFError:
            return
        if (kind, place) not in caches:
            caches[kind, place] = open_cache(kind, place)
        call = getattr(caches[kind, place], method)
        start.wait(PATIENCE)
        orders.send([call(*arguments) for arguments in calls])


class Crew:
    """Four processes that call a cache at the same time, started by a barrier."""

    def __init__(self) -> None:
        self._start = spawn.Barrier(4)
        self._members = []
        for _ in range(4):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=obey, args=(self._start, theirs), daemon=True)
            process.start()
            theirs.close()  # only the child holds it: reading ends if the child dies
            self._members.append((process, ours))

    def call(self, kind: str, place: str, method: str, *calls: tuple[Any, ...]) -> list[list[Any]]:
        """Return the answers of each process."""
        for _, orders in self._members:
            orders.send((kind, place, method, calls))
        return [self._answer(orders) for _, orders in self._members]

    @staticmethod
    def _answer(orders: Connection) -> list[Any]:
        assert orders.poll(PATIENCE)
        answers: list[Any] = orders.recv()
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for process, orders in self._members:
            orders.close()
            process.join(PATIENCE)
            process.kill()
            process.join()
            process.close()


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew() as crew:
        yield crew


def test_4_processes_lose_increments_in_a_file_cache_and_none_in_ours(
    crew: Crew, shared_manager: str, tmp_path: Path, opened: Callable[..., ManagerCache]
) -> None:
    """The file cache uses cachelib's `inc`: get, then set. It loses some by chance, so it runs up to 100 rounds."""
    everyone = list(range(1, 401))

    def round_of(kind: str, place: str, key: str) -> list[int]:
        return sorted(value for some in crew.call(kind, place, "inc", *[(key,)] * 100) for value in some)

    rounds = (round_of("files", str(tmp_path / "files"), f"key {number}") for number in range(100))
    lossy = next((values for values in rounds if values != everyone), None)
    assert lossy is not None
    assert len(set(lossy)) < 400  # two processes got the same number
    opened(shared_manager).clear()
    for number in range(3):
        assert round_of("manager", shared_manager, f"key {number}") == everyone


def test_4_processes_that_count_up_and_down_end_where_they_started(
    crew: Crew, shared_manager: str, opened: Callable[..., ManagerCache]
) -> None:
    opened(shared_manager).clear()
    crew.call("manager", shared_manager, "inc", *[("number", 3)] * 100)
    crew.call("manager", shared_manager, "dec", *[("number", 3)] * 99)
    assert opened(shared_manager).get("number") == 4 * 3


def test_of_4_processes_that_add_a_key_exactly_one_succeeds(
    crew: Crew, shared_manager: str, opened: Callable[..., ManagerCache]
) -> None:
    opened(shared_manager).clear()
    answers = crew.call("manager", shared_manager, "add", *[(f"key {n}", n) for n in range(200)])
    assert [sum(added) for added in zip(*answers, strict=True)] == [1] * 200


def test_a_value_set_in_one_process_is_read_in_the_others(
    crew: Crew, shared_manager: str, opened: Callable[..., ManagerCache]
) -> None:
    opened(shared_manager).set("key", Point(1, Point(2)))
    assert crew.call("manager", shared_manager, "get", ("key",)) == [[Point(1, Point(2))]] * 4


# A manager that is killed


def test_a_killed_manager_leaves_an_empty_cache_and_no_error(
    on_demand: str, data_dir: Path, opened: Callable[..., ManagerCache]
) -> None:
    caches = [opened(on_demand, default_timeout=0) for _ in range(3)]
    for cache in caches:
        cache.set("key", "value")
    end_manager(data_dir / "manager.lock")
    assert [cache.get("key") for cache in caches] == [None, None, None]
    assert [caches[0].add("key", 1), caches[1].inc("key"), caches[2].get("key")] == [True, 2, 2]


@pytest.mark.parametrize(
    ("method", "arguments", "answer"),
    [
        ("get", ("key",), None),
        ("set", ("key", 2), True),
        ("add", ("key", 2), True),
        ("delete", ("key",), False),
        ("has", ("key",), False),
        ("inc", ("key",), 1),
        ("dec", ("key",), -1),
        ("clear", (), True),
        ("get_many", ("key", "key"), [None, None]),
        ("delete_many", ("key",), ["key"]),
        ("set_many", ({"key": 1},), ["key"]),
    ],
)
def test_every_method_works_as_the_first_call_after_a_loss(
    method: str, arguments: tuple[Any, ...], answer: object
) -> None:
    """The state simulates the loss, as killing a manager for each method would take long."""
    state = open_state("memory://")
    lost = iter([StateLost("begins anew")])
    invoke = state.invoke

    def forgets(name: str, operation: Invoke) -> Result:
        for error in lost:
            raise error
        return invoke(name, operation)

    state.invoke = forgets  # type: ignore[method-assign, assignment]
    cache = ManagerCache(state)
    assert getattr(cache, method)(*arguments) == answer
    assert next(lost, None) is None


def test_busy_clients_see_no_error_when_the_manager_is_killed(
    on_demand: str, data_dir: Path, opened: Callable[..., ManagerCache]
) -> None:
    """Each client counts its own key: the next number is one more, or 1 after the loss."""
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

    def progress(count: int) -> None:
        goals = [len(seen) + count for seen in numbers]
        eventually(
            lambda: (
                any(work.done() for work in works)
                or all(len(seen) >= goal for seen, goal in zip(numbers, goals, strict=True))
            ),
            "progress of all",
        )

    with ThreadPoolExecutor(4) as threads:
        works = [threads.submit(work, str(number), seen) for number, seen in enumerate(numbers)]
        try:
            for _ in range(3):
                progress(10)
                manager = holder(data_dir)
                assert manager is not None
                os.kill(manager, signal.SIGKILL)
                progress(10)
        finally:
            stop.set()
        for done in works:
            done.result()
    for seen in numbers:
        assert seen[0] == 1
        steps = list(pairwise(seen))
        assert all(after in (before + 1, 1) for before, after in steps)
        assert sum(after == 1 for _, after in steps) == 3


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


def in_context(stack: ExitStack, **config: Any) -> Cache:
    """Set it up in a new app, which is current until the test ends."""
    app = make_app()
    stack.enter_context(app.app_context())
    return caching(app, stack, **config)


@pytest.mark.parametrize("first", ["the cache", "the shared state"])
def test_flask_caching_and_a_shared_state_use_one_manager(
    on_demand: str, data_dir: Path, stack: ExitStack, first: str
) -> None:
    shared = SharedState()
    obj = shared.object("obj", SomeObj, 0)
    cache = Cache()
    app = make_app(on_demand)
    for begin in (cache, shared) if first == "the cache" else (shared, cache):
        if begin is cache:
            cache.init_app(app, config={"CACHE_TYPE": OURS})
            stack.callback(app.extensions["cache"][cache].close)
        else:
            shared.init_app(app)

    @app.get("/")
    def home() -> dict[str, object]:
        return {"obj": obj.query(), "counter": shared.counter("c").increment(), "cache": cache.cache.inc("number")}

    @app.get("/reversed")
    def cache_first() -> dict[str, object]:
        return {"cache": cache.cache.inc("number"), "counter": shared.counter("c").increment(), "obj": obj.query()}

    client = app.test_client()
    paths = ("/", "/reversed") if first == "the shared state" else ("/reversed", "/")
    for number, path in enumerate(paths, 1):
        assert client.get(path).json == {"obj": number, "counter": number, "cache": number}
    assert holder(data_dir) is not None
    with app.app_context():
        assert isinstance(cache.cache, ManagerCache)
        shared.state.close()


def test_a_view_cached_in_one_worker_is_cached_in_another(on_demand: str, stack: ExitStack) -> None:
    """Two apps with a cache each represent two workers."""
    calls: list[str] = []

    def worker(name: str) -> Flask:
        app = make_app(on_demand)
        cache = caching(app, stack)

        @app.get("/")
        @cache.cached(timeout=0)
        def home() -> str:
            calls.append(name)
            return f"made by {name}"

        @app.get("/clear")
        def clear() -> str:
            return str(cache.clear())

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
    calls: list[tuple[int, int]] = []

    @cache.memoize(timeout=0)
    def add(a: int, b: int = 1) -> int | None:
        calls.append((a, b))
        return a + b

    assert [add(1), add(1, 1), add(a=1), add(2), add(2)] == [2, 2, 2, 3, 3]
    assert calls == [(1, 1), (2, 1)]
    cache.delete_memoized(add, 1)
    assert [add(1), add(2)] == [2, 3]
    assert calls == [(1, 1), (2, 1), (1, 1)]
    cache.delete_memoized(add)
    assert [add(1), add(2)] == [2, 3]
    assert len(calls) == 5
    assert cache.clear() is True
    assert [add(1), add(2)] == [2, 3]
    assert len(calls) == 7


def test_none_can_be_cached(stack: ExitStack) -> None:
    cache = in_context(stack)
    calls: list[int] = []

    @cache.memoize(cache_none=True)
    def nothing() -> None:
        calls.append(1)

    assert [nothing(), nothing()] == [None, None]
    assert calls == [1]


def test_the_configuration_of_flask_caching_is_used(stack: ExitStack) -> None:
    cache = in_context(
        stack,
        CACHE_THRESHOLD=2,
        CACHE_DEFAULT_TIMEOUT=-1,
        CACHE_IGNORE_ERRORS=True,
        CACHE_SERIALIZER=JSONSerializer,
        CACHE_OPTIONS={"name": "own"},
    )
    ours: Any = cache.cache
    assert isinstance(ours, ManagerCache)
    assert ours.default_timeout == -1
    assert ours.ignore_delete_many_errors is True
    cache.set("over at once", 1)
    assert cache.get("over at once") is None
    cache.set("a", (1,), timeout=0)
    assert cache.get("a") == [1]
    cache.set("b", 2, timeout=0)
    cache.set("c", 3, timeout=0)
    assert cache.get_many("a", "b", "c") == [None, 2, 3]
    assert list(ours._state.declarations) == ["own"]


def test_the_defaults_are_flask_cachings(stack: ExitStack) -> None:
    ours: Any = in_context(stack).cache
    assert list(ours._state.declarations) == ["flask-caching"]
    assert ours.default_timeout == 300
    assert ours.ignore_delete_many_errors is False
    ours.set_many({str(n): n for n in range(501)})
    assert [ours.has("0"), ours.has("1"), ours.has("500")] == [False, True, True]


def test_options_of_flask_caching_take_precedence_and_may_name_another_store(
    on_demand: str, data_dir: Path, stack: ExitStack
) -> None:
    options = {"deadline": PATIENCE, "threshold": 1, "default_timeout": 0}
    places: list[dict[str, Any]] = [
        {"CACHE_ARGS": [on_demand], "CACHE_OPTIONS": options},
        {"CACHE_ARGS": [on_demand, "flask-caching"], "CACHE_OPTIONS": options},
        {"CACHE_OPTIONS": {"url": on_demand, **options}},
    ]
    for place in places:
        cache = in_context(stack, **place)
        cache.clear()
        cache.set("a", 1)
        assert holder(data_dir) is not None
        cache.set("b", 2)
        assert [cache.get("a"), cache.get("b"), cache.cache.default_timeout] == [None, 2, 0]


def test_one_app_can_have_two_caches_with_two_names(on_demand: str, stack: ExitStack) -> None:
    app = make_app(on_demand)
    stack.enter_context(app.app_context())
    one, other = (
        caching(app, stack, CACHE_THRESHOLD=entries, CACHE_OPTIONS={"name": name})
        for name, entries in (("one", 10), ("other", 20))
    )
    one.set("key", 1)
    assert other.get("key") is None
    assert [other.add("key", 2), other.clear(), one.get("key")] == [True, True, 1]


def test_an_invalid_threshold_of_flask_caching_is_refused_at_once(stack: ExitStack) -> None:
    with pytest.raises(InvalidRequest, match="the most entries"):
        in_context(stack, CACHE_THRESHOLD=0)


def test_a_view_works_without_its_cache_if_the_manager_is_missing(data_dir: Path, stack: ExitStack) -> None:
    """As with any cache, Flask-Caching logs the error and calls the view."""
    app = make_app(DataDirectory(data_dir).url, COUNTER_SERVER_START=False)
    app.config["COUNTER_SERVER_DEADLINE"] = 0.05
    cache = caching(app, stack)

    @app.get("/")
    @cache.cached()
    def home() -> str:
        return "here"

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

    @app.get("/read")
    def read() -> dict[str, Any]:
        return dict(session)

    @app.get("/clear")
    def clear() -> dict[str, Any]:
        session.clear()
        return {}

    return app


def test_a_session_started_in_one_worker_continues_in_another(
    shared_manager: str, opened: Callable[..., ManagerCache]
) -> None:
    one, other = (session_app(opened(shared_manager)) for _ in range(2))
    anna, ben = one.test_client(), one.test_client()
    numbers = []
    for _ in range(3):
        numbers += [anna.get("/inc").json["number"], ben.get("/inc").json["number"]]  # type: ignore[index]
        for browser in (anna, ben):
            browser.application = other if browser.application is one else one
    numbers.append(anna.get("/inc").json["number"])  # type: ignore[index]
    assert numbers == [1, 1, 2, 2, 3, 3, 4]
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


def test_sessions_and_flask_caching_in_one_app_are_two_caches(
    on_demand: str, stack: ExitStack, opened: Callable[..., ManagerCache]
) -> None:
    """Both have default names, and clearing the cache ends no session."""
    app = session_app(opened(on_demand))
    app.config.update(COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=PATIENCE)
    cache = caching(app, stack)
    browser = app.test_client()
    assert browser.get("/inc").json == {"number": 1}
    with app.app_context():
        cache.set("key", 1)
        cache.clear()
    assert browser.get("/inc").json == {"number": 2}


# Without optional packages


def run_without(module: str, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{module!r}] = None\n{program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_cachelib_the_error_names_the_extra() -> None:
    done = run_without("cachelib", "import counter_server.caching")
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: a cache needs cachelib: pip install 'counter-server[cache]'\n")


def test_without_flask_caching_it_works_with_cachelib_alone() -> None:
    done = run_without(
        "flask_caching",
        "from cachelib import BaseCache\n"
        "from counter_server.caching import ManagerCache\n"
        "cache = ManagerCache('memory://')\n"
        "print(isinstance(cache, BaseCache), cache.set('a', [1]), cache.get('a'), cache.inc('b'), cache.clear())\n"
        "print(cache.default_timeout, cache.ignore_delete_many_errors, cache.get_dict('a', 'b'))",
    )
    assert (done.stdout, done.stderr) == (
        "True True [1] 1 True\n300 True {'a': None, 'b': None}\n",
        "",
    )
