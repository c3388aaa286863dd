"""A slow or dead reader stops nothing: neither of the log, of standard output, nor of service notifications."""

import importlib
import json
import os
import pty
import signal
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from counter_server import open_state
from counter_server.manager.directory import DataDirectory
from tests.load import open_client
from tests.processes import PATIENCE, Program, Server, eventually, holder

INCREMENT = "/api/v1/counters/x/increment"
SMALL = "import fcntl, time; fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 4096); time.sleep(1000)"
DEAF = {  # by redirection: how many requests are logged before nothing more can be written
    f"> >(exec {sys.executable} -c '{SMALL}' > /dev/null 2>&1) 2>&1": 100,
    "> >(:) 2>&1": 2,
    "<&- >&- 2>&-": 2,
    "> /dev/full 2> /dev/full": 2,
    ">&$TERMINAL 2>&$TERMINAL": 100,
}


@pytest.fixture
def terminal() -> Iterator[int]:
    """Return a terminal whose output is stopped, as by Ctrl-S."""
    master, slave = pty.openpty()
    termios.tcflow(slave, termios.TCOOFF)
    yield slave
    os.close(master)
    os.close(slave)


def increments(port: int, times: int) -> list[int]:
    found = []
    with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        for _ in range(times):
            connection.request("POST", INCREMENT, headers={"Host": "localhost"})
            found.append(json.loads(connection.getresponse().read())["value"])
    return found


def kill_manager(data_dir: Path) -> None:
    manager = holder(data_dir)
    assert manager is not None
    os.kill(manager, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "requests"), DEAF.items())
def test_a_server_whose_output_nobody_takes_serves(
    stack: ExitStack, data_dir: Path, terminal: int, streams: str, requests: int
) -> None:
    bound = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = bound.getsockname()[1]
    script = f'exec 3<&"$1"; TERMINAL=$2; shift 2; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" {streams}'
    command = [sys.executable, "run.py", "--workers", "1", "--log-format", "json", "--data-dir", str(data_dir)]
    arguments = ["-c", script, "bash", str(bound.fileno()), str(terminal), *command]
    server = stack.enter_context(Program(*arguments, program="bash", descriptors=(bound.fileno(), terminal)))
    assert increments(port, requests) == list(range(1, requests + 1))
    kill_manager(data_dir)  # the supervisor logs it and starts another
    assert increments(port, 1) == [requests + 1]
    assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("streams", list(DEAF)[2:])
def test_a_manager_whose_output_nobody_takes_serves(
    stack: ExitStack, data_dir: Path, terminal: int, streams: str
) -> None:
    script = f'TERMINAL=$1; shift; exec "$@" {streams}'
    arguments = ["-c", script, "bash", str(terminal), sys.executable, "manager_process.py", "--data-dir", str(data_dir)]
    manager = stack.enter_context(Program(*arguments, program="bash", descriptors=(terminal,)))
    eventually(lambda: (data_dir / "manager.sock").exists(), "its socket")
    with open_client(DataDirectory(data_dir).url) as state:
        assert state.counter("x").increment() == 1
    assert manager.stop() == 0


@pytest.mark.slow
def test_the_log_says_how_many_lines_were_dropped(stack: ExitStack) -> None:
    script = """
import logging, sys
from counter_server.output import configure
configure("worker", "json")
for number in range(20_000):
    logging.getLogger("x").info("%d %s", number, "x" * 100)
print("all said", flush=True)
sys.stdin.read()
logging.getLogger("x").info("the last")
"""
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs, open(reader, "rb") as lines:
        command = f'exec 2>&{writer} 0<&{theirs.fileno()} {writer}>&- {theirs.fileno()}<&-; exec "$@"'
        descriptors = (writer, theirs.fileno())
        program = stack.enter_context(
            Program("-c", command, "bash", sys.executable, "-c", script, program="bash", descriptors=descriptors)
        )
        os.close(writer)
        theirs.close()
        program.expect("all said")
        reported = 0
        seen = 0
        for line in lines:
            message = json.loads(line)["message"]
            if "were dropped" in message:
                reported += int(message.split()[0])
                ours.close()
            else:
                seen += 1
    assert program.wait() == 0
    assert reported > 0
    assert seen + reported == 20_001


def test_nothing_that_is_logged_looks_like_another_line(stack: ExitStack) -> None:
    """Neither as text nor as JSON, which has extra fields, tracebacks, and values that JSON does not know."""
    script = """
import logging, os
from counter_server.output import configure
forged = "a\\n2026-01-01 00:00:00,000 worker 1 INFO forged\\r\\x1b[31m\\u2028\\x85\\u202e\\udc80"
for form in ("text", "json"):
    configure("worker", form)
    logging.getLogger("waitress").warning("path %s", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("a.b").error("%s", "ü", exc_info=True, extra={"request_id": "7", "place": {os}})
"""
    program = stack.enter_context(Program("-c", script))
    assert program.wait() == 0
    *text, first, second = program.errors
    assert all("forged" not in line or not line.startswith("2026-01") for line in text), text
    assert all(line.isprintable() for line in text)
    assert text[0].endswith(r"INFO forged\r\x1b[31m\u2028\x85\u202e\udc80")
    assert json.loads(first)["message"].endswith("INFO forged\r\x1b[31m\u2028\x85\u202e\udc80")
    line = json.loads(second)
    assert "ValueError: a\n2026" in line.pop("exc_info")
    assert datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0)
    assert line.pop("place").startswith("{<module 'os'")
    assert line == {
        "message": "ü",
        "process": "worker",
        "pid": program.pid,
        "logger": "a.b",
        "level": "ERROR",
        "request_id": "7",
    }


@pytest.mark.slow
def test_a_service_manager_that_reads_nothing_holds_nothing_up(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s,
    ):
        deaf.bind(str(tmp_path / "notify"))
        s.connect(str(tmp_path / "notify"))
        s.setblocking(False)  # noqa: FBT003 - it takes no keyword
        with suppress(BlockingIOError):
            while True:
                s.send(b"full")
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        server = start_server("--workers", "1")
        assert increments(urlsplit(server.url).port or 0, 1) == [1]
        assert server.stop() == 0


def children_of(parent: int) -> list[str]:
    """Return the name and state of each child process, as "sh) S"."""
    stats = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stats.append((entry / "stat").read_text().partition("(")[2])
    return [" ".join(stat.split()[:2]) for stat in stats if stat.rpartition(")")[2].split()[1] == str(parent)]


@pytest.mark.slow
def test_orphans_are_reaped_and_do_not_disturb(stack: ExitStack, data_dir: Path) -> None:
    """The supervisor gets them like the first process of a container: here it is made their subreaper."""
    script = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
orphan = "sh -c 'while test ! -e $0; do sleep 0.05; done' $0 &"
subprocess.Popen(["sh", "-c", f"for n in 1 2 3 4 5; do {orphan} done", sys.argv[1]])
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
    go = data_dir.parent / "go"
    command = ("run.py", "--port", "0", "--workers", "1", "--data-dir", data_dir)
    server = stack.enter_context(Program("-c", script, go, *command))
    port = urlsplit(server.expect("Serving on ")).port or 0
    assert increments(port, 1) == [1]
    go.touch()
    kill_manager(data_dir)
    assert increments(port, 1) == [2]
    eventually(lambda: not any(child.startswith("sh)") for child in children_of(server.pid)), "the orphans' end")
    eventually(lambda: not any(child.endswith(" Z") for child in children_of(server.pid)), "no zombies")
    assert server.stop() == 0


CHATTY = """
import os, sys
class Chatty:
    def say(self, size, times):
        for number in range(times):
            print(f"{number:7}" + "x" * size)
    def have_a_child_say(self, size):
        os.system(f"head -c {size} /dev/zero >&2; echo; echo from the child")
"""


def test_the_log_of_a_manager_on_demand_stays_small(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    """Its class prints for ever, long lines too, and so does a child process."""
    (tmp_path / "chatty.py").write_text(CHATTY)
    with pytest.MonkeyPatch.context() as patch, open_state(on_demand, deadline=PATIENCE) as state:
        patch.syspath_prepend(tmp_path)
        chatty = state.object("chatty", importlib.import_module("chatty").Chatty)
        chatty.say(2**18, 5)
        log, most = data_dir / "manager.log", 2**20
        eventually(lambda: log.stat().st_size <= most, "the manager's first look")
        for size, times in ((200, 50_000), (2**19, 10), (50, 1000)):
            chatty.say(size, times)
            assert log.stat().st_size <= most
        assert f"{999:7}" in log.read_text()[-100:]
        chatty.have_a_child_say(2**22)
        last = b"from the child\n"
        eventually(lambda: log.stat().st_size <= most and log.read_bytes().endswith(last), "the manager's next look")
        log.unlink()
        chatty.say(2**18, 50)  # to no end, but nothing fails
        sys.modules.pop("chatty")
