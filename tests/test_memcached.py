"""memcached counts at most once, reports every loss, and refuses by name the operations that it does not know."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from counter_server import SharedState, State, open_state
from counter_server.errors import (
    AccessDenied,
    DeadlineExceeded,
    Disconnected,
    LimitReached,
    OutcomeUnknown,
    StateLost,
    StorageFull,
    Unsupported,
)
from counter_server.operations import LARGEST, LARGEST_BATCH, Batch, Delete, Get, Increment, Operation, Refusal, Set
from counter_server.stores import open_store
from counter_server.stores.memcached import MemcachedStore
from counter_server.stores.memory import MemoryStore
from counter_server.testing import NAMES, RandomBatches, apply, assert_exactly_once
from tests.cutter import Cutter
from tests.engines import MemcachedServer
from tests.load import StoreLoad, at_once, impatient, open_client
from tests.processes import PATIENCE, ROOT, frozen
from tests.test_manager import Interrupted, interrupted_when_sent

pytestmark = pytest.mark.slow

_names = count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemcachedServer]:
    with MemcachedServer(tmp_path_factory.mktemp("memcached")) as server:
        yield server


@pytest.fixture
def start(stack: ExitStack, tmp_path: Path) -> Callable[..., MemcachedServer]:
    return lambda *options: stack.enter_context(MemcachedServer(tmp_path / "memcached", *options))


@pytest.fixture
def store(server: MemcachedServer) -> Iterator[Any]:
    with closing(open_store(server.url_of(f"place{next(_names)}"))) as store:
        yield store


@pytest.fixture
def cutter(server: MemcachedServer, cut: Callable[[Path], Cutter]) -> Cutter:
    return cut(server.socket)


# Supported operations


def possible(draw: RandomBatches) -> Operation:
    name, step = draw.name(), draw.chance.choice([1, 2, 10, 2**48, draw.chance.randint(1, 2**48)])
    number = draw.chance.choice([0, 1, 9, 99, 2**53, 2**53 + 1, 2**62, draw.chance.randint(0, 2**62)])
    found: list[Operation] = [Increment(name), Increment(name, step), Set(name, number), Delete(name), Get(name)]
    return draw.chance.choice(found)


def test_possible_operations_have_the_results_of_the_reference(store: Any) -> None:
    seed = random.randrange(2**32)
    draw, reference = RandomBatches(seed, ""), MemoryStore()
    for _ in range(300):
        batch = [possible(draw) for _ in range(draw.chance.randint(1, 12))]
        assert apply(store, *batch) == apply(reference, *batch), (seed, batch)


def test_names_of_all_scripts_and_lengths_are_counters_of_their_own(store: Any) -> None:
    long = ["字" * 84 + end for end in ("aaa", "aab", "字")] + ["x" * 251 + f"{n:04d}" for n in range(LARGEST_BATCH)]
    # The key of a long name, as a name: it is encoded, so it is another.
    keys = ["#" + blake2b(long[0].encode(), digest_size=32).hexdigest(), "%23", "#", "%", "%25", "a b", "a%20b", "a+b"]
    everything = [*NAMES, *keys, "a:b", "epoch", ":epoch", *long]
    for batch in (everything[:-LARGEST_BATCH], everything[-LARGEST_BATCH:]):
        numbers = list(range(1, len(batch) + 1))
        assert apply(store, *map(Increment, batch, numbers)) == numbers
        assert apply(store, *map(Get, batch)) == numbers


# All at once


def test_clients_that_create_one_counter_at_once_count_from_1(server: MemcachedServer, stack: ExitStack) -> None:
    states = [stack.enter_context(open_client(server.url)) for _ in range(8)]
    barrier = threading.Barrier(len(states))

    def work() -> list[int]:
        state = states.pop()
        values = []
        for number in range(50):
            barrier.wait(PATIENCE)
            values.append(state.counter(f"round {number}").increment())
        return values

    for taken in zip(*at_once(8, work), strict=True):
        assert sorted(taken) == list(range(1, 9))


def test_an_epoch_that_goes_as_soon_as_it_is_made_is_a_loss(
    server: MemcachedServer, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """Or the number would be counted under no epoch, and given again under the next."""
    ask = MemcachedStore._ask

    def forgetting(self: MemcachedStore, deadline: float, method: str, *arguments: Any) -> Any:
        found = ask(self, deadline, method, *arguments)
        if method == "add" and arguments[0].endswith(b":epoch"):
            ask(self, deadline, "delete", arguments[0])
        return found

    counter = stack.enter_context(open_client(server.url_of(f"place{next(_names)}"))).counter("x")
    with monkeypatch.context() as patched:
        patched.setattr(MemcachedStore, "_ask", forgetting)
        with pytest.raises(StateLost):
            counter.increment()
    assert [counter.value, counter.increment(), counter.increment()] == [0, 1, 2]


def test_4_processes_of_8_threads_count_without_a_gap(server: MemcachedServer, tmp_path: Path) -> None:
    history = StoreLoad(server.url, "hot", 4, 8, tmp_path, each=30, keys=False).finish(stop=False)
    assert len(history) == 4 * 8 * 30
    assert_exactly_once(history, 4 * 8 * 30, tmp_path / "history.json")


# When something breaks


def test_cut_connections_skip_numbers_and_give_none_twice(
    server: MemcachedServer, cutter: Cutter, stack: ExitStack
) -> None:
    states = [stack.enter_context(open_client(server.url_of("cut", cutter.port))) for _ in range(4)]

    def work() -> list[int | None]:
        state = states.pop()
        values: list[int | None] = []
        for _ in range(300):
            try:
                values.append(state.counter("hot").increment())
            except OutcomeUnknown:
                values.append(None)
        return values

    answers = [value for values in at_once(4, work) for value in values]
    values = [value for value in answers if value is not None]
    unknown = answers.count(None)
    assert cutter.cuts >= 10
    assert unknown > 0
    assert len(set(values)) == len(values)
    with open_client(server.url_of("cut")) as state:
        assert len(values) <= max(values) <= state.counter("hot").value <= len(values) + unknown


def test_a_batch_is_never_counted_again_with_or_without_an_answer(server: MemcachedServer, store: Any) -> None:
    batch = Batch(os.urandom(16), 1, [Increment("c"), Increment("c", 5), Increment("c", key="k")])
    first = store.apply(batch, time.monotonic() + PATIENCE)
    assert first[:2] == [1, 6]
    assert store.apply(batch, time.monotonic() + PATIENCE) == first
    batch = Batch(os.urandom(16), 1, [Increment("c")])
    with frozen(server.pid), pytest.raises(OutcomeUnknown):
        store.apply(batch, time.monotonic() + 0.5)
    for _ in range(3):  # as after an interrupt, when another thread leads on
        with pytest.raises(OutcomeUnknown):
            store.apply(batch, time.monotonic() + PATIENCE)
    (value,) = apply(store, Get("c"))
    assert value in (6, 7)


def test_reads_are_asked_again_and_are_never_unknown(server: MemcachedServer, cutter: Cutter, stack: ExitStack) -> None:
    state = stack.enter_context(open_client(server.url_of("reads")))
    state.counter("c").increment()
    with frozen(server.pid), impatient(state), pytest.raises(DeadlineExceeded) as late:
        _ = state.counter("c").value
    assert late.value.outcome == "not_applied"
    through = stack.enter_context(open_client(server.url_of("reads", cutter.port)))
    assert [through.counter("c").value for _ in range(500)] == [1] * 500
    assert cutter.cuts


def test_a_batch_that_comes_too_late_is_not_sent(store: Any) -> None:
    assert apply(store, Increment("c")) == [1]
    with pytest.raises(Disconnected) as error:
        store.apply(Batch(os.urandom(16), 1, [Increment("c")]), time.monotonic())
    assert not error.value.sent
    assert apply(store, Get("c")) == [1]


def test_a_flush_under_load_or_a_restart_is_reported_to_each_client(
    start: Callable[..., MemcachedServer], stack: ExitStack
) -> None:
    server = start()
    everyone = [stack.enter_context(open_client(server.url)) for _ in range(4)]
    states, flusher = list(everyone), everyone[0]

    def until_lost(state: State, before: list[int]) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            before.append(state.counter("hot").increment())
            if state is flusher and len(before) == 200:
                assert server.command("flush_all") == b"OK\r\n"

    def work() -> tuple[list[int], list[int]]:
        state = states.pop()
        before: list[int] = []
        with pytest.raises(StateLost):
            until_lost(state, before)
        return before, [state.counter("hot").increment() for _ in range(50)]

    first_life, second_life = zip(*at_once(4, work), strict=True)
    taken = [value for values in first_life for value in values]
    assert len(taken) >= 200
    assert len(set(taken)) == len(taken)
    assert sorted(value for values in second_life for value in values) == list(range(1, 201))
    server.restart()
    for state in everyone:
        with pytest.raises(StateLost) as lost:
            state.counter("hot").increment()
        assert lost.value.outcome == "not_applied"
    assert [state.counter("hot").increment() for state in everyone] == [1, 2, 3, 4]


def test_a_full_server_that_may_not_evict_refuses_new_counters_only(
    start: Callable[..., MemcachedServer], stack: ExitStack
) -> None:
    store = stack.enter_context(closing(open_store(start("-m", "2", "-M").url)))
    assert apply(store, Increment("c")) == [1]
    batches = (apply(store, *(Increment(f"{n} {m}".ljust(100)) for m in range(1000))) for n in range(200))
    refused = next(results[-1] for results in batches if results[-1] != 1)
    assert isinstance(refused, Refusal)
    assert isinstance(refused.error(), StorageFull)
    assert apply(store, Increment("c"), Get("c")) == [2, 2]


def test_a_server_that_wants_a_password_says_so(start: Callable[..., MemcachedServer], tmp_path: Path) -> None:
    (tmp_path / "users").write_text("user:secret\n")
    with open_client(start("-Y", str(tmp_path / "users")).url) as state, pytest.raises(AccessDenied) as denied:
        state.counter("c").increment()
    assert denied.value.outcome == "not_applied"


def test_an_interrupted_call_is_not_repeated_and_leaves_no_late_answer(server: MemcachedServer, store: Any) -> None:
    assert apply(store, Increment("c")) == [1]
    connection = store._client.sock
    batch = Batch(os.urandom(16), 1, [Increment("c")])
    with frozen(server.pid), pytest.raises(Interrupted), interrupted_when_sent(connection.fileno()):
        store.apply(batch, time.monotonic() + PATIENCE)
    assert connection.fileno() == -1  # closed
    with pytest.raises(OutcomeUnknown):
        store.apply(batch, time.monotonic() + PATIENCE)
    assert apply(store, Set("other", 10), Increment("other")) == [10, 11]


# Unsupported operations


def test_an_unsupported_operation_is_refused_by_name(store: Any, tmp_path: Path) -> None:
    """The rest of the batch is applied. If there is no rest, no server is asked."""
    impossible: dict[str, Operation] = {
        "idempotency": Increment("c", key="k"),
        "minimum": Increment("c", minimum=0),
        "maximum": Increment("c", maximum=10),
        "count down": Increment("c", -1),
        "steps": Increment("c", 2**48 + 1),
        "negative": Set("c", -1),
    }
    results = apply(store, Increment("c"), *impossible.values(), Increment("c"))
    assert (results[0], results[-1]) == (1, 2)
    for what, result in zip(impossible, results[1:-1], strict=True):
        assert isinstance(result, Refusal)
        assert isinstance(result.error(), Unsupported)
        assert what in result.message
    with open_client(f"memcached://{tmp_path}/nothing") as state:
        for call, what in ((state.counters, "cannot list"), (state.counter("c").decrement, "count down")):
            with pytest.raises(Unsupported, match=what) as refused:
                call()
            assert refused.value.outcome == "not_applied"


def test_a_counter_beyond_64_bits_refuses_until_it_is_set(server: MemcachedServer, stack: ExitStack) -> None:
    """It never begins at 0."""
    counter = stack.enter_context(open_client(server.url_of("beyond"))).counter("c")
    assert counter.set(LARGEST - 2) == LARGEST - 2
    assert [counter.increment(), counter.increment()] == [LARGEST - 1, LARGEST]
    epoch = server.command("mg beyond:epoch v").split()[2].decode()
    for by in (1, 2**48, 7, 2**48):
        with pytest.raises(LimitReached):
            counter.increment(by)
        assert server.command(f"mg beyond:{epoch}:c v").split()[2] == b"%d" % 2**63
    with pytest.raises(LimitReached):
        _ = counter.value
    assert counter.set(5) == 5
    assert counter.increment() == 6


def test_an_option_of_managers_and_a_missing_package_are_named() -> None:
    without = "import sys; sys.modules['pymemcache'] = None; from counter_server.cli import main; "
    for program, said in (
        (f"{without}main(['list', '--store', 'memcached://localhost'])", "counter-server[memcached]"),
        (
            "from counter_server.cli import main; main(['run', '--store', 'memcached://x', '--durability', 'none'])",
            "--durability is for a manager",
        ),
    ):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr


def test_a_shared_object_is_refused_where_it_is_declared() -> None:
    shared, app = SharedState(), Flask(__name__)
    shared.dict("d")
    app.config["COUNTER_SERVER_STORE"] = "memcached://localhost"
    with open_state("memcached://localhost") as state:
        for declare in (lambda: state.object("o", dict), lambda: state.dict("d"), lambda: shared.init_app(app)):
            with pytest.raises(Unsupported, match="hosts no shared objects"):
                declare()
        assert not state.declarations
    app.config["COUNTER_SERVER_STORE"] = "memory://"
    shared.init_app(app)
    shared.dict("another")
