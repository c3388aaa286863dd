"""What holds for each engine: killed under load, cut off, frozen, emptied, full, in a fork, from two machines."""

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest

from counter_server import State
from counter_server.errors import (
    AccessDenied,
    CounterServerError,
    DeadlineExceeded,
    Disconnected,
    LimitReached,
    OutcomeUnknown,
    StartupError,
    StateLost,
    StorageFull,
)
from counter_server.operations import LARGEST, Increment, Set
from counter_server.stores import open_store
from counter_server.stores.databases import open_sql_store
from counter_server.stores.sql import TablesMissing
from counter_server.testing import Operation, apply, assert_exactly_once
from tests.cutter import Cutter
from tests.engines import PostgresServer, pgbouncer, start
from tests.load import HttpLoad, StoreLoad, at_once, impatient, open_client
from tests.processes import PATIENCE, Server, eventually, frozen
from tests.test_manager import Interrupted, in_a_child, interrupted_when_sent

pytestmark = pytest.mark.slow

_places = count(1)
SQL = ["postgresql", "mariadb"]
DURABLE = ["redis", *SQL]
PARTS = ["meta", "counters", "clients", "keys"]


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Return a function that returns an engine by its kind, and starts it at the first use."""
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(start(kind, tmp_path_factory.mktemp(kind))))


@dataclass
class Place:
    """An empty part of an engine, for one test."""

    kind: str
    name: str
    url: str
    engine: Any  # None for SQLite
    path: Path  # of SQLite's file

    def execute(self, statement: str) -> None:
        if self.kind == "sqlite":
            with closing(sqlite3.connect(self.path, timeout=PATIENCE)) as connection, connection:
                connection.execute(statement)
        elif self.kind == "redis":
            assert self.engine.command(statement)[:1] in b"+:"
        else:
            self.engine.query(statement, self.name)


@pytest.fixture
def place(request: pytest.FixtureRequest, engine_of: Callable[[str], Any], tmp_path: Path) -> Place:
    kind, path, name = request.param, tmp_path / "counters.db", f"place{next(_places)}"
    if kind == "sqlite":
        return Place(kind, name, f"sqlite:///{path}", None, path)
    engine = engine_of(kind)
    return Place(kind, name, engine.make(name), engine, path)


@pytest.fixture
def state(place: Place, stack: ExitStack) -> State:
    return stack.enter_context(open_client(place.url, deadline=PATIENCE))


def on(*kinds: str) -> pytest.MarkDecorator:
    """Run a test on a place of each of these engines."""
    return pytest.mark.parametrize("place", kinds, indirect=True)


# Killed


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # PyMySQL leaves a refused one to be collected
@on("manager", *DURABLE)
def test_killed_under_load_one_connection_or_all(place: Place, state: State, tmp_path: Path) -> None:
    load = StoreLoad(place.url, "hot", 2, 8, tmp_path)
    load.progress(100)
    for harm in islice(cycle(place.engine.harms), 3):
        harm()
        load.progress(100)
    check(load.finish(), state, tmp_path)


def check(history: list[Operation], state: State, tmp_path: Path) -> None:
    assert all(operation.answers for operation in history)
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


def test_processes_that_count_in_one_sqlite_file_are_killed(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "counters.db"
    load = StoreLoad(f"sqlite:///{path}", "hot", 3, 8, tmp_path)  # they race to make it
    stack.callback(load.kill)
    for _ in range(2):
        load.progress(100)
        load.kill_one()
    load.progress(100)
    history = load.finish()
    state = stack.enter_context(open_client(f"sqlite:///{path}"))
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@on(*DURABLE)
def test_connections_cut_in_the_middle_of_a_reply(
    place: Place, state: State, cut: Callable[[Path], Cutter], tmp_path: Path
) -> None:
    cutter = cut(place.engine.socket)
    load = StoreLoad(place.engine.url_of(place.name, cutter.port), "hot", 2, 8, tmp_path)
    eventually(lambda: cutter.cuts >= 10, "cuts")
    check(load.finish(), state, tmp_path)


@on("redis", "postgresql")
def test_two_supervisors_over_one_store_give_no_number_twice(
    place: Place, state: State, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines: two addresses, and all that they share is the store."""
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(tmp_path / "data"))  # of the key that signs their cookies
    servers = [
        stack.enter_context(Server("--host", host, "--workers", "1", "--store", place.url))
        for host in ("127.0.0.1", "127.0.0.2")
    ]
    loads = [HttpLoad(one.url, "hot", 10, each=10) for one in servers]
    check([operation for load in loads for operation in load.finish(stop=False)], state, tmp_path)
    assert state.counter("hot").value == 2 * 10 * 10


@on(*SQL, "sqlite")
def test_tables_and_a_counter_made_by_many_at_once_lose_nothing(place: Place, state: State) -> None:
    """Each thread is a client of its own: nothing but the database keeps them apart."""

    def work() -> int:
        with open_client(place.url, deadline=PATIENCE) as own:
            balance = 0
            for n in range(10):
                own.counter("all").increment(maximum=10**9 if n % 2 else None)
                balance += (own.counter("new").increment() == 1) - own.counter("new").delete()
            return balance

    # Each removal let it begin again at 1: no increment went to a counter that was already removed.
    assert sum(at_once(8, work)) == 0
    assert state.counter("all").value == 8 * 10
    assert state.counter("new").value == 0


# Frozen and forked


@on("memcached", *DURABLE)
def test_a_frozen_engine_holds_nobody_beyond_the_deadline(place: Place, state: State, stack: ExitStack) -> None:
    """A late answer is never taken for that of the next call."""
    counter = state.counter("c")
    assert counter.increment() == 1
    with ExitStack() as ice:
        for pid in place.engine.serving():
            ice.enter_context(frozen(pid))
        with impatient(state), pytest.raises(CounterServerError) as late:
            counter.increment()
        fresh = stack.enter_context(open_client(place.url, deadline=0.3))
        with pytest.raises(CounterServerError):
            fresh.counter("c").increment()
    assert isinstance(late.value, OutcomeUnknown if place.kind == "memcached" else DeadlineExceeded)
    assert late.value.outcome == ("not_applied" if place.kind in SQL else "unknown")  # SQL was not asked to commit
    found = stack.enter_context(open_client(place.url, deadline=PATIENCE)).counter("c").value
    assert 1 <= found <= (1 if place.kind in SQL else 3)
    assert [counter.increment() for _ in range(3)] == [found + 1, found + 2, found + 3]


@on("memcached", *DURABLE, "sqlite")
def test_a_child_of_a_fork_counts_on_a_connection_of_its_own(state: State) -> None:
    counter = state.counter("c")
    assert counter.increment() == 1
    answer = in_a_child(os.fork, lambda: [counter.increment() for _ in range(100)])
    values = [counter.increment() for _ in range(100)]
    assert sorted(values + answer()) == list(range(2, 202))


# Emptied and full


CALLS: list[Callable[[State], object]] = [
    lambda state: state.counter("c").increment(),
    lambda state: state.counter("c").increment(key="k"),
    lambda state: state.counter("c").value,
    lambda state: state.counters(),
]


@on("redis", *SQL, "sqlite")
def test_a_store_that_lost_one_part_says_so_once_to_each_process(place: Place, stack: ExitStack) -> None:
    """A new process reports it too, if it comes first, unless everything is gone. A deleted counter is not a loss."""
    if place.kind == "redis":
        parts = [f"{{{place.name}}}:{part}" for part in ("counters", "names", "epoch")]
        losses = [[f"DEL {parts[0]}"], [f"DEL {part}" for part in parts]]
        forget = [f"DEL {' '.join(parts)}"]
    else:
        drop, forget = ([f"{how} counter_server_{part}" for part in PARTS] for how in ("DROP TABLE", "DELETE FROM"))
        losses = [drop, forget, *([statement] for statement in (*drop[1:], *forget[1:]))]
    for number, statements in enumerate(losses):
        for call in CALLS if place.kind in ("redis", "sqlite") else [CALLS[number % len(CALLS)]]:
            knew = stack.enter_context(open_client(place.url, deadline=PATIENCE))
            assert knew.counter("c").increment(key=f"first-{next(_places)}") == 1
            assert knew.counter("c").delete()
            assert knew.counter("c").increment() == 1
            for statement in statements:
                place.execute(statement)
            others = [stack.enter_context(open_client(place.url, deadline=PATIENCE))] if len(statements) == 1 else []
            for each in (*others, knew):
                with pytest.raises(StateLost) as lost:
                    call(each)
                assert lost.value.outcome == "not_applied"
                assert each.counters().counters == ([] if "counters" in " ".join(statements) else [("c", 1)])
            with open_client(place.url, deadline=PATIENCE) as newcomer:
                newcomer.counter("c").increment()  # makes tables, which a look does not
            for statement in forget:
                place.execute(statement)


FULL_POSTGRES = """CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'could not extend file' USING ERRCODE = '53100'; END $$;
    CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON counter_server_counters EXECUTE FUNCTION full_disk()"""
FULL_MARIADB = """CREATE TRIGGER full_disk BEFORE INSERT ON counter_server_counters FOR EACH ROW
    SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1114, MESSAGE_TEXT = 'The table is full'"""
FULL = {
    "redis": ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
    "postgresql": (FULL_POSTGRES, "DROP TRIGGER full_disk ON counter_server_counters"),
    "mariadb": (FULL_MARIADB, "DROP TRIGGER full_disk"),
}


@on(*DURABLE)
def test_a_full_engine_refuses_writes_answers_reads_and_heals(place: Place, state: State) -> None:
    fill, empty = FULL[place.kind]
    counter = state.counter("c")
    assert counter.increment(key="k") == 1
    place.execute(fill)
    try:
        for maximum in (None, 10):
            with pytest.raises(StorageFull) as full:
                counter.increment(maximum=maximum)
            assert full.value.outcome == "not_applied"
            assert counter.value == 1
        if place.kind in SQL:
            assert counter.increment(key="k") == 1
    finally:
        place.execute(empty)
    assert counter.increment() == 2


# Databases only


@on(*SQL)
def test_a_database_that_lets_nobody_in_says_so(place: Place, stack: ExitStack) -> None:
    def increment(url: str, deadline: float = PATIENCE) -> int:
        return stack.enter_context(open_client(url, deadline=deadline)).counter("c").increment()

    sql = "CREATE OR REPLACE USER stranger IDENTIFIED BY 'secret'"
    if place.kind == "postgresql":
        sql = "DROP ROLE IF EXISTS stranger; CREATE ROLE stranger LOGIN PASSWORD 'secret'"
    place.execute(sql)
    # The last one may log in, but neither make tables nor use those of others.
    for who in ("stranger", "stranger:wrong", "nobody", "stranger:secret"):
        with pytest.raises(AccessDenied) as denied:
            increment(re.sub(r"//\w+@", f"//{who}@", place.url))
        assert denied.value.outcome == "not_applied"
        assert "wrong" not in str(denied.value)
    if place.kind == "postgresql":  # without a schema that it may use, all tables are hidden from it
        place.execute("ALTER ROLE stranger SET search_path = no_such")
        hidden = stack.enter_context(open_client(re.sub(r"//\w+@", "//stranger:secret@", place.url)))
        with pytest.raises(AccessDenied, match="search_path"):
            _ = hidden.counter("c").value
    with pytest.raises(StartupError, match="no_such"):
        increment(place.url.replace(place.name, "no_such"))
    if place.kind == "postgresql":
        with pytest.raises(DeadlineExceeded) as read_only:
            increment(f"{place.url}&options=-cdefault_transaction_read_only=on", deadline=0.2)
        assert read_only.value.outcome == "not_applied"


@on(*SQL)
def test_an_interrupted_call_closes_its_connection_and_shifts_no_answer(place: Place, stack: ExitStack) -> None:
    store: Any = stack.enter_context(closing(open_store(place.url)))
    assert apply(store, Increment("c")) == [1]
    with store.connection(time.monotonic() + PATIENCE) as connection:
        driver = connection.connection.driver_connection
    descriptor = driver.fileno() if place.kind == "postgresql" else driver._sock.fileno()
    with ExitStack() as ice:
        for pid in place.engine.serving():
            ice.enter_context(frozen(pid))
        with pytest.raises(Interrupted), interrupted_when_sent(descriptor):
            apply(store, Increment("c"))
    assert driver.closed if place.kind == "postgresql" else not driver.open
    assert apply(store, Set("other", 10), Increment("other")) == [10, 11]
    assert apply(store, Increment("c")) == [2]


@on(*SQL)
def test_a_lock_of_a_stranger_is_waited_for_until_the_deadline(place: Place, state: State) -> None:
    assert state.counter("c").increment() == 1
    with closing(place.engine.connect(place.name)) as stranger, closing(stranger.cursor()) as cursor, impatient(state):
        cursor.execute("BEGIN")
        cursor.execute("UPDATE counter_server_counters SET value = value + 10 WHERE name <> ''")
        for maximum in (None, 100):
            with pytest.raises(DeadlineExceeded) as late:
                state.counter("c").increment(maximum=maximum)
            assert late.value.outcome == "not_applied"
        cursor.execute("COMMIT")
    assert state.counter("c").increment(maximum=100) == 12


@on(*SQL, "sqlite")
def test_tables_of_a_newer_version_are_refused_by_name(place: Place, state: State, stack: ExitStack) -> None:
    assert state.counter("c").increment() == 1
    place.execute("UPDATE counter_server_meta SET version = 2")
    for each in (state, stack.enter_context(open_client(place.url))):
        for call in (CALLS[0], CALLS[2]):
            with pytest.raises(StartupError, match="version 2, of a newer"):
                call(each)


@on(*SQL, "sqlite")
def test_what_has_expired_is_forgotten(place: Place, stack: ExitStack) -> None:
    def count_as_another(*keys: str | None) -> list[int]:
        counter = stack.enter_context(open_client(place.url, deadline=PATIENCE)).counter("c")
        return [counter.increment(key=key) for key in keys]

    older = "INSERT INTO counter_server_keys SELECT 'older', fingerprint, value, 0 FROM counter_server_keys LIMIT 1"
    assert count_as_another("old", "new") == [1, 2]
    place.execute("UPDATE counter_server_clients SET used = used - 3601")
    place.execute("UPDATE counter_server_keys SET used = used - 86401 WHERE \"key\" = 'old'")
    # Expired for a process that has not removed expired keys yet, too.
    assert count_as_another("new", "old", None) == [2, 3, 4]
    place.execute(older)
    assert count_as_another(None, None) == [5, 6]
    place.execute(older)  # which fails if the first one is still there
    place.execute("INSERT INTO counter_server_meta SELECT count(*) + 5, 'clients' FROM counter_server_clients")
    place.execute("DELETE FROM counter_server_meta WHERE version = 8")  # the second, the third and our mark
    with pytest.raises((sqlite3.IntegrityError, psycopg.errors.UniqueViolation, pymysql.IntegrityError)):
        place.execute("INSERT INTO counter_server_meta VALUES (1, 'a second one')")


def test_behind_pgbouncer_each_number_is_given_once(stack: ExitStack, tmp_path: Path) -> None:
    """All threads of all processes share two sessions of a PostgreSQL whose defaults are not ours."""
    options = ("-c", "default_transaction_isolation=serializable", "-c", "synchronous_commit=off")
    server = stack.enter_context(PostgresServer(*options))
    url = stack.enter_context(pgbouncer(server))
    history = StoreLoad(url, "hot", 3, 8, tmp_path, each=20).finish(stop=False)
    assert len(history) == 3 * 8 * 20
    state = stack.enter_context(open_client(url, deadline=PATIENCE))
    check(history, state, tmp_path)
    counter = state.counter("c")
    calls: list[Callable[[], object]] = [
        *(counter.increment, lambda: counter.increment(key="k"), lambda: counter.value, state.counters),
        *(lambda: counter.set(LARGEST), counter.increment, counter.delete),
        *(lambda: server.query("DROP TABLE counter_server_clients"), counter.increment),
    ]
    for call in calls:
        with suppress(LimitReached, StateLost):
            call()
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as stranger:
            # A call that failed has closed its connection, and pgbouncer ends its transaction a moment later.
            for table in (
                "pg_settings WHERE source = 'session' AND name <> 'client_encoding'",
                "pg_prepared_statements",
                "pg_locks WHERE locktype = 'advisory'",
            ):
                left = partial(stranger.execute, f"SELECT count(*) FROM {table}")  # noqa: S608
                eventually(lambda left=left: left().fetchone() == (0,), f"the end of {table}")  # type: ignore[misc]


# SQLite's file


def test_a_file_that_was_removed_or_cannot_be_a_database_is_reported(stack: ExitStack, tmp_path: Path) -> None:
    counter = stack.enter_context(open_client(f"sqlite:///{tmp_path}/counters.db")).counter("c")
    assert counter.increment() == 1
    for file in tmp_path.glob("counters.db*"):
        file.unlink()
    with pytest.raises(StateLost):
        counter.increment()
    assert counter.increment() == 1
    (tmp_path / "text.db").write_text("no database" * 1000)
    for path in (tmp_path, tmp_path / "no" / "such.db", tmp_path / "text.db"):
        with pytest.raises(StartupError):
            stack.enter_context(open_client(f"sqlite:///{path}")).counter("c").increment()
    assert (tmp_path / "text.db").read_text() == "no database" * 1000


# Errors of drivers


def error_of(url: str, code: str) -> Exception:
    if url.startswith("postgresql"):
        return psycopg.errors.lookup(code)("it")
    if url.startswith("mysql"):
        return pymysql.OperationalError(int(code), "Got error 28" if code == "1030" else "it")
    failed = sqlite3.OperationalError("it")
    failed.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
    return failed


POSTGRESQL, MYSQL, SQLITE = "postgresql://127.0.0.1:1/db", "mysql://user:secret@127.0.0.1:1/db", "sqlite:////x.db"


@pytest.mark.parametrize(
    ("url", "kind", "codes"),
    [
        (POSTGRESQL, AccessDenied, "28000 28P01 42501"),
        (POSTGRESQL, StorageFull, "53100"),
        (POSTGRESQL, StartupError, "3D000 3F000"),
        (POSTGRESQL, Disconnected, "40001 40P01 55P03 57014 25006 53200 53300 57P01 57P02 57P03 08006"),
        (POSTGRESQL, TablesMissing, "42P01"),
        (POSTGRESQL, OutcomeUnknown, "XX000 23505 22012 42601"),
        (MYSQL, AccessDenied, "1044 1045 1142 1698"),
        (MYSQL, StorageFull, "1021 1030 1114"),
        (MYSQL, StartupError, "1049 1153"),
        (MYSQL, Disconnected, "0 1040 1053 1205 1213 1290 2003 2006 2013"),
        (MYSQL, TablesMissing, "1146"),
        (MYSQL, OutcomeUnknown, "1 1048 1064 2999"),
        (SQLITE, Disconnected, "BUSY BUSY_SNAPSHOT LOCKED"),
        (SQLITE, StorageFull, "FULL"),
        (SQLITE, AccessDenied, "READONLY"),
        (SQLITE, OutcomeUnknown, "IOERR IOERR_FSYNC"),
    ],
)
def test_each_error_of_a_driver_is_one_of_ours(url: str, kind: type[Exception], codes: str) -> None:
    for code in codes.split():
        error = open_sql_store(url).translated(error_of(url, code), sent=True)
        assert type(error) is kind, code
        assert str(error).startswith(url.replace("user:secret@", ""))


@pytest.mark.parametrize("sent", [True, False])
def test_an_error_after_a_rollback_was_not_sent(*, sent: bool) -> None:
    lost = open_sql_store(POSTGRESQL).translated(psycopg.OperationalError("the connection is closed"), sent=sent)
    assert isinstance(lost, Disconnected)
    assert lost.sent == sent
    for code, undone in (("1213", True), ("1205", True), ("2013", False), ("1927", False)):
        error = open_sql_store(MYSQL).translated(error_of(MYSQL, code), sent=sent)
        assert isinstance(error, Disconnected)
        assert error.sent == (sent and not undone)
