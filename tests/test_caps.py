"""The caps of a manager: one more is refused by name, what is there counts on, and nothing is miscounted."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from counter_server import StoreOptions, open_state
from counter_server.errors import BatchRefused, DeadlineExceeded, StorageFull
from counter_server.ledger import CLIENT_LIFETIME, CLIENT_MINIMUM, KEY_LIFETIME, Changes, Clients, Ledger, no_room
from counter_server.manager.directory import DataDirectory
from counter_server.manager.wire import connect
from counter_server.objects import HostedObject, declare
from counter_server.operations import Batch, Get, Increment, Invoke, Operation, Refusal, Replayed, Result, Set
from counter_server.settings import Caps
from counter_server.status import Status
from counter_server.stores import open_store
from tests.hosted_classes import Toolbox
from tests.load import open_client
from tests.processes import PATIENCE, Manager, Program, Server, eventually
from tests.test_manager import greeted
from tests.test_server import ask

StartManager = Callable[..., Manager]

ANN, BOB, CYD = (letter * 16 for letter in (b"a", b"b", b"c"))


@pytest.fixture
def clock() -> SimpleNamespace:
    return SimpleNamespace(now=0.0)


def capped(clock: SimpleNamespace, **caps: int) -> Ledger:
    return Ledger(clock=lambda: clock.now, caps=Caps(**caps))


def apply(ledger: Ledger, *operations: Operation, client: bytes | None = None, sequence: int = 1) -> list[Result]:
    """Return the results of a batch, of a new client if none is named."""
    (answer,) = ledger.perform([Batch(client or os.urandom(16), sequence, list(operations))])
    assert not isinstance(answer, BatchRefused), answer
    return answer


KEY = no_room("idempotency key", 2, "keys")
CLIENT = no_room("client", 2, "clients")


def test_one_key_too_many_is_refused_until_others_are_a_day_old(clock: SimpleNamespace) -> None:
    ledger = capped(clock, keys=2)
    keyed = {key: Increment("a", key=key) for key in "klmn"}
    assert apply(ledger, keyed["k"], keyed["l"], keyed["l"]) == [1, 2, Replayed(2)]
    assert apply(ledger, keyed["m"], Increment("a")) == [KEY, 3]
    clock.now = KEY_LIFETIME - 0.5
    assert apply(ledger, Increment("b")) == [1]  # looks for expired keys
    clock.now = KEY_LIFETIME
    assert apply(ledger, keyed["k"]) == [4]  # its own place is free, although no key was removed yet
    clock.now += 1
    assert apply(ledger, Increment("b")) == [2]
    assert apply(ledger, keyed["m"], keyed["n"], keyed["k"]) == [5, KEY, Replayed(4)]


def test_one_client_too_many_reads_and_is_not_remembered(clock: SimpleNamespace) -> None:
    ledger = capped(clock, clients=2)
    for client in (ANN, BOB):
        apply(ledger, Increment("x"), client=client)
    for _ in range(2):
        assert apply(ledger, Increment("x"), Get("x"), Set("y", 1), client=CYD) == [CLIENT, 2, CLIENT]
    assert apply(ledger, Increment("x"), client=ANN, sequence=2) == [3]
    assert apply(ledger, Increment("x"), client=BOB) == [2]  # sent again
    (answer,) = ledger.perform([Batch(CYD, 2, [Increment("x")])])
    assert isinstance(answer, BatchRefused)  # so it begins again, as another client
    assert ledger.sizes == (1, 2, 0)
    clock.now += CLIENT_LIFETIME
    assert apply(ledger, Increment("x")) == [CLIENT]  # this commit makes room
    assert apply(ledger, Increment("x")) == [4]
    assert ledger.sizes == (1, 1, 0)


def test_a_rejected_client_stays_rejected_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of its batch may be on its way over a connection that it gave up after the answer."""
    monkeypatch.setattr("counter_server.ledger._TURNED_AWAY", 2)
    clients = Clients({}, 0)
    assert all(clients.admit(client, Changes(0.0)) for client in (ANN, BOB))
    clients._most = 1
    assert all(clients.admit(client, Changes(0.0)) for client in (ANN, BOB))
    assert clients.admit(CYD, Changes(0.0)) is None
    clients._most = 0
    assert clients.admit(CYD, Changes(0.0)) is not None, "the third replaces the first"
    clients._most = 1
    assert [bool(clients.admit(client, Changes(0.0))) for client in (ANN, BOB, CYD)] == [False, True, True]


def test_the_client_that_is_idle_longest_makes_room_for_another(clock: SimpleNamespace) -> None:
    ledger = capped(clock, clients=2)
    early, late, new, newer = (os.urandom(16) for _ in range(4))
    assert apply(ledger, Increment("a"), client=early) == [1]
    clock.now = 10.0
    assert apply(ledger, Increment("a"), client=late) == [2]
    clock.now = CLIENT_MINIMUM - 1
    assert apply(ledger, Increment("a")) == [CLIENT]
    clock.now = CLIENT_MINIMUM
    # In one commit: there is room for the first of the two only, and the forgotten client is unknown at once.
    asked = [(new, 1), (newer, 1), (early, 2)]
    first, second, third = ledger.perform([Batch(client, sequence, [Increment("a")]) for client, sequence in asked])
    assert (first, second) == ([3], [CLIENT])
    assert isinstance(third, BatchRefused)
    assert ledger.sizes[1] == 2
    assert apply(ledger, Increment("a"), client=late, sequence=2) == [4]
    assert apply(ledger, Increment("a"), client=new, sequence=2) == [5]
    assert isinstance(ledger.perform([Batch(early, 2, [Increment("a")])])[0], BatchRefused)


def test_a_client_whose_process_has_ended_makes_room_at_once(clock: SimpleNamespace) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ledger = capped(clock, clients=2)
    for number, client in enumerate((ANN, BOB), 1):
        assert apply(ledger, Increment("a"), client=client) == [number]
    for pid in (os.getpid(), 0):  # one that runs, and one that cannot be seen from here
        ledger.remembered.leave(ANN, pid)
        assert apply(ledger, Increment("a"), client=os.urandom(16)) == [CLIENT]
    assert apply(ledger, Increment("a"), client=ANN, sequence=1) == [1]  # sent again
    for client in (ANN, os.urandom(16), ANN):
        ledger.remembered.leave(client, ended.pid)
    # In one commit: there is room for one of the two.
    assert ledger.perform([Batch(client, 1, [Increment("a")]) for client in (CYD, os.urandom(16))]) == [[3], [CLIENT]]
    assert ledger.sizes[1] == 2
    assert apply(ledger, Increment("a"), client=os.urandom(16)) == [CLIENT]
    assert apply(ledger, Increment("a"), client=BOB, sequence=2) == [4]


def test_new_clients_of_one_commit_share_the_room(clock: SimpleNamespace) -> None:
    ledger = capped(clock, clients=2)
    batches = [Batch(client, 1, [Increment("a")]) for client in (ANN, BOB, CYD)]
    assert ledger.perform(batches) == [[1], [2], [CLIENT]]


def test_a_process_for_each_request_is_never_one_too_many(start_manager: StartManager, data_dir: Path) -> None:
    """A process that has ended sends nothing again, and one whose parent has not reaped it yet has ended too."""
    start_manager("--max-clients", "2")

    url = DataDirectory(data_dir).url
    reader, writer = os.pipe()
    pids = []
    try:
        for number in range(1, 7):
            with open_client(url) as state:
                eventually(lambda: cast(Status, state.status()).connections == 1, "the end of the other connections")
            pids.append(os.fork())
            if not pids[-1]:
                try:
                    with open_client(url) as state:
                        os.write(writer, b"%d\n" % state.counter("c").increment())
                finally:
                    os._exit(0)
            assert os.read(reader, 100) == b"%d\n" % number
            os.waitid(os.P_PID, pids[-1], os.WEXITED | os.WNOWAIT)
    finally:
        os.close(reader)
        os.close(writer)
        for pid in pids:
            os.waitpid(pid, 0)


def test_a_shared_object_has_the_cap_of_clients_too() -> None:
    hosted = HostedObject(declare("toolbox", Toolbox, (), {}, durable=False), lambda: 1.0, most_clients=1)
    call: list[Operation] = [Invoke("no_such_method", b"")]
    assert isinstance(hosted.apply(Batch(ANN, 1, call)), list)
    assert hosted.apply(Batch(BOB, 1, call)) == [no_room("client", 1, "clients")]
    assert hosted.apply(Batch(ANN, 2, call)) == hosted.apply(Batch(ANN, 2, call))


# A manager with all of them


def test_a_manager_holds_to_its_caps_and_counts_on(start_manager: StartManager, stack: ExitStack) -> None:
    manager = start_manager("--max-counters", "3", "--max-keys", "2", "--max-clients", "2")
    state, second, third = (stack.enter_context(open_client(manager.url)) for _ in range(3))
    a = state.counter("a")
    assert [state.counter(name).increment() for name in "abc"] == [1] * 3
    with pytest.raises(StorageFull, match=r"there are 3, the maximum of --max-counters"):
        state.counter("d").increment()
    assert [a.increment(key=key) for key in "kl"] == [2, 3]
    with pytest.raises(StorageFull, match=r"there are 2, the maximum of --max-keys"):
        a.increment(key="m")
    assert a.increment(key="k") == 2
    assert second.counter("a").increment() == 4
    for _ in range(3):
        with pytest.raises(StorageFull, match=r"there are 2, the maximum of --max-clients") as refused:
            third.counter("a").increment()
        assert refused.value.outcome == "not_applied"
    assert third.counter("a").value == 4
    assert a.increment() == 5
    status = state.status()
    assert status is not None
    assert (status.counters, status.keys, status.clients) == (3, 2, 2)


@pytest.mark.slow
def test_a_journal_of_the_largest_size_refuses_writes_until_a_deletion(
    start_manager: StartManager, stack: ExitStack, data_dir: Path
) -> None:
    manager = start_manager("--durability", "process", "--max-journal-bytes", str(2**20))
    state = stack.enter_context(open_client(manager.url))
    store = stack.enter_context(closing(open_store(manager.url)))
    results: list[Result] = [1]
    made = 0
    while results[0] == 1:
        operations: list[Operation] = [Increment(f"{number:0250}") for number in range(made, made + 50)]
        results = store.apply(Batch(os.urandom(16), 1, operations), time.monotonic() + PATIENCE)
        made += 50 if results[0] == 1 else 0
    assert all(isinstance(result, Refusal) and "--max-journal-bytes" in result.message for result in results)
    assert 3000 < made < 5000
    assert state.counter(f"{0:0250}").increment() == 2  # takes no more room
    assert len(state.counters(limit=10).counters) == 10
    for number in range(200):
        state.counter(f"{number:0250}").delete()
    assert state.counter("x" * 250).increment() == 1
    assert (data_dir / "journal.sqlite3").stat().st_size <= 2**20


@pytest.mark.slow
def test_a_connection_over_the_cap_gets_in_when_another_leaves(
    start_manager: StartManager, stack: ExitStack, data_dir: Path
) -> None:
    manager = start_manager("--max-connections", "2")
    counter = stack.enter_context(open_client(manager.url)).counter("c")
    assert counter.increment() == 1
    last, kind, _ = greeted(data_dir)
    assert kind == "#RETURN"
    late, patient = (stack.enter_context(open_client(manager.url, deadline=seconds)) for seconds in (2, PATIENCE))

    def is_told() -> bool:
        """Try again if the manager was held up at the deadline: then the error says that."""
        with pytest.raises(DeadlineExceeded) as told:
            late.counter("c").increment()
        assert told.value.outcome == "not_applied"
        return "it has 2 connections, the maximum of --max-connections" in str(told.value)

    eventually(is_told, "the cap in the error")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(patient.counter("c").increment)
        assert counter.increment() == 2  # those that are in are not disturbed
        last.close()
        assert waiting.result(PATIENCE) == 3


@pytest.mark.slow
def test_connections_far_over_the_cap_are_closed_without_a_thread(
    start_manager: StartManager, stack: ExitStack, data_dir: Path
) -> None:
    manager = start_manager("--max-connections", "1")
    counter = stack.enter_context(open_client(manager.url, deadline=PATIENCE)).counter("c")
    assert counter.increment() == 1
    socket = str(DataDirectory(data_dir).socket)
    crowd = [stack.enter_context(closing(connect(socket))) for _ in range(300)]  # they say nothing

    def threads() -> int:
        return len(list(Path(f"/proc/{manager.pid}/task").iterdir()))

    assert threads() < 130
    challenged = 0
    for connection in crowd:
        with suppress(OSError, EOFError):  # the others were merely closed
            challenged += bool(connection.recv_bytes())
    assert challenged <= 100
    assert counter.increment() == 2
    eventually(lambda: threads() < 10, "the end of the silent ones")
    assert counter.increment() == 3


@pytest.mark.slow
def test_a_manager_takes_no_more_connections_than_it_has_descriptors(stack: ExitStack, data_dir: Path) -> None:
    command = (sys.executable, "manager_process.py", "--data-dir", data_dir, "--max-connections", "500")
    program = stack.enter_context(Program("--nofile=64:264", *command, program="prlimit"))
    counter = stack.enter_context(open_client(program.expect("Manager ready:"))).counter("c")
    assert resource.prlimit(program.pid, resource.RLIMIT_NOFILE) == (264, 264)
    assert counter.increment() == 1
    kinds = []
    for _ in range(101):
        connection, kind, _ = greeted(data_dir)
        stack.callback(connection.close)
        kinds.append(kind)
    assert kinds == ["#RETURN"] * 99 + ["#FULL"] * 2


@pytest.mark.slow
def test_a_server_has_caps_and_its_refusal_shows_nothing_of_the_inside(start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "1", "--max-counters", "1")
    assert ask(server.url, "POST", "/api/v1/counters/a/increment")[0] == 200
    status, _, text = ask(server.url, "POST", "/api/v1/counters/b/increment")
    assert (status, "StorageFull" in text, "not_applied" in text, "--max" in text) == (503, True, True, False)
    assert ask(server.url, "POST", "/api/v1/counters/a/increment")[0] == 200
    assert ask(server.url, "GET", "/readyz")[0] == 200  # it can write


@pytest.mark.slow
def test_a_manager_on_demand_has_its_caps_from_the_environment(
    on_demand: str, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_MAX_COUNTERS", "1")
    state = stack.enter_context(open_state(on_demand, options=StoreOptions(idle_timeout=1)))
    assert state.counter("a").increment() == 1
    with pytest.raises(StorageFull, match="--max-counters"):
        state.counter("b").increment()
