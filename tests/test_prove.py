"""`counter-server prove`: right if the server is, wrong if it is not, and nothing left behind in any case."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner, Result

from counter_server.cli import main
from counter_server.history import Operation, load, save
from counter_server.server.prove.load import Client
from counter_server.server.prove.verdict import Kill, judge, screen
from tests.processes import PATIENCE, ROOT, Program, Server, children, eventually

pytestmark = pytest.mark.slow

PROOF = ("-m", "counter_server", "prove")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to prove in, with `tmp` for temporary files; processes that a failed test left are killed."""
    (tmp_path / "place" / "tmp").mkdir(parents=True)
    place = tmp_path / "place"
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("COUNTER_SERVER_TOKEN", raising=False)
    monkeypatch.chdir(place)
    yield place
    for pid in processes_in(place):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_in(place: Path) -> dict[int, str]:
    """Return the pid and the command of every other process that runs in the directory, or below it."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            cwd = os.readlink(entry / "cwd") if entry.name.isdigit() else ""
            command = os.fsdecode((entry / "cmdline").read_bytes()).replace("\0", " ") if cwd else ""
        except OSError:
            continue
        # An ended process has no command line; the directory of a running one may have been removed.
        if command and entry.name != str(os.getpid()) and Path(cwd.removesuffix(" (deleted)")).is_relative_to(place):
            found[int(entry.name)] = command
    return found


def assert_nothing_left(place: Path) -> None:
    eventually(lambda: not processes_in(place) and not any((place / "tmp").iterdir()), "the end of everything")


@pytest.fixture
def prove(stack: ExitStack, place: Path) -> Callable[..., Program]:
    """Start a proof, with options, in `place`."""
    return lambda *options: stack.enter_context(Program(*PROOF, *map(str, options), cwd=place))


def started(program: Program) -> str:
    """The URL at which a proof has begun its load."""
    (line,) = eventually(lambda: [line for line in program.errors if " clients increment " in line], "the load's start")
    return line.split()[5]


def answered(program: Program) -> int:
    """Return how many increments were answered, by the last line that says so."""
    told = [line.split()[2] for line in program.errors if line.endswith(" increments answered")]
    return int(told[-1].replace(",", "")) if told else 0


@pytest.fixture
def wrong(stack: ExitStack, tmp_path: Path) -> Callable[..., tuple[Program, str]]:
    """Start a server that counts wrongly; the program, and its URL."""

    def start(fault: str, port: int = 0) -> tuple[Program, str]:
        script = ROOT / "tests" / "wrong_server.py"
        server = stack.enter_context(Program(script, fault, tmp_path / "kept.json", str(port)))
        return server, server.expect("Serving on ")

    return start


# Right


def test_a_server_of_its_own_is_right_through_kills_of_manager_and_worker(
    prove: Callable[..., Program], place: Path
) -> None:
    program = prove("--clients", 20, "--seconds", 3, "--kill-manager", 1, "--kill-worker", 1, "--json")
    assert program.wait() == 0, (program.output, program.errors)
    verdict = json.loads("\n".join(program.output))
    assert verdict["right"]
    assert verdict["violations"] == 0
    assert verdict["answered"] > 100
    assert verdict["answered"] <= verdict["final"] <= verdict["answered"] + verdict["unknown"]
    assert verdict["asked_again"] == 100
    assert sorted(kill["victim"] for kill in verdict["kills"]) == ["manager", "worker"]
    assert all(0 < kill["recovery"] < PATIENCE for kill in verdict["kills"])
    assert sum("kill -9" in line for line in program.errors) == 2
    assert_nothing_left(place)
    assert os.listdir(place) == ["tmp"]


def test_a_server_that_runs_is_right_and_its_other_counters_are_left_alone(
    prove: Callable[..., Program], place: Path, start_server: Callable[..., Server], stack: ExitStack
) -> None:
    server = start_server("--workers", "2")
    client = Client(server.url)
    stack.callback(client.close)
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


@pytest.mark.parametrize("rich", [True, False], ids=["with rich", "without rich"])
def test_at_a_terminal_a_bar_is_drawn_where_rich_is_installed(
    place: Path, start_server: Callable[..., Server], *, rich: bool
) -> None:
    if not rich:
        (place / "rich").mkdir()
        (place / "rich" / "__init__.py").write_text("raise ImportError")
    server = start_server("--workers", "1")
    ours, theirs = pty.openpty()
    arguments = [*PROOF, "--url", server.url, "--clients", "2", "--seconds", "1.5"]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": f"{place}:{ROOT}"}
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment) as done:
        os.close(theirs)
        written = b""
        try:
            while chunk := os.read(ours, 4096):
                written += chunk
        except OSError:  # how Linux reports the end of a terminal
            pass
        finally:
            os.close(ours)
        assert done.stdout
        assert done.stdout.read().startswith(b"right\n")
    assert b"increments answered" in written
    assert (b"\x1b[" in written) == rich


# Wrong


@pytest.mark.parametrize(
    ("fault", "complaint"), [("duplicates", "were both answered"), ("keyless", "was answered with [")]
)
def test_a_server_that_counts_wrongly_is_reported_with_its_history(
    prove: Callable[..., Program], wrong: Callable[..., tuple[Program, str]], place: Path, fault: str, complaint: str
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
    assert checked.exit_code == 1
    assert checked.stdout.splitlines()[0] == program.output[0]


def test_a_server_that_answers_before_it_saves_is_found_out_by_a_restart(
    prove: Callable[..., Program],
    wrong: Callable[..., tuple[Program, str]],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, url = wrong("hasty")
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", "right")
    program = prove("--url", url, "--clients", 8, "--seconds", 60, "--json")
    started(program)
    eventually(lambda: answered(program) > 200, "more answers than are kept")
    server.kill()
    wrong("hasty", urlsplit(url).port or 0)
    before = answered(program)
    eventually(lambda: answered(program) > before, "answers of the next one")
    program.send_signal(signal.SIGINT)
    assert program.wait() == 1, (program.output, program.errors)
    verdict = json.loads("\n".join(program.output))
    assert not verdict["right"]
    assert re.search(r"were both answered|was answered with \[", verdict["violation"])
    assert verdict["stays"] is None
    assert (place / verdict["history"]).exists()


def supervisor_in(place: Path) -> int:
    found = [pid for pid, told in processes_in(place).items() if " counter_server run" in told and ".guard" not in told]
    (pid,) = [pid for pid in found if os.getpgid(pid) == pid]  # its children are forks of it
    return pid


def test_a_server_of_its_own_that_ends_is_wrong(prove: Callable[..., Program], place: Path) -> None:
    program = prove("--clients", 2, "--seconds", 60)
    started(program)
    os.kill(supervisor_in(place), signal.SIGKILL)
    assert program.wait() == 1
    assert program.output[0].startswith("WRONG: the server ended; its last line: ")
    assert any(place.glob("prove-*.jsonl"))
    assert_nothing_left(place)


@pytest.mark.parametrize(
    ("history", "final", "kills", "complaint"),
    [
        ([], 0, [], "no increment was answered"),
        ([Operation("a", 0)], 1, [], "no increment was answered"),
        ([Operation("a", 0, 1, (1,))], None, [], "could not be read"),
        (
            [Operation("a", 0, 1, (1,))],
            1,
            [Kill(victim="worker", pid=1, moment=0, recovery=None)],
            "not back after the kill of the worker",
        ),
    ],
)
def test_a_proof_without_evidence_is_not_right(
    history: list[Operation], final: int | None, kills: list[Kill], complaint: str
) -> None:
    verdict = judge(history, final, kills)
    assert not verdict.right
    assert complaint in screen(verdict).splitlines()[0]


# Errors, in one line


def told(*arguments: str) -> str:
    """Return the one line of error of a refused proof."""
    result: Result = CliRunner().invoke(main, ["prove", *arguments])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--url", "http://127.0.0.1:1", "--kill-manager", "1"], "leave out --url, or the kills"),
        (["--url", "http://127.0.0.1:1", "--kill-worker", "2"], "leave out --url, or the kills"),
        (["--url", "127.0.0.1:8000"], "like http://127.0.0.1:8000, not"),
        (["--url", "http://[::1"], "is not a server's address"),
        (["--url", "http://127.0.0.1:70000"], "is not a server's address"),
        (["--save", "nowhere/all.jsonl"], "no history can be saved as nowhere/all.jsonl"),
        (["--check", "nowhere.jsonl"], "cannot be read: No such file"),
        (["--check", "x", "--url", "http://127.0.0.1:1"], "--check uses no server"),
    ],
)
def test_impossible_options_are_refused_in_one_line(place: Path, arguments: list[str], reason: str) -> None:
    assert reason in told(*arguments)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "line 1"),
        (b'{"final": 1}\n{"key": "a"}\n', "line 2"),
        (b'{"final": 1}\n\xff\n', "line 2"),
        (b'{"final": "1"}\n', "line 1"),
    ],
)
def test_a_file_without_a_history_is_reported_with_its_line(place: Path, content: bytes, line: str) -> None:
    (place / "file").write_bytes(content)
    assert f"file is not a history of increments: {line}" in told("--check", "file")


def test_an_unreachable_server_is_reported() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert told("--url", url).endswith("Connection refused; is it running there?")


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        ("404 Not Found", "no", "is not a counter-server: an increment was answered 404 Not Found: no"),
        ("200 OK", "hi", "an increment was answered 200 OK: hi"),
        ("200 OK", '{"value": true}', "an increment was answered 200 OK"),
        ("501 Not Implemented", '{"detail": "no keys"}', "501 Not Implemented: no keys"),
        (None, "SSH-2.0-OpenSSH_9.2\r\n", "is not a web server"),
        (None, "", "is not a web server"),
    ],
)
def test_a_server_of_another_kind_is_reported_with_its_answer(status: str | None, body: str, reason: str) -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n" if status else ""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(f"{head}{body}".encode())

        thread = threading.Thread(target=serve)
        thread.start()
        line = told("--url", f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread.join()
    assert reason in line


# Leftovers


def test_ctrl_c_ends_it_early_with_a_verdict_and_leaves_nothing(prove: Callable[..., Program], place: Path) -> None:
    program = prove("--clients", 10, "--seconds", 60, "--kill-manager", 1)
    started(program)
    os.killpg(program.pid, signal.SIGINT)  # to all of a terminal's foreground
    assert program.wait() == 0, (program.output, program.errors)
    assert program.output[0] == "right"
    assert any("stopped early" in line for line in program.output)
    assert_nothing_left(place)
    assert os.listdir(place) == ["tmp"]


def test_the_second_ctrl_c_waits_for_no_answer(prove: Callable[..., Program], place: Path) -> None:
    program = prove("--clients", 10, "--seconds", 60)
    started(program)
    (manager,) = children(supervisor_in(place), "manager")
    os.kill(manager, signal.SIGSTOP)  # so that there is none
    program.send_signal(signal.SIGINT)
    eventually(lambda: any(line.startswith("Stopped early") for line in program.errors), "the first one's effect")
    program.send_signal(signal.SIGINT)
    assert program.wait() == 1
    assert program.output == []
    assert_nothing_left(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_ends_it_while_its_server_starts_leaves_nothing(
    prove: Callable[..., Program],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        f"while 'run' in sys.orig_argv and not pathlib.Path({str(code / 'go on')!r}).exists():\n"
        "    time.sleep(0.01)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{code}:{ROOT}")
    program = prove()
    eventually(lambda: any("counter_server run" in command for command in processes_in(place).values()), "its server")
    program.send_signal(number)
    (code / "go on").touch()
    assert program.wait() != 0
    assert program.output == []
    assert_nothing_left(place)


def test_kill_9_in_the_middle_leaves_nothing(prove: Callable[..., Program], place: Path) -> None:
    program = prove("--clients", 10, "--seconds", 60)
    started(program)
    assert len(processes_in(place)) > 4
    program.kill()
    assert_nothing_left(place)


def test_an_unanswered_increment_comes_back_from_a_saved_history_as_it_was(tmp_path: Path) -> None:
    history = [Operation("a", 0.1, 0.25, (1, 1)), Operation("b", 1 / 3)]
    save(tmp_path / "file", history, None)
    assert load(tmp_path / "file") == (history, None)
    assert history[1].returned is None
