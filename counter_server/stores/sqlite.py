"""SQLite behind `SqlStore`: a file that the processes of one machine share."""

import json
import os
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from msgspec import json as packed
from sqlalchemy.dialects import sqlite as dialect
from sqlalchemy.engine import URL

from ..errors import AccessDenied, Disconnected, InvalidRequest, OutcomeUnknown, StartupError, StorageFull
from ..journal import refusal
from ..ledger import Changes, ClientRecord, Contents, KeyRecord
from ..operations import Batch, Result
from ..store import Finding
from .tables import VERSION, Found, Marks, TablesMissing, Wanted, check_version, creation

_Given = TypeVar("_Given")

# Seconds between tries while another one writes, at random between these. SQLite's own pauses grow to 0.1: who came
# first then waits the longest, and may wait for seconds while others come and go.
_PAUSES = (0.0002, 0.001)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_DENIED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)

_MARKS = Marks("x''")

_decode_results = packed.Decoder(list[Result]).decode


class SqliteEngine:
    """An `Engine` of one file.

    :raises InvalidRequest: if the URL names none.
    """

    def __init__(self, url: URL, name: str) -> None:
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise InvalidRequest(
                f"{name} is not a file that processes can share: sqlite:////absolute/file.db is one, "
                "and for one process there is memory://"
            )
        if url.query or url.host:
            raise InvalidRequest(f"{name} has a host or options: a path is all that this store takes")
        self._path = os.path.abspath(url.database)
        self._name = name

    def connect(self, deadline: float) -> "SqliteConnection":
        return SqliteConnection(self._path, deadline)

    def findings(self, deadline: float) -> list[Finding]:
        if not os.path.exists(self._path):
            return [Finding("problem", f"there is no file {self._path} yet: the first count makes it")]
        connection = self.connect(deadline)
        try:
            mode = connection.journal_mode()
        finally:
            connection.close()
        if mode != "wal":
            return [
                Finding("problem", f"journal_mode {mode}: its file system does not take the one that is needed, WAL")
            ]
        kept = "journal_mode WAL, synchronous FULL: a number is on the disk before it is answered"
        return [Finding("ok", f"SQLite {sqlite3.sqlite_version}"), Finding("ok", kept)]

    def translated(self, error: Exception, *, sent: bool) -> Exception:
        if not isinstance(error, sqlite3.Error):
            return error
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # the rest of it tells details
        if code in _BUSY:
            return Disconnected(f"{self._name}: {error}", sent=False)
        refused = refusal(error, Path(self._path), committing=sent)
        if refused is not None:
            return StorageFull(f"{self._name} cannot be written to: {refused.strerror}; nothing was counted")
        if code in _DENIED:
            return AccessDenied(f"{self._name} may not be written by this process: {error}; nothing was counted")
        if not sent:
            return StartupError(f"{self._name} cannot be used: {error}; it was left as it is")
        return OutcomeUnknown(f"{self._name} failed: {error}")


def _file(path: str) -> tuple[int, int] | None:
    """Which file that is: one removed and made anew is another."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _expecting_tables() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # no such table
            raise TablesMissing from error
        raise


class SqliteConnection:
    """A `Connection` to a file, which is made if there is none."""

    def __init__(self, path: str, deadline: float) -> None:
        self.deadline = deadline
        self.sent = False
        # No waiting by SQLite, and no transactions by the driver: both are done here.
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        self._execute = self._connection.execute
        try:
            self._patiently(lambda: self._execute("PRAGMA journal_mode = WAL"))
            self._execute("PRAGMA synchronous = FULL")  # in this mode: a sync at each commit
        except BaseException:
            self.close()
            raise
        self._path = path
        self._file = _file(path)

    def journal_mode(self) -> str:
        """How the file is written; SQLite says no to what it cannot do there by leaving it as it was."""
        return str(self._execute("PRAGMA journal_mode").fetchone()[0])

    def usable(self) -> bool:
        """Whether the file is still the one of that path."""
        return self._file is not None and self._file == _file(self._path)

    def _patiently(self, work: Callable[[], _Given]) -> _Given:
        """What `work` gives, once no other one is in its way."""
        while True:
            try:
                return work()
            except sqlite3.OperationalError as error:
                remaining = self.deadline - time.monotonic()
                if (error.sqlite_errorcode & 0xFF) not in _BUSY or remaining <= 0:
                    raise
            if self._connection.in_transaction:
                self._execute("ROLLBACK")
            time.sleep(min(random.uniform(*_PAUSES), remaining))

    def create(self, place: str) -> bool:
        self._patiently(lambda: self._execute("BEGIN IMMEDIATE"))
        for statement in creation(dialect.dialect()):
            self._execute(statement)
        versions = self._execute("SELECT version FROM counter_server_meta").fetchall()
        for (version,) in versions:
            check_version(version, place)
        marks = len(self._execute(_MARKS.select).fetchall())
        if not versions or marks < _MARKS.count:
            self._execute("DELETE FROM counter_server_meta")
            self._execute("INSERT INTO counter_server_meta VALUES (?, ?)", (VERSION, secrets.token_hex(16)))
            for statement in _MARKS.inserts:
                self._execute(statement)
        self._execute("COMMIT")
        return marks < _MARKS.count and bool(versions or marks)

    def read(self, wanted: Wanted) -> Found:
        def read() -> Found:
            self._execute("BEGIN")
            return self._found(wanted)

        try:
            return self._patiently(read)
        finally:
            self.end()

    def begin(self, wanted: Wanted) -> Found:
        def begin() -> None:
            self._execute("BEGIN IMMEDIATE")

        self._patiently(begin)
        try:
            return self._found(wanted)
        except TablesMissing:
            self.end()
            raise

    def _found(self, wanted: Wanted) -> Found:
        execute = self._execute
        with _expecting_tables():
            ours = f"SELECT epoch FROM counter_server_meta WHERE version = ? AND {_MARKS.are_there}"  # noqa: S608 - our own names
            epochs = execute(ours, (VERSION,)).fetchall()
        if not epochs:
            raise TablesMissing
        contents = Contents()
        client = "SELECT sequence, results, used FROM counter_server_clients WHERE client = ?"
        for sequence, results, used in execute(client, (wanted.client,)):
            contents.clients[wanted.client] = ClientRecord(sequence, _decode_results(results), used)
        counters = "SELECT name, value FROM counter_server_counters WHERE name IN (SELECT value FROM json_each(?))"
        contents.counters.update(execute(counters, (json.dumps(wanted.names),)))
        if wanted.keys:
            keys = "SELECT * FROM counter_server_keys WHERE key IN (SELECT value FROM json_each(?))"
            for key, *record in execute(keys, (json.dumps(wanted.keys),)):
                contents.keys[key] = KeyRecord(*record)
        page = "SELECT name, value FROM counter_server_counters WHERE name > ? ORDER BY name LIMIT ?"
        for after_and_limit in wanted.pages:
            contents.counters.update(execute(page, after_and_limit))
        return Found(epochs[0][0], time.time(), contents)

    def commit(self, changes: Changes) -> None:
        many = self._connection.executemany
        changed = [item for item in changes.counters.items() if item[1] is not None]
        many("REPLACE INTO counter_server_counters VALUES (?, ?)", changed)
        many("DELETE FROM counter_server_counters WHERE name = ?", _removed(changes.counters))
        for client, record in changes.clients.items():
            if record is not None:
                row = (client, record.sequence, packed.encode(record.results).decode(), record.used)
                self._execute("REPLACE INTO counter_server_clients VALUES (?, ?, ?, ?)", row)
        many("DELETE FROM counter_server_keys WHERE key = ?", _removed(changes.keys))
        keys = [(key, *record) for key, record in changes.keys.items() if record is not None]
        many("REPLACE INTO counter_server_keys VALUES (?, ?, ?, ?)", keys)
        self.sent = True
        self._execute("COMMIT")

    def end(self) -> None:
        if self._connection.in_transaction:
            self._execute("ROLLBACK")

    def undo(self) -> bool:
        # With the last connection go files that reads need, and that a full disk has no room for.
        try:
            self.end()
        except sqlite3.Error:
            return False
        return True

    def increment(self, batch: Batch, epoch: str) -> None:
        """There is no round trip to be saved."""

    def forget(self, client_lifetime: float, key_lifetime: float, most: int) -> int:
        self._patiently(lambda: self._execute("BEGIN IMMEDIATE"))
        count = 0
        try:
            for table, lifetime in (("clients", client_lifetime), ("keys", key_lifetime)):
                expired = f"SELECT rowid FROM counter_server_{table} WHERE used <= ? LIMIT ?"  # noqa: S608 - our own names
                removal = f"DELETE FROM counter_server_{table} WHERE rowid IN ({expired})"  # noqa: S608
                with _expecting_tables():
                    count += self._execute(removal, (time.time() - lifetime, most)).rowcount
            if count:
                self._execute("COMMIT")
        finally:
            self.end()
        return count

    def close(self) -> None:
        self._connection.close()


def _removed(changes: dict[str, Any]) -> list[tuple[str]]:
    return [(name,) for name, after in changes.items() if after is None]
