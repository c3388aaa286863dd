"""The contract of a store, as tests that a subclass inherits; `memory://` is the reference."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from .. import operations as ops
from ..errors import BatchRefused
from ..history import Operation, assert_exactly_once
from ..operations import (
    LARGEST,
    LARGEST_BATCH,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Keep,
    Page,
    Refusal,
    Replayed,
    Scan,
)
from ..operations import Set as SetTo
from ..state import State
from ..store import Finding, ShowsContents, Store
from ..stores.memory import MemoryStore

PATIENCE = 30.0  # seconds allowed for one call on a busy machine
NAMES = [
    *("a", "a ", "A", "á", "b", "Zähler", "счётчик", "計數器", "عدّاد", "🔢", "two words", "a/b", "{x}:y", "%00"),
    *("\U0010ffff", "ﬀ", "x" * 200),
]
_EDGES = [1, -1, 2, 100, LARGEST, SMALLEST, LARGEST - 1, 2**53, 2**53 + 1, -(2**53) - 1]
_rounds = count(1)


def apply(store: Store, *operations: ops.Operation) -> list[ops.Result]:
    """Return the results of one batch of a new client."""
    return store.apply(Batch(os.urandom(16), 1, list(operations)), time.monotonic() + PATIENCE)


def _answer(store: Store, batch: Batch) -> list[ops.Result] | None:
    """Return a batch's results, or None if it is refused."""
    try:
        return store.apply(batch, time.monotonic() + PATIENCE)
    except BatchRefused:
        return None


class RandomBatches:
    """Random operations on a few names and keys below a prefix; `seed` repeats them."""

    def __init__(self, seed: int, prefix: str) -> None:
        self.chance = random.Random(seed)
        self.prefix = prefix

    def name(self) -> str:
        return self.prefix + self.chance.choice(NAMES)

    def number(self) -> int:
        if self.chance.random() < 0.5:
            return self.chance.choice(_EDGES)
        return self.chance.choice([self.chance.randint(SMALLEST, LARGEST), self.chance.randint(-20, 20)])

    def key(self) -> str:
        return self.prefix + self.chance.choice("123")

    def keep(self) -> Keep:
        """Return a request to remember a key that may be used already, perhaps for the same request and number."""
        step = Increment(self.name(), self.chance.choice([1, 2]))
        return Keep(self.key(), step.fingerprint(), self.chance.choice([1, self.number()]), self.chance.random() < 0.3)

    def increment(self) -> Increment:
        minimum, maximum = (self.chance.choice([None, self.number()]) for _ in range(2))
        if minimum is not None and maximum is not None:
            minimum, maximum = min(minimum, maximum), max(minimum, maximum)
        key = self.chance.choice([None, self.key()])
        return Increment(self.name(), self.number() or 1, minimum, maximum, key)

    def write(self) -> ops.Operation:
        match self.chance.randrange(7):
            case 0:
                return Increment(self.name())
            case 1 | 2:
                return self.increment()
            case 3:
                return SetTo(self.name(), self.number())
            case 4:
                return Delete(self.name())
            case 5:
                return self.keep()
            case _:
                return Get(self.name())

    def read(self) -> ops.Operation:
        if self.chance.random() < 0.5:
            return Get(self.name())
        return Scan(self.chance.choice([self.prefix, self.name()]), self.chance.randint(1, 20))


class StoreContract:
    """Subclass this in a test file, and override the fixture `store`. Each method is a test."""

    @pytest.fixture
    def store(self) -> Store:
        """Return the store, and close it after the test. It may hold counters of other tests."""
        raise NotImplementedError("override the fixture `store`")

    @pytest.fixture
    def stores(self, store: Store) -> list[Store]:
        """Return several stores on the same data, as several processes have them; by default only `store`."""
        return [store]

    @pytest.fixture
    def rounds(self) -> int:
        """Return the number of random batches."""
        return 300

    @pytest.fixture
    def name(self) -> str:
        """Return a name for this test alone; all later names in the order are of the same test."""
        return f"~{time.time_ns():020d}{next(_rounds):06d}"

    def test_random_batches_have_the_results_of_the_reference(self, store: Store, name: str, rounds: int) -> None:
        """Three clients count, resend, number their batches out of turn, and are replaced."""
        seed = random.randrange(2**32)
        print(f"seed {seed}")
        draw, reference = RandomBatches(seed, name), MemoryStore()
        sent: dict[int, Batch] = {}
        for _ in range(rounds):
            number, step = draw.chance.randrange(3), draw.chance.choice([1] * 8 + [0, 0, 0, -2, -1, 2, 1000])
            batch = sent.get(number)
            client, last = (batch.client, batch.sequence) if batch else (os.urandom(16), 0)
            sequence = max(last + step, 1)
            if batch is None or sequence != last:  # otherwise, resend the same batch
                batch = Batch(client, sequence, [draw.write() for _ in range(draw.chance.randint(1, 8))])
            found, expected = _answer(store, batch), _answer(reference, batch)
            assert found == expected, (seed, batch)
            if expected is not None:
                sent[number] = batch
            reads = Batch(os.urandom(16), 0, [draw.read() for _ in range(3)])
            assert _answer(store, reads) == _answer(reference, reads), (seed, reads)
            if draw.chance.random() < 0.05:
                sent.pop(number, None)

    def test_a_batch_sent_again_has_its_results_again(self, store: Store, name: str) -> None:
        batch = Batch(os.urandom(16), 1, [Increment(name), Increment(name, 5)])
        assert [_answer(store, batch) for _ in range(2)] == [[1, 6]] * 2
        store.close()  # the next call opens it again
        assert _answer(store, batch) == [1, 6]
        assert apply(store, Get(name)) == [6]

    def test_a_batch_out_of_turn_is_refused(self, store: Store, name: str) -> None:
        client = os.urandom(16)
        answers = [_answer(store, Batch(client, sequence, [Increment(name)])) for sequence in (2, 1, 3, 2, 1)]
        assert answers == [None, [1], None, [2], None]

    def test_a_number_has_exactly_64_bits(self, store: Store, name: str) -> None:
        up, refused, down = SetTo(name, LARGEST), Increment(name), Increment(name, -1)
        *results, refusal = apply(store, up, Get(name), down, Increment(name), refused)
        assert results == [LARGEST, LARGEST, LARGEST - 1, LARGEST]
        assert isinstance(refusal, Refusal)
        assert refusal.code == "limit"
        low = apply(store, SetTo(name, SMALLEST), Increment(name, LARGEST), Increment(name, 2**53 + 1))
        assert low == [SMALLEST, -1, 2**53]
        for edge in (2**53, -(2**53)):  # where a float has no number of its own for each
            taken = apply(store, SetTo(name, edge - 10), *[Increment(name)] * 20)
            assert taken == list(range(edge - 10, edge + 11))

    def test_a_key_remembers_its_number_and_its_request(self, store: Store, name: str) -> None:
        assert apply(store, Increment(name, key=f"{name}-k")) == [1]
        assert apply(store, Increment(name, key=f"{name}-k"), Increment(name)) == [Replayed(1), 2]
        reused, crossed = apply(store, Increment(name, 2, key=f"{name}-k"), Increment(name, 1, None, 2, f"{name}-new"))
        assert isinstance(reused, Refusal)
        assert reused.code == "key_reused"
        assert isinstance(crossed, Refusal)
        assert apply(store, Increment(name, 7, key=f"{name}-new")) == [9]  # a refusal leaves its key unused

    def test_a_key_that_is_kept_answers_for_its_request(self, store: Store, name: str) -> None:
        """As after a move from another store: the number comes from the key, and nothing is counted."""
        used, key = Increment(name, 5, key=f"{name}-k"), f"{name}-k"
        assert apply(store, Keep(key, used.fingerprint(), 12)) == [12]
        assert apply(store, used, Get(name)) == [Replayed(12), None]
        other = Increment(name, 6, key=key)
        for operation in (other, Keep(key, other.fingerprint(), 12), Keep(key, used.fingerprint(), 13)):
            (refusal,) = apply(store, operation)
            assert isinstance(refusal, Refusal)
            assert refusal.code == "key_reused"
        assert apply(store, Keep(key, used.fingerprint(), 12), used) == [12, Replayed(12)]
        for edge in (SMALLEST, LARGEST, 2**53 + 1):
            assert apply(store, Keep(key, other.fingerprint(), edge, overwrite=True), other) == [edge, Replayed(edge)]

    def test_its_contents_are_all_counters_and_keys(self, store: Store, name: str) -> None:
        if not isinstance(store, ShowsContents):
            pytest.skip(f"{store} does not show its contents")
        names = [name + each for each in NAMES]
        used = [Increment(each, 2**53 + 1, key=f"{name}{number}-k") for number, each in enumerate(names)]
        apply(store, *used, Delete(names[0]), SetTo(names[1], SMALLEST), SetTo(names[2], LARGEST))
        found = store.contents(time.monotonic() + PATIENCE)
        assert found is not None
        expected = {**dict.fromkeys(names[3:], 2**53 + 1), names[1]: SMALLEST, names[2]: LARGEST}
        assert {each: value for each, value in found.counters.items() if each.startswith(name)} == expected
        keys = {key: record[:2] for key, record in found.keys.items() if key.startswith(name)}
        assert keys == {each.key: (each.fingerprint(), 2**53 + 1) for each in used}
        assert "" not in found.counters
        assert "" not in found.keys

    def test_the_largest_batch_of_the_longest_names_is_applied(self, store: Store, name: str) -> None:
        names = [f"{name}{n:04d}".ljust(255, "x") for n in range(LARGEST_BATCH)]
        assert apply(store, *(Increment(n, key=n) for n in names)) == [1] * LARGEST_BATCH
        assert apply(store, Scan(name, LARGEST_BATCH)) == [Page([(n, 1) for n in names], more=False)]

    def test_names_are_paged_in_the_order_of_code_points(self, store: Store, name: str) -> None:
        names = sorted(name + n for n in NAMES)
        apply(store, *map(Increment, names))
        for limit in (1, 3, len(names), 100):
            for start in range(len(names) + 1):
                (page,) = apply(store, Scan(names[start - 1] if start else name, limit))
                expected = [(n, 1) for n in names[start : start + limit]]
                assert page == Page(expected, more=start + limit < len(names))

    def test_many_threads_of_each_store_count_exactly_once(self, stores: list[Store], name: str) -> None:
        states = [State(store, deadline=PATIENCE) for store in stores]
        barrier = threading.Barrier(8 * len(states))

        def count_up(thread: int) -> list[Operation]:
            counter = states[thread % len(states)].counter(name)
            barrier.wait(PATIENCE)
            history = []
            for turn in range(20):
                began = time.monotonic()
                value = counter.increment()
                history.append(Operation(f"{thread}-{turn}", began, time.monotonic(), (value,)))
            return history

        with ThreadPoolExecutor(barrier.parties) as threads:
            histories = list(threads.map(count_up, range(barrier.parties)))
        assert states[0].counter(name).value == 20 * barrier.parties
        assert_exactly_once([operation for each in histories for operation in each], 20 * barrier.parties)

    def test_what_it_says_of_itself(self, store: Store) -> None:
        assert str(store)
        assert store.round_trip in ("none", "short", "long")
        assert all(isinstance(finding, Finding) for finding in store.findings(time.monotonic() + PATIENCE))
