"""What differs between PostgreSQL, MariaDB or MySQL, and SQLite: connections, locks, errors, durability.

`sql.py` has everything that they share.
"""

import math
import os
import random
import select
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from ..errors import AccessDenied, Disconnected, InvalidRequest, OutcomeUnknown, StartupError, StorageFull
from ..journal import refusal
from ..ledger import Contents
from ..operations import LONGEST_NAME
from ..settings import LONGEST_DEADLINE
from ..store import Finding

try:
    import sqlalchemy as sa
    from sqlalchemy import URL, Column, Connection, Table, event, make_url
    from sqlalchemy.dialects import mysql, postgresql, sqlite
    from sqlalchemy.exc import ArgumentError, DisconnectionError, OperationalError

    from .sql import ErrorClass, SqlStore, TablesMissing, remaining
except ImportError as error:
    raise InvalidRequest("this store needs SQLAlchemy: pip install 'counter-server[sql]'") from error

_SHOWN = ("host", "port", "unix_socket")  # options in a URL that name a place, and no secret

_ok, _risk, _problem = (partial(Finding, level) for level in ("ok", "may lose", "problem"))
_ON_DISK = "a number is on its disk before it is answered"
_FAILOVER = "a failover may lose the last numbers, and repeat them"


def open_sql_store(url: str) -> SqlStore:
    """Return the store in the database that `url` names, as SQLAlchemy takes it. Nothing is connected yet.

    :raises InvalidRequest: if the driver is missing, or does not accept the URL. The message does not repeat it, as it
        may hold a password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidRequest("this is not a URL of a database, as SQLAlchemy takes them") from None
    shown = {name: value for name, value in parsed.query.items() if name in _SHOWN}
    name = parsed._replace(username=None, password=None).set(query=shown).render_as_string()
    kinds = {"sqlite": SqliteStore, "postgresql": PostgresqlStore}
    kind = kinds.get(parsed.get_backend_name(), MysqlStore)
    try:
        return kind(parsed, name)
    except ImportError as error:
        extra = "mysql" if kind is MysqlStore else "sql"
        raise InvalidRequest(f"this store needs {error.name}: pip install 'counter-server[{extra}]'") from error


# PostgreSQL

_STRIPES = 48  # locks for names; a transaction may hold 64 by default (`max_locks_per_transaction`)
_LOCK_CLASS = 0x43545352  # "CTSR": separates our advisory locks from those of other programs

# Advisory locks also lock names that have no row yet. Settings last for the transaction only: behind a pooler, the
# session serves other programs next. `synchronous_commit` makes a commit durable, `idle_in_transaction_session_timeout`
# frees the locks of a client that froze. The tables are read by their keys, however small they are.
_BEGIN_WRITE = """
BEGIN ISOLATION LEVEL READ COMMITTED;
SELECT set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true),
    set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), true),
    set_config('lock_timeout', '{0}', true), set_config('idle_in_transaction_session_timeout', '{0}', true);
SELECT pg_advisory_xact_lock({1}, stripe) FROM unnest('{{{2}}}'::integer[]) AS stripe
"""
_PG_SETTINGS = """
SELECT name, setting FROM pg_settings
WHERE name IN ('server_version', 'fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names')
UNION ALL SELECT 'in_recovery', pg_is_in_recovery()::text
UNION ALL SELECT 'standbys', count(*)::text FROM pg_stat_replication
"""

# SQLSTATEs, or their beginnings: https://www.postgresql.org/docs/current/errcodes-appendix.html
_PG_KINDS: dict[ErrorClass, tuple[str, ...]] = {
    TablesMissing: ("42P01", "42703"),
    AccessDenied: ("28", "42501"),
    StorageFull: ("53100",),
    StartupError: ("3D", "3F", "22P05", "22021"),  # no such database, no such schema, an encoding that lacks characters
    Disconnected: ("40", "55", "57", "53", "25", "08"),  # it works later, or on another server
}
# libpq does not report the SQLSTATE of a refused connection.
_PG_DENIED = (
    *("authentication failed", "no password supplied", "pg_hba.conf", "permission denied", "to log in", 'role "'),
)


class PostgresqlStore(SqlStore):
    """PostgreSQL by psycopg 3. Nothing is prepared, so a pooler in transaction mode may stand between."""

    clock = "extract(epoch FROM clock_timestamp())::float8"
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    insert = staticmethod(postgresql.insert)

    def __init__(self, url: URL, name: str) -> None:
        import psycopg
        from psycopg import conninfo, pq, waiting

        class TimedConnection(psycopg.Connection[Any]):
            """A connection whose calls end at the deadline of the current call.

            It waits by `select.poll`, as gevent patches that even after psycopg was imported.
            """

            def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:  # noqa: ARG002
                return waiting.wait_poll(gen, self.pgconn.socket, interval=interval, timeout=remaining())

        url = url.set(drivername="postgresql+psycopg")
        _, options = url.get_dialect()().create_connect_args(url)
        options = {option: value for option, value in options.items() if option not in ("connect_timeout", "context")}
        try:
            place = conninfo.make_conninfo(**{**options, "client_encoding": "UTF8"}).encode()
        except psycopg.Error as error:
            raise InvalidRequest(f"{name} is not a URL of PostgreSQL: {error}") from None

        def connect() -> TimedConnection:  # psycopg's own waits for 2 seconds at least
            opened = pq.PGconn.connect_start(place)
            while (status := opened.connect_poll()) != pq.PollingStatus.OK:
                if status == pq.PollingStatus.FAILED:
                    raise psycopg.OperationalError(opened.get_error_message())
                poll = select.poll()
                poll.register(opened.socket, select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT)
                if not poll.poll(math.ceil(remaining() * 1000)):
                    raise psycopg.OperationalError("no answer in time")
            opened.nonblocking = 1
            connection = TimedConnection(opened)
            connection.autocommit = True  # `BEGIN` goes with other statements, in one round trip
            connection.prepare_threshold = None
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                connection.close()
                raise StartupError(f"{name} has the encoding {encoding}: counters need UTF8")
            return connection

        super().__init__(url, name, connect, use_native_hstore=False)
        self._upsert_all = {table: self._of_arrays(table) for table in self._upsert}

    def is_wanted(self, column: Column[Any]) -> Any:
        return column == sa.any_(sa.bindparam("wanted", type_=_array_of(column)))

    def _of_arrays(self, table: Table) -> Any:
        """Return the statement that writes all rows at once: one parameter for each column, with its values."""
        columns = [sa.bindparam(column.name, type_=_array_of(column)) for column in table.c]
        rows = sa.func.unnest(*columns).table_valued(*table.c.keys()).render_derived()
        return self.replacing(table, self.insert(table).from_select(table.c.keys(), sa.select(*rows.c)))

    def write(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
        if len(rows) == 1:
            super().write(connection, table, rows)
        else:
            connection.execute(self._upsert_all[table], {name: [row[name] for row in rows] for name in rows[0]})

    def begin_write(self, connection: Connection, texts: set[str] | None) -> None:
        stripes = range(_STRIPES) if texts is None else {crc32(text.encode()) % _STRIPES for text in texts}
        ordered = ",".join(map(str, sorted(stripes)))  # the one order in which all batches take them
        connection.exec_driver_sql(_BEGIN_WRITE.format(math.ceil(remaining() * 1000), _LOCK_CLASS, ordered))

    def classify(self, error: Any, *, sent: bool) -> tuple[ErrorClass, str, bool]:
        text = " ".join(str(error).split())  # libpq adds advice, on lines of its own
        if error.sqlstate:
            sent = sent and error.diag.severity_nonlocalized != "ERROR"  # after which the server has rolled back
            kinds = (kind for kind, states in _PG_KINDS.items() if error.sqlstate.startswith(states))
            return next(kinds, OutcomeUnknown), text, sent
        if not sent and 'database "' in text and "does not exist" in text:
            return StartupError, text, sent
        return AccessDenied if not sent and any(words in text for words in _PG_DENIED) else Disconnected, text, sent

    def is_there(self, connection: Connection) -> bool:
        """See `SqlStore`. Tables of a schema that this user may not use look as if there were none."""
        if super().is_there(connection):
            return True
        if connection.scalar(sa.select(sa.func.current_schema())) is None:
            raise AccessDenied(f"{self} lets this user use none of the schemas in its search_path; nothing was counted")
        return False

    def findings(self, deadline: float) -> list[Finding]:
        with self.connection(deadline) as connection:
            return postgresql_findings(dict(connection.exec_driver_sql(_PG_SETTINGS).all()))


def _array_of(column: Column[Any]) -> postgresql.ARRAY[Any]:
    """Return the type of an array of a column's values; a collation belongs to the column, not to them."""
    return postgresql.ARRAY(sa.Text() if isinstance(column.type, sa.Text) else column.type)


_WAITS = {  # what a commit waits for, with a synchronous standby
    "on": _ok("synchronous_commit on: a number is on a synchronous standby's disk, too"),
    "remote_apply": _ok("synchronous_commit remote_apply: a synchronous standby has and shows a number, too"),
    "remote_write": _risk("synchronous_commit remote_write: a failover loses numbers if the standby's machine fails"),
    "local": _risk(f"synchronous_commit local: {_FAILOVER}"),
}


def postgresql_findings(settings: Mapping[str, str]) -> list[Finding]:
    """Return what these settings mean; ``synchronous_commit off`` means "on", as our transactions set it.

    See https://www.postgresql.org/docs/current/runtime-config-wal.html and runtime-config-replication.html.
    """
    found = [_ok(f"PostgreSQL {settings['server_version']}")]
    if settings["in_recovery"] == "true":
        return [*found, _problem("this is a standby, which takes no writes: name the primary")]
    synced = settings["fsync"] == "on"
    found.append(_ok(f"fsync on: {_ON_DISK}") if synced else _risk("fsync off: a power cut may destroy the database"))
    if settings["full_page_writes"] != "on":
        found.append(_risk("full_page_writes off: a power cut may destroy pages of it"))
    if settings["synchronous_standby_names"]:
        return [*found, _WAITS[settings["synchronous_commit"].replace("off", "on")]]
    if settings["standbys"] == "0":
        return [*found, _ok("no standbys: no failover that could lose numbers")]
    return [*found, _risk(f"{settings['standbys']} asynchronous standbys: {_FAILOVER}")]


# MariaDB and MySQL

# https://mariadb.com/kb/en/mariadb-error-code-reference/; 2xxx are of the client
_MYSQL_KINDS: dict[ErrorClass, tuple[int, ...]] = {
    TablesMissing: (1054, 1146),
    AccessDenied: (1044, 1045, 1130, 1142, 1143, 1227, 1370, 1410, 1698, 3118),
    StorageFull: (3, 1021, 1026, 1114),
    StartupError: (1046, 1049, 1153, 1286),  # no database named, no such database, too small a packet, no InnoDB
    Disconnected: (  # it works later, or on another server
        *(0, 1040, 1041, 1047, 1053, 1062, 1152, 1158, 1159, 1160, 1161, 1203, 1205, 1213, 1226, 1290, 1317, 1792),
        *(1836, 1927, 1969, 2002, 2003, 2006, 2013, 2014, 3024),
    ),
}
_UNDONE = (1062, 1205, 1213, 1290, 1792, 1836)  # rolled back: a row that exists, a lock, a deadlock, read-only
_NO_SPACE = ("errno: 28", "Errcode: 28", "error 28")
_LARGEST_PACKET = 4 * 2**20  # bytes; PyMySQL sends a megabyte of rows in one statement
# The server closes the connection of a client that froze, which frees its lock.
_SESSION = f"SET SESSION wait_timeout = {LONGEST_DEADLINE:.0f}, innodb_lock_wait_timeout = {LONGEST_DEADLINE:.0f}"
_NOT_INNODB = """
SELECT table_name FROM information_schema.tables
WHERE table_schema = DATABASE() AND engine <> 'InnoDB' AND table_name LIKE 'counter\\_server\\_%%'
"""
_REPLICAS = "SELECT count(*) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%%'"


# PyMySQL takes 14 microseconds for each row, so a row has many counters.
_IN_ONE_ROW = 5000
_LONGEST_ROW = f"SET SESSION group_concat_max_len = {_IN_ONE_ROW * (2 * LONGEST_NAME + 24)}"
_ROW_OF_COUNTERS = sa.text(
    "SELECT MAX(name), GROUP_CONCAT(HEX(name), ' ', value ORDER BY name SEPARATOR ' ') FROM"
    " (SELECT name, value FROM counter_server_counters WHERE name > :after ORDER BY name LIMIT :most) AS page"
)


class MysqlStore(SqlStore):
    """MariaDB (10.6 or later) or MySQL (8.0 or later) by PyMySQL.

    Writers lock one row, as names that have no rows cannot be locked without their neighbours. With READ COMMITTED
    they then read whatever was committed before they had the lock.
    """

    clock = "UNIX_TIMESTAMP(NOW(6)) + 0E0"
    begin_read = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
    creates_in_transaction = False
    insert = staticmethod(mysql.insert)

    def __init__(self, url: URL, name: str) -> None:
        from pymysql.connections import Connection as DriverConnection

        class TimedConnection(DriverConnection):
            """A connection whose reads and writes end at the deadline of the current call.

            PyMySQL 1.1 and 1.2 look at these attributes before each packet.
            """

            _read_timeout = _write_timeout = property(lambda _self: remaining(), lambda _self, _value: None)

        url = url.set(drivername=f"{url.get_backend_name()}+pymysql")
        try:
            _, options = url.get_dialect()().create_connect_args(url)
            options["init_command"] = _SESSION
            TimedConnection(**options, defer_connect=True)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{name} is not a URL of MySQL: {error}") from None

        def connect() -> TimedConnection:
            return TimedConnection(**{**options, "connect_timeout": remaining()})

        super().__init__(url, name, connect, isolation_level="READ COMMITTED")

    def begin_write(self, connection: Connection, texts: set[str] | None) -> None:  # noqa: ARG002 - it locks all
        connection.exec_driver_sql("SELECT version FROM counter_server_meta FOR UPDATE")

    def replacing(self, table: Table, insert: Any) -> Any:
        rest = {column.name: insert.inserted[column.name] for column in table.c if not column.primary_key}
        return insert.on_duplicate_key_update(rest)

    def all_counters(self, connection: Connection) -> Iterator[tuple[str, int]]:
        connection.exec_driver_sql(_LONGEST_ROW)
        after = b""
        while True:
            after, row = connection.execute(_ROW_OF_COUNTERS, {"after": after, "most": _IN_ONE_ROW}).one()
            if after is None:
                return
            words = iter((row if isinstance(row, str) else row.decode()).split(" "))
            yield from ((bytes.fromhex(name).decode(), int(value)) for name, value in zip(words, words, strict=True))

    def classify(self, error: Any, *, sent: bool) -> tuple[ErrorClass, str, bool]:
        code, *rest = error.args or (0,)
        text = " ".join(map(str, rest)) or "the connection is closed"
        kinds = (kind for kind, codes in _MYSQL_KINDS.items() if code in codes)
        kind = StorageFull if any(words in text for words in _NO_SPACE) else next(kinds, OutcomeUnknown)
        return kind, text, sent and code not in _UNDONE

    def findings(self, deadline: float) -> list[Finding]:
        with self.connection(deadline) as connection:
            settings: dict[str, str] = dict(connection.exec_driver_sql("SHOW GLOBAL VARIABLES").all())
            foreign = connection.exec_driver_sql(_NOT_INNODB).scalars().all()
            return mysql_findings(settings, foreign, connection.exec_driver_sql(_REPLICAS).scalar_one())


def mysql_findings(settings: Mapping[str, str], foreign: Sequence[str], replicas: int) -> list[Finding]:
    """Return what these global variables, tables without InnoDB and replicas mean.

    See https://mariadb.com/kb/en/innodb-system-variables/ and
    https://dev.mysql.com/doc/refman/en/replication-options-binary-log.html.
    """
    version, flush, sync = settings["version"], settings["innodb_flush_log_at_trx_commit"], settings.get("sync_binlog")
    found = [_ok(f"{'MariaDB' if 'maria' in version.lower() else 'MySQL'} {version}")]
    if settings.get("read_only") == "ON":
        return [*found, _problem("read_only ON: this server takes no writes: name the primary")]
    lost = _ON_DISK if flush == "1" else "a power cut may take the last second or two"
    found.append((_ok if flush == "1" else _risk)(f"innodb_flush_log_at_trx_commit {flush}: {lost}"))
    if settings.get("innodb_doublewrite") == "OFF":
        found.append(_risk("innodb_doublewrite OFF: a power cut may destroy pages of it"))
    if settings.get("log_bin") == "ON" and sync != "1":
        found.append(_risk(f"sync_binlog {sync}: after a power cut a replica may lack the last numbers"))
    if replicas:
        found.append(_risk(f"{replicas} asynchronous replicas: {_FAILOVER}"))
    if foreign:
        found.append(_problem(f"{', '.join(foreign)}: no transactions; run ALTER TABLE ... ENGINE = InnoDB"))
    if int(settings.get("max_allowed_packet", _LARGEST_PACKET)) < _LARGEST_PACKET:
        found.append(_problem(f"max_allowed_packet {settings['max_allowed_packet']}: too small; set 4M or more"))
    return found


# SQLite

# Seconds between attempts while another process writes, at random. SQLite's own pauses grow to 0.1: the process that
# came first would wait longest.
_PAUSES = (0.0002, 0.001)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_DENIED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)


class SqliteStore(SqlStore):
    """SQLite (3.32 or later): a file that the processes of one machine share, created by the first."""

    clock = "(julianday('now') - 2440587.5) * 86400.0"
    begin_read = "BEGIN"
    insert = staticmethod(sqlite.insert)

    def __init__(self, url: URL, name: str) -> None:
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            one = "write sqlite:////absolute/file.db, or memory:// for one process"
            raise InvalidRequest(f"{name} is not a file that processes can share: {one}")
        if url.query or url.host:
            raise InvalidRequest(f"{name} has a host or options: this store takes only a path")
        path = self._path = os.path.abspath(url.database)

        def connect() -> sqlite3.Connection:  # `_patiently` waits instead of SQLite, and `BEGIN` is ours
            connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                _patiently(connection.execute, "PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")  # with WAL: a sync at each commit
            except BaseException:
                connection.close()
                raise
            return connection

        super().__init__(url, name, connect)

        @event.listens_for(self.engine, "checkout")
        def check(_connection: Any, record: Any, _proxy: Any) -> None:
            file = os.stat(path)[1:3] if self._has_file() else None  # its inode and device
            if record.info.setdefault("file", file) != file:
                raise DisconnectionError("the file was removed or replaced")

    def exists(self, deadline: float) -> bool:
        return self._has_file() and super().exists(deadline)  # a connection would create the file

    def was_found(self) -> bool:
        return super().was_found() and self._has_file()

    def _has_file(self) -> bool:
        """Return whether the file is there, or raise `AccessDenied` if this process may not know."""
        try:
            os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise AccessDenied(f"{self} does not let this process in: {error.strerror}; nothing was counted") from error
        return True

    def begin_write(self, connection: Connection, texts: set[str] | None) -> None:  # noqa: ARG002 - it locks all
        _patiently(connection.exec_driver_sql, "BEGIN IMMEDIATE")

    def contents(self, deadline: float) -> Contents | None:
        return super().contents(deadline) if self._has_file() else None

    def classify(self, error: Any, *, sent: bool) -> tuple[ErrorClass, str, bool]:
        code, text = _code(error), str(error)
        if code in _BUSY:
            return Disconnected, text, False
        if code == sqlite3.SQLITE_ERROR and text.startswith("no such"):
            return TablesMissing, text, False
        refused = refusal(error, Path(self._path), committing=sent)
        if refused is not None:
            return StorageFull, str(refused.strerror), False
        return AccessDenied if code in _DENIED else OutcomeUnknown if sent else StartupError, text, sent

    def findings(self, deadline: float) -> list[Finding]:
        if not self._has_file():
            return [_problem(f"{self._path} does not exist yet: the first increment creates it")]
        with self.connection(deadline) as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        if mode != "wal":  # SQLite refuses a mode without an error
            return [_problem(f"journal_mode {mode}: its file system does not support WAL, which is needed")]
        return [_ok(f"SQLite {sqlite3.sqlite_version}"), _ok(f"journal_mode WAL, synchronous FULL: {_ON_DISK}")]


def _patiently(execute: Callable[[str], Any], statement: str) -> Any:
    """Execute a statement when other processes allow it."""
    while True:
        try:
            return execute(statement)
        except (sqlite3.OperationalError, OperationalError) as error:
            if _code(getattr(error, "orig", error)) not in _BUSY or remaining() <= 0.001:
                raise
        time.sleep(min(random.uniform(*_PAUSES), remaining()))


def _code(error: Any) -> int:
    """Return the error's class; its other bits are details."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
