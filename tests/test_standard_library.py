"""Why not simply `multiprocessing.managers`, Flask or waitress alone: each weakness shown on a small server of theirs.

That ours does not have it is shown beside it, or by the test that is named. Should one of these tests fail on a new
version of Python, that is good news: a reason of ours has gone.
"""

import signal
import socket
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.processes import PATIENCE, Manager, Program, eventually, frozen
from tests.strace import faulty
from tests.test_manager import received_until_closed

pytestmark = pytest.mark.slow
Ready = Callable[..., tuple[Program, str]]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "standard.sock")


@pytest.fixture
def ready(stack: ExitStack) -> Ready:
    """Start Python; return the program, and what it prints when it is ready."""

    def start(*arguments: str) -> tuple[Program, str]:
        program = stack.enter_context(Program(*arguments))
        return program, program.expect("ready")

    return start


@pytest.fixture
def standard(ready: Ready, address: str) -> Program:
    """Return the standard library's manager, ready."""
    return ready("-m", "tests.standard_server", address)[0]


def test_a_peer_that_says_nothing_holds_a_thread_for_ever(standard: Program, address: str, stack: ExitStack) -> None:
    """Ours ends it: test_half_open_peers_are_gone_after_the_handshakes_time."""

    def threads() -> int:
        return len(list(Path(f"/proc/{standard.pid}/task").iterdir()))

    before = threads()
    for _ in range(5):
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(address)
    eventually(lambda: threads() >= before + 5, "their threads")


def test_a_crowd_of_fresh_clients_finds_no_place_in_the_queue(
    standard: Program, address: str, stack: ExitStack, start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    """Its backlog lets 17 wait, and 129 since Python 3.13."""

    def connected_at_once(address: str) -> int:
        peers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
        for peer in peers:
            peer.settimeout(0)
        return sum(peer.connect_ex(address) == 0 for peer in peers)

    with frozen(standard.pid):  # away for a moment, as under load
        assert connected_at_once(address) < 140
    with frozen(start_manager().pid):
        assert connected_at_once(str(data_dir / "manager.sock")) == 200


_WAITRESS = """
import time, waitress

def app(environ, start_response):
    print("request", flush=True)
    time.sleep(60)
    start_response("200 OK", [])
    return [b"done"]

server = waitress.create_server(app, host="127.0.0.1", port=0)
print("ready", server.effective_port, flush=True)
server.run()
"""


def test_waitress_alone_dies_on_sigterm_with_requests_open(ready: Ready) -> None:
    """Under our supervisor it does not: test_a_request_that_is_open_when_the_signal_comes_is_answered."""
    server, port = ready("-c", _WAITRESS)
    with socket.create_connection(("127.0.0.1", int(port)), timeout=PATIENCE) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        server.expect("request")
        server.send_signal(signal.SIGTERM)
        assert server.wait() == -signal.SIGTERM
        assert received_until_closed(client) == b""


_SQLITE = """
import os, signal, sqlite3, sys

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("PRAGMA synchronous = FULL")
connection.execute("PRAGMA wal_autocheckpoint = 0")
connection.execute("CREATE TABLE counter AS SELECT 0 AS value")
while True:
    try:
        connection.execute("UPDATE counter SET value = value + 1")
    except sqlite3.OperationalError:
        os.kill(os.getpid(), signal.SIGKILL)
    print(*connection.execute("SELECT value FROM counter").fetchone(), flush=True)
"""


def test_a_commit_of_sqlite_that_failed_may_be_there_afterwards(stack: ExitStack, tmp_path: Path) -> None:
    """So ours stops: test_a_manager_whose_disk_fails_stops_at_once_and_the_next_one_counts_on."""
    counting = stack.enter_context(faulty("fdatasync", "error=EIO:when=20", "-c", _SQLITE, tmp_path / "file"))
    assert counting.wait() == -signal.SIGKILL
    with closing(sqlite3.connect(tmp_path / "file")) as connection:
        assert connection.execute("SELECT value FROM counter").fetchone() == (int(counting.output[-1]) + 1,)
