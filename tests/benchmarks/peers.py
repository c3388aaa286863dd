"""The contestants at the level of the store: ours, other ways to count, and two limits.

Each starts in its own directory if it is installed; missing ones are named.
"""

import importlib.util
import itertools
import os
import selectors
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pymemcache.client.base import Client
from redis import Redis

from counter_server import open_state
from counter_server.settings import DURABILITIES
from tests.benchmarks.load import Increment, Peer, context, running
from tests.engines import DURABLE, MemcachedServer, PostgresServer, RedisServer
from tests.processes import Manager
from tests.standard_server import KEY, Counter, StandardManager, serve

UPDATE = "UPDATE plain SET value = value + 1 WHERE name = 'hot' RETURNING value"
TABLE = "CREATE TABLE plain (name text PRIMARY KEY, value bigint NOT NULL)"
ROW = "INSERT INTO plain VALUES ('hot', 0)"
MOST_CLIENTS = 200
PAGE = 4096  # bytes: the smallest write of SQLite
LIMIT_COMMIT = "append and fdatasync, one writer"


def serve_plain(address: Any, ready: Any) -> None:
    serve(address, lambda: ready.send(None))


def open_plain(place: Any) -> Increment:
    manager = StandardManager(place, KEY)
    manager.connect()
    proxy = manager.shared()  # type: ignore[attr-defined]
    return proxy.increment  # type: ignore[no-any-return]


def open_value_and_lock(proxies: tuple[Any, Any]) -> Increment:
    """Count by the other recipe: a Value and a Lock of the standard library's own manager."""
    value, lock = proxies

    def increment() -> int:
        with lock:
            value.value = number = value.value + 1
            return int(number)

    return increment


def open_ours(url: str) -> Increment:
    return open_state(url).counter("hot").increment


def commits_of_ours(url: str) -> int:
    with open_state(url) as state:
        status = state.status()
    assert status is not None
    return status.commits


def for_each_thread(connect: Callable[[], Any], count: Callable[[Any], int]) -> Increment:
    """Return an increment that uses a separate connection in each thread."""
    local = threading.local()

    def increment() -> int:
        if not hasattr(local, "connection"):
            local.connection = connect()
        return count(local.connection)

    return increment


def open_redis(url: str) -> Increment:
    client = Redis.from_url(url)
    return lambda: int(client.incr("plain"))


def open_memcached(url: str) -> Increment:
    def connect() -> Client:
        client = Client(url.removeprefix("memcached://"), no_delay=True)
        client.add("plain", "0", noreply=False)
        return client

    return for_each_thread(connect, lambda client: int(client.incr("plain", 1)))


def open_postgres(url: str, statement: str = UPDATE) -> Increment:
    """Count the quickest way: a prepared statement, its own transaction, one round trip."""
    return for_each_thread(
        lambda: psycopg.connect(url, autocommit=True).cursor(),
        lambda cursor: int(cursor.execute(statement, prepare=True).fetchone()[0]),
    )


def open_sqlite(path: str, synchronous: str = "FULL") -> Increment:
    """Count in WAL mode, like ours, with SQLite's own busy timeout."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        return connection

    return for_each_thread(connect, lambda connection: int(connection.execute(UPDATE).fetchone()[0]))


def plain_sqlite(path: Path) -> str:
    connection = sqlite3.connect(path)
    connection.executescript(f"PRAGMA journal_mode = WAL; {TABLE}; {ROW}")
    connection.close()
    return str(path)


def open_diskcache(directory: str) -> Increment:
    from diskcache import Cache

    cache = Cache(directory, timeout=60)
    return lambda: int(cache.incr("hot", retry=True))


def open_cachelib(directory: str) -> Increment:
    from cachelib import FileSystemCache

    cache = FileSystemCache(directory)
    return lambda: int(cache.inc("hot") or 0)  # None, so no number, if another process held the file


def open_shared_memory(value: Any) -> Increment:
    def increment() -> int:
        with value.get_lock():
            value.value += 1
            return int(value.value)

    return increment


def serve_pyro(path: str, ready: Any) -> None:
    import Pyro5
    import Pyro5.api

    # A thread for each client, so that it refuses none. (pyright takes the default for the type.)
    Pyro5.config.THREADPOOL_SIZE = MOST_CLIENTS  # pyright: ignore[reportAttributeAccessIssue]
    with Pyro5.api.Daemon(unixsocket=path) as daemon:
        daemon.register(Pyro5.api.expose(Counter)(), "counter")
        ready.send(None)
        daemon.requestLoop()


def open_pyro(path: str) -> Increment:
    import Pyro5.api

    return for_each_thread(lambda: Pyro5.api.Proxy(f"PYRO:counter@./u:{path}"), lambda proxy: int(proxy.increment()))


def serve_ping_pong(path: str, ready: Any) -> None:
    """Answer each message with the next number: one call per increment and no other work."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(MOST_CLIENTS)
        selector.register(listener, selectors.EVENT_READ)
        ready.send(None)
        numbers = itertools.count(1)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                connection: Any = key.fileobj
                if connection.recv(8):
                    connection.send(next(numbers).to_bytes(8, "big"))
                else:
                    selector.unregister(connection)
                    connection.close()


def open_ping_pong(path: str) -> Increment:
    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return connection

    def count(connection: socket.socket) -> int:
        connection.send(b"\0" * 8)
        return int.from_bytes(connection.recv(8), "big")

    return for_each_thread(connect, count)


def open_append(path: str) -> Increment:
    """Append one page per commit to a file; the number is the count of pages."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def commit() -> int:
        os.write(descriptor, b"\0" * PAGE)
        os.fdatasync(descriptor)
        return os.fstat(descriptor).st_size // PAGE

    return commit


@dataclass(frozen=True)
class Contestant:
    """A way to count that can be started and measured."""

    name: str
    start: Callable[[ExitStack, Path], Any]  # returns the place for `open`
    open: Callable[[Any], Increment]
    needs: str | None = None  # a module of the extra `benchmark`
    networked: bool = False  # another project's, and reached over a socket
    durable: bool = False  # on disk before it answers
    one_writer: bool = False
    commits: Callable[[Any], int] | None = None


def _ours(durability: str) -> Contestant:
    def start(stack: ExitStack, root: Path) -> str:
        return stack.enter_context(Manager(root, "--durability", durability)).url

    durable = durability == "commit"
    return Contestant(f"ours, {durability}", start, open_ours, durable=durable, commits=commits_of_ours)


def _redis(*options: str) -> Callable[[ExitStack, Path], str]:
    return lambda stack, root: stack.enter_context(RedisServer(root, *options)).url


def _memcached(stack: ExitStack, root: Path) -> str:
    return stack.enter_context(MemcachedServer(root)).url


def _postgres(stack: ExitStack, _root: Path) -> str:
    server = stack.enter_context(PostgresServer("-c", f"max_connections={MOST_CLIENTS}"))
    server.query(TABLE)
    server.query(ROW)
    server.query("CREATE SEQUENCE hot")
    return server.url


def _sqlite(_stack: ExitStack, root: Path) -> str:
    root.mkdir()
    return plain_sqlite(root / "plain.db")


def _directory(_stack: ExitStack, root: Path) -> str:
    root.mkdir()
    return str(root)


def _file(stack: ExitStack, root: Path) -> str:
    return f"{_directory(stack, root)}/file"


def _shared_memory(_stack: ExitStack, _root: Path) -> Any:
    return context.Value("q", 0)


def _value_and_lock(stack: ExitStack, _root: Path) -> tuple[Any, Any]:
    manager = stack.enter_context(SyncManager(ctx=context))
    return manager.Value("q", 0), manager.Lock()


def _served(target: Callable[..., None]) -> Callable[[ExitStack, Path], str]:
    """Start a server on a socket file."""

    def start(stack: ExitStack, root: Path) -> str:
        address = _file(stack, root)
        stack.enter_context(running(target, address))
        return address

    return start


def _plain_over_tcp(stack: ExitStack, _root: Path) -> tuple[str, int]:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        address = chosen.getsockname()
    stack.enter_context(running(serve_plain, address))
    return address[0], address[1]


CONTESTANTS = [
    *map(_ours, reversed(DURABILITIES)),
    Contestant("BaseManager proxy, AF_UNIX", _served(serve_plain), open_plain, networked=True),
    Contestant("BaseManager proxy, TCP", _plain_over_tcp, open_plain, networked=True),
    Contestant("SyncManager Value and Lock", _value_and_lock, open_value_and_lock, networked=True),
    Contestant("redis-py INCR, volatile", _redis(), open_redis, networked=True),
    Contestant("redis-py INCR, fsync always", _redis(*DURABLE), open_redis, networked=True, durable=True),
    Contestant("pymemcache incr", _memcached, open_memcached, networked=True),
    Contestant("PostgreSQL row update", _postgres, open_postgres, networked=True, durable=True),
    Contestant(
        "PostgreSQL sequence",
        _postgres,
        partial(open_postgres, statement="SELECT nextval('hot')"),
        networked=True,
        durable=True,
    ),
    Contestant("SQLite WAL, NORMAL", _sqlite, partial(open_sqlite, synchronous="NORMAL")),
    Contestant("SQLite WAL, FULL", _sqlite, open_sqlite, durable=True),
    Contestant("diskcache incr", _directory, open_diskcache, needs="diskcache"),
    Contestant("cachelib file cache", _directory, open_cachelib),
    Contestant("multiprocessing.Value", _shared_memory, open_shared_memory),
    Contestant("Pyro5", _served(serve_pyro), open_pyro, needs="Pyro5", networked=True),
    Contestant("AF_UNIX ping-pong", _served(serve_ping_pong), open_ping_pong),
    Contestant(LIMIT_COMMIT, _file, open_append, durable=True, one_writer=True),
]


def start_all(wanted: Iterable[Contestant], stack: ExitStack, root: Path) -> tuple[list[Peer], dict[str, str]]:
    """Start the wanted contestants; return the running ones, and the reason for each missing one."""
    peers, missing = [], {}
    for number, one in enumerate(wanted):
        if one.needs and importlib.util.find_spec(one.needs) is None:
            missing[one.name] = f"{one.needs} is not installed (pip install -e . --group benchmark)"
            continue
        try:
            place = one.start(stack, root / str(number))
        except pytest.skip.Exception as reason:  # raised by the tests' servers if they are not installed
            missing[one.name] = str(reason.msg)
            continue
        peers.append(Peer(one.name, one.open, place, one.one_writer, one.commits))
    return peers, missing
