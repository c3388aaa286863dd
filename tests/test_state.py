"""What a user holds, from the call to the memory and back, in this process and in the children of a fork."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from counter_server import StoreOptions, open_state
from counter_server.blocks import Block
from counter_server.errors import InvalidRequest, KeyReused, LimitReached, Unsupported
from counter_server.manager.client import StateProxy
from counter_server.manager.directory import DataDirectory
from counter_server.operations import LARGEST, SMALLEST, Batch, Get, Page, Result
from counter_server.state import Counter, Declarations, State, in_memory
from counter_server.store import RoundTrip
from counter_server.stores import open_store
from counter_server.stores.memory import MemoryStore
from tests.hosted_classes import SomeObj
from tests.load import at_once
from tests.processes import PATIENCE, in_child


@pytest.fixture
def state() -> Iterator[State]:
    state = open_state("memory://", deadline=PATIENCE)
    yield state
    state.close()


@pytest.fixture
def counter(state: State) -> Counter:
    return state.counter("visits")


def test_a_counter_counts_up_and_down_is_set_and_deleted(state: State, counter: Counter) -> None:
    assert counter.name == "visits"
    assert "visits" in repr(counter)
    assert counter.value == 0
    assert state.submit(Get("visits")) is None, "to read a counter does not make it"
    assert state.counters() == Page([], more=False)
    assert [counter.increment(), counter.increment(5), counter.decrement(), counter.decrement(7)] == [1, 6, 5, -2]
    assert counter.value == -2
    assert state.counters(after="v", limit=1) == Page([("visits", -2)], more=False)
    assert [counter.set(40), counter.increment(-1), state.counter("visits").increment()] == [40, 39, 40]
    assert (state.counter("other").increment(), state.counter("Visits").value) == (1, 0)
    assert [counter.delete(), counter.delete()] == [True, False]
    assert (counter.value, counter.increment()) == (0, 1)
    state.close()
    assert counter.increment() == 2, "a closed state can be used again"
    assert open_state("memory://").counter("visits").value == 0, "two states in memory are independent"


def test_a_limit_or_a_reused_key_is_an_error_and_changes_nothing(counter: Counter) -> None:
    assert counter.increment(3, maximum=3) == 3
    with pytest.raises(LimitReached, match="visits") as limit:
        counter.increment(maximum=3)
    with pytest.raises(LimitReached):
        counter.decrement(4, minimum=0)
    assert counter.decrement(3, minimum=0) == 0
    assert [counter.increment(2, key="order-1") for _ in range(2)] == [2, 2]
    with pytest.raises(KeyReused) as reused:
        counter.increment(3, key="order-1")
    assert limit.value.outcome == reused.value.outcome == "not_applied"
    assert counter.value == 2


def test_invalid_arguments_are_refused_before_anything_is_sent(state: State, counter: Counter) -> None:
    bad: list[Callable[[], object]] = [
        *[partial(state.counter, name) for name in ("", "\ud800", "x" * 256)],
        *[partial(counter.increment, by) for by in (0, True, LARGEST + 1)],
        *[partial(counter.decrement, by) for by in (SMALLEST, True, "1")],  # type: ignore[arg-type]
        *[partial(state.counters, limit=limit) for limit in (0, 1001)],
        partial(counter.increment, minimum=1, maximum=0),
        partial(counter.increment, key=""),
        partial(counter.set, SMALLEST - 1),
        partial(state.counters, after="\n"),
    ]
    for ask in bad:
        with pytest.raises(InvalidRequest):
            ask()
    assert state.submit(Get("visits")) is None


@pytest.mark.parametrize(
    "url", ["", "nothing://", "http://localhost/", "memory", "memory:", "memory://x", "memory://?a=b"]
)
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        open_state(url)


def test_a_managers_url_names_its_directory_and_connects_to_nothing_yet(tmp_path: Path) -> None:
    assert str(DataDirectory.from_url("manager:///with%20space", "/other")) == "/with space"
    assert str(DataDirectory.from_url("manager://", "/other")) == "/other"
    url = f"manager://{tmp_path / 'data'}"
    assert str(open_store(url)) == url
    assert not (tmp_path / "data").exists()
    for wrong in ("//host/directory", "//relative", "///directory?option=1", "///directory#fragment"):
        with pytest.raises(InvalidRequest):
            open_state(f"manager:{wrong}")


def test_a_deadline_is_over_0_and_at_most_60_seconds() -> None:
    for deadline in (0, -1, 60.1, inf, float("nan"), -0.0):
        with pytest.raises(InvalidRequest, match="deadline"):
            open_state("memory://", deadline=deadline)
    for deadline in (0.001, 1, 60):
        store = WatchedStore()
        before = time.monotonic()
        State(store, deadline=deadline).counter("visits").increment()
        assert before + deadline <= store.deadlines[0] <= time.monotonic() + deadline


# Forks


class WatchedStore(MemoryStore):
    """Memory that notes whose batches it was given, and that can keep the parent's threads inside a call."""

    def __init__(self, round_trip: RoundTrip = "none") -> None:
        super().__init__()
        self.round_trip: RoundTrip = round_trip
        self.clients: list[bytes] = []
        self.deadlines: list[float] = []
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self._owner = os.getpid()

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:
        self.clients.append(batch.client)
        self.deadlines.append(deadline)
        if os.getpid() == self._owner:
            self.inside.set()
            assert self.go_on.wait(PATIENCE)
        return super().apply(batch, deadline)


def test_a_child_is_another_client_and_the_parent_stays_the_same() -> None:
    store = WatchedStore()
    counter = State(store, deadline=PATIENCE).counter("visits")
    counter.increment()

    def work() -> bytes:
        assert counter.increment() == 2  # its own copy of the memory
        return store.clients[-1]

    assert len({store.clients[0], in_child(work), in_child(work)}) == 3
    assert counter.increment() == 2
    assert store.clients == [store.clients[0]] * 2


@pytest.mark.parametrize("round_trip", get_args(RoundTrip))
def test_a_child_works_while_threads_of_the_parent_make_and_await_a_call(round_trip: RoundTrip) -> None:
    store = WatchedStore(round_trip)
    counter = State(store, deadline=PATIENCE).counter("visits")
    counter.increment()
    store.inside.clear()
    store.go_on.clear()
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(counter.increment()), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()

    def work() -> bytes:
        """Share calls with threads of its own, as the parent does."""
        return bytes(sorted(at_once(16, counter.increment)))

    try:
        assert store.inside.wait(PATIENCE)
        assert in_child(work) == bytes(range(2, 18))
    finally:
        store.go_on.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(numbers) == [2, 3, 4, 5]


def test_a_child_works_though_a_thread_of_the_parent_held_a_lock(state: State, counter: Counter) -> None:
    """No thread in the child could release it. It is held for moments only, so this looks inside."""
    assert isinstance(state.store, MemoryStore)
    with state.store._writing:
        assert in_child(lambda: b"%d %d %d" % (counter.increment(), counter.increment(), counter.value)) == b"1 2 2"
    assert counter.increment() == 1


def test_the_environment_has_the_defaults_of_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"DEADLINE": "7", "START": "0", "DURABILITY": "process", "IDLE_TIMEOUT": "9"}.items():
        monkeypatch.setenv(f"COUNTER_SERVER_{name}", text)
    state = open_state(f"manager://{tmp_path}/data")
    assert (state._deadline, cast(StateProxy, state.store)._starter) == (7, None)
    given = StoreOptions(start=True, durability="none")
    assert (given.start, given.durability, given.idle_timeout) == (True, "none", 9)
    assert open_state("memory://", deadline=3)._deadline == 3
    monkeypatch.setenv("COUNTER_SERVER_START", "perhaps")
    with pytest.raises(InvalidRequest, match="COUNTER_SERVER_START is 'perhaps'"):
        open_state(f"manager://{tmp_path}/data")


class Timed(MemoryStore):
    """A store that remembers the deadline of its last call."""

    deadline = 0.0

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:
        self.deadline = deadline
        return super().apply(batch, deadline)


def test_a_block_gives_its_calls_another_deadline() -> None:
    store = Timed()
    state = State(store, deadline=5)

    def seconds() -> tuple[float, float]:
        """Make a call; return bounds of the seconds that it might take."""
        began = time.monotonic()
        state.counter("c").increment()
        return store.deadline - time.monotonic(), store.deadline - began

    def assert_deadline(wanted: float) -> None:
        least, most = seconds()
        assert least <= wanted <= most

    @state.deadline(7)
    def decorated() -> None:
        assert_deadline(7)

    @state.deadline(7)
    async def later() -> None:
        await asyncio.sleep(0)
        assert_deadline(7)

    class Later:
        async def __call__(self) -> None:
            await asyncio.sleep(0)
            assert_deadline(6)

        @state.deadline(7)
        @staticmethod
        async def static() -> None:
            await asyncio.sleep(0)
            assert_deadline(7)

    assert_deadline(5)
    with state.deadline(0.5):
        assert_deadline(0.5)
        with suppress(KeyError), state.deadline(60):  # it may be later, too
            assert_deadline(60)
            decorated()
            for coroutine in (later(), state.deadline(6)(Later())(), Later.static()):
                asyncio.run(coroutine)
            raise KeyError
        assert_deadline(0.5)
        at_once(2, lambda: assert_deadline(5))  # other threads are not in the block
    assert_deadline(5)
    wrong: list[Any] = [0, 61, None, "1"]
    for value in wrong:
        with pytest.raises(InvalidRequest, match="deadline"), state.deadline(value):
            pass


BLOCKS = pytest.mark.parametrize("block", [in_memory, partial(State.deadline, 0.5)], ids=["in_memory", "deadline"])


@BLOCKS
def test_a_block_is_entered_once_at_a_time(block: Callable[[], Block]) -> None:
    one = block()
    for _ in range(2):
        with one, pytest.raises(RuntimeError, match="make another one for each `with`"), one:
            pytest.fail("the inner one would end the outer one")


@BLOCKS
def test_a_block_cannot_decorate_what_runs_later_or_is_no_function(block: Callable[[], Block]) -> None:
    class Tests:
        pass

    def generate() -> Iterator[int]:
        yield 1

    async def generate_later() -> AsyncIterator[int]:
        yield 1

    for decorated, name in ((generate, "generate"), (generate_later, "generate_later"), (Tests, "Tests")):
        with pytest.raises(TypeError, match=rf"{name} is a .*: write `with` in its body"):
            block()(decorated)
    with pytest.raises(TypeError, match="is a generator function"):
        block()(partial(generate))


def test_a_store_that_hosts_no_objects_says_so_at_once_with_what_is_declared() -> None:
    url = "sqlite:////nowhere/counters.db"
    declarations = Declarations()
    with State(open_store("memory://"), declarations=declarations) as hosting:
        hosting.object("global_obj", SomeObj, 0)
        hosting.dict("carts", max_entries=10)
    everything = r"global_obj = tests.hosted_classes.SomeObj\(0\); carts = .*BoundedDict\(10, durable=False\)"
    with pytest.raises(Unsupported, match=rf"^sqlite:// hosts no .* this app declares {everything}: use manager://"):
        State(open_store(url), declarations=declarations)
    with open_state(url) as state, pytest.raises(Unsupported, match=r"declares global_obj = tests\S+SomeObj\(0\): use"):
        state.object("global_obj", SomeObj, 0)
