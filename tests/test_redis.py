"""What only Redis does: it comes back empty, evicts, is a replica or a cluster, forgets scripts, wants passwords."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis._parsers.base import BaseParser

from counter_server import State
from counter_server.errors import AccessDenied, Disconnected, OutcomeUnknown, StorageFull
from counter_server.operations import Page
from counter_server.stores.redis import RedisStore
from tests.engines import RedisServer
from tests.load import open_client
from tests.processes import PATIENCE, eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> RedisServer:
    return stack.enter_context(RedisServer(tmp_path / "redis", *getattr(request, "param", ())))


@pytest.fixture
def state(server: RedisServer, stack: ExitStack) -> State:
    return stack.enter_context(open_client(server.url, deadline=PATIENCE))


def with_options(*options: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", [options], indirect=True, ids=[options[0]])


@pytest.mark.parametrize("key", ["names", "epoch"])
def test_what_it_can_make_again_is_no_loss(server: RedisServer, state: State, key: str) -> None:
    for name in ("b", "a"):
        assert state.counter(name).increment() == 1
    server.command("DEL", f"{{counter_server}}:{key}")
    assert state.counters().counters == [("a", 1), ("b", 1)]
    server.command("DEL", f"{{counter_server}}:{key}")
    assert state.counter("c").increment() == 1
    assert state.counters().counters == [("a", 1), ("b", 1), ("c", 1)]
    assert state.counter("a").delete()
    assert state.counters(limit=1) == Page([("b", 1)], more=True)


@with_options("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
def test_one_that_evicts_is_warned_of_once(state: State, caplog: pytest.LogCaptureFixture) -> None:
    assert [state.counter("c").increment() for _ in range(2)] == [1, 2]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "CONFIG SET maxmemory-policy noeviction" in record.getMessage()


def test_one_that_forgot_the_script_is_sent_it_again(server: RedisServer, state: State) -> None:
    for expected in (1, 2, 3):
        assert state.counter("c").increment() == expected
        assert server.command("SCRIPT", "FLUSH") == b"+OK\r\n"


@with_options("--requirepass", "secret")
def test_one_that_wants_a_password_says_so(server: RedisServer, stack: ExitStack) -> None:
    for url in (server.url, f"unix://:wrong@{server.socket}"):
        with pytest.raises(AccessDenied) as denied:
            stack.enter_context(open_client(url)).counter("c").increment()
        assert denied.value.outcome == "not_applied"
        assert "secret" not in str(denied.value)
        assert "wrong" not in str(denied.value)
    assert stack.enter_context(open_client(f"unix://:secret@{server.socket}")).counter("c").increment() == 1


def test_one_that_became_a_replica_is_asked_until_it_is_none(server: RedisServer, state: State) -> None:
    counter = state.counter("c")
    assert counter.increment() == 1
    server.command("REPLICAOF", "127.0.0.1", "1")
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(counter.increment)
        eventually(lambda: b"errorstat_READONLY" in server.command("INFO", "errorstats"), "a refusal of the replica")
        assert not waiting.done()
        server.command("REPLICAOF", "NO", "ONE")
        assert waiting.result() == 2


@with_options("--cluster-enabled", "yes")
def test_a_cluster_takes_the_script(server: RedisServer, state: State) -> None:
    """One node that has all the slots: keys of several slots would be refused."""
    server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
    eventually(lambda: b"cluster_state:ok" in server.command("CLUSTER", "INFO"), "the cluster is up")
    assert state.counter("a").increment(key="k") == 1
    assert state.counter("b").increment(key="l", maximum=5) == 1
    assert state.counter("a").increment(key="k") == 1


def test_each_answer_that_is_an_error_is_one_of_ours() -> None:
    kinds: dict[type[Exception], list[str]] = {
        AccessDenied: ["NOAUTH Authentication required.", "WRONGPASS invalid", "NOPERM this user has no permissions"],
        StorageFull: ["OOM command not allowed", "MISCONF Errors writing to the AOF file: No space left on device"],
        Disconnected: [
            *("LOADING the dataset in memory", "READONLY replica", "MASTERDOWN", "CLUSTERDOWN Hash slot not served"),
            *("MOVED 3999 127.0.0.1:6381", "TRYAGAIN", "NOREPLICAS", "BUSY", "ERR max number of clients reached"),
        ],
        OutcomeUnknown: ["WRONGTYPE Operation against a key holding the wrong kind of value"],
    }
    store = RedisStore("redis://127.0.0.1:1")
    for kind, answers in kinds.items():
        for answer in answers:
            error = store._translated(BaseParser.parse_error(answer), sent=True)  # type: ignore[no-untyped-call]
            assert type(error) is kind, answer
            assert str(error).startswith("redis://127.0.0.1:1")
