"""`counter-server doctor` reports whether live servers can lose numbers."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

from counter_server.cli.upkeep import diagnose
from counter_server.errors import InvalidRequest
from counter_server.store import Finding
from counter_server.stores.databases import mysql_findings, postgresql_findings
from tests.load import open_client
from tests.processes import PATIENCE, ROOT, Manager, eventually, frozen

if TYPE_CHECKING:  # the fast tier does without their packages
    from tests.engines import PostgresServer, RedisServer

StartRedis = Callable[..., "RedisServer"]
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def start_redis(stack: ExitStack, tmp_path: Path) -> StartRedis:
    from tests.engines import RedisServer

    return lambda *options, name="redis": stack.enter_context(RedisServer(tmp_path / name, *options))


def findings(url: str) -> list[Finding]:
    return diagnose(url, PATIENCE)[1]


def worries(url: str) -> list[str]:
    """Return the sentences of all findings that are not ok."""
    return [finding.sentence for finding in findings(url) if finding.level != "ok"]


def doctor(url: str) -> tuple[int, list[str]]:
    """Return the command's exit status and all its lines."""
    command = [sys.executable, "-m", "counter_server", "doctor", "--store", url]
    told = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return told.returncode, (told.stdout + told.stderr).splitlines()


ENGINES = ("unix://", "memcached://", "postgresql:///db?host=", "mysql:///db?unix_socket=")


@pytest.mark.parametrize("prefix", ["manager://", *(pytest.param(url, marks=pytest.mark.slow) for url in ENGINES)])
def test_an_unreachable_server_is_reported_in_one_line(tmp_path: Path, prefix: str) -> None:
    url = f"{prefix}{tmp_path}/nothing"
    status, (first, second) = doctor(url)
    assert (status, unquote(first)) == (1, url)
    assert second.startswith("problem   ")
    assert str(tmp_path) in unquote(second)
    assert not (tmp_path / "nothing").exists()


def test_an_unknown_store_is_an_error() -> None:
    with pytest.raises(InvalidRequest):
        diagnose("nothing://", PATIENCE)


def test_a_sqlite_file_is_ok(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/counters.db"
    with open_client(url) as state:
        assert state.counter("c").increment() == 1
    status, lines = doctor(url)
    assert status == 0, lines
    assert any("synchronous FULL: a number is on its disk before it is answered" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("durability", "expected"), [("commit", []), ("none", ["durability none"])])
def test_a_manager_reports_its_durability(
    start_manager: Callable[..., Manager], data_dir: Path, durability: str, expected: list[str]
) -> None:
    manager = start_manager("--durability", durability)
    with open_client(manager.url) as state:
        state.counter("a").increment()
    assert [sentence.partition(":")[0] for sentence in worries(manager.url)] == expected
    first = findings(manager.url)[0].sentence
    for told in (f"pid {manager.pid},", "has 1 counters", str(data_dir)):
        assert told in first


def test_memory_is_for_tests_only() -> None:
    assert len(worries("memory://")) == 1


@pytest.mark.slow
def test_redis_reports_its_durability(start_redis: StartRedis) -> None:
    server = start_redis(*DURABLE)
    status, lines = doctor(server.url)
    assert (status, lines[0]) == (0, server.url)
    assert all(line.startswith("ok  ") for line in lines[1:])
    assert any("a number is on its disk before it is answered" in line for line in lines)
    durable = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no", "save": '""'}
    durable |= {"maxmemory": "0", "maxmemory-policy": "noeviction"}
    for changed, expected in [
        ({"appendfsync": "everysec"}, "appendfsync everysec"),
        ({"appendfsync": "no"}, "appendfsync no"),
        ({"no-appendfsync-on-rewrite": "yes"}, "no-appendfsync-on-rewrite yes"),
        ({"appendonly": "no"}, "there are no snapshots either"),
        ({"appendonly": "no", "save": '"3600 1"'}, "a snapshot (3600 1)"),
        ({"maxmemory": "100mb"}, ""),
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "deletes counters"),
        ({"maxmemory": "100mb", "maxmemory-policy": "volatile-ttl"}, "may count twice"),
        ({"maxmemory-policy": "allkeys-lru"}, ""),
    ]:
        for name, value in {**durable, **changed}.items():
            assert server.command("CONFIG", "SET", name, value) == b"+OK\r\n"
        found = [finding for finding in findings(server.url) if finding.level != "ok"]
        assert len(found) == bool(expected), found
        for finding in found:
            assert expected in finding.sentence
            evicts = "maxmemory" in changed
            assert (finding.level == "problem") == evicts
            assert ("CONFIG SET maxmemory-policy noeviction" in finding.sentence) == evicts
    server.command("CONFIG", "SET", "appendonly", "no")
    status, lines = doctor(server.url)
    assert status == 1
    assert any(line.startswith("may lose  appendonly no") for line in lines)


@pytest.mark.slow
def test_a_password_is_never_printed_and_missing_rights_are_reported(start_redis: StartRedis) -> None:
    server = start_redis(*DURABLE)
    server.command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-config")
    (sentence,) = worries(f"unix://app:secret@{server.socket}")
    assert "CONFIG is not permitted" in sentence
    server.command("ACL", "SETUSER", "app", "-info")
    (sentence,) = worries(f"unix://app:secret@{server.socket}")
    assert "does not let this process in" in sentence
    server.command("CONFIG", "SET", "requirepass", "secret")
    for status, password in enumerate(("secret", "wrong")):
        told = doctor(f"unix://:{password}@{server.socket}")
        assert told[0] == status
        assert not any(password in line for line in told[1])
    renamed = start_redis(*DURABLE, "--rename-command", "CONFIG", "''", name="renamed")
    (sentence,) = worries(renamed.url)
    assert "CONFIG is not permitted" in sentence
    assert "unknown command" in sentence


@pytest.mark.slow
def test_asynchronous_replication_and_the_address_of_a_replica_are_reported(start_redis: StartRedis) -> None:
    # The replica connects by TCP, so the master listens on a port that was free a moment ago.
    master = start_redis(*DURABLE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert master.command("CONFIG", "SET", "bind", "127.0.0.1") == b"+OK\r\n"
    assert master.command("CONFIG", "SET", "port", str(port)) == b"+OK\r\n"
    replica = start_redis(*DURABLE, "--replicaof", "127.0.0.1", str(port), name="replica")
    eventually(lambda: b"connected_slaves:1" in master.command("INFO", "replication"), "a replica")
    for least in (0, 1):
        master.command("CONFIG", "SET", "min-replicas-to-write", str(least))
        (sentence,) = worries(master.url)
        assert f"1 connected replicas, min-replicas-to-write {least}" in sentence
    assert any("name the master" in sentence for sentence in worries(replica.url))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "size", "told"),
    [(("-M",), 64, "ok        evictions are off"), (("-m", "2"), 2, "may lose  evictions are on")],
)
def test_memcached_always_has_a_risk(
    stack: ExitStack, tmp_path: Path, options: tuple[str, ...], size: int, told: str
) -> None:
    from tests.engines import MemcachedServer

    server = stack.enter_context(MemcachedServer(tmp_path / "memcached", *options))
    status, lines = doctor(server.url)
    assert status == 1
    for words in (f"{size * 2**20} bytes", "in memory", "at most once", told):
        assert any(words in line for line in lines)
    assert not any("were evicted" in line for line in lines)
    if size == 2:
        for n in range(80):
            server.command(f"set filler{n} 0 0 100000\r\n{'x' * 100_000}")
        assert any("items were evicted" in sentence for sentence in worries(server.url))


@pytest.mark.slow
def test_a_silent_server_is_reported_within_the_time_limit(start_redis: StartRedis) -> None:
    with frozen((server := start_redis()).pid):
        (finding,) = diagnose(server.url, 0.2)[1]
    assert finding.level == "problem"


@pytest.mark.slow
def test_postgres_reports_its_durability(stack: ExitStack, postgres: "PostgresServer") -> None:
    """Our sessions override a server-wide `synchronous_commit` off."""
    from tests.engines import PostgresServer

    found = findings(postgres.url)
    assert {finding.level for finding in found} == {"ok"}
    assert found[0].sentence.startswith("PostgreSQL ")
    assert any("a number is on its disk before it is answered" in finding.sentence for finding in found)
    options = ("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off")
    server = stack.enter_context(PostgresServer(*options))
    assert [worry.split(":")[0] for worry in worries(server.url)] == ["fsync off", "full_page_writes off"]
    with open_client(server.url) as state:
        assert state.counter("c").increment() == 1
        store: Any = state.store
        with store.connection(time.monotonic() + PATIENCE) as session:
            store.begin_write(session, {"c"})
            assert session.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


@pytest.mark.parametrize(
    ("told", "levels"),
    [
        ({"in_recovery": "true"}, ["ok", "problem"]),
        ({"synchronous_standby_names": "s", "synchronous_commit": "off"}, ["ok", "ok", "ok"]),
        ({"standbys": "2"}, ["ok", "ok", "may lose"]),
        ({"synchronous_standby_names": "s", "synchronous_commit": "remote_apply"}, ["ok", "ok", "ok"]),
        ({"synchronous_standby_names": "s", "synchronous_commit": "remote_write"}, ["ok", "ok", "may lose"]),
        ({"synchronous_standby_names": "s", "synchronous_commit": "local"}, ["ok", "ok", "may lose"]),
    ],
)
def test_standbys_are_judged_by_their_settings(told: dict[str, str], levels: list[str]) -> None:
    on = dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit"), "on")
    usual = {"server_version": "15", **on, "synchronous_standby_names": "", "in_recovery": "false", "standbys": "0"}
    assert [finding.level for finding in postgresql_findings({**usual, **told})] == levels


@pytest.mark.slow
def test_mariadb_reports_its_durability(stack: ExitStack) -> None:
    from tests.engines import MariaDbServer

    server = stack.enter_context(MariaDbServer("--log-bin", "--sync-binlog=1"))
    with open_client(server.url) as state:
        assert state.counter("c").increment() == 1
    found = findings(server.url)
    assert {finding.level for finding in found} == {"ok"}
    assert found[0].sentence.startswith("MariaDB ")
    assert any("a number is on its disk before it is answered" in finding.sentence for finding in found)
    server.query("ALTER TABLE counter_server_keys ENGINE = Aria")
    assert worries(server.url) == ["counter_server_keys: no transactions; run ALTER TABLE ... ENGINE = InnoDB"]
    server.query("ALTER TABLE counter_server_keys ENGINE = InnoDB")
    for setting in ("innodb_flush_log_at_trx_commit = 2", "sync_binlog = 0", "max_allowed_packet = 1048576"):
        server.query(f"SET GLOBAL {setting}")
    expected = ["innodb_flush_log_at_trx_commit 2", "sync_binlog 0", "max_allowed_packet 1048576"]
    assert [worry.split(":")[0] for worry in worries(server.url)] == expected


@pytest.mark.parametrize(
    ("setting", "replicas", "expected"),
    [
        ({"read_only": "ON"}, 0, "takes no writes: name the primary"),
        ({"read_only": "OFF"}, 2, "2 asynchronous replicas: a failover may lose the last numbers"),
        ({"innodb_doublewrite": "OFF"}, 0, "innodb_doublewrite OFF"),
    ],
)
def test_mysql_is_judged_by_its_settings(setting: dict[str, str], replicas: int, expected: str) -> None:
    found = mysql_findings({"version": "8.4.3", "innodb_flush_log_at_trx_commit": "1", **setting}, [], replicas)
    assert found[0].sentence == "MySQL 8.4.3"
    (worry,) = (finding.sentence for finding in found if finding.level != "ok")
    assert expected in worry
