"""The client's side of exactly-once: number the batches, and resend each one until it is answered."""

import os
import random
import threading
import time
from collections import deque
from math import inf

from msgspec import Struct

from .combiner import Combiner
from .errors import BatchRefused, CounterServerError, DeadlineExceeded, Disconnected, OutcomeUnknown, StateLost
from .ledger import CLIENT_LIFETIME
from .operations import READS, Batch, Operation, Refusal, Replayed, Result
from .store import ObjectStore, Store

_FIRST_PAUSE = 0.005  # seconds before a batch is resent; doubles each time
_LONGEST_PAUSE = 0.2  # seconds; a restarted manager is found within this time
_MOST_IDLE = 4  # connections to a concurrent object that are kept though they have been idle for long
_LONGEST_IDLE = 60.0  # seconds
_KNOWN_SECONDS = CLIENT_LIFETIME / 2  # for which a store surely remembers a client, although its clock may differ


class _Exchange(Struct, eq=False):
    """One batch, from its number to its results."""

    operations: list[Operation]
    batch: Batch
    sent: bool = False  # whether the batch may have reached the store
    began: float = 0.0  # the last attempt, in `time.monotonic` seconds
    pause: float = _FIRST_PAUSE  # seconds before it is resent
    reason: str = ""  # why the last attempt failed
    results: list[Result] | None = None


class Session:
    """One client of one store: its threads share batches, and each batch is applied exactly once.

    :param limit: the maximum number of operations in a batch.
    """

    def __init__(self, store: Store, limit: int) -> None:
        self.store = store
        self._combiner: Combiner[Operation, Result] = Combiner(self, limit=limit)
        self._is_shared = store.round_trip != "none"
        self._alone = threading.Lock()  # held through a call that is not shared
        self._renew()

    def _renew(self) -> None:
        """Become a new client, which the store does not know: after a fork, a refusal or an unknown outcome."""
        self._client = os.urandom(16)
        self._sequence = 0  # of the last answered batch of writes
        self._known_until = -inf  # in `time.monotonic` seconds; a refusal before means that the store lost its memory
        self._exchange: _Exchange | None = None

    def begin_again(self) -> None:
        """Forget all threads, and close nothing that belongs to the parent: for the child of a fork."""
        self._combiner.reset()
        self._alone = threading.Lock()
        self._renew()
        self.store.after_fork()

    def close(self) -> None:
        """Close the connection. The next call opens it again."""
        self.store.close()

    def request(self, operation: Operation, deadline: float) -> Result:
        """Apply one operation exactly once before a deadline (in `time.monotonic` seconds), and return its result."""
        if self._is_shared:
            result = self._combiner.join(operation, deadline)
        else:
            with self._alone:
                result = self.perform([operation], deadline)[0]
        if isinstance(result, Refusal):
            raise result.error()
        return result

    def perform(self, operations: list[Operation], deadline: float) -> list[Result]:
        """Apply `operations`, in order, in one atomic step, and return a result for each.

        The same list object again means the same batch. If that has no answer yet it is resent under its number, so a
        thread can finish a batch of another. Call this from one thread at a time, as the combiner does.

        :raises DeadlineExceeded: with the outcome ``"not_applied"`` if no byte was sent.
        :raises OutcomeUnknown: if the batch was sent, and the store has lost its memory of this client since.
        :raises StateLost: if the store has started again without its memory.
        """
        exchange = self._exchange
        if exchange is None or exchange.operations is not operations:
            exchange = self._begin(operations)
        while exchange.results is None:
            sent_before, exchange.began = exchange.sent, time.monotonic()
            exchange.sent = True  # until proven otherwise: an interrupt may come at any moment
            try:
                results = self.store.apply(exchange.batch, deadline)
            except Disconnected as error:
                exchange.sent = sent_before or error.sent
                self._pause(exchange, error, deadline)
            except BatchRefused as error:
                self._begin_as_another(exchange, error, sent_before=sent_before)
            except CounterServerError as error:  # StateLost, AccessDenied: definite, and for the whole batch
                self._renew()
                if sent_before and exchange.batch.sequence:
                    error.outcome = "unknown"
                raise
            else:
                if exchange.batch.sequence:
                    self._sequence = exchange.batch.sequence  # before the results: interrupted in between, it is resent
                    self._known_until = exchange.began + _KNOWN_SECONDS if _is_remembered(results) else -inf
                self._combiner.together = self.store.round_trip == "long"
                exchange.results = results
        return exchange.results

    def _begin(self, operations: list[Operation]) -> _Exchange:
        before = self._exchange
        if before is not None and before.sent and before.results is None:
            self._renew()  # the abandoned batch may still be applied, and has the number that comes next
        exchange = self._exchange = _Exchange(operations, self._numbered(operations))
        return exchange

    def _numbered(self, operations: list[Operation]) -> Batch:
        for operation in operations:
            if type(operation) not in READS:
                return Batch(self._client, self._sequence + 1, operations)
        return Batch(self._client, 0, operations)

    def _pause(self, exchange: _Exchange, broken: Disconnected, deadline: float) -> None:
        """Wait before a batch is resent, or raise at the deadline."""
        now = time.monotonic()
        is_cut_short = now >= deadline and now - exchange.began <= _LONGEST_PAUSE
        if not exchange.reason or not (is_cut_short or broken.is_vague):
            exchange.reason = str(broken)  # else the earlier reason says more
        if now >= deadline:
            if exchange.sent and exchange.batch.sequence:
                raise DeadlineExceeded(
                    f"no answer from {self.store} in time ({exchange.reason}); it may have been counted, at most once",
                    "unknown",
                ) from broken
            raise DeadlineExceeded(
                f"{self.store} could not be reached in time ({exchange.reason}); nothing was counted", "not_applied"
            ) from broken
        time.sleep(min(exchange.pause * random.uniform(0.5, 1.0), deadline - now))
        exchange.pause = min(exchange.pause * 2, _LONGEST_PAUSE)

    def _begin_as_another(self, exchange: _Exchange, refused: BatchRefused, *, sent_before: bool) -> None:
        """Send a refused batch as a new client, unless that could count it twice or hide a loss."""
        must_be_known = exchange.began < self._known_until
        self._renew()
        if sent_before:
            raise OutcomeUnknown(
                f"{self.store} has lost its memory of this call; it may have been counted before, at most once"
            ) from refused
        if must_be_known:
            raise StateLost(
                f"{self.store} has lost its memory of what this process counted: it was restored, truncated or"
                " emptied, or has more clients than it can remember; nothing was counted now, and the next call"
                " continues from the current content"
            ) from refused
        self._exchange = exchange
        exchange.batch = self._numbered(exchange.operations)
        exchange.sent = False


class Sessions:
    """The sessions of one concurrent object: each call has one to itself, so no call waits for another.

    A session that is given back keeps its client and its connection for the next call. So there are as many as calls
    were in progress at once. Those that stay idle are closed, except for a few.

    :param store: of the object; its `another` opens the connections.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # guards the three below
        self._losses = 0  # of the object's state
        self._sessions: dict[Session, int] = {}  # and the losses before each was made
        self._idle: deque[tuple[float, Session]] = deque()  # since when, in `time.monotonic` seconds; the latest last

    def begin_again(self) -> None:
        """See `Session`. The child of a fork has no thread that would give a session back."""
        self._store.after_fork()
        for session in self._sessions:
            session.begin_again()
        self._reset()

    def close(self) -> None:
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def request(self, operation: Operation, deadline: float) -> Result:
        """See `Session`.

        :raises StateLost: in every call that was in progress when the state was lost, or else in the next one.
        """
        session = self._take()
        try:
            return session.request(operation, deadline)
        except StateLost:
            with self._lock:  # the sessions from before it would report it again
                self._losses += 1
                self._sessions[session] = self._losses
            raise
        finally:
            self._give_back(session)

    def _take(self) -> Session:
        with self._lock:
            while self._idle:
                session = self._idle.pop()[1]
                if self._sessions[session] == self._losses:
                    return session
                del self._sessions[session]
                session.close()
            session = Session(self._store.another(), 1)
            self._sessions[session] = self._losses
            return session

    def _give_back(self, session: Session) -> None:
        now, dropped = time.monotonic(), None
        with self._lock:
            if session in self._sessions:  # not after a fork in its call
                self._idle.append((now, session))
            if len(self._idle) > _MOST_IDLE and self._idle[0][0] < now - _LONGEST_IDLE:
                dropped = self._idle.popleft()[1]
                del self._sessions[dropped]
        if dropped is not None:
            dropped.close()


def _is_remembered(results: list[Result]) -> bool:
    """Return whether the store has surely recorded these results, even if its disk is full."""
    for result in results:
        if type(result) is int:  # nearly always
            continue
        if isinstance(result, Replayed) or (isinstance(result, Refusal) and result.code == "storage_full"):
            return False
    return True
