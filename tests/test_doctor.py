"""`counter-server doctor` reports whether live servers can lose numbers."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from counter_server.cli import examine
from counter_server.errors import InvalidRequest
from counter_server.stores import Finding
from counter_server.stores.databases import judge_mysql, judge_postgresql
from tests.engines import DURABLE, MariaDbServer, MemcachedServer, PostgresServer, RedisServer
from tests.load import open_client
from tests.processes import PATIENCE, ROOT, Manager, eventually, frozen

StartRedis = Callable[..., RedisServer]


@pytest.fixture
def start_redis(stack: ExitStack, tmp_path: Path) -> StartRedis:
    return lambda *options, name="redis": stack.enter_context(RedisServer(tmp_path / name, *options))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def findings(url: str) -> list[Finding]:
    return examine(url, PATIENCE)[1]


def worries(url: str) -> list[str]:
    """Return the sentences of all findings that are not ok."""
    return [finding.sentence for finding in findings(url) if finding.level != "ok"]


def doctor(*arguments: str) -> tuple[int, list[str]]:
    """Return the command's exit status and all its lines."""
    command = [sys.executable, "-m", "counter_server", "doctor", *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return told.returncode, (told.stdout + told.stderr).splitlines()


# The command


def test_a_durable_redis_is_ok(start_redis: StartRedis) -> None:
    server = start_redis(*DURABLE)
    status, lines = doctor("--store", server.url)
    assert status == 0, lines
    assert lines[0] == server.url
    assert all(line.startswith("ok  ") for line in lines[1:])
    assert any("a number is on its disk before it is answered" in line for line in lines)
    assert len(lines) < 24


def test_a_risk_is_printed_and_sets_the_exit_status(start_redis: StartRedis) -> None:
    status, lines = doctor("--store", start_redis().url)
    assert status == 1
    assert any(line.startswith("may lose  appendonly no") for line in lines)


@pytest.mark.parametrize(
    "prefix",
    ["unix://", "memcached://", "manager://", "sqlite:///", "postgresql:///db?host=", "mysql:///db?unix_socket="],
)
def test_an_unreachable_server_is_reported_in_one_line(tmp_path: Path, prefix: str) -> None:
    url = f"{prefix}{tmp_path}/nothing"
    status, lines = doctor("--store", url)
    assert status == 1
    assert unquote(lines[0]) == url
    assert len(lines) == 2
    assert lines[1].startswith("problem   ")
    assert str(tmp_path) in unquote(lines[1])
    assert not (tmp_path / "nothing").exists()


def test_an_unknown_store_is_an_error() -> None:
    assert doctor("--store", "nothing://")[0] == 1
    with pytest.raises(InvalidRequest):
        examine("nothing://", PATIENCE)


def test_a_password_is_never_printed(start_redis: StartRedis) -> None:
    server = start_redis(*DURABLE, "--requirepass", "secret")
    for password in ("secret", "wrong"):
        status, lines = doctor("--store", f"unix://:{password}@{server.socket}")
        assert status == (0 if password == "secret" else 1)
        assert not any(password in line for line in lines)


# The manager


@pytest.mark.parametrize(
    ("durability", "expected"),
    [("commit", []), ("process", ["durability process"]), ("none", ["durability none"])],
)
def test_a_manager_reports_its_durability(
    start_manager: Callable[..., Manager], data_dir: Path, durability: str, expected: list[str]
) -> None:
    manager = start_manager("--durability", durability)
    with open_client(manager.url) as state:
        state.counter("a").increment()
        state.counter("b").increment()
    assert [sentence.partition(":")[0] for sentence in worries(manager.url)] == expected
    first = findings(manager.url)[0].sentence
    for told in (f"pid {manager.pid},", "has 2 counters", str(data_dir)):
        assert told in first


def test_memory_is_for_tests_only() -> None:
    assert len(worries("memory://")) == 1


# Redis and Valkey


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--appendonly", "yes", "--appendfsync", "everysec"), ["appendfsync everysec"]),
        (("--appendonly", "yes", "--appendfsync", "no"), ["appendfsync no"]),
        ((*DURABLE, "--no-appendfsync-on-rewrite", "yes"), ["no-appendfsync-on-rewrite yes"]),
        ((), ["there are no snapshots either"]),
        (("--save", "3600 1"), ["a snapshot (3600 1)"]),
        ((*DURABLE, "--maxmemory", "100mb"), []),
        ((*DURABLE, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), ["deletes counters"]),
        ((*DURABLE, "--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl"), ["may count twice"]),
        ((*DURABLE, "--maxmemory-policy", "allkeys-lru"), []),
    ],
)
def test_redis_reports_its_durability(start_redis: StartRedis, options: tuple[str, ...], expected: list[str]) -> None:
    found = worries(start_redis(*options).url)
    assert len(found) == len(expected), found
    for sentence, part in zip(found, expected, strict=True):
        assert part in sentence


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_evicts_is_a_problem_and_the_fix_is_named(start_redis: StartRedis, policy: str) -> None:
    server = start_redis(*DURABLE, "--maxmemory", "100mb", "--maxmemory-policy", policy)
    (problem,) = (finding.sentence for finding in findings(server.url) if finding.level == "problem")
    assert "CONFIG SET maxmemory-policy noeviction" in problem


def test_a_redis_that_refuses_config_is_reported(start_redis: StartRedis) -> None:
    renamed = start_redis(*DURABLE, "--rename-command", "CONFIG", "''")
    (sentence,) = worries(renamed.url)
    assert "CONFIG is not permitted" in sentence
    assert "unknown command" in sentence


def test_a_user_without_permission_for_config_is_reported(start_redis: StartRedis) -> None:
    server = start_redis(*DURABLE)
    server.command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-config")
    (sentence,) = worries(f"unix://app:secret@{server.socket}")
    assert "CONFIG is not permitted" in sentence
    server.command("ACL", "SETUSER", "app", "-info")
    (sentence,) = worries(f"unix://app:secret@{server.socket}")
    assert "does not let this process in" in sentence


def test_asynchronous_replication_and_the_address_of_a_replica_are_reported(start_redis: StartRedis) -> None:
    # The replica connects by TCP, so the master listens on a port that was free a moment ago.
    master = start_redis(*DURABLE)
    port = free_port()
    assert master.command("CONFIG", "SET", "bind", "127.0.0.1") == b"+OK\r\n"
    assert master.command("CONFIG", "SET", "port", str(port)) == b"+OK\r\n"
    replica = start_redis(*DURABLE, "--replicaof", "127.0.0.1", str(port), name="replica")
    eventually(lambda: b"connected_slaves:1" in master.command("INFO", "replication"), "a replica")
    (sentence,) = worries(master.url)
    assert "1 connected replicas, min-replicas-to-write 0" in sentence
    master.command("CONFIG", "SET", "min-replicas-to-write", "1")
    (sentence,) = worries(master.url)
    assert "min-replicas-to-write 1" in sentence
    assert any("name the master" in sentence for sentence in worries(replica.url))


def test_a_silent_redis_is_reported_within_the_time_limit(start_redis: StartRedis) -> None:
    server = start_redis()
    with frozen(server.pid):
        (finding,) = examine(server.url, 0.2)[1]
    assert finding.level == "problem"


# memcached


@pytest.mark.parametrize("option", ["", "-M"])
def test_memcached_always_has_a_risk(tmp_path: Path, stack: ExitStack, option: str) -> None:
    server = stack.enter_context(MemcachedServer(tmp_path / "memcached", *filter(None, [option])))
    status, lines = doctor("--store", server.url)
    assert status == 1
    assert any("67108864 bytes" in line for line in lines)
    assert any("in memory" in line for line in lines)
    assert any("at most once" in line for line in lines)
    assert any(line.startswith("ok        evictions are off") for line in lines) == (option == "-M")
    assert any(line.startswith("may lose  evictions are on") for line in lines) == (option == "")


def test_memcached_reports_its_evictions(tmp_path: Path, stack: ExitStack) -> None:
    server = stack.enter_context(MemcachedServer(tmp_path / "memcached", "-m", "2"))
    assert not any("were evicted" in sentence for sentence in worries(server.url))
    for n in range(80):
        server.command(f"set filler{n} 0 0 100000\r\n{'x' * 100_000}")
    assert any("items were evicted" in sentence for sentence in worries(server.url))


def test_a_silent_memcached_is_reported_within_the_time_limit(tmp_path: Path, stack: ExitStack) -> None:
    server = stack.enter_context(MemcachedServer(tmp_path / "memcached"))
    with frozen(server.pid):
        (finding,) = examine(server.url, 0.2)[1]
    assert finding.level == "problem"


# SQL


def test_a_durable_postgres_is_ok(postgres: PostgresServer) -> None:
    found = findings(postgres.url)
    assert {finding.level for finding in found} == {"ok"}
    assert found[0].sentence.startswith("PostgreSQL ")
    assert any("a number is on its disk before it is answered" in finding.sentence for finding in found)


def test_a_postgres_without_fsync_may_lose_numbers(stack: ExitStack) -> None:
    server = stack.enter_context(PostgresServer("-c", "fsync=off", "-c", "full_page_writes=off"))
    assert [worry.split(":")[0] for worry in worries(server.url)] == ["fsync off", "full_page_writes off"]


def test_our_sessions_override_a_server_wide_synchronous_commit_off(stack: ExitStack) -> None:
    server = stack.enter_context(PostgresServer("-c", "synchronous_commit=off"))
    assert worries(server.url) == []
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
        ({"synchronous_standby_names": "one"}, ["ok", "ok", "ok"]),
        ({"synchronous_standby_names": "one", "synchronous_commit": "remote_apply"}, ["ok", "ok", "ok"]),
        ({"synchronous_standby_names": "one", "synchronous_commit": "remote_write"}, ["ok", "ok", "may lose"]),
        ({"synchronous_standby_names": "one", "synchronous_commit": "local"}, ["ok", "ok", "may lose"]),
    ],
)
def test_standbys_are_judged_by_their_settings(told: dict[str, str], levels: list[str]) -> None:
    usual = {
        "server_version": "15",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "synchronous_standby_names": "",
        "in_recovery": "false",
        "standbys": "0",
    }
    assert [finding.level for finding in judge_postgresql({**usual, **told})] == levels


def test_a_mariadb_that_keeps_all_promises_is_well(stack: ExitStack) -> None:
    server = stack.enter_context(MariaDbServer())
    with open_client(server.url) as state:
        assert state.counter("c").increment() == 1
    found = findings(server.url)
    assert {finding.level for finding in found} == {"ok"}
    assert found[0].sentence.startswith("MariaDB ")
    assert any("a number is on its disk before it is answered" in finding.sentence for finding in found)
    server.query("ALTER TABLE counter_server_keys ENGINE = Aria")
    assert worries(server.url) == ["counter_server_keys: no transactions; run ALTER TABLE ... ENGINE = InnoDB"]


def test_a_mariadb_that_does_not_wait_for_its_disk_may_lose(stack: ExitStack) -> None:
    options = ("--innodb-flush-log-at-trx-commit=2", "--log-bin", "--sync-binlog=0", "--max-allowed-packet=1M")
    server = stack.enter_context(MariaDbServer(*options, "--skip-innodb-doublewrite"))
    assert [worry.split(":")[0] for worry in worries(server.url)] == [
        *("innodb_flush_log_at_trx_commit 2", "innodb_doublewrite OFF", "sync_binlog 0", "max_allowed_packet 1048576")
    ]


@pytest.mark.parametrize(
    ("read_only", "replicas", "expected"),
    [
        ("ON", 0, "takes no writes: name the primary"),
        ("OFF", 2, "2 asynchronous replicas: a failover may lose the last numbers"),
    ],
)
def test_what_replication_of_mysql_means_for_the_numbers(read_only: str, replicas: int, expected: str) -> None:
    settings = {"version": "8.4.3", "innodb_flush_log_at_trx_commit": "1", "read_only": read_only}
    found = judge_mysql(settings, [], replicas)
    assert found[0].sentence == "MySQL 8.4.3"
    (worry,) = (finding.sentence for finding in found if finding.level != "ok")
    assert expected in worry


def test_a_sqlite_file_is_ok(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/counters.db"
    with open_client(url) as state:
        assert state.counter("c").increment() == 1
    status, lines = doctor("--store", url)
    assert status == 0, lines
    assert any("synchronous FULL: a number is on its disk before it is answered" in line for line in lines)
