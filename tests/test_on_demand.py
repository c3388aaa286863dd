"""A manager on demand: two lines in any app are enough, whatever launches it."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from counter_server import State, StoreOptions, open_state
from counter_server.errors import DeadlineExceeded, InvalidRequest, StartupError
from counter_server.extension import SharedState
from counter_server.manager.directory import DataDirectory
from counter_server.server.prove.load import Client
from tests.hosted_classes import Slow
from tests.launchers import LAUNCHERS, launch
from tests.load import at_once, visit
from tests.processes import PATIENCE, ROOT, Manager, Program, Server, end_manager, eventually, frozen, holder

APP = """
from flask import Flask
from counter_server import SharedState

app = Flask(__name__)
app.config["COUNTER_SERVER_DEADLINE"] = 30
shared = SharedState(app)

@app.get("/")
def home():
    return {"value": shared.counter("visits").increment()}

if __name__ == "__main__":
    import waitress
    waitress.serve(app, listen="127.0.0.1:0", threads=8, _quiet=False)
"""


def patient(url: str, **options: object) -> State:
    return open_state(url, deadline=PATIENCE, options=StoreOptions(**options))  # type: ignore[arg-type]


def test_the_first_use_starts_a_manager_that_all_share(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as one, patient(on_demand) as other:
        assert not data_dir.exists()  # opening is not using
        assert [one.counter("c").increment(), other.counter("c").increment()] == [1, 2]
    assert holder(data_dir) is not None


def test_racing_starters_get_one_manager(on_demand: str, data_dir: Path, stack: ExitStack) -> None:
    """30 threads with a state each, and 3 other processes, all at the same time."""

    def increment() -> int:
        with patient(on_demand) as state:
            return state.counter("c").increment()

    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "counter_server", "increment", "c", "--store", on_demand],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    values = at_once(30, increment)
    values += [int(command.communicate(timeout=PATIENCE)[0]) for command in commands]
    assert sorted(values) == list(range(1, 34))
    (manager,) = managers_of(data_dir)
    assert manager == holder(data_dir)


def managers_of(data_dir: Path) -> list[int]:
    """Return the pids of all manager processes of a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"manager\x00" in command and os.fsencode(data_dir) in command:
                found.append(int(entry.name))
    return found


def test_a_manager_outlives_its_starter_and_its_session(on_demand: str, data_dir: Path) -> None:
    command = [sys.executable, "-m", "counter_server", "increment", "c", "--store", on_demand]
    for expected in ("1\n", "2\n"):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, start_new_session=True)
        assert (result.stdout, result.stderr) == (expected, "")
    manager = holder(data_dir)
    assert manager is not None
    fields = Path(f"/proc/{manager}/stat").read_text().rpartition(")")[2].split()
    assert int(fields[1]) != os.getpid()  # not our child, so never our zombie
    assert os.getsid(manager) != os.getsid(0)  # no signal of our terminal reaches it
    assert os.readlink(f"/proc/{manager}/cwd") == "/"
    assert os.readlink(f"/proc/{manager}/fd/2") == str(data_dir / "manager.log")


def test_an_idle_manager_ends_and_the_next_one_counts_on(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand, idle_timeout=0.2) as state:
        assert state.counter("c").increment() == 1
        first = holder(data_dir)
    eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
    assert first is not None
    assert not (data_dir / "manager.sock").exists()
    assert (data_dir / "manager.log").read_text() == ""
    with patient(on_demand) as state:
        assert state.counter("c").increment() == 2
        assert holder(data_dir) != first


@pytest.mark.parametrize("method", ["compute", "wait_for"])
def test_a_method_that_never_returns_keeps_no_manager(
    on_demand: str, data_dir: Path, tmp_path: Path, method: str
) -> None:
    """Whether it computes or waits: without its client, the manager is idle."""
    arguments = [str(tmp_path / "never")] if method == "wait_for" else []
    with patient(on_demand, idle_timeout=1) as state:
        state.object("slow", Slow).wait_for(str(tmp_path))  # which exists
        with open_state(on_demand, deadline=1) as hasty:
            for _ in range(3):
                with pytest.raises(DeadlineExceeded) as error:
                    getattr(hasty.object("slow", Slow), method)(*arguments)
                assert error.value.outcome == "unknown"
        assert [state.counter("c").increment() for _ in range(3)] == [1, 2, 3]  # a client is connected
    eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
    with patient(on_demand) as state:
        assert state.counter("c").increment() == 4


def test_a_manager_stays_while_a_client_is_connected(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    other = DataDirectory(tmp_path / "other").url
    with patient(on_demand, idle_timeout=0.2) as state:
        assert state.counter("c").increment() == 1
        first = holder(data_dir)
        with patient(other, idle_timeout=0.4) as shorter:
            shorter.counter("c").increment()
        eventually(lambda: not managers_of(tmp_path / "other"), "the end of an unused manager")
        assert holder(data_dir) == first
        assert state.counter("c").increment() == 2


def test_a_volatile_manager_does_not_end_by_itself(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    other = DataDirectory(tmp_path / "other").url
    with patient(on_demand, idle_timeout=0.2, durability="none") as state:
        assert state.counter("c").increment() == 1
    with patient(other, idle_timeout=0.4) as shorter:
        shorter.counter("c").increment()
    eventually(lambda: not managers_of(tmp_path / "other"), "the end of a durable manager")
    with patient(on_demand) as state:
        assert state.counter("c").increment() == 2


def test_the_next_call_replaces_a_killed_manager(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as state:
        for expected in (1, 2, 3):
            assert state.counter("c").increment() == expected
            end_manager(data_dir / "manager.lock")


def test_a_manager_is_started_with_the_requested_durability(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand, durability="none") as state:
        assert state.counter("c").increment() == 1
    assert not (data_dir / "journal.sqlite3").exists()


def test_the_reason_for_a_failed_start_is_one_line(on_demand: str, data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700)
    (data_dir / "journal.sqlite3").write_text("this is not a journal, and longer than a header of SQLite" * 100)
    with patient(on_demand) as state, pytest.raises(StartupError, match=r"journal\.sqlite3 cannot be used") as error:
        state.counter("c").increment()
    assert error.value.outcome == "not_applied"
    assert "\n" not in str(error.value)
    assert managers_of(data_dir) == []


def test_workers_of_our_server_start_no_manager(
    data_dir: Path, on_demand: str, start_server: Callable[..., Server]
) -> None:
    """Their supervisor starts the manager, and no manager of a worker may replace it."""
    server = start_server("--workers", "1")
    (manager,) = server.children("manager")
    os.kill(manager, signal.SIGKILL)
    client = Client(server.url)
    try:
        status, _ = client.request("POST", "/api/v1/counters/c/increment")
    finally:
        client.close()
    assert status == 200
    assert server.children("manager") == [holder(data_dir)]


def test_a_manager_in_the_background_returns_when_clients_can_connect(on_demand: str, data_dir: Path) -> None:
    command = [sys.executable, "-m", "counter_server", "manager", "--background", "--data-dir", str(data_dir)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"Manager ready: {on_demand}\n"
    with patient(on_demand, start=False) as state:
        assert state.counter("c").increment() == 1
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert again.stderr.startswith(
        f"Error: the manager of {data_dir} (pid {holder(data_dir)}) continues: it was started by"
    )


def test_a_directory_below_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with patient(f"manager://{tmp_path}/file/data") as state, pytest.raises(StartupError, match="Not a directory"):
        state.counter("c").increment()


@pytest.mark.parametrize(
    "wrong",
    [
        {"COUNTER_SERVER_DURABILITY": "perhaps"},
        {"COUNTER_SERVER_IDLE_TIMEOUT": 0},
        {"COUNTER_SERVER_IDLE_TIMEOUT": "soon"},
        {"COUNTER_SERVER_IDLE_TIMEOUT": float("inf")},
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_at_once(wrong: dict[str, object]) -> None:
    from flask import Flask

    app = Flask(__name__)
    app.config.update(wrong)
    with pytest.raises(InvalidRequest):
        SharedState(app)


# Real launchers


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_lines_in_an_app_count_100_simultaneous_clients_under(
    on_demand: str, data_dir: Path, tmp_path: Path, stack: ExitStack, launcher: str
) -> None:
    """Without a service or configuration: the data is in the app's instance folder."""
    (tmp_path / "app.py").write_text(APP)
    program, url = launch(stack, launcher, tmp_path)
    values = [content["value"] for content in at_once(100, lambda: visit(url))]
    assert sorted(values) == list(range(1, 101)), program.errors
    assert holder(tmp_path / "instance" / "counter-server") is not None
    program.stop()


def test_two_apps_in_different_directories_do_not_see_each_other(on_demand: str, tmp_path: Path) -> None:
    from flask import Flask

    shared = SharedState()
    answers = []
    for name in ("one", "two"):
        app = Flask(name, instance_path=str(tmp_path / name))
        app.config["COUNTER_SERVER_DEADLINE"] = PATIENCE
        shared.init_app(app)
        with app.app_context():
            answers.append(shared.counter("c").increment())
            shared.state.close()
    assert answers == [1, 1]


def test_a_manager_by_hand_and_one_on_demand_are_the_same_to_a_client(start_manager: Callable[..., Manager]) -> None:
    manager = start_manager()
    with patient(manager.url) as state:
        assert state.counter("c").increment() == 1
    assert manager.running


# Managers in the place of others

PROGRAM = """
from counter_server import StoreOptions, open_state
with open_state({url!r}, deadline=30, options=StoreOptions(idle_timeout=30)) as state:
    while True:
        print(state.counter("c").increment(), flush=True)
"""


def test_one_on_demand_makes_way_for_a_supervised_one(
    on_demand: str, data_dir: Path, stack: ExitStack, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    """A program that starts managers on demand counts on, through restarts of the server and kills of its manager."""
    (tmp_path / "program.py").write_text(PROGRAM.format(url=on_demand))
    program = stack.enter_context(Program(tmp_path / "program.py"))
    program.expect("1")

    def serves(server: Server) -> bool:
        return server.children("manager") == [holder(data_dir)]

    for _ in range(5):
        server = start_server("--workers", "1")
        assert serves(server)
        seen = len(program.output)
        eventually(lambda: len(program.output) > seen, "a number of the server's manager")
        server.stop()
        eventually(lambda: holder(data_dir) or not program.running, "a manager on demand")
    server = start_server("--workers", "1")
    for _ in range(3):
        (manager,) = server.children("manager")
        os.kill(manager, signal.SIGKILL)
        eventually(lambda: holder(data_dir) != manager and serves(server), "another manager of the server's")
    assert program.running, program.errors
    program.kill()
    program.wait()
    assert [int(line) for line in program.output] == list(range(1, len(program.output) + 1))


def test_a_server_says_whose_manager_is_in_its_place(
    data_dir: Path, stack: ExitStack, start_manager: Callable[..., Manager]
) -> None:
    manager = start_manager()
    command = ("run.py", "--port", "0", "--workers", "1", "--data-dir", data_dir)
    refused = stack.enter_context(Program(*command))
    assert refused.wait() == 1
    assert f"pid {manager.pid}" in refused.errors[0]
    assert "started by hand: 'counter-server run --attach'" in refused.errors[0]
    attached = stack.enter_context(Program(*command, "--attach"))
    assert visit(attached.expect("Serving on "), "/readyz")
    assert holder(data_dir) == manager.pid
    attached.stop()
    assert manager.running


def stop(data_dir: Path, *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-m", "counter_server", "stop", "--data-dir", str(data_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)


@pytest.mark.parametrize("inside", ["nobody", "manager", "stop"])
def test_stop_ends_the_manager_from_any_pid_namespace(
    data_dir: Path, stack: ExitStack, start_manager: Callable[..., Manager], inside: str
) -> None:
    if inside != "nobody" and os.geteuid() != 0:
        pytest.skip("only root can make a pid namespace")
    namespace = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if inside == "manager":
        command = (*namespace[1:], sys.executable, "manager_process.py", "--data-dir", data_dir)
        manager = stack.enter_context(Program(*command, program=namespace[0]))
        manager.expect("Manager ready:")
    else:
        manager = start_manager()
    shown = {"nobody": f"The manager (pid {manager.pid})", "manager": "The manager (pid ", "stop": "The manager"}[
        inside
    ]
    told = stop(data_dir, *(namespace if inside == "stop" else ()))
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(shown)
    assert told.stdout.endswith(" has ended.\n")
    assert manager.wait() == 0


def test_stop_names_what_it_cannot_end(
    data_dir: Path, start_manager: Callable[..., Manager], start_server: Callable[..., Server]
) -> None:
    manager = start_manager()
    with frozen(manager.pid):
        told = stop(data_dir)
        assert told.returncode == 1
        assert f"(pid {manager.pid}) was asked to end and has not: the manager did not answer" in told.stderr
    assert manager.running
    assert manager.stop() == 0
    server = start_server("--workers", "1")
    told = stop(data_dir)
    assert told.returncode == 1
    assert f"it runs under a supervisor (pid {server.pid}" in told.stderr
    server.stop()
    assert stop(data_dir).stderr == f"Error: no manager is running in {data_dir}\n"


# Imports of a manager


def run_app(program: str, cwd: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", program],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


COUNT = """
from counter_server import StoreOptions, open_state
print(open_state({url!r}, deadline=30, options=StoreOptions(idle_timeout=30)).counter("c").increment())
"""
CHANGED = (
    "import os, sys; from counter_server import StoreOptions, open_state; os.chdir({place!r}); sys.path[:] = {path!r}\n"
)


@pytest.mark.parametrize("variable", [None, "", ":", "."], ids=["no PYTHONPATH", "empty", "two empty", "relative"])
def test_a_manager_runs_nothing_from_the_working_directory(
    on_demand: str, tmp_path: Path, variable: str | None
) -> None:
    """Another user can write there, and the app that starts the manager does not import from there."""
    place = tmp_path / "place"
    place.mkdir(mode=0o777)
    for name in ("click", "pathlib", "json", "encodings", "sitecustomize", "usercustomize", "runpy", "multiprocessing"):
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')")
    path = [entry for entry in sys.path if entry and Path(entry) != place]
    environment = {} if variable is None else {"PYTHONPATH": variable}
    program = CHANGED.format(place=str(place), path=path) + COUNT.format(url=on_demand)
    result = run_app(program, ROOT, **environment)
    assert (result.stdout, result.stderr) == ("1\n", "")
    assert not (tmp_path / "ran").exists()


def test_a_manager_imports_what_its_starter_could_in_the_same_order(
    on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    """Packages in several directories, one of them with a backport of a standard module and a name that is not UTF-8;
    a relative entry; the interpreter's flags; and a variable for what the objects' methods start."""
    first, second = tmp_path / "first", Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n:"))
    for number, place in enumerate((first, second)):
        place.mkdir()
        (place / f"part{number}.py").write_text("")
    (second / "pathlib.py").write_text("raise ImportError('a backport')")
    (second / "hosted.py").write_text(
        "import os, sys, part0, part1\n"
        "class Seen:\n"
        "    def path(self): return [os.fsencode(entry) for entry in sys.path]\n"
        "    def flags(self): return [sys.flags.optimize, sys.warnoptions, os.environ.get('PYTHONPATH')]\n"
    )
    program = (
        f"import os, sys\nsys.path += ['first', {str(second)!r}, '__editable__.hook']\n"
        "sys.path += [f'/there/is/no/{number:0200}' for number in range(1000)]\n"
        "import hosted\nfrom counter_server import StoreOptions, open_state\n"
        f"state = open_state({on_demand!r}, deadline=30, options=StoreOptions(idle_timeout=30))\n"
        "seen = state.object('seen', hosted.Seen)\n"
        "mine = [os.fsencode(os.path.abspath(e) if e in ('', 'first') else e) for e in sys.path]\n"
        "print(seen.path() == mine, seen.flags())\n"
    )
    result = run_app(program, tmp_path, "-O", "-W", "ignore::ResourceWarning", PYTHONPATH=str(ROOT))
    assert (result.stdout, result.stderr) == (f"True [1, ['ignore::ResourceWarning'], {str(ROOT)!r}]\n", "")


# Children of a fork

FORKS = """
import os, subprocess, time
class Forks:
    calls = 0
    def stray(self):
        self.calls += 1
        return [self.calls, os.fork()]
    def fork(self):
        if pid := os.fork():
            return pid
        try:
            time.sleep(60)
        finally:
            os._exit(0)
    def run(self):
        return subprocess.Popen(["sleep", "60"]).pid
"""


def opened_by(pid: int) -> set[str]:
    """Return the names of a process's open files, except the standard streams."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(os.readlink(link) if int(link.name) > 2 else os.devnull)
    return found - {os.devnull}


@pytest.mark.parametrize("method", ["fork", "run"])
def test_a_child_of_a_method_holds_nothing_of_its_manager(
    on_demand: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack, method: str
) -> None:
    (tmp_path / "forks.py").write_text(FORKS)
    monkeypatch.syspath_prepend(tmp_path)
    stack.callback(sys.modules.pop, "forks")
    cls = importlib.import_module("forks").Forks
    with patient(on_demand) as state:
        forks = state.object("forks", cls)
        assert state.counter("c").increment() == 1
        child = getattr(forks, method)()
        stack.callback(os.kill, child, signal.SIGKILL)
        eventually(lambda: not opened_by(child), "closed descriptors")
        end_manager(data_dir / "manager.lock")
        began = time.monotonic()
        assert state.counter("c").increment() == 2
        assert time.monotonic() - began < PATIENCE / 3
    assert Path(f"/proc/{child}").exists()


def test_a_child_that_returns_from_a_method_changes_nothing(
    on_demand: str, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """The copy of the manager's thread goes on, but it has no journal to write to and no client to answer."""
    (tmp_path / "forks.py").write_text(FORKS)
    monkeypatch.syspath_prepend(tmp_path)
    stack.callback(sys.modules.pop, "forks")
    with patient(on_demand) as state:
        forks = state.object("forks", importlib.import_module("forks").Forks, durable=True)
        for expected in (1, 2, 3):
            calls, child = forks.stray()
            assert (calls, bool(child)) == (expected, True)
            eventually(lambda child=child: has_ended(child), "the end of the child")  # type: ignore[misc]
            assert state.counter("c").increment() == expected
        end_manager(data_dir / "manager.lock")
        assert (forks.stray()[0], state.counter("c").increment()) == (4, 4)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_fork_while_a_manager_is_started_holds_nothing_of_that(
    on_demand: str, data_dir: Path, stack: ExitStack
) -> None:
    """Fork all through the start of the manager, with children that stay."""
    is_over = threading.Event()
    forked: list[int] = []

    def fork() -> None:
        while not is_over.is_set():
            if (child := os.fork()) == 0:
                signal.pause()
            forked.append(child)
            is_over.wait(0.005)

    forking = threading.Thread(target=fork)
    try:
        with patient(on_demand) as state:
            forking.start()
            assert state.counter("c").increment() == 1
            is_over.set()
            forking.join()
            for child in forked:
                here = str(data_dir)
                eventually(lambda c=child: not [n for n in opened_by(c) if n.startswith(here)], "closed descriptors")  # type: ignore[misc]
            end_manager(data_dir / "manager.lock")
            assert state.counter("c").increment() == 2
    finally:
        is_over.set()
        forking.join()
        for child in forked:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
