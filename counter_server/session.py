"""A client's side of exactly-once: number the batches, send one again until it is answered."""

import os
import random
import time
from dataclasses import dataclass

from .errors import BatchRefused, CounterServerError, DeadlineExceeded, Disconnected, OutcomeUnknown, StateLost
from .ledger import CLIENT_LIFETIME
from .operations import READS, Batch, Operation, Refusal, Replayed, Result
from .stores.base import Store

_FIRST_PAUSE = 0.005  # seconds before a batch is sent again; doubles
_KNOWN_SECONDS = CLIENT_LIFETIME / 2  # that a store surely remembers a client, whose clock may not be this one
_LONGEST_PAUSE = 0.2  # seconds; a manager that comes back is found within this


@dataclass(slots=True)
class _Exchange:
    """One batch, from its number to its results."""

    operations: list[Operation]
    batch: Batch
    sent: bool = False  # it may have reached the store
    results: list[Result] | None = None


class Session:
    """Sends lists of operations to a store, each list exactly once.

    For one thread at a time, as a `Combiner` calls it. The same list object again means the same batch again: if it is
    still without an answer it is resent under its number, so a thread can finish what another began.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.renew()

    def renew(self) -> None:
        """Become a new client, of whom the store knows nothing: after a fork, a refusal, an unknown outcome."""
        self._client = os.urandom(16)
        self._sequence = 0  # of the last batch of writes that was answered
        self._known_until = 0.0  # in `time.monotonic` seconds: until then the store has to know that batch
        self._exchange: _Exchange | None = None

    def apply(self, operations: list[Operation], deadline: float) -> list[Result]:
        """Apply `operations`, in order, in one atomic step, and return a result for each.

        :param deadline: in `time.monotonic` seconds.
        :raises DeadlineExceeded: with the outcome ``"not_applied"`` if no byte of it was sent.
        :raises OutcomeUnknown: if it was sent, and the store has lost its memory of this client since.
        :raises StateLost: if the store has begun anew without its memory.
        """
        exchange = self._exchange
        if exchange is None or exchange.operations is not operations:
            if exchange is not None and exchange.sent and exchange.results is None:
                self.renew()  # an abandoned batch: it may yet be applied under the next number
            exchange = self._exchange = self._begin(operations)
        if exchange.results is None:
            results = self._exchange_until(exchange, deadline)
            if exchange.batch.sequence:
                self._sequence = exchange.batch.sequence  # first: without results it is sent again
                self._known_until = time.monotonic() + _KNOWN_SECONDS if _is_remembered(results) else 0.0
            exchange.results = results
        return exchange.results

    def _begin(self, operations: list[Operation]) -> _Exchange:
        reads_only = all(isinstance(operation, READS) for operation in operations)
        sequence = 0 if reads_only else self._sequence + 1
        return _Exchange(operations, Batch(self._client, sequence, operations))

    def _exchange_until(self, exchange: _Exchange, deadline: float) -> list[Result]:
        pause = _FIRST_PAUSE
        reason = ""
        while True:
            before, began = exchange.sent, time.monotonic()
            exchange.sent = True  # unless shown otherwise: an interrupt may come at any moment
            try:
                return self._store.apply(exchange.batch, deadline)
            except Disconnected as error:
                exchange.sent = before or error.sent
                now = time.monotonic()
                remaining = deadline - now
                if remaining > 0 or now - began > _LONGEST_PAUSE or not reason:
                    reason = str(error)  # else the deadline cut this try short, and the one before says more
                if remaining <= 0:
                    raise self._too_late(exchange, reason) from error
            except BatchRefused as error:
                if before:
                    self.renew()
                    raise OutcomeUnknown(
                        f"{self._store} has lost its memory of this call; it may have been counted before, at most once"
                    ) from error
                must_be_known = time.monotonic() < self._known_until
                self.renew()
                if must_be_known:
                    raise StateLost(
                        f"{self._store} has lost its memory of what this process counted: it was put back, truncated or"
                        " emptied, or has more clients than it can remember; nothing was counted now, and the next call"
                        " goes on from what it holds"
                    ) from error
                self._exchange = exchange
                exchange.batch = self._begin(exchange.operations).batch
                exchange.sent = False
                continue
            except CounterServerError as error:  # StateLost, AccessDenied: definite, and for all of the batch
                self.renew()
                if before and exchange.batch.sequence:
                    error.outcome = "unknown"
                raise
            time.sleep(min(pause * random.uniform(0.5, 1.0), remaining))
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _too_late(self, exchange: _Exchange, reason: str) -> DeadlineExceeded:
        if exchange.sent and exchange.batch.sequence:
            return DeadlineExceeded(
                f"no answer from {self._store} in time ({reason}); it may have been counted, at most once", "unknown"
            )
        return DeadlineExceeded(
            f"{self._store} could not be reached in time ({reason}); nothing was counted", "not_applied"
        )


def _is_remembered(results: list[Result]) -> bool:
    """Whether the store has surely written down that it gave these results, also if its disk is full."""
    for result in results:
        if type(result) is int:  # as nearly all are
            continue
        if isinstance(result, Replayed) or (isinstance(result, Refusal) and result.code == "storage_full"):
            return False
    return True
