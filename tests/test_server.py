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

from counter_server.server.prove.proof import group_members
from tests.processes import PATIENCE, Manager, Program, Server, eventually

COUNTERS = "/api/v1/counters"
INCREMENT = f"{COUNTERS}/x/increment"

Answer = tuple[int, dict[str, str], str]
StartServer = Callable[..., Server]


def ask(url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    """Send one request on a new connection; return the status, the headers and the text of the answer."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)) as connection:
        connection.request(method, path, body, {"Connection": "close", **(headers or {})})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()


def increment(url: str, name: str = "x") -> int:
    status, _, text = ask(url, "POST", f"{COUNTERS}/{name}/increment")
    assert status == 200, text
    value = json.loads(text)["value"]
    assert isinstance(value, int)
    return value


def visit(url: str) -> tuple[int, int]:
    """Return the number of this visit, and the worker process that counted it."""
    status, _, text = ask(url, "GET", "/")
    assert status == 200, text
    number, worker = re.search(r'data-number="(\d+)"', text), re.search(r"worker process (\d+)", text)
    assert number
    assert worker
    return int(number[1]), int(worker[1])


def address(server: Server) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


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


def alive(pid: int, server: Program) -> bool:
    return pid in group_members(server.pid)


def assert_no_process_left(program: Program) -> None:
    eventually(lambda: not group_members(program.pid), "the end of every process of the server", seconds=6)


def assert_not_started(program: Program, *reasons: str) -> None:
    """Check that it exited by itself, printed a line with each reason and no traceback, and left no process."""
    assert program.wait() == 1, program.errors
    assert program.output == []
    for reason in reasons:
        assert any(reason in line for line in program.errors), program.errors
    assert not any("Traceback" in line for line in program.errors), program.errors
    assert program.errors[-1].startswith("Error: ")
    assert_no_process_left(program)


@pytest.fixture(scope="module")
def any_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return one server for all tests that do not harm it."""
    with Server("--workers", "2", "--data-dir", tmp_path_factory.mktemp("server") / "data") as server:
        yield server


# Starting


def test_it_prints_its_url_on_one_line_and_answers_the_first_request(
    start_server: StartServer,
) -> None:
    server = start_server()
    assert server.output == [f"Serving on {server.url}"]
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", server.url)
    assert visit(server.url)[0] == 1


def test_it_serves_on_the_requested_port(stack: ExitStack, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = stack.enter_context(Program("run.py", "--port", str(port), "--data-dir", data_dir))
    assert server.expect("Serving on ") == f"http://127.0.0.1:{port}"
    assert increment(f"http://127.0.0.1:{port}") == 1


def test_an_ipv6_address_is_printed_in_brackets(stack: ExitStack, start_server: StartServer) -> None:
    try:
        stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
    except OSError:
        pytest.skip("no IPv6 here")
    server = start_server("--host", "::1")
    assert re.fullmatch(r"http://\[::1\]:[1-9]\d*", server.url)
    assert increment(server.url) == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_it_starts_the_requested_workers_and_one_manager(start_server: StartServer, workers: int) -> None:
    server = start_server("--workers", str(workers))
    assert len(server.children("worker")) == workers
    assert len(server.children("manager")) == 1


def test_every_worker_answers_and_no_number_is_given_twice(start_server: StartServer) -> None:
    server = start_server("--workers", "2", "--threads", "4")
    numbers: list[int] = []
    answering: set[int] = set()

    def both_have_answered() -> bool:
        for number, worker in pool.map(lambda _: visit(server.url), range(32)):
            numbers.append(number)
            answering.add(worker)
        return len(answering) == 2

    with ThreadPoolExecutor(16) as pool:
        eventually(both_have_answered, "an answer of each worker")
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert answering == set(server.children("worker"))


def test_a_visitors_counter_is_one_for_all_workers_and_two_tabs_lose_nothing(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    cookies = []
    answering = set()
    for _ in range(2):
        _, headers, text = ask(server.url, "GET", "/session")
        assert "counter is 0" in text
        cookies.append(headers["Set-Cookie"].partition(";")[0])

    def click(browser: int) -> int:
        status, _, text = ask(
            server.url, "POST", "/session/inc", headers={"Cookie": cookies[browser], "Accept": "text/html"}
        )
        assert status == 200, text
        worker, number = re.search(r"worker process (\d+)", text), re.search(r"counter is (\d+)", text)
        assert worker
        assert number
        answering.add(int(worker[1]))
        return int(number[1])

    mine: list[int] = []
    theirs: list[int] = []

    def both_have_answered() -> bool:
        answers = [(numbers, pool.submit(click, cookie)) for numbers, cookie in [(mine, 0), (theirs, 1)] * 16]
        for numbers, answer in answers:
            numbers.append(answer.result())
        return len(answering) == 2

    with ThreadPoolExecutor(16) as pool:
        eventually(both_have_answered, "an answer of each worker")
    for numbers in (mine, theirs):
        assert sorted(numbers) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("name", ["счётчик", "two words", "50%", "a?b", "a/b", "a//b", "/a", "a/", "//"])
def test_unusual_names_work_through_the_whole_server(any_server: Server, name: str) -> None:
    path = f"{COUNTERS}/{quote(name, safe='')}"
    status, _, text = ask(any_server.url, "PUT", path, b'{"value": 5}', {"Content-Type": "application/json"})
    assert (status, json.loads(text)) == (200, {"counter": name, "value": 5})
    assert increment(any_server.url, quote(name, safe="")) == 6
    assert ask(any_server.url, "GET", path)[0] == 200
    assert ask(any_server.url, "DELETE", path)[0] == 204


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("POST", f"{COUNTERS}/gr%F6%DFe/increment", {}, 400),
        ("GET", f"{COUNTERS}/%E2%82", {}, 400),
        ("POST", f"{COUNTERS}/a%00b/increment", {}, 400),
        ("POST", f"{COUNTERS}/a%0Ab/increment", {}, 400),
        ("POST", f"{COUNTERS}//increment", {}, 400),
        ("POST", f"{COUNTERS}/bad/increment", {"Idempotency-Key": ""}, 400),
        ("POST", f"{COUNTERS}/bad/increment", {"Idempotency-Key": "k" * 256}, 400),
        ("POST", f"{COUNTERS}/bad/increment", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", f"{COUNTERS}/bad", {}, 404),
        ("GET", "/nowhere", {}, 404),
        ("BREW", f"{COUNTERS}/bad", {}, 405),
        ("GET", "/", {"Sec-Purpose": "prefetch"}, 503),
    ],
)
def test_the_whole_server_refuses_each_request_that_the_application_refuses(
    any_server: Server, method: str, path: str, headers: dict[str, str], expected: int
) -> None:
    before = ask(any_server.url, "GET", COUNTERS)[2]
    status, answered, text = ask(any_server.url, method, path, None, headers)
    assert status == expected, text
    assert answered["Content-Type"] == "application/problem+json"
    assert json.loads(text)["outcome"] == "not_applied"
    assert ask(any_server.url, "GET", COUNTERS)[2] == before


def test_a_store_without_a_manager_starts_none(stack: ExitStack) -> None:
    server = stack.enter_context(Server("--workers", "1", "--store", "memory://"))
    assert [increment(server.url) for _ in range(3)] == [1, 2, 3]
    assert server.children("manager") == []


def test_the_store_option_names_the_data_directory_too(stack: ExitStack, data_dir: Path) -> None:
    server = stack.enter_context(Server("--store", f"manager://{data_dir}"))
    assert increment(server.url) == 1
    assert (data_dir / "journal.sqlite3").exists()


@pytest.mark.parametrize("name", ["größe", "100%25", "a?b #c"])
def test_a_data_directory_can_have_any_name(stack: ExitStack, tmp_path: Path, name: str) -> None:
    server = stack.enter_context(Server("--workers", "1", "--data-dir", tmp_path / name))
    assert increment(server.url) == 1
    assert (tmp_path / name / "journal.sqlite3").exists()


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_the_next_start_continues_the_count(
    start_server: StartServer, number: signal.Signals
) -> None:
    first = start_server()
    assert [increment(first.url) for _ in range(3)] == [1, 2, 3]
    assert visit(first.url)[0] == 1
    first.send_signal(number)
    assert first.wait() == 0
    assert not any("Traceback" in line for line in first.errors), first.errors
    assert_no_process_left(first)
    second = start_server()
    assert increment(second.url) == 4
    assert visit(second.url)[0] == 2


def test_ctrl_c_in_a_terminal_reaches_all_processes_and_ends_it_with_status_0(start_server: StartServer) -> None:
    server = start_server()
    assert increment(server.url) == 1
    os.killpg(server.pid, signal.SIGINT)
    assert server.wait() == 0
    assert not any("Traceback" in line for line in server.errors), server.errors
    assert_no_process_left(server)


def test_a_request_that_is_open_when_the_signal_comes_is_answered(stack: ExitStack, start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    connection = half_a_post(stack, server)
    server.send_signal(signal.SIGTERM)
    eventually(lambda: len(server.children("worker")) < 2, "the end of the worker that had nothing to do")
    connection.sendall(b": 7}")
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 200 "), answer
    assert '"value":7' in answer
    assert server.wait() == 0
    assert_no_process_left(server)
    assert increment(start_server().url) == 8


def test_an_open_request_is_answered_even_if_every_process_gets_the_signal(
    stack: ExitStack, start_server: StartServer
) -> None:
    """systemd sends it to all of them by default."""
    server = start_server("--workers", "2")
    connection = half_a_post(stack, server)
    os.killpg(server.pid, signal.SIGTERM)
    eventually(lambda: len(server.children("worker")) < 2, "the end of the worker that had nothing to do")
    connection.sendall(b": 7}")
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 200 "), answer
    assert server.wait() == 0
    assert_no_process_left(server)
    assert increment(start_server().url) == 8


def test_while_it_stops_new_connections_are_refused(stack: ExitStack, start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    connection = half_a_post(stack, server)
    server.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            with socket.create_connection(address(server), timeout=PATIENCE):
                return False
        except ConnectionRefusedError:
            return server.running

    # Well before the server would give the open request up.
    eventually(refused, "the refusal of a new connection while a request is still open", seconds=5)
    connection.sendall(b": 7}")
    assert read_all(connection).startswith("HTTP/1.1 200 ")
    assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(stack: ExitStack, start_server: StartServer, number: signal.Signals) -> None:
    server = start_server("--workers", "2")
    assert increment(server.url) == 1
    connection = half_a_post(stack, server)
    server.send_signal(signal.SIGTERM)
    eventually(lambda: len(server.children("worker")) < 2, "the end of the worker that had nothing to do")
    assert server.running
    server.send_signal(number)
    assert server.wait() == 128 + number  # it would be 0 after the open request
    assert_no_process_left(server)
    with suppress(ConnectionResetError):
        assert read_all(connection) == ""
    assert increment(start_server().url) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_signal_while_it_starts_ends_it_with_status_0(
    stack: ExitStack, data_dir: Path, processes: int, number: signal.Signals
) -> None:
    server = stack.enter_context(Program("run.py", "--port", "0", "--workers", "2", "--data-dir", data_dir))
    eventually(lambda: len(group_members(server.pid)) >= processes, f"{processes} processes")
    os.killpg(server.pid, number) if number == signal.SIGINT else server.send_signal(number)
    assert server.wait() == 0, server.errors
    assert not any("Traceback" in line for line in server.errors), server.errors
    assert_no_process_left(server)


def test_ctrl_c_while_a_child_is_still_importing_shows_no_traceback(
    stack: ExitStack, tmp_path: Path, data_dir: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        f"    pathlib.Path({str(tmp_path / 'importing')!r}).touch()\n"
        "    time.sleep(0.5)\n"
    )
    server = stack.enter_context(Server("--data-dir", data_dir, environment={"PYTHONPATH": str(tmp_path)}))
    server.send_signal(signal.SIGHUP)  # starts successors, which are new interpreters
    eventually((tmp_path / "importing").exists, "the start of a child")
    os.killpg(server.pid, signal.SIGINT)
    assert server.wait() == 0, server.errors
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in server.errors), server.errors
    assert_no_process_left(server)


# Killing


def test_no_process_outlives_a_killed_supervisor(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    assert increment(server.url) == 1
    server.kill()
    assert_no_process_left(server)
    with pytest.raises(ConnectionError):  # refused, or reset by a process that is ending
        increment(server.url)
    assert increment(start_server().url) == 2


def test_no_process_outlives_a_supervisor_that_is_killed_during_a_request(
    stack: ExitStack, start_server: StartServer
) -> None:
    server = start_server("--workers", "2")
    half_a_post(stack, server)
    server.kill()
    assert_no_process_left(server)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_no_process_outlives_a_supervisor_that_was_killed_while_it_started(
    stack: ExitStack, data_dir: Path, processes: int
) -> None:
    server = stack.enter_context(Program("run.py", "--port", "0", "--workers", "3", "--data-dir", data_dir))
    eventually(lambda: len(group_members(server.pid)) >= processes, f"{processes} processes")
    server.kill()
    assert_no_process_left(server)


def test_a_killed_worker_is_replaced_and_the_numbers_go_on(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    killed, other = server.children("worker")
    manager = server.children("manager")
    assert increment(server.url) == 1
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: not alive(killed, server), "the end of the killed worker")
    assert increment(server.url) == 2  # by the other worker
    (new,) = eventually(lambda: set(server.children("worker")) - {other}, "a new worker")
    with ThreadPoolExecutor(16) as pool:
        eventually(
            lambda: new in {worker for _, worker in pool.map(lambda _: visit(server.url), range(32))},
            "an answer of the new worker",
        )
    assert increment(server.url) == 3
    assert server.children("manager") == manager
    assert alive(other, server)


def test_all_workers_killed_at_once_are_replaced(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    assert increment(server.url) == 1
    killed = server.children("worker")
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(alive(pid, server) for pid in killed), "the end of the killed workers")
    assert increment(server.url) == 2  # it waits in the socket's queue for a new worker
    eventually(lambda: len(server.children("worker")) == 2, "two new workers")


def test_a_killed_manager_is_replaced_the_numbers_go_on_and_the_workers_stay(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    workers = sorted(server.children("worker"))
    for number in (1, 2, 3):
        assert increment(server.url) == number
        (killed,) = server.children("manager")
        os.kill(killed, signal.SIGKILL)
        eventually(lambda killed=killed: not alive(killed, server), "the end of the killed manager")  # type: ignore[misc]
    assert increment(server.url) == 4  # it waits for a new manager
    eventually(lambda: len(server.children("manager")) == 1, "a new manager")
    assert sorted(server.children("worker")) == workers


def test_a_server_survives_the_death_of_all_its_children(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    assert increment(server.url) == 1
    killed = server.children("worker") + server.children("manager")
    assert len(killed) == 3
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(alive(pid, server) for pid in killed), "the end of all children")
    assert increment(server.url) == 2
    assert server.stop() == 0
    assert_no_process_left(server)


# Starts that fail


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense://x", "nonsense://x"),
        ("memory://x", "memory://x"),
        ("manager://relative/path", "manager:///absolute/data/directory"),
        ("http://[", "http://["),
    ],
)
def test_an_invalid_store_url_is_reported_at_the_start(stack: ExitStack, url: str, says: str) -> None:
    server = stack.enter_context(Program("run.py", "--port", "0", "--workers", "2", "--store", url))
    assert_not_started(server, says)


@pytest.mark.parametrize("name", ["session.key", "manager.key", "journal.sqlite3"])
def test_a_damaged_file_is_reported_at_the_start_and_left_alone(
    stack: ExitStack, data_dir: Path, start_server: StartServer, name: str
) -> None:
    first = start_server("--workers", "1")
    assert increment(first.url) == 1
    assert first.stop() == 0
    whole = (data_dir / name).read_bytes()
    (data_dir / name).write_bytes(b"damaged" * 100)
    server = stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir))
    assert_not_started(server, str(data_dir / name))
    assert (data_dir / name).read_bytes() == b"damaged" * 100
    (data_dir / name).write_bytes(whole)
    assert increment(start_server("--workers", "1").url) == 2


def test_a_failed_child_that_is_slow_to_exit_stops_the_start_too(
    stack: ExitStack, tmp_path: Path, data_dir: Path
) -> None:
    # A process closes its files first and exits a moment later; this makes the moment long.
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys, time\n"
        "def end():\n"
        "    os.closerange(3, 256)\n"
        "    time.sleep(0.5)\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        "    atexit.register(end)\n"
    )
    data_dir.mkdir(mode=0o700)
    (data_dir / "journal.sqlite3").write_bytes(b"damaged" * 100)
    server = Program("run.py", "--port", "0", "--data-dir", data_dir, environment={"PYTHONPATH": str(tmp_path)})
    stack.enter_context(server)
    assert_not_started(server, str(data_dir / "journal.sqlite3"), "the manager process could not start")


def test_a_directory_with_a_manager_stops_the_start_naming_that_one(
    stack: ExitStack, data_dir: Path, start_manager: Callable[[], Manager]
) -> None:
    manager = start_manager()
    server = stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir))
    assert_not_started(server, f"(pid {manager.pid}) continues: it was started by hand")
    assert manager.running


def test_a_second_server_on_a_directory_exits_and_the_first_goes_on(
    stack: ExitStack, data_dir: Path, start_server: StartServer
) -> None:
    first = start_server()
    (manager,) = first.children("manager")
    assert_not_started(
        stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir)),
        f"(pid {manager}) continues",
    )
    assert increment(first.url) == 1


def test_a_second_server_on_a_port_exits_and_the_first_goes_on(
    stack: ExitStack, tmp_path: Path, start_server: StartServer
) -> None:
    first = start_server()
    port = str(address(first)[1])
    second = stack.enter_context(Program("run.py", "--port", port, "--data-dir", tmp_path / "other"))
    assert_not_started(second, port)
    assert len(second.errors) == 1
    assert not (tmp_path / "other").exists()
    assert increment(first.url) == 1
