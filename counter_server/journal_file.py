"""The journal's file: its tables, a checksum in every row, and how damage is found out before anything is believed.

SQLite's own checks find what is wrong with the structure: a page that is cut off, a row that is lost. A bit that flips
within a number is none of that, so each row carries the CRC-32 of what it holds.
"""

import errno
import os
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self
from zlib import crc32

from msgspec import msgpack

from .errors import StartupError
from .ledger import ClientRecord, Contents, KeyRecord
from .operations import Result

APPLICATION_ID = 0x43545352  # "CTSR", in the file's header: tells our journal from any other SQLite file
VERSION = 2
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE clients (client BLOB PRIMARY KEY, sequence INTEGER NOT NULL, results BLOB NOT NULL, used REAL NOT NULL,
    object TEXT NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE objects (name TEXT PRIMARY KEY, state BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE keys (key TEXT PRIMARY KEY, fingerprint BLOB NOT NULL, value INTEGER NOT NULL, used REAL NOT NULL,
    checksum INTEGER NOT NULL) WITHOUT ROWID;
"""
_TABLES = {statement.strip() for statement in SCHEMA.split(";")} - {""}
_TABLES_OF_VERSION_1 = {re.sub(r",\s+checksum INTEGER NOT NULL", "", table) for table in _TABLES}
_COLUMNS = {
    "counters": "name, value",
    "clients": "client, sequence, results, used, object",
    "objects": "name, state",
    "keys": "key, fingerprint, value, used",
}

# Of a file system that is as it was, and takes no more for now.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_NOT_OPENED = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
_TRIED_BYTES = 65536  # more than the largest single write of SQLite's, so what it had no room for has none here

_ROWS_AT_ONCE = 200  # so few that they stay in the processor's cache

_encode = msgpack.Encoder().encode
_decode_results = msgpack.Decoder(list[Result]).decode


class Damaged(Exception):
    """What stands in the file is not what was written to it."""


def refusal(error: BaseException, path: Path, *, committing: bool = False) -> OSError | None:
    """Find out why the file system takes no writes for now; None if that is not the cause of `error`.

    SQLite reports a full disk, and keeps every other reason to itself. So another write is tried: beside the file, and
    at the same distance from the beginning, for there may be a limit of the size of files.

    :param committing: a commit failed: accept only errors after which the log is without the end of that commit.
    """
    if isinstance(error, OSError):
        return error if error.errno in REFUSALS else None
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, "its disk is full")
    if code is None or not (code == sqlite3.SQLITE_IOERR_WRITE or (not committing and code & 0xFF in _NOT_OPENED)):
        return None
    try:
        log = path.with_name(path.name + "-wal")
        sizes = [file.stat().st_size for file in (path, log) if file.exists()]
        try_to_write(path.parent, max(sizes, default=0))
    except OSError as failure:
        return failure if failure.errno in REFUSALS else None
    return None


def try_to_write(directory: Path, offset: int) -> None:
    """Write to a new file, from `offset` on, and leave nothing of it.

    :raises OSError: with the reason, if the file system does not take it.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        end = offset + _TRIED_BYTES
        while offset < end:  # of what is written in part only, the next write gives the reason
            offset += os.pwrite(file.fileno(), bytes(end - offset), offset)


def raise_unusable(path: Path, error: Exception) -> NoReturn:
    """Raise the error of a file that could not be read, or made: its cause is an `OSError` if it may work later."""
    refused = refusal(error, path)
    if refused is not None:
        raise StartupError(
            f"the journal {path} cannot be used for now: {refused.strerror}; nothing was changed: free some room, and"
            " start again"
        ) from refused
    raise StartupError(
        f"the journal {path} cannot be used ({error}); it was left as it is: put back a copy, or mend its disk"
    ) from error


def sealed(*values: object) -> tuple[object, ...]:
    """A row of these values, with its checksum."""
    return *values, crc32(_encode(values))


def sealed_client(client: bytes, record: ClientRecord) -> tuple[object, ...]:
    return sealed(client, record.sequence, _encode(record.results), float(record.used), record.object)


def rows(connection: sqlite3.Connection, table: str, order: str | None = None) -> Iterator[tuple[Any, ...]]:
    """The rows of a table, each as it was written.

    :raises Damaged: if one is not.
    """
    return chain.from_iterable(_blocks(connection, table, order))


def _blocks(connection: sqlite3.Connection, table: str, order: str | None) -> Iterator[Iterable[tuple[Any, ...]]]:
    # Some at once, column by column: so what is done with each row is done by loops in C, as there may be a million.
    ordered = f" ORDER BY {order}" if order else ""
    found = connection.execute(f"SELECT {_COLUMNS[table]}, checksum FROM {table}{ordered}")  # noqa: S608
    while block := found.fetchmany(_ROWS_AT_ONCE):
        *columns, checksums = zip(*block, strict=True)
        right = tuple(map(crc32, map(_encode, zip(*columns, strict=True))))
        if right != checksums:
            wrong = next(row for row, one, other in zip(block, right, checksums, strict=True) if one != other)
            raise Damaged(f"a row of its {table} is not what was written: {wrong[0]!r}")
        yield zip(*columns, strict=True)


def recognise(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse what was not written by us, or not by us as we are now.

    :raises StartupError: if so.
    """
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
    )
    connection.execute("SELECT count(*) FROM sqlite_master")  # it is looked at no sooner than that
    if application != APPLICATION_ID:
        raise StartupError(f"{path} is not a journal of counter_server; it was left as it is")
    if version > VERSION:
        raise StartupError(
            f"the journal {path} has format {version}, of a newer counter_server; this one reads {VERSION}"
        )


class Header(NamedTuple):
    """What a database's first bytes tell (https://www.sqlite.org/fileformat2.html)."""

    is_ours: bool
    keeps_log: bool  # is written by way of a log, as a journal is, and a backup is not

    @classmethod
    def of(cls, path: Path) -> Self:
        with path.open("rb") as file:
            header = file.read(100)
        return cls(header[68:72] == APPLICATION_ID.to_bytes(4, "big"), header[18:19] == b"\2")


def create(path: Path) -> None:
    """Make a new journal, whole under another name first: who is killed meanwhile leaves none of it behind."""
    part = path.with_name(f".{path.name}.part")
    leftovers = [part.with_name(part.name + suffix) for suffix in ("", "-wal", "-journal", "-shm")]
    try:
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        with closing(sqlite3.connect(part, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN; {SCHEMA}")
            connection.execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(16),))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
            # To close it would fold the log in, too, but not say when that fails; and the log is removed below.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have on the disk what was written to the file, or the names that are in the directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def upgrade(connection: sqlite3.Connection) -> None:
    """Give the rows of version 1 their checksums, in one transaction.

    :raises Damaged: if it is no version that there ever was.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    if version != 1 or _tables(connection) != _TABLES_OF_VERSION_1:
        raise Damaged(f"its format is said to be {version}, and is not")
    connection.create_function("checksum", -1, lambda *values: crc32(_encode(values)), deterministic=True)
    old = "".join(f"ALTER TABLE {table} RENAME TO old_{table};" for table in ("meta", *_COLUMNS))
    copied = "".join(
        f"INSERT INTO {table} SELECT {columns}, checksum({columns}) FROM old_{table}; DROP TABLE old_{table};"  # noqa: S608
        for table, columns in _COLUMNS.items()
    )
    meta = "INSERT INTO meta SELECT * FROM old_meta; DROP TABLE old_meta;"
    try:
        connection.executescript(f"BEGIN IMMEDIATE; {old} {SCHEMA} {meta} {copied} PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def verify(connection: sqlite3.Connection, *, thoroughly: bool = False) -> None:
    """Look at the structure of the whole file.

    :param thoroughly: compare indexes with their tables, too.
    :raises Damaged: naming what was found first.
    """
    (found,) = connection.execute(f"PRAGMA {'integrity' if thoroughly else 'quick'}_check(1)").fetchone()
    if found != "ok":
        raise Damaged(" ".join(found.split()))
    if _tables(connection) != _TABLES:
        raise Damaged("its tables are not those of a journal")


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {statement for (statement,) in connection.execute("SELECT sql FROM sqlite_master WHERE type = 'table'")}


def read(connection: sqlite3.Connection) -> Contents:
    """Everything that was committed.

    :raises Damaged: if a row is not what was written.
    :raises ValueError: if what a client was answered makes no sense.
    """
    return Contents(
        counters=dict(rows(connection, "counters", "name")),
        clients={
            client: ClientRecord(sequence, _decode_results(results), used, name)
            for client, sequence, results, used, name in rows(connection, "clients", "used")
        },
        keys={
            key: KeyRecord(fingerprint, value, used)
            for key, fingerprint, value, used in rows(connection, "keys", "used")
        },
        objects=dict(rows(connection, "objects")),
    )


def compare(connection: sqlite3.Connection, contents: Contents) -> None:
    """Look whether the file holds what the memory does. (What was refused for want of room is in memory alone.)

    :raises Damaged: naming what differs first.
    """
    number = 0
    for name, value in rows(connection, "counters"):
        number += 1
        if contents.counters.get(name) != value:
            raise Damaged(f"it has {value} for {name!r}, and the memory {contents.counters.get(name)}")
    if number != len(contents.counters):
        raise Damaged(f"it has {number} counters, and the memory {len(contents.counters)}")
    number = 0
    for key, *record in rows(connection, "keys"):
        number += 1
        if contents.keys.get(key) != KeyRecord(*record):
            raise Damaged(f"it has {record[1]} for the idempotency key {key!r}, and the memory another number")
    if number != len(contents.keys):
        raise Damaged(f"it has {number} idempotency keys, and the memory {len(contents.keys)}")
    for client, sequence, results, _, owner in rows(connection, "clients"):
        known = None if owner else contents.clients.get(client)
        if not owner and (known is None or known.sequence < sequence):
            raise Damaged(f"it knows a client at batch {sequence} that the memory does not")
        if known is not None and known.sequence == sequence and _encode(known.results) != results:
            raise Damaged(f"it has other results of a client's batch {sequence} than the memory")


def examine(path: Path) -> Contents:
    """What the journal or backup at `path` holds, all of it checked. Nothing is changed.

    :raises StartupError: if it is damaged, is none, or cannot be read; naming it.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            recognise(connection, path)
            if connection.execute("PRAGMA user_version").fetchone()[0] < VERSION:
                raise StartupError(f"{path} has an older format, without checksums: start a manager on it once")
            verify(connection, thoroughly=True)
            return read(connection)
    except (sqlite3.Error, OSError, ValueError, Damaged) as error:
        raise_unusable(path, error)
