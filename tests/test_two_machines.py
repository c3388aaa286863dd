"""Two machines' worth of apps: two supervisors on two addresses, and all that they share is the store."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines import DURABLE, MariaDbServer, PostgresServer, RedisServer
from tests.history import assert_exactly_once
from tests.load import HttpLoad, open_client
from tests.processes import Server

pytestmark = pytest.mark.slow


@pytest.fixture(params=["redis", "postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, stack: ExitStack, tmp_path: Path) -> str:
    """Of a server that keeps each number on its disk."""
    if request.param == "redis":
        return stack.enter_context(RedisServer(tmp_path / "redis", *DURABLE)).url
    if request.param == "mariadb":
        return stack.enter_context(MariaDbServer()).url
    return stack.enter_context(PostgresServer()).url


def test_two_supervisors_over_one_store_give_no_number_twice(
    url: str, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(tmp_path / "data"))  # of the key that signs their cookies
    servers = [
        stack.enter_context(Server("--host", host, "--workers", "2", "--store", url))
        for host in ("127.0.0.1", "127.0.0.2")
    ]
    loads = [HttpLoad(one.url, "visits", 20, each=10) for one in servers]
    histories = [load.finish(stop=False) for load in loads]
    state = stack.enter_context(open_client(url))
    assert state.counter("visits").value == 2 * 20 * 10
    assert_exactly_once([*histories[0], *histories[1]], 2 * 20 * 10, tmp_path / "history.json")
