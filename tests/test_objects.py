"""Shared objects of plain classes are the same for all workers, and each call is made exactly once."""

import pickle
import time
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from flask import Flask
from msgspec import msgpack
from msgspec.structs import replace

from counter_server import CounterServerError, SharedState, State, StoreOptions, errors, objects, open_state, plain
from counter_server.cli.upkeep import diagnose
from counter_server.ledger import CLIENT_LIFETIME, Changes, ClientRecord
from counter_server.manager.server import SLOW_SECONDS
from counter_server.manager.wire import largest_frame
from counter_server.objects import LARGEST_CALL_BATCH, Busy, Declaration, HostedObject, declare
from counter_server.operations import Batch, Increment, Invoke, Operation, Refusal, Result, Returned
from counter_server.plain import decode_plain, encode_plain
from counter_server.server.web import create_app
from counter_server.settings import LARGEST_VALUE
from counter_server.state import SharedObject
from tests import hosted_classes
from tests.hosted_classes import (
    Access,
    Colour,
    Entries,
    Level,
    Measured,
    OneWay,
    OwnError,
    Point,
    Refusing,
    Slow,
    SomeObj,
    Spoiled,
    Toolbox,
    Word,
)
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, Program, end_manager, eventually, holder

slow = pytest.mark.slow


@pytest.fixture(params=["memory", pytest.param("manager", marks=slow)])
def state(request: pytest.FixtureRequest, on_demand: str) -> Iterator[State]:
    with open_state("memory://" if request.param == "memory" else on_demand, deadline=2 * PATIENCE) as state:
        yield state


@pytest.fixture
def toolbox(state: State) -> Any:
    return state.object("toolbox", Toolbox)


NOT_PLAIN: list[Any] = [
    *(
        object(),
        Toolbox,
        1j,
        [1j],
        {"a": {1j}},
        "\ud800",
        OrderedDict(),
        defaultdict(int),
        type("Number", (int,), {})(1),
    ),
    *(cast(Any, namedtuple("Pair", "a b"))(1, 2), Entries(), Point, Colour, make_dataclass("Local", ["x"])(1)),
    Enum("Local", "ONE").ONE,  # type: ignore[attr-defined]
]


def patient(url: str, **options: Any) -> State:
    return open_state(url, deadline=PATIENCE, options=StoreOptions(**options))


# Calls


def test_plain_data_is_returned_unchanged_and_other_data_refused(toolbox: Any) -> None:
    plain: list[Any] = [None, True, -1, 2**64, -(2**200), "é", b"\x00\xff", [1, [2]], (), (1, (2,)), {"a": (1,)}]
    for value in (*plain, {1: 2, None: 3, (1, 2): [4], b"x": 5.0}):
        assert repr(toolbox.echo(value, word=value)) == repr(((value,), {"word": value}))
    for value in NOT_PLAIN:
        with pytest.raises(errors.InvalidRequest, match=r"the arguments of toolbox\.add cannot be sent"):
            toolbox.add(value)
    with pytest.raises(errors.InvalidRequest, match="at most"):
        toolbox.add("x" * (LARGEST_VALUE + 1))
    assert toolbox.count() == 0


def test_values_of_known_classes_are_returned_as_what_they_were(toolbox: Any) -> None:
    measured, made = Measured("m"), Measured.made
    zones = UTC, timezone(timedelta(hours=5), "five"), ZoneInfo("Europe/Berlin")
    values: list[Any] = [
        *(datetime(2026, 1, 1, 5, tzinfo=zone, fold=1) for zone in (None, *zones)),
        *(date(2026, 1, 1), time_of_day(5, 6, 7, 8), time_of_day(5, tzinfo=zones[1], fold=1), timedelta(-1, 2, 3)),
        *(Decimal("1.50"), Decimal("NaN"), UUID(int=7), {(2,)}, frozenset({UUID(int=1)}), set()),
        *(Level.LOW, Word.YES, Access.READ, Access.READ | Access.WRITE, Access(0)),
        *({Level.LOW: [{date(2026, 1, 1)}], Point(1): Point(2, seen=["a"])}, measured),
    ]
    for value in values:
        (returned,), words = toolbox.echo(value, word=value)
        assert (repr(returned), repr(words["word"]), type(returned)) == (repr(value), repr(value), type(value))
    assert toolbox.echo(Colour.RED, {1, "a", None}) == ((Colour.RED, {1, "a", None}), {})
    assert toolbox.change(toolbox.change(Point(1))) == Point(1)
    assert Measured.made == made  # nothing calls a constructor again


def test_a_result_that_cannot_be_sent_or_read_says_that_the_call_was_made(
    toolbox: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.ResultLost, match=r"OrderedDict is not plain data.*; the call was made, and its") as lost:
        toolbox.give()
    assert (lost.value.outcome, toolbox.count()) == ("unknown", 1)
    monkeypatch.delattr(hosted_classes, "Word")  # from this process
    with pytest.raises(errors.ResultLost, match="the call was made"):
        toolbox.give_word()
    assert toolbox.count() == 2


def test_arguments_of_a_class_that_the_manager_lacks_are_refused(state: State, toolbox: Any) -> None:
    packed = encode_plain(((Level.LOW,), {}), "arguments")
    state.invoke("toolbox", Invoke("add", packed))
    with pytest.raises(errors.InvalidRequest, match=r"hosted_classes\.Lofty is not found here") as refused:
        state.invoke("toolbox", Invoke("add", packed.replace(b"Level", b"Lofty")))
    assert (refused.value.outcome, toolbox.count()) == ("not_applied", 1)


def test_a_setting_lets_values_be_larger_in_the_manager_too(on_demand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_app(url: str, size: int) -> Flask:
        app = Flask(__name__)
        app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_DEADLINE=PATIENCE, COUNTER_SERVER_LARGEST_VALUE=size)
        shared.init_app(app)
        return app

    monkeypatch.setenv("COUNTER_SERVER_LARGEST_VALUE", "")
    monkeypatch.setattr(plain, "_largest_value", None)
    shared = SharedState()
    toolbox = shared.object("toolbox", Toolbox, durable=True)
    large = "x" * (5 * LARGEST_VALUE)
    with make_app(f"{on_demand}-small", LARGEST_VALUE).app_context() as context:
        assert toolbox.count() == 0
        make_app("memory://", 6 * LARGEST_VALUE)  # in the same process, but this manager was started before
        with pytest.raises(
            errors.InvalidRequest, match=r"at most 1048576 .*COUNTER_SERVER_LARGEST_VALUE; the call was"
        ):
            toolbox.add(large)
        assert toolbox.count() == 0
        context.app.extensions["counter_server"].close()
    app = make_app(on_demand, 2 * LARGEST_VALUE)

    def echo() -> int:
        with app.app_context():
            return len(cast(Any, toolbox).echo(large)[0][0])

    with app.app_context():
        assert toolbox.add(large) == 1
    assert at_once(16, echo) == [len(large)] * 16
    app.extensions["counter_server"].close()


def test_many_large_arguments_at_once_fit(toolbox: Any) -> None:
    large = "x" * (LARGEST_VALUE - 100)
    assert at_once(16, lambda: len(toolbox.echo(large)[0][0])) == [len(large)] * 16
    call = Invoke("m" * 255, bytes(LARGEST_VALUE))
    assert len(msgpack.encode(Batch(b"c" * 16, 2**63, [call] * LARGEST_CALL_BATCH))) < largest_frame() - 1000


def test_errors_of_a_method_reach_its_caller(toolbox: Any) -> None:
    with pytest.raises(KeyError) as error:
        toolbox.fail()
    assert error.value.args == ("no such tool", 7)
    assert "hosted_classes.py" in error.value.__notes__[0]
    assert toolbox.count() == 1  # it was called once
    with pytest.raises(OwnError) as own:
        toolbox.fail_in_its_own_way()
    assert (str(own.value), own.value.item, own.value.number) == ("no tool", "tool", 5)
    assert "hosted_classes.py" in own.value.__notes__[0]


def test_an_error_of_a_class_that_is_not_known_here_is_remote(toolbox: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hosted_classes, "OtherError")
    with pytest.raises(errors.RemoteError) as other:
        toolbox.fail_in_another_way()
    assert (other.value.name, other.value.text) == (f"{hosted_classes.__name__}.OtherError", "with a message")
    assert (isinstance(other.value, CounterServerError), other.value.outcome) == (False, "unknown")
    assert "hosted_classes.py" in other.value.remote_traceback
    with pytest.raises(errors.RemoteError, match="InvalidRequest: of another call"):  # it would say nothing was sent
        toolbox.fail_as_this_package()


def test_a_method_whose_error_is_hard_to_tell_was_called_once(state: State) -> None:
    awkward = state.object("awkward", hosted_classes.Awkward)
    kinds: dict[str, Any] = {
        "a place that is none": (SyntaxError, errors.RemoteError),
        "notes that end the program": OwnError,
        "a message longer than a frame": OwnError,
        "a message that ends the program": hosted_classes.UntellableError,
        "a strange message": hosted_classes.StrangeError,
        "a number too long for str()": KeyError,
        "a message that cannot be encoded": ValueError,
        "arguments longer than a frame": ValueError,
    }
    for number, how in enumerate(hosted_classes.awkward_errors(), 1):
        with pytest.raises(kinds.get(how, errors.RemoteError)):
            awkward.fail(how)
        assert awkward.count() == number, how


def test_only_public_methods_can_be_called(state: State, toolbox: Any) -> None:
    handle = SharedObject("toolbox", Toolbox, state)
    for name in ("_private", "__init__", "__class__", "__reduce__"):
        with pytest.raises(AttributeError, match="only public methods of Toolbox are shared"):
            handle.__getattr__(name)
        with pytest.raises(errors.InvalidRequest, match="public method"):
            Invoke(name, b"")
    for name in ("items", "kind", "nothing"):
        with pytest.raises(AttributeError, match=f"only public methods of Toolbox are shared, not '{name}'"):
            getattr(toolbox, name)
        with pytest.raises(errors.Unsupported, match=f"no public method '{name}'"):  # not even directly in the manager
            state.invoke("toolbox", Invoke(name, b""))
    with pytest.raises(AttributeError, match="setting 'kind' would change this handle only"):
        toolbox.kind = 5


# Declarations


def test_a_name_declares_one_importable_class(state: State) -> None:
    class Local:
        pass

    for wrong in (Local, lambda: None, hosted_classes.not_a_class, SomeObj(0)):
        with pytest.raises(errors.InvalidRequest):
            state.object("wrong", wrong)  # type: ignore[arg-type]
    one = state.object("obj", SomeObj, 0)
    assert [one.query(), state.object("obj", SomeObj, 0).query()] == [1, 2]
    for declare_again in (lambda: state.object("obj", SomeObj, 1), lambda: state.object("obj", Toolbox)):
        with pytest.raises(errors.InvalidRequest, match="already has that name"):
            declare_again()
    assert state.counter("obj").increment() == 1  # counters have names of their own


def test_a_declaration_shows_its_class_and_arguments() -> None:
    durable = declare("obj", SomeObj, (1,), {"x": "y" * 99}, durable=True)
    assert len(str(durable)) < 90
    assert str(durable).startswith("obj = tests.hosted_classes.SomeObj(1, x='yyyy")
    assert str(declare("obj", SomeObj, (), {}, durable=False)) == ("obj = tests.hosted_classes.SomeObj(durable=False)")
    assert Declaration("obj", "module", "Class", b"").durable
    for name, cls, reason in (("", SomeObj, "name"), ("x", hosted_classes.not_a_class, "declared with its class")):
        with pytest.raises(errors.InvalidRequest, match=reason):
            declare(name, cls, (), {}, durable=False)  # type: ignore[arg-type]


def test_a_declaration_means_a_class_by_its_module_or_its_file() -> None:
    first = Declaration("obj", "app", "Obj", b"", file=b"/srv/app.py")
    for same in (replace(first, module="shell"), replace(first, file=b"/next/app.py"), replace(first, durable=False)):
        assert first.means(same)
    for other in (replace(first, qualname="Other"), replace(first, module="new", file=b"/srv/new.py")):
        assert not first.means(other)
    assert not replace(first, file=b"").means(replace(first, module="shell", file=b""))
    moved = replace(first, module="new", file=b"/srv/new.py").after(first)
    assert moved.means(first)
    assert moved.means(replace(first, module="new"))
    assert not first.means(moved)


def test_arguments_over_the_size_of_the_managers_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(Toolbox)
    large = encode_plain((("x" * (LARGEST_VALUE - 100),), {}), "arguments")
    for name in ("LARGEST_VALUE", "_largest_value"):
        monkeypatch.setattr(plain, name, 1000)
    (refused,) = scene.hosted.apply(Batch(b"c" * 16, 1, [Invoke("add", large)]))
    assert isinstance(refused, Refusal)
    assert (refused.code, "the call was not made" in refused.message) == ("invalid", True)
    assert scene.call("count", sequence=2) == 0


def test_a_handle_without_init_app_names_the_missing_call() -> None:
    app = Flask(__name__)
    app.config["COUNTER_SERVER_STORE"] = "memory://"
    SharedState(app)
    stray = SharedState().object("obj", SomeObj, 0)
    with app.app_context(), pytest.raises(errors.NotHosted, match="init_app"):
        stray.query()


# The object in its process


class Failed(BaseException):
    """What ends the process of an object whose memory may differ from the disk."""


class Scene:
    """An object without a process, whose clock and journal a test has. A commit raises the error, if there is one."""

    def __init__(self, cls: type, *arguments: object, durable: bool = True, **options: Any) -> None:
        self.now, self.sent = 5.0, 0
        self.error: Exception | None = None
        self.made: list[Changes] = []
        declaration = declare("obj", cls, arguments, {}, durable=durable)
        self.hosted = HostedObject(declaration, lambda: self.now, journal=self, fail=self.fail, **options)

    def commit(self, changes: Changes) -> None:
        if self.error:
            raise self.error
        self.made.append(changes)

    def fail(self, error: BaseException) -> NoReturn:
        raise Failed from error

    def apply(self, *calls: tuple[Any, ...], sequence: int = 0, client: bytes = b"c" * 16) -> list[Result]:
        self.sent = sequence or self.sent + 1
        made: list[Operation] = [Invoke(name, encode_plain((arguments, {}), "arguments")) for name, *arguments in calls]
        results = self.hosted.apply(Batch(client, self.sent, made))
        assert (self.hosted.figures.running, self.hosted._lock.locked()) == ({}, False)
        return results

    def call(self, *call: Any, **options: Any) -> Any:
        (result,) = self.apply(call, **options)
        return decode_plain(result.value) if isinstance(result, Returned) else result


def test_a_batch_is_answered_once_and_committed_with_its_state() -> None:
    scene = Scene(Toolbox, most_clients=1)
    results = scene.apply(("add", "one"), ("break_pickle",), ("add", "two"))
    assert [type(result) for result in results] == [Returned, Refusal, Returned]
    assert scene.apply(("fail",), sequence=1) is results
    (changes,) = scene.made
    assert (changes.now, pickle.loads(changes.objects["obj"] or b"").items) == (5.0, ["one", "two"])  # noqa: S301
    assert changes.clients == {b"c" * 16: ClientRecord(1, results, 5.0, "obj")}
    with pytest.raises(errors.BatchRefused, match="batch 3 does not follow batch 1"):
        scene.apply(("count",), sequence=3)
    assert not scene.hosted._lock.locked()
    refused = scene.apply(("count",), ("count",), client=b"d" * 16, sequence=1)
    assert [cast(Refusal, result).code for result in refused] == ["storage_full"] * 2  # there is no room for it
    scene.now += CLIENT_LIFETIME + 1
    scene.sent = 1
    assert scene.call("count", client=b"e" * 16, sequence=1) == 2
    assert scene.made[-1].clients.keys() == {b"c" * 16, b"e" * 16}
    assert scene.made[-1].clients[b"c" * 16] is None
    (unsupported,) = scene.hosted.apply(Batch(b"e" * 16, 2, [Increment("c")]))
    assert unsupported == Refusal("unsupported", "obj is a shared object, not a counter")
    scene = Scene(SomeObj, 0, durable=False)
    assert (scene.call("query"), scene.call("query"), scene.made) == (1, 2, [])


def test_an_object_is_restored_from_its_state_and_clients() -> None:
    box = Toolbox()
    box.items = ["kept"]
    moved = pickle.dumps(box, 4).replace(b"hosted_classes", b"hosted_clazzes")  # before its module was renamed
    known = ClientRecord(7, [Refusal("invalid", "as before")], 1.0, "obj")
    scene = Scene(Toolbox, state=moved, clients={b"c" * 16: known})
    assert scene.apply(("count",), sequence=7) == known.results
    assert scene.call("count") == 1
    for cls, state in ((OneWay, None), (Toolbox, b"no pickle")):
        with pytest.raises(
            errors.StartupError, match=r"obj = tests.*cannot be made: .*cannot be restored from its state"
        ):
            Scene(cls, state=state)


def test_a_refused_commit_undoes_the_call_other_failures_end_it() -> None:
    scene = Scene(SomeObj, 0)
    assert [scene.call("query"), scene.call("query")] == [1, 2]
    scene.error = errors.StorageFull("no room")
    refused = scene.call("query")
    assert refused == Refusal("storage_full", "no room")
    scene.error = None
    assert scene.call("query", sequence=3) == refused  # a refusal stays one
    assert scene.call("query") == 3
    scene.now += CLIENT_LIFETIME + 1
    assert scene.call("query", client=b"e" * 16, sequence=1) == 4
    assert scene.made[-1].clients[b"c" * 16] is None  # forgotten
    scene.sent, scene.error = 0, OSError()
    with pytest.raises(Failed):
        scene.call("query")


def test_a_call_whose_state_cannot_be_kept_is_made_once_and_undone(tmp_path: Path) -> None:
    scene = Scene(Spoiled)
    for how in ("not pickled", "not loaded again", "the end of the program"):
        assert "the call was undone" in scene.call("spoil", how, str(tmp_path / "calls")).message
    assert ((tmp_path / "calls").read_text(), scene.call("count")) == ("called\n" * 3, 1)


def test_a_state_may_have_a_megabyte() -> None:
    box = Toolbox()
    box.add("tool", 500_000)
    room = LARGEST_VALUE - len(pickle.dumps(box, pickle.HIGHEST_PROTOCOL)) + 500_000
    scene = Scene(Toolbox)
    assert (scene.call("add", "tool", room), LARGEST_VALUE) == (1, 2**20)
    scene = Scene(Toolbox)
    refused = scene.call("add", "tool", room + 1).message
    assert (
        "has 1048577 bytes; at most 1048576 are allowed, by COUNTER_SERVER_LARGEST_VALUE; the call was undone"
        in refused
    )
    assert scene.call("add", "tool") == 1


def test_an_error_is_described_in_bounded_text() -> None:
    known = objects._raised(KeyError("x"))
    assert (known.name, decode_plain(known.content or b"")) == ("KeyError", (("x",), {}))
    own = objects._raised(OwnError("x" * 20_000))
    assert (own.name, own.module, len(own.text)) == ("tests.hosted_classes.OwnError", "tests.hosted_classes", 10_000)
    assert decode_plain(objects._raised(OwnError(object)).content or b"") == ((f"no {object}",), {"number": 0})
    assert decode_plain(objects._raised(OwnError("x" * 2**20)).content or b"") == ((own.text,), {"number": 0})
    assert objects._raised(SystemExit(3)).content is None
    assert decode_plain(objects._raised(ValueError(object)).content or b"") == ((str(object),), {})


def test_a_busy_object_makes_no_call_and_an_end_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene, gate = Scene(Slow, durable=False), tmp_path / "gate"
    monkeypatch.setattr(objects, "LONGEST_DEADLINE", 0)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(scene.call, "wait_for", str(gate))
        try:
            ((method, began),) = eventually(lambda: list(scene.hosted.figures.running.values()), "the call")
            assert (method, 0 <= time.monotonic() - began < PATIENCE) == ("wait_for", True)
            with pytest.raises(Busy, match="obj is still busy with another call"):
                scene.hosted.apply(Batch(b"d" * 16, 1, [Invoke("x", b"")]))
        finally:
            gate.touch()
        assert waiting.result(PATIENCE) == "done"

    def stop(_: Refusing) -> NoReturn:
        raise errors.Stopped(0)

    monkeypatch.setattr(Refusing, "__init__", stop)
    with pytest.raises(errors.Stopped):
        Scene(Refusing)


# Slow methods


def test_a_slow_method_delays_neither_counters_nor_other_objects(state: State, tmp_path: Path) -> None:
    waiting, other, gate = state.object("slow", Slow), state.object("other", SomeObj, 0), tmp_path / "gate"
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(waiting.wait_for, str(gate))
        try:
            assert [other.query() for _ in range(20)] == list(range(1, 21))
            assert [state.counter("c").increment() for _ in range(20)] == list(range(1, 21))
            assert not call.done()
        finally:
            gate.touch()
        assert call.result(PATIENCE) == "done"


@slow
def test_a_call_that_runs_for_long_is_reported_by_name(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    """The report is in the manager's log, once, and in its status while the call runs."""
    assert SLOW_SECONDS == 10  # and half a second here
    gates = [tmp_path / "one", tmp_path / "two"]
    app = create_app({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_HOST": "127.0.0.1"})
    with patient(on_demand) as state, ThreadPoolExecutor(2) as caller:
        one, two = state.object("one", Slow, 0.5), state.object("two", Slow, 0.5)

        def reported(name: str) -> list[Any]:
            return [call for call in cast(Any, state.status()).slow_calls if call.object == name]

        one.wait_for(str(tmp_path))
        calls = [caller.submit(one.wait_for, str(gates[0]))]
        try:
            (found,) = eventually(lambda: reported("one"), "the report")
            assert (found.method, found.seconds > 0.5) == ("wait_for", True)
            client = app.test_client()
            assert 'counter_server_slow_call_seconds{method="wait_for",object="one"} ' in client.get("/metrics").text
            assert client.get("/counters.json").get_json()["manager"]["now"]["Long calls"] == "one.wait_for"
            _, findings = diagnose(on_demand, PATIENCE)
            assert any("one.wait_for has run for" in finding.sentence for finding in findings)
            calls.append(caller.submit(two.wait_for, str(gates[1])))
            log = data_dir / "manager.log"
            eventually(lambda: "two.wait_for has run for" in log.read_text(), "the manager's next look")
            assert log.read_text().count("one.wait_for has run for") == 1
        finally:
            for gate in gates:
                gate.touch()
        assert [call.result(PATIENCE) for call in calls] == ["done", "done"]
        assert reported("one") == reported("two") == []
        app.extensions["counter_server"].close()


# Loss and durability


def test_an_object_in_memory_is_lost_with_its_manager_and_says_so_once(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as state:
        obj, durable = state.object("obj", SomeObj, 0, durable=False), state.object("durable", SomeObj, 0)
        assert [obj.query(), obj.query(), durable.query(), state.counter("c").increment()] == [1, 2, 1, 1]
        end_manager(data_dir / "manager.lock")
        with pytest.raises(errors.StateLost, match="object:obj begins again") as lost:
            obj.query()
        assert lost.value.outcome == "not_applied"
        assert [obj.query(), durable.query(), state.counter("c").increment()] == [1, 2, 2]


@slow
def test_a_durable_object_under_load_and_kill_9_counts_each_call_once(on_demand: str, data_dir: Path) -> None:
    """Sessions send their calls again: no acknowledged call is lost, and none is made twice."""
    values: list[int] = []

    def work() -> None:
        with patient(on_demand) as state:
            obj = state.object("obj", SomeObj, 0)
            for _ in range(60):
                values.append(obj.query())  # noqa: PERF401 - its progress is watched

    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(work) for _ in range(4)]
        for goal in (50, 150):
            eventually(lambda: len(values) > goal, "progress")
            end_manager(data_dir / "manager.lock")
        for each in done:
            each.result()
    assert sorted(values) == list(range(1, 241))


@slow
def test_an_object_that_cannot_be_made_holds_up_no_counter(on_demand: str) -> None:
    with patient(on_demand) as state:
        refusing, one_way = state.object("refusing", Refusing), state.object("one_way", OneWay)
        good = state.object("good", SomeObj, 0)
        wrong = [(refusing.anything, "ValueError: not today"), (one_way.query, "cannot be restored from its state")]
        for number, (call, reason) in enumerate(wrong * 2, 1):
            with pytest.raises(errors.StartupError, match=reason) as told:
                call()
            assert told.value.outcome == "not_applied"
            assert (state.counter("c").increment(), good.query()) == (number, number)


# Managers that host other objects


@slow
def test_hosting_is_additive_and_state_is_handed_over(on_demand: str, data_dir: Path) -> None:
    """A manager that lacks an object is succeeded by one that hosts it too. What is not durable goes across."""
    with patient(on_demand) as counting, patient(on_demand) as first, patient(on_demand) as second:
        assert counting.counter("c").increment() == 1
        pids = [holder(data_dir)]
        one, kept = first.object("one", SomeObj, 0, durable=False), first.dict("kept", ttl=60)
        kept["key"] = "value"
        assert one.query() == 1  # the manager before hosts no objects
        pids.append(holder(data_dir))
        two, same = second.object("two", SomeObj, 5), second.object("one", SomeObj, 10, durable=False)
        assert (two.query(), same.query(), one.query(), two.query()) == (6, 2, 3, 7)
        assert (kept["key"], kept.get("other"), counting.counter("c").increment()) == ("value", None, 2)
        pids.append(holder(data_dir))
        assert len(set(pids)) == 3
        with pytest.raises(errors.NotHosted, match=r"hosts one = .*SomeObj.* in use") as error:
            patient(on_demand).object("one", Toolbox).count()
        assert error.value.outcome == "not_applied"
        assert (holder(data_dir), one.query()) == (pids[-1], 4)


SCRIPT = """
import sys
from counter_server import open_state

class Obj:
    n = 0
    def query(self):
        self.n += 1
        return self.n
    def kind(self):
        return "KIND"

state = open_state(sys.argv[1], deadline=30)
obj = state.object("obj", Obj)
"""
MAIN = "if __name__ == '__main__':\n    print(obj.kind(), obj.query())\n"


@slow
def test_a_script_may_declare_objects_and_change_their_class(on_demand: str, tmp_path: Path) -> None:
    def run(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        with Program(name, on_demand, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}) as program:
            program.wait()
            return "\n".join(program.output + program.errors)

    told = run("script.py", SCRIPT + MAIN.partition("\n")[2].strip())
    assert "the manager imports this module, too, for its shared objects" in told  # it is used while it is imported
    assert run("script.py", SCRIPT + MAIN) == "KIND 1"
    assert run("script.py", SCRIPT.replace("KIND", "new") + MAIN) == "new 2"
    assert run("other.py", "from script import obj\n" + MAIN) == "new 3"  # its module has another name
