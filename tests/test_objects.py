"""Shared objects of plain classes are the same for all workers, and each call is made exactly once."""

import gc
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from counter_server import CounterServerError, SharedState, State, StoreOptions, open_state
from counter_server.cli import examine
from counter_server.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotHosted,
    RemoteError,
    StartupError,
    StateLost,
    Unsupported,
)
from counter_server.ledger import Changes
from counter_server.manager.server import SLOW_SECONDS
from counter_server.objects import LARGEST_STATE, HostedObject, declare
from counter_server.operations import LARGEST_VALUE, Batch, Invoke, Refusal, Returned, encode_plain
from counter_server.server.web import create_app
from counter_server.state import SharedObject
from counter_server.status import SlowCall
from tests.hosted_classes import Awkward, OneWay, OwnError, Refusing, Slow, SomeObj, Spoiled, Toolbox, not_a_class
from tests.journals import Committing
from tests.launchers import LAUNCHERS, launch
from tests.load import at_once, spawn, visit
from tests.processes import PATIENCE, ROOT, Program, end_manager, eventually, holder


@pytest.fixture(params=["memory", "manager"])
def state(request: pytest.FixtureRequest, on_demand: str) -> Iterator[State]:
    with open_state("memory://" if request.param == "memory" else on_demand, deadline=PATIENCE) as state:
        yield state


def patient(url: str, **options: Any) -> State:
    return open_state(url, deadline=PATIENCE, options=StoreOptions(**options))


def test_the_seeds_object_counts_for_all_threads(state: State) -> None:
    global_obj = state.object("global_obj", SomeObj, 0)
    values = at_once(50, lambda: [global_obj.query() for _ in range(4)])
    assert sorted(value for four in values for value in four) == list(range(1, 201))


def query_often(url: str, times: int, start: Any, results: Any) -> None:
    with patient(url) as state:
        global_obj = state.object("global_obj", SomeObj, 0)
        start.wait(PATIENCE)
        results.send([global_obj.query() for _ in range(times)])


def test_the_seeds_object_counts_for_all_processes(on_demand: str) -> None:
    start = spawn.Barrier(4)
    clients = []
    for _ in range(4):
        reader, writer = spawn.Pipe(duplex=False)
        process = spawn.Process(target=query_often, args=(on_demand, 100, start, writer))
        process.start()
        writer.close()
        clients.append((process, reader))
    values: list[int] = []
    for process, reader in clients:
        with reader:
            values += reader.recv()
        process.join()
        process.close()
    assert sorted(values) == list(range(1, 401))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1,
        2**63,
        2**64,
        -(2**200),
        1.5,
        "",
        "é",
        b"\x00\xff",
        [],
        [1, [2]],
        (),
        (1, (2,)),
        {},
        {"a": (1,)},
        {1: 2, None: 3, (1, 2): [4], b"x": 5.0},
    ],
    ids=repr,
)
def test_plain_data_is_returned_unchanged(state: State, value: object) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    back = toolbox.echo(value, word=value)
    assert back == ((value,), {"word": value})
    assert repr(back) == repr(((value,), {"word": value}))


@pytest.mark.parametrize(
    "value", [{1}, object(), Toolbox, 1j, [{1}], {"a": {1}}, "\ud800"], ids=lambda value: type(value).__name__
)
def test_other_data_is_refused_before_it_is_sent(state: State, value: object) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    with pytest.raises(InvalidRequest, match=r"the arguments of toolbox\.add"):
        toolbox.add(value)
    assert toolbox.count() == 0


def test_too_large_an_argument_is_refused(state: State) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    with pytest.raises(InvalidRequest, match="at most"):
        toolbox.add("x" * (LARGEST_VALUE + 1))
    assert toolbox.count() == 0


def test_many_large_arguments_at_once_fit(state: State) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    large = "x" * (LARGEST_VALUE - 100)
    sizes = at_once(40, lambda: len(toolbox.echo(large)[0][0]))
    assert sizes == [len(large)] * 40


def test_a_result_that_is_not_plain_data_is_an_error(state: State) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    with pytest.raises(RemoteError, match="set is not plain data"):
        toolbox.give()


def test_a_built_in_exception_is_raised_in_its_own_type_with_the_remote_traceback(state: State) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    with pytest.raises(KeyError) as error:
        toolbox.fail()
    assert error.value.args == ("no such tool", 7)
    assert "hosted_classes.py" in error.value.__notes__[0]
    assert toolbox.count() == 1  # it was called once


def test_any_other_exception_is_raised_as_a_remote_error(state: State) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    with pytest.raises(RemoteError) as error:
        toolbox.fail_in_its_own_way()
    assert error.value.name == f"{OwnError.__module__}.OwnError"
    assert error.value.text == "with a message"
    assert not isinstance(error.value, CounterServerError)  # it has no outcome
    assert "hosted_classes.py" in error.value.remote_traceback


@pytest.mark.parametrize("name", ["_private", "__init__", "__class__", "__reduce__"])
def test_private_methods_cannot_be_called(state: State, name: str) -> None:
    handle = SharedObject("toolbox", Toolbox, state)
    state.object("toolbox", Toolbox)
    with pytest.raises(AttributeError, match="only public methods of Toolbox are shared"):
        handle.__getattr__(name)
    with pytest.raises(InvalidRequest, match="public method"):
        Invoke(name, b"")


@pytest.mark.parametrize("name", ["items", "kind", "nothing"])
def test_attributes_that_are_not_methods_cannot_be_called(state: State, name: str) -> None:
    toolbox: Any = state.object("toolbox", Toolbox)
    with pytest.raises(AttributeError, match=f"only public methods of Toolbox are shared, not '{name}'"):
        getattr(toolbox, name)
    with pytest.raises(Unsupported, match=f"no public method '{name}'"):  # not even directly in the manager
        state.invoke("toolbox", Invoke(name, b""))


def test_attributes_of_a_handle_cannot_be_set(state: State) -> None:
    global_obj = state.object("global_obj", SomeObj, 0)
    with pytest.raises(AttributeError, match="setting 'param' would change this handle only"):
        global_obj.param = 5
    assert global_obj.query() == 1


def test_a_class_that_cannot_be_imported_is_refused_when_it_is_declared(state: State) -> None:
    class Local:
        pass

    for wrong in (Local, lambda: None, not_a_class, SomeObj(0)):
        with pytest.raises(InvalidRequest):
            state.object("wrong", wrong)  # type: ignore[arg-type]


def test_threads_can_declare_at_the_same_time() -> None:
    """Python 3.11 finds a class's source by parsing, which fails if a garbage collection lets two threads parse."""
    start = threading.Barrier(8)

    def declare_often(_: int) -> set[bytes]:
        start.wait(PATIENCE)
        return {declare("toolbox", Toolbox, (), {}, durable=False).source for _ in range(20)}

    threshold = gc.get_threshold()
    gc.callbacks.append(let_another_thread_run)
    gc.set_threshold(500)
    try:
        with ThreadPoolExecutor(8) as threads:
            sources = set().union(*threads.map(declare_often, range(8)))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(let_another_thread_run)
    assert len(sources) == 1
    assert sources != {b""}


def let_another_thread_run(_phase: str, _found: dict[str, int]) -> None:
    time.sleep(0.0005)


def test_one_name_cannot_declare_two_objects(state: State) -> None:
    one = state.object("obj", SomeObj, 0)
    assert [one.query(), state.object("obj", SomeObj, 0).query()] == [1, 2]
    for wrong in (lambda: state.object("obj", SomeObj, 1), lambda: state.object("obj", Toolbox)):
        with pytest.raises(InvalidRequest, match="already has that name"):
            wrong()


def test_a_slow_method_delays_neither_counters_nor_other_objects(state: State, tmp_path: Path) -> None:
    slow = state.object("slow", Slow)
    other = state.object("other", SomeObj, 0)
    answers: list[str] = []
    gate = tmp_path / "gate"
    caller = threading.Thread(target=lambda: answers.append(slow.wait_for(str(gate))))
    caller.start()
    assert [other.query() for _ in range(20)] == list(range(1, 21))
    assert [state.counter("c").increment() for _ in range(20)] == list(range(1, 21))
    assert answers == []
    gate.touch()
    caller.join(PATIENCE)
    assert answers == ["done"]


def test_a_method_that_computes_leaves_counters_their_turn(on_demand: str) -> None:
    """With Python's default switch interval, a thread waits 5 ms for the interpreter."""
    with patient(on_demand, durability="none") as state, open_state(on_demand, deadline=1) as hasty:
        assert state.object("slow", Slow).wait_for("/") == "done"
        with pytest.raises(DeadlineExceeded):
            hasty.object("slow", Slow).compute()
        waited = []
        for _ in range(100):
            time.sleep(0.003)  # so that the method gets the interpreter again
            began = time.monotonic()
            state.counter("c").increment()
            waited.append(time.monotonic() - began)
        assert sorted(waited)[25] < 0.004  # the slower ones may have waited for a busy machine


def test_a_call_that_runs_for_long_is_reported_by_name(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    """The report is in the manager's log, once, and in its status while the call runs."""
    gate = tmp_path / "gate"
    app = create_app({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_HOST": "127.0.0.1"})
    with patient(on_demand) as state, ThreadPoolExecutor(1) as caller:
        slow = state.object("slow", Slow)
        slow.wait_for(str(tmp_path))
        call = caller.submit(slow.wait_for, str(gate))
        try:

            def reported() -> list[SlowCall]:
                status = state.status()
                return [] if status is None else status.slow_calls

            (found,) = eventually(reported, "the report")
            assert (found.object, found.method) == ("slow", "wait_for")
            assert found.seconds > SLOW_SECONDS
            client = app.test_client()
            labels = 'counter_server_slow_call_seconds{method="wait_for",object="slow"} '
            assert labels in client.get("/metrics").text
            assert client.get("/counters.json").get_json()["manager"]["now"]["Long calls"] == "slow.wait_for"
            _, findings = examine(on_demand, PATIENCE)
            assert any("slow.wait_for has run for" in finding.sentence for finding in findings)
            log = data_dir / "manager.log"
            eventually(lambda: "slow.wait_for has run for" in log.read_text(), "the line")
            time.sleep(2.5)  # the manager checks again meanwhile
            assert log.read_text().count("slow.wait_for") == 1
        finally:
            gate.touch()
        assert call.result(PATIENCE) == "done"
        assert reported() == []
        app.extensions["counter_server"].close()


def test_counters_and_objects_may_have_the_same_name(state: State) -> None:
    obj = state.object("same", SomeObj, 10)
    assert (obj.query(), state.counter("same").increment()) == (11, 1)


# Loss and durability


def test_an_object_in_memory_is_lost_with_its_manager_and_says_so_once(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as state:
        obj = state.object("obj", SomeObj, 0)
        assert [obj.query(), obj.query()] == [1, 2]
        assert state.counter("c").increment() == 1
        end_manager(data_dir / "manager.lock")
        with pytest.raises(StateLost, match="object:obj begins again") as lost:
            obj.query()
        assert lost.value.outcome == "not_applied"
        assert obj.query() == 1
        assert state.counter("c").increment() == 2  # counters are durable


def test_a_durable_object_continues_from_its_last_state(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as state:
        obj = state.object("obj", SomeObj, 0, durable=True)
        for expected in range(1, 6):
            assert obj.query() == expected
            end_manager(data_dir / "manager.lock")


def test_a_durable_object_under_load_and_kill_9_counts_each_call_once(on_demand: str, data_dir: Path) -> None:
    """Sessions send their calls again: no acknowledged call is lost, and none is made twice."""
    values: list[int] = []

    def work() -> None:
        with patient(on_demand) as state:
            obj = state.object("obj", SomeObj, 0, durable=True)
            for _ in range(100):
                values.append(obj.query())  # noqa: PERF401 - its progress is watched

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        done = len(values)
        eventually(lambda: len(values) > done + 50, "progress")
        before = holder(data_dir)
        end_manager(data_dir / "manager.lock")
        eventually(lambda: holder(data_dir) not in (None, before), "another manager")
    for thread in threads:
        thread.join()
    assert sorted(values) == list(range(1, 601))


def test_a_call_that_makes_a_durable_object_too_large_is_undone(state: State, on_demand: str) -> None:
    with patient(on_demand) as durable:
        toolbox: Any = durable.object("toolbox", Toolbox, durable=True)
        assert toolbox.add("tool") == 1
        for call in (lambda: toolbox.add("tool", LARGEST_STATE), toolbox.break_pickle):
            with pytest.raises(InvalidRequest, match="toolbox"):
                call()
            assert toolbox.count() == 1
        assert toolbox.add("tool") == 2


def test_a_durable_object_is_refused_with_durability_none(on_demand: str) -> None:
    with patient(on_demand, durability="none") as state:
        obj = state.object("obj", SomeObj, 0, durable=True)
        with pytest.raises(StartupError, match="cannot be durable with durability 'none'"):
            obj.query()


def test_an_object_that_cannot_be_made_is_reported(on_demand: str) -> None:
    with patient(on_demand) as state:
        obj = state.object("obj", Refusing)
        with pytest.raises(StartupError, match="ValueError: not today"):
            obj.anything()


def test_a_running_manager_in_use_hosts_no_other_objects(on_demand: str) -> None:
    with patient(on_demand) as first, patient(on_demand) as second:
        assert first.object("one", SomeObj, 0).query() == 1
        for wrong in (second.object("other", SomeObj, 0), patient(on_demand).object("one", SomeObj, 5)):
            with pytest.raises(NotHosted, match=r"hosts one = tests\.hosted_classes\.SomeObj\(0\), and not") as error:
                wrong.query()
            assert error.value.outcome == "not_applied"
        assert second.counter("c").increment() == 1


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("a number too long for str()", KeyError),
        ("a message that cannot be made", RemoteError),
        ("a message that cannot be encoded", ValueError),
        ("a message longer than a frame", RemoteError),
        ("arguments longer than a frame", ValueError),
        ("arguments that do not make it again", RemoteError),
        ("a group", RemoteError),
        ("a place that is none", (SyntaxError, RemoteError)),
        ("notes that end the program", RemoteError),
        ("a message that ends the program", RemoteError),
        ("a strange message", RemoteError),
        ("a class that raises", RemoteError),
        ("the end of the program", RemoteError),
        ("Ctrl-C", RemoteError),
    ],
)
def test_a_method_whose_error_is_hard_to_tell_was_called_once(state: State, how: str, kind: Any) -> None:
    awkward = state.object("awkward", Awkward)
    with pytest.raises(kind):
        awkward.fail(how)
    assert awkward.count() == 1


@pytest.mark.parametrize("how", ["not pickled", "the end of the program", "not loaded again"])
def test_a_call_whose_state_cannot_be_kept_is_made_once_and_undone(
    how: str, on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    with patient(on_demand) as state:
        spoiled = state.object("spoiled", Spoiled, durable=True)
        assert spoiled.count() == 1
        with pytest.raises(InvalidRequest, match="the call was undone"):
            spoiled.spoil(how, str(tmp_path / "calls"))
        assert (tmp_path / "calls").read_text() == "called\n"
        assert spoiled.count() == 2
        end_manager(data_dir / "manager.lock")
        assert spoiled.count() == 3


# Problems between a program and its manager


SCRIPT = """
import sys
from counter_server import open_state

class Obj:
    def __init__(self):
        self.n = 0
    def query(self):
        self.n += 1
        return self.n

    def kind(self):
        return "KIND"

state = open_state(sys.argv[1], deadline=30)
obj = state.object("obj", Obj, durable=DURABLE)
"""


def run_script(tmp_path: Path, url: str, text: str, *, name: str = "script.py") -> str:
    (tmp_path / name).write_text(text)
    result = subprocess.run(
        [sys.executable, name, url],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout + result.stderr


def test_using_shared_objects_at_import_time_is_an_error(on_demand: str, tmp_path: Path) -> None:
    text = SCRIPT.replace("DURABLE", "False")
    told = run_script(tmp_path, on_demand, f"{text}print(obj.query())\n")
    assert "the manager imports this module, too, for its shared objects" in told
    guarded = f"{text}if __name__ == '__main__':\n    print(obj.query())\n"
    assert run_script(tmp_path, on_demand, guarded) == "1\n"


def test_an_unused_manager_is_replaced_by_one_with_other_objects(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as counting:
        assert counting.counter("c").increment() == 1
        first = holder(data_dir)
        with patient(on_demand) as state:
            assert state.object("obj", SomeObj, 0).query() == 1  # the first manager hosts no objects
            second = holder(data_dir)
            assert second != first
            assert counting.counter("c").increment() == 2
            with pytest.raises(NotHosted, match="counter-server stop"):  # the manager is in use
                patient(on_demand).object("other", SomeObj, 0).query()
            assert holder(data_dir) == second
            assert state.object("obj", SomeObj, 0).query() == 2


def test_a_call_that_never_returns_holds_up_no_other_program(on_demand: str, tmp_path: Path) -> None:
    """Its client is gone, so the manager is unused."""
    with open_state(on_demand, deadline=PATIENCE) as state:
        assert state.object("slow", Slow).wait_for(str(tmp_path)) == "done"
    with open_state(on_demand, deadline=1) as hasty, pytest.raises(DeadlineExceeded):
        hasty.object("slow", Slow).wait_for(str(tmp_path / "never"))
    with patient(on_demand) as other:
        assert other.object("obj", SomeObj, 0).query() == 1


def test_a_changed_class_replaces_the_old_one(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    use = "if __name__ == '__main__':\n    print(obj.kind(), obj.query())\n"
    text = SCRIPT.replace("DURABLE", "True") + use
    assert run_script(tmp_path, on_demand, text.replace("KIND", "old")) == "old 1\n"
    assert run_script(tmp_path, on_demand, text.replace("KIND", "new")) == "new 2\n"


def test_a_durable_object_is_restored_if_its_module_has_another_name(on_demand: str, tmp_path: Path) -> None:
    text = SCRIPT.replace("DURABLE", "True")
    use = "if __name__ == '__main__':\n    print(obj.query())\n"
    assert run_script(tmp_path, on_demand, text + use, name="app.py") == "1\n"
    assert run_script(tmp_path, on_demand, "from app import obj\nprint(obj.query())\n", name="other.py") == "2\n"


def test_an_object_that_cannot_be_made_holds_up_no_counter(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as state:
        refusing = state.object("refusing", Refusing)
        good = state.object("good", SomeObj, 0, durable=True)
        for number in (1, 2):
            with pytest.raises(StartupError, match="ValueError: not today") as told:
                refusing.anything()
            assert told.value.outcome == "not_applied"
            assert state.counter("c").increment() == number
            assert good.query() == number


def test_a_call_that_cannot_be_saved_leaves_the_rest_of_its_batch() -> None:
    committed: list[Changes] = []
    hosted = HostedObject(
        declare("toolbox", Toolbox, (), {}, durable=True), lambda: 1.0, journal=Committing(committed.append)
    )

    def call(method: str, *arguments: object) -> Invoke:
        return Invoke(method, encode_plain((arguments, {}), "arguments"))

    batch = Batch(b"0" * 16, 1, [call("add", "one", 1), call("break_pickle"), call("add", "two", 1)])
    results = hosted.apply(batch)
    assert isinstance(results, list)
    assert [type(result) for result in results] == [Returned, Refusal, Returned]
    assert hosted.apply(batch) is results
    (changes,) = committed
    kept = pickle.loads(changes.objects["toolbox"])  # noqa: S301 - written just now
    assert kept.items == ["one", "two"]


def test_an_object_that_cannot_be_restored_is_refused_at_once(on_demand: str) -> None:
    with patient(on_demand) as state:
        one_way = state.object("one_way", OneWay, durable=True)
        with pytest.raises(StartupError, match="cannot be restored from its state"):
            one_way.query()
        assert state.counter("c").increment() == 1


def test_a_handle_without_init_app_names_the_missing_call() -> None:
    app = Flask(__name__)
    app.config["COUNTER_SERVER_STORE"] = "memory://"
    SharedState(app)
    stray = SharedState().object("obj", SomeObj, 0)
    with app.app_context(), pytest.raises(NotHosted, match="init_app"):
        stray.query()


def test_a_stopped_manager_continues_when_it_is_started_again(on_demand: str, data_dir: Path) -> None:
    command = [sys.executable, "-m", "counter_server", "stop", "--data-dir", str(data_dir)]
    with patient(on_demand) as state:
        assert state.object("obj", SomeObj, 0, durable=True).query() == 1
        pid = holder(data_dir)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"The manager (pid {pid}) has ended.\n"
        assert holder(data_dir) is None
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (again.returncode, again.stderr) == (1, f"Error: no manager is running in {data_dir}\n")
        assert state.object("obj", SomeObj, 0, durable=True).query() == 2


# In apps


APP = """
from flask import Flask
from counter_server import SharedState

class SomeObj:
    def __init__(self, param):
        self.param = param
    def query(self):
        self.param += 1
        return self.param

app = Flask(__name__)
app.config["COUNTER_SERVER_DEADLINE"] = 30
shared = SharedState(app)
global_obj = shared.object("global_obj", SomeObj, 0)

@app.get("/")
def home():
    return {"value": global_obj.query()}

if __name__ == "__main__":
    with app.app_context():
        print(global_obj.query())
"""


@pytest.mark.parametrize("launcher", [name for name, launcher in LAUNCHERS.items() if launcher.processes > 1])
def test_the_seeds_object_may_be_in_the_apps_own_module(
    on_demand: str, tmp_path: Path, stack: ExitStack, launcher: str
) -> None:
    (tmp_path / "app.py").write_text(APP)
    program, url = launch(stack, launcher, tmp_path)
    values = [content["value"] for content in at_once(100, lambda: visit(url))]
    assert sorted(values) == list(range(1, 101)), program.errors
    program.stop()


def test_a_class_may_be_in_the_main_program(on_demand: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    for expected in ("1\n", "2\n"):
        result = subprocess.run(
            [sys.executable, "app.py"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout == expected


def test_a_manager_started_by_hand_hosts_the_objects_of_an_app(
    stack: ExitStack, tmp_path: Path, data_dir: Path
) -> None:
    never = 'app.config["COUNTER_SERVER_START"] = False\n'
    (tmp_path / "app.py").write_text(APP.replace("shared = ", f"{never}shared = "))
    environment = {"PYTHONPATH": str(ROOT), "COUNTER_SERVER_DATA_DIR": str(data_dir)}
    command = ("-m", "counter_server", "manager", "--hosting", "app")
    manager = stack.enter_context(Program(*command, cwd=tmp_path, environment=environment))
    manager.expect("Manager ready:")
    use = "from app import app, global_obj\nwith app.app_context(): print(global_obj.query())"
    for expected in ("1", "2"):
        client = stack.enter_context(Program("-c", use, cwd=tmp_path, environment=environment))
        assert client.wait() == 0, client.errors
        assert client.output == [expected]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("no_such_module", "Could not import 'no_such_module'"),
        ("json", "Failed to find Flask application"),
        ("counter_server.server.web", "declares no shared objects for"),
    ],
)
def test_an_app_that_cannot_be_hosted_is_named(stack: ExitStack, data_dir: Path, module: str, says: str) -> None:
    command = ("-m", "counter_server", "manager", "--data-dir", data_dir, "--hosting", module)
    manager = stack.enter_context(Program(*command))
    assert manager.wait() == 1
    (line,) = manager.errors
    assert line.startswith("Error: ")
    assert says in line
