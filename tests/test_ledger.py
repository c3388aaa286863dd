"""The ledger: what batches do to counters, and the memory that makes each of them count once."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from counter_server.errors import BatchRefused, StorageFull
from counter_server.ledger import CLIENT_LIFETIME, KEY_LIFETIME, Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import (
    LARGEST,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Scan,
    Set,
)
from tests.processes import PATIENCE, eventually

ANN = b"ann".ljust(16)
BOB = b"bob".ljust(16)
CYD = b"cyd".ljust(16)
READER = bytes(16)


class Caller:
    """A client that numbers its batches as it should."""

    def __init__(self, ledger: Ledger, client: bytes = ANN) -> None:
        self.ledger = ledger
        self.client = client
        self.sequence = 0

    def __call__(self, *operations: Operation) -> list[Result]:
        self.sequence += 1
        return self.resend(*operations)

    def resend(self, *operations: Operation) -> list[Result]:
        (answer,) = self.ledger.perform([Batch(self.client, self.sequence, list(operations))])
        assert not isinstance(answer, BatchRefused), answer
        return [plain(result) for result in answer]


def plain(result: Result) -> Result:
    """Return the code of a refusal, which a model knows, for its message, which is for people."""
    return Refusal(result.code, "") if isinstance(result, Refusal) else result


def read(ledger: Ledger, *operations: Operation) -> list[Result]:
    return ledger.apply(Batch(READER, 0, list(operations)))


def everything(ledger: Ledger) -> dict[str, int]:
    (page,) = read(ledger, Scan("", 1000))
    assert isinstance(page, Page)
    assert not page.more
    return dict(page.counters)


class Disk:
    """What a journal does, as a test wants it: keep, refuse, break, or hold one commit until `go_on`."""

    def __init__(self, held: int = 0) -> None:
        self.committed: list[Changes] = []
        self.error: Exception | None = None
        self.held = held
        self.holds, self.go_on = threading.Event(), threading.Event()

    def commit(self, changes: Changes) -> None:
        if self.error is not None:
            raise self.error
        if len(self.committed) + 1 == self.held:
            self.holds.set()
            assert self.go_on.wait(PATIENCE)
        self.committed.append(changes)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the seconds that `time.monotonic` tells the ledger. It must precede the ledger among the fixtures."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def ledger(disk: Disk) -> Ledger:
    return Ledger(journal=disk)


@pytest.fixture
def call(ledger: Ledger) -> Caller:
    return Caller(ledger)


add, keyed = Increment, partial(Increment, key="k")
LIMIT, REUSED, FULL = (Refusal(code, "") for code in ("limit", "key_reused", "storage_full"))

RESULTS: dict[str, list[tuple[Operation, Result]]] = {
    "increments": [(add("a"), 1), (add("a", 5), 6), (add("a", -10), -4), (add("b"), 1)],
    "bounds": [
        (add("a", 3, None, 3), 3),
        (add("a", 1, None, 3), LIMIT),
        (add("a", -4, 0), LIMIT),
        (add("a", -3, 0), 0),
    ],
    "refused, not made": [(add("a", 2, maximum=1), LIMIT), (Get("a"), None)],
    "bounds are of the result": [(Set("a", 9), 9), (add("a", -1, maximum=5), LIMIT), (add("a", -5, maximum=5), 4)],
    "the largest": [
        (add("a", LARGEST), LARGEST),
        (add("a"), LIMIT),
        (add("a", LARGEST), LIMIT),
        (add("a", -1), LARGEST - 1),
    ],
    "the smallest": [
        (add("a", SMALLEST), SMALLEST),
        (add("a", -1), LIMIT),
        (add("a", SMALLEST), LIMIT),
        (Get("a"), SMALLEST),
    ],
    "set": [(Get("a"), None), (Set("a", 0), 0), (Get("a"), 0), (Set("a", -7), -7), (add("a"), -6)],
    "delete": [(Delete("a"), False), (Set("a", 5), 5), (Delete("a"), True), (Delete("a"), False), (add("a"), 1)],
    "a key counts once": [(keyed("a", 2), 2), (add("a"), 3), (keyed("a", 2), Replayed(2)), (add("a", key="l"), 4)],
    "a key is of one request": [
        (keyed("a"), 1),
        (keyed("b"), REUSED),
        (keyed("a", 1, 0), REUSED),
        (keyed("a"), Replayed(1)),
    ],
    "a key precedes the bounds": [(keyed("a", maximum=1), 1), (keyed("a", maximum=1), Replayed(1))],
    "a refused request uses no key": [(Set("a", 5), 5), (keyed("a", maximum=5), LIMIT), (keyed("b"), 1)],
    "a key survives its counter": [(keyed("a"), 1), (Delete("a"), True), (keyed("a"), Replayed(1)), (Get("a"), None)],
}


@pytest.mark.parametrize("together", [False, True], ids=["a batch each", "one batch"])
@pytest.mark.parametrize("steps", RESULTS.values(), ids=RESULTS)
def test_operations_have_their_results(steps: list[tuple[Operation, Result]], call: Caller, *, together: bool) -> None:
    operations = [operation for operation, _ in steps]
    found = call(*operations) if together else [call(operation)[0] for operation in operations]
    assert list(map(repr, found)) == [repr(result) for _, result in steps]  # True is not 1
    model = Model()
    model.apply(Batch(ANN, 1, operations))
    assert everything(call.ledger) == model.counters
    assert read(call.ledger, Get("a"), Get("b")) == [model.counters.get("a"), model.counters.get("b")]
    assert call.ledger.sizes == (len(model.counters), 1, len(model.keys))


def test_pages_have_every_counter_once_in_the_order_of_the_names(call: Caller) -> None:
    names = [f"n{number:03}" for number in range(25)] + ["N", "\u00e9", "\u4e2d", "\U0001f600", "\uffee"]
    call(*[Set(name, number) for number, name in enumerate(reversed(names))], Set("gone", 1), Delete("gone"))
    call(Set("gone", 1))
    call(Delete("gone"))
    found: list[tuple[str, int]] = []
    more = True
    while more:
        (page,) = read(call.ledger, Scan(found[-1][0] if found else "", 7))
        assert isinstance(page, Page)
        found += page.counters
        more = page.more
        assert not more or len(page.counters) == 7
    assert found == sorted(zip(reversed(names), range(30), strict=True), key=lambda item: item[0].encode())


def test_a_page_begins_after_a_name_and_says_whether_there_is_more(call: Caller) -> None:
    call(Set("a", 1), Set("c", 3))
    a, c = ("a", 1), ("c", 3)
    scans = [Scan("", 1), Scan("", 2), Scan("a", 1), Scan("b"), Scan("c"), Scan("A", 3)]
    assert read(call.ledger, *scans) == [
        Page([a], more=True),
        Page([a, c], more=False),
        Page([c], more=False),
        Page([c], more=False),
        Page([], more=False),
        Page([a, c], more=False),
    ]


# Batches sent again


@pytest.mark.parametrize("together", [False, True], ids=["a commit each", "one commit"])
def test_a_batch_is_executed_once_and_only_if_it_follows_the_last(
    ledger: Ledger, disk: Disk, *, together: bool
) -> None:
    operations: list[Operation] = [Increment("a"), Get("a")]
    batches, expected = zip(
        (Batch(ANN, 2, operations), None),
        (Batch(ANN, LARGEST, operations), None),
        (Batch(ANN, 1, operations), [1, 1]),
        (Batch(ANN, 1, operations), [1, 1]),
        (Batch(BOB, 1, [*operations, Delete("a"), Get("a")]), [2, 2, True, None]),
        (Batch(ANN, 1, operations), [1, 1]),
        (Batch(ANN, 2, [Increment("a", 9)]), [9]),
        (Batch(ANN, 1, operations), None),
        (Batch(ANN, 4, operations), None),
        (Batch(BOB, LARGEST, operations), None),
        (Batch(ANN, 3, operations), [10, 10]),
        (Batch(ANN, 2, operations), None),
        strict=True,
    )
    answers = ledger.perform(list(batches)) if together else [ledger.perform([batch])[0] for batch in batches]
    assert [None if isinstance(answer, BatchRefused) else answer for answer in answers] == list(expected)
    assert [str(answer) for answer in answers[:2]] == [f"batch {n} does not follow batch 0" for n in (2, LARGEST)]
    assert everything(ledger) == {"a": 10}
    assert len(disk.committed) == (1 if together else 12)
    assert (ledger.batches, ledger.commits, ledger.operations) == (12, len(disk.committed), 25)


def test_the_record_of_a_batch_is_in_the_same_commit_as_its_effect(
    clock: SimpleNamespace, call: Caller, disk: Disk
) -> None:
    clock.now += 3.0
    call(Increment("a", key="k"))
    (changes,) = disk.committed
    assert changes.counters == {"a": 1}
    assert changes.clients == {ANN: ClientRecord(1, [1], 3.0)}
    assert changes.keys == {"k": KeyRecord(Increment("a").fingerprint(), 1, 3.0)}


# Time


def test_a_key_is_kept_for_24_hours_from_its_use_and_then_free(clock: SimpleNamespace, ledger: Ledger) -> None:
    assert KEY_LIFETIME == 24 * 3600
    first, other = Increment("a", key="k"), Increment("b", 7, key="k")
    assert Caller(ledger, b"1" * 16)(first) == [1]
    clock.now += KEY_LIFETIME - 1
    assert Caller(ledger, b"2" * 16)(first) == [Replayed(1)]
    clock.now += 1  # to have asked for it again has not lengthened its life
    assert Caller(ledger, b"3" * 16)(other, other) == [7, Replayed(7)]
    clock.now += KEY_LIFETIME - 1
    assert Caller(ledger, b"4" * 16)(other) == [Replayed(7)]


def test_expired_keys_are_removed_unless_they_were_used_again(clock: SimpleNamespace, call: Caller, disk: Disk) -> None:
    call(Increment("a", key="old"), Increment("a", key="again"))
    clock.now += 2 * KEY_LIFETIME
    assert Caller(call.ledger, BOB)(Increment("a", key="again")) == [3]
    changes = disk.committed[-1]
    assert changes.keys["old"] is None
    assert changes.keys["again"] is not None
    assert call.ledger.sizes == (1, 1, 1)
    assert Caller(call.ledger, CYD)(Increment("a", key="again")) == [Replayed(3)]


def test_a_client_is_forgotten_an_hour_after_its_last_use(clock: SimpleNamespace, call: Caller, disk: Disk) -> None:
    assert CLIENT_LIFETIME == 3600
    bob = Caller(call.ledger, BOB)
    call(Increment("a"))
    clock.now += CLIENT_LIFETIME - 1
    bob(Increment("b"))
    assert call.resend(Increment("a")) == [1]
    assert call(Increment("a")) == [2]  # a use: the hour begins again
    clock.now += CLIENT_LIFETIME - 1
    bob(Increment("b"))
    assert call.resend(Increment("a")) == [2]
    clock.now += 1
    bob(Increment("b"))  # any commit forgets
    assert disk.committed[-1].clients[ANN] is None
    assert isinstance(call.ledger.perform([Batch(ANN, 3, [Increment("a")])])[0], BatchRefused)
    assert everything(call.ledger) == {"a": 2, "b": 3}
    clock.now += CLIENT_LIFETIME
    assert bob(Increment("b")) == [4], "a client that writes just when it would be forgotten is not forgotten"
    assert bob.resend(Increment("b")) == [4]
    assert bob(Increment("b")) == [5]


@pytest.mark.parametrize("keys", [False, True], ids=["clients", "keys"])
def test_expired_records_are_removed_over_several_commits(clock: SimpleNamespace, disk: Disk, *, keys: bool) -> None:
    ledger = Ledger(journal=disk)
    if keys:
        for start, end in ((0, 1000), (1000, 2000), (2000, 2500)):
            Caller(ledger, b"%16d" % start)(*[Increment("a", key=str(number)) for number in range(start, end)])
    else:
        ledger.perform([Batch(number.to_bytes(16, "big"), 1, [Increment("a")]) for number in range(2500)])
    clock.now += KEY_LIFETIME
    call = Caller(ledger, BOB)
    removed: list[int] = []
    for _ in range(4):
        call(Increment("a"))
        changes = disk.committed[-1]
        removed.append(list(changes.keys.values() if keys else changes.clients.values()).count(None))
    assert removed == [1000, 1000, 500, 0]
    # After that, expired records are looked for once a second, and not in every commit.
    ann = Caller(ledger, ANN)
    ann(Increment("a", key="late"))
    used = clock.now
    clock.now = used + (KEY_LIFETIME if keys else CLIENT_LIFETIME) - 0.5
    call(Increment("a"))
    found = []
    for _ in range(3):
        clock.now += 0.5
        call(Increment("a"))
        changes = disk.committed[-1]
        found.append(list(changes.keys.values() if keys else changes.clients.values()).count(None))
    assert found == [0, 1, 0]


def test_a_clock_that_restarts_neither_forgets_nor_revives(clock: SimpleNamespace, disk: Disk) -> None:
    """As after a restart of the machine: the contents are those of before, the clock is not."""
    first = Ledger(None, disk)
    call = Caller(first)
    call(Increment("a", key="k"))
    clock.now += 1000
    call(Increment("a"))
    shown: list[Contents] = []
    contents = first.show(shown.append)
    assert shown == [contents]
    clock.now = 3.0
    second = Ledger(contents, disk)
    assert second.now() == 1000.0
    assert everything(second) == {"a": 2}
    Caller(second, BOB)(Increment("b"))
    record = disk.committed[-1].clients[BOB]
    assert record is not None
    assert record.used == 1000.0
    clock.now += KEY_LIFETIME - 1001  # the key is 1000 seconds old already
    assert Caller(second, CYD)(Increment("a", key="k")) == [Replayed(1)]
    clock.now += 2
    assert Caller(second, b"d" * 16)(Increment("c", key="k")) == [1]


# The disk


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_nothing_is_readable_before_it_is_committed_and_reads_do_not_wait() -> None:
    disk = Disk(held=2)
    ledger = Ledger(journal=disk)
    call = Caller(ledger)
    call(Increment("a"))
    results: list[list[Result]] = []
    writer = started(lambda: results.append(call(Increment("a"), Set("b", 5))))
    try:
        assert disk.holds.wait(PATIENCE)
        seen: list[list[Result]] = []
        started(lambda: seen.append(read(ledger, Get("a"), Get("b"), Scan()))).join(PATIENCE)
        assert seen == [[1, None, Page([("a", 1)], more=False)]], "a read waited for a commit, or saw it before its end"
        assert ledger.sizes[0] == 1
        assert not results
    finally:
        disk.go_on.set()
        writer.join(PATIENCE)
    assert results == [[2, 5]]
    assert everything(ledger) == {"a": 2, "b": 5}


def test_threads_that_wait_for_a_commit_share_the_next() -> None:
    disk = Disk(held=1)
    ledger = Ledger(journal=disk)
    threads = [started(partial(ledger.apply, Batch(ANN, 1, [Increment("a")])))]
    assert disk.holds.wait(PATIENCE)
    threads += [started(partial(ledger.apply, Batch(client, 1, [Increment("a")]))) for client in (BOB, CYD)]
    eventually(lambda: len(ledger._combiner._waiting) == 2, "two waiting threads")
    with ledger._memory:  # a read: no part of a commit is merged meanwhile
        disk.go_on.set()
        threads[0].join(0.1)
        assert threads[0].is_alive()
    for thread in threads:
        thread.join(PATIENCE)
    assert [set(changes.clients) for changes in disk.committed] == [{ANN}, {BOB, CYD}]
    assert 0 < ledger.commit_seconds < 10 * PATIENCE
    assert not ledger._combiner._together, "commits are short"
    assert everything(ledger) == {"a": 3}
    with ledger._memory:
        reader = started(partial(read, ledger, Get("a")))
        reader.join(0.1)
        assert reader.is_alive(), "a read saw memory while it may change"


def test_a_stopped_ledger_ends_its_commit_and_begins_no_other() -> None:
    """Batches of other threads wait for the commit under way and follow in one; reads go on."""
    disk = Disk(held=1)
    ledger = Ledger(journal=disk)
    results: list[Result] = []

    def count(client: bytes) -> threading.Thread:
        return started(lambda: results.extend(ledger.apply(Batch(client, 1, [Increment("a")]))))

    under_way = count(ANN)
    assert disk.holds.wait(PATIENCE)
    stopping = started(ledger.stop)
    stopping.join(0.05)
    assert stopping.is_alive(), "it did not wait for the commit under way"
    disk.go_on.set()
    stopping.join(PATIENCE)
    assert not stopping.is_alive()
    under_way.join(PATIENCE)
    others = [count(BOB), count(CYD)]
    others[0].join(0.05)
    assert others[0].is_alive()
    shown: list[Contents] = []
    others.append(started(partial(ledger.show, shown.append)))
    others[-1].join(0.05)
    assert shown == []
    assert len(disk.committed) == 1
    assert read(ledger, Get("a")) == [1]
    ledger._writing.release()
    for other in others:
        other.join(PATIENCE)
    assert sorted(map(str, results)) == ["1", "2", "3"]
    assert ledger.commits <= 3


def test_after_a_fork_no_call_of_the_parents_threads_is_left() -> None:
    disk = Disk(held=1)
    ledger = Ledger(journal=disk)
    parent = started(partial(ledger.apply, Batch(ANN, 1, [Increment("a")])))
    assert disk.holds.wait(PATIENCE)
    ledger.after_fork()
    disk.held = 0
    assert ledger.apply(Batch(BOB, 1, [Increment("b")]), time.monotonic() + PATIENCE) == [1]
    disk.go_on.set()
    parent.join(PATIENCE)


def test_a_full_disk_refuses_writes_and_answers_reads(clock: SimpleNamespace, call: Caller, disk: Disk) -> None:
    """A batch that was refused stays refused when it is sent again; an applied one is answered as before."""
    first: list[Operation] = [Increment("a"), Set("b", 5)]
    call(*first)
    clock.now += CLIENT_LIFETIME
    disk.error = StorageFull("no room")
    assert call.resend(*first) == [1, 5]
    second: list[Operation] = [Increment("a"), Get("a"), Set("b", 6), Delete("b"), Get("b"), Increment("c", key="k")]
    refused = call(*second)
    assert refused == [FULL, 1, FULL, FULL, 5, FULL]
    Caller(call.ledger, BOB)(Increment("a"))  # it forgets nothing, either
    disk.error = None
    assert call.resend(*second) == refused
    assert everything(call.ledger) == {"a": 1, "b": 5}
    assert call(Increment("a"), Increment("c", key="k")) == [2, 1]


def test_a_full_disk_answers_a_known_key_with_its_number(call: Caller, disk: Disk) -> None:
    assert call(Increment("a", key="k")) == [1]
    disk.error = StorageFull("no room")
    keys = [Increment("a", key="k"), Increment("b", key="k"), Increment("a", key="l")]
    assert call(*keys) == [Replayed(1), REUSED, FULL]


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(5, "I/O"), MemoryError()], ids=repr)
def test_another_error_of_the_disk_is_raised_and_changes_nothing(call: Caller, disk: Disk, error: Exception) -> None:
    call(Increment("a", key="k"), Set("b", 5))
    disk.error = error
    with pytest.raises(type(error)) as caught:
        call(Increment("a"), Set("c", 1), Delete("b"), Increment("a", key="l"))
    assert caught.value is error
    disk.error = None
    assert everything(call.ledger) == {"a": 1, "b": 5}
    # Neither the client's number nor the key was taken: the same batch is executed now.
    assert call.resend(Increment("a", key="l"), Increment("a", key="k")) == [2, Replayed(1)]


def test_a_batch_of_reads_changes_nothing_and_commits_nothing(ledger: Ledger, disk: Disk) -> None:
    assert read(ledger, Get("a"), Scan()) == [None, Page([], more=False)]
    assert disk.committed == []
    memory = Ledger()
    assert memory.apply(Batch(ANN, 1, [Increment("a")])) == [1]
    for refusing in (memory, ledger):
        with pytest.raises(BatchRefused):
            refusing.apply(Batch(ANN, 5, [Increment("a")]))
    assert isinstance(ledger.perform([Batch(READER, 0, [Get("a")])])[0], BatchRefused)


# Against a model

NAMES = st.sampled_from(["a", "b", "c", "d", "e", "\u00e9", "\u4e2d"])
SIZES = st.sampled_from([1, 1, 1, 2, -1, -3, LARGEST, SMALLEST])
BOUNDS = st.sampled_from([(None, None), (None, None), (None, 3), (-2, None), (0, 1), (1, LARGEST), (0, 0)])
KEYS = st.sampled_from([None, None, "k", "l", "m"])
INCREMENTS = st.builds(
    lambda name, by, ends, key: Increment(name, by, ends[0], ends[1], key), NAMES, SIZES, BOUNDS, KEYS
)
OPERATIONS: st.SearchStrategy[list[Operation]] = st.lists(
    st.one_of(
        INCREMENTS,
        INCREMENTS,
        st.builds(Set, NAMES, st.sampled_from([0, 1, -2, LARGEST, SMALLEST])),
        st.builds(Delete, NAMES),
        st.builds(Get, NAMES),
    ),
    min_size=1,
    max_size=6,
)
CLIENTS = st.sampled_from([ANN, BOB, READER])


@dataclass
class Model:
    """What the ledger should be, in plain dicts and no hurry."""

    counters: dict[str, int] = field(default_factory=dict)
    keys: dict[str, tuple[Increment, int]] = field(default_factory=dict)
    last: dict[bytes, tuple[int, list[Result]]] = field(default_factory=dict)

    def apply(self, batch: Batch, *, full: bool = False) -> list[Result] | None:
        """Return the results, or None if the batch is to be refused."""
        sequence, results = self.last.get(batch.client, (0, []))
        if sequence and batch.sequence == sequence:
            return results
        if batch.sequence != sequence + 1:
            return None
        results = [self.execute(operation, full=full) for operation in batch.operations]
        self.last[batch.client] = (batch.sequence, results)
        return results

    def execute(self, operation: Operation, *, full: bool) -> Result:
        match operation:
            case Get(name):
                return self.counters.get(name)
            case Increment(name, by, minimum, maximum, key) if key in self.keys:
                used_for, number = self.keys[key]
                return Replayed(number) if used_for == Increment(name, by, minimum, maximum) else REUSED
            case _ if full:
                return FULL
            case Set(name, value):
                self.counters[name] = value
                return value
            case Delete(name):
                return self.counters.pop(name, None) is not None
            case Increment(name, by, minimum, maximum, key):
                value = self.counters.get(name, 0) + by
                low, high = (SMALLEST if minimum is None else minimum), (LARGEST if maximum is None else maximum)
                if value < low or value > high:
                    return LIMIT
                self.counters[name] = value
                if key is not None:
                    self.keys[key] = (Increment(name, by, minimum, maximum), value)
                return value
            case _:
                raise AssertionError(f"no batch of writes holds {operation}")


class LedgerAgainstModel(RuleBasedStateMachine):
    """Random batches from three clients, as they should come and as they should not."""

    @initialize()
    def begin(self) -> None:
        self.disk = Disk()
        self.ledger = Ledger(journal=self.disk)
        self.model = Model()

    def check(self, batches: list[Batch], *, full: bool = False) -> None:
        expected = [self.model.apply(batch, full=full) for batch in batches]
        answers = self.ledger.perform(batches)
        assert [None if isinstance(a, BatchRefused) else list(map(plain, a)) for a in answers] == expected

    def next(self, client: bytes, operations: list[Operation], distance: int = 0) -> Batch:
        return Batch(client, self.model.last.get(client, (0, []))[0] + 1 + distance, operations)

    @rule(batches=st.lists(st.tuples(CLIENTS, OPERATIONS), min_size=1, max_size=5), again=st.booleans())
    def send(self, batches: list[tuple[bytes, list[Operation]]], *, again: bool) -> None:
        before = [client for client, _ in batches]
        numbered = [self.next(*batch, distance=before[:place].count(batch[0])) for place, batch in enumerate(batches)]
        self.check([*numbered, numbered[-1]] if again else numbered)

    @precondition(lambda self: self.model.last)
    @rule(data=st.data(), operations=OPERATIONS)
    def send_again(self, data: st.DataObject, operations: list[Operation]) -> None:
        self.check([self.next(data.draw(st.sampled_from(sorted(self.model.last))), operations, distance=-1)])

    @rule(client=CLIENTS, distance=st.sampled_from([-3, -2, 1, 2, 100]), operations=OPERATIONS)
    def send_out_of_order(self, client: bytes, distance: int, operations: list[Operation]) -> None:
        if self.next(client, [Get("a")]).sequence + distance > 0:
            self.check([self.next(client, operations, distance)])

    @rule(client=CLIENTS, operations=OPERATIONS)
    def send_to_a_full_disk(self, client: bytes, operations: list[Operation]) -> None:
        self.disk.error = StorageFull("")
        self.check([self.next(client, operations)], full=True)
        self.disk.error = None

    @rule(client=CLIENTS, operations=OPERATIONS)
    def send_to_a_broken_disk(self, client: bytes, operations: list[Operation]) -> None:
        self.disk.error = RuntimeError("broken")
        with pytest.raises(RuntimeError):
            self.ledger.perform([self.next(client, operations)])
        self.disk.error = None

    @invariant()
    def what_is_readable_and_committed_is_what_the_model_holds(self) -> None:
        if hasattr(self, "ledger"):
            assert everything(self.ledger) == self.model.counters
            counters: dict[str, int | None] = {}
            for changes in self.disk.committed:
                counters.update(changes.counters)
            assert {name: value for name, value in counters.items() if value is not None} == self.model.counters
            assert self.ledger.sizes == (len(self.model.counters), len(self.model.last), len(self.model.keys))


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.slow
class TestLedgerAgainstModelForLonger(TestLedgerAgainstModel):  # type: ignore[misc, valid-type]
    settings = settings(TestLedgerAgainstModel.settings, max_examples=30)
