"""What only Redis does: it comes back empty, evicts, is a replica or a cluster, forgets scripts, wants passwords."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis._parsers.base import BaseParser

from counter_server.errors import (
    AccessDenied,
    Disconnected,
    OutcomeUnknown,
    StateLost,
    StorageFull,
)
from counter_server.operations import Page
from counter_server.stores.redis import RedisStore
from tests.engines import RedisServer
from tests.load import open_client
from tests.processes import PATIENCE, eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def start_redis(stack: ExitStack, tmp_path: Path) -> Callable[..., RedisServer]:
    return lambda *options: stack.enter_context(RedisServer(tmp_path / "redis", *options))


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
