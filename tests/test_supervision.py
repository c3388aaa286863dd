"""The server keeps serving: replaced and frozen workers, slow and idle clients, systemd, and the log."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from flask import Flask

from counter_server.server.prove.proof import group_members
from counter_server.server.settings import ServerSettings
from counter_server.server.worker import Worker, listen
from tests.processes import PATIENCE, Program, children, eventually, frozen, in_child
from tests.test_server import INCREMENT, StartServer, address, ask, read_all
from tests.test_server import increment as increment

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:send_bytes will be removed")  # of waitress, whose version is pinned
def test_a_worker_with_more_connections_leaves_a_new_one_to_the_others_for_a_moment() -> None:
    """Then it accepts it, as they may be frozen."""

    def holds() -> bytes:
        """Return when the worker last held back, with more connections than the other worker, and then with fewer."""
        settings = ServerSettings(port=0)
        connections = [0, 0]
        app = Flask(__name__)
        app.add_url_rule("/", "page", lambda: "here")
        with listen(settings) as sock:
            worker = Worker(sock, settings, app, connections, place=0)
            threading.Thread(target=worker.run, args=(lambda: None,), daemon=True).start()
            found, clients = [], []
            for others in (0, 0, 0, 9):
                connections[1] = others
                host, port = sock.getsockname()
                clients.append(HTTPConnection(host, port, timeout=PATIENCE))
                clients[-1].request("GET", "/")
                assert clients[-1].getresponse().read() == b"here"
                found.append(worker._hold_until)
        return json.dumps(found).encode()

    first, second, third, fourth = json.loads(in_child(holds))
    assert first == second == 0
    assert 0 < third == fourth


@contextmanager
def keep_alive_load(url: str, clients: int) -> Iterator[list[int]]:
    """Yield the values that clients get which keep their connections, and accept no failure but an announced close."""
    values: list[int] = []
    enough = threading.Event()

    def ask_and_ask() -> None:
        answered = time.monotonic()
        with closing(HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)) as connection:
            while not enough.is_set():
                if time.monotonic() - answered > 1:  # the server may have closed it meanwhile
                    connection.close()
                connection.request("POST", INCREMENT)  # connects again after "Connection: close"
                response = connection.getresponse()
                body = response.read()
                assert response.status == 200, body
                values.append(json.loads(body)["value"])
                answered = time.monotonic()

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask_and_ask) for _ in range(clients)]
        try:
            yield values
        finally:
            enough.set()
        for each in asking:
            each.result()


def test_sighup_replaces_every_worker_under_load_and_no_request_fails(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    manager = server.children("manager")
    before = set[int]()

    def replaced() -> bool:
        now = set(server.children("worker"))
        return len(now) == 2 and not now & before

    with keep_alive_load(server.url, 8) as values:
        for _ in range(2):
            before = set(server.children("worker"))
            assert len(before) == 2
            answered = len(values)
            eventually(lambda: len(values) > answered + 100, "some load")
            server.send_signal(signal.SIGHUP)
            eventually(replaced, "two other workers", seconds=60)
            answered = len(values)
            eventually(lambda: len(values) > answered + 50, "answers of them")
    assert sorted(values) == list(range(1, len(values) + 1))
    assert server.children("manager") == manager
    assert server.stop() == 0


def test_a_crash_loop_is_slowed_down_and_ends_with_one_line_that_says_why(stack: ExitStack, data_dir: Path) -> None:
    hasty = (
        "import sys; from counter_server.server import supervisor; from counter_server.cli import main;"
        "supervisor._FIRST_PAUSE, supervisor._LONGEST_PAUSE = 0.02, 0.3; main(sys.argv[1:])"
    )
    options = ("run", "--port", "0", "--workers", "1", "--data-dir", data_dir)
    server = stack.enter_context(Program("-c", hasty, *options))
    assert increment(server.expect("Serving on ")) == 1
    (data_dir / "manager.key").write_bytes(os.urandom(32))  # the manager refuses it
    os.kill(children(server.pid, "worker")[0], signal.SIGKILL)
    eventually(lambda: not server.running, "the end of the server", seconds=60)
    assert server.wait() == 1
    assert server.errors[-1] == "Error: the worker-1 process died 10 times in a row; giving up"
    restarts = [line for line in server.errors if "starting another" in line]
    moments = [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in restarts]
    pauses = [(later - earlier).total_seconds() for earlier, later in pairwise(moments)]
    least = (0, 0.02, 0.04, 0.08, 0.16, 0.3, 0.3, 0.3)
    assert all(pause >= at_least for pause, at_least in zip(pauses, least, strict=True)), pauses
    eventually(lambda: not group_members(server.pid), "the end of every process of the server")


def test_successors_that_do_not_start_leave_the_old_workers_serving(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif os.path.exists({str(broken)!r}) and '--multiprocessing-fork' in sys.orig_argv:\n"
        "    sys.exit('this installation is broken')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = start_server("--workers", "2")
    before = set(server.children("worker"))
    broken.touch()
    server.send_signal(signal.SIGHUP)
    eventually(lambda: any("does not start; the old ones go on" in line for line in server.errors), "the message")
    assert set(server.children("worker")) == before
    assert increment(server.url) == 1
    broken.unlink()
    server.send_signal(signal.SIGHUP)
    eventually(lambda: len(now := set(server.children("worker"))) == 2 and not now & before, "two other workers")
    assert increment(server.url) == 2


def test_a_frozen_worker_is_replaced_and_the_others_serve_meanwhile(start_server: StartServer) -> None:
    """But none is killed after the supervisor itself was stopped, as when a laptop sleeps."""
    server = start_server("--workers", "2", "--frozen-after", "4")
    victim, other = server.children("worker")
    with frozen(victim), frozen(other), frozen(server.pid):
        threading.Event().wait(5)  # longer than a worker may be silent
    with keep_alive_load(server.url, 1) as values:
        eventually(lambda: len(values) > 200, "answers")
    assert server.children("worker") == [victim, other]
    assert not any("sign of life" in line for line in server.errors)
    with frozen(victim):
        eventually(
            lambda: len(now := server.children("worker")) == 2 and victim not in now and other in now,
            "another worker in its place",
        )
        assert len({increment(server.url) for _ in range(20)}) == 20
    assert any(f"(pid {victim}) gives no sign of life" in line for line in server.errors), server.errors
    assert other in server.children("worker")


def test_a_thousand_idle_connections_and_fifty_slow_ones_do_not_stop_service(
    stack: ExitStack, start_server: StartServer
) -> None:
    server = start_server("--workers", "2", "--threads", "4")
    for _ in range(1000):
        stack.enter_context(socket.create_connection(address(server), timeout=PATIENCE))
    for _ in range(50):
        slow = stack.enter_context(socket.create_connection(address(server), timeout=PATIENCE))
        slow.sendall(f"POST {INCREMENT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n".encode())
    assert [increment(server.url) for _ in range(100)] == list(range(1, 101))


def test_a_new_connection_is_not_mistaken_for_one_whose_client_reads_nothing(start_server: StartServer) -> None:
    """The worker checks its connections every second, and at any moment some have an unsent answer."""
    server = start_server("--workers", "1")
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: increment(server.url), range(1500)))
    assert sorted(values) == list(range(1, 1501))


@pytest.fixture
def notifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_the_service_manager_is_notified_of_each_state(start_server: StartServer, notifications: socket.socket) -> None:
    server = start_server("--workers", "1")
    assert notifications.recv(100) == b"READY=1"
    server.send_signal(signal.SIGHUP)
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", notifications.recv(100))
    assert notifications.recv(100) == b"READY=1"
    server.send_signal(signal.SIGTERM)
    assert notifications.recv(100) == b"STOPPING=1"
    assert server.wait() == 0


def activated(bound: socket.socket, data_dir: Path) -> Program:
    """Start a server that inherits the socket as descriptor 3, as sd_listen_fds(3) specifies."""
    descriptor = bound.fileno()
    command = 'exec 3<&"$1"; shift; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    arguments = ["-c", command, "bash", str(descriptor), sys.executable, "run.py", "--workers", "1"]
    return Program(*arguments, "--data-dir", data_dir, program="bash", descriptors=(descriptor,))


def test_it_serves_on_a_socket_that_the_service_manager_has_bound(
    stack: ExitStack, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections from before the start are answered."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        early = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        early.sendall(f"POST {INCREMENT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        server = stack.enter_context(activated(bound, data_dir))
        url = server.expect("Serving on ")
    assert url == f"http://127.0.0.1:{port}"
    assert read_all(early).startswith("HTTP/1.1 200 ")
    assert increment(url) == 2
    assert server.stop() == 0


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_an_unusable_inherited_socket_is_reported_in_one_line(
    stack: ExitStack, data_dir: Path, kind: socket.SocketKind
) -> None:
    with socket.socket(socket.AF_INET, kind) as bound:
        bound.bind(("127.0.0.1", 0))
        server = stack.enter_context(activated(bound, data_dir))
        assert server.wait() == 1
    assert server.errors[-1].startswith("Error: the inherited socket does not listen on TCP")


def test_the_json_log_has_a_line_for_each_request(start_server: StartServer) -> None:
    server = start_server("--workers", "2", "--log-format", "json")
    invalid = "/api/v1/counters/%00/increment"
    answered = {}
    for path, given in (INCREMENT, ""), (INCREMENT, "of-a-proxy.7"), (INCREMENT, 'not "acceptable"'), (invalid, ""):
        status, headers, _ = ask(server.url, "POST", path, headers={"X-Request-ID": given} if given else {})
        answered[headers["X-Request-ID"]] = status
    assert len(answered) == 4
    assert answered["of-a-proxy.7"] == 200
    assert 'not "acceptable"' not in answered
    (worker, *_) = workers = server.children("worker")
    os.kill(worker, signal.SIGKILL)

    def lines(key: str, value: str) -> list[dict[str, object]]:
        return [line for line in map(json.loads, list(server.errors)) if line[key] == value]

    eventually(lambda: lines("process", "supervisor"), "a line of the supervisor's")
    logger = "counter_server.server.web.request_log"
    eventually(lambda: len(lines("logger", logger)) == 4, "a line for each request")
    requests = lines("logger", logger)
    assert {line["request_id"]: line["status"] for line in requests} == answered
    assert sorted(str(line["outcome"]) for line in requests) == ["answered"] * 3 + ["not_applied"]
    assert {line["pid"] for line in requests} <= set(workers)
    assert {line["path"] for line in requests} == {INCREMENT, "/api/v1/counters/\0/increment"}
    assert all(isinstance(line["seconds"], float) and line["method"] == "POST" for line in requests)
    assert all(
        {"time", "level", "message", "pid", "process", "logger"} <= set(line) for line in map(json.loads, server.errors)
    )
