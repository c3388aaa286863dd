"""The server as an operator runs it: real processes on a real port, stopped, killed and started again."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from werkzeug.datastructures import Headers

from counter_server.manager.directory import DataDirectory
from counter_server.server.prove.proof import group_members
from tests.processes import PATIENCE, Manager, Program, Server, eventually

pytestmark = pytest.mark.slow

COUNTERS = "/api/v1/counters"
INCREMENT = f"{COUNTERS}/x/increment"

Answer = tuple[int, Headers, str]
StartServer = Callable[..., Server]
Start = Callable[..., Program]


def ask(url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    """Send one request on a new connection; return the status, the headers and the text of the answer."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)) as connection:
        connection.request(method, path, body, {"Connection": "close", **(headers or {})})
        response = connection.getresponse()
        return response.status, Headers(response.getheaders()), response.read().decode()


def increment(url: str, name: str = "x") -> int:
    status, _, text = ask(url, "POST", f"{COUNTERS}/{name}/increment")
    assert status == 200, text
    value = json.loads(text)["value"]
    assert isinstance(value, int)
    return value


def visit(url: str, method: str = "GET", path: str = "/", cookie: str = "") -> tuple[int, int]:
    """Return the number on a page, and the worker process that answered."""
    status, headers, text = ask(url, method, path, headers={"Cookie": cookie, "Accept": "text/html"})
    if status == 303:  # the sentence about what was done comes with a cookie
        cookies = "; ".join([cookie, *(each.partition(";")[0] for each in headers.get_all("Set-Cookie"))])
        status, _, text = ask(url, "GET", headers["Location"], headers={"Cookie": cookies, "Accept": "text/html"})
    assert status == 200, text
    number, worker = re.search(r'(?:data-number="|counter is )(\d+)', text), re.search(r"worker process (\d+)", text)
    assert number
    assert worker
    return int(number[1]), int(worker[1])


def address(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "", parts.port or 0


def half_a_post(stack: ExitStack, server: Server) -> socket.socket:
    """Open a connection on which a worker waits for the body of an increment: it has sent 100 Continue."""
    connection = stack.enter_context(socket.create_connection(address(server), timeout=PATIENCE))
    head = f"POST {INCREMENT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".encode())
    assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")
    connection.sendall(b'{"by"')
    return connection


def read_all(connection: socket.socket) -> str:
    answer = b""
    while chunk := connection.recv(4096):
        answer += chunk
    return answer.decode()


def assert_no_process_left(program: Program) -> None:
    eventually(lambda: not group_members(program.pid), "the end of every process of the server")


def assert_ended_well(program: Program) -> None:
    assert program.wait() == 0, program.errors
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in program.errors), program.errors
    assert_no_process_left(program)


def assert_not_started(program: Program, *reasons: str) -> None:
    """Check that it exited by itself, printed a line with each reason and no traceback, and left no process."""
    assert program.wait() == 1, program.errors
    assert program.output == []
    for reason in reasons:
        assert any(reason in line for line in program.errors), program.errors
    assert not any("Traceback" in line for line in program.errors), program.errors
    assert program.errors[-1].startswith("Error: ")
    assert_no_process_left(program)


@pytest.fixture
def starting(stack: ExitStack, data_dir: Path) -> Start:
    """Start a server that need not become ready."""
    return lambda *options, **more: stack.enter_context(
        Program("run.py", "--port", "0", "--data-dir", data_dir, *options, **more)
    )


@pytest.fixture(scope="module")
def any_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return one server for all tests that do not end it; its children are replaced when a test kills them."""
    with Server("--workers", "2", "--threads", "4", "--data-dir", tmp_path_factory.mktemp("server") / "a") as server:
        yield server


def until_both_answer(server: Server, *cookies: str, method: str = "GET", path: str = "/") -> list[list[int]]:
    """Visit with many clients until each worker has answered. Return the numbers that each cookie got."""
    numbers: list[list[int]] = [[] for _ in cookies]
    answering: set[int] = set()

    def both_have_answered() -> bool:
        visits = [
            (mine, pool.submit(visit, server.url, method, path, cookie))
            for mine, cookie in [*zip(numbers, cookies, strict=True)] * 16
        ]
        for mine, answer in visits:
            number, worker = answer.result()
            mine.append(number)
            answering.add(worker)
        return len(answering) == 2

    with ThreadPoolExecutor(16) as pool:
        eventually(both_have_answered, "an answer of each worker")
    assert answering == set(server.children("worker"))
    return numbers


def test_two_tabs_of_a_visitor_lose_nothing_between_the_workers(any_server: Server) -> None:
    cookies = []
    for _ in range(2):
        _, headers, text = ask(any_server.url, "GET", "/session")
        assert "counter is 0" in text
        cookies.append(headers["Set-Cookie"].partition(";")[0])
    for numbers in until_both_answer(any_server, *cookies, method="POST", path="/session/inc"):
        assert sorted(numbers) == list(range(1, len(numbers) + 1))


def test_unusual_names_work_through_the_whole_server(any_server: Server) -> None:
    for name in ["счётчик", "two words", "50%", "a?b", "a//b", "/a", "a/"]:
        path = f"{COUNTERS}/{quote(name, safe='')}"
        status, _, text = ask(any_server.url, "PUT", path, b'{"value": 5}', {"Content-Type": "application/json"})
        assert (status, json.loads(text)) == (200, {"counter": name, "value": 5})
        assert increment(any_server.url, quote(name, safe="")) == 6
        assert ask(any_server.url, "GET", path)[0] == 200
        assert ask(any_server.url, "DELETE", path)[0] == 204


@pytest.mark.parametrize(("host", "workers"), [("127.0.0.1", 1), ("::1", 3)])
def test_the_options_name_host_workers_and_any_directory(
    stack: ExitStack, tmp_path: Path, host: str, workers: int
) -> None:
    directory = DataDirectory(tmp_path / "größe 100%25 a?b #c")
    where = ("--data-dir", directory.path) if workers == 1 else ("--store", directory.url)
    server = stack.enter_context(Server("--host", host, "--workers", str(workers), *where))
    assert re.fullmatch(rf"http://\[?{host}\]?:[1-9]\d*", server.url)
    assert server.output == [f"Serving on {server.url}"]
    assert increment(server.url) == 1
    assert directory.journal.exists()
    assert len(group_members(server.pid)) == 1 + workers + 1


def test_a_store_without_a_manager_starts_none(stack: ExitStack) -> None:
    server = stack.enter_context(Server("--workers", "1", "--store", "memory://"))
    assert [increment(server.url) for _ in range(3)] == [1, 2, 3]
    assert server.children("manager") == []


def test_a_signal_ends_it_with_status_0_and_the_count_goes_on(start_server: StartServer) -> None:
    """A terminal's Ctrl-C reaches all processes."""
    for expected, (send, number) in enumerate([(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)], start=1):
        server = start_server()
        assert increment(server.url) == visit(server.url)[0] == expected
        send(server.pid, number)
        assert_ended_well(server)
    assert increment(start_server().url) == 3


@pytest.mark.parametrize("send", [os.kill, os.killpg])  # systemd sends it to all processes by default
def test_a_request_that_is_open_when_the_signal_comes_is_answered(
    stack: ExitStack, start_server: StartServer, send: Callable[[int, int], None]
) -> None:
    server = start_server("--workers", "2")
    connection = half_a_post(stack, server)
    send(server.pid, signal.SIGTERM)
    eventually(lambda: len(server.children("worker")) < 2, "the end of the worker that had nothing to do")

    def refused() -> bool:
        try:
            with socket.create_connection(address(server), timeout=PATIENCE):
                return False
        except ConnectionRefusedError:
            return server.running

    eventually(refused, "the refusal of a new connection while a request is still open")
    connection.sendall(b": 7}")
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 200 "), answer
    assert '"value":7' in answer
    assert_ended_well(server)
    assert increment(start_server().url) == 8


def test_a_second_signal_ends_it_at_once(stack: ExitStack, start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    connection = half_a_post(stack, server)
    server.send_signal(signal.SIGTERM)
    eventually(lambda: len(server.children("worker")) < 2, "the end of the worker that had nothing to do")
    assert server.running
    server.send_signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT  # it would be 0 after the open request
    assert_no_process_left(server)
    with suppress(ConnectionResetError):
        assert read_all(connection) == ""


@pytest.mark.parametrize(("processes", "send", "number"), [(2, os.killpg, signal.SIGINT), (4, os.kill, signal.SIGTERM)])
def test_a_signal_while_it_starts_ends_it_with_status_0(
    starting: Start, processes: int, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    server = starting("--workers", "2")
    eventually(lambda: len(group_members(server.pid)) >= processes, f"{processes} processes")
    send(server.pid, number)
    assert_ended_well(server)


def test_ctrl_c_while_a_child_imports_shows_no_traceback(tmp_path: Path, start_server: StartServer) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        f"    pathlib.Path({str(tmp_path / 'importing')!r}).touch()\n"
        "    time.sleep(0.5)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        server = start_server()
    server.send_signal(signal.SIGHUP)  # starts successors, which are new interpreters
    eventually((tmp_path / "importing").exists, "the start of a child")
    os.killpg(server.pid, signal.SIGINT)
    assert_ended_well(server)


def test_no_process_outlives_a_killed_supervisor(stack: ExitStack, start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    assert increment(server.url) == 1
    half_a_post(stack, server)
    server.kill()
    assert_no_process_left(server)
    with pytest.raises(ConnectionError):
        increment(server.url)
    assert increment(start_server().url) == 2


@pytest.mark.parametrize("processes", [2, 5])
def test_no_process_outlives_a_supervisor_killed_while_it_starts(starting: Start, processes: int) -> None:
    server = starting("--workers", "3")
    eventually(lambda: len(group_members(server.pid)) >= processes, f"{processes} processes")
    server.kill()
    assert_no_process_left(server)


def kill(server: Server, victims: list[int]) -> None:
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not {*victims} & {*group_members(server.pid)}, "the end of the killed processes")


def test_killed_processes_are_replaced_and_the_numbers_go_on(any_server: Server) -> None:
    before = increment(any_server.url)
    workers, manager = any_server.children("worker"), any_server.children("manager")
    kill(any_server, workers[:1])
    assert increment(any_server.url) == before + 1  # by the other worker
    eventually(lambda: len(any_server.children("worker")) == 2, "a new worker")
    until_both_answer(any_server, "")
    assert any_server.children("manager") == manager
    assert workers[1] in any_server.children("worker")
    for kinds in (["manager"], ["worker"], ["worker", "manager"]):
        workers = any_server.children("worker")
        before = increment(any_server.url)
        kill(any_server, [pid for kind in kinds for pid in any_server.children(kind)])
        assert increment(any_server.url) == before + 1  # it waits for a new manager, or in the socket's queue
        eventually(lambda: len(any_server.children("worker")) == 2, "two workers")
        eventually(lambda: len(any_server.children("manager")) == 1, "a manager")
        assert (any_server.children("worker") == workers) == (kinds == ["manager"])


def test_an_invalid_store_is_reported_at_the_start(stack: ExitStack) -> None:
    assert_not_started(stack.enter_context(Program("run.py", "--port", "0", "--store", "nonsense://x")), "nonsense://x")


@pytest.mark.parametrize("name", ["session.key", "journal.sqlite3"])
def test_a_damaged_file_is_reported_at_the_start_and_left_alone(
    tmp_path: Path, starting: Start, data_dir: Path, name: str
) -> None:
    # A child closes its files first and exits a moment later; this makes the moment long.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, time\n"
        "from multiprocessing import util\n"
        "def end():\n"
        f"    pathlib.Path({str(tmp_path / 'slow')!r}).touch()\n"
        "    os.closerange(3, 256)\n"
        "    time.sleep(0.5)\n"
        "util.register_after_fork(util, lambda _: util.Finalize(None, end, exitpriority=0))\n"
    )
    data_dir.mkdir(mode=0o700)
    (data_dir / name).write_bytes(b"damaged" * 100)
    server = starting(environment={"PYTHONPATH": str(tmp_path)})
    assert_not_started(server, str(data_dir / name))
    if name != "session.key":  # that is the supervisor's own
        assert any("the manager process could not start" in line for line in server.errors)
        assert (tmp_path / "slow").exists()
    assert (data_dir / name).read_bytes() == b"damaged" * 100


def test_a_directory_with_a_manager_stops_the_start_naming_that_one(
    start_manager: Callable[[], Manager], starting: Start
) -> None:
    manager = start_manager()
    assert_not_started(starting(), f"(pid {manager.pid}) continues: it was started by hand")
    assert manager.running


def test_a_second_server_on_a_directory_or_port_exits_and_the_first_goes_on(
    starting: Start, start_server: StartServer, tmp_path: Path
) -> None:
    first = start_server()
    (manager,) = first.children("manager")
    assert_not_started(starting(), f"(pid {manager}) continues")
    port = str(address(first)[1])
    second = starting("--port", port, "--data-dir", tmp_path / "other")
    assert_not_started(second, port)
    assert len(second.errors) == 1
    assert not (tmp_path / "other").exists()
    assert increment(first.url) == 1
