"""The ledger: what batches do to counters, and the memory that makes each of them count once."""

import random
import threading
from collections.abc import Callable
from functools import partial
from math import inf
from types import SimpleNamespace

import pytest

from counter_server.errors import BatchRefused, StorageFull
from counter_server.ledger import CLIENT_LIFETIME, KEY_LIFETIME, Changes, ClientRecord, Contents, KeyRecord, Ledger
from counter_server.operations import (
    LARGEST,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Keep,
    Operation,
    Page,
    Refusal,
    Replayed,
    Result,
    Scan,
    Set,
)
from counter_server.settings import Caps
from counter_server.testing import RandomBatches
from tests.processes import PATIENCE, eventually

ANN, BOB, CYD, READER = (letter * 16 for letter in (b"a", b"b", b"c", b"\0"))


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
        return plain(answer)


def plain(answer: list[Result]) -> list[Result]:
    """Keep the codes of refusals, without the messages for people."""
    return [Refusal(result.code, "") if isinstance(result, Refusal) else result for result in answer]


def read(ledger: Ledger, *operations: Operation) -> list[Result]:
    return ledger.apply(Batch(READER, 0, list(operations)))


def everything(ledger: Ledger) -> dict[str, int]:
    (page,) = read(ledger, Scan("", 1000))
    assert isinstance(page, Page)
    assert not page.more
    return dict(page.counters)


class Disk:
    """A journal that keeps, refuses or breaks, or holds one commit until `go_on`."""

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
    """Return the time of the ledger. It must precede the ledger among the fixtures."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def ledger(disk: Disk) -> Ledger:
    return Ledger(journal=disk)


@pytest.fixture
def call(ledger: Ledger) -> Caller:
    return Caller(ledger)


LIMIT, REUSED, FULL = (Refusal(code, "") for code in ("limit", "key_reused", "storage_full"))


def test_the_record_of_a_batch_is_in_the_same_commit_as_its_effect(
    clock: SimpleNamespace, call: Caller, disk: Disk
) -> None:
    clock.now += 3.0
    call(Increment("a", key="k"))
    (changes,) = disk.committed
    assert changes.counters == {"a": 1}
    assert changes.clients == {ANN: ClientRecord(1, [1], 3.0)}
    assert changes.keys == {"k": KeyRecord(Increment("a").fingerprint(), 1, 3.0)}
    call.ledger.perform([Batch(BOB, sequence, [Get("a"), Get("b")]) for sequence in (1, 2, 5)])
    assert (call.ledger.batches, call.ledger.commits, call.ledger.operations) == (4, 2, 7)


# Time


def test_a_key_is_kept_for_24_hours_from_its_use_and_then_free(
    clock: SimpleNamespace, ledger: Ledger, disk: Disk
) -> None:
    assert KEY_LIFETIME == 24 * 3600
    first, other = Increment("a", key="k"), Increment("b", 7, key="k")
    assert Caller(ledger, b"1" * 16)(first, Increment("a", key="old")) == [1, 2]
    clock.now += KEY_LIFETIME - 1
    assert Caller(ledger, b"2" * 16)(first) == [Replayed(1)]
    clock.now += 1  # to have asked for it again has not lengthened its life
    assert Caller(ledger, b"3" * 16)(other, other) == [7, Replayed(7)]
    keys = disk.committed[-1].keys
    assert [keys["old"] is None, keys["k"] is None] == [True, False]
    assert ledger.sizes == (2, 2, 1)
    clock.now += KEY_LIFETIME - 1
    assert Caller(ledger, b"4" * 16)(other) == [Replayed(7)]


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
def test_expired_records_are_removed_over_several_commits(
    clock: SimpleNamespace, ledger: Ledger, disk: Disk, *, keys: bool
) -> None:
    lifetime = KEY_LIFETIME if keys else CLIENT_LIFETIME
    for start in range(0, 2500, 500):
        numbers = range(start, start + 500)
        if keys:
            Caller(ledger, b"%16d" % start)(*[Increment("a", key=str(number)) for number in numbers])
        else:
            ledger.perform([Batch(number.to_bytes(16, "big"), 1, [Increment("a")]) for number in numbers])
    bob = Caller(ledger, BOB)

    def removed(seconds: float) -> int:
        clock.now += seconds
        bob(Increment("a"))
        changes = disk.committed[-1]
        return list(changes.keys.values() if keys else changes.clients.values()).count(None)

    assert [removed(seconds) for seconds in (KEY_LIFETIME, 0, 0, 0)] == [1000, 1000, 500, 0]
    # After that, expired records are looked for once a second, and not in every commit.
    Caller(ledger, ANN)(Increment("a", key="late"))
    assert [removed(seconds) for seconds in (lifetime - 0.5, 0.5, 0.5, 0.5)] == [0, 0, 1, 0]


def test_a_clock_that_restarts_neither_forgets_nor_revives(clock: SimpleNamespace, call: Caller, disk: Disk) -> None:
    """As after a restart of the machine: the contents are those of before, the clock is not."""
    call(Increment("a", key="k"))
    clock.now += 1000
    call(Increment("a"))
    shown: list[Contents] = []
    contents = call.ledger.show(shown.append)
    assert shown == [contents]
    clock.now = 3.0
    ledger = Ledger(contents, disk)
    assert ledger.now() == 1000.0
    assert everything(ledger) == {"a": 2}
    Caller(ledger, BOB)(Increment("b"))
    assert disk.committed[-1].clients[BOB] == ClientRecord(1, [1], 1000.0)
    clock.now += KEY_LIFETIME - 1001  # the key is 1000 seconds old already
    assert Caller(ledger, CYD)(Increment("a", key="k")) == [Replayed(1)]
    clock.now += 2
    assert Caller(ledger, b"d" * 16)(Increment("c", key="k")) == [1]


# The disk


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def held() -> Disk:
    """Return a disk that holds its first commit."""
    return Disk(held=1)


@pytest.fixture
def busy(held: Disk) -> tuple[Ledger, threading.Thread]:
    """Return a ledger and the thread whose commit is held, of an increment of a."""
    ledger = Ledger(journal=held)
    thread = started(partial(ledger.apply, Batch(ANN, 1, [Increment("a")])))
    assert held.holds.wait(PATIENCE)
    return ledger, thread


def test_nothing_is_readable_before_it_is_committed_and_reads_do_not_wait() -> None:
    disk = Disk(held=2)
    call = Caller(Ledger(journal=disk))
    call(Increment("a"))
    results: list[list[Result]] = []
    writer = started(lambda: results.append(call(Increment("a"), Set("b", 5))))
    try:
        assert disk.holds.wait(PATIENCE)
        seen: list[list[Result]] = []
        started(lambda: seen.append(read(call.ledger, Get("a"), Get("b"), Scan()))).join(PATIENCE)
        assert seen == [[1, None, Page([("a", 1)], more=False)]], "a read waited for a commit, or saw it before its end"
        assert call.ledger.sizes[0] == 1
        assert not results
    finally:
        disk.go_on.set()
        writer.join(PATIENCE)
    assert results == [[2, 5]]
    assert everything(call.ledger) == {"a": 2, "b": 5}


def test_threads_that_wait_for_a_commit_share_the_next(held: Disk, busy: tuple[Ledger, threading.Thread]) -> None:
    ledger, first = busy
    others = [started(partial(ledger.apply, Batch(client, 1, [Increment("a")]))) for client in (BOB, CYD)]
    eventually(lambda: len(ledger._combiner._waiting) == 2, "two waiting threads")
    with ledger._memory:  # a read: no part of a commit is merged meanwhile
        held.go_on.set()
        first.join(0.1)
        assert first.is_alive()
    for thread in (first, *others):
        thread.join(PATIENCE)
    assert [set(changes.clients) for changes in held.committed] == [{ANN}, {BOB, CYD}]
    assert not ledger._combiner.together, "commits are short"
    assert everything(ledger) == {"a": 3}
    with ledger._memory:
        reader = started(partial(read, ledger, Get("a")))
        reader.join(0.1)
        assert reader.is_alive(), "a read saw memory while it may change"


def test_a_stopped_ledger_ends_its_commit_and_begins_no_other(
    held: Disk, busy: tuple[Ledger, threading.Thread]
) -> None:
    ledger, under_way = busy
    stopping = started(ledger.stop)
    stopping.join(0.05)
    assert stopping.is_alive(), "it did not wait for the commit under way"
    held.go_on.set()
    for thread in (stopping, under_way):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    shown: list[Contents] = []
    others = [
        started(partial(ledger.apply, Batch(BOB, 1, [Increment("a")]))),
        started(partial(ledger.show, shown.append)),
    ]
    others[0].join(0.05)
    assert (len(held.committed), shown, read(ledger, Get("a"))) == (1, [], [1])
    ledger._writing.release()
    for other in others:
        other.join(PATIENCE)
    assert (len(shown), read(ledger, Get("a"))) == (1, [2])


def test_a_full_disk_answers_a_known_key_with_its_number(call: Caller, disk: Disk) -> None:
    assert call(Increment("a", key="k")) == [1]
    disk.error = StorageFull("no room")
    keys = [Increment("a", key="k"), Increment("b", key="k"), Increment("a", key="l")]
    assert call(*keys) == [Replayed(1), REUSED, FULL]


def test_a_batch_of_reads_changes_nothing_and_commits_nothing(ledger: Ledger, disk: Disk) -> None:
    assert read(ledger, Get("a"), Scan()) == [None, Page([], more=False)]
    assert disk.committed == []
    memory = Ledger()
    assert memory.apply(Batch(ANN, 1, [Increment("a")])) == [1]
    for refusing, last in ((memory, 1), (ledger, 0)):
        with pytest.raises(BatchRefused, match=f"batch 5 does not follow batch {last}"):
            refusing.apply(Batch(ANN, 5, [Increment("a")]))
    assert isinstance(ledger.perform([Batch(READER, 0, [Get("a")])])[0], BatchRefused)


class Model:
    """What the ledger should be, in plain dicts and no hurry."""

    def __init__(self, caps: Caps | None) -> None:
        self.most: float = caps.counters if caps else inf
        self.most_keys: float = caps.keys if caps else inf
        self.counters: dict[str, int] = {}
        self.keys: dict[str, tuple[bytes, int]] = {}  # fingerprints and numbers
        self.last: dict[bytes, tuple[int, list[Result]]] = {}

    def apply(self, batch: Batch, *, full: bool) -> list[Result] | None:
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
            case Increment(key=str(key)) if key in self.keys:
                used_for, number = self.keys[key]
                return Replayed(number) if used_for == operation.fingerprint() else REUSED
            case _ if full:
                return FULL
            case Delete(name):
                return self.counters.pop(name, None) is not None
            case Set(name, value):
                return self.put(name, value)
            case Increment():
                return self.increment(operation)
            case Keep():
                return self.keep(operation)
        raise AssertionError(f"no batch of writes holds {operation}")

    def increment(self, operation: Increment) -> Result:
        value = self.counters.get(operation.name, 0) + operation.by
        low = SMALLEST if operation.minimum is None else operation.minimum
        high = LARGEST if operation.maximum is None else operation.maximum
        if not low <= value <= high:
            return LIMIT
        if operation.key is not None and len(self.keys) >= self.most_keys:
            return FULL
        result = self.put(operation.name, value)
        if operation.key is not None and result == value:
            self.keys[operation.key] = (operation.fingerprint(), value)
        return result

    def keep(self, operation: Keep) -> Result:
        known, wanted = self.keys.get(operation.key), (operation.fingerprint, operation.value)
        if known not in (None, wanted) and not operation.overwrite:
            return REUSED
        if known is None and len(self.keys) >= self.most_keys:
            return FULL
        self.keys[operation.key] = wanted
        return operation.value

    def put(self, name: str, value: int) -> Result:
        if name not in self.counters and len(self.counters) >= self.most:
            return FULL
        self.counters[name] = value
        return value


@pytest.mark.parametrize("caps", [Caps(counters=3, keys=2), None], ids=["caps", "no caps"])
def test_random_batches_do_what_a_model_does(caps: Caps | None, disk: Disk) -> None:
    """Three clients number their batches well and badly, on a disk that is full or breaks at times."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = RandomBatches(seed, "")
    chance = draw.chance
    ledger, model = Ledger(journal=disk, caps=caps), Model(caps)
    past: list[Operation] = [Increment("a")]
    for _ in range(300):
        disk.error = chance.choice([None] * 6 + [StorageFull(""), RuntimeError("broken")])
        batches, expected = [], []
        for _ in range(chance.randint(1, 4)):
            client = chance.choice([ANN, BOB, READER])
            sequence = model.last.get(client, (0,))[0] + chance.choice([1] * 6 + [0, 0, -1, 2, 100])
            new = [draw.write() for _ in range(chance.randint(1, 5))]
            past += new
            batches.append(Batch(client, max(sequence, 1), [*new, chance.choice(past)]))
            if not isinstance(disk.error, RuntimeError):
                expected.append(model.apply(batches[-1], full=disk.error is not None))
        if isinstance(disk.error, RuntimeError):
            with pytest.raises(RuntimeError, match="broken"):
                ledger.perform(batches)
        else:
            answers = ledger.perform(batches)
            found = [None if isinstance(answer, BatchRefused) else plain(answer) for answer in answers]
            assert repr(found) == repr(expected)  # True is not 1
        after = draw.name()
        rest = sorted(item for item in model.counters.items() if item[0] > after)
        assert read(ledger, Scan(after, 2)) == [Page(rest[:2], more=len(rest) > 2)]
        assert everything(ledger) == model.counters
        assert ledger.sizes == (len(model.counters), len(model.last), len(model.keys))
    kept: dict[str, int | None] = {}
    for changes in disk.committed:
        kept.update(changes.counters)
    assert {name: value for name, value in kept.items() if value is not None} == model.counters
