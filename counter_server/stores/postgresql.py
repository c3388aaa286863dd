"""PostgreSQL behind `SqlStore`.

What is sent together is one round trip (libpq's pipeline mode): one to lock and read, one to write and commit; a batch
of plain increments is one round trip in all, so nobody waits for a client while a counter is locked.

The locks are advisory ones, of the transaction, taken in one order before anything is read: what is not there yet can
be locked too, and what waited for a lock reads what was committed meanwhile. A name has one of `_STRIPES`, so that no
batch holds more locks than a server has for each connection (`max_locks_per_transaction`, 64).
"""

import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Collection
from zlib import crc32

from msgspec import json as packed
from sqlalchemy.dialects import postgresql as dialect
from sqlalchemy.engine import URL

from ..errors import AccessDenied, Disconnected, InvalidRequest, OutcomeUnknown, StartupError, StorageFull
from ..ledger import Changes, ClientRecord, Contents, KeyRecord
from ..operations import Batch, Increment, Result
from ..store import Finding
from .postgresql_findings import QUERY, judge
from .tables import VERSION, Found, Marks, TablesMissing, Wanted, check_version, creation

try:
    import psycopg
    from psycopg.conninfo import make_conninfo

    from .pipeline import Pipeline, Row, Statement, Value
except ImportError as error:
    raise InvalidRequest("this store needs psycopg: pip install 'counter-server[sql]'") from error

_STRIPES = 48
_LOCK_CLASS = 0x43545352  # "CTSR": keeps our locks apart from those of other programs
_CREATING = -1  # the lock of who makes the tables

# At each statement, what was committed before it.
_BEGIN = ("BEGIN ISOLATION LEVEL READ COMMITTED", ())
# Nothing is set for longer than a transaction: behind a pooler the next one in this session may be anybody's. Tables
# are read by their keys, however small they are; a commit is one.
_LOCK = """
SELECT set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true),
    set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), true),
    set_config('lock_timeout', $1, true), pg_advisory_xact_lock($2::integer, stripe)
FROM unnest($3::integer[]) AS stripe
"""
_MARKS = Marks("''::bytea")
_META = f"""
SELECT epoch, extract(epoch FROM clock_timestamp())::float8, sequence, results, used
FROM counter_server_meta LEFT JOIN counter_server_clients ON client = $1::bytea WHERE version = $2::integer
AND {_MARKS.are_there}
"""  # noqa: S608 - our own names
_COUNTERS = "SELECT name, value FROM counter_server_counters WHERE name = ANY($1::text[])"
_LOCKED_COUNTERS = f"{_COUNTERS} ORDER BY name FOR UPDATE"  # whoever else writes to the table has to wait, too
_KEYS = "SELECT key, fingerprint, value, used FROM counter_server_keys WHERE key = ANY($1::text[])"
_PAGE = """
SELECT name, value FROM counter_server_counters WHERE name > $1::text COLLATE "C" ORDER BY name LIMIT $2::bigint
"""
_SET_COUNTERS = """
INSERT INTO counter_server_counters SELECT * FROM unnest($1::text[], $2::bigint[])
ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
_DELETE_COUNTERS = "DELETE FROM counter_server_counters WHERE name = ANY($1::text[])"
_SET_CLIENT = """
INSERT INTO counter_server_clients VALUES ($1::bytea, $2::bigint, $3::text, $4::float8)
ON CONFLICT (client) DO UPDATE SET sequence = excluded.sequence, results = excluded.results, used = excluded.used
"""
_SET_KEYS = """
INSERT INTO counter_server_keys SELECT * FROM unnest($1::text[], $2::bytea[], $3::bigint[], $4::float8[])
ON CONFLICT (key) DO UPDATE SET fingerprint = excluded.fingerprint, value = excluded.value, used = excluded.used
"""
_DELETE_KEYS = "DELETE FROM counter_server_keys WHERE key = ANY($1::text[])"
# Each name's total, if this batch is the client's next one; from it each increment's number, which is that much less.
_INCREMENT = """
WITH added AS (
    INSERT INTO counter_server_counters AS counter SELECT * FROM unnest($5::text[], $6::bigint[])
    WHERE EXISTS (SELECT FROM counter_server_meta WHERE version = $3::integer AND epoch = $4::text)
    AND EXISTS (SELECT FROM counter_server_counters WHERE name = '')
    AND $2::bigint = 1 + coalesce((SELECT sequence FROM counter_server_clients WHERE client = $1::bytea), 0)
    ON CONFLICT (name) DO UPDATE SET value = counter.value + excluded.value
    RETURNING name, value
)
INSERT INTO counter_server_clients AS known
SELECT $1::bytea, $2::bigint, json_agg(added.value - later ORDER BY place)::text,
    extract(epoch FROM clock_timestamp())::float8
FROM unnest($7::text[], $8::bigint[]) WITH ORDINALITY AS increment (name, later, place) JOIN added USING (name)
HAVING count(*) > 0
ON CONFLICT (client) DO UPDATE SET sequence = excluded.sequence, results = excluded.results, used = excluded.used
RETURNING results
"""
_FORGET = """
DELETE FROM counter_server_{table} WHERE {column} IN (
    SELECT {column} FROM counter_server_{table} WHERE used <= extract(epoch FROM clock_timestamp()) - $1::float8
    LIMIT $2::bigint FOR UPDATE SKIP LOCKED
) RETURNING 1
"""

# States of SQL, or their first two characters: https://www.postgresql.org/docs/current/errcodes-appendix.html
_MISSING = ("42P01", "42703")  # a table, a column
_DENIED = ("28", "42501")
_FULL = ("53100",)
_ABSENT = ("3D", "3F", "22P05", "22021")  # a database, a schema, an encoding that has all characters
_PASSING = ("40", "55", "57", "53", "25", "08")  # it will do it later, or another server will in its place
# libpq does not tell the state of what refuses a connection.
_DENIED_TEXTS = ("authentication failed", "no password supplied", "pg_hba.conf", "permission denied", "to log in")
_ROLE_ABSENT = 'role "'

_encode_results = packed.Encoder().encode
_decode_results = packed.Decoder(list[Result]).decode


class PostgresqlEngine:
    """An `Engine` of one database.

    :raises InvalidRequest: if libpq does not take the URL.
    """

    def __init__(self, url: URL, name: str) -> None:
        self._name = name
        _, options = dialect.psycopg.dialect().create_connect_args(url)  # type: ignore[no-untyped-call]
        options.pop("connect_timeout", None)  # each call has its own deadline
        try:
            self._conninfo = make_conninfo(**{**options, "client_encoding": "UTF8"}).encode()
        except psycopg.Error as error:
            raise InvalidRequest(f"{name} is not a URL of PostgreSQL: {error}") from None

    def connect(self, deadline: float) -> "PostgresqlConnection":
        return PostgresqlConnection(self._conninfo, deadline)

    def findings(self, deadline: float) -> list[Finding]:
        connection = self.connect(deadline)
        try:
            (rows,) = connection.exchange((QUERY, ()))
        finally:
            connection.close()
        return judge({name or "": setting or "" for name, setting in rows})

    def translated(self, error: Exception, *, sent: bool) -> Exception:
        if not isinstance(error, (psycopg.Error, TimeoutError)):
            return error
        state = getattr(error, "sqlstate", None) or ""
        text = " ".join(str(error).split())  # libpq adds advice, on lines of its own
        if isinstance(error, TimeoutError) or not state:
            return self._unconnected(text, sent=sent)
        # With an error the server has rolled back. With its last words it may have committed before.
        sent = sent and isinstance(error, psycopg.Error) and error.diag.severity_nonlocalized != "ERROR"
        if state.startswith(_DENIED):
            return AccessDenied(f"{self._name} does not let this process in: {text}; nothing was counted")
        if state.startswith(_FULL):
            return StorageFull(f"{self._name} has no room: {text}; nothing was counted, and reads go on")
        if state.startswith(_ABSENT):
            return StartupError(f"{self._name} cannot be used: {text}")
        if state.startswith((*_PASSING, *_MISSING)):
            return Disconnected(f"{self._name}: {text}", sent=sent)
        return OutcomeUnknown(f"{self._name} failed: {text}")

    def _unconnected(self, text: str, *, sent: bool) -> Exception:
        if not sent:
            if any(words in text for words in _DENIED_TEXTS) or (_ROLE_ABSENT in text and "does not exist" in text):
                return AccessDenied(f"{self._name} does not let this process in: {text}; nothing was counted")
            if 'database "' in text and "does not exist" in text:
                return StartupError(f"{self._name} cannot be used: {text}")
        return Disconnected(f"{self._name}: {text}", sent=sent)


class PostgresqlConnection(Pipeline):
    """A `Connection` to a server."""

    def __init__(self, conninfo: bytes, deadline: float) -> None:
        super().__init__(conninfo, deadline)
        self.sent = False

    def exchange(self, *statements: Statement) -> list[list[Row]]:
        """As a pipeline does it.

        :raises TablesMissing: if there are none, or no such columns in them.
        """
        try:
            return super().exchange(*statements)
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as error:
            self.restart()
            raise TablesMissing from error

    def create(self, place: str) -> bool:
        encoding = self.parameter(b"server_encoding")
        if encoding != b"UTF8":
            raise StartupError(f"{place} has the encoding {(encoding or b'').decode()}: counters need UTF8")
        # In one transaction: to lock, make, and look.
        *_, versions, marks = self.exchange(
            _BEGIN,
            self._lock([_CREATING]),
            *((statement, ()) for statement in creation(dialect.dialect())),  # type: ignore[no-untyped-call]
            ("SELECT version FROM counter_server_meta", ()),
            (_MARKS.select, ()),
        )
        for (version,) in versions:
            check_version(int(version or 0), place)
        if versions and len(marks) == _MARKS.count:
            self.end()
            return False
        row = (str(VERSION), secrets.token_hex(16))
        self.sent = True
        self.exchange(
            ("DELETE FROM counter_server_meta", ()),
            ("INSERT INTO counter_server_meta VALUES ($1::integer, $2::text)", row),
            *((statement, ()) for statement in _MARKS.inserts),
            ("COMMIT", ()),
        )
        self.sent = False
        return len(marks) < _MARKS.count and bool(versions or marks)

    def _lock(self, stripes: list[int]) -> Statement:
        patience = max(1, math.ceil((self.deadline - time.monotonic()) * 1000))
        return _LOCK, (str(patience), str(_LOCK_CLASS), json.dumps(stripes).translate(_BRACES))

    def read(self, wanted: Wanted) -> Found:
        begin = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", ())
        return self._found(wanted, begin, counters=_COUNTERS, end=("COMMIT", ()))

    def begin(self, wanted: Wanted) -> Found:
        return self._found(wanted, _BEGIN, self._lock(_stripes(wanted)), counters=_LOCKED_COUNTERS)

    def _found(
        self,
        wanted: Wanted,
        *before: Statement,
        counters: str,
        end: Statement | None = None,
    ) -> Found:
        statements = [
            (_META, (_bytes(wanted.client), str(VERSION))),
            (counters, (_array(wanted.names),)),
            (_KEYS, (_array(wanted.keys),)),
            *((_PAGE, (after, str(limit))) for after, limit in wanted.pages),
        ]
        if not wanted.keys:
            del statements[2]
        answers = self.exchange(*before, *statements, *([end] if end else []))[len(before) :]
        meta = answers[0]
        if not meta:
            if end is None:
                self.end()
            raise TablesMissing
        contents = Contents()
        ((epoch, now, sequence, results, used),) = meta
        if sequence is not None:
            contents.clients[wanted.client] = ClientRecord(
                int(sequence), _decode_results(results or ""), float(used or 0)
            )
        contents.counters = {name or "": int(value or 0) for name, value in answers[1]}
        if wanted.keys:
            for key, fingerprint, value, used in answers[2]:
                contents.keys[key or ""] = KeyRecord(_unbytes(fingerprint), int(value or 0), float(used or 0))
        for page in answers[len(statements) - len(wanted.pages) : len(statements)]:
            contents.counters.update((name or "", int(value or 0)) for name, value in page)
        return Found(epoch or "", float(now or 0), contents)

    def commit(self, changes: Changes) -> None:
        statements: list[Statement] = []
        values = {name: str(value) for name, value in changes.counters.items() if value is not None}
        if values:
            statements.append((_SET_COUNTERS, (_array(values), _array(values.values()))))
        if len(values) < len(changes.counters):
            statements.append((_DELETE_COUNTERS, (_array(changes.counters.keys() - values.keys()),)))
        for client, record in changes.clients.items():
            if record is not None:
                results = _encode_results(record.results).decode()
                statements.append((_SET_CLIENT, (_bytes(client), str(record.sequence), results, str(record.used))))
        keys = {key: record for key, record in changes.keys.items() if record is not None}
        if len(keys) < len(changes.keys):
            statements.append((_DELETE_KEYS, (_array(changes.keys.keys() - keys.keys()),)))
        if keys:
            columns = zip(
                *((_bytes(known.fingerprint), str(known.value), str(known.used)) for known in keys.values()),
                strict=True,
            )
            statements.append((_SET_KEYS, (_array(keys), *map(_array, columns))))
        self.sent = True
        self.exchange(*statements, ("COMMIT", ()))

    def end(self) -> None:
        self.exchange(("ROLLBACK", ()))

    def undo(self) -> bool:
        return False

    def increment(self, batch: Batch, epoch: str) -> list[Result] | None:
        names = [operation.name for operation in batch.operations if isinstance(operation, Increment)]
        totals = Counter(names)
        seen: Counter[str] = Counter()
        later = []
        for name in names:
            seen[name] += 1
            later.append(str(totals[name] - seen[name]))
        values = (
            *(_bytes(batch.client), str(batch.sequence), str(VERSION), epoch),
            *(_array(totals), _array([str(total) for total in totals.values()])),
            *(_array(names), _array(later)),
        )
        self.sent = True
        try:
            lock = self._lock(_stripes(Wanted(batch.client, list(totals), [], [])))
            *_, answer, _ = self.exchange(_BEGIN, lock, (_INCREMENT, values), ("COMMIT", ()))
        except psycopg.errors.NumericValueOutOfRange:
            self.restart()
            answer = []
        except TablesMissing:
            answer = []
        self.sent = False
        return _decode_results(answer[0][0] or "") if answer else None

    def forget(self, client_lifetime: float, key_lifetime: float, most: int) -> int:
        forgotten = self.exchange(
            (_FORGET.format(table="clients", column="client"), (str(client_lifetime), str(most))),
            (_FORGET.format(table="keys", column="key"), (str(key_lifetime), str(most))),
        )
        return sum(map(len, forgotten))


def _stripes(wanted: Wanted) -> list[int]:
    """The locks of a batch, in the one order that all take them in. A page is of any name."""
    if wanted.pages:
        stripes = set(range(_STRIPES))
    else:
        stripes = {crc32(text.encode()) % _STRIPES for texts in (wanted.names, wanted.keys) for text in texts}
    return [*sorted(stripes), _STRIPES + int.from_bytes(wanted.client[:3], "big")]


_BRACES = str.maketrans("[]", "{}")


def _array(texts: Collection[str]) -> str:
    """An array as PostgreSQL reads it; each of its texts in quotes."""
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return '{"' + '","'.join(quoted) + '"}' if texts else "{}"


def _bytes(value: bytes) -> str:
    return "\\x" + value.hex()


def _unbytes(value: Value) -> bytes:
    return bytes.fromhex((value or "")[2:])
