"""Measure our stores on other engines, each beside its engine's own ways to count, in one run.

    python -m tests.benchmarks.engines [--rounds 3] [--seconds 1] [--shapes 2x16]

As in the command for everything, rounds are interleaved, figures are medians, and every returned value is checked.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy

from tests.benchmarks.load import Increment, Peer, Shape, measure
from tests.benchmarks.peers import (
    ROW,
    TABLE,
    UPDATE,
    for_each_thread,
    open_memcached,
    open_ours,
    open_postgres,
    open_redis,
    open_sqlite,
    plain_sqlite,
)
from tests.benchmarks.plan import in_turn
from tests.benchmarks.report import print_tables
from tests.benchmarks.results import Place, Results
from tests.engines import DURABLE, MemcachedServer, PostgresServer, RedisServer


def open_transaction(url: str) -> Increment:
    """Open psycopg with its defaults: each increment begins and commits a transaction."""

    def count(connection: Any) -> int:
        with connection.transaction():
            return int(connection.execute(UPDATE).fetchone()[0])

    return for_each_thread(lambda: psycopg.connect(url), count)


def open_sqlalchemy(url: str) -> Increment:
    """Open SQLAlchemy the way most apps do."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), pool_size=64)
    statement = sqlalchemy.text(UPDATE)

    def increment() -> int:
        with engine.begin() as connection:
            return int(connection.execute(statement).scalar_one())

    return increment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=[Shape(2, 16)], help="processes x threads")
    options = parser.parse_args()
    results = Results()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def beside(*peers: Peer) -> None:
            for shape in options.shapes:
                for number in range(options.rounds):
                    for peer in in_turn(peers, number):
                        results.add(Place("store", str(shape), peer.name), measure(peer, shape, options.seconds))

        for name, settings in (("volatile", ()), ("fsync always", DURABLE)):
            url = stack.enter_context(RedisServer(root / name.replace(" ", "-"), *settings)).url
            beside(Peer(f"redis-py INCR, {name}", open_redis, url), Peer(f"ours on Redis, {name}", open_ours, url))
        postgres = stack.enter_context(PostgresServer())
        postgres.query(TABLE)
        postgres.query(ROW)
        beside(
            Peer("UPDATE RETURNING, SQLAlchemy", open_sqlalchemy, postgres.url),
            Peer("UPDATE RETURNING, transaction", open_transaction, postgres.url),
            Peer("UPDATE RETURNING, autocommit", open_postgres, postgres.url),
            Peer("ours on PostgreSQL", open_ours, postgres.url),
        )
        beside(
            Peer("UPDATE RETURNING, SQLite FULL", open_sqlite, plain_sqlite(root / "plain.db")),
            Peer("ours on SQLite", open_ours, f"sqlite:///{root}/counters.db"),
        )
        memcached = stack.enter_context(MemcachedServer(root / "memcached")).url
        beside(Peer("pymemcache incr", open_memcached, memcached), Peer("ours on memcached", open_ours, memcached))
    print_tables(results, [])


if __name__ == "__main__":
    main()
