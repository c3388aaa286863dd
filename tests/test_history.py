"""The checker finds impossible orders, and three bugs that real systems have had."""

import random
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

import pytest

from counter_server.errors import BatchRefused, CounterServerError, Disconnected
from counter_server.history import Operation, violations
from counter_server.journal import Journal
from counter_server.ledger import Changes, Ledger
from counter_server.operations import Batch, Get, Increment, Result
from counter_server.session import Session
from counter_server.store import Finding, RoundTrip
from tests.journals import Committing
from tests.processes import PATIENCE


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


class Crash(Exception):
    """The process ends here."""


class CrashingStore:
    """The real ledger over the real journal, in this process, that now and then crashes or loses an answer.

    After a crash it restarts from the journal. `commit` is between ledger and journal, and makes the bugs.
    """

    round_trip: RoundTrip = "short"

    def __init__(self, path: Path, chance: random.Random, commit: Callable[["CrashingStore", Changes], None]) -> None:
        self.chance = chance
        self.delayed: list[Changes] = []
        self._path = path
        self._commit = commit
        self._begin()

    def _begin(self) -> None:
        self.journal = Journal(self._path, "process")
        self._ledger = Ledger(self.journal.load(), Committing(lambda changes: self._commit(self, changes)))

    def _crash(self, when: str) -> NoReturn:
        self.journal.close()
        self.delayed.clear()
        self._begin()
        raise Disconnected(f"crashed {when}", sent=True) from None

    def apply(self, batch: Batch, deadline: float) -> list[Result]:  # noqa: ARG002 - it never waits
        if batch.sequence == 0:
            return self._ledger.apply(batch)
        if self.chance.random() < 0.2:
            self._crash("before it")
        try:
            (answer,) = self._ledger.perform([batch])
        except Crash:
            self._crash("in the middle")
        if isinstance(answer, BatchRefused):
            raise answer
        if self.chance.random() < 0.2:
            self._crash("after it")
        if self.chance.random() < 0.2:
            raise Disconnected("the answer was lost", sent=True)
        return answer

    def findings(self, _deadline: float) -> list[Finding]:
        return []

    def after_fork(self) -> None:
        """No test forks with one of these."""

    def close(self) -> None:
        self.journal.close()


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
    """A client that wants 40 things counted, and asks for each until it is answered.

    :param patience: seconds that the session may resend; with 0 the client itself asks again, in a new batch.
    """
    session = Session(store, 1)
    history = []
    for number in range(40):
        key = f"op-{number}"
        invoked = time.monotonic()
        while True:
            with suppress(CounterServerError):
                operation = Increment("c", key=key if keys else None)
                (result,) = session.perform([operation], time.monotonic() + patience)
                break
        value = result if isinstance(result, int) else getattr(result, "value", None)
        assert isinstance(value, int), result
        history.append(Operation(key, invoked, time.monotonic(), (value,)))
    (final,) = session.perform([Get("c")], time.monotonic() + PATIENCE)
    assert isinstance(final, int)
    return history, final


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)]])
@pytest.mark.parametrize(
    ("commit", "keys", "patience", "is_right"),
    [
        pytest.param(commit_at_once, False, PATIENCE, True, id="resent by the session"),
        pytest.param(commit_at_once, True, PATIENCE, True, id="resent by the session, with keys"),
        pytest.param(commit_at_once, True, 0.0, True, id="asked again by the client, with keys"),
        pytest.param(commit_at_once, False, 0.0, False, id="asked again by the client, without keys"),
        pytest.param(acknowledge_before_sync, True, PATIENCE, False, id="acknowledged before the sync"),
        pytest.param(record_apart_from_effect, True, PATIENCE, False, id="client record apart from its effect"),
    ],
)
def test_only_a_bug_makes_a_violation(
    commit: Callable[[CrashingStore, Changes], None],
    patience: float,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    keys: bool,
    is_right: bool,
) -> None:
    monkeypatch.setattr("counter_server.session._FIRST_PAUSE", 0.0)
    monkeypatch.setattr("counter_server.journal._SYNCHRONOUS", {"process": "OFF"})  # nothing is killed here
    with closing(CrashingStore(tmp_path / "journal.sqlite3", random.Random(seed), commit)) as store:
        found = violations(*run(store, keys=keys, patience=patience))
    assert (found == []) == is_right, found
