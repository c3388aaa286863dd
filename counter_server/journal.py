"""Durable commits: the ledger's changes in SQLite, each commit one transaction.

A commit that returns is durable to the level asked for. One that raises `StorageFull` changed nothing.
After any other failure nobody knows what the disk holds (a failed fsync may have written or lost the
pages: Rebello et al., "Can Applications Recover from fsync Failures?", 2020), so it is `JournalFailed`
and the process must end: the disk is read again by the next one.
"""

import os
import secrets
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

from msgspec import msgpack

from .errors import StartupError, StorageFull
from .ledger import Changes, ClientRecord, Contents, KeyRecord
from .operations import Result
from .settings import Caps

_APPLICATION_ID = 0x43545352  # "CTSR", in the file's header: tells our journal from any other SQLite file
_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE clients (client BLOB PRIMARY KEY, sequence INTEGER NOT NULL, results BLOB NOT NULL, used REAL NOT NULL,
    object TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE objects (name TEXT PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE keys (key TEXT PRIMARY KEY, fingerprint BLOB NOT NULL, value INTEGER NOT NULL, used REAL NOT NULL)
    WITHOUT ROWID;
"""
# SQLite in WAL mode: FULL syncs at every commit; NORMAL writes at every commit, so that a killed process
# loses nothing, and syncs at checkpoints, so that a power cut may lose the last commits.
_SYNCHRONOUS = {"commit": "FULL", "process": "NORMAL"}

_encode = msgpack.Encoder().encode
_decode_results = msgpack.Decoder(list[Result]).decode


class JournalFailed(Exception):
    """The outcome of a commit is unknown: end the process, the disk is the truth."""


class Journal:
    """The file behind the ledger and the durable objects. For one process, who holds the data directory's lock.

    :param durability: ``"commit"`` or ``"process"``.
    :param most: bytes of the file, beyond which it is as if the disk were full.
    :raises StartupError: if the file is not a journal, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path, durability: str = "commit", *, most: int = Caps.journal_bytes) -> None:
        self.path = path
        self._log = path.with_name(path.name + "-wal")
        self.starts = 0  # how often a manager began on this file: see `count_start`
        self._committing = threading.Lock()  # held through a transaction: the ledger's, or one object's
        try:
            self._sync()
            self._check()
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error
        try:
            self._open(_SYNCHRONOUS[durability])
            page_size = self._connection.execute("PRAGMA page_size").fetchone()[0]
            self._connection.execute(f"PRAGMA max_page_count = {max(most // page_size, 1)}")
        except BaseException as error:
            self._connection.close()
            if isinstance(error, (sqlite3.Error, OSError)):
                raise self._unusable(error) from error
            raise

    def _unusable(self, error: Exception) -> StartupError:
        return StartupError(
            f"the journal {self.path} cannot be used ({error}); it was left as it is: put back a copy, or mend its disk"
        )

    def _sync(self) -> None:
        """Have on disk what is there to be read: the writer before us may have been killed between write and sync."""
        for path in (self.path, self._log, self.path.parent):
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _check(self) -> None:
        """Refuse what is not ours. A connection that can write would fold the log in as it closes."""
        if not self.path.exists():
            return
        with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            execute = connection.execute
            application, version = (execute(f"PRAGMA {n}").fetchone()[0] for n in ("application_id", "user_version"))
            empty = execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not empty and application != _APPLICATION_ID:
            raise StartupError(f"{self.path} is not a journal of counter_server; it was left as it is")
        if version > _VERSION:
            raise StartupError(
                f"the journal {self.path} has format {version}, of a newer counter_server; this one reads {_VERSION}"
            )

    def _open(self, synchronous: str) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")  # one owner: no shared-memory file, no locks per commit
        empty = execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        execute("PRAGMA journal_mode = WAL")
        execute(f"PRAGMA synchronous = {synchronous}")
        try:
            # After a failed fsync the kernel may hold what the disk does not have, and say that it does: what was read
            # is written again before it is believed.
            execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:  # then it stays in the log, and is read from there
                raise
        if empty:
            self._connection.executescript(f"BEGIN; {_SCHEMA}")
            execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(16),))
            execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            execute(f"PRAGMA user_version = {_VERSION}")
            execute("COMMIT")
            self._sync()  # the new files' names, too

    @property
    def epoch(self) -> str:
        """The identity of this state: the same as long as the file lives."""
        return str(self._connection.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()[0])

    def count_start(self) -> None:
        """Note that a manager begins. Where there is no room to write that down, it is counted in memory alone.

        :raises StartupError: if the disk fails.
        """
        execute = self._connection.execute
        try:
            found = execute("SELECT value FROM meta WHERE name = 'starts'").fetchone()
            self.starts = (int(found[0]) if found else 0) + 1
            execute("REPLACE INTO meta VALUES ('starts', ?)", (str(self.starts),))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                raise self._unusable(error) from error

    @property
    def size(self) -> int:
        """The bytes of the file and of its log."""
        total = 0
        for path in (self.path, self._log):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def load(self) -> Contents:
        """Everything that was committed."""
        try:
            rows = self._connection.execute
            return Contents(
                counters=dict(rows("SELECT name, value FROM counters ORDER BY name")),
                clients={
                    client: ClientRecord(sequence, _decode_results(results), used, name)
                    for client, sequence, results, used, name in rows("SELECT * FROM clients ORDER BY used")
                },
                keys={
                    key: KeyRecord(fingerprint, value, used)
                    for key, fingerprint, value, used in rows("SELECT * FROM keys ORDER BY used")
                },
                objects=dict(rows("SELECT name, state FROM objects")),
            )
        except (sqlite3.Error, ValueError) as error:
            raise self._unusable(error) from error

    def commit(self, changes: Changes) -> None:
        """Make `changes` durable in one transaction.

        :raises StorageFull: there was no room; nothing was changed.
        :raises JournalFailed: nobody knows.
        """
        with self._committing:
            self._commit(changes)

    def _commit(self, changes: Changes) -> None:
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            for name, value in changes.counters.items():
                if value is None:
                    execute("DELETE FROM counters WHERE name = ?", (name,))
                else:
                    execute("REPLACE INTO counters VALUES (?, ?)", (name, value))
            for client, record in changes.clients.items():
                if record is None:
                    execute("DELETE FROM clients WHERE client = ?", (client,))
                else:
                    row = (client, record.sequence, _encode(record.results), record.used, record.object)
                    execute("REPLACE INTO clients VALUES (?, ?, ?, ?, ?)", row)
            for key, known in changes.keys.items():
                if known is None:
                    execute("DELETE FROM keys WHERE key = ?", (key,))
                else:
                    execute("REPLACE INTO keys VALUES (?, ?, ?, ?)", (key, *known))
            for name, state in changes.objects.items():
                execute("REPLACE INTO objects VALUES (?, ?)", (name, state))
            execute("COMMIT")
        except BaseException as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                raise JournalFailed(f"the journal {self.path} failed: {error}") from error
            self._roll_back()
            raise StorageFull(
                f"no room to write to {self.path}: its disk is full, or it has the bytes that --max-journal-bytes"
                " allows; nothing was counted, and reads go on"
            ) from error

    def _roll_back(self) -> None:
        # After a full disk SQLite has mostly rolled back by itself.
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                raise JournalFailed(f"the journal {self.path} could not be rolled back: {error}") from error

    def close(self) -> None:
        """Fold the log into the file where possible (everything committed is safe without), and let go."""
        with suppress(sqlite3.Error):
            self._connection.close()
