"""PostgreSQL, MariaDB and SQLite killed under load, cut off, full, frozen, locked, emptied: the checker passes."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import count
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import psycopg.sql
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
from counter_server.operations import LARGEST, Batch, Increment, Operation, Result, Set
from counter_server.stores import open_store
from counter_server.stores.databases import open_sql_store
from counter_server.stores.sql import TablesMissing
from tests.cutter import Cutter
from tests.engines import MariaDbServer, PgBouncer, PostgresServer
from tests.history import assert_exactly_once
from tests.load import LoggedLoad, StoreLoad, impatient, open_client
from tests.processes import PATIENCE, eventually, frozen
from tests.test_manager import Interrupted, interrupted_when_sent

pytestmark = pytest.mark.slow

_databases = count(1)


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """The name of an empty one."""
    name = f"test{next(_databases)}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    return name


@pytest.fixture(scope="module")
def mariadb() -> Iterator[MariaDbServer]:
    """A server for tests that do not kill it."""
    with MariaDbServer() as server:
        yield server


@pytest.fixture
def schema(mariadb: MariaDbServer) -> str:
    """The name of an empty database of MariaDB."""
    name = f"test{next(_databases)}"
    mariadb.query(f"CREATE DATABASE {name}")
    return name


@pytest.fixture(params=["postgresql", "mariadb", "sqlite"])
def sql(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Callable[..., None]]:
    """The URL of an empty database, and what executes a statement there beside the store."""
    if request.param == "sqlite":
        path = tmp_path / "counters.db"

        def execute(statement: str) -> None:
            with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection, connection:
                connection.execute(statement)

        return f"sqlite:///{path}", execute
    if request.param == "mariadb":
        maria: MariaDbServer = request.getfixturevalue("mariadb")
        place: str = request.getfixturevalue("schema")

        def execute_in_mariadb(statement: str) -> None:
            maria.query(statement, place)

        return maria.url_of(place), execute_in_mariadb
    server: PostgresServer = request.getfixturevalue("postgres")
    name: str = request.getfixturevalue("database")

    def execute_there(statement: LiteralString) -> None:
        server.query(statement, name)

    return server.url_of(name), execute_there


def test_postgres_killed_under_load_one_backend_or_all_and_started_again(stack: ExitStack, tmp_path: Path) -> None:
    server = stack.enter_context(PostgresServer())
    state = stack.enter_context(open_client(server.url, deadline=PATIENCE))
    load = StoreLoad(server.url, "hot", 4, 8, 400)
    for kill in range(6):
        goal = (kill + 1) * 1500
        eventually(lambda: state.counter("hot").value > goal, "progress of the load")
        if kill % 2:
            server.kill()
            server.start()
        else:
            with suppress(ProcessLookupError):
                os.kill(server.backends()[0], signal.SIGKILL)
    history = load.finish()
    assert len(history) == 4 * 8 * 400
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


def test_postgres_that_ends_sessions_under_load(
    postgres: PostgresServer, database: str, stack: ExitStack, tmp_path: Path
) -> None:
    url = postgres.url_of(database)
    state = stack.enter_context(open_client(url, deadline=PATIENCE))
    load = StoreLoad(url, "hot", 4, 8, 300)
    for kill in range(20):
        goal = (kill + 1) * 400
        eventually(lambda: state.counter("hot").value > goal, "progress of the load")
        postgres.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND query <> ''"
        )
    history = load.finish()
    assert len(history) == 4 * 8 * 300
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # PyMySQL leaves a refused one to be collected
def test_mariadb_killed_under_load_one_connection_or_all_and_started_again(stack: ExitStack, tmp_path: Path) -> None:
    server = stack.enter_context(MariaDbServer())
    state = stack.enter_context(open_client(server.url, deadline=PATIENCE))
    load = StoreLoad(server.url, "hot", 4, 8, 300)
    for kill in range(6):
        goal = (kill + 1) * 1000
        eventually(lambda: state.counter("hot").value > goal, "progress of the load")
        if kill % 2:
            server.kill()
            server.start()
        else:
            own = "SELECT id FROM information_schema.processlist WHERE command <> 'Daemon' AND id <> connection_id()"
            for (connection,) in server.query(own):
                with suppress(pymysql.Error):  # it is gone already
                    server.query(f"KILL {connection}")
    history = load.finish()
    assert len(history) == 4 * 8 * 300
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


@pytest.fixture
def pooler(stack: ExitStack) -> PgBouncer:
    """PgBouncer in transaction mode, in front of a PostgreSQL whose defaults are not ours."""
    options = ("-c", "default_transaction_isolation=serializable", "-c", "synchronous_commit=off")
    return stack.enter_context(PgBouncer(stack.enter_context(PostgresServer(*options))))


def test_behind_pgbouncer_each_number_is_given_once(pooler: PgBouncer, stack: ExitStack, tmp_path: Path) -> None:
    """32 threads of 4 processes share the two sessions that the pooler has."""
    history = StoreLoad(pooler.url, "hot", 4, 8, 100).finish()
    state = stack.enter_context(open_client(pooler.url, deadline=PATIENCE))
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")
    assert_exactly_once(StoreLoad(pooler.url, "hot2", 2, 4, 50).finish(), 2 * 4 * 50, tmp_path / "history.json")


def test_behind_pgbouncer_nothing_of_ours_is_left_in_a_session(pooler: PgBouncer, stack: ExitStack) -> None:
    state = stack.enter_context(open_client(pooler.url, deadline=PATIENCE))
    counter = state.counter("c")
    calls: list[Callable[[], object]] = [
        *(counter.increment, lambda: counter.increment(key="k"), lambda: counter.value, state.counters),
        *(lambda: counter.set(LARGEST), counter.increment, counter.delete),
        *(lambda: pooler.server.query("DROP TABLE counter_server_clients"), counter.increment),
    ]
    for call in calls:
        with suppress(LimitReached, StateLost):
            call()
        with psycopg.connect(pooler.url, autocommit=True, prepare_threshold=None) as stranger:
            settings = stranger.execute(
                "SELECT name FROM pg_settings WHERE source = 'session' AND name <> 'client_encoding'"
            ).fetchall()
            assert settings == []
            assert stranger.execute("SELECT * FROM pg_prepared_statements").fetchall() == []
            assert stranger.execute("SELECT * FROM pg_locks WHERE locktype = 'advisory'").fetchall() == []


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_connections_cut_in_the_middle_of_a_reply(
    kind: str, request: pytest.FixtureRequest, cut: Callable[[Path], Cutter], stack: ExitStack, tmp_path: Path
) -> None:
    server = request.getfixturevalue("mariadb" if kind == "mariadb" else "postgres")
    database: str = request.getfixturevalue("schema" if kind == "mariadb" else "database")
    cutter = cut(server.socket)
    place = f"127.0.0.1:{cutter.port}/{database}"
    urls = {
        "postgresql": f"postgresql://counter@{place}?sslmode=disable&gssencmode=disable",
        "mariadb": f"mariadb://root@{place}",
    }
    history = StoreLoad(urls[kind], "hot", 4, 8, 100).finish()
    assert len(history) == 4 * 8 * 100
    assert cutter.cuts >= 10
    state = stack.enter_context(open_client(server.url_of(database)))
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


def test_processes_that_count_in_one_sqlite_file_are_killed(stack: ExitStack, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/counters.db"
    state = stack.enter_context(open_client(url, deadline=PATIENCE))
    load = LoggedLoad(url, "hot", 4, 8, tmp_path)
    stack.callback(load.kill)
    for goal in (500, 1000, 1500):
        eventually(lambda: state.counter("hot").value > goal, "progress of the load")
        load.kill_one()
    seen = state.counter("hot").value
    eventually(lambda: state.counter("hot").value > seen + 1000, "progress of the one that is left")
    history = load.finish()
    assert any(not operation.answers for operation in history)
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")
    with closing(sqlite3.connect(tmp_path / "counters.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_8_processes_make_the_tables_and_one_counter_at_once(
    sql: tuple[str, Callable[..., None]], stack: ExitStack, tmp_path: Path
) -> None:
    url, _ = sql
    history = StoreLoad(url, "new", 8, 1, 20).finish()
    state = stack.enter_context(open_client(url))
    assert state.counter("new").value == 8 * 20
    assert_exactly_once(history, 8 * 20, tmp_path / "history.json")


def test_a_new_counter_made_and_deleted_by_many_at_once_loses_nothing(
    sql: tuple[str, Callable[..., None]], stack: ExitStack
) -> None:
    """Each thread is a client of its own: nothing but the database keeps them apart."""
    url, _ = sql

    def work() -> tuple[int, int]:
        with open_client(url, deadline=PATIENCE) as state:
            counted = deleted = 0
            for n in range(40):
                state.counter("all").increment(maximum=10**9 if n % 2 else None)
                if state.counter("new").increment() == 1:
                    counted += 1
                deleted += state.counter("new").delete()
            return counted, deleted

    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(lambda _: work(), range(8)))
    state = stack.enter_context(open_client(url))
    assert state.counter("all").value == 8 * 40
    # Each removal let it begin again at 1: no increment went to a counter that was already removed.
    assert sum(counted for counted, _ in done) == sum(deleted for _, deleted in done)
    assert state.counter("new").value == 0


def test_a_frozen_postgres_holds_nobody_beyond_the_deadline(
    postgres: PostgresServer, database: str, stack: ExitStack
) -> None:
    url = postgres.url_of(database)
    state = stack.enter_context(open_client(url))
    counter = state.counter("c")
    assert [counter.increment() for _ in range(3)] == [1, 2, 3]
    backends = postgres.query(
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()",
        database,
    )
    assert backends
    with ExitStack() as ice:
        for (pid,) in backends:
            ice.enter_context(frozen(pid))
        ice.enter_context(frozen(postgres.pid))
        with impatient(state), pytest.raises(DeadlineExceeded) as late:
            counter.increment()
        with pytest.raises(DeadlineExceeded) as unreachable:
            stack.enter_context(open_client(url, deadline=0.3)).counter("c").increment()
    assert late.value.outcome == "not_applied"  # it was not asked to commit
    assert unreachable.value.outcome == "not_applied"
    assert stack.enter_context(open_client(url)).counter("c").increment() == 4


def test_a_frozen_mariadb_holds_nobody_beyond_the_deadline(
    mariadb: MariaDbServer, schema: str, stack: ExitStack
) -> None:
    url = mariadb.url_of(schema)
    state = stack.enter_context(open_client(url))
    assert state.counter("c").increment() == 1
    with frozen(mariadb.pid):
        with impatient(state), pytest.raises(DeadlineExceeded) as late:
            state.counter("c").increment()
        with pytest.raises(DeadlineExceeded):
            stack.enter_context(open_client(url, deadline=0.3)).counter("c").increment()
    assert late.value.outcome == "not_applied"
    assert stack.enter_context(open_client(url, deadline=PATIENCE)).counter("c").increment() == 2


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_an_interrupted_call_closes_its_connection_and_shifts_no_answer(
    kind: str, request: pytest.FixtureRequest, stack: ExitStack
) -> None:
    server = request.getfixturevalue("mariadb" if kind == "mariadb" else "postgres")
    database: str = request.getfixturevalue("schema" if kind == "mariadb" else "database")
    store: Any = stack.enter_context(closing(open_store(server.url_of(database))))

    def apply(*operations: Operation) -> list[Result]:
        found: list[Result] = store.apply(Batch(os.urandom(16), 1, list(operations)), time.monotonic() + PATIENCE)
        return found

    assert apply(Increment("c")) == [1]
    with store.connection(time.monotonic() + PATIENCE) as connection:
        driver = connection.connection.driver_connection
    descriptor = driver._sock.fileno() if kind == "mariadb" else driver.fileno()
    with ExitStack() as ice:
        for pid in server.children if kind == "postgresql" else [server.pid]:
            ice.enter_context(frozen(pid))
        with pytest.raises(Interrupted), interrupted_when_sent(descriptor):
            apply(Increment("c"))
    assert driver.closed if kind == "postgresql" else not driver.open
    assert apply(Set("other", 10), Increment("other")) == [10, 11]
    assert apply(Increment("c")) == [2]


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_lock_of_a_stranger_is_waited_for_until_the_deadline_and_nothing_is_counted(
    kind: str, request: pytest.FixtureRequest, stack: ExitStack
) -> None:
    server = request.getfixturevalue("mariadb" if kind == "mariadb" else "postgres")
    database: str = request.getfixturevalue("schema" if kind == "mariadb" else "database")
    url = server.url_of(database)
    state = stack.enter_context(open_client(url))
    assert state.counter("c").increment() == 1
    connect: dict[str, Callable[[], Any]] = {
        "postgresql": lambda: psycopg.connect(url),
        "mariadb": lambda: server.connect(database),
    }
    with closing(connect[kind]()) as stranger, impatient(state):
        stranger.cursor().execute("BEGIN")
        stranger.cursor().execute("UPDATE counter_server_counters SET value = value + 10 WHERE name <> ''")
        for maximum in (None, 100):
            with pytest.raises(DeadlineExceeded) as late:
                state.counter("c").increment(maximum=maximum)
            assert late.value.outcome == "not_applied"
        stranger.commit()
    assert state.counter("c").increment(maximum=100) == 12


@pytest.mark.parametrize("how", ["drop", "empty"])
def test_a_database_without_its_memory_says_so_before_any_number_begins_anew(
    sql: tuple[str, Callable[..., None]], stack: ExitStack, how: str
) -> None:
    url, execute = sql
    state = stack.enter_context(open_client(url))
    counter = state.counter("c")
    calls: dict[str, Callable[[], int]] = {
        "by a plain increment": counter.increment,
        "by another": lambda: counter.increment(key="k"),
        "by a read": lambda: counter.value,
    }
    for forget_how in calls:
        assert [state.counter("c").increment() for _ in range(3)] == [1, 2, 3]
        for table in ("meta", "counters", "clients", "keys"):
            execute(f"{'DROP TABLE' if how == 'drop' else 'DELETE FROM'} counter_server_{table}")
        call = calls[forget_how]
        with pytest.raises(StateLost) as lost:
            call()
        assert lost.value.outcome == "not_applied"


@pytest.mark.parametrize("table", ["counters", "keys", "clients"])
@pytest.mark.parametrize("how", ["DELETE FROM", "DROP TABLE"])
def test_a_database_that_lost_one_table_says_so_once_to_each_process(
    sql: tuple[str, Callable[..., None]], stack: ExitStack, how: str, table: str
) -> None:
    """A new process reports it too, if it comes first. A deleted counter is not a loss."""
    url, execute = sql
    delete = "DELETE FROM"
    calls: list[Callable[[State], object]] = [
        lambda state: state.counter("c").increment(key="k"),
        lambda state: state.counter("c").value,
        lambda state: state.counters(),
    ]
    calls.append(lambda state: state.counter("c").increment())
    for call in calls:
        knew = stack.enter_context(open_client(url))
        assert knew.counter("c").increment(key="first") == 1
        assert knew.counter("c").delete()
        assert knew.counter("c").increment() == 1
        execute(f"{how} counter_server_{table}")
        for state in (stack.enter_context(open_client(url)), knew):
            with pytest.raises(StateLost) as lost:
                call(state)
            assert lost.value.outcome == "not_applied"
            assert state.counters().counters == ([] if table == "counters" else [("c", 1)])
        for emptied in ("meta", "counters", "clients", "keys"):
            execute(f"{delete} counter_server_{emptied}")


def test_a_file_that_was_removed_is_not_counted_in(stack: ExitStack, tmp_path: Path) -> None:
    state = stack.enter_context(open_client(f"sqlite:///{tmp_path}/counters.db"))
    assert state.counter("c").increment() == 1
    for file in tmp_path.glob("counters.db*"):
        file.unlink()
    with pytest.raises(StateLost):
        state.counter("c").increment()
    assert state.counter("c").increment() == 1


def test_tables_of_a_newer_version_are_refused_by_name(sql: tuple[str, Callable[..., None]], stack: ExitStack) -> None:
    url, execute = sql
    state = stack.enter_context(open_client(url))
    assert state.counter("c").increment() == 1
    execute("UPDATE counter_server_meta SET version = 2")
    for within in (state, stack.enter_context(open_client(url))):
        with pytest.raises(StartupError, match="version 2, of a newer"):
            within.counter("c").increment()
        with pytest.raises(StartupError, match="version 2, of a newer"):
            _ = within.counter("c").value
    execute("UPDATE counter_server_meta SET version = 1")
    assert state.counter("c").increment() == 2


def test_what_has_expired_is_forgotten(sql: tuple[str, Callable[..., None]], stack: ExitStack) -> None:
    url, execute = sql
    first = stack.enter_context(open_client(url))
    assert first.counter("c").increment(key="old") == 1
    assert first.counter("c").increment(key="new") == 2
    execute("UPDATE counter_server_clients SET used = used - 3601")
    execute("UPDATE counter_server_keys SET used = used - 86401 WHERE \"key\" = 'old'")
    second = stack.enter_context(open_client(url))
    assert second.counter("c").increment(key="new") == 2
    assert second.counter("c").increment(key="old") == 3  # even by a process that has not removed expired keys yet
    assert second.counter("c").increment() == 4
    execute("INSERT INTO counter_server_keys SELECT 'older', fingerprint, value, 0 FROM counter_server_keys LIMIT 1")
    third = stack.enter_context(open_client(url))
    assert [third.counter("c").increment() for _ in range(2)] == [5, 6]
    execute("INSERT INTO counter_server_keys SELECT 'older', fingerprint, value, 0 FROM counter_server_keys LIMIT 1")
    execute("INSERT INTO counter_server_meta SELECT count(*) + 5, 'clients' FROM counter_server_clients")
    execute("DELETE FROM counter_server_meta WHERE version = 8")  # `second`, `third` and our mark
    with pytest.raises((sqlite3.IntegrityError, psycopg.errors.UniqueViolation, pymysql.IntegrityError)):
        execute("INSERT INTO counter_server_meta VALUES (1, 'a second one')")


def test_a_database_that_is_full_refuses_writes_answers_reads_and_heals(
    postgres: PostgresServer, database: str, stack: ExitStack
) -> None:
    state = stack.enter_context(open_client(postgres.url_of(database)))
    assert state.counter("c").increment() == 1
    postgres.query(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'could not extend file' USING ERRCODE = '53100'; END $$",
        database,
    )
    postgres.query(
        "CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON counter_server_counters EXECUTE FUNCTION full_disk()",
        database,
    )
    for maximum in (None, 10):
        with pytest.raises(StorageFull) as full:
            state.counter("c").increment(maximum=maximum)
        assert full.value.outcome == "not_applied"
        assert state.counter("c").value == 1
    postgres.query("DROP TRIGGER full_disk ON counter_server_counters", database)
    assert state.counter("c").increment() == 2


def test_a_mariadb_that_is_full_refuses_writes_answers_reads_and_heals(
    mariadb: MariaDbServer, schema: str, stack: ExitStack
) -> None:
    state = stack.enter_context(open_client(mariadb.url_of(schema)))
    assert state.counter("c").increment(key="k") == 1
    full_table = "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1114, MESSAGE_TEXT = 'The table is full'"
    mariadb.query(f"CREATE TRIGGER full BEFORE INSERT ON counter_server_counters FOR EACH ROW {full_table}", schema)
    with pytest.raises(StorageFull, match="The table is full; nothing was counted") as full:
        state.counter("c").increment()
    assert full.value.outcome == "not_applied"
    assert state.counter("c").value == 1
    assert state.counter("c").increment(key="k") == 1
    mariadb.query("DROP TRIGGER full", schema)
    assert state.counter("c").increment() == 2


def test_a_mariadb_that_lets_nobody_in_says_so(mariadb: MariaDbServer, schema: str, stack: ExitStack) -> None:
    url = mariadb.url_of(schema)
    mariadb.query("CREATE OR REPLACE USER stranger IDENTIFIED BY 'secret'")
    for who in ("stranger", "stranger:wrong", "stranger:secret"):  # the last may log in, but not use the database
        with pytest.raises(AccessDenied) as denied:
            stack.enter_context(open_client(url.replace("root@", f"{who}@"))).counter("c").increment()
        assert denied.value.outcome == "not_applied"
        assert "wrong" not in str(denied.value)
    with pytest.raises(StartupError, match="no_such"):
        stack.enter_context(open_client(url.replace(schema, "no_such"))).counter("c").increment()


def test_a_postgres_that_lets_nobody_in_says_so(postgres: PostgresServer, database: str, stack: ExitStack) -> None:
    url = postgres.url_of(database)
    postgres.query("DROP ROLE IF EXISTS stranger")
    postgres.query("CREATE ROLE stranger LOGIN PASSWORD 'secret'")
    for who in ("stranger", "stranger:wrong", "nobody"):
        with pytest.raises(AccessDenied) as denied:
            stack.enter_context(open_client(url.replace("counter@", f"{who}@"))).counter("c").increment()
        assert denied.value.outcome == "not_applied"
        assert "wrong" not in str(denied.value)
    with pytest.raises(AccessDenied):  # let in, but not to make tables
        stack.enter_context(open_client(url.replace("counter@", "stranger:secret@"))).counter("c").increment()
    with pytest.raises(StartupError, match="no_such"):
        stack.enter_context(open_client(url.replace(database, "no_such"))).counter("c").increment()
    options = "&options=-cdefault_transaction_read_only=on"
    reader = stack.enter_context(open_client(url + options, deadline=0.2))
    with pytest.raises(DeadlineExceeded) as read_only:
        reader.counter("c").increment()
    assert read_only.value.outcome == "not_applied"


def test_a_file_that_cannot_be_a_database_says_so(stack: ExitStack, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database" * 1000)
    for path in (tmp_path, tmp_path / "no" / "such.db", tmp_path / "text.db"):
        with pytest.raises(StartupError):
            stack.enter_context(open_client(f"sqlite:///{path}")).counter("c").increment()
    assert (tmp_path / "text.db").read_text() == "no database" * 1000


EXPECTED_STATES = {
    **dict.fromkeys(["28000", "28P01", "42501"], AccessDenied),
    "53100": StorageFull,
    **dict.fromkeys(["3D000", "3F000"], StartupError),
    **dict.fromkeys(["40001", "40P01", "55P03", "57014", "25006", "53200", "53300"], Disconnected),
    "42P01": TablesMissing,
    **dict.fromkeys(["57P01", "57P02", "57P03", "08006"], Disconnected),
    **dict.fromkeys(["XX000", "23505", "22012", "42601"], OutcomeUnknown),
}


def test_each_error_of_postgres_is_one_of_ours() -> None:
    store = open_sql_store("postgresql://127.0.0.1:1/db")
    states = {
        kind.sqlstate: kind
        for kind in vars(psycopg.errors).values()
        if isinstance(kind, type) and issubclass(kind, psycopg.Error) and kind.sqlstate
    }
    assert set(EXPECTED_STATES) <= set(states)
    for state, kind in states.items():
        error = store.translated(kind("it"), sent=True)
        assert isinstance(error, (CounterServerError, Disconnected)), state
        assert type(error) is EXPECTED_STATES.get(state, type(error)), state
        assert str(error).startswith("postgresql://127.0.0.1:1/db")
    for sent in (True, False):
        error = store.translated(psycopg.OperationalError("the connection is closed"), sent=sent)
        assert isinstance(error, Disconnected)
        assert error.sent == sent


@pytest.mark.parametrize("sent", [True, False])
def test_each_error_of_mysql_is_one_of_ours(*, sent: bool) -> None:
    store = open_sql_store("mysql://user:secret@127.0.0.1:1/db")
    expected: dict[int, type[Exception]] = {
        **dict.fromkeys([1044, 1045, 1142, 1698], AccessDenied),
        **dict.fromkeys([1021, 1114], StorageFull),
        **dict.fromkeys([1049, 1153], StartupError),
        **dict.fromkeys([0, 1040, 1053, 1205, 1213, 1290, 2003, 2006, 2013], Disconnected),
        1146: TablesMissing,
        1030: StorageFull,  # "Got error 28"
    }
    for code in range(3000):
        error = store.translated(pymysql.OperationalError(code, "Got error 28" if code == 1030 else "it"), sent=sent)
        assert isinstance(error, (CounterServerError, Disconnected)), code
        assert type(error) is expected.get(code, type(error)), code
        assert str(error).startswith("mysql://127.0.0.1:1/db")
    for code, undone in ((1213, True), (1205, True), (2013, False), (1927, False)):
        error = store.translated(pymysql.OperationalError(code, "it"), sent=sent)
        assert isinstance(error, Disconnected)
        assert error.sent == (sent and not undone)


def test_each_error_of_sqlite_is_one_of_ours(tmp_path: Path) -> None:
    store = open_sql_store(f"sqlite:///{tmp_path}/x.db")
    expected = {
        sqlite3.SQLITE_BUSY: Disconnected,
        sqlite3.SQLITE_BUSY_SNAPSHOT: Disconnected,
        sqlite3.SQLITE_LOCKED: Disconnected,
        sqlite3.SQLITE_FULL: StorageFull,
        sqlite3.SQLITE_READONLY: AccessDenied,
        sqlite3.SQLITE_IOERR: OutcomeUnknown,
        sqlite3.SQLITE_IOERR_FSYNC: OutcomeUnknown,
    }
    codes = [code for name, code in vars(sqlite3).items() if name.startswith("SQLITE_") and isinstance(code, int)]
    for code in codes:
        failed = sqlite3.OperationalError("it")
        failed.sqlite_errorcode = code
        error = store.translated(failed, sent=True)
        assert isinstance(error, (CounterServerError, Disconnected))
        assert type(error) is expected.get(code, type(error)), code


def test_a_child_of_a_fork_talks_to_the_database_on_a_connection_of_its_own(
    sql: tuple[str, Callable[..., None]], stack: ExitStack
) -> None:
    counter = stack.enter_context(open_client(sql[0], deadline=PATIENCE)).counter("c")
    assert counter.increment() == 1
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for _ in range(100):
                os.write(writer, b"%d\n" % counter.increment())
        finally:
            os._exit(0)
    os.close(writer)
    ours = [counter.increment() for _ in range(100)]
    with open(reader) as pipe:
        theirs = [int(line) for line in pipe]
    os.waitpid(child, 0)
    assert sorted(ours + theirs) == list(range(2, 202))
