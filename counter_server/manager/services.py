"""What the manager offers of its ledger and of itself, whoever asks and however."""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NoReturn

from ..combiner import Combiner
from ..errors import BatchRefused, StartupError
from ..journal import Journal
from ..ledger import Ledger, results_of
from ..objects import HostedObject
from ..operations import Batch, Result
from ..settings import Durability
from ..status import SlowCall, Status

log = logging.getLogger(__name__)

SLOW_SECONDS = 10.0  # after which a call of a shared object is reported, while it still runs
_LOOK_SECONDS = 1.0
_LARGEST_COMMIT = 1000  # batches; in truth one for each connected worker at the most


class LedgerService:
    """What the manager offers of its ledger: the last stop of the road.

    :param in_memory: a commit costs less than to share it, so each batch has one of its own. (Alone, an increment's
        round trip is a fifth shorter for it.)
    """

    def __init__(self, ledger: Ledger, fail: Callable[[BaseException], NoReturn], *, in_memory: bool = False) -> None:
        self._ledger = ledger
        self._fail = fail
        self._alone = threading.Lock() if in_memory else None  # held through a commit that is not shared
        self._combiner: Combiner[Batch, list[Result] | BatchRefused] = Combiner(self._commit, limit=_LARGEST_COMMIT)
        # Of writes, since the start. Commits are made by one thread at a time, so nothing has to guard these.
        self.batches = 0
        self.operations = 0
        self.commits = 0
        self.commit_seconds = 0.0

    def apply(self, batch: Batch) -> list[Result]:
        """Apply a batch; where commits are durable, in one with those of other workers that wait at the same time."""
        if batch.sequence == 0:
            return self._ledger.read(batch)
        if self._alone is None:
            return results_of(self._combiner.submit(batch))
        with self._alone:
            (answer,) = self._commit([batch], inf)
        return results_of(answer)

    def _commit(self, batches: list[Batch], _deadline: float) -> list[list[Result] | BatchRefused]:
        began = time.monotonic()
        try:
            answers = self._ledger.apply(batches)
        except BaseException as error:  # noqa: BLE001 - the ledger returns what it refuses; after all else memory may differ
            self._fail(error)
        self.commit_seconds += time.monotonic() - began
        self.commits += 1
        self.batches += len(batches)
        self.operations += sum(len(batch.operations) for batch in batches)
        return answers


@dataclass(frozen=True)
class UpkeepService:
    """What the manager does for its operator: nobody else can, as the journal is its alone."""

    ledger: Ledger
    journal: Journal | None

    def back_up(self, target: bytes) -> int:
        """Copy the journal into a new file; its bytes."""
        try:
            return self._durable().back_up(Path(os.fsdecode(target)))
        except (StartupError, ValueError) as error:  # ValueError: what cannot be a path
            raise BatchRefused(str(error)) from error

    def check(self) -> tuple[int, int, int]:
        """Look at the whole journal, and whether it holds what the memory does; how much that is."""
        try:
            seen = self.ledger.show(self._durable().check)
        except StartupError as error:
            raise BatchRefused(str(error)) from error
        return len(seen.counters), len(seen.clients), len(seen.keys)

    def _durable(self) -> Journal:
        if self.journal is None:
            raise StartupError("the counters are in memory alone (durability none): there is no journal")
        return self.journal


def slow_calls(objects: Sequence[HostedObject]) -> dict[tuple[str, float], SlowCall]:
    """Return the calls that have run for long and still do, each by its object's name and its beginning."""
    now = time.monotonic()
    return {
        (hosted.declaration.name, began): SlowCall(hosted.declaration.name, method, now - began)
        for hosted in objects
        for method, began in [hosted.running or ("", now)]
        if now - began > SLOW_SECONDS
    }


def report_slow_calls(objects: Sequence[HostedObject], is_ending: threading.Event) -> None:
    """Log each call that runs for long, once, until the manager is ending."""
    reported: set[tuple[str, float]] = set()
    while not is_ending.wait(_LOOK_SECONDS):
        found = slow_calls(objects)
        for key in found.keys() - reported:
            call = found[key]
            log.warning(
                "%s.%s has run for %.0f seconds and still does; other calls of %s wait for it",
                *(call.object, call.method, call.seconds, call.object),
            )
        reported = set(found)


@dataclass(frozen=True, kw_only=True)
class StatusService:
    """What the manager tells of itself."""

    ledger: Ledger
    service: LedgerService
    journal: Journal | None
    durability: Durability
    epoch: str
    objects: int  # that are hosted
    hosted: Sequence[HostedObject]
    connections: Callable[[], int]
    began: float = field(default_factory=time.monotonic)

    def status(self) -> Status:
        return Status(
            pid=os.getpid(),
            epoch=self.epoch,
            durability=self.durability,
            uptime=time.monotonic() - self.began,
            starts=self.journal.starts if self.journal else 1,
            counters=len(self.ledger),
            objects=self.objects,
            clients=self.ledger.clients,
            keys=self.ledger.keys,
            connections=self.connections(),
            batches=self.service.batches,
            operations=self.service.operations,
            commits=self.service.commits,
            commit_seconds=self.service.commit_seconds,
            journal_bytes=self.journal.size if self.journal else 0,
            slow_calls=list(slow_calls(self.hosted).values()),
        )
