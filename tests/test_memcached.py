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
from typing import Any, cast

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
from counter_server.operations import (
    LARGEST,
    LARGEST_BATCH,
    Batch,
    Delete,
    Get,
    Increment,
    Operation,
    Refusal,
    Result,
    Scan,
    Set,
)
from counter_server.server.prove.load import Client
from counter_server.stores import Store, open_store
from counter_server.stores.memory import MemoryStore
from counter_server.testing import NAMES, RandomBatches, apply, assert_exactly_once
from tests.cutter import Cutter
from tests.engines import MemcachedServer
from tests.load import StoreLoad, at_once, impatient, open_client
from tests.processes import PATIENCE, ROOT, Server, frozen
from tests.test_manager import Interrupted, interrupted_when_sent

pytestmark = pytest.mark.slow

_names = count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemcachedServer]:
    """A server for tests that do not change it."""
    with MemcachedServer(tmp_path_factory.mktemp("memcached")) as server:
        yield server


@pytest.fixture
def own_server(tmp_path: Path, stack: ExitStack) -> MemcachedServer:
    """A server for tests that kill or empty it."""
    return stack.enter_context(MemcachedServer(tmp_path / "memcached"))


@pytest.fixture
def store(server: MemcachedServer) -> Iterator[Store]:
    store = open_store(server.url)
    yield store
    store.close()


@pytest.fixture
def name() -> str:
    return f"counter {next(_names)}"


# Supported operations


def possible(draw: RandomBatches) -> Operation:
    name, number = (
        draw.name(),
        draw.chance.choice([0, 1, 9, 99, 2**53, 2**53 + 1, 2**62, draw.chance.randint(0, 2**62)]),
    )
    step = draw.chance.choice([1, 2, 10, 2**48, draw.chance.randint(1, 2**48)])
    found: list[Operation] = [Increment(name), Increment(name, step), Set(name, number), Delete(name), Get(name)]
    return draw.chance.choice(found)


def test_what_it_can_do_it_does_as_the_reference_does(server: MemcachedServer) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, reference = RandomBatches(seed, ""), MemoryStore()
    with closing(open_store(server.url_of(f"round-{next(_names)}"))) as store:
        for _ in range(500):
            batch = [possible(draw) for _ in range(draw.chance.randint(1, 12))]
            assert apply(store, *batch) == apply(reference, *batch), (seed, batch)


def test_the_largest_batch_of_the_longest_names_is_applied(store: Store, name: str) -> None:
    longest = [name.ljust(251, "x") + f"{n:04d}" for n in range(LARGEST_BATCH)]
    assert apply(store, *map(Increment, longest)) == [1] * LARGEST_BATCH
    assert apply(store, *map(Get, longest)) == [1] * LARGEST_BATCH


def test_names_of_all_scripts_and_of_full_length_are_counters_of_their_own(store: Store) -> None:
    long = ["字" * 84 + end for end in ("aaa", "aab", "字")] + ["x" * 254 + end for end in "ab"]
    apply(store, Increment(long[0]))
    keys = ["#" + blake2b(long[0].encode(), digest_size=32).hexdigest(), "%23", "#", "%", "%25", "a b", "a%20b", "a+b"]
    keys += ["a:b", "epoch", ":epoch"]
    # The key of a long name, as a name: it is encoded, so it is another.
    everything = [f"all {n}" for n in (*NAMES, *keys)] + [*keys, *long]
    apply(store, *map(Delete, everything))
    for number, every in enumerate(everything, 1):
        assert apply(store, Increment(every, number)) == [number]
    assert apply(store, *map(Get, everything)) == list(range(1, len(everything) + 1))


def test_prefixes_part_what_shares_a_server(server: MemcachedServer, name: str) -> None:
    one, other = open_store(server.url_of("one")), open_store(server.url_of("other"))
    assert apply(one, Increment(name)) == [1]
    assert apply(other, Increment(name)) == [1]
    assert apply(one, Increment(name)) == [2]
    one.close()
    other.close()


def test_it_is_reached_by_tcp_and_a_hosts_name_too(server: MemcachedServer, stack: ExitStack, name: str) -> None:
    proxy = Cutter(server.socket, cutting=False)
    stack.callback(proxy.close)
    with open_state(f"memcached://localhost:{proxy.port}") as state:
        assert [state.counter(name).increment() for _ in range(3)] == [1, 2, 3]


# All at once


@pytest.mark.parametrize("states", [1, 100])
def test_100_threads_of_some_states_see_1_to_100(
    server: MemcachedServer, stack: ExitStack, name: str, states: int
) -> None:
    counters = [stack.enter_context(open_client(server.url)).counter(name) for _ in range(states)] * (100 // states)
    assert sorted(at_once(100, lambda: counters.pop().increment())) == list(range(1, 101))


def test_clients_that_create_one_counter_at_once_count_from_1(
    server: MemcachedServer, stack: ExitStack, name: str
) -> None:
    states = [stack.enter_context(open_client(server.url)) for _ in range(8)]
    rounds = [f"{name} {n}" for n in range(100)]
    barrier = threading.Barrier(len(states))

    def work() -> list[int]:
        state = states.pop()
        values = []
        for each in rounds:
            barrier.wait(PATIENCE)
            values.append(state.counter(each).increment())
        return values

    of_threads = at_once(8, work)
    for taken in zip(*of_threads, strict=True):
        assert sorted(taken) == list(range(1, 9))


def test_4_processes_of_8_threads_count_without_a_gap(server: MemcachedServer, tmp_path: Path) -> None:
    history = StoreLoad(server.url, "hot", 4, 8, tmp_path, each=30, keys=False).finish(stop=False)
    assert_exactly_once(history, 4 * 8 * 30, tmp_path / "history.json")


# When something breaks


def test_connections_cut_in_the_middle_skip_numbers_and_give_none_twice(
    own_server: MemcachedServer, stack: ExitStack
) -> None:
    cutter = Cutter(own_server.socket)
    stack.callback(cutter.close)
    states = [stack.enter_context(open_client(f"memcached://127.0.0.1:{cutter.port}")) for _ in range(4)]

    def work() -> list[int | None]:
        state = states.pop()
        values: list[int | None] = []
        for _ in range(400):
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
    with open_client(own_server.url) as state:
        assert len(values) <= max(values) <= state.counter("hot").value <= len(values) + unknown


def test_a_batch_that_has_no_answer_is_unknown_at_once_and_never_sent_again(own_server: MemcachedServer) -> None:
    store = open_store(own_server.url)
    assert apply(store, Increment("c")) == [1]
    batch = Batch(os.urandom(16), 1, [Increment("c")])
    with frozen(own_server.pid), pytest.raises(OutcomeUnknown):
        store.apply(batch, time.monotonic() + 0.5)
    for _ in range(3):  # as after an interrupt, when another thread leads on
        with pytest.raises(OutcomeUnknown):
            store.apply(batch, time.monotonic() + PATIENCE)
    (value,) = apply(store, Get("c"))
    assert value in (1, 2)
    store.close()


def test_a_batch_that_has_its_answer_is_answered_again_and_not_counted_again(store: Store, name: str) -> None:
    batch = Batch(os.urandom(16), 1, [Increment(name), Increment(name, 5), Increment(name, key="k")])
    first = store.apply(batch, time.monotonic() + PATIENCE)
    assert first[:2] == [1, 6]
    assert store.apply(batch, time.monotonic() + PATIENCE) == first
    assert apply(store, Get(name)) == [6]


def test_reads_are_asked_again_and_are_never_unknown(own_server: MemcachedServer, stack: ExitStack) -> None:
    state = stack.enter_context(open_client(own_server.url))
    state.counter("c").increment()
    with frozen(own_server.pid), impatient(state), pytest.raises(DeadlineExceeded) as late:
        _ = state.counter("c").value
    assert late.value.outcome == "not_applied"
    cutter = Cutter(own_server.socket)
    stack.callback(cutter.close)
    through = stack.enter_context(open_client(f"memcached://127.0.0.1:{cutter.port}"))
    assert [through.counter("c").value for _ in range(500)] == [1] * 500
    assert cutter.cuts


def test_a_server_that_is_not_there_has_counted_nothing(tmp_path: Path, stack: ExitStack) -> None:
    store = open_store(f"memcached://{tmp_path}/nothing")
    with pytest.raises(Disconnected) as error:
        store.apply(Batch(os.urandom(16), 1, [Increment("x")]), time.monotonic() + 0.2)
    assert not error.value.sent
    state = stack.enter_context(open_client(f"memcached://{tmp_path}/nothing", deadline=0.1))
    with pytest.raises(DeadlineExceeded) as late:
        state.counter("x").increment()
    assert late.value.outcome == "not_applied"


def test_what_comes_too_late_is_not_sent(store: Store, name: str) -> None:
    assert apply(store, Increment(name)) == [1]
    with pytest.raises(Disconnected) as error:
        store.apply(Batch(os.urandom(16), 1, [Increment(name)]), time.monotonic())
    assert not error.value.sent
    assert apply(store, Get(name)) == [1]


@pytest.mark.parametrize("forget", [MemcachedServer.restart, lambda server: server.command("flush_all")])
def test_a_server_that_forgot_says_so_before_any_number_begins_anew(
    own_server: MemcachedServer, stack: ExitStack, forget: Callable[[MemcachedServer], object]
) -> None:
    states = [stack.enter_context(open_client(own_server.url)) for _ in range(2)]
    for _ in range(2):
        assert [state.counter("c").increment() for state in states for _ in range(2)] == [1, 2, 3, 4]
        forget(own_server)
        for state in states:
            with pytest.raises(StateLost) as lost:
                state.counter("c").increment()
            assert lost.value.outcome == "not_applied"


def test_a_flush_under_load_gives_no_number_twice_in_either_life(own_server: MemcachedServer, stack: ExitStack) -> None:
    states = [stack.enter_context(open_client(own_server.url)) for _ in range(4)]
    flusher = states[0]

    def until_lost(state: State, before: list[int]) -> None:
        while True:
            before.append(state.counter("hot").increment())
            if state is flusher and len(before) == 200:
                assert own_server.command("flush_all") == b"OK\r\n"

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


def test_a_full_server_that_may_not_evict_refuses_new_counters_and_goes_on_with_others(
    tmp_path: Path, stack: ExitStack
) -> None:
    server = stack.enter_context(MemcachedServer(tmp_path / "memcached", "-m", "2", "-M"))
    store = open_store(server.url)
    stack.callback(store.close)
    assert apply(store, Increment("c")) == [1]
    results: list[Result] = []
    for n in range(200):
        results = apply(store, *(Increment(f"{n} {m}".ljust(100)) for m in range(1000)))
        if results[-1] != 1:
            break
    assert isinstance(results[-1], Refusal)
    assert isinstance(results[-1].error(), StorageFull)
    assert apply(store, Increment("c"), Get("c")) == [2, 2]


def test_a_server_that_wants_a_password_says_so(tmp_path: Path, stack: ExitStack) -> None:
    users = tmp_path / "users"
    users.write_text("user:secret\n")
    server = stack.enter_context(MemcachedServer(tmp_path / "memcached", "-Y", str(users)))
    with pytest.raises(AccessDenied) as denied:
        stack.enter_context(open_client(server.url)).counter("c").increment()
    assert denied.value.outcome == "not_applied"


def test_an_interrupted_call_leaves_no_late_answer_and_is_not_made_again(own_server: MemcachedServer) -> None:
    def open_sockets() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))

    store = open_store(own_server.url)
    before = open_sockets()
    assert apply(store, Increment("c")) == [1]
    assert open_sockets() == before + 1
    batch = Batch(os.urandom(16), 1, [Increment("c")])
    descriptor = cast(Any, store)._client.sock.fileno()
    with frozen(own_server.pid), pytest.raises(Interrupted), interrupted_when_sent(descriptor):
        store.apply(batch, time.monotonic() + PATIENCE)
    assert open_sockets() == before
    with pytest.raises(OutcomeUnknown):
        store.apply(batch, time.monotonic() + PATIENCE)
    assert apply(store, Set("other", 10), Increment("other")) == [10, 11]
    store.close()


# Unsupported operations


def test_what_it_cannot_do_is_refused_by_name_and_the_rest_of_the_batch_goes_on(store: Store, name: str) -> None:
    impossible: dict[str, Operation] = {
        "idempotency": Increment(name, key="k"),
        "minimum": Increment(name, minimum=0),
        "maximum": Increment(name, maximum=10),
        "count down": Increment(name, -1),
        "steps": Increment(name, 2**48 + 1),
        "negative": Set(name, -1),
    }
    results = apply(store, Increment(name), *impossible.values(), Increment(name))
    assert (results[0], results[-1]) == (1, 2)
    for what, result in zip(impossible, results[1:-1], strict=True):
        assert isinstance(result, Refusal)
        assert isinstance(result.error(), Unsupported)
        assert what in result.message
    assert apply(store, Get(name)) == [2]
    (page,) = apply(store, Scan(name))
    assert isinstance(page, Refusal)
    assert "list" in page.message


def test_what_it_cannot_do_is_told_without_a_server(tmp_path: Path) -> None:
    with open_client(f"memcached://{tmp_path}/nothing") as state:
        for impossible in (
            state.counters,
            state.counter("c").decrement,
            lambda: state.counter("c").increment(key="k"),
            lambda: state.counter("c").set(-1),
        ):
            with pytest.raises(Unsupported, match="memcached") as refused:
                impossible()
            assert refused.value.outcome == "not_applied"


def test_a_counter_beyond_64_bits_refuses_until_it_is_set_and_never_begins_at_0(
    own_server: MemcachedServer, stack: ExitStack
) -> None:
    state = stack.enter_context(open_client(own_server.url))
    counter = state.counter("c")
    assert counter.set(LARGEST - 2) == LARGEST - 2
    assert [counter.increment(), counter.increment()] == [LARGEST - 1, LARGEST]
    epoch = own_server.command("mg counter_server:epoch v").split()[2].decode()
    for by in (1, 2**48, 7, 2**48):
        with pytest.raises(LimitReached):
            counter.increment(by)
        assert own_server.command(f"mg counter_server:{epoch}:c v").split()[2] == b"%d" % 2**63
    with pytest.raises(LimitReached):
        _ = counter.value
    assert counter.set(5) == 5
    assert counter.increment() == 6


def test_without_pymemcache_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['pymemcache'] = None\n"
        "from counter_server import open_state\n"
        "try: open_state('memcached://localhost')\n"
        "except ValueError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "counter-server[memcached]" in told.stdout


# Shared objects on a store that hosts none


def app_on(url: str, shared: SharedState) -> Flask:
    app = Flask(__name__)
    app.config["COUNTER_SERVER_STORE"] = url
    shared.init_app(app)
    return app


@pytest.mark.parametrize("url", ["memcached://localhost", "redis://localhost"])
def test_a_shared_object_on_a_store_that_hosts_none_is_refused_where_it_is_declared(url: str) -> None:
    with open_state(url) as state:
        for declare in (lambda: state.object("o", dict), lambda: state.dict("d")):
            with pytest.raises(Unsupported, match="hosts no shared objects"):
                declare()
        assert not state.declarations
    shared = SharedState()
    app_on(url, shared)
    for late in (lambda: shared.object("o", dict), lambda: shared.dict("d"), lambda: shared.visitor_counter("v")):
        with pytest.raises(Unsupported, match="hosts no shared objects"):
            late()


def test_an_app_on_such_a_store_is_refused_where_objects_are_declared_and_others_go_on() -> None:
    shared = SharedState()
    shared.dict("d")
    app = Flask(__name__)
    app.config["COUNTER_SERVER_STORE"] = "memcached://localhost"
    with pytest.raises(Unsupported, match="hosts no shared objects"):
        shared.init_app(app)
    app_on("memory://", shared)
    shared.dict("another")


def test_our_own_server_counts_visits_and_says_501_to_what_is_not_there(
    server: MemcachedServer, stack: ExitStack, name: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))  # of the key that signs its cookies
    url = f"{server.url}?prefix=web"
    web = stack.enter_context(Server("--store", url, "--workers", "2"))
    client = Client(web.url)
    stack.callback(client.close)
    path = f"/api/v1/counters/{name.replace(' ', '-')}/increment"
    assert [client.request("POST", path)[1]["value"] for _ in range(3)] == [1, 2, 3]
    for method, what, why in (
        ("GET", "/api/v1/counters", "cannot list"),
        ("GET", "/session", "hosts no shared objects"),
        ("POST", "/session/inc", "hosts no shared objects"),
        ("POST", "/session/reset", "hosts no shared objects"),
    ):
        status, problem = client.request(method, what)
        assert status == 501
        assert problem["title"] == "Unsupported"
        assert why in problem["detail"]
        assert str(server.socket) not in problem["detail"]
    status, problem = client.request("POST", path, **{"Idempotency-Key": "k"})
    assert (status, problem["outcome"]) == (501, "not_applied")


def test_the_command_line_says_what_is_not_there(server: MemcachedServer) -> None:
    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "counter_server", *arguments, "--store", server.url]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert told("increment", "of the command line").stdout == "1\n"
    listed = told("list")
    assert (listed.returncode, listed.stdout) == (1, "")
    assert "memcached cannot list its counters" in listed.stderr
    durable = told("run", "--durability", "none")
    assert durable.returncode == 1
    assert "--durability is for a manager" in durable.stderr
