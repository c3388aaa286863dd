"""What managers host: the modules of apps, imported beside them, in the newest version, with nothing lost between."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
import zipapp
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from counter_server import errors, in_manager
from counter_server.manager import snapshot
from counter_server.manager.client import end_manager as stop_manager
from counter_server.manager.directory import DataDirectory
from counter_server.manager.hosting import Sources
from counter_server.state import State
from tests.hosted_classes import Gated, OneWay, Refusing, SomeObj
from tests.load import impatient
from tests.processes import PATIENCE, Program, end_manager, eventually, holder
from tests.test_on_demand import managers_of, patient

HEAD = """
import os, sys
from counter_server import in_manager, open_state
"""
CLASS = """
class Obj:
    def __init__(self):
        self.number = 0
    def query(self):
        self.number += 1
        return self.number
    def where(self):
        return os.getcwd()
    def write(self, name):
        with open(name, "w") as file:
            file.write("written")

state = open_state(sys.argv[1], deadline=30)
obj = state.object("obj", Obj)
"""
SHOWN = "if __name__ == '__main__':\n    print(obj.query())\n"


@pytest.fixture
def script(on_demand: str, tmp_path: Path) -> Callable[..., str]:
    """Write a program into a directory of its own and run it: return what it prints."""

    def run(text: str, name: str = "script.py", *options: str) -> str:
        place = tmp_path / "program" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        with Program(*options, place, on_demand, cwd=place.parent) as program:
            program.wait()
            return "\n".join(program.output + program.errors)

    return run


# What is handed over


def test_an_idle_manager_keeps_what_is_not_durable_for_the_next_one_once(on_demand: str, data_dir: Path) -> None:
    kept = DataDirectory(data_dir).snapshot
    with patient(on_demand, idle_timeout=0.2) as state:
        obj, lost = state.object("obj", SomeObj, 0, durable=False), state.object("lost", OneWay, durable=False)
        entries = state.dict("entries", ttl=3600)
        entries["key"] = 1
        lost.query()
        assert obj.query() == 1
        state.close()
        eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
        assert kept.stat().st_mode & 0o777 == 0o600
        assert (obj.query(), entries["key"], kept.exists()) == (2, 1, False)
        with pytest.raises(errors.StateLost, match="object:lost begins again"):  # its pickle cannot be loaded
            lost.query()
        lost.query()
        end_manager(data_dir / "manager.lock")  # in no order
        with pytest.raises(errors.StateLost):
            obj.query()
        assert (obj.query(), kept.exists()) == (1, False)
    assert (
        "lost begins again: the shared object lost = tests.hosted_classes.OneWay"
        in (data_dir / "manager.log").read_text()
    )


def test_an_object_that_nobody_asks_for_is_kept_until_somebody_does(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand, idle_timeout=0.2) as state:
        state.object("obj", SomeObj, 0, durable=False).query()
    for number in (1, 2):
        eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
        with patient(on_demand, idle_timeout=0.2) as other:
            assert other.counter("c").increment() == number
    eventually(lambda: not managers_of(data_dir), "the end of the idle manager")
    with patient(on_demand) as state:
        assert state.object("obj", SomeObj, 0, durable=False).query() == 2


def test_a_snapshot_is_used_once_and_only_whole(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = DataDirectory(data_dir)
    directory.make()
    assert snapshot.read(directory) == {}
    objects = {"obj": snapshot.Kept("epoch", b"state", {})}
    snapshot.write(directory, objects)
    assert (snapshot.read(directory), snapshot.read(directory)) == (objects, objects)
    snapshot.remove(directory)
    assert snapshot.read(directory) == {}
    directory.snapshot.write_bytes(b"damaged")
    assert snapshot.read(directory) == {}
    assert "not durable begin again" in caplog.text


def test_a_snapshot_that_cannot_be_removed_is_not_used(data_dir: Path) -> None:
    directory = DataDirectory(data_dir)
    directory.make()
    directory.snapshot.mkdir()
    with pytest.raises(errors.StartupError, match=r"manager.snapshot cannot be removed"):
        snapshot.remove(directory)


def test_a_snapshot_of_another_boot_is_not_used(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = DataDirectory(data_dir)
    directory.make()
    snapshot.write(directory, {"obj": snapshot.Kept("epoch", b"state", {})})
    (data_dir / "boot").write_text("another")
    monkeypatch.setattr("counter_server.manager.directory._BOOT", data_dir / "boot")
    assert snapshot.read(directory) == {}


def test_where_the_kernel_hides_its_boot_a_manager_starts_and_says_what_is_not_kept(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`ProcSubset=pid` of systemd hides all of /proc but processes."""
    directory = DataDirectory(data_dir)
    directory.make()
    with directory.hold():  # by a process that knows it
        monkeypatch.setattr("counter_server.manager.directory._BOOT", data_dir / "hidden")
        assert directory.is_held()
    with directory.hold():
        snapshot.write(directory, {"obj": snapshot.Kept("epoch", b"state", {})})
    assert snapshot.read(directory) == {}
    assert "whether the machine has restarted is not known" in caplog.text


def test_a_manager_without_room_for_a_snapshot_says_what_is_lost(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot.write(DataDirectory(data_dir), {"obj": snapshot.Kept("epoch", b"state", {})})  # no directory
    assert "not durable are lost" in caplog.text


# When a manager ends


def test_after_sigterm_a_manager_serves_its_clients_and_ends_without_them(on_demand: str, data_dir: Path) -> None:
    """When a service is stopped, all its processes are signalled at once, and workers still finish requests."""
    with patient(on_demand) as state:
        assert state.counter("c").increment() == 1
        manager = holder(data_dir)
        assert manager is not None
        os.kill(manager, signal.SIGTERM)
        eventually(lambda: "SigQ" in Path(f"/proc/{manager}/status").read_text(), "the signal")
        with patient(on_demand) as late:
            assert (late.counter("c").increment(), state.counter("c").increment()) == (2, 3)
        assert holder(data_dir) == manager
    eventually(lambda: not managers_of(data_dir), "the end of the manager")
    with patient(on_demand) as state:
        assert state.counter("c").increment() == 4
        manager = holder(data_dir)
        assert manager is not None
        while holder(data_dir) == manager:  # a second signal ends it at once
            os.kill(manager, signal.SIGTERM)
            time.sleep(0.05)
        assert state.counter("c").increment() == 5


@pytest.fixture
def gates(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that closes a gate of the class `Gated`. Without its file, the gate is open."""

    def close(name: str) -> Path:
        gate = tmp_path / f"gated.{name}"
        gate.touch()
        return gate

    return close


def waits(gate: Path) -> None:
    eventually(gate.with_name(f"{gate.name}.waits").exists, f"somebody at {gate}")


@pytest.mark.slow
def test_no_signal_interrupts_the_end_of_a_manager(
    on_demand: str, data_dir: Path, tmp_path: Path, gates: Callable[[str], Path]
) -> None:
    with patient(on_demand) as state:
        obj = state.object("obj", Gated, str(tmp_path / "gated"), durable=False)
        assert obj.query() == 1
        manager, gate = holder(data_dir), gates("pickling")
        assert manager is not None
        os.kill(manager, signal.SIGINT)
        waits(gate)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(manager, number)
        gate.unlink()
        assert obj.query() == 2
        assert holder(data_dir) != manager


@pytest.mark.slow
def test_a_manager_that_is_ended_while_it_starts_keeps_what_it_was_left(
    on_demand: str, data_dir: Path, tmp_path: Path, gates: Callable[[str], Path]
) -> None:
    with patient(on_demand) as state:
        obj = state.object("obj", Gated, str(tmp_path / "gated"), durable=False)
        assert obj.query() == 1
        stop_manager(DataDirectory(data_dir), PATIENCE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            gate = gates("loading")
            with impatient(state, 0.5), pytest.raises(errors.DeadlineExceeded):
                obj.query()
            waits(gate)
            manager = holder(data_dir)
            assert manager is not None
            os.kill(manager, number)
            eventually(lambda: not managers_of(data_dir), "its end")
            gate.unlink()
            gate.with_name(f"{gate.name}.waits").unlink()
        assert obj.query() == 2


@pytest.mark.slow
def test_an_object_that_is_stuck_loses_no_other_when_a_manager_ends(
    on_demand: str, data_dir: Path, tmp_path: Path, gates: Callable[[str], Path]
) -> None:
    with patient(on_demand) as state:
        busy, gated = (state.object(name, Gated, str(tmp_path / "gated"), durable=False) for name in ("busy", "gated"))
        obj = state.object("obj", SomeObj, 0, durable=False)
        assert (gated.query(), obj.query()) == (1, 1)
        method = gates("method")
        with impatient(state, 0.5), pytest.raises(errors.DeadlineExceeded):
            busy.wait()
        waits(method)
        manager, gate = holder(data_dir), gates("pickling")
        stop_manager(DataDirectory(data_dir), PATIENCE)
        gate.unlink()
        assert obj.query() == 2
        assert holder(data_dir) != manager
        with pytest.raises(errors.StateLost):
            gated.query()
    log = (data_dir / "manager.log").read_text()
    assert re.search("busy = .* is lost: a call is still busy with it", log)
    assert re.search("gated = .* is lost: it takes too long to pickle", log)


# The start


@pytest.mark.slow
def test_a_start_that_takes_long_goes_on_without_its_starter(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    (tmp_path / "slow_module.py").write_text(
        f"import pathlib, time\nfrom counter_server import in_manager\n"
        f"while in_manager() and not pathlib.Path({str(gate)!r}).exists():\n    time.sleep(0.01)\n"
        "class Obj:\n    n = 0\n    def query(self):\n        self.n += 1\n        return self.n\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        from slow_module import Obj  # type: ignore[import-not-found]

        with patient(on_demand) as state, patient(on_demand) as other:
            obj, again = state.object("obj", Obj), other.object("obj", Obj)
            for call in (obj.query, again.query, other.counter("c").increment):
                with impatient(state, 0.7), impatient(other, 0.7), pytest.raises(errors.DeadlineExceeded) as error:
                    call()
                assert error.value.outcome == "not_applied"
                assert "starting" in str(error.value)
            eventually(lambda: len(managers_of(data_dir)) == 1, "one manager")  # its process may not be there yet
            gate.touch()
            assert (again.query(), obj.query(), other.counter("c").increment()) == (1, 2, 1)
            assert len(managers_of(data_dir)) == 1
            status = state.status()
            assert status is not None
            assert status.starts == 1
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("slow_module", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "helper",
    [
        "import subprocess; subprocess.Popen([sys.executable, '-c', WATCH, str(os.getpid())])\n",
        "import multiprocessing; multiprocessing.get_context('fork').Process(target=exec, args=(FORKED,)).start()\n",
    ],
)
def test_a_process_that_the_module_starts_holds_up_no_start(script: Callable[..., str], helper: str) -> None:
    # It ends with the process that started it.
    watch = "import os, sys, time\nwhile os.getppid() == int(sys.argv[1]):\n    time.sleep(0.05)\n"
    forked = watch.replace("int(sys.argv[1])", "parent").replace("while", "parent = os.getppid()\nwhile", 1)
    texts = f"WATCH, FORKED = {watch!r}, {forked!r}\n"
    began = time.monotonic()
    assert script(HEAD + texts + "if in_manager():\n    " + helper + CLASS + SHOWN) == "1"
    assert time.monotonic() - began < PATIENCE


def test_a_manager_reports_to_the_standard_error_of_its_app_if_that_is_set(
    on_demand: str, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with patient(on_demand, log="stderr") as state:
        with pytest.raises(errors.StartupError, match="not today"):
            state.object("refusing", Refusing).anything()
        assert state.counter("c").increment() == 1
    assert "ERROR the shared object refusing" in capfd.readouterr().err
    assert not (data_dir / "manager.log").exists()


@pytest.mark.slow
def test_a_program_without_standard_streams_or_a_working_directory_starts_a_manager(
    on_demand: str, tmp_path: Path
) -> None:
    (tmp_path / "module.py").write_text(HEAD + CLASS.replace("sys.argv[1]", "sys.argv[2]"))
    (tmp_path / "gone").mkdir()
    text = "import os, sys\nsys.path.insert(1, sys.argv[1])\nfor number in range(3):\n    os.close(number)\n"
    text += "os.rmdir('../gone')\nfrom module import obj\nopen(sys.argv[1] + '/shown', 'w').write(str(obj.query()))\n"
    with Program("-c", text, tmp_path, on_demand, cwd=tmp_path / "gone") as program:
        assert program.wait() == 0, program.errors
    assert (tmp_path / "shown").read_text() == "1"


@pytest.mark.slow
def test_a_start_leaves_no_child_and_warns_of_none(script: Callable[..., str]) -> None:
    children = "    import pathlib; print(pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text())\n"
    assert script(HEAD + CLASS + SHOWN + children, "app.py", "-W", "error") == "1\n"


# The app's module in the manager


def test_this_process_is_no_manager() -> None:
    assert not in_manager()


@pytest.mark.slow
def test_a_module_runs_in_the_manager_as_in_its_program(script: Callable[..., str], tmp_path: Path) -> None:
    """It is imported in the program's directory. A part of it that is not for the manager can ask."""
    text = HEAD + "if in_manager():\n    open('imported', 'w').close()\n" + CLASS
    shown = "if __name__ == '__main__':\n    print(obj.where(), in_manager()); obj.write('file')\n"
    assert script(text + shown) == f"{tmp_path / 'program'} False"
    assert (tmp_path / "program" / "file").read_text() == "written"
    assert (tmp_path / "program" / "imported").exists()


@pytest.mark.slow
def test_a_server_that_a_module_opens_at_import_is_refused_in_the_manager(script: Callable[..., str]) -> None:
    serving = "import socket; open_port = socket.create_server(('127.0.0.1', 0))\n"
    told = script(HEAD + serving + CLASS + SHOWN)
    assert "opens a server at ('127.0.0.1', 0)" in told
    assert "counter_server.in_manager()" in told
    assert script(HEAD + "if not in_manager():\n    " + serving + CLASS + SHOWN) == "1"


@pytest.mark.slow
def test_an_unguarded_run_of_an_app_does_nothing_in_the_manager(script: Callable[..., str]) -> None:
    flask = "from flask import Flask\napp = Flask('app')\n"
    calling = "import _thread, threading\ndef call():\n    print(obj.query())\n    _thread.interrupt_main()\n"
    calling += "if not in_manager():\n    threading.Thread(target=call).start()\n"
    assert "\n1\n" in f"\n{script(HEAD + flask + CLASS + calling + 'app.run(port=0)')}\n"


@pytest.mark.slow
def test_a_class_is_one_class_as_a_main_program_and_as_a_module(script: Callable[..., str], data_dir: Path) -> None:
    assert script(HEAD + CLASS + SHOWN, "app.py") == "1"
    manager = holder(data_dir)
    assert script("from app import obj\n" + SHOWN, "shell.py") == "2"
    assert script(HEAD + CLASS + SHOWN, "app.py", "-P") == "3"  # not found by name there
    assert script(HEAD + CLASS + SHOWN, "app.py") == "4"
    assert manager != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with space.py", "na\xefve.py", os.fsdecode(b"by\xfftes.py"), "script"])
def test_a_program_may_have_any_name(script: Callable[..., str], name: str) -> None:
    assert script(HEAD + CLASS + SHOWN, name) == "1"


def test_a_class_without_a_file_is_refused_where_it_is_declared(on_demand: str, tmp_path: Path) -> None:
    text = HEAD + CLASS.replace('obj = state.object("obj", Obj)', "print(state.counter('c').increment())")
    text += "try:\n    state.object('obj', Obj)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    with Program("-c", text, on_demand, cwd=tmp_path) as program:
        program.wait()
    number, refused = program.output
    assert number == "1"
    assert refused.startswith("InvalidRequest the manager cannot import Obj, which is not in a file of a module")


@pytest.mark.slow
def test_a_module_that_handles_signals_or_exits_does_so_in_its_own_program(
    script: Callable[..., str], data_dir: Path
) -> None:
    handling = "import signal\nfor each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):\n"
    handling += "    signal.signal(each, signal.SIG_IGN)\n"
    assert script(HEAD + handling + CLASS + SHOWN) == "1"
    assert stop_manager(DataDirectory(data_dir), PATIENCE) is not None
    told = script(HEAD + "if in_manager():\n    sys.exit(3)\n" + CLASS + SHOWN)
    assert "SystemExit: 3; do that unless counter_server.in_manager()" in told


@pytest.mark.slow
def test_a_thread_of_a_module_holds_up_no_end(script: Callable[..., str], data_dir: Path) -> None:
    thread = "import threading, time\nif in_manager():\n"
    thread += f"    threading.Thread(target=time.sleep, args=({2 * PATIENCE},)).start()\n"
    assert script(HEAD + thread + CLASS + SHOWN) == "1"
    manager = holder(data_dir)
    assert manager is not None
    assert stop_manager(DataDirectory(data_dir), PATIENCE) == manager
    eventually(lambda: not Path(f"/proc/{manager}").exists(), "its end")


# The newest version


@pytest.fixture
def changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a module that other programs import, too."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "changing.py"
    sys.modules.pop("changing", None)


def declared(state: State, **options: bool) -> SomeObj:
    """Declare the class of the module as it is now, as a program that starts now does."""
    sys.modules.pop("changing", None)
    import changing  # type: ignore[import-not-found]

    obj: SomeObj = state.object("obj", changing.Obj, **options)
    return obj


SOURCE = "class Obj:\n    n = 0\n    def query(self):\n        self.n += {step}\n        return self.n\n"


@pytest.mark.slow
@pytest.mark.parametrize("durable", [True, False])
def test_a_new_version_takes_over_with_the_state_and_the_old_handles(
    on_demand: str,
    data_dir: Path,
    changing: Path,
    durable: bool,  # noqa: FBT001 - a parameter
) -> None:
    changing.write_text(SOURCE.format(step=1))
    with patient(on_demand) as old, patient(on_demand) as new, patient(on_demand) as third:
        first = declared(old, durable=durable)
        assert (first.query(), old.counter("c").increment()) == (1, 1)
        manager = holder(data_dir)
        changing.write_text(SOURCE.format(step=10))
        assert first.query() == 2  # until somebody has the new version
        second = declared(new, durable=durable)
        assert (second.query(), first.query(), old.counter("c").increment()) == (12, 22, 2)
        successor = holder(data_dir)
        assert successor not in (None, manager)
        changing.write_text("raise RuntimeError('a mistake')\n")
        with pytest.raises(errors.StartupError, match="a mistake"):  # the manager that runs goes on
            third.object("obj", sys.modules["changing"].Obj, durable=durable).query()
        assert (second.query(), first.query(), holder(data_dir)) == (32, 42, successor)


def test_sources_are_older_than_a_program_that_began_after_a_change(changing: Path) -> None:
    changing.write_text("a = 1\n")
    sources = Sources()
    import changing as module  # noqa: F401 - it is looked at

    sources.note()
    assert not sources.are_older(time.time())
    status = changing.stat()
    for change in (
        lambda: changing.write_text("a = 12\n"),
        lambda: os.utime(changing, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9)),
        lambda: (changing.rename(changing.with_name("before")), changing.write_text("a = 1\n")),
    ):
        change()
        assert sources.are_older(time.time())
        assert not sources.are_older(status.st_ctime - 1.0), "a program that began before has the old version"
        sources = Sources()
        later(changing)
        sources.note()
        assert sources.are_older(time.time()), "it changed after the import began"
        sources = Sources()
        sources.note()
        assert not sources.are_older(time.time())
    changing.unlink()
    assert not sources.are_older(time.time()), "what is gone cannot be imported by another process either"


def later(file: Path) -> None:
    """Change the time of a file to now. The kernel's clock is coarse."""
    now = time.time_ns()
    while file.stat().st_ctime_ns < now:
        file.chmod(0o600)


def test_sources_in_an_archive_are_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "archived.py").write_text("")
    (tmp_path / "program" / "__main__.py").write_text("")
    archive = tmp_path / "program.pyz"
    zipapp.create_archive(tmp_path / "program", archive)
    sources = Sources()
    monkeypatch.syspath_prepend(archive)
    import archived  # type: ignore[import-not-found]  # noqa: F401 - it is looked at

    sources.note()
    assert not sources.are_older(time.time())
    zipapp.create_archive(tmp_path / "program", archive, compressed=True)
    assert sources.are_older(time.time())
    sys.modules.pop("archived")


@pytest.mark.slow
def test_the_main_program_of_a_directory_or_archive_is_found_in_its_releases(
    on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    number = 0
    for release in ("1", "2"):
        place = tmp_path / release / "program"
        place.mkdir(parents=True)
        (place / "__main__.py").write_text(HEAD + CLASS + SHOWN)
        zipapp.create_archive(place, place.with_suffix(".pyz"))
        (place.parent / "script").write_text(HEAD + CLASS + SHOWN)
        for program in (place, place.with_suffix(".pyz")):
            with Program(program, on_demand, cwd=tmp_path) as shown:
                shown.wait()
                number += 1
                assert shown.output == [str(number)], shown.errors
    assert holder(data_dir) is not None


MOVED = """
from counter_server import open_state
import sys
{source}
state = open_state(sys.argv[1], deadline=30)
obj = state.object("obj", Obj{options})
if __name__ == "__main__":
    print(obj.query(), flush=True)
    if sys.stdin.readline():
        print(obj.query(), flush=True)
"""


@pytest.mark.slow
def test_a_class_moves_to_another_module_under_its_users(on_demand: str, data_dir: Path, tmp_path: Path) -> None:
    def run(source: str, stdin: Any = subprocess.DEVNULL, options: str = "") -> subprocess.Popen[str]:
        (tmp_path / "app.py").write_text(MOVED.format(source=source, options=options))
        return subprocess.Popen(
            [sys.executable, tmp_path / "app.py", on_demand], stdin=stdin, stdout=subprocess.PIPE, text=True
        )

    with run(SOURCE.format(step=1), subprocess.PIPE) as old:
        try:
            assert old.stdout is not None
            assert old.stdout.readline() == "1\n"
            (tmp_path / "models.py").write_text(SOURCE.format(step=10))
            with run("from models import Obj") as new:
                assert new.communicate(timeout=PATIENCE)[0] == "11\n"
            assert old.communicate("again\n", timeout=PATIENCE)[0] == "21\n"
        finally:
            old.kill()


@pytest.mark.slow
def test_a_program_that_sends_larger_values_gets_a_manager_that_takes_them(
    on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(
        "import sys\nfrom counter_server import open_state\n"
        "entries = open_state(sys.argv[1], deadline=30).dict('entries')\n"
        "entries[sys.argv[2]] = 'x' * int(sys.argv[2])\nprint(len(entries))\n"
    )
    managers = []
    for size, largest, printed in ((1000, "", "1"), (3 * 2**20, str(2**22), "2"), (2000, "", "3"), (2**21, "", "")):
        with Program(
            tmp_path / "app.py", on_demand, str(size), environment={"COUNTER_SERVER_LARGEST_VALUE": largest}
        ) as program:
            program.wait()
            assert "".join(program.output) == printed, program.errors
        managers.append(holder(data_dir))
    first, second, *others = managers
    assert (first != second, others) == (True, [second, second])


@pytest.mark.slow
def test_programs_of_two_releases_do_not_take_turns_with_managers(
    on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    number = 0

    def run(release: str) -> int | None:
        nonlocal number
        number += 1
        with Program(tmp_path / release / "app.py", on_demand, cwd=tmp_path) as program:
            program.wait()
            assert program.output == [str(number)], program.errors
        return holder(data_dir)

    for release in ("1", "2"):
        (tmp_path / release).mkdir()
        (tmp_path / release / "app.py").write_text(HEAD + CLASS + SHOWN)
    first, second = run("1"), run("2")
    assert first != second, "a deploy is served at once"
    managers = [run(release) for _ in range(6) for release in ("1", "2")]
    # The time of each manager is longer. On a slow machine there are more than on a fast one, but not one for each.
    assert len(set(managers)) < len(managers)


@pytest.mark.slow
def test_what_the_newest_version_cannot_load_is_refused_and_the_old_one_goes_on(
    on_demand: str, data_dir: Path, changing: Path
) -> None:
    changing.write_text("class Part:\n    pass\n" + SOURCE.format(step=1) + "    part = None\n")
    with patient(on_demand) as old, patient(on_demand) as new, patient(on_demand) as other:
        first = declared(old)
        old.object("late", sys.modules["changing"].Obj)
        part = "    def query(self):\n        self.part = Part()\n"
        changing.write_text(changing.read_text().replace("    def query(self):\n", part))
        first = declared(new)
        assert first.query() == 1
        manager = holder(data_dir)
        changing.write_text(SOURCE.format(step=10))
        with pytest.raises(errors.StartupError, match=r"cannot be restored from its state: .* no attribute 'Part'"):
            declared(other).query()
        assert (first.query(), holder(data_dir)) == (2, manager)


@pytest.mark.slow
def test_an_old_program_goes_on_beside_a_new_version_that_cannot_be_imported(
    on_demand: str, data_dir: Path, changing: Path
) -> None:
    changing.write_text(SOURCE.format(step=1))
    with patient(on_demand) as old, patient(on_demand) as older:
        first, second = declared(old), declared(older)
        assert first.query() == 1
        manager = holder(data_dir)
        later(changing)
        changing.write_text("raise RuntimeError('half a deploy')\n")
        assert (second.query(), holder(data_dir)) == (2, manager)


@pytest.mark.slow
def test_another_class_does_not_get_the_state_of_an_old_one(on_demand: str, changing: Path) -> None:
    changing.write_text(SOURCE.format(step=1) + SOURCE.format(step=100).replace("Obj", "Other"))
    with patient(on_demand) as state:
        assert declared(state).query() == 1
    del state
    gc.collect()  # it would go on declaring it
    with patient(on_demand) as state:
        obj: SomeObj = state.object("obj", sys.modules["changing"].Other)
        with pytest.raises(errors.StartupError, match="it is of another class, Obj: declare this one under a new"):
            obj.query()


@pytest.mark.slow
def test_an_object_becomes_durable_or_volatile_with_its_state(on_demand: str, data_dir: Path) -> None:
    with patient(on_demand) as first, patient(on_demand) as second:
        old, obj = first.object("obj", SomeObj, 0, durable=False), second.object("obj", SomeObj, 0)
        assert (old.query(), obj.query(), old.query()) == (1, 2, 3)  # nothing was lost
        end_manager(data_dir / "manager.lock")
        assert (obj.query(), old.query()) == (4, 5)
        stop_manager(DataDirectory(data_dir), PATIENCE)
    del first, second, old, obj
    gc.collect()  # they would go on declaring it
    with patient(on_demand) as state:
        obj = state.object("obj", SomeObj, 0, durable=False)
        assert obj.query() == 6
        stop_manager(DataDirectory(data_dir), PATIENCE)
        assert obj.query() == 7
        end_manager(data_dir / "manager.lock")
        with pytest.raises(errors.StateLost):
            obj.query()
        assert obj.query() == 1
