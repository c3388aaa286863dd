"""What managers host: the modules of apps, imported beside them, in the newest version, with nothing lost between."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from counter_server import errors, in_manager
from counter_server.manager import snapshot
from counter_server.manager.directory import DataDirectory
from counter_server.manager.hosting import Sources
from counter_server.state import State
from tests.hosted_classes import OneWay, Refusing, SomeObj
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


def test_a_snapshot_is_taken_once_and_only_whole(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = DataDirectory(data_dir)
    directory.make()
    assert snapshot.take(directory) == {}
    objects = {"obj": snapshot.Kept("epoch", b"state", {})}
    snapshot.write(directory, objects)
    assert (snapshot.take(directory), snapshot.take(directory)) == (objects, {})
    directory.snapshot.write_bytes(b"damaged")
    assert (snapshot.take(directory), directory.snapshot.exists()) == ({}, False)
    assert "not durable begin again" in caplog.text


def test_a_snapshot_of_another_boot_is_not_used(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = DataDirectory(data_dir)
    directory.make()
    snapshot.write(directory, {"obj": snapshot.Kept("epoch", b"state", {})})
    (data_dir / "boot").write_text("another")
    monkeypatch.setattr("counter_server.manager.directory._BOOT", data_dir / "boot")
    assert snapshot.take(directory) == {}


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
    assert snapshot.take(directory) == {}
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
            assert len(managers_of(data_dir)) == 1
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
        "import subprocess; helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(PATIENCE)'])",
        "import multiprocessing; helper = multiprocessing.Manager() if __name__ != '__main__' else None",
    ],
)
def test_a_process_that_the_module_starts_holds_up_no_start(script: Callable[..., str], helper: str) -> None:
    helper = helper.replace("PATIENCE", str(2 * PATIENCE))
    began = time.monotonic()
    ended = "if not in_manager() and hasattr(helper, 'kill'):\n    helper.kill(); helper.wait()\n"
    assert script(HEAD + helper + CLASS + SHOWN + ended) == "1"
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


def test_a_class_without_a_file_is_refused_where_it_is_declared(on_demand: str, tmp_path: Path) -> None:
    text = HEAD + CLASS.replace('obj = state.object("obj", Obj)', "print(state.counter('c').increment())")
    text += "try:\n    state.object('obj', Obj)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    with Program("-c", text, on_demand, cwd=tmp_path) as program:
        program.wait()
    number, refused = program.output
    assert number == "1"
    assert refused.startswith("InvalidRequest the manager cannot import Obj, which is not in a file of a module")


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


def test_sources_are_changed_by_a_new_size_time_or_file(changing: Path) -> None:
    changing.write_text("a = 1\n")
    sources = Sources()
    import changing as module  # noqa: F401 - it is looked at

    sources.note()
    assert not sources.are_changed
    status = changing.stat()
    for change in (
        lambda: changing.write_text("a = 12\n"),
        lambda: os.utime(changing, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9)),
        lambda: (changing.rename(changing.with_name("before")), changing.write_text("a = 1\n")),
    ):
        change()
        assert sources.are_changed
        sources.note()
        assert not sources.are_changed
    changing.unlink()
    assert not sources.are_changed, "what is gone cannot be imported by another process either"
