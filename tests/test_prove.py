"""`counter-server prove`: right if the server is, wrong if it is not, and nothing left behind in any case."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from counter_server.cli import main
from counter_server.history import Operation, load
from counter_server.server.prove.load import Client
from counter_server.server.prove.verdict import Kill, judge, screen
from tests.processes import PATIENCE, ROOT, Program, Server, children, eventually

pytestmark = pytest.mark.slow
Start = Callable[..., Program]
StartWrong = Callable[..., tuple[Program, str]]


def processes_of(directory: Path) -> dict[int, str]:
    """Return the pid and the command of each other process whose temporary files go into this directory or below."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (entry / "environ").read_bytes()
            if entry.name != str(os.getpid()) and f"\0TMPDIR={directory}".encode() in b"\0" + variables:
                found[int(entry.name)] = os.fsdecode((entry / "cmdline").read_bytes()).replace("\0", " ")
    return found


def kill_processes_of(directory: Path) -> None:
    """Kill what a failed test has left."""
    for pid in processes_of(directory):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def at_a_terminal(*arguments: str) -> tuple[str, str]:
    """Run a command whose standard error is a terminal of 80 columns. Return its output, and what the terminal got."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "counter_server", *arguments]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True) as process,
        open(ours, "rb") as terminal,
    ):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how Linux reports the end of a terminal
            while part := terminal.read1():
                shown += part
        output, _ = process.communicate()
    assert process.returncode == 0
    return output, shown.decode()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty working directory, with `tmp` for temporary files."""
    place = tmp_path / "place"
    (place / "tmp").mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("COUNTER_SERVER_TOKEN", raising=False)
    monkeypatch.chdir(place)
    yield place
    kill_processes_of(place)


def assert_nothing_left(place: Path) -> None:
    eventually(lambda: not processes_of(place) and not any((place / "tmp").iterdir()), "the end of everything")


@pytest.fixture
def prove(stack: ExitStack, place: Path) -> Start:
    """Start a proof, with options, in `place`."""
    return lambda *options: stack.enter_context(Program("-m", "counter_server", "prove", *map(str, options), cwd=place))


def started(program: Program) -> str:
    """Return the counter of a proof that has begun its load."""
    (line,) = eventually(lambda: [line for line in program.errors if " clients increment " in line], "the load's start")
    return line.split()[3]


def supervisor_of(place: Path) -> int:
    found = [pid for pid, told in processes_of(place).items() if " counter_server run" in told and ".guard" not in told]
    (pid,) = [pid for pid in found if os.getpgid(pid) == pid]  # its children are forks of it
    return pid


@pytest.fixture
def wrong(stack: ExitStack, tmp_path: Path) -> StartWrong:
    """Start a server that counts wrongly; return the program and its URL."""

    def start(fault: str, port: int = 0) -> tuple[Program, str]:
        script = ROOT / "tests" / "wrong_server.py"
        server = stack.enter_context(Program(script, fault, tmp_path / "kept.json", str(port)))
        return server, server.expect("Serving on ")

    return start


def test_a_server_of_its_own_is_right_through_kills(prove: Start, place: Path) -> None:
    program = prove("--clients", 4, "--seconds", 1, "--kill-manager", 1, "--kill-worker", 1, "--json")
    assert program.wait() == 0, (program.output, program.errors)
    verdict = json.loads("\n".join(program.output))
    assert verdict["right"]
    assert verdict["violations"] == 0
    assert 100 < verdict["answered"] <= verdict["final"] <= verdict["answered"] + verdict["unknown"]
    assert verdict["asked_again"] == 100
    assert sorted(kill["victim"] for kill in verdict["kills"]) == ["manager", "worker"]
    assert all(0 < kill["recovery"] < PATIENCE for kill in verdict["kills"])
    assert sum("kill -9" in line for line in program.errors) == 2
    assert_nothing_left(place)
    assert os.listdir(place) == ["tmp"]


def test_a_running_server_is_right_and_its_other_counters_are_left_alone(
    prove: Start, place: Path, start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server("--workers", "2")
    with closing(Client(server.url)) as client:
        client.request("POST", "/api/v1/counters/prove/increment")
        program = prove("--url", server.url, "--clients", 10, "--seconds", 0.5, "--save", "all.jsonl")
        assert program.wait() == 0, (program.output, program.errors)
        assert program.output[0] == "right"
        assert any(line.startswith("throughput ") for line in program.output)
        assert not any("kill" in line for line in program.output)
        assert client.request("GET", "/api/v1/counters")[1]["counters"] == [{"counter": "prove", "value": 1}]
    history, final = load(place / "all.jsonl")
    assert final == len(history) > 10
    checked = CliRunner().invoke(main, ["prove", "--check", "all.jsonl"])
    assert (checked.exit_code, checked.stdout.splitlines()[:2]) == (0, program.output[:2])

    # The bar of rich is in test_demo.py; without rich, lines tell the progress.
    (place / "rich.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", f"{place}:{ROOT}")
    output, shown = at_a_terminal("prove", "--url", server.url, "--clients", "2", "--seconds", "1.2")
    assert output.startswith("right\n")
    assert "increments answered" in shown
    assert "\x1b[" not in shown


@pytest.mark.parametrize(
    ("fault", "complaint"), [("duplicates", "were both answered"), ("keyless", "was answered with [")]
)
def test_a_server_that_counts_wrongly_is_reported_with_its_history(
    prove: Start, wrong: StartWrong, place: Path, fault: str, complaint: str
) -> None:
    _, url = wrong(fault)
    program = prove("--url", url, "--clients", 8, "--seconds", 0.5)
    assert program.wait() == 1, (program.output, program.errors)
    assert program.output[0].startswith("WRONG: ")
    assert complaint in program.output[0]
    assert any("left there" in line and "401" in line and "only with the token" in line for line in program.output)
    (saved,) = place.glob("*.jsonl")
    assert any(line.startswith("history ") and saved.name in line for line in program.output)
    checked = CliRunner().invoke(main, ["prove", "--check", str(saved)])
    assert (checked.exit_code, checked.stdout.splitlines()[0]) == (1, program.output[0])


def test_a_server_that_answers_before_it_saves_is_found_by_a_restart(
    prove: Start,
    wrong: StartWrong,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, url = wrong("hasty")
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", "right")
    program = prove("--url", url, "--clients", 8, "--seconds", 60, "--json")
    path = f"/api/v1/counters/{started(program)}"

    def has_given(least: int) -> bool:
        with closing(Client(url)) as client:
            return int(client.request("GET", path)[1]["value"]) > least

    eventually(lambda: has_given(200), "more answers than are kept")
    server.kill()
    wrong("hasty", urlsplit(url).port or 0)
    eventually(lambda: has_given(120), "answers of the next one, which continues after 100")
    program.send_signal(signal.SIGINT)
    assert program.wait() == 1, (program.output, program.errors)
    verdict = json.loads("\n".join(program.output))
    assert not verdict["right"]
    assert re.search(r"were both answered|was answered with \[", verdict["violation"])
    assert verdict["stays"] is None
    assert (place / verdict["history"]).exists()


def test_a_server_of_its_own_that_ends_is_wrong(prove: Start, place: Path) -> None:
    program = prove("--clients", 2, "--seconds", 60)
    started(program)
    os.kill(supervisor_of(place), signal.SIGKILL)
    assert program.wait() == 1
    assert program.output[0].startswith("WRONG: the server ended; its last line: ")
    assert any(place.glob("prove-*.jsonl"))
    assert_nothing_left(place)


def test_a_proof_without_evidence_is_not_right() -> None:
    answered = [Operation("a", 0, 1, (1,))]
    lost = [Kill(victim="worker", pid=1, moment=0, recovery=None)]
    for verdict, complaint in [
        (judge([], 0), "no increment was answered"),
        (judge([Operation("a", 0)], 1), "no increment was answered"),
        (judge(answered, None), "could not be read"),
        (judge(answered, 1, lost), "not back after the kill of the worker"),
    ]:
        assert not verdict.right
        assert complaint in screen(verdict).splitlines()[0]


def told(*arguments: str) -> str:
    """Return the one line of error of a refused proof."""
    result = CliRunner().invoke(main, ["prove", *arguments])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--url http://127.0.0.1:1 --kill-worker 2", "leave out --url, or the kills"),
        ("--url 127.0.0.1:8000", "like http://127.0.0.1:8000, not"),
        ("--url http://127.0.0.1:70000", "is not a server's address"),
        ("--save nowhere/all.jsonl", "no history can be saved as nowhere/all.jsonl"),
        ("--check nowhere.jsonl", "cannot be read: No such file"),
        ("--check x --url http://127.0.0.1:1", "--check uses no server"),
    ],
)
def test_impossible_options_are_refused_in_one_line(place: Path, arguments: str, reason: str) -> None:
    assert reason in told(*arguments.split(" "))


def test_a_file_without_a_history_is_reported_with_its_line(place: Path) -> None:
    for content, line in (b"", 1), (b'{"final": 1}\n{"key": "a"}\n', 2), (b'{"final": 1}\n\xff\n', 2):
        (place / "file").write_bytes(content)
        assert f"file is not a history of increments: line {line}" in told("--check", "file")


def test_an_unreachable_server_is_reported() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert told("--url", url).endswith("Connection refused; is it running there?")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("HTTP/1.1 404 No\r\n\r\nhere", "is not a counter-server: an increment was answered 404 Not Found: here"),
        ('HTTP/1.1 200 OK\r\n\r\n{"value": true}', "an increment was answered 200 OK"),
        ('HTTP/1.1 501 No\r\n\r\n{"detail": "no keys"}', "501 Not Implemented: no keys"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "is not a web server"),
    ],
)
def test_a_server_of_another_kind_is_reported_with_its_answer(answer: str, reason: str) -> None:
    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer.encode())

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor() as threads:
        serving = threads.submit(serve)
        assert reason in told("--url", f"http://127.0.0.1:{listening.getsockname()[1]}")
        serving.result()


def test_ctrl_c_ends_it_early_with_a_verdict(prove: Start, place: Path) -> None:
    program = prove("--clients", 4, "--seconds", 60, "--kill-manager", 1)
    started(program)
    os.killpg(program.pid, signal.SIGINT)  # to all of a terminal's foreground
    assert program.wait() == 0, (program.output, program.errors)
    assert program.output[0] == "right"
    assert any("stopped early" in line for line in program.output)
    assert_nothing_left(place)
    assert os.listdir(place) == ["tmp"]


def test_the_second_ctrl_c_waits_for_no_answer(prove: Start, place: Path) -> None:
    program = prove("--clients", 4, "--seconds", 60)
    started(program)
    (manager,) = children(supervisor_of(place), "manager")
    os.kill(manager, signal.SIGSTOP)  # so that there is none
    program.send_signal(signal.SIGINT)
    eventually(lambda: any(line.startswith("Stopped early") for line in program.errors), "the first one's effect")
    program.send_signal(signal.SIGINT)
    assert program.wait() == 1
    assert program.output == []
    assert_nothing_left(place)
