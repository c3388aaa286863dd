"""`postgresql://` and `sqlite://`: counters in SQL tables, one transaction for each batch.

What a batch touches is read under locks, the `Ledger` says what becomes of it, and that is written: so the rules are
those of the other stores. URLs are SQLAlchemy's. What differs between databases is in `postgresql.py` and `sqlite.py`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from ..errors import BatchRefused, StateLost, StorageFull
from ..ledger import CLIENT_LIFETIME, KEY_LIFETIME, Answer, Changes, Ledger
from ..operations import Batch, Increment, Operation, Refusal, Result
from ..store import Finding, RoundTrip
from .tables import Found, TablesMissing, Wanted, parse_url, shown

_FORGET_EVERY = 10.0  # seconds between looks for what has expired
_FORGET_AT_ONCE = 1000  # records removed in one transaction, so that none is long
_MOST_IDLE = 4  # connections kept for the next call


class Connection(Protocol):
    """A connection to a database. What it raises ends it, and its transaction."""

    deadline: float  # of what is done next, in `time.monotonic` seconds
    sent: bool  # a transaction may have been committed that was not answered

    def usable(self) -> bool:
        """Whether it still leads to the database, after it was kept."""
        ...

    def create(self, place: str) -> bool:
        """Make the tables where they are not there, and check their version.

        Where only some were there, or some were emptied, a new epoch begins; say whether it was so.
        """
        ...

    def read(self, wanted: Wanted) -> Found:
        """What there is, at one moment."""
        ...

    def begin(self, wanted: Wanted) -> Found:
        """What there is, and locked until `commit` or `end`."""
        ...

    def commit(self, changes: Changes) -> None:
        """Write, durably. The locks are released."""

    def end(self) -> None:
        """Release the locks. Nothing is written."""

    def undo(self) -> bool:
        """Undo what was begun of a write that was refused; return whether the connection can be used again."""
        ...

    def increment(self, batch: Batch, epoch: str) -> list[Result] | None:
        """Apply a batch of plain increments in one step, where there is one; None if not, and nothing was done."""

    def forget(self, client_lifetime: float, key_lifetime: float, most: int) -> int:
        """Remove some of what was last used so many seconds ago; say how much it was.

        :raises TablesMissing: if there is nothing to remove it from.
        """
        ...

    def close(self) -> None:
        """Let go of it, whatever it is doing."""


class Engine(Protocol):
    """A kind of database."""

    def connect(self, deadline: float) -> Connection:
        """A new connection."""
        ...

    def findings(self, deadline: float) -> list[Finding]:
        """See `Examined`."""
        ...

    def translated(self, error: Exception, *, sent: bool) -> Exception:
        """Our own error for one of the driver's; the error itself if it is none of them."""
        ...


class SqlStore:
    """A `Store` in a database.

    :param url: as SQLAlchemy takes it, of PostgreSQL (by psycopg) or of a file of SQLite.
    :raises InvalidRequest: if it cannot be one.
    """

    round_trip: RoundTrip = "long"

    def __init__(self, url: str) -> None:
        parsed = parse_url(url)
        self._name = shown(parsed)
        self._engine: Engine
        if parsed.get_backend_name() == "sqlite":
            from .sqlite import SqliteEngine

            self._engine = SqliteEngine(parsed, self._name)
        else:
            from .postgresql import PostgresqlEngine

            self._engine = PostgresqlEngine(parsed, self._name)
        self._epoch = ""  # as it was when it was last told
        self._next_forgetting = 0.0
        self._idle: list[Connection] = []
        self._inherited: list[Connection] = []  # a parent's: kept, for to let go of one would disturb the parent

    def __str__(self) -> str:
        return self._name

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        try:
            return self._apply(batch, deadline)
        except StorageFull as full:
            if not any(isinstance(operation, Increment) and operation.key for operation in batch.operations):
                raise

            # A key that was applied is answered with its number, even if nothing can be written.
            found = self._read(batch, deadline)
            refusal = Refusal("storage_full", str(full))
            return _results(Ledger(found.contents).answer(batch, Changes(found.now), refusal))

    def _read(self, batch: Batch, deadline: float) -> Found:
        with self._connection(deadline) as connection:
            found = self._found(connection, connection.read, Wanted.by(batch))
            self._check_epoch(found)
            return found

    def _apply(self, batch: Batch, deadline: float) -> list[Result]:
        if batch.sequence == 0:
            return Ledger(self._read(batch, deadline).contents).apply(batch)
        with self._connection(deadline) as connection:
            self._forget(connection)
            if self._epoch and all(_is_plain(operation) for operation in batch.operations):
                results = connection.increment(batch, self._epoch)
                if results is not None:
                    return results
            found = self._found(connection, connection.begin, Wanted.by(batch))
            self._check_epoch(found)
            changes = Changes(found.now)
            answer = Ledger(found.contents).answer(batch, changes)
            if batch.client in changes.clients:
                connection.commit(changes)
            else:  # refused, or answered again
                connection.end()
            return _results(answer)

    def _found(self, connection: Connection, find: Callable[[Wanted], Found], wanted: Wanted) -> Found:
        try:
            return find(wanted)
        except TablesMissing:
            if connection.create(self._name):
                self._epoch = self._epoch or "lost"  # a process that knew none is told, too: it is the first to come
            return find(wanted)

    def _check_epoch(self, found: Found) -> None:
        known, self._epoch = self._epoch, found.epoch
        if known and known != found.epoch:
            raise StateLost(f"{self} has lost some or all of what it held: numbers may begin again")

    def _forget(self, connection: Connection) -> None:
        now = time.monotonic()
        if self._epoch and now >= self._next_forgetting:
            self._next_forgetting = now + _FORGET_EVERY  # also if it fails
            with suppress(TablesMissing):  # which the batch itself will find
                if connection.forget(CLIENT_LIFETIME, KEY_LIFETIME, _FORGET_AT_ONCE) >= _FORGET_AT_ONCE:
                    self._next_forgetting = now

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[Connection]:
        """One for this call alone; it is kept for the next one if all went well."""
        connection = None
        try:
            connection = self._kept() or self._engine.connect(deadline)
            connection.deadline = deadline
            connection.sent = False
            yield connection
        except Exception as error:  # noqa: BLE001 - it is raised again, as ours
            ours = self._engine.translated(error, sent=connection is not None and connection.sent)
            if connection is not None:
                if isinstance(ours, StorageFull) and connection.undo():
                    self._keep(connection)
                else:
                    connection.close()  # a late answer is nobody else's
            raise ours from None if ours is error else error
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        self._keep(connection)

    def _keep(self, connection: Connection) -> None:
        if len(self._idle) < _MOST_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def _kept(self) -> Connection | None:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if connection.usable():
                return connection
            connection.close()
        return None

    def findings(self, deadline: float) -> list[Finding]:
        """See `Examined`."""
        try:
            return self._engine.findings(deadline)
        except Exception as error:  # noqa: BLE001 - it is raised again, as ours
            ours = self._engine.translated(error, sent=False)
            raise ours from None if ours is error else error

    def after_fork(self) -> None:
        self._inherited += self._idle
        self._idle = []

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def _results(answer: Answer) -> list[Result]:
    if isinstance(answer, BatchRefused):
        raise answer
    return answer


def _is_plain(operation: Operation) -> bool:
    """Whether it is an increment by one without conditions, as nearly all are."""
    match operation:
        case Increment(_, 1, None, None, None):
            return True
        case _:
            return False
