"""What a manager takes at the most: one more is refused by name, what is there goes on, and nothing is miscounted."""

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counter_server import StoreOptions, open_state
from counter_server.errors import BatchRefused, DeadlineExceeded, StorageFull
from counter_server.ledger import CLIENT_LIFETIME, CLIENT_MINIMUM, KEY_LIFETIME, Changes, Clients, Ledger
from counter_server.manager.client import StateProxy
from counter_server.manager.directory import DataDirectory
from counter_server.manager.wire import connect
from counter_server.objects import HostedObject, declare
from counter_server.operations import Batch, Delete, Increment, Invoke, Operation, Refusal, Replayed, Result, Set
from counter_server.settings import Caps
from tests.hosted_classes import Toolbox
from tests.journals import Committing
from tests.load import open_client
from tests.processes import PATIENCE, Manager, Program, Server, eventually
from tests.test_manager import greeted
from tests.test_server import ask

StartManager = Callable[..., Manager]


def apply(ledger: Ledger, *operations: Operation, client: bytes | None = None, sequence: int = 1) -> list[Result]:
    """The results of a batch, of a new client if none is named."""
    (answer,) = ledger.perform([Batch(client or os.urandom(16), sequence, list(operations))])
    assert not isinstance(answer, BatchRefused), answer
    return answer


def words(result: Result) -> str:
    """Of a refusal for want of room."""
    assert isinstance(result, Refusal), result
    assert result.code == "storage_full"
    return result.message


# Counters


def test_a_counter_too_many_is_refused_by_number_and_option_and_the_others_count_on() -> None:
    ledger = Ledger(caps=Caps(counters=2))
    assert apply(ledger, Increment("a"), Increment("b")) == [1, 1]
    refused, counted, also_refused = apply(ledger, Increment("c"), Increment("a"), Set("d", 5))
    assert counted == 2
    for result in (refused, also_refused):
        assert "2, the maximum of --max-counters" in words(result)
    assert apply(ledger, Set("b", 7), Increment("b")) == [7, 8]
    assert ledger.sizes[0] == 2


def test_what_is_made_and_removed_in_one_batch_is_reckoned_with_at_once() -> None:
    ledger = Ledger(caps=Caps(counters=1))
    results = apply(ledger, Increment("a"), Increment("b"), Delete("a"), Delete("a"), Increment("b"), Increment("a"))
    assert (results[0], *results[2:5]) == (1, True, False, 1)
    assert "--max-counters" in words(results[1])
    assert "--max-counters" in words(results[5])
    assert apply(ledger, Delete("b"), Set("c", 3), Set("c", 4)) == [True, 3, 4]


@given(
    batches=st.lists(
        st.lists(
            st.tuples(st.sampled_from([Increment, Delete, lambda name: Set(name, 5)]), st.sampled_from("abcd")),
            min_size=1,
            max_size=8,
        ),
        max_size=8,
    ),
    most=st.integers(1, 3),
    together=st.booleans(),
)
def test_never_more_counters_than_may_be_and_never_one_refused_that_had_room(
    batches: list[list[tuple[Callable[[str], Operation], str]]], most: int, *, together: bool
) -> None:
    """Against the plain rule, also with several batches in one commit."""
    ledger = Ledger(caps=Caps(counters=most))
    all_batches = [Batch(os.urandom(16), 1, [make(name) for make, name in batch]) for batch in batches]
    groups = [all_batches] if together else [[batch] for batch in all_batches]
    there: set[str] = set()
    for group in groups:
        for batch, answer in zip(group, ledger.perform(group), strict=True):
            assert not isinstance(answer, BatchRefused)
            for operation, result in zip(batch.operations, answer, strict=True):
                assert not isinstance(operation, Invoke)
                name = getattr(operation, "name", "")
                if isinstance(operation, Delete):
                    there.discard(name)
                else:
                    assert isinstance(result, Refusal) == (name not in there and len(there) == most)
                    there |= {name} if not isinstance(result, Refusal) else set()
    assert ledger.sizes[0] == len(there)


def test_a_refused_counter_leaves_its_key_unused_and_a_bound_is_told_before_the_want_of_room() -> None:
    ledger = Ledger(caps=Caps(counters=1))
    (made, refused, bound) = apply(ledger, Increment("a"), Increment("b", key="k"), Increment("b", maximum=0))
    assert made == 1
    words(refused)
    assert isinstance(bound, Refusal)
    assert bound.code == "limit"
    assert ledger.sizes[2] == 0
    assert apply(ledger, Increment("a", key="k")) == [2]


def test_a_commit_that_found_no_room_on_the_disk_has_made_no_counter() -> None:
    disk = SimpleNamespace(full=True)

    def commit(_changes: Changes) -> None:
        if disk.full:
            raise StorageFull("no room")

    ledger = Ledger(journal=Committing(commit), caps=Caps(counters=1))
    words(apply(ledger, Increment("a"))[0])
    disk.full = False
    assert apply(ledger, Increment("b")) == [1]


# Keys


def test_a_key_too_many_is_refused_and_nothing_is_counted_until_others_are_a_day_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=lambda: clock.now))
    ledger = Ledger(caps=Caps(keys=2))
    assert apply(ledger, Increment("a", key="k"), Increment("a", key="l"), Increment("a", key="l")) == [
        *(1, 2, Replayed(2))
    ]
    refused, plain = apply(ledger, Increment("a", key="m"), Increment("a"))
    assert "2, the maximum of --max-keys" in words(refused)
    assert plain == 3
    clock.now += KEY_LIFETIME + 1
    assert apply(ledger, Increment("a", key="k")) == [4]  # its own place is free
    assert apply(ledger, Increment("a", key="m")) == [5]  # and the other one's, since that commit
    words(apply(ledger, Increment("a", key="n"))[0])


# Clients


def test_a_client_too_many_may_read_but_not_write_and_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=lambda: clock.now))
    ledger = Ledger(caps=Caps(clients=2))
    ann, bob, cyd = (letter * 16 for letter in (b"a", b"b", b"c"))
    for client in (ann, bob):
        apply(ledger, Increment("x"), client=client)
    for _ in range(2):
        refused = apply(ledger, Increment("x"), Set("y", 1), client=cyd)
        assert ["2, the maximum of --max-clients" in words(result) for result in refused] == [True, True]
    assert apply(ledger, Increment("x"), client=ann, sequence=2) == [3]
    assert apply(ledger, Increment("x"), client=bob) == [2]  # sent again
    (answer,) = ledger.perform([Batch(cyd, 2, [Increment("x")])])
    assert isinstance(answer, BatchRefused)  # so it begins anew, by another name
    assert (ledger.sizes[1], ledger.sizes[0]) == (2, 1)
    clock.now += CLIENT_LIFETIME + 1
    words(apply(ledger, Increment("x"))[0])  # makes room
    assert apply(ledger, Increment("x")) == [4]


def test_a_batch_that_was_turned_away_is_not_applied_when_it_comes_late_and_there_is_room() -> None:
    """A copy of it may be on its way over a connection that its client has given up, having been told."""
    clients = Clients({}, 0)
    assert clients.admit(b"a" * 16, Changes(0.0)) is not None
    clients._most = 1
    assert clients.admit(b"a" * 16, Changes(0.0)) is not None
    assert clients.admit(b"b" * 16, Changes(0.0)) is None


def test_the_client_that_is_idle_longest_makes_room_for_another() -> None:
    now = [0.0]
    ledger = Ledger(clock=lambda: now[0], caps=Caps(clients=2))
    early, late, new, newer = (os.urandom(16) for _ in range(4))
    assert apply(ledger, Increment("a"), client=early) == [1]
    now[0] = 10.0
    assert apply(ledger, Increment("a"), client=late) == [2]
    now[0] = CLIENT_MINIMUM - 1
    assert "--max-clients" in words(apply(ledger, Increment("a"))[0])
    now[0] = CLIENT_MINIMUM
    # Two in one commit: there is room for the first of them only.
    answers = ledger.perform([Batch(new, 1, [Increment("a")]), Batch(newer, 1, [Increment("a")])])
    assert answers[0] == [3]
    assert isinstance(answers[1], list)
    assert "--max-clients" in words(answers[1][0])
    assert ledger.sizes[1] == 2
    assert apply(ledger, Increment("a"), client=late, sequence=2) == [4]
    assert apply(ledger, Increment("a"), client=new, sequence=2) == [5]
    assert isinstance(ledger.perform([Batch(early, 2, [Increment("a")])])[0], BatchRefused)


def test_a_shared_object_lets_in_no_more_clients_either() -> None:
    hosted = HostedObject(declare("toolbox", Toolbox, (), {}, durable=False), lambda: 1.0, most_clients=1)
    call = [Invoke("no_such_method", b"")]
    first, second = os.urandom(16), os.urandom(16)
    assert isinstance(hosted.apply(Batch(first, 1, [*call])), list)
    (refused,) = hosted.apply(Batch(second, 1, [*call]))
    assert "--max-clients" in words(refused)
    assert hosted.apply(Batch(first, 2, [*call])) == hosted.apply(Batch(first, 2, [*call]))


# A manager with all of them


def test_a_manager_holds_to_its_caps_and_counts_on(start_manager: StartManager, stack: ExitStack) -> None:
    manager = start_manager("--max-counters", "3", "--max-keys", "2", "--max-clients", "2")
    state = stack.enter_context(open_client(manager.url))
    for name in "abc":
        assert state.counter(name).increment() == 1
    with pytest.raises(StorageFull, match="--max-counters"):
        state.counter("d").increment()
    assert state.counter("a").increment(key="k") == 2
    assert state.counter("a").increment(key="l") == 3
    with pytest.raises(StorageFull, match="--max-keys"):
        state.counter("a").increment(key="m")
    assert state.counter("a").increment(key="k") == 2
    with open_client(manager.url) as second, open_client(manager.url) as third:
        assert second.counter("a").increment() == 4
        for _ in range(3):
            with pytest.raises(StorageFull, match="--max-clients") as refused:
                third.counter("a").increment()
            assert refused.value.outcome == "not_applied"
        assert third.counter("a").value == 4
    assert state.counter("a").increment() == 5
    status = state.status()
    assert status is not None
    assert (status.counters, status.keys, status.clients) == (3, 2, 2)


def test_a_journal_of_the_largest_size_refuses_writes_and_has_room_again_after_a_deletion(
    start_manager: StartManager, stack: ExitStack, data_dir: Path
) -> None:
    manager = start_manager("--durability", "process", "--max-journal-bytes", str(2**20))
    proxy = StateProxy(DataDirectory(data_dir))
    stack.callback(proxy.close)
    results: list[Result] = [1]
    made = 0
    while results[0] == 1:
        operations: list[Operation] = [Increment(f"{number:0250}") for number in range(made, made + 50)]
        results = proxy.apply(Batch(os.urandom(16), 1, operations), time.monotonic() + PATIENCE)
        made += 50 if results[0] == 1 else 0
    assert all("--max-journal-bytes" in words(result) for result in results)
    assert 3000 < made < 5000
    state = stack.enter_context(open_client(manager.url))
    assert state.counter(f"{0:0250}").increment() == 2  # takes no more room
    assert len(state.counters(limit=10).counters) == 10
    for number in range(200):
        state.counter(f"{number:0250}").delete()
    assert state.counter("x" * 250).increment() == 1
    assert (data_dir / "journal.sqlite3").stat().st_size <= 2**20


def test_connections_over_the_cap_are_told_so_and_get_in_when_another_goes(
    start_manager: StartManager, stack: ExitStack, data_dir: Path
) -> None:
    manager = start_manager("--max-connections", "3")
    others = [stack.enter_context(open_client(manager.url)) for _ in range(2)]
    for state in others:
        state.counter("c").increment()
    last, kind, _ = greeted(data_dir)
    assert kind == "#RETURN"
    full = "it has 3 connections, the maximum of --max-connections"
    over, kind, words = greeted(data_dir)
    over.close()
    assert (kind, words) == ("#FULL", full)
    with open_client(manager.url, deadline=2) as late:

        def is_told() -> bool:
            """Where the manager was held up at the end of the deadline, that is what the error says."""
            with pytest.raises(DeadlineExceeded) as told:
                late.counter("c").increment()
            assert told.value.outcome == "not_applied"
            return full in str(told.value)

        eventually(is_told, "the cap in the error")
    values: list[int] = []
    with open_client(manager.url, deadline=PATIENCE) as patient:
        waiting = threading.Thread(target=lambda: values.append(patient.counter("c").increment()))
        waiting.start()
        assert others[0].counter("c").increment() == 3  # those that are in are not disturbed
        last.close()
        waiting.join(PATIENCE)
    assert values == [4]


def test_connections_far_over_the_cap_are_closed_without_a_thread(
    start_manager: StartManager, stack: ExitStack, data_dir: Path
) -> None:
    manager = start_manager("--max-connections", "1")
    state = stack.enter_context(open_client(manager.url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    directory = DataDirectory(data_dir)
    crowd = [stack.enter_context(Silent(directory)) for _ in range(300)]
    assert len(list(Path(f"/proc/{manager.pid}/task").iterdir())) < 130
    assert sum(peer.challenged for peer in crowd) <= 100
    assert state.counter("c").increment() == 2
    eventually(lambda: len(list(Path(f"/proc/{manager.pid}/task").iterdir())) < 10, "the end of the silent ones")
    assert state.counter("c").increment() == 3


class Silent:
    """A peer that connects, and says nothing."""

    def __init__(self, directory: DataDirectory) -> None:
        self._connection = connect(str(directory.socket))

    @property
    def challenged(self) -> bool:
        """Whether the manager has begun to talk to it, and has not merely closed."""
        try:
            return bool(self._connection.recv_bytes())
        except (OSError, EOFError):
            return False

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def test_a_manager_asks_for_the_descriptors_that_it_may_need_and_takes_no_more_than_it_gets(
    stack: ExitStack, data_dir: Path
) -> None:
    limited = ("--data-dir", str(data_dir), "--max-connections", "500")
    program = stack.enter_context(
        Program(*("--nofile=64:264", sys.executable, "manager_process.py", *limited), program="prlimit")
    )
    url = program.expect("Manager ready:")
    assert resource.prlimit(program.pid, resource.RLIMIT_NOFILE) == (264, 264)
    state = stack.enter_context(open_client(url))
    assert state.counter("c").increment() == 1
    kinds = []
    for _ in range(101):
        connection, kind, _ = greeted(data_dir)
        stack.callback(connection.close)
        kinds.append(kind)
    assert kinds == ["#RETURN"] * 99 + ["#FULL"] * 2


# Where they are said


def test_a_server_has_caps_and_a_refusal_over_http_shows_nothing_of_the_inside(
    start_server: Callable[..., Server],
) -> None:
    server = start_server("--workers", "1", "--max-counters", "1")
    assert ask(server.url, "POST", "/api/v1/counters/a/increment")[0] == 200
    status, _, text = ask(server.url, "POST", "/api/v1/counters/b/increment")
    assert (status, "StorageFull" in text, "not_applied" in text, "--max" in text) == (503, True, True, False)
    assert ask(server.url, "POST", "/api/v1/counters/a/increment")[0] == 200
    assert ask(server.url, "GET", "/readyz")[0] == 200  # it can write


def test_a_manager_on_demand_has_its_caps_from_the_environment(
    on_demand: str, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_MAX_COUNTERS", "1")
    state = stack.enter_context(open_state(on_demand, options=StoreOptions(idle_timeout=1)))
    assert state.counter("a").increment() == 1
    with pytest.raises(StorageFull, match="--max-counters"):
        state.counter("b").increment()
