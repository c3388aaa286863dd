"""A manager on demand: two lines in any app are enough, whatever launches it."""

import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from flask import Flask

from counter_server import State, StoreOptions, open_state
from counter_server.errors import DeadlineExceeded, InvalidRequest, StartupError
from counter_server.extension import SharedState
from counter_server.manager.directory import DataDirectory
from counter_server.session import Session
from counter_server.settings import Durability
from tests.hosted_classes import Slow, SomeObj
from tests.launchers import LAUNCHERS, launch
from tests.load import at_once, impatient, visit
from tests.processes import PATIENCE, ROOT, Manager, Program, Server, end_manager, eventually, frozen, holder
from tests.test_server import increment

slow = pytest.mark.slow

APP = """
from flask import Flask
from counter_server import SharedState

class SomeObj:
    def __init__(self, param):
        self.param = param
    def query(self):
        self.param += 1
        return self.param

app = Flask(__name__)
app.config["COUNTER_SERVER_DEADLINE"] = 30
shared = SharedState(app)
global_obj = shared.object("global_obj", SomeObj, 0)

@app.get("/")
def home():
    return {"counter": shared.counter("visits").increment(), "object": global_obj.query()}

if __name__ == "__main__":
    import waitress
    waitress.serve(app, listen="127.0.0.1:0", threads=8, _quiet=False)
"""


def patient(url: str, **options: Any) -> State:
    return open_state(url, deadline=PATIENCE, options=StoreOptions(**options))


def run(*command: str, status: int = 0, cwd: Path = ROOT, **environment: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE, start_new_session=True
    )
    assert done.returncode == status, done.stderr
    return done


def call_before_the_next_start(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Make a call just before another client, which has found that a manager has to be started, may start it."""
    starting = DataDirectory.starting

    def late(directory: DataDirectory, seconds: float = 0.0) -> AbstractContextManager[int | None]:
        monkeypatch.setattr(DataDirectory, "starting", starting)
        call()
        return starting(directory, seconds)

    monkeypatch.setattr(DataDirectory, "starting", late)


def starts_of(state: State) -> int:
    status = state.status()
    assert status is not None
    return status.starts


def test_a_client_that_comes_late_to_a_start_starts_no_other_manager(
    on_demand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with patient(on_demand) as first, patient(on_demand) as late:
        call_before_the_next_start(monkeypatch, first.counter("c").increment)
        assert (late.counter("c").increment(), starts_of(late)) == (2, 1)
        obj, again = first.object("obj", SomeObj, 0), late.object("obj", SomeObj, 0)  # which that manager lacks
        call_before_the_next_start(monkeypatch, obj.query)
        assert (again.query(), starts_of(late)) == (2, 2)


@pytest.mark.slow
def test_a_manager_that_another_program_started_meanwhile_is_succeeded_if_it_lacks_the_object(
    on_demand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from counter_server import open_state; from tests.hosted_classes import SomeObj;"
        f"print(open_state({on_demand!r}, deadline={PATIENCE}).object('theirs', SomeObj, 0).query())"
    )
    with patient(on_demand) as state:
        assert state.counter("c").increment() == 1
        obj = state.object("ours", SomeObj, 0)
        call_before_the_next_start(monkeypatch, lambda: run(sys.executable, "-c", code))
        assert (obj.query(), starts_of(state)) == (1, 3)
        assert run(sys.executable, "-c", code).stdout == "2\n"
        assert starts_of(state) == 3


def counter_server(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "counter_server", *arguments]


def managers_of(data_dir: Path) -> list[int]:
    """Return the pids of all manager processes of a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"manager\x00" in command and os.fsencode(data_dir) in command:
                found.append(int(entry.name))
    return found


def test_the_first_use_starts_a_manager_that_all_share(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as one, patient(on_demand) as other:
        assert not data_dir.exists()  # opening is not using
        assert [one.counter("c").increment(), other.counter("c").increment()] == [1, 2]
    assert holder(data_dir) is not None


@slow
def test_racing_starters_get_one_manager(on_demand: str, data_dir: Path) -> None:
    turns = iter(range(23))

    def increment() -> int:
        if next(turns) < 2:
            return int(run(*counter_server("increment", "c", "--store", on_demand)).stdout)
        with patient(on_demand) as state:
            return state.counter("c").increment()

    assert sorted(at_once(23, increment)) == list(range(1, 24))
    assert managers_of(data_dir) == [holder(data_dir)]


@slow
def test_a_manager_outlives_its_starter_and_its_session(on_demand: str, data_dir: Path) -> None:
    for expected in ("1\n", "2\n"):
        done = run(*counter_server("increment", "c", "--store", on_demand))
        assert (done.stdout, done.stderr) == (expected, "")
    manager = holder(data_dir)
    assert manager is not None
    assert os.getsid(manager) != os.getsid(0)  # no signal of our terminal reaches it
    process = Path(f"/proc/{manager}")
    assert int((process / "stat").read_text().rpartition(")")[2].split()[1]) != os.getpid()  # never our zombie
    assert (os.readlink(process / "cwd"), os.readlink(process / "fd/2")) == ("/", str(data_dir / "manager.log"))


@slow
def test_an_idle_manager_ends_and_the_next_one_counts_on(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    """A manager is idle without clients, and ends then unless its counters are in memory alone."""
    other, volatile = (DataDirectory(tmp_path / name).url for name in ("other", "volatile"))
    with patient(volatile, idle_timeout=0.2, durability="none") as state:
        assert state.counter("c").increment() == 1
    with patient(on_demand, idle_timeout=0.2) as state:
        assert state.counter("c").increment() == 1
        first = holder(data_dir)
        with patient(other, idle_timeout=0.4) as shorter:
            shorter.counter("c").increment()
        eventually(lambda: not managers_of(tmp_path / "other"), "the end of an unused manager")
        assert (holder(data_dir), state.counter("c").increment()) == (first, 2)
    eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
    assert not (data_dir / "manager.sock").exists()
    assert (data_dir / "manager.log").read_text() == ""
    for url, expected in ((volatile, 2), (on_demand, 3)):
        with patient(url) as state:
            assert state.counter("c").increment() == expected


@slow
@pytest.mark.parametrize("method", ["compute", "wait_for"])
def test_a_method_that_never_returns_holds_up_nothing_else(
    on_demand: str, data_dir: Path, tmp_path: Path, method: str
) -> None:
    """Neither the counters, nor another program, nor the end of the manager, which is idle without its clients."""

    def call_it() -> None:
        with patient(on_demand) as hasty:
            handle: Any = hasty.object("slow", Slow)
            # One that computes has the interpreter for 0.1 ms at a time. Python's default delays a counter by 5 ms.
            assert handle.switch_interval() == pytest.approx(0.0001)
            with impatient(hasty, 1), pytest.raises(DeadlineExceeded) as error:
                getattr(handle, method)(*([] if method == "compute" else [str(tmp_path / "never")]))
        assert error.value.outcome == "unknown"

    with patient(on_demand, idle_timeout=1) as state:
        state.object("slow", Slow).switch_interval()
        call_it()
        assert [state.counter("c").increment() for _ in range(30)] == list(range(1, 31))
    eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
    call_it()
    with patient(on_demand) as other:
        assert (other.object("obj", SomeObj, 0).query(), other.counter("c").increment()) == (1, 31)


def test_the_reason_for_a_failed_start_is_one_line(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    data_dir.mkdir(mode=0o700)
    (data_dir / "journal.sqlite3").write_text("this is not a journal, and longer than a header of SQLite" * 100)
    (tmp_path / "file").touch()
    reasons = {on_demand: r"journal\.sqlite3 cannot be used", f"manager://{tmp_path}/file/data": "Not a directory"}
    for url, reason in reasons.items():
        with patient(url) as state, pytest.raises(StartupError, match=reason) as error:
            state.counter("c").increment()
        assert (error.value.outcome, str(error.value).count("\n")) == ("not_applied", 0)
    eventually(lambda: managers_of(data_dir) == [], "the end of the manager")


@slow
def test_a_manager_in_the_background_returns_when_clients_can_connect(on_demand: str, data_dir: Path) -> None:
    command = counter_server("manager", "--background", "--data-dir", str(data_dir))
    assert run(*command).stdout == f"Manager ready: {on_demand}\n"
    with patient(on_demand, start=False) as state:
        assert state.counter("c").increment() == 1
    again = run(*command, status=75)
    assert f"the manager of {data_dir} (pid {holder(data_dir)}) continues: it was started by" in again.stderr


def test_an_impossible_setting_is_refused_at_once() -> None:
    for name, value in (("DURABILITY", "perhaps"), *(("IDLE_TIMEOUT", each) for each in (0, "soon", float("inf")))):
        app = Flask(__name__)
        app.config[f"COUNTER_SERVER_{name}"] = value
        with pytest.raises(InvalidRequest):
            SharedState(app)


# Real launchers


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=slow if number else ()) for number, name in enumerate(LAUNCHERS)]
)
def test_two_lines_in_an_app_count_100_simultaneous_clients_under(
    on_demand: str, tmp_path: Path, stack: ExitStack, launcher: str
) -> None:
    """With an object of a class in the app's own module, too. The data is in the app's instance folder."""
    (tmp_path / "app.py").write_text(APP)
    program, url = launch(stack, launcher, tmp_path)
    answers = at_once(100, lambda: visit(url))
    for kind in ("counter", "object"):
        assert sorted(answer[kind] for answer in answers) == list(range(1, 101)), program.errors
    assert holder(tmp_path / "instance" / "counter-server") is not None
    program.stop()


@slow
def test_an_app_is_hosted_by_hand_or_named(stack: ExitStack, tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "app.py").write_text(APP.replace("shared = ", 'app.config["COUNTER_SERVER_START"] = False\nshared = '))
    environment: dict[str, Any] = {"PYTHONPATH": str(ROOT), "COUNTER_SERVER_DATA_DIR": str(data_dir)}
    command = ("-m", "counter_server", "manager", "--hosting")
    reasons = {
        "json": "Failed to find Flask application",
        "counter_server.server.web": "declares no shared objects for",
    }
    for module, reason in reasons.items():
        (line,) = run(sys.executable, *command, module, "--data-dir", str(tmp_path), status=1).stderr.splitlines()
        assert line.startswith("Error: ")
        assert reason in line
    stack.enter_context(Program(*command, "app", cwd=tmp_path, environment=environment)).expect("Manager ready:")
    script = "from app import app, global_obj\nwith app.app_context(): print(global_obj.query())"
    assert run(sys.executable, "-c", script, cwd=tmp_path, **environment).stdout == "1\n"


# Managers in the place of others

PROGRAM = """
from counter_server import StoreOptions, open_state
with open_state({url!r}, deadline=30, options=StoreOptions(idle_timeout=30)) as state:
    while True:
        print(state.counter("c").increment(), flush=True)
"""


@slow
def test_one_on_demand_makes_way_for_a_supervised_one(
    on_demand: str, data_dir: Path, stack: ExitStack, start_server: Callable[..., Server]
) -> None:
    """A program that starts managers on demand counts on, through restarts of the server and kills of its manager."""
    program = stack.enter_context(Program("-c", PROGRAM.format(url=on_demand)))
    program.expect("1")

    def serves(server: Server) -> bool:
        return server.children("manager") == [holder(data_dir)]

    server = start_server("--workers", "1")
    eventually(lambda: serves(server), "the server's manager")
    seen = len(program.output)
    eventually(lambda: len(program.output) > seen, "a number of the server's manager")
    manager = holder(data_dir)
    end_manager(data_dir / "manager.lock")
    eventually(lambda: holder(data_dir) != manager and serves(server), "another manager of the server's")
    os.kill(server.children("manager")[0], signal.SIGKILL)
    assert increment(server.url) == 1
    eventually(lambda: serves(server), "the server's manager again")  # it may be the program's for a moment
    server.stop()
    seen = len(program.output)
    eventually(lambda: len(program.output) > seen and holder(data_dir), "a number of a manager on demand")
    assert program.running, program.errors
    program.kill()
    program.wait()
    assert [int(line) for line in program.output] == list(range(1, len(program.output) + 1))


@slow
def test_a_server_may_attach_to_the_manager_in_its_place(
    data_dir: Path, stack: ExitStack, start_manager: Callable[..., Manager]
) -> None:
    manager = start_manager()
    command = ("run.py", "--attach", "--port", "0", "--workers", "1", "--data-dir", data_dir)
    attached = stack.enter_context(Program(*command))
    assert visit(attached.expect("Serving on "), "/readyz")
    attached.stop()
    assert (holder(data_dir), manager.running) == (manager.pid, True)


NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@slow
@pytest.mark.parametrize(("inside", "shown"), [("nobody", " (pid {pid})"), ("manager", " (pid "), ("stop", "")])
def test_stop_ends_the_manager_from_any_pid_namespace(
    data_dir: Path, stack: ExitStack, inside: str, shown: str
) -> None:
    if inside != "nobody" and os.geteuid() != 0:
        pytest.skip("only root can make a pid namespace")
    command = [sys.executable, "manager_process.py", "--data-dir", str(data_dir)]
    first, *others = [*(NAMESPACE if inside == "manager" else []), *command]
    manager = stack.enter_context(Program(*others, program=first))
    manager.expect("Manager ready:")
    told = run(*(NAMESPACE if inside == "stop" else []), *counter_server("stop", "--data-dir", str(data_dir)))
    assert told.stdout.startswith(f"The manager{shown.format(pid=manager.pid)}")
    assert told.stdout.endswith(" has ended.\n")
    assert (told.stderr, manager.wait()) == ("", 0)


@slow
def test_stop_names_what_it_cannot_end(
    data_dir: Path, start_manager: Callable[..., Manager], start_server: Callable[..., Server]
) -> None:
    stop = counter_server("stop", "--data-dir", str(data_dir))
    manager = start_manager()
    with frozen(manager.pid):
        told = run(*stop, status=1)
        assert f"(pid {manager.pid}) was asked to end and has not: the manager did not answer" in told.stderr
    assert manager.stop() == 0
    server = start_server("--workers", "1")
    assert f"it runs under a supervisor (pid {server.pid}" in run(*stop, status=1).stderr
    server.stop()
    assert run(*stop, status=1).stderr == f"Error: no manager is running in {data_dir}\n"


# Imports of a manager


COUNT = """
import os, sys
from counter_server import StoreOptions, open_state
os.chdir({place!r})
sys.path[:] = {path!r}
print(open_state({url!r}, deadline=30, options=StoreOptions(idle_timeout=30)).counter("c").increment())
"""


@slow
@pytest.mark.parametrize("variable", ["", ":."])
def test_a_manager_runs_nothing_from_the_working_directory(on_demand: str, tmp_path: Path, variable: str) -> None:
    """Another user can write there, and the app that starts the manager does not import from there."""
    place = tmp_path / "place"
    place.mkdir(mode=0o777)
    for name in ("click", "pathlib", "json", "encodings", "sitecustomize", "usercustomize", "runpy", "multiprocessing"):
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')")
    path = [entry for entry in sys.path if entry and Path(entry) != place]
    result = run(sys.executable, "-c", COUNT.format(place=str(place), path=path, url=on_demand), PYTHONPATH=variable)
    assert (result.stdout, result.stderr) == ("1\n", "")
    assert not (tmp_path / "ran").exists()


HOSTED = """
import os, sys, part0, part1
class Seen:
    def path(self): return [os.fsencode(entry) for entry in sys.path]
    def flags(self): return [sys.flags.optimize, sys.warnoptions, os.environ.get('PYTHONPATH')]
"""
SEES = """
import os, sys
sys.path += ["first", {second!r}, "__editable__.hook"]
sys.path += [f"/there/is/no/{{number:0200}}" for number in range(1000)]
import hosted
from counter_server import StoreOptions, open_state
state = open_state({url!r}, deadline=30, options=StoreOptions(idle_timeout=30))
seen = state.object("seen", hosted.Seen)
print(seen.path() == [os.fsencode(os.path.abspath(e) if e in ("", "first") else e) for e in sys.path], seen.flags())
"""


@slow
def test_a_manager_imports_what_its_starter_could_in_the_same_order(on_demand: str, tmp_path: Path) -> None:
    """Packages in several directories, one of them with a backport of a standard module and a name that is not UTF-8;
    a relative entry; the interpreter's flags; and a variable for what the objects' methods start."""
    first, second = tmp_path / "first", Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n:"))
    for number, place in enumerate((first, second)):
        place.mkdir()
        (place / f"part{number}.py").write_text("")
    (second / "pathlib.py").write_text("raise ImportError('a backport')")
    (second / "hosted.py").write_text(HOSTED)
    program = SEES.format(second=str(second), url=on_demand)
    command = (sys.executable, "-O", "-W", "ignore::ResourceWarning", "-c", program)
    result = run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
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


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@slow
def test_a_child_of_a_method_leaves_its_manager_alone(
    on_demand: str, data_dir: Path, tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that returns goes on with the manager's thread, but has no journal to write and no client to answer."""
    (tmp_path / "forks.py").write_text(FORKS)
    monkeypatch.syspath_prepend(tmp_path)
    with patient(on_demand) as state:
        handle: Any = state.object("forks", importlib.import_module("forks").Forks, durable=True)
        for expected in (1, 2, 3):
            calls, child = handle.stray()
            assert (calls, bool(child)) == (expected, True)
            eventually(lambda: has_ended(child), "the end of the child")
            assert state.counter("c").increment() == expected
        children = [handle.fork(), handle.run()]
        for child in children:
            stack.callback(os.kill, child, signal.SIGKILL)
            eventually(lambda: not opened_by(child), "closed descriptors")
        end_manager(data_dir / "manager.lock")
        assert (handle.stray()[0], state.counter("c").increment()) == (4, 4)  # no child holds the lock or the journal
    assert not any(has_ended(child) for child in children)


@slow
def test_a_fork_while_a_manager_is_started_holds_nothing_of_that(on_demand: str, data_dir: Path) -> None:
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
                eventually(lambda: not [n for n in opened_by(child) if n.startswith(here)], "closed descriptors")
            end_manager(data_dir / "manager.lock")
            assert state.counter("c").increment() == 2
    finally:
        is_over.set()
        forking.join()
        for child in forked:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("durability", ["none", "commit"])
def test_threads_wait_for_each_other_only_where_a_call_is_a_commit(on_demand: str, durability: Durability) -> None:
    """Then it is a long one: see `Combiner`."""
    commits = durability == "commit"
    with patient(on_demand, durability=durability) as state:
        state.object("passing", SomeObj, 0, durable=False).query()
        state.counter("c").increment()
        is_long = {"passing": False}
        if commits:
            state.object("lasting", SomeObj, 0).query()
            is_long["lasting"] = True
        sessions = cast(dict[str, Session], state._client.objects)
        assert {name: session._combiner.together for name, session in sessions.items()} == is_long
        assert state._client.counters._combiner.together == commits
