"""A concurrent object: its methods are called by several threads at once, and each call is made exactly once."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest

from counter_server import State, errors, objects, open_state
from counter_server import session as session_module
from counter_server import state as state_module
from counter_server.manager.client import StateProxy
from counter_server.manager.client import end_manager as end_in_order
from counter_server.manager.directory import DataDirectory
from counter_server.objects import Busy, HostedObject, declare
from counter_server.operations import Batch, Get, Invoke, Refusal, Result, Returned
from counter_server.plain import decode_plain, encode_plain
from counter_server.server.web import create_app
from counter_server.session import Session, Sessions
from counter_server.state import declared_for
from counter_server.stores.memory import MemoryStore
from tests.hosted_classes import Slow, SomeObj, Tally
from tests.load import at_once
from tests.processes import PATIENCE, Program, end_manager, eventually, holder, open_in

slow = pytest.mark.slow
spawn = multiprocessing.get_context("spawn")


@pytest.fixture(params=["memory", pytest.param("manager", marks=slow)])
def state(request: pytest.FixtureRequest, on_demand: str) -> Iterator[State]:
    with patient("memory://" if request.param == "memory" else on_demand) as state:
        yield state


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Return the file in which `Tally` notes its calls."""
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


def patient(url: str) -> State:
    return open_state(url, deadline=2 * PATIENCE)


def tally_of(state: State, calls: Path, parties: int = 1) -> Tally:
    return state.object("tally", Tally, str(calls), parties, durable=False, concurrent=True)


def sessions_of(state: State, name: str = "tally") -> list[Session]:
    return list(cast(Sessions, state._client.objects[name])._sessions)


def made(calls: Path) -> Counter[str]:
    """Return how often each call was made."""
    return Counter(calls.read_text().split("\n")[:-1])


def gated(stack: ExitStack, calls: Path) -> tuple[Path, Path]:
    """Return a gate for `add_after`, which opens at the end of the test, and the file that says that a call waits."""
    gate = calls.with_name("gate")
    stack.callback(gate.touch)
    return gate, Path(f"{gate}.waits")


# Calls


def test_calls_of_a_concurrent_object_run_at_the_same_time(state: State, calls: Path) -> None:
    """Each waits in the method for all the others. No number is given twice, as the class has its own lock."""
    tally = tally_of(state, calls, 8)
    numbers = [number for _ in range(3) for _, number in at_once(8, tally.meet)]
    assert sorted(numbers) == list(range(1, 25))
    assert len(sessions_of(state)) == 8


def test_a_slow_call_delays_no_other_call_of_its_object(state: State, calls: Path, stack: ExitStack) -> None:
    tally, normal = tally_of(state, calls), state.object("normal", SomeObj, 0)
    gate, waits = gated(stack, calls)
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(tally.add_after, str(gate))
        try:
            eventually(waits.exists, "the slow call")
            assert [tally.add()[1] for _ in range(20)] == list(range(1, 21))
            assert [normal.query() for _ in range(20)] == list(range(1, 21))
            assert not call.done()
        finally:
            gate.touch()
        assert call.result(PATIENCE)[1] == 21


def _work(url: str, calls: str, threads: int, each: int) -> list[int]:
    """Count in one process, whose threads meet those of the other processes in the manager."""
    with patient(url) as state:
        tally = tally_of(state, Path(calls), 2 * threads)

        def work() -> list[int]:
            return [tally.meet()[1], *(tally.add()[1] for _ in range(each))]

        return [number for numbers in at_once(threads, work) for number in numbers]


@slow
def test_threads_of_two_processes_are_in_one_method_at_once_and_each_call_counts_once(
    on_demand: str, calls: Path
) -> None:
    with ProcessPoolExecutor(2, mp_context=spawn) as processes:
        done = [processes.submit(_work, on_demand, str(calls), 8, 50) for _ in range(2)]
        numbers = [number for each in done for number in each.result(4 * PATIENCE)]
    assert sorted(numbers) == list(range(1, 2 * 8 * 51 + 1))
    assert made(calls) == {"": len(numbers)}


@slow
def test_a_call_that_is_sent_again_while_it_runs_is_made_once(on_demand: str, calls: Path, stack: ExitStack) -> None:
    """Its connection breaks twice: the call that is sent again waits for the one that runs, and gets its result."""
    state = stack.enter_context(patient(on_demand))
    tally = tally_of(state, calls)
    gate, waits = gated(stack, calls)
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(tally.add_after, str(gate), "once")
        try:
            eventually(waits.exists, "the call")
            (session,) = sessions_of(state)
            proxy = cast(StateProxy, session.store)
            for _ in range(2):
                connection = proxy._latest
                assert connection is not None
                connection.shutdown()
                eventually(lambda broken=connection: proxy._latest is not broken, "a new connection")  # type: ignore[misc]
            # The one that the manager lost counts while its call runs, and so does the one that asks.
            eventually(lambda: status(state).connections >= 3, "the call again")
            assert tally.add("another")[1] == 1
        finally:
            gate.touch()
        assert call.result(PATIENCE)[1] == 2
    assert made(calls) == {"once": 1, "another": 1}
    assert tally.add("after")[1] == 3


def status(state: State) -> Any:
    return state.status()


@slow
def test_after_a_call_of_unknown_outcome_the_next_ones_get_their_own_results(
    on_demand: str, calls: Path, stack: ExitStack
) -> None:
    state = stack.enter_context(patient(on_demand))
    tally = tally_of(state, calls)
    gate, waits = gated(stack, calls)
    assert tally.add("first")[1] == 1
    with state.deadline(3), pytest.raises(errors.DeadlineExceeded) as late:
        tally.add_after(str(gate), "late")
    assert (late.value.outcome, waits.exists()) == ("unknown", True)
    assert [tally.add(name)[1] for name in ("a", "b")] == [2, 3]
    gate.touch()
    eventually(lambda: made(calls)["late"], "the late call")
    assert eventually(lambda: tally.add("again")[1] if made(calls).total() == 4 else 0, "its end") == 5
    assert made(calls) == dict.fromkeys(["first", "late", "a", "b", "again"], 1)
    assert len(sessions_of(state)) == 1


@slow
def test_kill_9_of_the_manager_makes_no_call_twice_and_each_lost_call_says_so(
    on_demand: str, data_dir: Path, calls: Path
) -> None:
    """Eight threads count while the manager is killed. Each manager gives each number once."""
    answered: list[tuple[str, tuple[int, int]]] = []
    lost: list[tuple[str, str]] = []

    def work(number: int) -> None:
        for turn in range(150):
            name = f"{number}-{turn}"
            try:
                answered.append((name, tally.add(name)))
            except errors.StateLost as error:
                lost.append((name, error.outcome))

    with patient(on_demand) as state:
        tally = tally_of(state, calls)
        with ThreadPoolExecutor(8) as threads:
            done = [threads.submit(work, number) for number in range(8)]
            for goal in (200, 600):
                eventually(lambda goal=goal: len(answered) > goal, "progress")  # type: ignore[misc]
                end_manager(data_dir / "manager.lock")
            for each in done:
                each.result()
    times = made(calls)
    assert max(times.values()) == 1
    assert all(times[name] == 1 for name, _ in answered)
    assert all(outcome == "unknown" or not times[name] for name, outcome in lost)
    assert 2 <= len(lost) <= 16  # for each kill, one in each thread at most
    managers = {pid for _, (pid, _) in answered}
    assert len(managers) == 3
    for manager in managers:
        numbers = [number for _, (pid, number) in answered if pid == manager]
        assert len(set(numbers)) == len(numbers)


@slow
def test_a_loss_of_the_state_is_raised_once_however_many_threads_called_before(
    on_demand: str, data_dir: Path, calls: Path
) -> None:
    with patient(on_demand) as state:
        tally = tally_of(state, calls, 8)
        at_once(8, tally.meet)
        assert len(sessions_of(state)) == 8
        for _ in range(2):
            end_manager(data_dir / "manager.lock")
            with pytest.raises(errors.StateLost, match="object:tally begins again") as lost:
                tally.add()
            assert lost.value.outcome == "not_applied"
            assert [number for _, number in at_once(8, tally.meet)] + [tally.add()[1]]  # none of them raises
        assert sorted(number for _, number in at_once(8, tally.meet)) == list(range(10, 18))


@slow
def test_a_new_connection_knows_which_state_the_others_have_seen(on_demand: str, data_dir: Path, calls: Path) -> None:
    """Or a thread would get a number from the new state before any other thread has got `StateLost`."""
    with patient(on_demand) as state:
        tally = tally_of(state, calls)
        assert tally.add("first")[1] == 1
        (session,) = sessions_of(state)
        end_manager(data_dir / "manager.lock")
        pool = cast(Sessions, state._client.objects["tally"])
        assert pool._take() is session  # as if its call went on
        with pytest.raises(errors.StateLost):
            tally.add("new")
        with pytest.raises(errors.StateLost):  # its call may have been made before
            session.request(Invoke("add", encode_plain((("its own",), {}), "arguments")), time.monotonic() + PATIENCE)
        pool._give_back(session)
        assert [tally.add(name)[1] for name in ("second", "third")] == [1, 2]
    assert made(calls) == {"first": 1, "second": 1, "third": 1}


@slow
def test_a_child_of_a_fork_has_sessions_of_its_own(on_demand: str, calls: Path, stack: ExitStack) -> None:
    """It is forked while a call of the parent runs, whose connection and result stay the parent's."""
    others = open_in(os.getpid())  # such as those of a browser that several tests use
    state = stack.enter_context(patient(on_demand))
    tally = tally_of(state, calls)
    gate, waits = gated(stack, calls)
    assert tally.add("before")[1] == 1
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(tally.add_after, str(gate), "parent's")
        eventually(waits.exists, "the call")
        reader, writer = os.pipe()
        lock = cast(Sessions, state._client.objects["tally"])._lock
        lock.acquire()  # as another thread may hold it
        if not os.fork():
            signal.alarm(int(2 * PATIENCE))  # in case it waits for a lock that nobody has
            try:
                numbers = [tally.add(name)[1] for name in ("child 1", "child 2")]
                common = open_in(os.getpid()) & open_in(os.getppid()) - others
                common = {name for name in common if name.startswith("socket:")}
                os.write(writer, f"{numbers} {common}".encode())
            finally:
                os._exit(0)
        lock.release()
        os.close(writer)
        try:
            with open(reader) as told:
                assert told.read() == "[2, 3] set()"
            os.wait()
            assert tally.add("parent 2")[1] == 4
        finally:
            gate.touch()
        assert call.result(PATIENCE)[1] == 5
    assert set(made(calls).values()) == {1}


@slow
def test_greenlets_of_one_thread_call_at_once(on_demand: str, calls: Path) -> None:
    """A greenlet that waits for its answer holds up no other one."""
    code = f"""
from gevent import monkey; monkey.patch_all()
import gevent
from pathlib import Path
from counter_server import open_state
from tests.test_concurrent import patient, tally_of
with patient({on_demand!r}) as state:
    tally = tally_of(state, Path({str(calls)!r}), 8)
    jobs = [gevent.spawn(tally.meet) for _ in range(8)]
    gevent.joinall(jobs, raise_error=True)
    print(sorted(job.value[1] for job in jobs))
"""
    with Program("-c", code) as program:
        assert program.expect("[") == "1, 2, 3, 4, 5, 6, 7, 8]"


# Long calls


@slow
def test_each_call_that_runs_for_long_is_reported(on_demand: str, data_dir: Path, stack: ExitStack) -> None:
    gate = data_dir.with_name("gate")
    app = create_app({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_HOST": "127.0.0.1"})
    stack.callback(app.extensions["counter_server"].close)
    state = stack.enter_context(patient(on_demand))
    slowly = state.object("slow", Slow, 0.5, durable=False, concurrent=True)
    slowly.wait_for(str(data_dir))
    with ThreadPoolExecutor(3) as callers:
        running = [callers.submit(slowly.wait_for, str(gate)) for _ in range(3)]
        try:
            found = eventually(lambda: found if len(found := status(state).slow_calls) == 3 else [], "three reports")
            assert {(call.object, call.method, call.others_wait) for call in found} == {("slow", "wait_for", False)}
            metrics = app.test_client().get("/metrics").text
            assert metrics.count('counter_server_slow_call_seconds{method="wait_for",object="slow"}') == 1
            log = data_dir / "manager.log"
            eventually(lambda: log.read_text().count("slow.wait_for has run for") == 3, "the manager's next look")
            assert "wait for it" not in log.read_text()
        finally:
            gate.touch()
        assert [call.result(PATIENCE) for call in running] == ["done"] * 3
    assert status(state).slow_calls == []


# Declarations


def test_a_concurrent_object_is_not_durable_and_a_name_is_declared_in_one_way(state: State) -> None:
    with pytest.raises(errors.InvalidRequest, match="not of one moment: declare it with durable=False"):
        state.object("obj", SomeObj, 0, concurrent=True)
    state.object("obj", SomeObj, 0, durable=False, concurrent=True)
    state.object("obj", SomeObj, 0, durable=False, concurrent=True)
    with pytest.raises(errors.InvalidRequest, match=r"SomeObj\(0, durable=False, concurrent=True\) already has that"):
        state.object("obj", SomeObj, 0, durable=False)


def test_of_two_declarations_for_one_manager_the_stricter_one_is_hosted(
    on_demand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[dict[str, Any]] = [{"durable": False, "concurrent": True}, {"durable": False}, {"durable": True}]
    for first, second in [(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)]:
        states = [patient(on_demand), patient(on_demand)]
        for state, kind in zip(states, (first, second), strict=True):
            state.object("obj", SomeObj, 0, **kinds[kind])
        with monkeypatch.context() as patched:
            patched.setattr(state_module, "_states", states)  # in this order
            (hosted,) = declared_for(on_demand)
        stricter = kinds[max(first, second)]
        assert (hosted.durable, hosted.concurrent) == (stricter["durable"], stricter.get("concurrent", False))


@slow
def test_a_program_that_needs_the_objects_lock_gets_it_with_the_state(
    on_demand: str, data_dir: Path, calls: Path
) -> None:
    """A newer declaration without `concurrent` brings another manager; the other way round, the lock stays."""

    def hosted() -> bool:
        with closing(StateProxy(DataDirectory(data_dir))) as proxy:
            (declaration,) = proxy.hosting(time.monotonic() + PATIENCE).declarations
            return declaration.concurrent

    with patient(on_demand) as first, patient(on_demand) as second, patient(on_demand) as third:
        tally = tally_of(first, calls)
        assert (tally.add()[1], hosted()) == (1, True)
        before = holder(data_dir)
        locked = second.object("tally", Tally, str(calls), 1, durable=False)
        assert (locked.add()[1], hosted()) == (2, False)
        between = holder(data_dir)
        assert (tally.add()[1], tally_of(third, calls).add()[1], hosted()) == (3, 4, False)
        assert between == holder(data_dir) != before


# The end of a manager


@slow
def test_a_manager_that_ends_waits_for_calls_and_leaves_their_count_to_the_next(
    on_demand: str, data_dir: Path, calls: Path, stack: ExitStack
) -> None:
    state = stack.enter_context(patient(on_demand))
    tally = tally_of(state, calls)
    gate, waits = gated(stack, calls)
    with ThreadPoolExecutor(2) as callers:
        call = callers.submit(tally.add_after, str(gate), "running")
        eventually(waits.exists, "the call")
        socket = DataDirectory(data_dir).socket
        end = callers.submit(end_in_order, DataDirectory(data_dir), PATIENCE)
        eventually(lambda: not socket.exists(), "the begin of the end")
        gate.touch()
        first = call.result(PATIENCE)
        assert end.result(PATIENCE) == first[0]
    after = tally.add("after")
    assert (first[1], after[1], first[0] != after[0]) == (1, 2, True)
    assert made(calls) == {"running": 1, "after": 1}


# The object in its process


class Scene:
    """A concurrent object without a process, whose method `enter` waits for `open`."""

    def __init__(self, **options: Any) -> None:
        self.made: list[str] = []
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        scene = self

        class Room:
            def enter(self, name: str) -> str:
                scene.made.append(name)
                scene.entered.release()
                assert scene.open.wait(PATIENCE)
                return name

            def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
                return str, ()

        declaration = declare("obj", SomeObj, (0,), {}, durable=False, concurrent=True)
        self.hosted = HostedObject(declaration, time.monotonic, **options)
        self.hosted._object = Room()

    def apply(self, name: str, sequence: int = 1, client: bytes = b"c" * 16) -> list[Result]:
        return self.hosted.apply(Batch(client, sequence, [Invoke("enter", encode_plain(((name,), {}), "arguments"))]))

    def await_entries(self, count: int) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=PATIENCE)


def value(results: list[Result]) -> Any:
    (result,) = results
    assert isinstance(result, Returned)
    return decode_plain(result.value)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.open.set()


@pytest.fixture
def threads(scene: Scene) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads
        scene.open.set()


def test_the_same_batch_waits_for_the_one_that_runs(scene: Scene, threads: ThreadPoolExecutor) -> None:
    first = threads.submit(scene.apply, "once")
    scene.await_entries(1)
    again = [threads.submit(scene.apply, "once") for _ in range(3)]
    other = threads.submit(scene.apply, "other", 1, b"d" * 16)
    scene.await_entries(1)
    eventually(lambda: len(scene.hosted._changed._waiters) == 3, "those that wait")  # type: ignore[attr-defined]
    assert sorted(method for method, _ in scene.hosted.figures.running.values()) == ["enter", "enter"]
    scene.open.set()
    assert [value(call.result(PATIENCE)) for call in (first, *again, other)] == ["once"] * 4 + ["other"]
    assert (scene.made, scene.hosted.figures.running, scene.hosted._in_flight) == (["once", "other"], {}, {})
    assert value(scene.apply("once")) == "once"  # it is remembered
    assert value(scene.apply("next", 2)) == "next"
    with pytest.raises(errors.BatchRefused, match="batch 1 does not follow batch 2"):
        scene.apply("once")
    assert scene.made == ["once", "other", "next"]


def test_a_batch_waits_no_longer_than_its_caller(
    scene: Scene, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = threads.submit(scene.apply, "once")
    scene.await_entries(1)
    monkeypatch.setattr(objects, "LONGEST_DEADLINE", 0)
    with pytest.raises(Busy, match="obj is still busy with this call; it was not made again"):
        scene.apply("once")
    scene.open.set()
    assert value(first.result(PATIENCE)) == "once"


def test_new_clients_that_run_count_towards_the_most(threads: ThreadPoolExecutor) -> None:
    scene = Scene(most_clients=2)
    running = [threads.submit(scene.apply, name, 1, name.encode() * 16) for name in "ab"]
    scene.await_entries(2)
    (refused,) = scene.apply("c", 1, b"c" * 16)
    assert isinstance(refused, Refusal)
    assert refused.code == "storage_full"
    scene.open.set()
    assert {value(call.result(PATIENCE)) for call in running} == {"a", "b"}
    assert len(scene.hosted.remembered.records) == 2
    assert sorted(scene.made) == ["a", "b"]


def test_a_hand_over_waits_for_running_calls_and_begins_no_other(scene: Scene, threads: ThreadPoolExecutor) -> None:
    running = [threads.submit(scene.apply, name, 1, name.encode() * 16) for name in "ab"]
    scene.await_entries(2)
    end = threads.submit(scene.hosted.hand_over, time.monotonic() + PATIENCE)
    eventually(lambda: scene.hosted._is_ending, "the end")
    late = threads.submit(scene.apply, "late", 1, b"l" * 16)
    eventually(lambda: len(scene.hosted._changed._waiters) == 2, "the late one")  # type: ignore[attr-defined]
    assert not end.done()
    scene.open.set()
    left = end.result(PATIENCE)
    assert left is not None
    assert left[1].keys() == {b"a" * 16, b"b" * 16}
    assert {value(call.result(PATIENCE)) for call in running} == {"a", "b"}
    assert (sorted(scene.made), late.done()) == (["a", "b"], False)
    scene.hosted._is_ending = False  # so that the test can end
    scene.hosted._changed.notify_all()
    scene.hosted._lock.release()
    assert value(late.result(PATIENCE)) == "late"


def test_a_call_that_outlasts_the_hand_over_loses_the_object_and_is_answered(
    scene: Scene, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    running = threads.submit(scene.apply, "long")
    scene.await_entries(1)
    assert scene.hosted.hand_over(time.monotonic()) is None
    assert "is lost: a call is still busy with it" in caplog.text
    scene.open.set()
    assert value(running.result(PATIENCE)) == "long"


def test_an_error_of_a_method_is_its_callers_and_the_object_goes_on(state: State, calls: Path) -> None:
    tally = cast(Any, tally_of(state, calls))
    for _ in range(2):
        with pytest.raises(TypeError, match="unexpected keyword"):
            tally.add(wrong=1)
    assert tally.add()[1] == 1


# The sessions


class Connections(MemoryStore):
    """Makes stores that note when they are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[MemoryStore] = []

    def another(self) -> MemoryStore:
        every = self.closed

        class One(MemoryStore):
            def close(self) -> None:
                every.append(self)

        return One()


def test_sessions_that_stay_idle_are_closed_except_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 1000.0
        monotonic = classmethod(lambda cls: cls.now)

    monkeypatch.setattr(session_module, "time", Clock)
    connections = Connections()
    sessions = Sessions(connections)
    taken = [sessions._take() for _ in range(7)]
    for session in taken:
        sessions._give_back(session)
    for _ in range(3):
        sessions.request(Get("x"), Clock.now + 9)  # always the same one
    assert (len(sessions._sessions), connections.closed) == (7, [])
    Clock.now += 61
    for left in (6, 5, 4, 4):
        sessions.request(Get("x"), Clock.now + 9)
        assert len(sessions._sessions) == left
    assert connections.closed == [session.store for session in taken[:3]]
    sessions.close()
    assert len(connections.closed) == 7
