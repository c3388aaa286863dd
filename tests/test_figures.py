"""What the manager knows about itself, in its status, the metrics and the page: calls, entries, commits, processes."""

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from cachetools import TLRUCache
from flask import Flask
from msgspec import msgpack
from msgspec.structs import replace
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from counter_server import State, open_state
from counter_server.dicts import BoundedDict
from counter_server.errors import StartupError
from counter_server.figures import CallFigures, Durations
from counter_server.journal import Journal
from counter_server.ledger import Changes
from counter_server.operations import Batch, Invoke
from counter_server.plain import encode_plain
from counter_server.server.web import create_app, health
from counter_server.status import COMMIT_BOUNDS, ConnectedProcess, LastError, ObjectStatus, Status
from counter_server.windows import Windows
from tests.hosted_classes import Refusing, Slow, SomeObj, Toolbox
from tests.load import at_once, open_client
from tests.processes import PATIENCE, ROOT, Manager, Program, eventually
from tests.test_dashboard import STATUS, TOKEN, application
from tests.test_dicts import Clock
from tests.test_objects import Scene

slow = pytest.mark.slow


def status_of(state: State) -> Status:
    return cast(Status, state.status())


def object_of(state: State, name: str) -> ObjectStatus:
    (found,) = (each for each in status_of(state).hosted if each.name == name)
    return found


# Calls


def test_each_call_is_counted_once_with_its_error_and_its_time() -> None:
    scene = Scene(Toolbox)
    scene.apply(("add", "one"), ("fail",), ("nothing_like_it",), ("break_pickle",))
    first = scene.hosted.status()
    assert (first.name, first.cls, first.durable) == ("obj", "tests.hosted_classes.Toolbox", True)
    assert (first.calls, first.errors, first.running) == (4, 3, 0)
    assert first.slowest_seconds > 0
    assert first.slowest_method in ("add", "fail", "break_pickle")
    assert first.last_error is not None
    assert (first.last_error.kind, "cannot be pickled" in first.last_error.text) == ("InvalidRequest", True)
    scene.apply(("fail",), sequence=1)  # sent again
    assert scene.hosted.status() == first
    scene.sent = 1
    scene.apply(("fail_in_its_own_way",))
    error = scene.hosted.status().last_error
    assert error is not None
    assert (error.kind, error.text) == ("tests.hosted_classes.OwnError", "no tool")
    assert error.time >= first.last_error.time


def test_the_text_of_an_error_is_shortened_and_controls_no_terminal() -> None:
    scene = Scene(BoundedDict, 5, durable=False)
    arguments = encode_plain(((), {"\x1b[2J\n" + "x" * 500: 1}), "arguments")
    scene.hosted.apply(Batch(b"c" * 16, 1, [Invoke("find", arguments)]))
    error = scene.hosted.status().last_error
    assert error is not None
    assert (error.kind, "[2J" in error.text) == ("TypeError", True)
    assert len(error.text) <= 200
    assert error.text.isprintable()


def test_calls_of_several_threads_are_all_seen_and_the_slowest_wins() -> None:
    figures = CallFigures()
    ready, go_on = threading.Barrier(9), threading.Event()
    lasting = iter(range(1, 9))
    choosing = threading.Lock()

    def call() -> None:
        with choosing:
            seconds = next(lasting)
        began = figures.begin(f"m{seconds}")
        ready.wait(PATIENCE)
        assert go_on.wait(PATIENCE)
        figures.end(f"m{seconds}", began - seconds)
        figures.count([])

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    ready.wait(PATIENCE)
    assert sorted(method for method, _ in figures.running.values()) == [f"m{number}" for number in range(1, 9)]
    go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert figures.running == {}
    assert (figures.slowest[1], int(figures.slowest[0])) == ("m8", 8)


# Entries


def test_a_dict_counts_hits_misses_evictions_and_what_expired() -> None:
    clock = Clock()
    numbers = BoundedDict(2, clock)
    numbers.set("a", 1, 1.0)
    numbers.set("b", 2, None)
    assert (numbers.find("a"), numbers.find("x")) == ((1,), ())
    numbers.set("c", 3, None)  # instead of b
    numbers.set("c", 4, None)
    now = numbers.entries
    assert (now.kind, now.now, now.most) == ("dict", 2, 2)
    assert (now.hits, now.misses, now.evictions, now.expired) == (1, 1, 1, 0)
    clock.now = 2.0
    assert numbers.entries.now == 2, "looking removes nothing"
    numbers.set("d", 5, None)  # instead of a, which has expired
    now = numbers.entries
    assert (now.now, now.evictions, now.expired) == (2, 1, 1)


def test_the_figures_of_a_dict_are_not_in_its_state_and_a_state_of_before_counts_too() -> None:
    numbers = BoundedDict(2)
    numbers.set("a", 1, None)
    state = pickle.dumps(numbers)
    numbers.find("x")
    assert pickle.dumps(numbers) == state
    assert b"_Entries" not in state.replace(b"_entries", b"")
    loaded = pickle.loads(state)  # noqa: S301 - our own
    for key in ("b", "c"):
        loaded.set(key, 2, None)
    assert (loaded.entries.evictions, loaded.find("a"), loaded.find("c")) == (1, (), (2,))
    assert type(numbers._entries).__mro__[1] is TLRUCache


def test_a_limit_shows_its_windows() -> None:
    windows = Windows()
    windows.incr("a", 60)
    windows.acquire_entry("b", 5, 60)
    assert (windows.entries.kind, windows.entries.now, windows.entries.hits) == ("limit", 2, None)


# Commits


def test_commits_fall_into_buckets_apart_for_counters_and_objects(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite3")
    for number in range(3):
        journal.commit(Changes(now=1.0, counters={"a": number}))
    journal.commit(Changes(now=1.0, objects={"o": b"state"}))
    counters, objects = journal.counters.now(), journal.objects.now()
    journal.close()
    assert (counters.number, objects.number) == (3, 1)
    assert counters.seconds > 0
    durations = Durations()
    for seconds in (0.0001, 0.00011, 11.0):
        durations.add(seconds)
    assert (durations.now().counts[:2], durations.now().counts[-1]) == ([1, 1], 1)
    assert len(durations.now().counts) == len(COMMIT_BOUNDS) + 1


# The metrics


HARD_NAMES = ['quote"d', "back\\slash", "{a=b}", "# x", "größe\u202e", "a,b}", "' '", "\U0001f426"]


def metrics(app: Flask, **headers: str) -> str:
    response = app.test_client().get("/metrics", headers=headers)
    assert response.status_code == 200
    return response.text


def samples(text: str, name: str) -> dict[str, float]:
    """Return the values of a metric by its object or name, as Prometheus' own parser of that format reads them."""
    parse = openmetrics_parser if text.endswith("# EOF\n") else parser
    families = list(cast(Any, parse).text_string_to_metric_families(text))
    found = [sample for family in families for sample in family.samples if sample.name == f"counter_server_{name}"]
    return {sample.labels.get("object", sample.labels.get("name", "")): sample.value for sample in found}


def app_with(*patterns: str, url: str = "memory://") -> tuple[Flask, State]:
    app = create_app({"COUNTER_SERVER_STORE": url, "COUNTER_SERVER_METRICS_COUNTERS": list(patterns)})
    return app, app.extensions["counter_server"]


def test_the_metrics_have_the_counters_that_the_operator_names_whatever_their_names() -> None:
    app, state = app_with("hard/*", "orders.*.eu", "one", "none", "[x]?")
    hard = [f"hard/{name}" for name in HARD_NAMES]
    chosen = {**{name: number for number, name in enumerate(hard)}, "orders.1.eu": -5, "one": 7, "xy": 2**62}
    for name, value in {**chosen, "orders.1.us": 1, "ones": 1, "xyz": 1, "y": 1, "hard": 1}.items():
        state.counter(name).set(value)
    for accept in ("text/plain", "application/openmetrics-text;version=1.0.0"):
        text = metrics(app, Accept=accept)
        assert samples(text, "counter") == chosen
        assert samples(text, "counters_cut") == {"": 0}
    assert samples(metrics(app_with()[0]), "counter") == {}


def test_the_program_tells_its_version() -> None:
    text = metrics(app_with()[0])
    (family,) = (
        each for each in parser.text_string_to_metric_families(text) if each.name == "counter_server_build_info"
    )
    assert {*family.samples[0].labels} == {"version", "python"}
    assert family.samples[0].labels["python"] == ".".join(map(str, sys.version_info[:3]))


def test_too_many_counters_or_too_little_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = app_with("a*")
    for number in range(30):
        state.counter(f"a{number}").increment()
    monkeypatch.setattr("counter_server.server.web.metrics._MOST_NAMED", 29)
    text = metrics(app)
    assert (len(samples(text, "counter")), samples(text, "counters_cut")) == (29, {"": 1})
    monkeypatch.setattr("counter_server.server.web.metrics._MOST_NAMED", 30)
    assert samples(metrics(app), "counters_cut") == {"": 0}
    monkeypatch.setattr(health, "_SECONDS", 0.0)
    text = metrics(app)
    assert (samples(text, "counter"), samples(text, "counters_cut")) == ({}, {"": 1})


@pytest.mark.parametrize("patterns", ["orders.*", [""], ["a\nb"], [7], 7, ["x" * 256]])
def test_a_pattern_that_matches_no_name_is_refused_at_the_start(patterns: object) -> None:
    with pytest.raises(StartupError, match="pattern"):
        create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_METRICS_COUNTERS": patterns})


def test_only_what_the_prefix_of_a_pattern_leaves_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    app, state = app_with("m/*")
    for name in ("a", "m/1", "z"):
        state.counter(name).increment()
    asked: list[Any] = []
    submit = State.submit

    def noted(self: State, operation: Any, **options: Any) -> Any:
        asked.append(operation)
        return submit(self, operation, **options)

    monkeypatch.setattr(State, "submit", noted)
    assert samples(metrics(app), "counter") == {"m/1": 1}
    assert [operation.after for operation in asked if hasattr(operation, "after")] == ["m/"]


# The page


SHOWN = replace(
    STATUS,
    hosted=[
        ObjectStatus(
            name="basket",
            cls="shop.Basket",
            durable=True,
            calls=1234,
            errors=5,
            slowest_seconds=0.25,
            slowest_method="pay",
            last_error=LastError("shop.CardError", "no card of anna@example.org", 0.0),
        ),
        ObjectStatus(name="broken", cls="shop.Broken", durable=True, not_made="Broken('secret') cannot be made"),
        replace(Scene(BoundedDict, 10, durable=False).hosted.status(), name="carts"),
    ],
    processes=[ConnectedProcess(pid=77, command="/usr/bin/python app.py --password=secret", connections=2, since=0.0)],
    more_processes=3,
)


@pytest.mark.parametrize("is_operator", [False, True])
def test_what_may_hold_a_secret_is_shown_to_operators_only(
    monkeypatch: pytest.MonkeyPatch, *, is_operator: bool
) -> None:
    monkeypatch.setattr(State, "status", lambda _state: SHOWN)
    client = application("memory://", host="127.0.0.1" if is_operator else "0.0.0.0", token=None).test_client()
    for text in (client.get("/counters").text, client.get("/counters.json").text):
        for secret in ("anna@example.org", "secret", "app.py"):
            assert (secret in text) is is_operator, secret
        for shown in ("basket", "shop.Basket", "1,234", "pay, 250 ms", "shop.CardError", "1970-01-01 00:00:00 UTC"):
            assert shown in text, shown
    assert "3 other processes are not shown" in client.get("/counters").text
    found = client.get("/counters.json").get_json()["tables"]
    assert [row["name"] for row in found["entries"]] == ["carts"]
    assert (found["entries"][0]["now"], found["entries"][0]["most"]) == ("0", "10")
    assert found["connected"][0]["command"].startswith("/usr/bin/python app" if is_operator else "python")


def test_a_store_without_figures_says_so_once() -> None:
    text = application("memory://", token=TOKEN).test_client().get("/counters").text
    assert text.count("memory:// reports no figures, shared objects or connected processes") == 1
    assert 'id="objects"' not in text


# Real managers


USER = """
import os, sys
from counter_server import open_state
state = open_state(sys.argv[1])
print("used", state.counter("x").increment(), flush=True)
os.read(int(sys.argv[3]), 1)
"""


@slow
def test_a_status_knows_the_processes_that_call_the_manager(
    start_manager: Callable[..., Manager], stack: ExitStack, tmp_path: Path
) -> None:
    manager = start_manager()
    read, write = os.pipe()
    stack.callback(os.close, write)
    user = tmp_path / "user.py"
    user.write_text(USER)
    programs = []
    for number in range(4):
        program = Program(
            user,
            manager.url,
            f"process-{number}",
            str(read),
            descriptors=(read,),
            environment={"PYTHONPATH": str(ROOT)},
        )
        programs.append(stack.enter_context(program))
    os.close(read)
    for program in programs:
        program.expect("used")
    with open_client(manager.url) as state:
        found = {each.pid: each for each in status_of(state).processes}
        assert set(found) == {program.pid for program in programs}, "whoever only watches is not shown"
        for number, program in enumerate(programs):
            line = f"{sys.executable} {user} {manager.url} process-{number} {read}"
            assert found[program.pid].command == (line if len(line) <= 200 else f"{line[:199]}…")
            assert found[program.pid].connections == 1
        state.counter("x").increment()
        assert {each.pid for each in status_of(state).processes} == {*found, os.getpid()}
        programs[0].kill()
        eventually(lambda: len(status_of(state).processes) == 4, "the end of one")
        state.status()
        text = metrics(create_app({"COUNTER_SERVER_STORE": manager.url, "COUNTER_SERVER_START": False}))
        assert samples(text, "connected_processes") == {"": 4}


@slow
def test_a_status_waits_for_no_method_and_begins_with_the_manager(
    on_demand: str, tmp_path: Path, stack: ExitStack
) -> None:
    state = stack.enter_context(open_state(on_demand, deadline=2 * PATIENCE))
    waiting, box = state.object("slow", Slow, durable=False), state.object("box", Toolbox)
    gate = tmp_path / "gate"
    thread = threading.Thread(target=waiting.wait_for, args=(str(gate),))
    box.add("a")
    thread.start()
    try:
        eventually(lambda: object_of(state, "slow").running == 1, "the call")
        assert status_of(state).slow_calls == []
        with pytest.raises(KeyError):
            box.fail()
        found = object_of(state, "box")
        assert (found.calls, found.errors, found.slowest_method in ("add", "fail")) == (2, 1, True)
        assert found.last_error is not None
        assert (found.last_error.kind, found.last_error.text) == ("KeyError", "('no such tool', 7)")
    finally:
        gate.touch()
        thread.join(PATIENCE)
    assert (object_of(state, "slow").running, object_of(state, "slow").calls) == (0, 1)
    times = status_of(state).commit_times
    assert (times["objects"].number >= 2, times["counters"].number) == (True, 0)
    os.kill(status_of(state).pid, signal.SIGKILL)
    assert box.count() == 2  # what it holds is on the disk; its figures are of the new manager
    assert object_of(state, "box").calls == 1


@slow
def test_an_object_that_could_not_be_made_is_named_everywhere(on_demand: str) -> None:
    from counter_server.cli.upkeep import diagnose

    with open_state(on_demand, deadline=2 * PATIENCE) as state:
        refusing, numbers = state.object("refusing", Refusing), state.object("numbers", SomeObj, 0)
        assert numbers.query() == 1
        with pytest.raises(StartupError):
            refusing.anything()
        found = object_of(state, "refusing")
        assert (found.cls, "ValueError: not today" in found.not_made) == ("tests.hosted_classes.Refusing", True)
        _, findings = diagnose(on_demand, PATIENCE)
        assert any(each.level == "problem" and "not today" in each.sentence for each in findings)
        text = metrics(create_app({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_START": False}))
        assert samples(text, "object_made")["refusing"] == 0
        assert samples(text, "object_made")["numbers"] == samples(text, "object_calls_total")["numbers"] == 1


@slow
def test_the_metrics_have_dicts_that_evict(on_demand: str) -> None:
    with open_state(on_demand, deadline=2 * PATIENCE) as state:
        carts = state.dict('carts "1"', max_entries=2)
        for number in range(5):
            carts.set(number, number)
        assert carts.get(0, "none") == "none"
        assert carts.get(4) == 4
        for accept in ("text/plain", "application/openmetrics-text;version=1.0.0"):
            app = create_app({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_START": False})
            text = metrics(app, Accept=accept)
            names = ("entries", "most_entries", "hits_total", "misses_total", "evictions_total", "expirations_total")
            assert [samples(text, f"object_{name}")['carts "1"'] for name in names] == [2, 2, 1, 1, 3, 0]


@slow
def test_a_status_is_bounded(on_demand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_state(on_demand, deadline=2 * PATIENCE) as state:
        dicts = [state.dict(f"dict {number}") for number in range(1005)]
        dicts[0].set("a", 1)
        found = status_of(state)
        assert (found.objects, len(found.hosted)) == (1005, 1000)
        assert len(msgpack.encode(found)) < 2**20


def test_reading_figures_while_calls_are_made_never_fails() -> None:
    scene = Scene(BoundedDict, 50, durable=False)
    done = threading.Event()

    def read() -> int:
        number = 0
        while not done.is_set() or not number:
            found = scene.hosted.status()
            assert found.entries is not None
            assert 0 <= found.entries.now <= 50
            assert found.errors == 0
            number += 1
        return number

    def write() -> int:
        try:
            for number in range(1000):
                scene.call("set", number, number, None)
        finally:
            done.set()
        return 0

    turn = iter([write, read, read])
    taking = threading.Lock()

    def work() -> int:
        with taking:
            mine = next(turn)
        return mine()

    at_once(3, work)
    found = scene.hosted.status()
    assert (found.calls, found.entries and found.entries.evictions) == (1000, 950)
