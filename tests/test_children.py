"""The supervisor's children: the descriptors that they inherit, starts without room, and the code that they run."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import Program, Server, children, eventually, open_in
from tests.test_supervision import increment

pytestmark = pytest.mark.slow
StartServer = Callable[..., Server]


def await_children(server: Server, workers: int, *gone: int) -> None:
    def all_are_back() -> bool:
        there = (len(server.children("worker")), len(server.children("manager")))
        return there == (workers, 1) and not any(Path(f"/proc/{pid}").exists() for pid in gone)

    eventually(all_are_back, "others in the place of those")


def test_a_child_shares_only_the_listening_socket_with_the_others(start_server: StartServer) -> None:
    server = start_server("--workers", "3")
    for kind in ("manager", "worker"):  # so that some start while all others run
        (victim, *_) = server.children(kind)
        os.kill(victim, signal.SIGKILL)
        await_children(server, 3, victim)
    eventually(lambda: increment(server.url) >= 1, "an answer")
    (manager,), workers = server.children("manager"), server.children("worker")
    supervisors = {name for name in open_in(server.pid) if name.startswith("socket:")}
    (listening,) = set.intersection(supervisors, *map(open_in, workers))
    pids = [manager, *workers]
    for pid in pids:
        of_others = set.union(supervisors, *(open_in(other) for other in pids if other != pid))
        assert open_in(pid) & of_others == (set() if pid == manager else {listening})


def test_without_room_for_another_process_the_others_serve(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    assert increment(server.url) == 1
    used = open_in(server.pid)
    numbers = {int(link.name) for link in Path(f"/proc/{server.pid}/fd").iterdir()}
    _first, second, *_ = (number for number in range(1000) if number not in numbers)
    victim, other = server.children("worker")
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (second, limits[1]))  # the dead one leaves room for a part
    os.kill(victim, signal.SIGKILL)
    refused = "cannot be started for now: [Errno 24]"
    eventually(lambda: sum(refused in line for line in server.errors) >= 2, "two attempts")
    assert server.children("worker") == [other]
    assert [increment(server.url) for _ in range(5)] == [2, 3, 4, 5, 6]
    assert open_in(server.pid) < used  # the attempts left nothing open
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    await_children(server, 2)
    assert increment(server.url) == 7
    assert not any("Traceback" in line for line in server.errors)
    assert server.stop() == 0


# Opens more files than `select` can number, and then becomes the server.
_MANY = """
import os, resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
for _ in range(1100):
    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
os.execv(sys.executable, [sys.executable, "run.py", "--port", "0", *sys.argv[1:]])
"""


def test_descriptors_beyond_1024_work(stack: ExitStack, data_dir: Path) -> None:
    server = stack.enter_context(Program("-c", _MANY, "--workers", "1", "--data-dir", data_dir))
    url = server.expect("Serving on ")
    assert [increment(url) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert (server.stop(), server.errors) == (0, [])


def test_new_workers_and_the_next_manager_have_new_code(start_server: StartServer) -> None:
    server = start_server("--workers", "1")
    (manager,), opened = server.children("manager"), 0

    def is_new(pid: int) -> bool:
        return b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()

    for _ in range(2):
        before = server.children("worker")
        server.send_signal(signal.SIGHUP)
        await_children(server, 1, *before)
        assert [is_new(pid) for pid in (manager, *server.children("worker"))] == [False, True]
        opened = opened or len(open_in(server.pid))
        eventually(lambda: len(open_in(server.pid)) <= opened, "as few open descriptors as before")
    os.kill(manager, signal.SIGKILL)
    await_children(server, 1, manager)
    assert is_new(server.children("manager")[0])
    assert increment(server.url) == 1


def test_a_new_interpreter_runs_nothing_from_the_working_directory(
    stack: ExitStack, data_dir: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name in ("multiprocessing", "pathlib", "json", "pickle", "click"):
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')")
    command = Path(sys.executable).with_name("counter-server")
    options = ("run", "--port", "0", "--workers", "1", "--data-dir", data_dir)
    server = stack.enter_context(Program(*options, program=str(command), cwd=place))
    server.expect("Serving on ")
    before = children(server.pid, "worker")
    server.send_signal(signal.SIGHUP)
    eventually(lambda: {*children(server.pid, "worker")} - {*before} or (tmp_path / "ran").exists(), "another worker")
    assert not (tmp_path / "ran").exists()
