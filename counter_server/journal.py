"""Durable commits: the ledger's changes in SQLite, each commit one transaction.

A commit that raises `StorageFull` changed nothing. After any other failure the contents of the disk are unknown: a
failed fsync may have written or lost the pages (Rebello et al., "Can Applications Recover from fsync Failures?", 2020).
`JournalFailed` then ends the process, and the next one reads the disk.

SQLite's checks find damage to the structure of a file. A checksum in each row finds a bit that flipped within a number.
"""

import errno
import logging
import os
import secrets
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from msgspec import msgpack

from .errors import StartupError, StorageFull
from .figures import Durations
from .ledger import Changes, ClientRecord, Contents, KeyRecord
from .operations import LARGEST, Result
from .os_errors import explain
from .settings import Caps
from .system import give_name

log = logging.getLogger(__name__)

_APPLICATION_ID = 0x43545352  # "CTSR", in the header of the file: distinguishes a journal from other SQLite files
_VERSION = 2
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE clients (client BLOB PRIMARY KEY, sequence INTEGER NOT NULL, results BLOB NOT NULL, used REAL NOT NULL,
    object TEXT NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE objects (name TEXT PRIMARY KEY, state BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE keys (key TEXT PRIMARY KEY, fingerprint BLOB NOT NULL, value INTEGER NOT NULL, used REAL NOT NULL,
    checksum INTEGER NOT NULL) WITHOUT ROWID;
"""
_TABLES = {statement.strip() for statement in _SCHEMA.split(";")} - {""}

# Of SQLite in WAL mode: FULL syncs at every commit, NORMAL at checkpoints, so a power cut may lose the last commits.
_SYNCHRONOUS = {"commit": "FULL", "process": "NORMAL"}

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # they change nothing, and may go away
_NOT_OPENED = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
_TRIED_BYTES = 65536  # more than the largest single write of SQLite, so this fails whenever that did

_SMALLEST_PAGE = 512  # bytes
_ROWS_AT_ONCE = 200  # few enough to stay in the processor's cache
_BACKUP_PAGES = 2000  # copied at once, between commits
_BACKUP_PAUSE = 0.002  # seconds between two such copies, for waiting commits

_encode = msgpack.Encoder().encode
_decode_results = msgpack.Decoder(list[Result]).decode


class JournalFailed(Exception):
    """The outcome of a commit is unknown: end the process, and let the next one read the disk."""


class Journal:
    """The file of the ledger and the durable objects, for the process that holds the data directory's lock.

    :param durability: ``"commit"`` or ``"process"``.
    :param most: largest size of the file in bytes; beyond it the disk counts as full.
    :raises StartupError: if the file is not a journal, is damaged, or has another format.
    """

    def __init__(self, path: Path, durability: str = "commit", *, most: int = Caps.journal_bytes) -> None:
        self.path = path
        self.epoch = ""  # identifies this state: it changes when some of the state is lost
        self.starts = 0  # number of managers that began on this file: see `count_start`
        self.counters, self.objects = Durations(), Durations()  # of the commits of each, without waiting for others
        self._log = path.with_name(path.name + "-wal")
        self._mark = path.with_name(f"in-use.{path.name}")  # holds the least size of the log, in bytes
        self._marked = 0  # the size in it
        self._log_file = -1  # a descriptor, which shows a cut log faster than its path
        self._opened = ExitStack()
        self._committing = threading.Lock()  # held through a transaction of the ledger or of one object
        try:
            with _naming(path):
                for file in (path, self._log, path.parent):  # the last writer may have died before its sync
                    with suppress(FileNotFoundError):
                        sync(file)
                is_rolled_back = self._inspect()
                if not path.exists():
                    _create(path)
                connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                self._connection = self._opened.enter_context(closing(connection))
                self._cursor = connection.cursor()  # of the commits: a cursor for each statement costs more
                self._open(_SYNCHRONOUS[durability], most, is_rolled_back=is_rolled_back)
        except BaseException:
            self._opened.close()
            raise

    def _inspect(self) -> bool:
        """Refuse unusable files; return whether acknowledged commits have vanished since a manager was killed.

        Do this before SQLite writes: it would remove an empty log, and fold in a log of another program or journal.
        """
        size = self.path.stat().st_size if self.path.exists() else None
        log_size = self._log.stat().st_size if self._log.exists() else 0
        if size is not None and size < _SMALLEST_PAGE:  # to SQLite, this is a new database
            raise StartupError(f"the journal {self.path} was cut to {size} bytes: put back a backup, or remove it")
        is_ours, keeps_log = True, False
        if size:
            with self.path.open("rb") as file:
                header = file.read(100)  # https://www.sqlite.org/fileformat2.html
            is_ours = header[68:72] == _APPLICATION_ID.to_bytes(4, "big")
            keeps_log = header[18:19] == b"\2"  # is in WAL mode, as journals are and backups are not
        if is_ours and not keeps_log and log_size:
            raise StartupError(
                f"{self._log} does not belong to {self.path}, which was removed or replaced by a backup: move the log"
                " away, or put back the journal that it was written for"
            )
        # The directory's lock replaces SQLite's, which need a shared-memory file and so room on the disk.
        uri = f"{self.path.absolute().as_uri()}?mode=ro&vfs=unix-none"
        try:
            if size:
                with closing(sqlite3.connect(uri, uri=True)) as connection:
                    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                    _recognise(connection, self.path)
        except sqlite3.OperationalError as error:
            # A process died while it turned a backup into a journal: opening the file for writing undoes that.
            if not is_ours or error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
        try:
            least = max(int(self._mark.read_text() or 1), 1)
        except (FileNotFoundError, ValueError):
            return False
        if size and (not keeps_log or log_size >= least):  # without a log, it is a backup
            self._mark.unlink()
            return False
        log.error(
            "%s or its log was removed, replaced or cut while a manager used it: acknowledged increments are lost and"
            " their numbers given again, and every process that used them gets StateLost",
            self.path,
        )
        return True

    def _open(self, synchronous: str, most: int, *, is_rolled_back: bool) -> None:
        execute = self._connection.execute
        execute("PRAGMA temp_store = MEMORY")  # there may be no directory for temporary files
        execute("PRAGMA locking_mode = EXCLUSIVE")  # one owner: no shared-memory file, no locks for each commit
        _recognise(self._connection, self.path)  # again, for a file that could not be read before
        execute("PRAGMA journal_mode = WAL")
        execute(f"PRAGMA synchronous = {synchronous}")
        with self._refusals_ignored():
            # After a failed fsync the kernel may report pages as written that the disk does not have: write them again.
            execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if is_rolled_back:
            self.epoch = secrets.token_hex(16)
            with self._refusals_ignored():
                execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (self.epoch,))
                self._mark.unlink(missing_ok=True)
        else:
            found = execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
            if found is None:
                raise ValueError("it has no epoch")
            self.epoch = str(found[0])
        self._files = {str(file): file.stat() for file in (self.path, self._log)}  # at the last check
        self._log_file = self._opened.enter_context(self._log.open("rb")).fileno()
        page_size = execute("PRAGMA page_size").fetchone()[0]
        execute(f"PRAGMA max_page_count = {max(most // page_size, 1)}")

    @contextmanager
    def _refusals_ignored(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if refusal(error, self.path, committing=True) is None:
                raise

    def count_start(self) -> None:
        """Count a manager that begins; in memory alone where the file takes no writes for now."""
        with _naming(self.path), self._refusals_ignored():
            found = self._connection.execute("SELECT value FROM meta WHERE name = 'starts'").fetchone()
            self.starts = (int(found[0]) if found else 0) + 1
            self._connection.execute("REPLACE INTO meta VALUES ('starts', ?)", (str(self.starts),))

    @property
    def size(self) -> int:
        """The bytes of the file and of its log, at the last check."""
        return sum(status.st_size for status in self._files.values())

    def load(self) -> Contents:
        """Return everything that was committed; raise `StartupError` if the file is damaged."""
        with _naming(self.path):
            return _read(self._connection)

    def check(self, contents: Contents) -> None:
        """Raise `StartupError` if the file is damaged or differs from `contents`. Do not commit meanwhile."""
        with _naming(self.path), self._committing:
            _verify(self._connection, thoroughly=True)
            _compare(self._connection, contents)

    def back_up(self, target: Path) -> int:
        """Copy a snapshot of the journal into a new file, durably, while commits go on; return its bytes.

        :raises StartupError: if `target` exists or cannot be written; no part of the copy is left then.
        """
        try:
            with appearing(target) as part:
                with closing(sqlite3.connect(part, isolation_level=None)) as copy:
                    with self._committing:
                        # SQLite adds the commits of this connection to the pages that it has copied already.
                        self._connection.backup(copy, pages=_BACKUP_PAGES, progress=self._pause)
                    copy.execute("PRAGMA journal_mode = DELETE")
                return part.stat().st_size
        except FileExistsError as error:
            raise StartupError(f"{target} is there already and was not changed: name another file") from error
        except (sqlite3.Error, OSError) as error:
            raise StartupError(f"no backup can be written to {target}: {error}; counting goes on") from error

    def _pause(self, _status: int, remaining: int, _total: int) -> None:
        """Let waiting commits go first, between two parts of a backup."""
        if remaining:
            self._committing.release()
            try:
                time.sleep(_BACKUP_PAUSE)
            finally:
                self._committing.acquire()

    def commit(self, changes: Changes) -> None:
        """Make `changes` durable in one transaction.

        :raises StorageFull: if the file system refused the write; nothing was changed.
        :raises JournalFailed: if the outcome is unknown.
        """
        execute = self._cursor.execute
        with self._committing:
            began = time.monotonic()
            try:
                if os.fstat(self._log_file).st_size < self._files[str(self._log)].st_size:
                    self._check_files()  # before, too: a commit makes a log that was cut long again
                execute("BEGIN IMMEDIATE")
                for statement, row in _statements(changes):
                    execute(statement, row)
                execute("COMMIT")
            except JournalFailed:
                raise
            except BaseException as error:
                raise self._undo(error) from error
            self._check_files()
            self._note(self._files[str(self._log)].st_size)
            (self.objects if changes.objects else self.counters).add(time.monotonic() - began)

    def _undo(self, error: BaseException) -> StorageFull | JournalFailed:
        """Roll back a commit that `error` ended, where its outcome can be known; return the error to raise."""
        refused = refusal(error, self.path, committing=True)
        if refused is None:
            return JournalFailed(f"the journal {self.path} failed: {error}")
        if self._connection.in_transaction:  # SQLite has mostly rolled back by itself
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error as failure:
                return JournalFailed(f"the journal {self.path} could not be rolled back: {failure}")
        cap = ", or it has reached --max-journal-bytes" if refused.errno == errno.ENOSPC else ""
        return StorageFull(
            f"{self.path} cannot be written to: {refused.strerror}{cap}; nothing was counted, and reads continue"
        )

    def look_after_files(self) -> None:
        """Raise `JournalFailed` if an open file is not in its place any more. A commit under way does this itself."""
        if self._committing.acquire(blocking=False):
            try:
                self._check_files()
            finally:
                self._committing.release()

    def _check_files(self) -> None:
        """Find a file that was removed, replaced or cut: writes to it are lost. Call this with the lock held."""
        for path, before in self._files.items():
            try:
                status = os.stat(path)
            except OSError as error:
                advice = "put it back, or a backup: otherwise increments are lost and their numbers given again"
                if self._is_folded_in():
                    advice = f"nothing is lost, all is in {self.path}"
                raise JournalFailed(f"{path} was removed while it was in use ({error.strerror}); {advice}") from error
            if status.st_ino != before.st_ino or status.st_dev != before.st_dev:
                fault = "replaced by another file"
            elif status.st_size < before.st_size:
                fault = f"cut from {before.st_size} to {status.st_size} bytes"
            else:
                self._files[path] = status
                continue
            self._note(LARGEST)
            raise JournalFailed(
                f"{path} was {fault} while it was in use; put back a backup: otherwise numbers are given again"
            )

    def _note(self, size: int) -> None:
        """Note the size of the log, so that the next process finds out if the log was cut after a kill."""
        if size != self._marked:
            with suppress(OSError):  # without room for the note, such a cut is not found
                self._mark.write_text(str(size))
                self._marked = size

    def _is_folded_in(self) -> bool:
        """Fold the log, which SQLite still has open, into the journal, if only the log was removed."""
        with suppress(sqlite3.Error, OSError):
            is_there = os.path.samestat(self.path.stat(), self._files[str(self.path)])
            if is_there and self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                self._mark.unlink(missing_ok=True)
                return True
        return False

    def close(self) -> None:
        """Close the file, and fold the log into it if possible. Every commit is safe without that, too."""
        with suppress(sqlite3.Error, JournalFailed), self._committing:
            try:
                self._check_files()
                self._mark.unlink(missing_ok=True)  # first: SQLite removes the log
            finally:
                self._log_file = -1
                self._opened.close()


def read_checked(path: Path) -> Contents:
    """Check a journal or backup completely, without changing it; return its contents or raise `StartupError`."""
    with _naming(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        _recognise(connection, path)
        return _read(connection, thoroughly=True)


def refusal(error: BaseException, path: Path, *, committing: bool = False) -> OSError | None:
    """Return why the file system refuses writes to the database at `path` for now; None if `error` has another cause.

    SQLite reports only a full disk. For the rest, try another write beside the file, at an offset beyond its end: there
    may be a limit on the size of files.

    :param committing: a commit failed: accept only errors after which the log lacks the end of that commit.
    """
    if isinstance(error, OSError):
        return error if error.errno in REFUSALS else None
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, "its disk is full")
    if code is None or not (code == sqlite3.SQLITE_IOERR_WRITE or (not committing and code & 0xFF in _NOT_OPENED)):
        return None
    try:
        files = (path, path.with_name(path.name + "-wal"))
        offset = max((file.stat().st_size for file in files if file.exists()), default=0)
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as file:
            end = offset + _TRIED_BYTES
            while offset < end:  # after a partial write, the next one gives the reason
                offset += os.pwrite(file.fileno(), bytes(end - offset), offset)
    except OSError as failure:
        return failure if failure.errno in REFUSALS else None
    return None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise the errors of a file that cannot be read or made as `StartupError`, caused by `OSError` if it may pass."""
    try:
        yield
    except PermissionError as error:
        name = os.path.basename(error.filename or path)
        raise explain(error, f"the journal {path} cannot be used", path.parent, name) from error
    except (sqlite3.Error, OSError, ValueError) as error:
        refused = refusal(error, path)
        reason = error if refused is None else refused.strerror
        advice = "put back a backup, or repair its disk" if refused is None else "free some space, and start again"
        raise StartupError(f"the journal {path} cannot be used: {reason}; it was not changed: {advice}") from (
            refused or error
        )


def _create(path: Path) -> None:
    """Make a new journal in another place first, so that a kill leaves no part of one behind."""
    place = path.with_name(f".{path.name}.new")
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed here
    try:
        place.mkdir(mode=0o700)
        part = place / path.name
        with closing(sqlite3.connect(part, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(
                f"BEGIN; {_SCHEMA} INSERT INTO meta VALUES ('epoch', '{secrets.token_hex(16)}');"  # noqa: S608 - random digits
                f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_VERSION}; COMMIT"
            )
            # Closing the connection would fold the log in, too, but would not report a failure.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file's contents, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def appearing(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Lend a new file of this user, which gets its name after the block, durably: nobody sees a part of it.

    :param replace: a file that has this name.
    :raises FileExistsError: if there is such a file, also before the block. No part is left after an error.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        if target.exists() and not replace:
            raise FileExistsError
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        yield part
        sync(part)
        if replace:
            part.replace(target)
        else:
            give_name(part, target)
        sync(target.parent)
    finally:
        with suppress(OSError):
            part.unlink()


def _recognise(connection: sqlite3.Connection, path: Path) -> None:
    """Raise `StartupError` unless the database is a journal in the format of this version."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.execute("SELECT count(*) FROM sqlite_master")  # SQLite does not look at the file before this
    if application != _APPLICATION_ID:
        raise StartupError(f"{path} is not a journal of counter_server; it was not changed")
    if version != _VERSION:
        raise StartupError(
            f"the journal {path} has format {version}, and this version of counter_server reads format {_VERSION};"
            " it was not changed: use the version that wrote it"
        )


def _verify(connection: sqlite3.Connection, *, thoroughly: bool = False) -> None:
    """Check the structure of the whole file, `thoroughly` including its indexes; raise `ValueError` for a fault."""
    (found,) = connection.execute(f"PRAGMA {'integrity' if thoroughly else 'quick'}_check(1)").fetchone()
    if found != "ok":
        raise ValueError(" ".join(found.split()))
    tables = {statement for (statement,) in connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table'")}
    if tables != _TABLES:
        raise ValueError("its tables are not a journal's")


def _read(connection: sqlite3.Connection, *, thoroughly: bool = False) -> Contents:
    _verify(connection, thoroughly=thoroughly)
    return Contents(
        counters=dict(_rows(connection, "counters", "name")),
        clients={
            client: ClientRecord(sequence, _decode_results(results), used, owner)
            for client, sequence, results, used, owner in _rows(connection, "clients", "used")
        },
        keys={key: KeyRecord(*record) for key, *record in _rows(connection, "keys", "used")},
        objects=dict(_rows(connection, "objects")),
    )


def _compare(connection: sqlite3.Connection, contents: Contents) -> None:
    """Raise `ValueError` where file and memory differ. Answers refused for lack of space are in memory alone."""
    remembered: Mapping[Any, Any]
    for table, remembered in (("counters", contents.counters), ("keys", contents.keys)):
        number = 0
        for number, (name, *values) in enumerate(_rows(connection, table), 1):  # noqa: B007 - the count
            expected = remembered.get(name)
            if expected != (values[0] if table == "counters" else tuple(values)):
                raise ValueError(f"its {table} have {values} for {name!r}, and the memory {expected}")
        if number != len(remembered):
            raise ValueError(f"it has {number} {table}, and the memory {len(remembered)}")
    for client, sequence, results, _, owner in _rows(connection, "clients"):
        known = None if owner else contents.clients.get(client)
        if not owner and (known is None or known.sequence < sequence):
            raise ValueError(f"it knows a client at batch {sequence} that the memory does not")
        if known is not None and known.sequence == sequence and _encode(known.results) != results:
            raise ValueError(f"it has other results of a client's batch {sequence} than the memory")


def _statements(changes: Changes) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Yield the SQL statements of a commit, each with its values."""
    for name, value in changes.counters.items():
        if value is None:
            yield "DELETE FROM counters WHERE name = ?", (name,)
        else:
            yield "REPLACE INTO counters VALUES (?, ?, ?)", _sealed(name, value)
    for client, record in changes.clients.items():
        if record is None:
            yield "DELETE FROM clients WHERE client = ?", (client,)
        else:
            row = _sealed(client, record.sequence, _encode(record.results), float(record.used), record.object)
            yield "REPLACE INTO clients VALUES (?, ?, ?, ?, ?, ?)", row
    for key, known in changes.keys.items():
        if known is None:
            yield "DELETE FROM keys WHERE key = ?", (key,)
        else:
            row = _sealed(key, known.fingerprint, known.value, float(known.used))
            yield "REPLACE INTO keys VALUES (?, ?, ?, ?, ?)", row
    for name, state in changes.objects.items():
        if state is None:
            yield "DELETE FROM objects WHERE name = ?", (name,)
        else:
            yield "REPLACE INTO objects VALUES (?, ?, ?)", _sealed(name, state)


def _sealed(*values: object) -> tuple[object, ...]:
    """Return a row of these values, with its checksum."""
    return *values, crc32(_encode(values))


def _rows(connection: sqlite3.Connection, table: str, order: str | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table; raise `ValueError` for a row that does not match its checksum."""
    # Many rows at once, column by column, so that loops in C do the work for each row: there may be a million.
    ordered = f" ORDER BY {order}" if order else ""
    found = connection.execute(f"SELECT * FROM {table}{ordered}")  # noqa: S608 - names of our own
    while block := found.fetchmany(_ROWS_AT_ONCE):
        *columns, checksums = zip(*block, strict=True)
        right = tuple(map(crc32, map(_encode, zip(*columns, strict=True))))
        if right != checksums:
            wrong = next(row for row, one, other in zip(block, right, checksums, strict=True) if one != other)
            raise ValueError(f"a row of its {table} is not what was written: {wrong[0]!r}")
        yield from zip(*columns, strict=True)
