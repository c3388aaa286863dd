"""The shared cache follows the contract of cachelib, whose simple cache is the reference."""

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, patch

import pytest
from cachelib import BaseCache, FileSystemCache, SimpleCache
from cachelib.serializers import BaseRedisSerializer, JSONSerializer
from flask import Flask, session
from flask.testing import FlaskClient
from flask_caching import Cache
from flask_session import Session  # type: ignore[import-untyped]

from counter_server import SharedState, open_state
from counter_server.caching import ManagerCache
from counter_server.dicts import BoundedDict
from counter_server.errors import InvalidRequest, StateLost, Unsupported
from counter_server.manager.directory import DataDirectory
from tests.hosted_classes import SomeObj
from tests.load import at_once, spawn
from tests.processes import PATIENCE, end_manager, eventually
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
        assert cache.get_dict(key, "other") == {key: "value", "other": None}
        assert (cache.has(key), cache.delete(key), cache.inc(key)) == (True, True, 1)
    assert cache.set(Key.ONE, "value") is True
    assert cache.get("one") == cache.get(Key.ONE) == "value"
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


def test_a_serializer_can_be_replaced() -> None:
    cache: Any = ManagerCache("memory://")
    cache.serializer = BaseRedisSerializer()
    for value in VALUES:
        cache.set("key", value)
        assert repr(cache.get("key")) == repr(value)
    cache.serializer = JSONSerializer()
    cache.set_many({"key": ("é", 2), "number": 1})
    assert (cache.get("key"), cache.inc("number")) == (["é", 2], 2)
    with pytest.raises(pickle.PicklingError, match="bytes"):  # the serializer logs the reason and returns None
        cache.set("key", b"no JSON")
    assert cache.get("key") == ["é", 2]


def test_threads_lose_no_increment_and_exactly_one_adds_a_key(cache: BaseCache) -> None:
    values = at_once(16, lambda: [cache.inc("number") for _ in range(25)])
    assert sorted(value or 0 for some in values for value in some) == list(range(1, 401))
    assert cache.get("number") == 400
    answers = at_once(16, lambda: [cache.add(f"key {n}", threading.get_ident()) for n in range(25)])
    assert [sum(added) for added in zip(*answers, strict=True)] == [1] * 25
    assert {cache.get(f"key {n}") is not None for n in range(25)} == {True}


def test_inc_renews_an_entry_with_the_default_timeout_as_set_does() -> None:
    cache = ManagerCache("memory://", default_timeout=10)
    clock = clocked(cache)
    cache.set("brief", 1, 5)
    cache.set("long", 1, 0)
    assert (cache.inc("brief"), cache.dec("long")) == (2, 0)
    clock.now += 9.999
    assert cache.get_many("brief", "long") == [2, 0]
    clock.now += 0.001
    assert cache.get_many("brief", "long") == [None, None]
    assert cache.inc("brief") == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *(({"threshold": threshold}, "maximum number of entries") for threshold in (0, 1.5, "many")),
        *(({"url": "nonsense://x"}, "nonsense"), ({"deadline": 0}, "deadline"), ({"name": ""}, "empty")),
    ],
)
def test_an_invalid_option_is_refused_at_once(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        ManagerCache(**{"url": "memory://", **wrong})
    with pytest.raises(Unsupported, match="hosts no shared objects"):
        ManagerCache("sqlite:////nowhere/counters.db")


def test_a_value_that_cannot_be_serialised_is_an_error_and_changes_nothing() -> None:
    cache = ManagerCache("memory://")
    cache.set("key", "before")
    value = threading.Lock()
    for change in (
        lambda: cache.set("key", value),
        lambda: cache.add("new", value),
        lambda: cache.set_many({"first": 1, "new": value, "third": 3}),
    ):
        with pytest.raises(TypeError, match="pickle"):
            change()
    assert cache.get_many("key", "new", "first", "third") == ["before", None, 1, None]


class Marking:
    """A value that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return self._mark.mkdir, ()


def test_the_manager_never_unpickles_a_value(shared_manager: str, tmp_path: Path, opened: Open) -> None:
    mark = tmp_path / "mark"
    cache, other = (opened(shared_manager, "small", threshold=3) for _ in range(2))
    for key in ("one", "two", "three", "four"):  # the first is evicted
        cache.set(key, Marking(mark))
    assert cache.add("two", Marking(mark)) is False
    assert [other.has("one"), other.has("two"), other.delete("three")] == [False, True, True]
    with pytest.raises(TypeError):
        other.inc("two")
    cache.delete("two")
    assert not mark.exists()
    other.get("four")
    assert mark.exists()


def test_caches_of_one_name_share_their_entries_and_no_others(shared_manager: str, opened: Open) -> None:
    one, same = (opened(shared_manager, "one", threshold=10, default_timeout=timeout) for timeout in (300, 0))
    other = opened(shared_manager, "other", threshold=20)
    one.set("key", 1)
    assert [same.get("key"), other.get("key"), other.add("key", 2), same.inc("key")] == [1, None, True, 2]
    other.clear()
    assert one.get("key") == 2


def use(url: str) -> tuple[list[Any], list[bool], Any]:
    cache = ManagerCache(url, deadline=PATIENCE)
    cache.inc("here")
    eventually(lambda: cache.get("here") == 4, "the other processes")
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
    with ProcessPoolExecutor(4, spawn) as processes:
        numbers, added, points = zip(*processes.map(use, [shared_manager] * 4), strict=True)
    assert sorted(chain(*numbers)) == list(range(1, 401))
    assert cache.get("both ways") == 400
    assert [sum(each) for each in zip(*added, strict=True)] == [1] * 100
    assert points == (Point(1, Point(2)),) * 4


def test_a_file_cache_loses_increments_that_ours_counts(tmp_path: Path) -> None:
    """It uses cachelib's `inc`: get, then set. Here all threads have read before any writes."""
    files, barrier = FileSystemCache(str(tmp_path / "files")), threading.Barrier(4)
    get = files.get

    def simultaneous(key: str) -> Any:
        value = get(key)
        if key == "number":
            barrier.wait(PATIENCE)
        return value

    with patch.object(files, "get", simultaneous):
        assert at_once(4, lambda: files.inc("number")) == [1] * 4
    cache = ManagerCache("memory://")
    assert sorted(at_once(4, lambda: cache.inc("number"))) == [1, 2, 3, 4]


def test_every_method_works_as_the_first_call_after_a_loss() -> None:
    """The state simulates the loss, as killing a manager for each method would take long."""
    arguments: dict[str, list[Any]] = {"set": ["a", 2], "add": ["a", 2], "clear": [], "set_many": [{"a": 1}]}
    for method in ("get", "set", "add", "delete", "has", "inc", "clear", "get_many", "delete_many", "set_many"):
        state = open_state("memory://")
        lost = chain([StateLost("begins anew")], repeat(DEFAULT))
        caches = ManagerCache(state), ManagerCache("memory://")
        with patch.object(state, "invoke", wraps=state.invoke, side_effect=lost) as invoke:
            answer, of_a_new_cache = (getattr(cache, method)(*arguments.get(method, ["a"])) for cache in caches)
        assert answer == of_a_new_cache
        assert invoke.call_count >= 2


@pytest.mark.slow
def test_after_a_kill_the_cache_is_empty_and_no_call_fails(on_demand: str, data_dir: Path, opened: Open) -> None:
    caches = [opened(on_demand, default_timeout=0) for _ in range(3)]
    assert all(cache.set("key", 5) for cache in caches)
    end_manager(data_dir / "manager.lock")
    lost, added, number = caches[0].get("key"), caches[1].add("key", 1), caches[2].inc("key")
    assert (lost, added, number) == (None, True, 2)


def make_app(url: str = "memory://") -> Flask:
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_DEADLINE=PATIENCE)
    return app


def caching(app: Flask, stack: ExitStack, **config: Any) -> Cache:
    """Set up Flask-Caching with our cache in an app, until the test ends."""
    cache = Cache(app, config={"CACHE_TYPE": "counter_server.caching.ManagerCache", **config})
    stack.callback(app.extensions["cache"][cache].close)
    return cache


@pytest.mark.parametrize("cache_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_flask_caching_and_a_shared_state_use_one_manager(
    on_demand: str, stack: ExitStack, *, cache_first: bool
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
        uses: list[Callable[[], Any]] = [lambda: cache.cache.inc("number"), obj.query, shared.counter("c").increment]
        assert [use() for use in (uses if cache_first else reversed(uses))] == [1] * 3
        shared.state.close()


def test_workers_share_cached_views_and_sessions(shared_manager: str, stack: ExitStack, opened: Open) -> None:
    """Two apps represent two workers. Cache and sessions have their default names: clearing one ends no session."""
    calls: list[str] = []

    def worker(name: str) -> FlaskClient:
        app = make_app(shared_manager)
        app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=opened(shared_manager))
        Session(app)
        cache = caching(app, stack)

        @app.get("/")
        @cache.cached(timeout=0)
        def home() -> str:
            calls.append(name)
            return f"made by {name}"

        @app.get("/inc")
        def increment() -> str:
            session["number"] = session.get("number", 0) + 1
            return str(session["number"])

        app.add_url_rule("/clear", view_func=lambda: str(cache.clear()))
        return app.test_client()

    one, other = worker("one"), worker("other")
    one.get("/clear")
    assert [client.get("/").text for client in (one, other, one, other)] == ["made by one"] * 4
    visitor = worker("third")
    for number, app in enumerate((one.application, other.application, one.application), 1):
        visitor.application = app
        assert visitor.get("/inc").text == str(number)
    assert other.get("/clear").text == "True"
    assert [client.get("/").text for client in (other, one)] == ["made by other"] * 2
    assert (visitor.get("/inc").text, one.get("/inc").text, calls) == ("4", "1", ["one", "other"])


def test_a_key_prefix_keeps_two_apps_of_one_manager_apart(on_demand: str, stack: ExitStack) -> None:
    caches = [caching(make_app(on_demand), stack, CACHE_KEY_PREFIX=prefix) for prefix in ("one_", "other_", "other_")]
    one, other, same = (cache.cache for cache in caches)
    assert one.set_many({"key": "one"}) + other.set_many({"key": "other", "more": 1}) == ["key", "key", "more"]
    assert [cache.get("key") for cache in (one, other, same)] == ["one", "other", "other"]
    assert other.clear() is True
    assert [cache.get("key") for cache in (one, other, same)] == ["one", None, None]


OWN = {"deadline": PATIENCE, "threshold": 1, "default_timeout": 0}


@pytest.mark.parametrize(
    ("config", "name", "kept"),
    [
        ({"CACHE_DEFAULT_TIMEOUT": 7}, "flask-caching", 500),
        ({"CACHE_THRESHOLD": 2, "CACHE_OPTIONS": {"name": "own"}}, "own", 2),
        ({"CACHE_ARGS": ["memory://"], "CACHE_OPTIONS": OWN}, "flask-caching", 1),
        ({"CACHE_ARGS": ["memory://", "mine"], "CACHE_OPTIONS": OWN}, "mine", 1),
        ({"CACHE_OPTIONS": {"url": "memory://", **OWN}}, "flask-caching", 1),
        ({"CACHE_KEY_PREFIX": "shop_"}, "flask-caching shop_", 500),
        ({"CACHE_ARGS": ["memory://", "mine"], "CACHE_KEY_PREFIX": "shop_", "CACHE_OPTIONS": OWN}, "mine shop_", 1),
        ({"CACHE_KEY_PREFIX": ""}, "flask-caching", 500),
    ],
)
def test_the_configuration_of_flask_caching_is_used(
    stack: ExitStack, config: dict[str, Any], name: str, kept: int
) -> None:
    """Its options take precedence, and may name another store."""
    app = make_app("manager:///nowhere" if "memory://" in str(config) else "memory://")
    stack.enter_context(app.app_context())
    ours: Any = caching(app, stack, CACHE_SERIALIZER=JSONSerializer, CACHE_IGNORE_ERRORS=True, **config).cache
    options = config.get("CACHE_OPTIONS", {})
    assert ours.default_timeout == options.get("default_timeout", config.get("CACHE_DEFAULT_TIMEOUT", 300))
    assert ours.ignore_delete_many_errors is True
    assert list(ours._state.declarations) == [name]
    ours.set_many({str(n): (n,) for n in range(kept + 1)})
    assert [ours.get("0"), ours.get("1"), ours.get(str(kept))] == [None, [1], [kept]]
