"""The ledger: what batches do to counters, and the memory that makes each of them count once."""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from counter_server.errors import BatchRefused, StorageFull
from counter_server.ledger import CLIENT_LIFETIME, KEY_LIFETIME, Changes, Contents, Ledger
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
from tests.journals import Committing
from tests.processes import PATIENCE

ANN = b"ann".ljust(16)
BOB = b"bob".ljust(16)
READER = bytes(16)


class Caller:
    """A client that numbers its batches as it should."""

    def __init__(self, ledger: Ledger, client: bytes = ANN) -> None:
        self.ledger = ledger
        self.client = client
        self.sequence = 0

    def __call__(self, *operations: Operation) -> list[Result]:
        self.sequence += 1
        return results_of(self.ledger, Batch(self.client, self.sequence, list(operations)))

    def one(self, operation: Operation) -> Result:
        return self(operation)[0]

    def resend(self, *operations: Operation) -> list[Result]:
        return results_of(self.ledger, Batch(self.client, self.sequence, list(operations)))


def results_of(ledger: Ledger, batch: Batch) -> list[Result]:
    (answer,) = ledger.perform([batch])
    assert not isinstance(answer, BatchRefused), answer
    return answer


def refused(ledger: Ledger, batch: Batch) -> bool:
    return isinstance(ledger.perform([batch])[0], BatchRefused)


def code_of(result: Result) -> str:
    assert isinstance(result, Refusal), result
    return result.code


def read(ledger: Ledger, *operations: Operation) -> list[Result]:
    return ledger.apply(Batch(READER, 0, list(operations)))


def everything(ledger: Ledger) -> dict[str, int]:
    (page,) = read(ledger, Scan("", 1000))
    assert isinstance(page, Page)
    assert not page.more
    return dict(page.counters)


class Disk:
    """What a journal does, as a test wants it: keep, refuse, or break."""

    def __init__(self) -> None:
        self.committed: list[Changes] = []
        self.error: Exception | None = None

    def commit(self, changes: Changes) -> None:
        if self.error is not None:
            raise self.error
        self.committed.append(changes)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def ledger(disk: Disk) -> Ledger:
    return Ledger(journal=disk)


@pytest.fixture
def call(ledger: Ledger) -> Caller:
    return Caller(ledger)


@dataclass
class Clock:
    """The seconds that `time.monotonic` says to the ledger."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Has to come before the ledger among a test's fixtures, which looks at it when it is made."""
    clock = Clock()
    monkeypatch.setattr("counter_server.ledger.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


# Counters


def test_increments_count_from_0_by_what_they_are_told(call: Caller) -> None:
    assert call(Increment("a"), Increment("a"), Increment("a", 5), Increment("a", -10), Increment("b")) == [
        1,
        2,
        7,
        -3,
        1,
    ]
    assert call(Increment("a")) == [-2]
    assert everything(call.ledger) == {"a": -2, "b": 1}


def test_a_result_outside_the_bounds_is_refused_and_changes_nothing(call: Caller) -> None:
    assert call(Increment("a", 3, maximum=3)) == [3]
    assert code_of(call.one(Increment("a", 1, maximum=3))) == "limit"
    assert code_of(call.one(Increment("a", -4, minimum=0))) == "limit"
    assert call(Increment("a", -3, minimum=0)) == [0]
    assert code_of(call.one(Increment("a", -1, minimum=0))) == "limit"
    assert everything(call.ledger) == {"a": 0}


def test_a_refused_increment_does_not_make_the_counter(call: Caller) -> None:
    assert code_of(call.one(Increment("a", 2, maximum=1))) == "limit"
    assert call(Get("a")) == [None]
    assert everything(call.ledger) == {}
    assert call.ledger.sizes[0] == 0


def test_one_refused_operation_leaves_the_others_of_its_batch_applied(call: Caller) -> None:
    first, second, third = call(Increment("a"), Increment("a", 1, maximum=1), Increment("a"))
    assert (first, third) == (1, 2)
    assert code_of(second) == "limit"


def test_bounds_apply_to_the_result_and_not_to_where_it_came_from(call: Caller) -> None:
    call(Set("a", 100))
    assert code_of(call.one(Increment("a", -1, maximum=10))) == "limit"
    assert call(Increment("a", -95, maximum=10)) == [5]


def test_a_counter_does_not_go_beyond_64_bits(call: Caller) -> None:
    assert call(Increment("a", LARGEST)) == [LARGEST]
    assert code_of(call.one(Increment("a"))) == "limit"
    assert code_of(call.one(Increment("a", LARGEST))) == "limit"
    assert call(Increment("b", SMALLEST)) == [SMALLEST]
    assert code_of(call.one(Increment("b", -1))) == "limit"
    assert code_of(call.one(Increment("b", SMALLEST))) == "limit"
    assert everything(call.ledger) == {"a": LARGEST, "b": SMALLEST}
    assert call(Increment("a", -1), Increment("a", 1)) == [LARGEST - 1, LARGEST]


def test_a_counter_is_set_read_and_removed(call: Caller) -> None:
    assert call(Get("a"), Delete("a")) == [None, False]
    assert call(Set("a", 0), Get("a")) == [0, 0]
    assert call(Set("a", -7), Get("a"), Increment("a")) == [-7, -7, -6]
    assert read(call.ledger, Get("a"), Get("b")) == [-6, None]
    assert call(Delete("a"), Get("a"), Delete("a")) == [True, None, False]
    assert read(call.ledger, Get("a")) == [None]
    assert call(Increment("a")) == [1]


def test_batches_of_one_commit_see_each_other_in_order(ledger: Ledger, disk: Disk) -> None:
    ann: list[Operation] = [Increment("a"), Get("a")]
    bob: list[Operation] = [Increment("a"), Get("a"), Delete("a"), Get("a")]
    assert ledger.perform([Batch(ANN, 1, ann), Batch(BOB, 1, bob), Batch(ANN, 2, [Increment("a", 9)])]) == [
        [1, 1],
        [2, 2, True, None],
        [9],
    ]
    assert len(disk.committed) == 1
    assert disk.committed[0].counters == {"a": 9}


# Pages


def names_of(result: Result) -> list[str]:
    assert isinstance(result, Page)
    return [name for name, _ in result.counters]


def test_pages_have_every_counter_once_in_the_order_of_the_names(call: Caller) -> None:
    names = [f"n{number:03}" for number in range(25)] + ["N", "\u00e9", "\u4e2d", "\U0001f600", "\uffee"]
    call(*[Set(name, number) for number, name in enumerate(reversed(names))])
    found: list[tuple[str, int]] = []
    after = ""
    while True:
        (page,) = read(call.ledger, Scan(after, 7))
        assert isinstance(page, Page)
        found += page.counters
        if not page.more:
            break
        assert len(page.counters) == 7
        after = page.counters[-1][0]
    assert [name for name, _ in found] == sorted(names, key=str.encode)
    assert dict(found) == {name: number for number, name in enumerate(reversed(names))}


def test_more_is_said_only_where_there_is_more(call: Caller) -> None:
    call(Set("a", 1), Set("b", 2))
    assert read(call.ledger, Scan("", 1), Scan("", 2), Scan("a", 1), Scan("b", 1), Scan("", 3)) == [
        Page([("a", 1)], more=True),
        Page([("a", 1), ("b", 2)], more=False),
        Page([("b", 2)], more=False),
        Page([], more=False),
        Page([("a", 1), ("b", 2)], more=False),
    ]


def test_a_page_begins_after_a_name_whether_or_not_there_is_such_a_counter(call: Caller) -> None:
    call(Set("a", 1), Set("c", 3))
    assert [names_of(page) for page in read(call.ledger, Scan("a"), Scan("b"), Scan("c"), Scan("A"))] == [
        ["c"],
        ["c"],
        [],
        ["a", "c"],
    ]


def test_a_key_that_comes_again_is_answered_with_the_same_number_and_counts_once(call: Caller) -> None:
    assert call(Increment("a", 2, key="k")) == [2]
    call(Increment("a"), Set("b", 1))
    assert call(Increment("a", 2, key="k")) == [Replayed(2)]
    assert Caller(call.ledger, BOB)(Increment("a", 2, key="k")) == [Replayed(2)]
    assert everything(call.ledger) == {"a": 3, "b": 1}


def test_a_key_that_comes_twice_in_one_batch_counts_once(call: Caller) -> None:
    assert call(Increment("a", key="k"), Increment("a", key="k"), Increment("a", key="l")) == [1, Replayed(1), 2]
    assert everything(call.ledger) == {"a": 2}


@pytest.mark.parametrize(
    "other", [Increment("b", key="k"), Increment("a", 2, key="k"), Increment("a", 1, 0, key="k")], ids=repr
)
def test_a_key_that_was_used_for_another_request_is_refused(call: Caller, other: Increment) -> None:
    call(Increment("a", key="k"))
    assert code_of(call.one(other)) == "key_reused"
    assert everything(call.ledger) == {"a": 1}
    assert call(Increment("a", key="k")) == [Replayed(1)]


def test_a_key_is_refused_for_another_request_in_the_same_batch(call: Caller) -> None:
    first, second = call(Increment("a", key="k"), Increment("b", key="k"))
    assert first == 1
    assert code_of(second) == "key_reused"
    assert everything(call.ledger) == {"a": 1}


def test_a_key_is_answered_from_memory_even_where_the_bounds_no_longer_allow_it(call: Caller) -> None:
    assert call(Increment("a", 1, maximum=1, key="k")) == [1]
    assert call(Increment("a", 1, maximum=1, key="k")) == [Replayed(1)]


def test_a_request_that_reached_its_limit_leaves_its_key_unused(call: Caller) -> None:
    call(Set("a", 5))
    assert code_of(call.one(Increment("a", 1, maximum=5, key="k"))) == "limit"
    assert call(Increment("b", key="k")) == [1]
    assert code_of(call.one(Increment("a", 1, maximum=5, key="l"))) == "limit"
    call(Set("a", 4))
    assert call(Increment("a", 1, maximum=5, key="l")) == [5]


def test_removing_a_counter_does_not_remove_what_its_keys_were_given(call: Caller) -> None:
    call(Increment("a", key="k"))
    call(Delete("a"))
    assert call(Increment("a", key="k"), Get("a")) == [Replayed(1), None]


def test_a_key_is_kept_for_24_hours_from_its_use_and_then_free(clock: Clock, ledger: Ledger) -> None:
    assert KEY_LIFETIME == 24 * 3600
    first, other = Increment("a", key="k"), Increment("b", 7, key="k")
    assert Caller(ledger, b"1" * 16)(first) == [1]
    clock.now += KEY_LIFETIME - 1
    assert Caller(ledger, b"2" * 16)(first) == [Replayed(1)]
    clock.now += 1.5  # to have asked for it again has not lengthened its life
    assert Caller(ledger, b"3" * 16)(other, other) == [7, Replayed(7)]
    clock.now += KEY_LIFETIME - 1
    assert Caller(ledger, b"4" * 16)(other) == [Replayed(7)]


def test_expired_keys_are_removed_and_those_that_were_used_anew_are_not(clock: Clock, call: Caller, disk: Disk) -> None:
    call(Increment("a", key="old"), Increment("a", key="again"))
    clock.now += 2 * KEY_LIFETIME
    assert Caller(call.ledger, BOB)(Increment("a", key="again")) == [3]
    changes = disk.committed[-1]
    assert changes.keys["old"] is None
    assert changes.keys["again"] is not None
    assert Caller(call.ledger, b"c" * 16)(Increment("a", key="again")) == [Replayed(3)]


# Batches sent again


def test_the_last_batch_sent_again_is_answered_as_before_and_not_executed(call: Caller) -> None:
    first = call(Increment("a"), Get("a"), Delete("b"), Increment("a", 1, maximum=1))
    Caller(call.ledger, BOB)(Increment("a", 10))
    for _ in range(3):
        assert call.resend(Increment("a"), Get("a"), Delete("b"), Increment("a", 1, maximum=1)) == first
    assert everything(call.ledger) == {"a": 11}


def test_a_batch_that_comes_twice_in_one_commit_is_executed_once(ledger: Ledger) -> None:
    batch = Batch(ANN, 1, [Increment("a")])
    assert ledger.perform([batch, batch, Batch(BOB, 1, [Increment("a")]), batch]) == [[1], [1], [2], [1]]
    assert everything(ledger) == {"a": 2}


def test_a_batch_before_the_last_is_refused_and_not_executed(call: Caller) -> None:
    call(Increment("a"))
    call(Increment("a"))
    assert refused(call.ledger, Batch(ANN, 1, [Increment("a")]))
    assert everything(call.ledger) == {"a": 2}
    assert call(Increment("a")) == [3]


def test_a_batch_that_leaves_one_out_is_refused_and_not_executed(call: Caller) -> None:
    call(Increment("a"))
    for sequence in (3, 4, LARGEST):
        assert refused(call.ledger, Batch(ANN, sequence, [Increment("a")]))
    assert everything(call.ledger) == {"a": 1}
    assert call(Increment("a")) == [2]


def test_a_client_that_is_not_known_begins_with_1(ledger: Ledger) -> None:
    assert refused(ledger, Batch(ANN, 2, [Increment("a")]))
    assert refused(ledger, Batch(ANN, LARGEST, [Increment("a")]))
    assert everything(ledger) == {}
    assert results_of(ledger, Batch(ANN, 1, [Increment("a")])) == [1]


def test_a_refused_batch_does_not_disturb_the_others_of_its_commit(ledger: Ledger) -> None:
    first, second, third = ledger.perform(
        [Batch(ANN, 1, [Increment("a")]), Batch(BOB, 2, [Increment("a", 10)]), Batch(ANN, 2, [Increment("a")])]
    )
    assert (first, third) == ([1], [2])
    assert isinstance(second, BatchRefused)
    assert everything(ledger) == {"a": 2}


def test_the_record_of_a_batch_is_in_the_same_commit_as_its_effect(call: Caller, disk: Disk) -> None:
    call(Increment("a", key="k"))
    (changes,) = disk.committed
    record, known = changes.clients[ANN], changes.keys["k"]
    assert changes.counters == {"a": 1}
    assert record is not None
    assert (record.sequence, record.results) == (1, [1])
    assert known is not None
    assert (known.fingerprint, known.value) == (Increment("a").fingerprint(), 1)


def test_a_client_is_remembered_for_an_hour_past_its_last_use_and_then_forgotten(
    clock: Clock, call: Caller, disk: Disk
) -> None:
    assert CLIENT_LIFETIME >= 3600
    bob = Caller(call.ledger, BOB)
    call(Increment("a"))
    clock.now += CLIENT_LIFETIME - 1
    bob(Increment("b"))
    assert call.resend(Increment("a")) == [1]
    assert call(Increment("a")) == [2]  # a use: the hour begins anew
    clock.now += CLIENT_LIFETIME - 1
    bob(Increment("b"))
    assert call.resend(Increment("a")) == [2]
    clock.now += 2
    bob(Increment("b"))  # any commit forgets
    assert disk.committed[-1].clients[ANN] is None
    assert refused(call.ledger, Batch(ANN, 3, [Increment("a")]))
    assert everything(call.ledger) == {"a": 2, "b": 3}


def test_a_client_that_writes_just_when_it_would_be_forgotten_is_not_forgotten(clock: Clock, call: Caller) -> None:
    call(Increment("a"))
    clock.now += CLIENT_LIFETIME + 1
    assert call(Increment("a")) == [2]
    assert call.resend(Increment("a")) == [2]
    assert call(Increment("a")) == [3]


def test_all_that_has_expired_is_forgotten_after_some_commits_and_never_all_in_one(clock: Clock, disk: Disk) -> None:
    ledger = Ledger(journal=disk)
    ledger.perform([Batch(number.to_bytes(16, "big"), 1, [Increment("a")]) for number in range(1, 2501)])
    clock.now += CLIENT_LIFETIME + 1
    call = Caller(ledger)
    removed: list[int] = []
    for _ in range(5):
        call(Increment("a"))
        removed.append(sum(record is None for record in disk.committed[-1].clients.values()))
        clock.now += 2
    assert sum(removed) == 2500
    assert max(removed) <= 1000
    assert refused(ledger, Batch((1).to_bytes(16, "big"), 2, [Increment("a")]))
    assert refused(ledger, Batch((2500).to_bytes(16, "big"), 2, [Increment("a")]))


def test_a_clock_that_starts_anew_neither_forgets_nor_revives(clock: Clock, disk: Disk) -> None:
    """As after a restart of the machine: the contents are those of before, the clock is not."""
    kept = Contents()
    first = Caller(Ledger(kept, disk))
    first(Increment("a", key="k"))
    clock.now += 1000
    first(Increment("a"))
    contents = Contents()
    for changes in disk.committed:
        contents.counters.update({name: value for name, value in changes.counters.items() if value is not None})
        contents.clients.update({client: record for client, record in changes.clients.items() if record is not None})
        contents.keys.update({key: known for key, known in changes.keys.items() if known is not None})
    clock.now = 3.0
    second = Caller(Ledger(contents, disk), BOB)
    second(Increment("b"))
    record = disk.committed[-1].clients[BOB]
    assert record is not None
    assert record.used == 1000.0
    clock.now += KEY_LIFETIME - 1001  # the key is 1000 seconds old already
    second.client, second.sequence = b"c" * 16, 0
    assert second(Increment("a", key="k")) == [Replayed(1)]
    clock.now += 2
    assert second(Increment("c", key="k")) == [1]


# The disk


def test_nothing_is_readable_before_it_is_committed_and_reads_do_not_wait(disk: Disk) -> None:
    committing, go_on = threading.Event(), threading.Event()

    def commit(changes: Changes) -> None:
        disk.commit(changes)
        if len(disk.committed) == 2:
            committing.set()
            assert go_on.wait(PATIENCE)

    ledger = Ledger(journal=Committing(commit))
    call = Caller(ledger)
    call(Increment("a"))
    results: list[list[Result]] = []
    writer = threading.Thread(target=lambda: results.append(call(Increment("a"), Set("b", 5))))
    writer.start()
    try:
        assert committing.wait(PATIENCE)
        seen: list[list[Result]] = []
        reader = threading.Thread(target=lambda: seen.append(read(ledger, Get("a"), Get("b"), Scan())), daemon=True)
        reader.start()
        reader.join(PATIENCE)
        assert seen == [[1, None, Page([("a", 1)], more=False)]], "a read waited for a commit, or saw it before its end"
        assert ledger.sizes[0] == 1
        assert not results
    finally:
        go_on.set()
        writer.join(PATIENCE)
    assert results == [[2, 5]]
    assert everything(ledger) == {"a": 2, "b": 5}


def test_the_batches_of_other_threads_wait_for_the_commit_and_then_follow(disk: Disk) -> None:
    committing, go_on = threading.Event(), threading.Event()

    def commit(changes: Changes) -> None:
        disk.commit(changes)
        if len(disk.committed) == 1:
            committing.set()
            assert go_on.wait(PATIENCE)

    ledger = Ledger(journal=Committing(commit))
    results: list[Result] = []
    ann = threading.Thread(target=lambda: results.append(Caller(ledger, ANN).one(Increment("a"))))
    bob = threading.Thread(target=lambda: results.append(Caller(ledger, BOB).one(Increment("a"))))
    ann.start()
    assert committing.wait(PATIENCE)
    bob.start()
    go_on.set()
    ann.join(PATIENCE)
    bob.join(PATIENCE)
    assert sorted(cast(list[int], results)) == [1, 2]


def test_a_stopped_ledger_has_ended_its_commit_and_begins_no_other_one_and_reads_go_on(disk: Disk) -> None:
    committing, go_on = threading.Event(), threading.Event()

    def commit(changes: Changes) -> None:
        committing.set()
        assert go_on.wait(PATIENCE)
        disk.commit(changes)

    ledger = Ledger(journal=Committing(commit))
    under_way = threading.Thread(target=Caller(ledger, ANN), args=(Increment("a"),), daemon=True)
    under_way.start()
    assert committing.wait(PATIENCE)
    stopping = threading.Thread(target=ledger.stop, daemon=True)
    stopping.start()
    stopping.join(0.05)
    assert stopping.is_alive(), "it did not wait for the commit under way"
    go_on.set()
    stopping.join(PATIENCE)
    assert not stopping.is_alive()
    under_way.join(PATIENCE)
    too_late = threading.Thread(target=Caller(ledger, BOB), args=(Increment("a"),), daemon=True)
    too_late.start()
    too_late.join(0.05)
    assert too_late.is_alive()
    assert len(disk.committed) == 1
    assert read(ledger, Get("a")) == [1]


def test_a_full_disk_refuses_writes_answers_reads_changes_nothing_and_heals(call: Caller, disk: Disk) -> None:
    call(Increment("a"), Set("b", 5))
    disk.error = StorageFull("no room")
    results = call(Increment("a"), Get("a"), Set("b", 6), Delete("b"), Get("b"), Increment("c", key="k"))
    assert [code_of(results[number]) for number in (0, 2, 3, 5)] == ["storage_full"] * 4
    assert [results[1], results[4]] == [1, 5]
    assert everything(call.ledger) == {"a": 1, "b": 5}
    disk.error = None
    assert call(Increment("a"), Increment("c", key="k")) == [2, 1]
    assert everything(call.ledger) == {"a": 2, "b": 5, "c": 1}


def test_a_batch_that_found_the_disk_full_stays_refused_when_it_is_sent_again(call: Caller, disk: Disk) -> None:
    disk.error = StorageFull("no room")
    first = call(Increment("a"))
    disk.error = None
    assert call.resend(Increment("a")) == first
    assert code_of(first[0]) == "storage_full"
    assert everything(call.ledger) == {}
    assert call(Increment("a")) == [1]


def test_a_batch_that_was_applied_is_answered_as_before_when_it_comes_again_to_a_full_disk(
    call: Caller, disk: Disk
) -> None:
    call(Increment("a"))
    disk.error = StorageFull("no room")
    assert call.resend(Increment("a")) == [1]


def test_a_full_disk_answers_a_known_key_with_its_number(call: Caller, disk: Disk) -> None:
    assert call(Increment("a", key="k")) == [1]
    disk.error = StorageFull("no room")
    known, reused, fresh = call(Increment("a", key="k"), Increment("b", key="k"), Increment("a", key="l"))
    assert known == Replayed(1)
    assert [code_of(reused), code_of(fresh)] == ["key_reused", "storage_full"]


def test_a_full_disk_does_not_forget_anybody(clock: Clock, call: Caller, disk: Disk) -> None:
    call(Increment("a", key="k"))
    clock.now += CLIENT_LIFETIME + 1
    disk.error = StorageFull("no room")
    Caller(call.ledger, BOB)(Increment("a"))
    assert call.resend(Increment("a", key="k")) == [1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(5, "I/O"), MemoryError()], ids=repr)
def test_any_other_failure_of_the_disk_is_raised_and_changes_nothing_in_memory(
    call: Caller, disk: Disk, error: Exception
) -> None:
    call(Increment("a", key="k"), Set("b", 5))
    disk.error = error
    with pytest.raises(type(error)) as caught:
        call(Increment("a"), Set("c", 1), Delete("b"), Increment("a", key="l"))
    assert caught.value is error
    disk.error = None
    assert everything(call.ledger) == {"a": 1, "b": 5}
    # Neither the client's number nor the key was taken: the same batch is executed now.
    assert call.resend(Increment("a", key="l"), Increment("a", key="k")) == [2, Replayed(1)]


def test_a_read_only_batch_changes_nothing_and_commits_nothing(ledger: Ledger, disk: Disk) -> None:
    assert read(ledger, Get("a"), Scan()) == [None, Page([], more=False)]
    assert disk.committed == []
    assert refused(ledger, Batch(READER, 0, [Get("a")]))


# Against a model

NAMES = st.sampled_from(["a", "b", "c", "d", "e", "\u00e9", "\u4e2d"])
SIZES = st.sampled_from([1, 1, 1, 2, -1, -3, LARGEST, SMALLEST])
BOUNDS = st.sampled_from([None, None, None, -2, 0, 1, 3, LARGEST])
KEYS = st.sampled_from([None, None, "k", "l", "m"])


def _increment(name: str, by: int, bounds: tuple[int | None, int | None], key: str | None) -> Increment:
    minimum, maximum = bounds
    if minimum is not None and maximum is not None and minimum > maximum:
        minimum, maximum = maximum, minimum
    return Increment(name, by, minimum, maximum, key)


OPERATIONS: st.SearchStrategy[list[Operation]] = st.lists(
    st.one_of(
        st.builds(_increment, NAMES, SIZES, st.tuples(BOUNDS, BOUNDS), KEYS),
        st.builds(_increment, NAMES, SIZES, st.tuples(BOUNDS, BOUNDS), KEYS),
        st.builds(Set, NAMES, st.sampled_from([0, 1, -2, LARGEST, SMALLEST])),
        st.builds(Delete, NAMES),
        st.builds(Get, NAMES),
    ),
    min_size=1,
    max_size=6,
)


@dataclass
class Model:
    """What the ledger should be, in plain dicts and no hurry."""

    counters: dict[str, int] = field(default_factory=dict)
    keys: dict[str, tuple[Increment, int]] = field(default_factory=dict)
    last: dict[bytes, tuple[int, list[Result]]] = field(default_factory=dict)

    def apply(self, batch: Batch, *, full: bool = False) -> list[Result] | None:
        """The results, or None where the batch is to be refused."""
        sequence, results = self.last.get(batch.client, (0, []))
        if sequence and batch.sequence == sequence:
            return results
        if batch.sequence != sequence + 1:
            return None
        results = [
            Refusal("storage_full", "")
            if full and not self.is_answered_from_memory(operation)
            else self.execute(operation)
            for operation in batch.operations
        ]
        self.last[batch.client] = (batch.sequence, results)
        return results

    def is_answered_from_memory(self, operation: Operation) -> bool:
        return isinstance(operation, Get) or (isinstance(operation, Increment) and operation.key in self.keys)

    def execute(self, operation: Operation) -> Result:
        match operation:
            case Get(name):
                return self.counters.get(name)
            case Set(name, value):
                self.counters[name] = value
                return value
            case Delete(name):
                return self.counters.pop(name, None) is not None
            case Increment(name, by, minimum, maximum, key):
                request = Increment(name, by, minimum, maximum)
                if key in self.keys:
                    used_for, number = self.keys[key]
                    return Replayed(number) if used_for == request else Refusal("key_reused", "")
                value = self.counters.get(name, 0) + by
                low, high = (SMALLEST if minimum is None else minimum), (LARGEST if maximum is None else maximum)
                if value < low or value > high:
                    return Refusal("limit", "")
                self.counters[name] = value
                if key is not None:
                    self.keys[key] = (request, value)
                return value
            case _:
                raise AssertionError(f"no batch of writes holds {operation}")


def without_words(result: Result) -> Result:
    """Messages are for people; the model does not know them."""
    return Refusal(result.code, "") if isinstance(result, Refusal) else result


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
        found = [None if isinstance(a, BatchRefused) else [without_words(result) for result in a] for a in answers]
        assert found == expected

    def next_sequence(self, client: bytes) -> int:
        return self.model.last.get(client, (0, []))[0] + 1

    @rule(client=st.sampled_from([ANN, BOB, READER]), operations=OPERATIONS)
    def send(self, client: bytes, operations: list[Operation]) -> None:
        self.check([Batch(client, self.next_sequence(client), operations)])

    @rule(batches=st.lists(st.tuples(st.sampled_from([ANN, BOB, READER]), OPERATIONS), min_size=2, max_size=5))
    def send_together(self, batches: list[tuple[bytes, list[Operation]]]) -> None:
        sequences = {client: self.next_sequence(client) for client, _ in batches}
        numbered: list[Batch] = []
        for client, operations in batches:
            numbered.append(Batch(client, sequences[client], operations))
            sequences[client] += 1
        self.check([*numbered, numbered[-1]])  # the last one twice

    @precondition(lambda self: self.model.last)
    @rule(data=st.data(), operations=OPERATIONS)
    def send_again(self, data: st.DataObject, operations: list[Operation]) -> None:
        client = data.draw(st.sampled_from(sorted(self.model.last)))
        self.check([Batch(client, self.model.last[client][0], operations)])

    @rule(
        client=st.sampled_from([ANN, BOB, READER]),
        distance=st.sampled_from([-3, -2, -1, 1, 2, 100]),
        operations=OPERATIONS,
    )
    def send_out_of_order(self, client: bytes, distance: int, operations: list[Operation]) -> None:
        sequence = self.next_sequence(client) + distance
        if sequence > 0:
            self.check([Batch(client, sequence, operations)])

    @rule(sequence=st.integers(2, 5), number=st.integers(1, 2**64), operations=OPERATIONS)
    def send_from_an_unknown_client(self, sequence: int, number: int, operations: list[Operation]) -> None:
        self.check([Batch(b"new" + number.to_bytes(13, "big"), sequence, operations)])

    @rule(client=st.sampled_from([ANN, BOB, READER]), operations=OPERATIONS)
    def send_to_a_full_disk(self, client: bytes, operations: list[Operation]) -> None:
        self.disk.error = StorageFull("")
        self.check([Batch(client, self.next_sequence(client), operations)], full=True)
        self.disk.error = None

    @rule(client=st.sampled_from([ANN, BOB, READER]), operations=OPERATIONS)
    def send_to_a_broken_disk(self, client: bytes, operations: list[Operation]) -> None:
        self.disk.error = RuntimeError("broken")
        with pytest.raises(RuntimeError):
            self.ledger.perform([Batch(client, self.next_sequence(client), operations)])
        self.disk.error = None

    @invariant()
    def what_is_readable_is_what_the_model_holds(self) -> None:
        if hasattr(self, "ledger"):
            assert everything(self.ledger) == self.model.counters
            assert self.ledger.sizes[0] == len(self.model.counters)

    @invariant()
    def what_was_committed_is_what_is_readable(self) -> None:
        if hasattr(self, "ledger"):
            counters: dict[str, int | None] = {}
            for changes in self.disk.committed:
                counters.update(changes.counters)
            assert {name: value for name, value in counters.items() if value is not None} == self.model.counters


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
# No limits of time: the machine may be busy with other tests.
TestLedgerAgainstModel.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
