"""What a user holds, from the call to the memory and back, in this process and in the children of a fork."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import pytest

from counter_server import open_state
from counter_server.errors import InvalidRequest, KeyReused, LimitReached
from counter_server.manager.directory import DataDirectory
from counter_server.operations import LARGEST, SMALLEST, Batch, Get, Page, Result
from counter_server.state import Counter, State
from counter_server.stores import open_store
from counter_server.stores.memory import MemoryStore
from tests.processes import PATIENCE


@pytest.fixture
def state() -> Iterator[State]:
    state = open_state("memory://", deadline=PATIENCE)
    yield state
    state.close()


@pytest.fixture
def counter(state: State) -> Counter:
    return state.counter("visits")


def run_threads(count: int, work: Callable[[], None]) -> None:
    """Run `work` in so many threads that begin at the same moment, and see all of them end."""
    barrier = threading.Barrier(count)

    def run() -> None:
        barrier.wait(PATIENCE)
        work()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def test_a_hundred_threads_at_once_get_1_to_100(state: State) -> None:
    numbers: list[int] = []
    run_threads(100, lambda: numbers.append(state.counter("visits").increment()))
    assert sorted(numbers) == list(range(1, 101))
    assert state.counter("visits").value == 100


def test_each_thread_sees_its_numbers_grow(counter: Counter) -> None:
    ordered: list[bool] = []

    def count() -> None:
        numbers = [counter.increment() for _ in range(50)]
        ordered.append(numbers == sorted(set(numbers)))

    run_threads(16, count)
    assert ordered == [True] * 16
    assert counter.value == 800


def test_a_counter_counts_up_and_down_is_set_and_removed(counter: Counter) -> None:
    assert counter.value == 0
    assert counter.increment() == 1
    assert counter.increment(5) == 6
    assert counter.decrement() == 5
    assert counter.decrement(7) == -2
    assert counter.value == -2
    assert counter.set(40) == 40
    assert counter.increment(-1) == 39
    assert counter.delete() is True
    assert counter.delete() is False
    assert counter.value == 0
    assert counter.increment() == 1


def test_to_read_a_counter_does_not_make_it(state: State) -> None:
    assert state.counter("visits").value == 0
    assert state.counters() == Page([], more=False)
    assert state.submit(Get("visits")) is None


def test_counters_of_one_name_are_one_and_of_other_names_others(state: State) -> None:
    state.counter("a").increment()
    assert state.counter("a").increment() == 2
    assert state.counter("b").increment() == 1
    assert state.counter("A").value == 0


def test_a_counter_says_its_name(counter: Counter) -> None:
    assert counter.name == "visits"
    assert "visits" in repr(counter)


def test_a_limit_that_is_reached_is_an_error_and_changes_nothing(counter: Counter) -> None:
    assert counter.increment(3, maximum=3) == 3
    with pytest.raises(LimitReached, match="visits") as caught:
        counter.increment(maximum=3)
    assert caught.value.outcome == "not_applied"
    with pytest.raises(LimitReached):
        counter.decrement(4, minimum=0)
    assert counter.decrement(3, minimum=0) == 0
    counter.set(LARGEST)
    with pytest.raises(LimitReached):
        counter.increment()
    assert counter.value == LARGEST


def test_of_many_threads_only_as_many_as_the_limit_allows_succeed(counter: Counter) -> None:
    sold: list[int] = []
    refused: list[LimitReached] = []

    def buy() -> None:
        try:
            sold.append(counter.increment(maximum=10))
        except LimitReached as error:
            refused.append(error)

    run_threads(40, buy)
    assert sorted(sold) == list(range(1, 11))
    assert len(refused) == 30


def test_a_key_is_answered_with_the_same_number_and_counted_once(counter: Counter) -> None:
    assert counter.increment(2, key="order-1") == 2
    counter.increment()
    assert counter.increment(2, key="order-1") == 2
    with pytest.raises(KeyReused) as caught:
        counter.increment(3, key="order-1")
    assert caught.value.outcome == "not_applied"
    assert counter.value == 3


def test_of_many_threads_with_one_key_all_get_the_one_number(counter: Counter) -> None:
    numbers: list[int] = []
    run_threads(32, lambda: numbers.append(counter.increment(key="order-1")))
    assert numbers == [1] * 32
    assert counter.value == 1


def test_pages_of_counters_follow_each_other_to_the_end(state: State) -> None:
    for number in range(25):
        state.counter(f"n{number:02}").set(number)
    first = state.counters(limit=10)
    second = state.counters(after=first.counters[-1][0], limit=10)
    third = state.counters(after=second.counters[-1][0], limit=10)
    assert [first.more, second.more, third.more] == [True, True, False]
    assert first.counters + second.counters + third.counters == [(f"n{number:02}", number) for number in range(25)]
    assert state.counters() == Page([(f"n{number:02}", number) for number in range(25)], more=False)


def test_what_cannot_be_asked_is_refused_before_it_is_sent(state: State) -> None:
    for name in ("", "a\0", "\ud800", "x" * 256, "e\u0301"):
        with pytest.raises(InvalidRequest):
            state.counter(name)
    counter = state.counter("visits")
    bad: list[Callable[[], object]] = [
        lambda: counter.increment(0),
        lambda: counter.increment(True),  # noqa: FBT003 - that it is refused is the test
        lambda: counter.increment(LARGEST + 1),
        lambda: counter.decrement(SMALLEST),
        lambda: counter.decrement(True),  # noqa: FBT003 - what is no number
        lambda: counter.decrement("1"),  # type: ignore[arg-type]
        lambda: counter.increment(minimum=1, maximum=0),
        lambda: counter.increment(key=""),
        lambda: counter.increment(key="\u00e9"),
        lambda: counter.set(SMALLEST - 1),
        lambda: state.counters(limit=0),
        lambda: state.counters(limit=1001),
        lambda: state.counters(after="\n"),
    ]
    for ask in bad:
        with pytest.raises(InvalidRequest):
            ask()
    assert counter.value == 0


def test_a_closed_state_can_be_used_again(state: State) -> None:
    state.counter("visits").increment()
    state.close()
    assert state.counter("visits").increment() == 2


def test_two_states_in_memory_have_nothing_in_common(state: State) -> None:
    state.counter("visits").increment()
    assert open_state("memory://").counter("visits").value == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory:",
        "memory://x",
        "memory:///",
        "memory://?a=b",
        "nothing://",
        "http://localhost/",
        "manager://host/directory",
        "manager://relative",
        "manager:///directory?option=1",
        "manager:///directory#fragment",
    ],
)
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        open_state(url)


def test_a_managers_url_names_its_directory_and_connects_to_nothing_yet(tmp_path: Path) -> None:
    assert str(DataDirectory.from_url("manager:///var/lib/counters", "/other")) == "/var/lib/counters"
    assert str(DataDirectory.from_url("manager:///with%20space", "/other")) == "/with space"
    assert str(DataDirectory.from_url("manager://", "/other")) == "/other"
    store = open_store(f"manager://{tmp_path / 'data'}")
    assert str(store) == f"manager://{tmp_path / 'data'}"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("deadline", [0, -1, 60.1, float("inf"), float("nan"), -0.0])
def test_a_deadline_that_is_not_more_than_0_and_at_most_60_seconds_is_refused(deadline: float) -> None:
    with pytest.raises(InvalidRequest, match="deadline"):
        open_state("memory://", deadline=deadline)


@pytest.mark.parametrize("deadline", [0.001, 1, 60])
def test_a_deadline_up_to_60_seconds_is_passed_on_to_the_store(deadline: float) -> None:
    store = WatchedStore()
    before = time.monotonic()
    State(store, deadline=deadline).counter("visits").increment()
    assert before + deadline <= store.deadlines[0] <= time.monotonic() + deadline


# Forks


class WatchedStore(MemoryStore):
    """Memory that tells whose batches it was given, and that can keep the parent's threads inside a call."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[bytes] = []
        self.deadlines: list[float] = []
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self._owner = os.getpid()

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:
        self.clients.append(batch.client)
        self.deadlines.append(deadline)
        if os.getpid() == self._owner:
            self.inside.set()
            assert self.go_on.wait(PATIENCE)
        return super().apply(batch, deadline)


def in_child(work: Callable[[], bytes]) -> bytes:
    """Fork, and return what `work` returns in the child; fail if it does not in time."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.write(writing, work())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    end = time.monotonic() + PATIENCE
    ended, status = 0, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)
    with open(reading, "rb") as pipe:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        assert os.waitstatus_to_exitcode(status) == 0, "the child failed"
        return pipe.read()


def test_a_child_is_another_client_and_the_parent_stays_the_same() -> None:
    store = WatchedStore()
    state = State(store, deadline=PATIENCE)
    state.counter("visits").increment()

    def work() -> bytes:
        assert state.counter("visits").increment() == 2  # its own copy of the memory
        return store.clients[-1]

    first, second = in_child(work), in_child(work)
    assert len(first) == 16
    assert len({store.clients[0], first, second}) == 3
    assert state.counter("visits").increment() == 2
    assert store.clients == [store.clients[0]] * 2


def test_a_child_works_while_another_thread_of_the_parent_leads_a_call_and_others_wait() -> None:
    store = WatchedStore()
    state = State(store, deadline=PATIENCE)
    state.counter("visits").increment()
    store.inside.clear()
    store.go_on.clear()
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.append(state.counter("visits").increment()), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    try:
        assert store.inside.wait(PATIENCE)
        assert in_child(lambda: b"%d" % state.counter("visits").increment()) == b"2"
    finally:
        store.go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(numbers) == [2, 3, 4, 5]


@pytest.mark.parametrize("lock", ["session", "ledger's commit", "ledger's memory"])
def test_a_child_works_though_a_thread_of_the_parent_held_a_lock_at_the_fork(state: State, lock: str) -> None:
    """Nobody is left in the child to release it. The locks are held for moments only, so they are reached for here."""
    assert isinstance(state.store, MemoryStore)
    ledger = state.store
    locks = {
        "session": state._counters._alone,
        "ledger's commit": ledger._writing,
        "ledger's memory": ledger._memory,
    }
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with locks[lock]:
            held.set()
            release.wait(PATIENCE)

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    try:
        assert held.wait(PATIENCE)

        def work() -> bytes:
            counter = state.counter("visits")
            return b"%d %d %d" % (counter.increment(), counter.increment(), counter.value)

        assert in_child(work) == b"1 2 2"
    finally:
        release.set()
        holder.join(PATIENCE)
    assert state.counter("visits").increment() == 1


def test_threads_of_a_child_share_calls_as_they_did_in_the_parent(state: State) -> None:
    numbers: list[int] = []
    run_threads(8, lambda: numbers.append(state.counter("visits").increment()))

    def work() -> bytes:
        numbers.clear()
        run_threads(32, lambda: numbers.append(state.counter("visits").increment()))
        assert sorted(numbers) == list(range(9, 41))
        return b"done"

    assert in_child(work) == b"done"
    assert state.counter("visits").value == 8
