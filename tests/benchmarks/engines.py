"""Our stores on other people's engines, each beside that engine's own ways to count, in one run.

    python -m tests.benchmarks.engines [--rounds 3] [--seconds 1] [--shape 2x16]

As in `store`: rounds are interleaved, medians are told, and every value that comes back is checked.
"""

import argparse
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy
from pymemcache.client.base import Client
from redis import Redis

from tests.benchmarks.store import Increment, Peer, compare, open_ours
from tests.engines import MemcachedServer, PostgresServer, RedisServer
from tests.test_redis import DURABLE

UPDATE = "UPDATE plain SET value = value + 1 WHERE name = 'hot' RETURNING value"


def open_redis(url: str) -> Increment:
    client = Redis.from_url(url)
    return lambda: int(client.incr("plain"))


def for_each_thread(connect: Callable[[], Any], count: Callable[[Any], int]) -> Increment:
    """An increment over a connection that each thread has for itself."""
    local = threading.local()

    def increment() -> int:
        if not hasattr(local, "connection"):
            local.connection = connect()
        return count(local.connection)

    return increment


def open_memcached(url: str) -> Increment:
    def connect() -> Client:
        client = Client(url.removeprefix("memcached://"), no_delay=True)
        client.add("plain", "0", noreply=False)
        return client

    return for_each_thread(connect, lambda client: int(client.incr("plain", 1)))


def open_autocommit(url: str) -> Increment:
    """The quickest there is: a statement that is prepared, a transaction of its own, one round trip."""
    return for_each_thread(
        lambda: psycopg.connect(url, autocommit=True).cursor(),
        lambda cursor: int(cursor.execute(UPDATE, prepare=True).fetchone()[0]),
    )


def open_transaction(url: str) -> Increment:
    """psycopg as it is by itself: a transaction that is begun, and committed."""

    def count(connection: Any) -> int:
        with connection.transaction():
            return int(connection.execute(UPDATE).fetchone()[0])

    return for_each_thread(lambda: psycopg.connect(url), count)


def open_sqlalchemy(url: str) -> Increment:
    """As most apps do it."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), pool_size=64)
    statement = sqlalchemy.text(UPDATE)

    def increment() -> int:
        with engine.begin() as connection:
            return int(connection.execute(statement).scalar_one())

    return increment


def open_sqlite(path: str) -> Increment:
    """WAL and FULL, as ours, with SQLite's own way to wait."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    return for_each_thread(connect, lambda connection: int(connection.execute(UPDATE).fetchone()[0]))


def plain_sqlite(path: Path) -> str:
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE plain (name TEXT PRIMARY KEY, value INTEGER); INSERT INTO plain VALUES ('hot', 0)"
    )
    connection.close()
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--shape", action="append", help="processes x threads; several times for several")
    options = parser.parse_args()
    shapes = [(int(one), int(other)) for one, other in (shape.split("x") for shape in options.shape or ["2x16"])]
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def beside(*peers: Peer) -> None:
            compare(list(peers), shapes, options.rounds, options.seconds)

        for name, settings in (("volatile", ()), ("fsync always", DURABLE)):
            url = stack.enter_context(RedisServer(root / name.replace(" ", "-"), *settings)).url
            beside(Peer(f"redis-py INCR, {name}", open_redis, url), Peer(f"ours on Redis, {name}", open_ours, url))
        postgres = stack.enter_context(PostgresServer())
        postgres.query("CREATE TABLE plain (name text PRIMARY KEY, value bigint NOT NULL)")
        postgres.query("INSERT INTO plain VALUES ('hot', 0)")
        beside(
            Peer("UPDATE RETURNING, SQLAlchemy", open_sqlalchemy, postgres.url),
            Peer("UPDATE RETURNING, transaction", open_transaction, postgres.url),
            Peer("UPDATE RETURNING, autocommit", open_autocommit, postgres.url),
            Peer("ours on PostgreSQL", open_ours, postgres.url),
        )
        beside(
            Peer("UPDATE RETURNING, SQLite FULL", open_sqlite, plain_sqlite(root / "plain.db")),
            Peer("ours on SQLite", open_ours, f"sqlite:///{root}/counters.db"),
        )
        memcached = stack.enter_context(MemcachedServer(root / "memcached")).url
        beside(Peer("pymemcache incr", open_memcached, memcached), Peer("ours on memcached", open_ours, memcached))


if __name__ == "__main__":
    main()
