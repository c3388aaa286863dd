"""`postgresql://`, `mysql://`, `mariadb://` and `sqlite://`: counters in SQL tables, one transaction for each batch.

The rows that a batch touches are read under locks into a `Ledger`, which applies the same rules as for every other
store, and its changes are written. SQLAlchemy Core executes the statements. `databases.py` has what differs.
"""

import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import sqlalchemy as sa
from msgspec import json as packed
from sqlalchemy.dialects.mysql import LONGTEXT, VARBINARY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateTable

from ..errors import AccessDenied, BatchRefused, Disconnected, OutcomeUnknown, StartupError, StateLost, StorageFull
from ..ledger import CLIENT_LIFETIME, KEY_LIFETIME, Changes, ClientRecord, Contents, KeyRecord, Ledger
from ..operations import Batch, Delete, Get, Increment, Keep, Result, Scan, Set
from ..settings import LONGEST_DEADLINE
from ..store import Finding, RoundTrip

_VERSION = 1  # of the tables
_FORGET_EVERY = 10.0  # seconds between searches for expired records
_FORGET_AT_ONCE = 1000  # records removed in one transaction, to keep it short
_SECONDS_TO_CREATE = 5.0  # in which another process makes all tables
_LOOK_SECONDS = 0.01
_ROWS_AT_ONCE = 10_000  # read at once, of everything
_MYSQL = ("mysql", "mariadb")


class _Utf8(sa.TypeDecorator[str]):
    """Text as bytes: the collations of MySQL pad text with spaces, or do not exist in each version."""

    impl = VARBINARY
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> Any:  # noqa: ARG002
        return value.encode() if value is not None else None

    def process_result_value(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002
        return value.decode()


# In the order of code points: case, accents and trailing spaces count.
_name = sa.Text().with_variant(sa.Text(collation="C"), "postgresql").with_variant(_Utf8(255), *_MYSQL)
_client = sa.LargeBinary().with_variant(VARBINARY(16), *_MYSQL)
_results = sa.Text().with_variant(LONGTEXT(), *_MYSQL)
_metadata = sa.MetaData()


def _table(table: str, /, *constraints: Any, **types: Any) -> sa.Table:
    """Return a table whose first column is its key."""
    first, *_ = types
    options: dict[str, Any] = {f"{dialect}_engine": "InnoDB" for dialect in _MYSQL}
    options |= {f"{dialect}_charset": "utf8mb4" for dialect in _MYSQL}
    made = (sa.Column(each, kind, primary_key=each == first, nullable=False) for each, kind in types.items())
    return sa.Table(f"counter_server_{table}", _metadata, *made, *constraints, **options)


# No index on `used` of clients: PostgreSQL could then not update a row in place, as every batch does. The constraint
# on keys is an index for expiry, created in one statement with its table.
_meta = _table("meta", version=sa.Integer, epoch=sa.Text)
_counters = _table("counters", name=_name, value=sa.BigInteger)
_clients = _table("clients", client=_client, sequence=sa.BigInteger, results=_results, used=sa.Double)
_expiry = sa.UniqueConstraint("used", "key")
_keys = _table("keys", _expiry, key=_name, fingerprint=sa.LargeBinary, value=sa.BigInteger, used=sa.Double)

# A row of ours in each table, under a name that nothing else has. A table without it was emptied. 1e308: no expiry.
_MARKS: dict[sa.Table, tuple[Any, ...]]
_MARKS = {_counters: ("", 0), _clients: (b"", 0, "[]", 1e308), _keys: ("", b"", 0, 1e308)}
_KEY = {table: next(iter(table.primary_key)) for table in _MARKS}
_IS_MARKED = {table: sa.exists().where(_KEY[table] == mark[0]) for table, mark in _MARKS.items()}
_REMOVE = {table: sa.delete(table).where(_KEY[table] == sa.bindparam("gone")) for table in _MARKS}
_AFTER = sa.select(_counters).where(_counters.c.name > sa.bindparam("after")).order_by(_counters.c.name)
_PAGE = _AFTER.limit(sa.bindparam("most", type_=sa.Integer))

_decode_results = packed.Decoder(list[Result]).decode

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # of this call, in `time.monotonic` seconds


def remaining() -> float:
    """Return the seconds that this call may still take, at least a millisecond."""
    return min(max(_deadline.get() - time.monotonic(), 0.001), LONGEST_DEADLINE)


class TablesMissing(Disconnected):
    """The tables do not exist, or are empty."""


class _Transaction:
    """The transaction of one call, as the journal of its ledger."""

    def __init__(self, store: "SqlStore", connection: sa.Connection) -> None:
        self._store = store
        self._connection = connection

    def commit(self, changes: Changes) -> None:
        self._store.commit(self._connection, changes)


class _LedgerOfOneBatch(Ledger):
    def _merge(self, changes: Changes) -> None:
        """Do nothing: it ends with its batch, and nobody reads it afterwards."""


ErrorClass = type[Exception]
_MESSAGES: dict[ErrorClass, str] = {
    AccessDenied: "{} does not let this process in: {}; nothing was counted",
    StorageFull: "{} cannot be written to: {}; nothing was counted, and reads continue",
    StartupError: "{} cannot be used: {}; nothing was changed",
    OutcomeUnknown: "{} failed: {}",
}


class SqlStore:
    """A `Store` in a database; a subclass knows the kind of database.

    :param name: the URL without secrets, for messages.
    :param connect: returns a new connection of the driver's, which keeps the deadline of the current call.
    """

    round_trip: RoundTrip = "long"
    clock: str  # SQL for the seconds since 1970, by the clock that all clients share
    begin_read: str  # SQL that begins a transaction which sees the database at one moment
    insert: Any  # the dialect's
    creates_in_transaction = True

    def __init__(self, url: sa.URL, name: str, connect: Callable[[], Any], **options: Any) -> None:
        self.name = name
        options |= {"creator": connect, "pool_size": 4, "max_overflow": -1, "hide_parameters": True}
        self.engine = sa.create_engine(url, **options)
        self._inherited: list[sa.Pool] = []  # a parent's: closing its connections would disturb the parent
        self._epoch = ""  # as last seen
        self._next_forgetting = 0.0
        self._upsert = {table: self.replacing(table, self.insert(table)) for table in _MARKS}
        self._wanted = {table: sa.select(table).where(self.is_wanted(_KEY[table])) for table in (_counters, _keys)}
        # Other programs that write wait, too.
        self._locked = self._wanted[_counters].order_by(_counters.c.name).with_for_update()
        self._clock: Any = sa.literal_column(self.clock, sa.Double)
        self._known = (
            sa.select(_meta.c.epoch, self._clock, _clients.c.sequence, _clients.c.results, _clients.c.used)
            .select_from(_meta.outerjoin(_clients, _clients.c.client == sa.bindparam("client")))
            .where(_meta.c.version == _VERSION, *_IS_MARKED.values())
        )

    def begin_write(self, connection: sa.Connection, texts: set[str] | None) -> None:
        """Begin a transaction; lock these names and idempotency keys, or everything."""
        raise NotImplementedError

    def replacing(self, table: sa.Table, insert: Any) -> Any:
        """Return a statement that inserts rows so that it replaces those that have the same primary keys."""
        rest = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
        return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=rest)

    def is_wanted(self, column: sa.Column[Any]) -> Any:
        """Return the condition that a key is in the list `wanted`, a parameter."""
        return column.in_(sa.bindparam("wanted", expanding=True))

    def write(self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
        """Insert rows, or replace those that have the same primary keys."""
        connection.execute(self._upsert[table], rows)

    def findings(self, deadline: float) -> list[Finding]:
        """See `Store`."""
        raise NotImplementedError

    def exists(self, deadline: float) -> bool:
        """See `IsMade`. Tables of which some are missing were made."""
        with self.connection(deadline) as connection:
            return self.is_there(connection)

    def was_found(self) -> bool:
        """Return whether this process has used the tables, and they are there, as far as it can tell at once."""
        return bool(self._epoch)

    def is_there(self, connection: sa.Connection) -> bool:
        """Return whether any of the tables exists."""
        found = sa.inspect(connection)
        return any(found.has_table(table.name) for table in _metadata.sorted_tables)

    def classify(self, error: Any, *, sent: bool) -> tuple[ErrorClass, str, bool]:
        """Return our class of error for the driver's error, its reason, and whether a commit may have succeeded."""
        raise NotImplementedError

    def translated(self, error: Any, *, sent: bool) -> Exception:
        """Return our own error for one of the driver's.

        :param sent: whether the transaction was to be committed.
        """
        kind, text, sent = self.classify(error, sent=sent)
        if issubclass(kind, Disconnected):
            return kind(f"{self}: {text}", sent=sent)
        return kind(_MESSAGES[kind].format(self, text))

    def __str__(self) -> str:
        return self.name

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        if not (batch.sequence or self.was_found() or self.exists(deadline)):  # to look makes no tables
            self._forget_epoch()
            return Ledger().apply(batch)
        with self.connection(deadline) as connection:
            if batch.sequence:
                self._forget(connection)
            now, contents = self._find(connection, batch)
            ledger = _LedgerOfOneBatch(contents, _Transaction(self, connection), clock=lambda: now)
            if not batch.sequence:
                return ledger.apply(batch)
            answer = ledger.perform([batch])[0]
        if isinstance(answer, BatchRefused):
            raise answer
        return answer

    @contextmanager
    def connection(self, deadline: float) -> Iterator[sa.Connection]:
        """Lend a connection to one call. An error closes it: a late answer must not reach the next call."""
        token = _deadline.set(deadline)
        try:
            with self._translated(), self.engine.connect() as connection:
                try:
                    yield connection
                except BaseException:
                    connection.invalidate()
                    raise
        finally:
            _deadline.reset(token)

    @contextmanager
    def _translated(self, *, sent: bool = False) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self.translated(error.orig, sent=sent) from error.orig

    def _find(self, connection: sa.Connection, batch: Batch) -> tuple[float, Contents]:
        """Return the database's time, and the rows that the batch touches, locked if it writes."""
        try:
            with self._translated():
                epoch, now, contents = self._look(connection, batch)
        except TablesMissing:
            connection.rollback()
            if not batch.sequence and not self.is_there(connection):
                self._forget_epoch()
            if self._create(connection):
                self._epoch = self._epoch or "lost"  # the first process that comes reports it, too
            epoch, now, contents = self._look(connection, batch)
        known, self._epoch = self._epoch, epoch
        if known and known != epoch:
            raise self._lost()
        return now, contents

    def _forget_epoch(self) -> None:
        """Forget the tables, which are gone; raise `StateLost` if this process has used them."""
        known, self._epoch = self._epoch, ""
        if known:
            raise self._lost()

    def _lost(self) -> StateLost:
        return StateLost(f"{self} has lost some or all of its contents: numbers may begin again")

    def _look(self, connection: sa.Connection, batch: Batch) -> tuple[str, float, Contents]:
        operations = batch.operations
        names = {each.name for each in operations if isinstance(each, (Increment, Set, Get, Delete))}
        keys = {each.key for each in operations if isinstance(each, (Increment, Keep)) and each.key is not None}
        if batch.sequence:
            self.begin_write(connection, names | keys)
        else:
            connection.exec_driver_sql(self.begin_read)
        known = connection.execute(self._known, {"client": batch.client}).first()
        if known is None:
            raise TablesMissing(f"{self}: its tables were emptied", sent=False)
        epoch, now, sequence, results, used = known
        contents = Contents()
        if sequence is not None:
            contents.clients[batch.client] = ClientRecord(sequence, _decode_results(results), used)
        if names:
            counters = self._locked if batch.sequence else self._wanted[_counters]
            contents.counters.update(connection.execute(counters, {"wanted": sorted(names)}).all())
        if keys:
            for key, *record in connection.execute(self._wanted[_keys], {"wanted": sorted(keys)}):
                contents.keys[key] = KeyRecord(*record)
        for scan in operations:
            if isinstance(scan, Scan):  # one more than the page, to see whether others follow
                page = {"after": scan.after, "most": scan.limit + 1}
                contents.counters.update(connection.execute(_PAGE, page).all())
        return epoch, now, contents

    def contents(self, deadline: float) -> Contents | None:
        """See `ShowsContents`."""
        until = min(time.monotonic() + _SECONDS_TO_CREATE, deadline)
        while True:
            with self.connection(deadline) as connection:
                connection.exec_driver_sql(self.begin_read)
                there = [sa.inspect(connection).has_table(table.name) for table in _metadata.sorted_tables]
                if not any(there):
                    return None
                known = connection.execute(self._known, {"client": b""}).first() if all(there) else None
                if known is not None and self._epoch in ("", known.epoch):
                    return self._everything(connection)
            if known is not None or time.monotonic() > until:  # else another process may be making them
                raise StateLost(f"{self} has lost some or all of its contents")
            time.sleep(_LOOK_SECONDS)

    def _everything(self, connection: sa.Connection) -> Contents:
        keys = sa.select(_keys).where(_keys.c.key != "", _keys.c.used > self._clock - KEY_LIFETIME)
        found = Contents(dict(self.all_counters(connection)))
        for key, *record in connection.execute(keys).yield_per(_ROWS_AT_ONCE):
            found.keys[key] = KeyRecord(*record)
        return found

    def all_counters(self, connection: sa.Connection) -> Iterator[tuple[str, int]]:
        """Return the names and values of all counters, one after the other."""
        rows = connection.execute(sa.select(_counters).where(_counters.c.name != ""))
        return iter(rows.yield_per(_ROWS_AT_ONCE))

    def commit(self, connection: sa.Connection, changes: Changes) -> None:
        """Write the changes, and commit them."""
        if not changes.clients:  # refused, or answered again
            return
        counters = {name: None if value is None else (value,) for name, value in changes.counters.items()}
        clients = {
            client: record and (record.sequence, packed.encode(record.results).decode(), record.used)
            for client, record in changes.clients.items()
        }
        with self._translated():
            self._save(connection, _counters, counters)
            self._save(connection, _clients, clients)
            self._save(connection, _keys, changes.keys)
        with self._translated(sent=True):
            connection.commit()

    def _save(self, connection: sa.Connection, table: sa.Table, changes: dict[Any, Any]) -> None:
        """Write rows, which come by their keys and without them; None removes."""
        removed = [{"gone": key} for key, row in changes.items() if row is None]
        if removed:
            connection.execute(_REMOVE[table], removed)
        columns = table.c.keys()
        written = [dict(zip(columns, (key, *row), strict=True)) for key, row in changes.items() if row is not None]
        if written:
            self.write(connection, table, written)

    def _create(self, connection: sa.Connection) -> bool:
        """Create missing tables and marks; return whether others were there, so that something was lost.

        :raises StartupError: if the tables have another version.
        """
        if self.creates_in_transaction:
            self.begin_write(connection, None)
        for each in _metadata.sorted_tables:
            connection.execute(CreateTable(each, if_not_exists=True))
        if not self.creates_in_transaction:
            self.begin_write(connection, None)
        versions = connection.scalars(sa.select(_meta.c.version)).all()
        if set(versions) - {_VERSION}:
            kind = "a newer" if max(versions) > _VERSION else "another"
            theirs = f"version {max(versions)}, of {kind} counter_server"
            raise StartupError(
                f"the tables in {self} have {theirs}; this version of the program needs version {_VERSION}"
            )
        marks = sum(bool(connection.scalar(sa.select(marked))) for marked in _IS_MARKED.values())
        if not versions or marks < len(_MARKS):
            if versions:  # else another process may have written the first, and this insert has to fail
                connection.execute(sa.delete(_meta))
            connection.execute(sa.insert(_meta), {"version": _VERSION, "epoch": secrets.token_hex(16)})
            for table, (key, *row) in _MARKS.items():
                self._save(connection, table, {key: row})
        connection.commit()
        return marks < len(_MARKS) and bool(versions or marks)

    def _forget(self, connection: sa.Connection) -> None:
        """Remove expired records, now and then. A failure does not matter: the batch meets its cause, too."""
        now = time.monotonic()
        if not self._epoch or now < self._next_forgetting:
            return
        self._next_forgetting = now + _FORGET_EVERY
        try:
            self.begin_write(connection, set())
            for table, lifetime in ((_clients, CLIENT_LIFETIME), (_keys, KEY_LIFETIME)):
                expired = sa.select(_KEY[table]).where(table.c.used <= self._clock - lifetime).limit(_FORGET_AT_ONCE)
                gone = connection.scalars(expired.with_for_update(skip_locked=True)).all()
                self._save(connection, table, dict.fromkeys(gone))
                if len(gone) == _FORGET_AT_ONCE:
                    self._next_forgetting = now
            connection.commit()
        except DBAPIError:
            connection.rollback()

    def after_fork(self) -> None:
        self._inherited.append(self.engine.pool)
        self.engine.dispose(close=False)

    def close(self) -> None:
        self.engine.dispose()
