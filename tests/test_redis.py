"""Redis killed under load, cut off in the middle of a reply, full, frozen, a replica, a cluster: the checker passes."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis._parsers.base import BaseParser

from counter_server import State
from counter_server.errors import (
    AccessDenied,
    DeadlineExceeded,
    Disconnected,
    OutcomeUnknown,
    StateLost,
    StorageFull,
)
from counter_server.operations import Page
from counter_server.stores.redis import RedisStore
from tests.cutter import Cutter
from tests.engines import DURABLE, RedisServer
from tests.history import assert_exactly_once
from tests.load import StoreLoad, impatient, open_client
from tests.processes import PATIENCE, eventually, frozen

pytestmark = pytest.mark.slow


@pytest.fixture
def start_redis(stack: ExitStack, tmp_path: Path) -> Callable[..., RedisServer]:
    return lambda *options: stack.enter_context(RedisServer(tmp_path / "redis", *options))


def test_redis_killed_and_started_again_under_load(
    start_redis: Callable[..., RedisServer], stack: ExitStack, tmp_path: Path
) -> None:
    server = start_redis(*DURABLE)
    state = stack.enter_context(open_client(server.url))
    load = StoreLoad(server.url, "hot", 4, 8, 300)
    for kill in range(5):
        goal = (kill + 1) * 1000
        eventually(lambda: state.counter("hot").value > goal, "progress of the load")
        server.kill()
        server.start()
    history = load.finish()
    assert len(history) == 4 * 8 * 300
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


def test_redis_without_its_memory_says_so_before_any_number_begins_anew(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    server = start_redis()
    state = stack.enter_context(open_client(server.url))
    assert [state.counter("c").increment() for _ in range(3)] == [1, 2, 3]
    server.kill()
    server.start()
    with pytest.raises(StateLost) as lost:
        state.counter("c").increment()
    assert lost.value.outcome == "not_applied"
    assert state.counter("c").increment() == 1


def test_a_redis_that_lost_its_counters_says_so_once_to_each_process(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    """A new process reports it too, if it comes first."""
    server = start_redis()
    calls: list[Callable[[State], object]] = [
        lambda state: state.counter("c").increment(),
        lambda state: state.counter("c").increment(key="k"),
        lambda state: state.counter("c").value,
        lambda state: state.counters(),
    ]
    for call in calls:
        knew = stack.enter_context(open_client(server.url))
        assert knew.counter("c").increment() == 1
        server.command("DEL", "{counter_server}:counters")
        for state in (stack.enter_context(open_client(server.url)), knew):
            with pytest.raises(StateLost) as lost:
                call(state)
            assert lost.value.outcome == "not_applied"
            assert state.counter("c").value == 0
            assert state.counters().counters == []
        server.command("DEL", "{counter_server}:counters", "{counter_server}:epoch")


@pytest.mark.parametrize("key", ["names", "epoch"])
def test_a_redis_that_lost_what_it_can_make_again_goes_on(
    start_redis: Callable[..., RedisServer], stack: ExitStack, key: str
) -> None:
    server = start_redis()
    state = stack.enter_context(open_client(server.url))
    for name in ("b", "a"):
        assert state.counter(name).increment() == 1
    server.command("DEL", f"{{counter_server}}:{key}")
    assert state.counters().counters == [("a", 1), ("b", 1)]
    server.command("DEL", f"{{counter_server}}:{key}")
    assert state.counter("c").increment() == 1
    assert state.counters().counters == [("a", 1), ("b", 1), ("c", 1)]
    assert state.counter("a").delete()
    assert state.counters(limit=1) == Page([("b", 1)], more=True)


def test_a_redis_that_evicts_is_warned_of_once(
    start_redis: Callable[..., RedisServer], stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_redis("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    state = stack.enter_context(open_client(server.url))
    assert [state.counter("c").increment() for _ in range(2)] == [1, 2]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "CONFIG SET maxmemory-policy noeviction" in record.getMessage()


def test_a_redis_that_forgot_the_script_is_sent_it_again(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    server = start_redis()
    state = stack.enter_context(open_client(server.url))
    for expected in (1, 2, 3):
        assert state.counter("c").increment() == expected
        assert server.command("SCRIPT", "FLUSH") == b"+OK\r\n"


def test_a_full_redis_refuses_writes_answers_reads_and_heals(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    server = start_redis()
    state = stack.enter_context(open_client(server.url))
    assert state.counter("c").increment() == 1
    server.command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StorageFull) as full:
        state.counter("c").increment()
    assert full.value.outcome == "not_applied"
    assert state.counter("c").value == 1
    server.command("CONFIG", "SET", "maxmemory", "0")
    assert state.counter("c").increment() == 2


def test_a_redis_that_wants_a_password_says_so(start_redis: Callable[..., RedisServer], stack: ExitStack) -> None:
    server = start_redis("--requirepass", "secret")
    for url in (server.url, f"unix://:wrong@{server.socket}"):
        with pytest.raises(AccessDenied) as denied:
            stack.enter_context(open_client(url)).counter("c").increment()
        assert denied.value.outcome == "not_applied"
        assert "secret" not in str(denied.value)
        assert "wrong" not in str(denied.value)
    assert stack.enter_context(open_client(f"unix://:secret@{server.socket}")).counter("c").increment() == 1


def test_a_redis_that_became_a_replica_is_asked_until_it_is_none(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    server = start_redis()
    counter = stack.enter_context(open_client(server.url, deadline=PATIENCE)).counter("c")
    assert counter.increment() == 1
    server.command("REPLICAOF", "127.0.0.1", "1")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(counter.increment)
        eventually(lambda: b"errorstat_READONLY" in server.command("INFO", "errorstats"), "a refusal of the replica")
        assert not waiting.done()
        server.command("REPLICAOF", "NO", "ONE")
        assert waiting.result() == 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("NOAUTH Authentication required.", AccessDenied),
        ("WRONGPASS invalid username-password pair or user is disabled.", AccessDenied),
        ("NOPERM this user has no permissions to run the 'evalsha' command", AccessDenied),
        ("OOM command not allowed when used memory > 'maxmemory'.", StorageFull),
        ("MISCONF Errors writing to the AOF file: No space left on device", StorageFull),
        ("LOADING Redis is loading the dataset in memory", Disconnected),
        ("READONLY You can't write against a read only replica.", Disconnected),
        ("MASTERDOWN Link with MASTER is down", Disconnected),
        ("CLUSTERDOWN Hash slot not served", Disconnected),
        ("MOVED 3999 127.0.0.1:6381", Disconnected),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Disconnected),
        ("NOREPLICAS Not enough good replicas to write.", Disconnected),
        ("BUSY Redis is busy running a script.", Disconnected),
        ("ERR max number of clients reached", Disconnected),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", OutcomeUnknown),
    ],
)
def test_each_answer_of_redis_that_is_none_is_one_of_our_errors(answer: str, kind: type[Exception]) -> None:
    store = RedisStore("redis://127.0.0.1:1")
    error = store._translated(BaseParser.parse_error(answer), sent=True)  # type: ignore[no-untyped-call]
    assert type(error) is kind
    assert str(error).startswith("redis://127.0.0.1:1")


def test_a_redis_cluster_takes_the_script(start_redis: Callable[..., RedisServer], stack: ExitStack) -> None:
    """One node that has all the slots: keys of several slots would be refused."""
    server = start_redis("--cluster-enabled", "yes")
    server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
    eventually(lambda: b"cluster_state:ok" in server.command("CLUSTER", "INFO"), "the cluster is up")
    state = stack.enter_context(open_client(server.url))
    assert state.counter("a").increment(key="k") == 1
    assert state.counter("b").increment(key="l", maximum=5) == 1
    assert state.counter("a").increment(key="k") == 1


def test_a_frozen_redis_holds_nobody_beyond_the_deadline_and_its_late_answer_is_nobodys(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    server = start_redis(*DURABLE)
    state = stack.enter_context(open_client(server.url))
    counter = state.counter("c")
    assert counter.increment() == 1
    with frozen(server.pid), impatient(state), pytest.raises(DeadlineExceeded) as late:
        counter.increment()
    assert late.value.outcome == "unknown"
    found = stack.enter_context(open_client(server.url)).counter("c").value
    assert found in (1, 2)
    assert [counter.increment() for _ in range(3)] == [found + 1, found + 2, found + 3]


def test_a_child_of_a_fork_talks_to_redis_on_a_connection_of_its_own(
    start_redis: Callable[..., RedisServer], stack: ExitStack
) -> None:
    server = start_redis()
    counter = stack.enter_context(open_client(server.url)).counter("c")
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


def test_redis_whose_connections_are_cut_in_the_middle_of_a_reply(
    start_redis: Callable[..., RedisServer], cut: Callable[[Path], Cutter], stack: ExitStack, tmp_path: Path
) -> None:
    server = start_redis(*DURABLE)
    cutter = cut(server.socket)
    history = StoreLoad(f"redis://127.0.0.1:{cutter.port}", "hot", 4, 8, 100).finish()
    assert len(history) == 4 * 8 * 100
    assert cutter.cuts >= 10
    state = stack.enter_context(open_client(server.url))
    assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")
