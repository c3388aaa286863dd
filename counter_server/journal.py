"""Durable commits: the ledger's changes in SQLite, each commit one transaction.

A commit that returns is durable to the level asked for. One that raises `StorageFull` (no room, a quota, or a file
system that became read-only) changed nothing.
After any other failure nobody knows what the disk holds (a failed fsync may have written or lost the
pages: Rebello et al., "Can Applications Recover from fsync Failures?", 2020), so it is `JournalFailed`
and the process must end: the disk is read again by the next one.
"""

import errno
import logging
import os
import secrets
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from .errors import StartupError, StorageFull
from .journal_file import (
    Damaged,
    Header,
    compare,
    create,
    raise_unusable,
    read,
    recognise,
    refusal,
    sealed,
    sealed_client,
    sync,
    upgrade,
    verify,
)
from .ledger import Changes, Contents
from .operations import LARGEST
from .settings import Caps

log = logging.getLogger(__name__)

# SQLite in WAL mode: FULL syncs at every commit; NORMAL writes at every commit, so that a killed process
# loses nothing, and syncs at checkpoints, so that a power cut may lose the last commits.
_SYNCHRONOUS = {"commit": "FULL", "process": "NORMAL"}

_PUT_BACK = "put it back, or a backup: else numbers are lost, and given again"
_SMALLEST = 512  # bytes, of a page
_BACKUP_PAGES = 2000  # copied at once, between commits
_BACKUP_PAUSE = 0.002  # seconds, in which those that wait can commit


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
        self._mark = path.with_name(f"in-use.{path.name}")  # says how many bytes the log has at the least
        self._mark_file: int | None = None
        self._marked = 0
        self.epoch = ""  # identifies this state: it changes when some of the state is lost
        self.starts = 0  # how often a manager began on this file: see `count_start`
        self._committing = threading.Lock()  # held through a transaction: the ledger's, or one object's
        try:
            self._sync()
            begins_anew = self._is_rolled_back()
            self._look()
            if not path.exists():
                create(path)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError, ValueError) as error:
            raise_unusable(self.path, error)
        try:
            self._open(_SYNCHRONOUS[durability], begins_anew=begins_anew)
            self._files = {str(file): file.stat() for file in (path, self._log)}  # as they were when last looked at
            page_size = self._connection.execute("PRAGMA page_size").fetchone()[0]
            self._connection.execute(f"PRAGMA max_page_count = {max(most // page_size, 1)}")
        except BaseException as error:
            self._connection.close()
            if isinstance(error, (sqlite3.Error, OSError, ValueError, Damaged)):
                raise_unusable(self.path, error)
            raise

    def _sync(self) -> None:
        """Have on disk what is there to be read: the writer before us may have been killed between write and sync."""
        for path in (self.path, self._log, self.path.parent):
            with suppress(FileNotFoundError):
                sync(path)

    def _look(self) -> None:
        """Refuse what cannot be used, and leave it alone.

        What is not ours is refused before a connection that can write would fold its log in, and so is a log of
        another journal: SQLite would take its pages for those of this one.
        """
        there = self.path.exists()
        if there and (size := self.path.stat().st_size) < _SMALLEST:  # to SQLite, that is a new one
            raise StartupError(f"the journal {self.path} has {size} bytes, as none has: put back a copy, or remove it")
        header = Header.of(self.path) if there else Header(is_ours=True, keeps_log=False)
        if header.is_ours and not header.keeps_log and self._log.exists() and self._log.stat().st_size > 0:
            raise StartupError(
                f"{self._log} is not the log of {self.path}, which was removed or put back from a backup: move the log"
                " away, or put back the journal that it was written for"
            )
        if not there:
            return
        try:
            # Without locks, for whoever holds the directory; so without the file of shared memory beside the log, for
            # which a full disk has no room.
            uri = f"{self.path.absolute().as_uri()}?mode=ro&vfs=unix-none"
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                recognise(connection, self.path)
        except sqlite3.OperationalError as error:
            # Somebody was killed as he made a journal of a backup: to open it will undo that.
            if not header.is_ours or error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise

    def _is_rolled_back(self) -> bool:
        """Return whether numbers that were given are lost, with files that are gone since a manager was killed.

        Look before anything connects: SQLite may remove an empty log when a connection is closed.
        """
        try:
            least = max(int(self._mark.read_text() or 1), 1)
        except (FileNotFoundError, ValueError):
            return False
        if self.path.exists():
            is_backup = not Header.of(self.path).keeps_log  # which was put back
            if is_backup or (self._log.exists() and self._log.stat().st_size >= least):
                self._mark.unlink()
                return False
        log.error(
            "%s or its log was removed, replaced or cut while a manager used it: numbers that were given are lost, and"
            " some are given again; each process that used it is told so by StateLost",
            self.path,
        )
        return True

    def _open(self, synchronous: str, *, begins_anew: bool) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")  # one owner: no shared-memory file, no locks per commit
        recognise(self._connection, self.path)  # of a newer version, perhaps: when it could not be read before
        execute("PRAGMA journal_mode = WAL")
        execute(f"PRAGMA synchronous = {synchronous}")
        try:
            # After a failed fsync the kernel may hold what the disk does not have, and say that it does: what was read
            # is written again before it is believed.
            execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError as error:
            if refusal(error, self.path, committing=True) is None:  # else it stays in the log, and is read from there
                raise
        upgrade(self._connection)
        if begins_anew:
            self.epoch = secrets.token_hex(16)
            try:
                execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (self.epoch,))
                self._mark.unlink(missing_ok=True)
            except sqlite3.OperationalError as error:
                if refusal(error, self.path, committing=True) is None:
                    raise
        else:
            found = execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
            if found is None:
                raise Damaged("it has no epoch")
            self.epoch = str(found[0])

    def count_start(self) -> None:
        """Note that a manager begins. Where that cannot be written down for now, it is counted in memory alone.

        :raises StartupError: if the disk fails.
        """
        execute = self._connection.execute
        try:
            found = execute("SELECT value FROM meta WHERE name = 'starts'").fetchone()
            self.starts = (int(found[0]) if found else 0) + 1
            execute("REPLACE INTO meta VALUES ('starts', ?)", (str(self.starts),))
        except (sqlite3.Error, ValueError) as error:
            if refusal(error, self.path, committing=True) is None:
                raise_unusable(self.path, error)

    @property
    def size(self) -> int:
        """The bytes of the file and of its log."""
        total = 0
        for path in (self.path, self._log):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def load(self) -> Contents:
        """Everything that was committed.

        :raises StartupError: if the file is damaged.
        """
        try:
            verify(self._connection)
            return read(self._connection)
        except (sqlite3.Error, ValueError, Damaged) as error:
            raise_unusable(self.path, error)

    def check(self, contents: Contents) -> None:
        """Look at the whole file, and whether it holds `contents`. Nobody may commit meanwhile.

        :raises StartupError: if it is damaged or does not.
        """
        try:
            with self._committing:
                verify(self._connection, thoroughly=True)
                compare(self._connection, contents)
        except (sqlite3.Error, Damaged) as error:
            raise_unusable(self.path, error)

    def back_up(self, target: Path) -> int:
        """Copy the journal as it is at one moment into a new file, durably, while commits go on; return its bytes.

        The copy is one file that can be read anywhere, also where its directory cannot be written to.

        :raises StartupError: if the file is there already, or cannot be written. Nothing is left of it then.
        """
        part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        try:
            try:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                with closing(sqlite3.connect(part, isolation_level=None)) as copy:
                    with self._committing:
                        # SQLite carries what this connection commits in the pauses over to what it has copied already.
                        self._connection.backup(copy, pages=_BACKUP_PAGES, progress=self._pause)
                    copy.execute("PRAGMA journal_mode = DELETE")
                size = part.stat().st_size
                sync(part)
                os.link(part, target)  # and so never over another file
                sync(target.parent)
                return size
            finally:
                part.unlink(missing_ok=True)
        except FileExistsError as error:
            raise StartupError(f"{target} is there already, and was left as it is: name another file") from error
        except (sqlite3.Error, OSError) as error:
            raise StartupError(f"no backup can be written to {target}: {error}; the counters go on") from error

    def _pause(self, _status: int, remaining: int, _total: int) -> None:
        """Between two parts of a backup: who waits to commit goes first."""
        if remaining:
            self._committing.release()
            try:
                time.sleep(_BACKUP_PAUSE)
            finally:
                self._committing.acquire()

    def commit(self, changes: Changes) -> None:
        """Make `changes` durable in one transaction.

        :raises StorageFull: the file system refused to be written to; nothing was changed.
        :raises JournalFailed: nobody knows.
        """
        with self._committing:
            self._look_after_files(str(self._log))  # before, as well: a log that was cut is long again after a commit
            self._commit(changes)
            self._look_after_files()
            self._note(self._files[str(self._log)].st_size)

    def look_after_files(self) -> None:
        """Check that the files are still the ones that were opened, unless a commit under way does so.

        :raises JournalFailed: if not.
        """
        if self._committing.acquire(blocking=False):
            try:
                self._look_after_files()
            finally:
                self._committing.release()

    def _look_after_files(self, *paths: str) -> None:
        """Notice a file that was removed, replaced or cut: writes to it are lost. Called with the lock held."""
        for path in paths or self._files:
            before = self._files[path]
            try:
                status = os.stat(path)
            except OSError as error:
                left = f"nothing is lost, all is in {self.path}" if self._is_folded_in() else _PUT_BACK
                raise JournalFailed(f"{path} was removed while it was in use ({error.strerror}); {left}") from error
            if not os.path.samestat(status, before):
                fault = "replaced by another file"
            elif status.st_size < before.st_size:
                fault = f"cut from {before.st_size} to {status.st_size} bytes"
            else:
                self._files[path] = status
                continue
            self._note(LARGEST)
            raise JournalFailed(
                f"{path} was {fault} while it was in use; put back a backup, or numbers are given again"
            )

    def _note(self, size: int) -> None:
        """Note how long the log is, for whoever finds it shorter when this process was killed."""
        if size != self._marked:
            with suppress(OSError):  # where there is no room for it, it is not noticed
                if self._mark_file is None:  # kept open: the log grows with most commits at first
                    self._mark_file = os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.lseek(self._mark_file, 0, os.SEEK_SET)
                os.write(self._mark_file, b"%020d" % size)
                self._marked = size

    def _is_folded_in(self) -> bool:
        """Fold the log into the journal, if only the log was removed: SQLite has it still open."""
        with suppress(sqlite3.Error, OSError):
            is_there = os.path.samestat(self.path.stat(), self._files[str(self.path)])
            if is_there and self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0:
                self._mark.unlink(missing_ok=True)
                return True
        return False

    def _commit(self, changes: Changes) -> None:
        execute = self._connection.execute
        try:
            execute("BEGIN IMMEDIATE")
            for name, value in changes.counters.items():
                if value is None:
                    execute("DELETE FROM counters WHERE name = ?", (name,))
                else:
                    execute("REPLACE INTO counters VALUES (?, ?, ?)", sealed(name, value))
            for client, record in changes.clients.items():
                if record is None:
                    execute("DELETE FROM clients WHERE client = ?", (client,))
                else:
                    execute("REPLACE INTO clients VALUES (?, ?, ?, ?, ?, ?)", sealed_client(client, record))
            for key, known in changes.keys.items():
                if known is None:
                    execute("DELETE FROM keys WHERE key = ?", (key,))
                else:
                    row = sealed(key, known.fingerprint, known.value, float(known.used))
                    execute("REPLACE INTO keys VALUES (?, ?, ?, ?, ?)", row)
            for name, state in changes.objects.items():
                execute("REPLACE INTO objects VALUES (?, ?, ?)", sealed(name, state))
            execute("COMMIT")
        except BaseException as error:
            raise self._undone(error) from error

    def _undone(self, error: BaseException) -> StorageFull | JournalFailed:
        """What to raise for a commit that failed of `error`: it was undone, where that can be known."""
        refused = refusal(error, self.path, committing=True)
        if refused is None:
            return JournalFailed(f"the journal {self.path} failed: {error}")
        self._roll_back()
        cap = ", or it has the bytes that --max-journal-bytes allows" if refused.errno == errno.ENOSPC else ""
        return StorageFull(
            f"{self.path} cannot be written to: {refused.strerror}{cap}; nothing was counted, and reads go on"
        )

    def _roll_back(self) -> None:
        # After a write that failed SQLite has mostly rolled back by itself.
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                raise JournalFailed(f"the journal {self.path} could not be rolled back: {error}") from error

    def close(self) -> None:
        """Fold the log into the file where possible (everything committed is safe without), and let go."""
        with suppress(sqlite3.Error, JournalFailed), self._committing:
            try:
                self._look_after_files()
                self._mark.unlink(missing_ok=True)  # first: SQLite removes the log
            finally:
                self._connection.close()
                if self._mark_file is not None:
                    os.close(self._mark_file)
                    self._mark_file = None
