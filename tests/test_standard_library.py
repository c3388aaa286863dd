"""Why not simply `multiprocessing.managers`, Flask or waitress alone: each weakness shown on a small server of theirs.

That ours does not have it is shown beside it, or by the test that is named. Should one of these tests fail on a new
version of Python, that is good news: a reason of ours has gone.
"""

import os
import resource
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, cast

import pytest

from tests.load import open_client
from tests.processes import PATIENCE, Manager, Program, eventually, frozen
from tests.standard_server import KEY, StandardManager
from tests.strace import faulty
from tests.test_faults import cpu_seconds, crowd, threads_of
from tests.test_manager import raw, received_until_closed

pytestmark = pytest.mark.slow
StartManager = Callable[..., Manager]
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


def silent(address: str) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(PATIENCE)
    peer.connect(address)
    return peer


def test_a_managers_child_outlives_its_killed_parent(ready: Ready) -> None:
    """Ours does not: test_no_process_outlives_a_killed_supervisor."""
    parent, said = ready("-m", "tests.standard_server", "--child")
    child = int(said)

    def status() -> list[str]:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()

    assert status()[1] == str(parent.pid)
    parent.kill()
    eventually(lambda: status()[1] != str(parent.pid), "another parent")
    assert status()[0] != "Z"
    os.kill(child, signal.SIGKILL)


def test_a_peer_that_says_nothing_holds_a_thread_for_ever(
    standard: Program, address: str, start_manager: StartManager, data_dir: Path
) -> None:
    ours = start_manager()
    with ExitStack() as peers:
        state = peers.enter_context(open_client(ours.url))
        state.counter("c").increment()  # so all of its threads are there
        theirs_before, ours_before = threads_of(standard.pid), threads_of(ours.pid)
        for _ in range(5):
            peers.enter_context(silent(address))
        peers.enter_context(crowd(ours.pid, 5, lambda: raw(data_dir), threads=ours_before + 5))
        eventually(lambda: threads_of(standard.pid) >= theirs_before + 5, "their threads")
        eventually(lambda: threads_of(ours.pid) == ours_before, "the end of ours")
        assert threads_of(standard.pid) >= theirs_before + 5


def test_without_descriptors_the_accept_loop_spins(standard: Program, address: str) -> None:
    """Ours does not: test_a_manager_without_descriptors_does_not_spin_and_serves_again_when_there_are_some."""
    used = len(list(Path(f"/proc/{standard.pid}/fd").iterdir()))
    resource.prlimit(standard.pid, resource.RLIMIT_NOFILE, (used, used))
    with closing(silent(address)):
        before = cpu_seconds(standard.pid)
        eventually(lambda: cpu_seconds(standard.pid) - before > 0.5, "half a second of processor time, for nothing")


def test_an_unauthenticated_peer_is_sent_a_traceback_with_paths(
    standard: Program, address: str, start_manager: StartManager, data_dir: Path
) -> None:
    def said(peer: socket.socket) -> bytes:
        with peer:
            wrong = b"x" * 16
            # At once, as ours closes after the first: no answer to its challenge, and no challenge.
            peer.sendall(2 * (len(wrong).to_bytes(4, "big") + wrong))
            with suppress(OSError):  # it has closed by now
                peer.shutdown(socket.SHUT_WR)
            return received_until_closed(peer)

    theirs = said(silent(address))
    assert b"Traceback" in theirs
    assert b"managers.py" in theirs
    start_manager()
    ours = said(raw(data_dir))
    assert b"Traceback" not in ours
    assert b".py" not in ours


@pytest.mark.parametrize(("flags", "called"), [((), False), (("-O",), True)], ids=["plain", "python -O"])
def test_with_python_o_a_function_that_is_not_public_is_called(
    ready: Ready, address: str, flags: tuple[str, ...], *, called: bool
) -> None:
    """Ours refuses both: test_none_of_the_standard_servers_functions_can_be_called."""
    server, _ = ready(*flags, "-m", "tests.standard_server", address)
    with Client(address, authkey=KEY) as connection:
        connection.send((None, "fallback_str", ("", ""), {}))
        kind, result = connection.recv()
    assert (kind, "managers.py" in str(result)) == (("#RETURN", False) if called else ("#TRACEBACK", True)), result
    assert server.running


def test_a_stale_identity_reaches_another_object(standard: Program, address: str) -> None:
    """Objects go by `id()`, which is given to the next one when one is gone. Ours go by name and epoch."""
    manager = StandardManager(address, KEY)
    manager.connect()
    make = cast(Any, manager).Counter
    stale = set()
    for _ in range(1000):
        proxy = make()
        stale.add(proxy._token.id)
        del proxy  # the last reference: the object is gone
        reached = make()
        if reached._token.id in stale:
            break
    else:
        raise AssertionError("none of 1000 has the address of one that is gone")
    with Client(address, authkey=KEY) as connection:
        connection.send((None, "accept_connection", ("stale",), {}))
        assert connection.recv() == ("#RETURN", None)
        connection.send((reached._token.id, "increment", (), {}))
        assert connection.recv() == ("#RETURN", 1)
    assert reached.increment() == 2  # somebody else has counted on it


def test_a_crowd_of_fresh_clients_finds_no_place_in_the_queue(
    standard: Program, address: str, start_manager: StartManager, data_dir: Path
) -> None:
    """Its backlog lets 17 wait, and 129 since Python 3.13. Ours: test_100_fresh_clients_connect_at_once."""
    with ExitStack() as peers:

        def connected_at_once(address: str) -> int:
            placed = 0
            for _ in range(200):
                peer = peers.enter_context(socket.socket(socket.AF_UNIX))
                peer.settimeout(0)
                with suppress(BlockingIOError):
                    peer.connect(address)
                    placed += 1
            return placed

        with frozen(standard.pid):  # away for a moment, as under load
            assert connected_at_once(address) < 140
        with frozen(start_manager().pid):
            assert connected_at_once(str(data_dir / "manager.sock")) == 200


def test_the_standard_handshake_has_no_time_limit(standard: Program, address: str) -> None:
    """Ours has one: test_every_thread_keeps_its_deadline_while_the_manager_is_frozen."""
    held = threading.Thread(target=lambda: Client(address, authkey=KEY).close(), daemon=True)
    with frozen(standard.pid):
        held.start()
        held.join(3)
        assert held.is_alive()
    held.join(PATIENCE)
    assert not held.is_alive()


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
