"""The contract of a store, the same for all of them; `memory://` is the reference."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from counter_server import StoreOptions, open_state
from counter_server.errors import BatchRefused, Disconnected, InvalidRequest
from counter_server.operations import (
    LARGEST,
    LARGEST_BATCH,
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
from counter_server.stores import Store, open_store
from counter_server.stores.memory import MemoryStore
from tests.engines import MariaDbServer, PostgresServer, RedisServer
from tests.load import at_once
from tests.processes import PATIENCE, Manager

STORES = ["memory", "manager", "redis", "sqlite", "postgresql", "mariadb"]
_rounds = count(1)


@pytest.fixture(scope="module")
def url_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The URL of a store of some kind, whose server is started when it is first asked for."""
    urls = {"memory": "memory://"}
    with ExitStack() as stack:

        def url(kind: str) -> str:
            if kind not in urls:
                directory = tmp_path_factory.mktemp(kind)
                if kind == "sqlite":
                    urls[kind] = f"sqlite:///{directory}/counters.db"
                    return urls[kind]
                server: Manager | RedisServer | PostgresServer | MariaDbServer
                match kind:
                    case "manager":
                        server = Manager(directory / "data")
                    case "redis":
                        server = RedisServer(directory)
                    case "postgresql":
                        server = PostgresServer()
                    case _:
                        server = MariaDbServer()
                stack.enter_context(server)
                urls[kind] = server.url
            return urls[kind]

        yield url


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest, url_of: Callable[[str], str]) -> str:
    return url_of(request.param)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = open_store(store_url)
    yield store
    store.close()


def apply(store: Store, batch: Batch) -> list[Result] | None:
    """A batch's results; None for a refused one."""
    try:
        return store.apply(batch, time.monotonic() + PATIENCE)
    except BatchRefused:
        return None


@dataclass
class Client:
    """One client by the rules, or against them."""

    store: Store
    identity: bytes = field(default_factory=lambda: os.urandom(16))
    sequence: int = 0

    def apply(self, *operations: Operation) -> list[Result]:
        self.sequence += 1
        results = apply(self.store, Batch(self.identity, self.sequence, list(operations)))
        assert results is not None
        return results


@pytest.fixture
def client(store: Store) -> Client:
    return Client(store)


@pytest.fixture
def name() -> str:
    """Return a name for this test alone; later names in the order were made by the same test."""
    return f"~{next(_rounds):09d}"


# Against the reference

NAMES = [
    "a",
    "a ",
    "A",
    "á",
    "b",
    "Zähler",
    "счётчик",
    "計數器",
    "عدّاد",
    "🔢",
    "two words",
    "a/b",
    "{x}:y",
    "%00",
    "\U0010ffff",
    "ﬀ",
    "x" * 200,
]
numbers = st.sampled_from(
    [1, -1, 2, 100, LARGEST, SMALLEST, LARGEST - 1, 2**53, 2**53 + 1, -(2**53) - 1]
) | st.integers(SMALLEST, LARGEST)


@st.composite
def increments(draw: st.DrawFn, prefix: str) -> Increment:
    by = draw(numbers.filter(bool))
    minimum, maximum = draw(st.none() | numbers), draw(st.none() | numbers)
    if minimum is not None and maximum is not None:
        minimum, maximum = min(minimum, maximum), max(minimum, maximum)
    key = draw(st.none() | st.sampled_from(["k1", "k2", "k3"]))
    return Increment(
        prefix + draw(st.sampled_from(NAMES)), by, minimum, maximum, None if key is None else f"{prefix}{key}"
    )


def operations(prefix: str) -> st.SearchStrategy[Operation]:
    names = st.sampled_from(NAMES).map(lambda name: prefix + name)
    return st.one_of(
        st.builds(Increment, names),
        increments(prefix),
        st.builds(Set, names, numbers),
        st.builds(Delete, names),
        st.builds(Get, names),
    )


class Beside(RuleBasedStateMachine):
    """The same batches for the store and for the reference: three clients, which also break the rules."""

    store: Store

    @initialize()
    def begin(self) -> None:
        self.prefix = f"~{next(_rounds):09d}"
        self.reference = MemoryStore()
        self.clients = [os.urandom(16) for _ in range(3)]
        self.sent: dict[int, Batch] = {}

    def both(self, batch: Batch) -> None:
        expected = apply(self.reference, batch)
        assert apply(self.store, batch) == expected

    def batch(self, data: st.DataObject, number: int, sequence: int) -> Batch:
        drawn = data.draw(st.lists(operations(self.prefix), min_size=1, max_size=8))
        return Batch(self.clients[number], sequence, drawn)

    @rule(data=st.data(), number=st.integers(0, 2))
    def next(self, data: st.DataObject, number: int) -> None:
        last = self.sent[number].sequence if number in self.sent else 0
        self.sent[number] = self.batch(data, number, last + 1)
        self.both(self.sent[number])

    @rule(number=st.integers(0, 2))
    def again(self, number: int) -> None:
        if number in self.sent:
            self.both(self.sent[number])

    @rule(data=st.data(), number=st.integers(0, 2), distance=st.sampled_from([-2, -1, 2, 3, 1000]))
    def out_of_turn(self, data: st.DataObject, number: int, distance: int) -> None:
        last = self.sent[number].sequence if number in self.sent else 0
        if last + distance > 0:
            self.both(self.batch(data, number, last + distance))

    @rule(data=st.data(), sequence=st.sampled_from([2, 3, LARGEST]))
    def of_a_stranger(self, data: st.DataObject, sequence: int) -> None:
        batch = self.batch(data, 0, sequence)
        self.both(Batch(os.urandom(16), sequence, batch.operations))

    @rule(number=st.integers(0, 2))
    def as_a_new_client(self, number: int) -> None:
        self.clients[number] = os.urandom(16)
        self.sent.pop(number, None)

    @rule(data=st.data())
    def only_reads(self, data: st.DataObject) -> None:
        names = st.sampled_from(NAMES).map(lambda name: self.prefix + name)
        reads: st.SearchStrategy[list[Operation]] = st.lists(
            st.builds(Get, names) | st.builds(Scan, names | st.just(self.prefix), st.integers(1, 20)),
            min_size=1,
            max_size=8,
        )
        self.both(Batch(os.urandom(16), 0, data.draw(reads)))


def test_random_batches_are_answered_as_the_reference_answers_them(store: Store) -> None:
    class OfThisStore(Beside):
        pass

    OfThisStore.store = store
    run_state_machine_as_test(
        OfThisStore,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


# One by one


def test_a_batch_sent_again_is_answered_again_and_not_executed_again(store: Store, name: str) -> None:
    batch = Batch(os.urandom(16), 1, [Increment(name), Increment(name, 5)])
    assert apply(store, batch) == [1, 6]
    assert apply(store, batch) == [1, 6]
    assert apply(store, Batch(os.urandom(16), 0, [Get(name)])) == [6]


def test_the_number_may_be_any_of_64_bits_and_no_other(client: Client, name: str) -> None:
    assert client.apply(Set(name, LARGEST), Get(name), Increment(name, -1), Increment(name)) == [
        *(LARGEST, LARGEST, LARGEST - 1, LARGEST)
    ]
    (refused,) = client.apply(Increment(name))
    assert isinstance(refused, Refusal)
    assert refused.code == "limit"
    assert client.apply(Set(name, SMALLEST), Increment(name, LARGEST), Increment(name, 2**53 + 1)) == [
        *(SMALLEST, -1, 2**53)
    ]


def test_every_number_around_the_53_bits_of_a_float_is_its_own(client: Client, name: str) -> None:
    for edge in (2**53, -(2**53)):
        client.apply(Set(name, edge - 10))
        assert client.apply(*(Increment(name) for _ in range(20))) == list(range(edge - 9, edge + 11))


def test_a_key_is_remembered_with_its_number_and_its_request(store: Store, name: str) -> None:
    first, second = Client(store), Client(store)
    assert first.apply(Increment(name, key=f"{name}-k")) == [1]
    assert second.apply(Increment(name, key=f"{name}-k"), Increment(name)) == [Replayed(1), 2]
    (reused,) = second.apply(Increment(name, 2, key=f"{name}-k"))
    assert isinstance(reused, Refusal)
    assert reused.code == "key_reused"
    (crossed,) = first.apply(Increment(name, maximum=2, key=f"{name}-unused"))
    assert isinstance(crossed, Refusal)
    assert first.apply(Increment(name, 7, key=f"{name}-unused")) == [9]


def test_the_largest_batch_of_the_longest_names_and_keys_is_applied(client: Client, name: str) -> None:
    names = [f"{name}{n:0244d}" for n in range(LARGEST_BATCH)]
    assert client.apply(*(Increment(n, key=n) for n in names)) == [1] * LARGEST_BATCH
    assert client.apply(Scan(name, LARGEST_BATCH)) == [Page([(n, 1) for n in names], more=False)]


def test_names_are_paged_in_one_order_everywhere(client: Client, name: str) -> None:
    names = sorted(name + n for n in NAMES)
    client.apply(*(Increment(n) for n in names))
    state_of_reference = MemoryStore()
    apply(state_of_reference, Batch(os.urandom(16), 1, [Increment(n) for n in names]))
    for limit in (1, 3, len(names), 100):
        for after in (name, *names):
            asked = Batch(os.urandom(16), 0, [Scan(after, limit)])
            assert apply(client.store, asked) == apply(state_of_reference, asked)


def test_32_threads_of_a_state_share_calls_and_none_sees_the_number_of_another(store_url: str, name: str) -> None:
    with open_state(store_url, deadline=PATIENCE) as state:
        counter = state.counter(name)
        values = at_once(32, lambda: [counter.increment() for _ in range(10)])
        assert sorted(value for ten in values for value in ten) == list(range(1, 321))


def test_a_store_that_is_not_there_is_told_to_be_so_within_the_deadline(tmp_path: Path) -> None:
    urls = (f"unix://{tmp_path}/nothing", f"manager://{tmp_path}/nothing", f"postgresql:///db?host={tmp_path}/nothing")
    for url in urls:
        store = open_store(url, StoreOptions(start=False))
        with pytest.raises(Disconnected) as error:
            store.apply(Batch(os.urandom(16), 1, [Increment("x")]), time.monotonic() + 0.2)
        assert not error.value.sent


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:port",
        "redis://localhost/?prefix=",
        "redis://localhost/?prefix={x}",
        "redis://h/?no_such=1",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file::memory:?uri=true",
        "sqlite:///x.db?mode=ro",
        "sqlite://host/x.db",
        "postgresql",
        "postgresql://host:port/db",
        "postgresql://h/db?no_such=1",
        "mysql://host:port/db",
        "mariadb://h/db?no_such=1",
    ],
)
def test_a_url_that_cannot_be_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidRequest):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@example.org:1234/5?prefix=shop", "redis://example.org:1234/5?prefix=shop"),
        ("postgresql://user:secret@example.org:1234/shop", "postgresql://example.org:1234/shop"),
        ("postgresql:///shop?host=/run/x&user=user&password=secret", "postgresql:///shop?host=/run/x"),
        ("mysql://user:secret@example.org/shop?charset=utf8mb4", "mysql://example.org/shop"),
        ("sqlite:////data/shop.db", "sqlite:////data/shop.db"),
    ],
)
def test_a_password_in_a_url_is_shown_to_nobody(url: str, shown: str) -> None:
    assert unquote(str(open_store(url))) == shown
