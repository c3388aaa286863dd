"""A session against stores that lose, refuse and forget: each list of operations counts once, or is known not to."""

import threading
from collections.abc import Callable
from math import inf
from typing import cast

import pytest

from counter_server import session as session_module
from counter_server.errors import (
    AccessDenied,
    BatchRefused,
    CounterServerError,
    DeadlineExceeded,
    Disconnected,
    StateLost,
)
from counter_server.ledger import CLIENT_LIFETIME
from counter_server.operations import Batch, Get, Increment, Operation, Refusal, Replayed, Result, Scan
from counter_server.session import Session
from counter_server.store import RoundTrip
from counter_server.stores.memory import MemoryStore
from tests.processes import PATIENCE, eventually
from tests.test_combiner import InterruptedAt

Step = Result | list[Result] | BaseException | Callable[[], Result | BaseException]

START = 1000.0


class Clock:
    """Stands in for `time` in the session: it moves only while that pauses, and by no stall of the machine."""

    def __init__(self) -> None:
        self.now = START
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    return clock


class FakeStore(MemoryStore):
    """Answers each call with the next of its steps, a result or an error, and keeps what it was sent."""

    forks = 0

    def __init__(self, *steps: Step, round_trip: RoundTrip = "short") -> None:
        super().__init__()
        self.round_trip: RoundTrip = round_trip
        self.steps = list(steps)
        self.sent: list[Batch] = []
        self.deadlines: list[float] = []
        self.forks = 0

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:
        self.sent.append(batch)
        self.deadlines.append(deadline)
        step = self.steps.pop(0)
        if callable(step):
            step = step()
        if isinstance(step, BaseException):
            raise step
        return step if isinstance(step, list) else [step]

    def after_fork(self) -> None:
        self.forks += 1
        super().after_fork()

    @property
    def clients(self) -> list[int]:
        """The clients, numbered in the order of their first batch."""
        seen = list(dict.fromkeys(batch.client for batch in self.sent))
        return [seen.index(batch.client) for batch in self.sent]


SENT = Disconnected("broke after sending", sent=True)
NOT_SENT = Disconnected("nobody there", sent=False)
REFUSED = BatchRefused("batch 1 does not follow")
STOPPED = KeyboardInterrupt()
BROKEN = RuntimeError("broken")
LATE = DeadlineExceeded.__name__

DEADLINE = START + 30.0
HALF = CLIENT_LIFETIME / 2


def write() -> list[Operation]:
    return [Increment("a")]


def play(session: Session, calls: str, clock: Clock) -> list[object]:
    """Make calls, and return their results, or errors with outcomes.

    Each letter is a list of operations: "r" and "s" read, "m" reads and writes, others write. A capital letter is the
    same list with a deadline that has passed. "f" is a fork. "." is half the life of a client, "," a little less.
    """
    lists: dict[str, list[Operation]] = {"r": [Get("a"), Scan()], "s": [Get("a")], "m": [Get("a"), Increment("a")]}
    told: list[object] = []
    for call in calls:
        if call in ".,":
            clock.now += HALF if call == "." else HALF - 1
        elif call == "f":
            session.begin_again()
        else:
            operations = lists.setdefault(call.lower(), write())
            try:
                told += session.perform(operations, clock.now + (30 if call.islower() else -1))
            except CounterServerError as error:
                told.append((type(error).__name__, error.outcome))
            except (KeyboardInterrupt, RuntimeError) as error:
                told.append(error)
    return told


NO_ROOM, REPLAYED = Refusal("storage_full", ""), Replayed(1)
UNKNOWN, NOT_APPLIED = (LATE, "unknown"), (LATE, "not_applied")
LOST, FORGOTTEN = ("StateLost", "not_applied"), ("OutcomeUnknown", "unknown")


@pytest.mark.parametrize(
    ("steps", "calls", "told", "sequences", "clients"),
    [
        pytest.param([1, 2, 3], "abc", [1, 2, 3], "123", "000", id="numbered from 1"),
        pytest.param([1, 1, 1, 2, 3], "arsbm", [1, 1, 1, 2, 3], "10023", "00000", id="reads have no number"),
        pytest.param([SENT, NOT_SENT, SENT, 1, 2], "ab", [1, 2], "11112", "00000", id="sent again"),
        pytest.param([NOT_SENT], "A", [NOT_APPLIED], "1", "0", id="late before it was sent"),
        pytest.param([SENT], "A", [UNKNOWN], "1", "0", id="late after it was sent"),
        pytest.param([SENT], "M", [UNKNOWN], "1", "0", id="late reads with a write"),
        pytest.param([NOT_SENT], "R", [NOT_APPLIED], "0", "0", id="late reads, not sent"),
        pytest.param([SENT], "R", [NOT_APPLIED], "0", "0", id="late reads, sent"),
        pytest.param([1, NOT_SENT, 2], "aBc", [1, NOT_APPLIED, 2], "122", "000", id="a number not sent is used again"),
        pytest.param([1, SENT, 2], "aBc", [1, UNKNOWN, 2], "121", "001", id="unknown, then another list"),
        pytest.param([SENT, 1, 2], "Aab", [UNKNOWN, 1, 2], "112", "000", id="unknown, then the same list"),
        pytest.param([STOPPED, 1, 2], "aab", [STOPPED, 1, 2], "112", "000", id="interrupted, then the same list"),
        pytest.param([BROKEN, 1, 2], "aab", [BROKEN, 1, 2], "112", "000", id="broken, then the same list"),
        pytest.param([STOPPED, 1], "ab", [STOPPED, 1], "11", "01", id="interrupted, then another list"),
        pytest.param([1, 2], "aAb", [1, 1, 2], "12", "00", id="answered again without the store"),
        pytest.param([1, REFUSED, 2, 3], "a.bc", [1, 2, 3], "1212", "0011", id="forgotten after a while"),
        pytest.param([1, 2, REFUSED], "a,b,c", [1, 2, LOST], "123", "000", id="used, so remembered for longer"),
        pytest.param([NO_ROOM, REFUSED, 2], "ab", [NO_ROOM, 2], "121", "001", id="not remembered on a full disk"),
        pytest.param([REPLAYED, REFUSED, 2], "ab", [REPLAYED, 2], "121", "001", id="not remembered for a known key"),
        pytest.param([1, 1, REFUSED], "a,sb", [1, 1, LOST], "102", "000", id="not remembered for a read"),
        pytest.param([REFUSED, NOT_SENT], "A", [NOT_APPLIED], "11", "01", id="refused is not sent"),
        pytest.param([REFUSED, REFUSED, 1], "a", [1], "111", "012", id="refused twice"),
        pytest.param([1, SENT, REFUSED, 2], "abc", [1, FORGOTTEN, 2], "1221", "0001", id="refused after it was sent"),
        pytest.param([REFUSED, SENT, 2], "Ab", [UNKNOWN, 2], "111", "012", id="refused, sent, then another list"),
        pytest.param([STOPPED, REFUSED], "aa", [STOPPED, FORGOTTEN], "11", "00", id="refused after an interrupt"),
        pytest.param([REFUSED, SENT, REFUSED], "a", [FORGOTTEN], "111", "011", id="a new client that may have sent it"),
        pytest.param([1, 2], "afb", [1, 2], "11", "01", id="a fork"),
    ],
)
def test_each_list_counts_once_or_is_known_not_to(
    steps: list[Step], calls: str, told: list[object], sequences: str, clients: str, clock: Clock
) -> None:
    store = FakeStore(*steps)
    assert play(Session(store, 1000), calls, clock) == told
    assert "".join(str(batch.sequence) for batch in store.sent) == sequences
    assert "".join(map(str, store.clients)) == clients
    assert store.steps == []
    assert store.forks == calls.count("f")
    assert {len(batch.client) for batch in store.sent} == {16}
    for batch, following in zip(store.sent, store.sent[1:], strict=False):
        if (batch.client, batch.sequence) == (following.client, following.sequence) and batch.sequence:
            assert following == batch or NOT_SENT in steps


@pytest.mark.parametrize("before", [[], [NOT_SENT]])
def test_a_refusal_after_an_answer_is_proof_of_a_rollback(before: list[Step], clock: Clock) -> None:
    store = FakeStore(1, *before, REFUSED, 1)
    assert play(Session(store, 1000), "a,bc", clock) == [1, LOST, 1]
    assert store.clients == [0] * (len(before) + 2) + [1]


@pytest.mark.parametrize("error", [StateLost, AccessDenied])
@pytest.mark.parametrize(
    ("calls", "steps", "outcome"),
    [
        ("ab", [], "not_applied"),
        ("ab", [NOT_SENT], "not_applied"),
        ("ab", [SENT], "unknown"),
        ("sb", [SENT], "not_applied"),
        ("aa", [SENT], "unknown"),
    ],
)
def test_a_definite_error_reports_whether_the_batch_may_have_counted(
    calls: str, steps: list[Step], outcome: str, error: type[CounterServerError], clock: Clock
) -> None:
    store = FakeStore(*steps, error("begun anew"), 1)
    assert play(Session(store, 1000), calls, clock) == [(error.__name__, outcome), 1]
    assert error.outcome == "not_applied"
    assert (store.sent[-1].sequence, store.clients[-1]) == (1, 1)


@pytest.mark.parametrize("first", [SENT, NOT_SENT])
def test_a_batch_is_resent_until_its_deadline(first: Disconnected, clock: Clock) -> None:
    store = FakeStore(first, *[NOT_SENT] * 1000)
    with pytest.raises(DeadlineExceeded, match=r"memory://.*nobody there") as caught:
        Session(store, 1000).perform(write(), START + 1)
    assert caught.value.outcome == ("unknown" if first is SENT else "not_applied")
    assert clock.now == START + 1, "it should neither give up early nor pause beyond the deadline"
    assert set(store.deadlines) == {START + 1}
    assert len(store.sent) == len(clock.pauses) + 1
    for number, pause in enumerate(clock.pauses[:-1]):
        longest = min(0.005 * 2**number, 0.2)  # a server that is back should be found soon
        assert longest / 2 <= pause <= longest


@pytest.mark.parametrize(
    ("first", "deadline", "is_vague", "reason"),
    [
        (["no room"], 0.01, False, "no room"),
        ([], 0.01, False, "no answer"),
        (["no room"], 1.0, False, "no answer"),
        (["no room"], 1.0, True, "no room"),
        ([], 1.0, True, "no answer"),
    ],
)
def test_an_attempt_cut_short_by_the_deadline_is_not_the_reason(
    first: list[str],
    deadline: float,
    is_vague: bool,  # noqa: FBT001 - a parameter
    reason: str,
    clock: Clock,
) -> None:
    def wait() -> Disconnected:
        clock.now = START + deadline
        return Disconnected("no answer", sent=False, is_vague=is_vague)

    store = FakeStore(*[Disconnected(reason, sent=False) for reason in first], wait)
    with pytest.raises(DeadlineExceeded, match=reason):
        Session(store, 1000).perform(write(), START + deadline)


def test_an_operation_is_shared_if_the_store_is_not_in_this_process() -> None:
    for round_trip, is_shared, together in (("none", False, False), ("short", True, False), ("long", True, True)):
        store = FakeStore(5, Refusal("limit", "no"), BROKEN, 6, round_trip=cast(RoundTrip, round_trip))
        session = Session(store, 3)
        assert session.request(Increment("a"), DEADLINE) == 5
        assert (session._is_shared, session._combiner.together, session._combiner._limit) == (is_shared, together, 3)
        for error, message in ((CounterServerError, "no"), (RuntimeError, "broken")):
            with pytest.raises(error, match=message):
                session.request(Increment("a"), DEADLINE)
        assert session.request(Increment("a"), DEADLINE) == 6
        assert store.clients == [0, 0, 0, 1]
        assert store.deadlines == [DEADLINE] * 4


@pytest.mark.parametrize("round_trip", ["none", "short"])
def test_threads_share_a_batch_or_make_calls_alone_in_turn(round_trip: RoundTrip) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> Result:
        inside.set()
        assert go_on.wait(PATIENCE)
        return 1

    is_alone = round_trip == "none"
    following: list[Step] = [2, 3] if is_alone else [[2, 3]]
    store = FakeStore(wait, *following, round_trip=round_trip)
    session = Session(store, 3)
    first, *others = [threading.Thread(target=session.request, args=(Increment("a"), inf), daemon=True) for _ in "abc"]
    first.start()
    assert inside.wait(PATIENCE)
    for thread in others:
        thread.start()
    if is_alone:
        others[0].join(0.2)
    else:
        eventually(lambda: len(session._combiner._waiting) == 2, "two waiting threads")
    assert len(store.sent) == 1
    go_on.set()
    for thread in (first, *others):
        thread.join(PATIENCE)
    assert [batch.sequence for batch in store.sent] == ([1, 2, 3] if is_alone else [1, 2])
    assert len(set(store.clients)) == 1


class LossyStore(MemoryStore):
    """Loses some messages: n is the nth batch, -n its answer."""

    def __init__(self, *lost: int) -> None:
        super().__init__()
        self._lost = lost
        self._number = 0

    def apply(self, batch: Batch, deadline: float = inf, /) -> list[Result]:
        self._number += 1
        number = self._number
        results = super().apply(batch, deadline) if number not in self._lost else []
        if {number, -number} & set(self._lost):
            raise Disconnected("lost", sent=True)
        return results


@pytest.mark.traces_opcodes
@pytest.mark.parametrize("lost", [(), (2,), (-2,)])
@pytest.mark.parametrize("same", [True, False])
def test_an_interrupt_at_any_moment_counts_nothing_twice(lost: tuple[int, ...], *, same: bool) -> None:
    """At each moment at which a signal's handler could run. The combiner goes on with the same list, others do not."""
    for moment in range(1, 1000):
        session = Session(LossyStore(*lost), 1000)
        assert session.perform(write(), DEADLINE) == [1]
        operations: list[Operation] = [Increment("a" if same else "given up")]
        interrupt = InterruptedAt(session_module, moment)
        try:
            with interrupt:
                session.perform(operations, DEADLINE)
        except KeyboardInterrupt:
            pass
        assert session.perform(operations if same else write(), DEADLINE) == [2], interrupt.place
        assert session.perform([Increment("a"), Get("given up")], DEADLINE) in ([3, None], [3, 1]), interrupt.place
        if interrupt.place is None:
            assert moment > 5
            break
    else:
        pytest.fail("there were more moments than any code should have")
