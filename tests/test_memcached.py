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
from counter_server.operations import (  # fmt: skip
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
from counter_server.stores import open_store
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
    with MemcachedServer(tmp_path_factory.mktemp("memcached")) as server:
        yield server


@pytest.fixture
def start(stack: ExitStack, tmp_path: Path) -> Callable[..., MemcachedServer]:
    """Start a server with options."""
    return lambda *options: stack.enter_context(MemcachedServer(tmp_path / "memcached", *options))


@pytest.fixture
def store(server: MemcachedServer) -> Iterator[Any]:
    """A store on a part of the server that is empty."""
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


def test_what_it_can_do_it_does_as_the_reference_does(store: Any) -> None:
    seed = random.randrange(2**32)
    draw, reference = RandomBatches(seed, ""), MemoryStore()
    for _ in range(500):
        batch = [possible(draw) for _ in range(draw.chance.randint(1, 12))]
        assert apply(store, *batch) == apply(reference, *batch), (seed, batch)


def test_the_largest_batch_of_the_longest_names_is_applied(store: Any) -> None:
    longest = ["x" * 251 + f"{n:04d}" for n in range(LARGEST_BATCH)]
    assert apply(store, *map(Increment, longest)) == [1] * LARGEST_BATCH
    assert apply(store, *map(Get, longest)) == [1] * LARGEST_BATCH


def test_names_of_all_scripts_and_lengths_are_counters_of_their_own(store: Any) -> None:
    long = ["字" * 84 + end for end in ("aaa", "aab", "字")] + ["x" * 254 + end for end in "ab"]
    # The key of a long name, as a name: it is encoded, so it is another.
    keys = ["#" + blake2b(long[0].encode(), digest_size=32).hexdigest(), "%23", "#", "%", "%25", "a b", "a%20b", "a+b"]
    keys += ["a:b", "epoch", ":epoch"]
    everything = [f"all {n}" for n in (*NAMES, *keys)] + [*keys, *long]
    for number, every in enumerate(everything, 1):
        assert apply(store, Increment(every, number)) == [number]
    assert apply(store, *map(Get, everything)) == list(range(1, len(everything) + 1))


def test_prefixes_part_what_shares_a_server(server: MemcachedServer, stack: ExitStack) -> None:
    one, other = (stack.enter_context(closing(open_store(server.url_of(prefix)))) for prefix in ("one", "other"))
    assert [apply(each, Increment("c")) for each in (one, other, one)] == [[1], [1], [2]]


def test_it_is_reached_by_the_name_of_its_host(server: MemcachedServer, stack: ExitStack) -> None:
    proxy = Cutter(server.socket, cutting=False)
    stack.callback(proxy.close)
    with open_state(f"memcached://localhost:{proxy.port}?prefix=host") as state:
        assert [state.counter("c").increment() for _ in range(3)] == [1, 2, 3]


# All at once


@pytest.mark.parametrize("states", [1, 100])
def test_100_threads_see_1_to_100(server: MemcachedServer, stack: ExitStack, states: int) -> None:
    name = f"counter of {states}"
    counters = [stack.enter_context(open_client(server.url)).counter(name) for _ in range(states)] * (100 // states)
    assert sorted(at_once(100, lambda: counters.pop().increment())) == list(range(1, 101))


def test_clients_that_create_one_counter_at_once_count_from_1(server: MemcachedServer, stack: ExitStack) -> None:
    states = [stack.enter_context(open_client(server.url)) for _ in range(8)]
    barrier = threading.Barrier(len(states))

    def work() -> list[int]:
        state = states.pop()
        values = []
        for number in range(100):
            barrier.wait(PATIENCE)
            values.append(state.counter(f"round {number}").increment())
        return values

    for taken in zip(*at_once(8, work), strict=True):
        assert sorted(taken) == list(range(1, 9))


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
    with open_client(server.url_of("cut")) as state:
        assert len(values) <= max(values) <= state.counter("hot").value <= len(values) + unknown


def test_a_batch_without_an_answer_is_unknown_and_never_sent_again(server: MemcachedServer, store: Any) -> None:
    assert apply(store, Increment("c")) == [1]
    batch = Batch(os.urandom(16), 1, [Increment("c")])
    with frozen(server.pid), pytest.raises(OutcomeUnknown):
        store.apply(batch, time.monotonic() + 0.5)
    for _ in range(3):  # as after an interrupt, when another thread leads on
        with pytest.raises(OutcomeUnknown):
            store.apply(batch, time.monotonic() + PATIENCE)
    (value,) = apply(store, Get("c"))
    assert value in (1, 2)


def test_a_batch_with_an_answer_is_answered_again_and_not_counted_again(store: Any) -> None:
    batch = Batch(os.urandom(16), 1, [Increment("c"), Increment("c", 5), Increment("c", key="k")])
    first = store.apply(batch, time.monotonic() + PATIENCE)
    assert first[:2] == [1, 6]
    assert store.apply(batch, time.monotonic() + PATIENCE) == first
    assert apply(store, Get("c")) == [6]


def test_reads_are_asked_again_and_are_never_unknown(server: MemcachedServer, cutter: Cutter, stack: ExitStack) -> None:
    state = stack.enter_context(open_client(server.url_of("reads")))
    state.counter("c").increment()
    with frozen(server.pid), impatient(state), pytest.raises(DeadlineExceeded) as late:
        _ = state.counter("c").value
    assert late.value.outcome == "not_applied"
    through = stack.enter_context(open_client(server.url_of("reads", cutter.port)))
    assert [through.counter("c").value for _ in range(500)] == [1] * 500
    assert cutter.cuts


def test_what_comes_too_late_or_to_nobody_is_not_sent(store: Any, tmp_path: Path) -> None:
    assert apply(store, Increment("c")) == [1]
    nobody = open_store(f"memcached://{tmp_path}/nothing")
    for each, seconds in ((store, 0.0), (nobody, 0.2)):
        with pytest.raises(Disconnected) as error:
            each.apply(Batch(os.urandom(16), 1, [Increment("c")]), time.monotonic() + seconds)
        assert not error.value.sent
    assert apply(store, Get("c")) == [1]
    with open_client(str(nobody), deadline=0.1) as state, pytest.raises(DeadlineExceeded) as late:
        state.counter("x").increment()
    assert late.value.outcome == "not_applied"


@pytest.mark.parametrize("forget", [MemcachedServer.restart, lambda server: server.command("flush_all")])
def test_a_server_that_forgot_says_so_before_any_number_begins_again(
    start: Callable[..., MemcachedServer], stack: ExitStack, forget: Callable[[MemcachedServer], object]
) -> None:
    server = start()
    states = [stack.enter_context(open_client(server.url)) for _ in range(2)]
    for _ in range(2):
        assert [state.counter("c").increment() for state in states for _ in range(2)] == [1, 2, 3, 4]
        forget(server)
        for state in states:
            with pytest.raises(StateLost) as lost:
                state.counter("c").increment()
            assert lost.value.outcome == "not_applied"


def test_a_flush_under_load_gives_no_number_twice_in_either_life(
    start: Callable[..., MemcachedServer], stack: ExitStack
) -> None:
    server = start()
    states = [stack.enter_context(open_client(server.url)) for _ in range(4)]
    flusher = states[0]

    def until_lost(state: State, before: list[int]) -> None:
        while True:
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


def test_a_full_server_that_may_not_evict_refuses_new_counters_only(
    start: Callable[..., MemcachedServer], stack: ExitStack
) -> None:
    store = stack.enter_context(closing(open_store(start("-m", "2", "-M").url)))
    assert apply(store, Increment("c")) == [1]
    results: list[Result] = []
    for n in range(200):
        results = apply(store, *(Increment(f"{n} {m}".ljust(100)) for m in range(1000)))
        if results[-1] != 1:
            break
    assert isinstance(results[-1], Refusal)
    assert isinstance(results[-1].error(), StorageFull)
    assert apply(store, Increment("c"), Get("c")) == [2, 2]


def test_a_server_that_wants_a_password_says_so(start: Callable[..., MemcachedServer], tmp_path: Path) -> None:
    (tmp_path / "users").write_text("user:secret\n")
    with open_client(start("-Y", str(tmp_path / "users")).url) as state, pytest.raises(AccessDenied) as denied:
        state.counter("c").increment()
    assert denied.value.outcome == "not_applied"


def test_an_interrupted_call_leaves_no_late_answer(server: MemcachedServer, store: Any) -> None:
    """It is not made again either."""

    def open_sockets() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))

    before = open_sockets()
    assert apply(store, Increment("c")) == [1]
    assert open_sockets() == before + 1
    batch = Batch(os.urandom(16), 1, [Increment("c")])
    with frozen(server.pid), pytest.raises(Interrupted), interrupted_when_sent(store._client.sock.fileno()):
        store.apply(batch, time.monotonic() + PATIENCE)
    assert open_sockets() == before
    with pytest.raises(OutcomeUnknown):
        store.apply(batch, time.monotonic() + PATIENCE)
    assert apply(store, Set("other", 10), Increment("other")) == [10, 11]


# Unsupported operations


def test_what_it_cannot_do_is_refused_by_name(store: Any, tmp_path: Path) -> None:
    """The rest of the batch goes on. No server is needed for it."""
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
    assert apply(store, Get("c")) == [2]
    (page,) = apply(store, Scan("c"))
    assert isinstance(page, Refusal)
    assert "list" in page.message
    with open_client(f"memcached://{tmp_path}/nothing") as state:
        counter = state.counter("c")
        calls: list[Callable[[], object]] = [state.counters, counter.decrement, lambda: counter.increment(key="k")]
        calls.append(lambda: counter.set(-1))
        for call in calls:
            with pytest.raises(Unsupported, match="memcached") as refused:
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


@pytest.mark.parametrize("url", ["memcached://localhost", "redis://localhost"])
def test_a_shared_object_is_refused_where_it_is_declared(url: str) -> None:
    with open_state(url) as state:
        for declare in (lambda: state.object("o", dict), lambda: state.dict("d")):
            with pytest.raises(Unsupported, match="hosts no shared objects"):
                declare()
        assert not state.declarations

    def app_on(url: str, shared: SharedState) -> None:
        app = Flask(__name__)
        app.config["COUNTER_SERVER_STORE"] = url
        shared.init_app(app)

    shared = SharedState()
    app_on(url, shared)
    for late in (lambda: shared.object("o", dict), lambda: shared.dict("d"), lambda: shared.visitor_counter("v")):
        with pytest.raises(Unsupported, match="hosts no shared objects"):
            late()
    shared = SharedState()
    shared.dict("d")
    with pytest.raises(Unsupported, match="hosts no shared objects"):
        app_on(url, shared)
    app_on("memory://", shared)  # others go on
    shared.dict("another")


def test_our_own_server_counts_and_says_501_to_what_is_not_there(
    server: MemcachedServer, stack: ExitStack, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))  # of the key that signs its cookies
    web = stack.enter_context(Server("--store", server.url_of("web"), "--workers", "2"))
    client = stack.enter_context(closing(Client(web.url)))
    path = "/api/v1/counters/c/increment"
    assert [client.request("POST", path)[1]["value"] for _ in range(3)] == [1, 2, 3]
    for request, why in {
        "GET /api/v1/counters": "cannot list",
        "GET /session": "hosts no shared objects",
        "POST /session/inc": "hosts no shared objects",
        "POST /session/reset": "hosts no shared objects",
    }.items():
        status, problem = client.request(*request.split())
        assert (status, problem["title"]) == (501, "Unsupported")
        assert why in problem["detail"]
        assert str(server.socket) not in problem["detail"]
    status, problem = client.request("POST", path, **{"Idempotency-Key": "k"})
    assert (status, problem["outcome"]) == (501, "not_applied")


def test_the_command_line_says_what_is_not_there(server: MemcachedServer) -> None:
    def told(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "counter_server", *arguments, "--store", server.url]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    assert told("increment", "of the command line")[1] == "1\n"
    for command, said in (
        (("list",), "memcached cannot list its counters"),
        (("run", "--durability", "none"), "--durability is for a manager"),
    ):
        status, output, errors = told(*command)
        assert (status, output) == (1, "")
        assert said in errors
