"""A session against stores that lose, refuse and forget: each list of operations counts once, or is known not to."""

import time
from collections.abc import Callable
from math import inf

import pytest

from counter_server import session as session_module
from counter_server.errors import (
    AccessDenied,
    BatchRefused,
    CounterServerError,
    DeadlineExceeded,
    Disconnected,
    OutcomeUnknown,
    StateLost,
)
from counter_server.ledger import CLIENT_LIFETIME, Ledger
from counter_server.operations import Batch, Get, Increment, Operation, Refusal, Replayed, Result, Scan
from counter_server.session import Session
from counter_server.store import Finding, RoundTrip
from tests.processes import PATIENCE
from tests.test_combiner import InterruptedAt

Step = Callable[[Batch], list[Result]]


class Clock:
    """Stands in for `time` in the session: it moves only while that pauses, and by no stall of the machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    return clock


class FakeStore:
    """Answers each call with the next of its steps, and keeps what it was sent."""

    round_trip: RoundTrip = "short"

    def findings(self, _deadline: float) -> list[Finding]:
        return []

    def __init__(self, *steps: Step) -> None:
        self._steps = list(steps)
        self.batches: list[Batch] = []
        self.deadlines: list[float] = []

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        self.batches.append(batch)
        self.deadlines.append(deadline)
        return self._steps.pop(0)(batch)

    def after_fork(self) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """Nothing to let go of."""

    def __str__(self) -> str:
        return "fake://"

    @property
    def numbers(self) -> list[int]:
        return [batch.sequence for batch in self.batches]

    @property
    def clients(self) -> list[int]:
        """The clients, numbered in the order of their first batch."""
        seen: list[bytes] = []
        for batch in self.batches:
            if batch.client not in seen:
                seen.append(batch.client)
        return [seen.index(batch.client) for batch in self.batches]


def answers(*results: Result) -> Step:
    return lambda _batch: list(results)


def fails(error: BaseException) -> Step:
    def fail(_batch: Batch) -> list[Result]:
        raise error

    return fail


def lasts_until(deadline: float, error: BaseException, clock: Clock) -> Step:
    """Fails when the deadline is there, and not at once: what a store does that waits for its server until then."""

    def wait(_batch: Batch) -> list[Result]:
        clock.now = deadline
        raise error

    return wait


SENT = fails(Disconnected("broke after sending", sent=True))
NOT_SENT = fails(Disconnected("nobody there", sent=False))
REFUSED = fails(BatchRefused("batch 1 does not follow"))


def in_time() -> float:
    return time.monotonic() + PATIENCE


def too_late() -> float:
    return time.monotonic() - 1


def write(name: str = "a") -> list[Operation]:
    return [Increment(name)]


def test_batches_are_numbered_from_1_and_have_one_client_of_16_bytes() -> None:
    store = FakeStore(answers(1), answers(2), answers(3))
    session = Session(store, 1000)
    deadline = in_time()
    assert [session.perform(write(), deadline) for _ in range(3)] == [[1], [2], [3]]
    assert store.numbers == [1, 2, 3]
    assert store.clients == [0, 0, 0]
    assert len(store.batches[0].client) == 16
    assert store.deadlines == [deadline] * 3


def test_two_sessions_are_two_clients() -> None:
    store = FakeStore(answers(1), answers(2))
    Session(store, 1000).perform(write(), in_time())
    Session(store, 1000).perform(write(), in_time())
    assert store.clients == [0, 1]


def test_reads_go_without_a_number_and_do_not_use_one_up() -> None:
    store = FakeStore(answers(1), answers(1, 2), answers(2), answers(3, 4))
    session = Session(store, 1000)
    reads: list[Operation] = [Get("a"), Scan()]
    mixed: list[Operation] = [Get("a"), Increment("a")]
    for operations in (write(), reads, write(), mixed):
        session.perform(operations, in_time())
    assert store.numbers == [1, 0, 2, 3]


def test_a_batch_that_broke_after_it_was_sent_is_sent_again_as_it_was() -> None:
    store = FakeStore(SENT, NOT_SENT, SENT, answers(1), answers(2))
    session = Session(store, 1000)
    assert session.perform(write(), in_time()) == [1]
    assert store.batches[1:4] == store.batches[:1] * 3
    assert session.perform(write(), in_time()) == [2]
    assert store.numbers == [1, 1, 1, 1, 2]
    assert store.clients == [0] * 5


@pytest.mark.parametrize(
    ("steps", "operations", "outcome"),
    [
        ([NOT_SENT], [Increment("a")], "not_applied"),
        ([SENT], [Increment("a")], "unknown"),
        ([SENT], [Get("a"), Increment("a")], "unknown"),
        ([NOT_SENT], [Get("a")], "not_applied"),
        ([SENT], [Get("a"), Scan()], "not_applied"),
    ],
    ids=["never-sent", "sent", "sent-with-reads", "reads-never-sent", "reads-sent"],
)
def test_an_exceeded_deadline_says_what_happened(steps: list[Step], operations: list[Operation], outcome: str) -> None:
    store = FakeStore(*steps)
    with pytest.raises(DeadlineExceeded) as caught:
        Session(store, 1000).perform(operations, too_late())
    assert caught.value.outcome == outcome
    assert "fake://" in str(caught.value)


def test_a_batch_sent_once_and_then_not_again_until_its_deadline_is_unknown(clock: Clock) -> None:
    store = FakeStore(SENT, *[NOT_SENT] * 1000)
    with pytest.raises(DeadlineExceeded) as caught:
        Session(store, 1000).perform(write(), 0.05)
    assert caught.value.outcome == "unknown"
    assert len(store.batches) > 1


def test_a_deadline_is_kept_while_the_batch_is_sent_again_and_again(clock: Clock) -> None:
    store = FakeStore(*[NOT_SENT] * 1000)
    with pytest.raises(DeadlineExceeded):
        Session(store, 1000).perform(write(), 1.0)
    assert clock.now == 1.0, "it should neither give up early nor pause beyond the deadline"
    assert len(store.batches) == len(clock.pauses) + 1
    growing = clock.pauses[:6]
    assert 0 < growing[0] <= 0.005
    assert growing == sorted(growing)
    assert growing[-1] > 10 * growing[0]
    assert max(clock.pauses) <= 0.2, "a server that is back should be found soon"


def test_what_is_told_is_not_that_the_last_try_was_cut_short_by_the_deadline(clock: Clock) -> None:
    deadline = 0.01
    cut_short = lasts_until(deadline, Disconnected("the manager did not answer", sent=False), clock)
    session = Session(FakeStore(fails(Disconnected("no room for another", sent=False)), cut_short), 1000)
    with pytest.raises(DeadlineExceeded, match="no room for another"):
        session.perform(write(), deadline)
    clock.now = 0.0
    session = Session(FakeStore(cut_short), 1000)
    with pytest.raises(DeadlineExceeded, match="the manager did not answer"):
        session.perform(write(), deadline)


def test_what_is_told_is_how_the_last_try_ended_where_that_had_its_time(clock: Clock) -> None:
    deadline = 1.0
    waited = lasts_until(deadline, Disconnected("the manager did not answer", sent=True), clock)
    session = Session(FakeStore(fails(Disconnected("the connection broke", sent=True)), waited), 1000)
    with pytest.raises(DeadlineExceeded, match="the manager did not answer"):
        session.perform(write(), deadline)


def test_after_a_batch_that_was_never_sent_its_number_is_used_by_the_next() -> None:
    store = FakeStore(answers(1), NOT_SENT, answers(2))
    session = Session(store, 1000)
    session.perform(write(), in_time())
    with pytest.raises(DeadlineExceeded):
        session.perform(write("never sent"), too_late())
    assert session.perform(write(), in_time()) == [2]
    assert store.numbers == [1, 2, 2]
    assert store.clients == [0, 0, 0]


def test_after_a_batch_of_unknown_outcome_another_list_is_sent_by_a_new_client() -> None:
    """Under the old one's next number the abandoned batch might be applied, or answered in its place."""
    store = FakeStore(answers(1), SENT, answers(2))
    session = Session(store, 1000)
    session.perform(write(), in_time())
    with pytest.raises(DeadlineExceeded):
        session.perform(write("unknown"), too_late())
    assert session.perform(write(), in_time()) == [2]
    assert store.numbers == [1, 2, 1]
    assert store.clients == [0, 0, 1]


def test_after_a_batch_of_unknown_outcome_the_same_list_is_sent_again_under_its_number() -> None:
    store = FakeStore(SENT, answers(1), answers(2))
    session = Session(store, 1000)
    operations = write()
    with pytest.raises(DeadlineExceeded):
        session.perform(operations, too_late())
    assert session.perform(operations, in_time()) == [1]
    assert session.perform(write(), in_time()) == [2]
    assert store.batches[0] == store.batches[1]
    assert store.numbers == [1, 1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("broken")], ids=repr)
def test_an_interrupted_batch_is_sent_again_under_its_number_when_the_same_list_comes(error: BaseException) -> None:
    store = FakeStore(fails(error), answers(1), answers(2))
    session = Session(store, 1000)
    operations = write()
    with pytest.raises(type(error)):
        session.perform(operations, in_time())
    assert session.perform(operations, in_time()) == [1]
    assert session.perform(write(), in_time()) == [2]
    assert store.batches[0] == store.batches[1]
    assert store.numbers == [1, 1, 2]
    assert store.clients == [0, 0, 0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), RuntimeError("broken")], ids=repr)
def test_after_an_interrupted_batch_another_list_is_sent_by_a_new_client(error: BaseException) -> None:
    store = FakeStore(fails(error), answers(1))
    session = Session(store, 1000)
    abandoned = write()
    with pytest.raises(type(error)):
        session.perform(abandoned, in_time())
    same_words_in_another_list = list(abandoned)
    assert session.perform(same_words_in_another_list, in_time()) == [1]
    assert store.numbers == [1, 1]
    assert store.clients == [0, 1]


def test_a_list_that_is_finished_is_answered_again_without_the_store() -> None:
    store = FakeStore(answers(1), answers(2))
    session = Session(store, 1000)
    operations = write()
    assert session.perform(operations, in_time()) == [1]
    assert session.perform(operations, too_late()) == [1]
    assert store.numbers == [1]
    assert session.perform(write(), in_time()) == [2]
    assert store.numbers == [1, 2]


@pytest.mark.parametrize("before", [[], [NOT_SENT]], ids=["at-once", "after-an-attempt-that-never-left"])
def test_a_refusal_after_an_answer_is_proof_of_a_rollback(before: list[Step]) -> None:
    store = FakeStore(answers(1), *before, REFUSED, answers(1))
    session = Session(store, 1000)
    session.perform(write(), in_time())
    with pytest.raises(StateLost) as caught:
        session.perform(write(), in_time())
    assert caught.value.outcome == "not_applied"
    assert session.perform(write(), in_time()) == [1]
    assert store.clients == [0] * (len(before) + 2) + [1]


@pytest.mark.parametrize(
    ("answer", "idle"),
    [(answers(1), CLIENT_LIFETIME), (answers(Refusal("storage_full", "")), 0.0), (answers(Replayed(1)), 0.0)],
    ids=["was-idle-for-long", "had-no-room", "was-given-a-known-number"],
)
def test_a_client_that_the_store_may_have_forgotten_becomes_a_new_one(answer: Step, idle: float, clock: Clock) -> None:
    store = FakeStore(answer, REFUSED, answers(2), answers(3))
    session = Session(store, 1000)
    session.perform(write(), in_time())
    clock.now += idle
    assert session.perform(write("b"), inf) == [2]
    assert session.perform(write(), inf) == [3]
    assert store.numbers == [1, 2, 1, 2]
    assert store.clients == [0, 0, 1, 1]
    assert store.batches[2].operations == store.batches[1].operations


def test_a_refused_batch_counts_as_never_sent_when_it_has_another_number() -> None:
    store = FakeStore(REFUSED, NOT_SENT)
    with pytest.raises(DeadlineExceeded) as caught:
        Session(store, 1000).perform(write(), too_late())
    assert caught.value.outcome == "not_applied"
    store = FakeStore(REFUSED, REFUSED, answers(1))
    assert Session(store, 1000).perform(write(), in_time()) == [1]
    assert store.clients == [0, 1, 2]


def test_a_refusal_of_what_was_sent_before_leaves_the_outcome_unknown_and_is_not_sent_again() -> None:
    store = FakeStore(answers(1), SENT, REFUSED, answers(2))
    session = Session(store, 1000)
    session.perform(write(), in_time())
    with pytest.raises(OutcomeUnknown) as caught:
        session.perform(write(), in_time())
    assert caught.value.outcome == "unknown"
    assert store.numbers == [1, 2, 2]
    assert session.perform(write(), in_time()) == [2]
    assert store.numbers == [1, 2, 2, 1]
    assert store.clients == [0, 0, 0, 1]


def test_a_refusal_of_a_batch_that_was_interrupted_leaves_the_outcome_unknown() -> None:
    store = FakeStore(fails(KeyboardInterrupt()), REFUSED)
    session = Session(store, 1000)
    operations = write()
    with pytest.raises(KeyboardInterrupt):
        session.perform(operations, in_time())
    with pytest.raises(OutcomeUnknown):
        session.perform(operations, in_time())


def test_a_new_client_that_broke_after_sending_has_sent_its_batch() -> None:
    store = FakeStore(REFUSED, SENT, REFUSED)
    with pytest.raises(OutcomeUnknown):
        Session(store, 1000).perform(write(), in_time())
    assert store.clients == [0, 1, 1]


@pytest.mark.parametrize("error", [StateLost, AccessDenied])
@pytest.mark.parametrize(("steps", "outcome"), [([], "not_applied"), ([NOT_SENT], "not_applied"), ([SENT], "unknown")])
def test_a_store_that_cannot_go_on_says_so_and_whether_it_may_have_counted(
    steps: list[Step], outcome: str, error: type[CounterServerError]
) -> None:
    store = FakeStore(*steps, fails(error("begun anew")), answers(1))
    session = Session(store, 1000)
    with pytest.raises(error) as caught:
        session.perform(write(), in_time())
    assert caught.value.outcome == outcome
    assert error.outcome == "not_applied"
    assert session.perform(write(), in_time()) == [1]
    assert store.numbers[-1] == 1
    assert store.clients[-1] == 1


def test_reads_that_meet_a_store_without_its_memory_were_never_counted() -> None:
    store = FakeStore(SENT, fails(StateLost("begun anew")))
    with pytest.raises(StateLost) as caught:
        Session(store, 1000).perform([Get("a")], in_time())
    assert caught.value.outcome == "not_applied"


def test_a_renewed_session_is_another_client_and_begins_with_1() -> None:
    store = FakeStore(answers(1), answers(2))
    session = Session(store, 1000)
    session.perform(write(), in_time())
    session.begin_again()
    session.perform(write(), in_time())
    assert store.numbers == [1, 1]
    assert store.clients == [0, 1]


class RememberingStore(FakeStore):
    """A store that keeps its promise, and loses some answers on the way."""

    round_trip: RoundTrip = "short"

    def findings(self, _deadline: float) -> list[Finding]:
        return []

    def __init__(self, lost: set[int]) -> None:
        super().__init__()
        self._ledger = Ledger()
        self._lost = lost

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        self.batches.append(batch)
        self.deadlines.append(deadline)
        if len(self.batches) in self._lost:
            raise Disconnected("lost on the way there", sent=True)
        answer = self._ledger.apply(batch) if batch.sequence == 0 else self._ledger.perform([batch])[0]
        if len(self.batches) + 100 in self._lost:
            raise Disconnected("lost on the way back", sent=True)
        if isinstance(answer, BatchRefused):
            raise answer
        return answer


def test_whatever_answers_are_lost_each_list_counts_once() -> None:
    for lost in ({1}, {101}, {2}, {102}, {1, 102}, {101, 102}, {1, 2, 103}, {101, 2, 103, 104}):
        session = Session(RememberingStore(lost), 1000)
        assert [session.perform(write(), in_time()) for _ in range(4)] == [[1], [2], [3], [4]], lost


@pytest.mark.traces_opcodes
def test_an_interrupt_at_any_moment_counts_nothing_twice_and_gives_nobody_another_ones_answer() -> None:
    """For each moment at which a signal's handler could run in the session, interrupt it there, and go on."""
    for lost in (set[int](), {2}, {102}):
        moment = 0
        for moment in range(1, 1000):
            session = Session(RememberingStore(lost), 1000)
            assert session.perform(write(), in_time()) == [1]
            operations = write()
            interrupt = InterruptedAt(session_module, moment)
            try:
                with interrupt:
                    session.perform(operations, in_time())
            except KeyboardInterrupt:
                pass
            # As the combiner does: another thread of the call goes on with the same list.
            assert session.perform(operations, in_time()) == [2], interrupt.place
            assert session.perform(write(), in_time()) == [3], interrupt.place
            if interrupt.place is None:
                break
        assert 5 < moment < 999


@pytest.mark.traces_opcodes
def test_an_interrupt_at_any_moment_and_then_another_list_counts_nothing_twice() -> None:
    moment = 0
    for moment in range(1, 1000):
        session = Session(RememberingStore(set()), 1000)
        interrupt = InterruptedAt(session_module, moment)
        try:
            with interrupt:
                session.perform(write("given up"), in_time())
        except KeyboardInterrupt:
            pass
        assert session.perform(write(), in_time()) == [1], interrupt.place
        assert session.perform([Increment("a"), Get("given up")], in_time()) in ([2, 1], [2, None]), interrupt.place
        if interrupt.place is None:
            break
    assert 5 < moment < 999
