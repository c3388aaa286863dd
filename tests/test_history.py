"""The checker finds impossible orders, and three bugs that real systems have had."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from counter_server.errors import BatchRefused, CounterServerError, Disconnected
from counter_server.history import Operation, violations
from counter_server.journal import Journal
from counter_server.ledger import Changes, Ledger
from counter_server.operations import Batch, Get, Increment, Result
from counter_server.session import Session
from counter_server.store import Finding, RoundTrip
from counter_server.stores import Store
from tests.journals import Committing


def op(key: str, invoked: float, returned: float | None = None, *answers: int) -> Operation:
    return Operation(key, invoked, returned, answers)


@pytest.mark.parametrize(
    ("history", "final"),
    [
        ([], 0),
        ([op("a", 0, 1, 1), op("b", 2, 3, 2)], 2),
        ([op("a", 0, 9, 2), op("b", 0, 9, 1)], 2),  # at the same time: any order
        ([op("a", 0, 1, 1), op("lost", 2), op("b", 3, 4, 3)], 3),
        ([op("a", 0, 1, 1), op("lost", 2)], 1),  # never applied
        ([op("lost", 0), op("a", 1, 2, 1)], 2),  # applied long after
        ([op("a", 0, 1, 1, 1, 1)], 1),
    ],
)
def test_a_possible_history_is_accepted(history: list[Operation], final: int) -> None:
    assert violations(history, final) == []


@pytest.mark.parametrize(
    ("history", "final", "complaint"),
    [
        ([op("a", 0, 1, 1), op("b", 0, 1, 1)], 2, "both answered 1"),
        ([op("a", 0, 1, 2)], 1, "outside"),
        ([op("a", 0, 1, 0)], 1, "outside"),
        ([op("a", 0, 1, 2)], 2, "no operation can have taken 1"),
        ([op("a", 0, 1, 1)], 2, "no operation can have taken 2"),
        ([op("a", 0, 1, 1, 2), op("b", 0, 1, 2)], 2, "was answered with [1, 2]"),
        ([op("a", 0, 1, 2), op("b", 2, 3, 1)], 2, "before a smaller number was asked for"),
        ([op("a", 0, 1, 2), op("lost", 2)], 2, "before a smaller number was asked for"),
        ([op("a", 0, 1, 1), op("lost", 2), op("b", 0, 1, 3)], 3, "before a smaller number was asked for"),
    ],
)
def test_an_impossible_history_is_reported(history: list[Operation], final: int, complaint: str) -> None:
    assert any(complaint in found for found in violations(history, final))


class CrashingStore:
    """The real ledger over the real journal, in this process, that now and then crashes or loses an answer.

    After a crash it restarts from the journal. `commit` is between ledger and journal, and makes the bugs.
    """

    round_trip: RoundTrip = "short"

    def findings(self, _deadline: float) -> list[Finding]:
        return []

    def __init__(self, path: Path, chance: random.Random, commit: Callable[["CrashingStore", Changes], None]) -> None:
        self.path = path
        self.chance = chance
        self._commit = commit
        self.delayed: list[Changes] = []
        self._begin()

    def crash(self) -> None:
        self.journal.close()
        self.delayed.clear()
        self._begin()

    def _begin(self) -> None:
        self.journal = Journal(self.path, "process")
        self.ledger = Ledger(self.journal.load(), Committing(lambda changes: self._commit(self, changes)))

    def apply(self, batch: Batch, deadline: float) -> list[Result]:  # noqa: ARG002 - it never waits
        if batch.sequence == 0:
            return self.ledger.apply(batch)
        if self.chance.random() < 0.2:
            self.crash()
            raise Disconnected("crashed before it", sent=True)
        try:
            answer = self.ledger.perform([batch])[0]
        except Crash:
            self.crash()
            raise Disconnected("crashed in the middle", sent=True) from None
        if isinstance(answer, BatchRefused):
            raise answer
        if self.chance.random() < 0.2:
            self.crash()
            raise Disconnected("crashed after it", sent=True)
        if self.chance.random() < 0.2:
            raise Disconnected("the answer was lost", sent=True)
        return answer

    def after_fork(self) -> None:
        """No test forks with one of these."""

    def close(self) -> None:
        self.journal.close()


class Crash(Exception):
    """The process ends here."""


def commit_at_once(store: CrashingStore, changes: Changes) -> None:
    store.journal.commit(changes)


def acknowledge_before_sync(store: CrashingStore, changes: Changes) -> None:
    """The bug: changes go to the disk three commits later, and are answered now."""
    store.delayed.append(changes)
    if len(store.delayed) > 3:
        for delayed in store.delayed:
            store.journal.commit(delayed)
        store.delayed.clear()


def record_apart_from_effect(store: CrashingStore, changes: Changes) -> None:
    """The bug: the effect in one commit, the client's record in another, and sometimes a crash between them."""
    store.journal.commit(Changes(changes.now, counters=changes.counters))
    if store.chance.random() < 0.2:
        raise Crash
    store.journal.commit(Changes(changes.now, clients=changes.clients, keys=changes.keys))


def run(store: CrashingStore, *, keys: bool, patience: float) -> tuple[list[Operation], int]:
    """A client that wants 60 things counted, and asks for each until it is answered.

    :param patience: seconds that the session may resend; with 0 the client itself asks again, in a new batch.
    """
    seam: Store = store
    session = Session(seam, 1)
    history = []
    for number in range(60):
        key = f"op-{number}"
        operation = Increment("c", key=key if keys else None)
        invoked = time.monotonic()
        while True:
            try:
                (result,) = session.perform([operation], time.monotonic() + patience)
                break
            except CounterServerError:
                continue
        value = result if isinstance(result, int) else getattr(result, "value", None)
        assert isinstance(value, int), result
        history.append(Operation(key, invoked, time.monotonic(), (value,)))
    (final,) = session.perform([Get("c")], time.monotonic() + 5)
    assert isinstance(final, int)
    return history, final


@pytest.fixture(params=range(5), ids=lambda seed: f"seed-{seed}")
def chance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> random.Random:
    monkeypatch.setattr("counter_server.session._FIRST_PAUSE", 0.0)
    return random.Random(request.param)


def played(
    path: Path,
    chance: random.Random,
    commit: Callable[[CrashingStore, Changes], None],
    *,
    keys: bool = True,
    patience: float = 5.0,
) -> list[str]:
    store = CrashingStore(path / "journal.sqlite3", chance, commit)
    try:
        return violations(*run(store, keys=keys, patience=patience))
    finally:
        store.close()


@pytest.mark.parametrize(
    ("keys", "patience"),
    [(False, 5.0), (True, 5.0), (True, 0.0)],
    ids=["resent by the session", "resent by the session, with keys", "asked again by the client, with keys"],
)
def test_the_real_thing_has_no_violation(tmp_path: Path, chance: random.Random, *, keys: bool, patience: float) -> None:
    assert played(tmp_path, chance, commit_at_once, keys=keys, patience=patience) == []


def test_an_acknowledgement_before_the_sync_is_found(tmp_path: Path, chance: random.Random) -> None:
    assert played(tmp_path, chance, acknowledge_before_sync)


def test_a_client_record_committed_apart_from_its_effect_is_found(tmp_path: Path, chance: random.Random) -> None:
    # Without idempotency keys of its own the session's numbering is all there is.
    assert played(tmp_path, chance, record_apart_from_effect)


def test_a_retry_without_a_key_is_found(tmp_path: Path, chance: random.Random) -> None:
    assert played(tmp_path, chance, commit_at_once, keys=False, patience=0.0)
