"""The tables of the SQL stores, their URLs, and what of them a batch touches."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import InvalidRequest, StartupError
from ..ledger import Contents
from ..operations import Batch, Delete, Get, Increment, Scan, Set

try:
    from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text
    from sqlalchemy.engine import URL, Dialect, make_url
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.schema import CreateIndex, CreateTable
except ImportError as error:
    raise InvalidRequest("this store needs SQLAlchemy: pip install 'counter-server[sql]'") from error

VERSION = 1  # of the tables
_SHOWN = ("host", "port")  # options in a URL's query that tell a place, and no secret

_metadata = MetaData()
# By code point everywhere: SQLite compares so by itself, PostgreSQL where it is told to.
_text = Text().with_variant(Text(collation="C"), "postgresql")

Table(
    "counter_server_meta",
    _metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Text, nullable=False),
)
Table(
    "counter_server_counters",
    _metadata,
    Column("name", _text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
# No index on `used` here: PostgreSQL could then not update a client's row in place, as every batch does.
Table(
    "counter_server_clients",
    _metadata,
    Column("client", LargeBinary, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("results", Text, nullable=False),
    Column("used", Double, nullable=False),
)
_keys = Table(
    "counter_server_keys",
    _metadata,
    Column("key", _text, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("value", BigInteger, nullable=False),
    Column("used", Double, nullable=False),
)
Index("counter_server_keys_used", _keys.c.used)


class Marks:
    """A row of ours in each table, under a name that nothing else has. Where it is missing, the table was emptied.

    :param blank: no bytes, as the database spells it.
    """

    def __init__(self, blank: str) -> None:
        rows = (
            ("counters", "name", "''", "'', 0"),
            ("clients", "client", blank, f"{blank}, 0, '[]', 1e308"),  # 1e308: it does not expire
            ("keys", "key", "''", f"'', {blank}, 0, 1e308"),
        )
        found = [f"SELECT 1 FROM counter_server_{table} WHERE {column} = {mark}" for table, column, mark, _ in rows]  # noqa: S608 - our own names
        self.select = " UNION ALL ".join(found)
        self.are_there = " AND ".join(f"EXISTS ({each})" for each in found)
        self.inserts = [
            f"INSERT INTO counter_server_{table} VALUES ({row}) ON CONFLICT DO NOTHING"  # noqa: S608
            for table, _, _, row in rows
        ]
        self.count = len(rows)


def parse_url(url: str) -> URL:
    """`url` in its parts.

    :raises InvalidRequest: if it is none; without repeating it, as it may hold a password.
    """
    try:
        return make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidRequest("this is not a URL of a database, as SQLAlchemy takes them") from None


def shown(url: URL) -> str:
    """It without who logs in, and how."""
    query = {name: value for name, value in url.query.items() if name in _SHOWN}
    return url._replace(username=None, password=None).set(query=query).render_as_string()


def creation(dialect: Dialect) -> Iterator[str]:
    """The statements that make the tables where they are not there; for one process at a time."""
    for table in _metadata.sorted_tables:
        yield str(CreateTable(table, if_not_exists=True).compile(dialect=dialect))
        for index in table.indexes:
            yield str(CreateIndex(index, if_not_exists=True).compile(dialect=dialect))


def check_version(version: int, place: str) -> None:
    """Raise `StartupError` unless the tables are of this version."""
    if version != VERSION:
        kind = "a newer" if version > VERSION else "another"
        raise StartupError(
            f"the tables in {place} have version {version}, of {kind} counter_server; it is {VERSION} here"
        )


class TablesMissing(Exception):
    """There are no tables, or nothing in them that says whose they are."""


@dataclass
class Wanted:
    """What a batch touches."""

    client: bytes
    names: list[str]
    keys: list[str]
    pages: list[tuple[str, int]]  # the name before, and how many

    @classmethod
    def by(cls, batch: Batch) -> "Wanted":
        names: set[str] = set()
        keys: set[str] = set()
        scans: list[Scan] = []
        deleted = 0
        for operation in batch.operations:
            if isinstance(operation, Scan):
                scans.append(operation)
            elif isinstance(operation, (Increment, Set, Get, Delete)):
                names.add(operation.name)
                deleted += isinstance(operation, Delete)
                if isinstance(operation, Increment) and operation.key is not None:
                    keys.add(operation.key)
        # One more than a page tells whether there are more; those that the batch itself removes do not count.
        pages = [(scan.after, scan.limit + 1 + deleted) for scan in scans]
        return cls(batch.client, sorted(names), sorted(keys), pages)


@dataclass
class Found:
    """What was there of it, at one moment."""

    epoch: str
    now: float  # seconds, by the clock that all clients of the database share
    contents: Contents = field(default_factory=Contents)
