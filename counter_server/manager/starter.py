"""A manager on demand: the first client that finds none starts one, for all clients that come later."""

import os
import signal
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any

from msgspec import Struct, convert, to_builtins

from ..errors import Disconnected, StartupError
from ..objects import Declaration
from ..settings import Durability
from .directory import DataDirectory, forking

EXIT_HELD = 75  # EX_TEMPFAIL of sysexits.h: another manager holds the directory, perhaps not for long
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
_POLL_SECONDS = 0.005
_is_host = False  # whether this process hosts the objects that it imports, and so must not start another manager


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Starts managers, each in a process of its own that outlives this process.

    :param idle_timeout: seconds without a client after which a manager ends.
    :param declared: returns the shared objects that a manager of a store URL has to host.
    """

    durability: Durability
    idle_timeout: float
    declared: Callable[[str], list[Declaration]]

    def start(self, directory: DataDirectory, deadline: float) -> None:
        """Return when clients can connect, or at once if another process is starting a manager.

        :param deadline: in `time.monotonic` seconds.
        :raises StartupError: if the manager cannot start, for a reason that stays.
        :raises Disconnected: if it may start later: another manager still holds the directory, or time ran out.
        """
        if _is_host:
            raise StartupError(
                "shared state cannot be used here: the manager imports this module, too, for its shared objects;"
                " use it in a view, in a command or under if __name__ == '__main__'"
            )
        directory.make()
        with directory.starting() as may_start:
            if not may_start:
                return
            declarations = self.declared(directory.url)
            command = python_command(
                *("counter_server", "manager", "--background", "--data-dir", str(directory)),
                *("--durability", self.durability, "--idle-timeout", str(self.idle_timeout)),
                *(["--host-objects"] if declarations else []),
            )
            try:
                status, errors = _run(command, _hosting(declarations), deadline)
            except OSError as error:
                raise StartupError(f"the manager of {directory} could not be started: {error}") from error
        if status is None:
            raise Disconnected("the manager was not ready in time; it is still starting", sent=False)
        if status == EXIT_HELD:
            raise Disconnected(f"another manager of {directory} is starting or ending", sent=False)
        if status != 0:
            raise StartupError(f"the manager of {directory} could not be started: {errors or status}")


def _run(command: list[str], given: bytes, deadline: float) -> tuple[int | None, str]:
    """Run a command with `given` as its input; return its status, None if time ran out, and its error messages."""
    # Files in memory, because a child that this process forks meanwhile would keep pipes open.
    with open(os.memfd_create("input"), "w+b") as stdin, open(os.memfd_create("errors"), "w+b") as stderr:
        stdin.write(given)
        stdin.seek(0)
        with forking:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=stderr, env=python_environment()
            )
        with process:
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)  # `wait` sleeps ten times as long
                status = process.returncode
            finally:
                process.kill()  # needed only when time ran out: by now the manager is another process
        stderr.seek(0)
        return status, stderr.read().decode(errors="replace").strip().removeprefix("Error: ")


class _Hosting(Struct, array_like=True):
    declarations: list[Declaration]
    preparation: dict[str, Any]  # of `multiprocessing.spawn`
    files: dict[str, str]  # of modules that cannot be imported by name


def _hosting(declarations: list[Declaration]) -> bytes:
    """Return the declarations as bytes, with what another process needs to import their classes as this process did."""
    data = spawn.get_preparation_data("manager")
    modules = {declaration.module for declaration in declarations}
    wanted = {"sys_argv"} | ({"init_main_from_name", "init_main_from_path"} if "__main__" in modules else set())
    files = {name: file for name in modules - {"__main__"} if (file := _file_of(name))}
    hosting = _Hosting(declarations, {name: data[name] for name in wanted & set(data)}, files)
    # A Python literal, because paths and arguments may hold bytes that are not UTF-8.
    return ascii(to_builtins(hosting, builtin_types=(bytes,))).encode()


def _file_of(name: str) -> str | None:
    """Return the file of a module that was loaded under a name of the loader's own, as `uwsgi --wsgi-file` does."""
    package = name.partition(".")[0]
    if any(finder.find_spec(package, None) for finder in sys.meta_path):
        return None
    file = getattr(sys.modules[name], "__file__", None)
    return os.path.abspath(file) if file else None


def prepare_to_host(given: bytes) -> list[Declaration]:
    """Import the classes of the declarations that `_hosting` gave another process, and return the declarations.

    A main program is imported as `multiprocessing` does it: not as `__main__`, so that it does not begin to serve.
    """
    begin_to_host()
    hosting = convert(literal_eval(given.decode()), _Hosting)
    try:
        spawn.prepare(hosting.preparation)
        for name, file in hosting.files.items():
            spec = spec_from_file_location(name, file, loader=SourceFileLoader(name, file))
            if spec is None or spec.loader is None:
                raise ImportError(f"{file} cannot be loaded as a module")
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    except Exception as error:
        raise StartupError(f"the program that declares the shared objects cannot be imported: {error!r}") from error
    return hosting.declarations


def begin_to_host() -> None:
    """Turn this process into one that hosts objects: it starts no manager, and imported apps patch nothing."""
    global _is_host
    _is_host = True
    sys.meta_path.insert(0, _PatchingNothing)


class _PatchingNothing(SourceFileLoader):
    """Imports gevent's and eventlet's patching modules without effect: a manager needs real threads."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ("gevent.monkey", "eventlet.patcher"):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _PatchingNothing(name, spec.origin)
        return spec

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name in vars(module):
            if name.startswith(("patch_", "monkey_patch")):
                setattr(module, name, lambda *_arguments, **_keywords: None)


# Runs a module as `-m` does. Until the path is set, only built-in modules are imported.
_BOOT = """\
import sys
count = int(sys.argv[1])
path, variable = sys.argv[3:count], sys.argv[2]
del sys.argv[1:count]
sys.path[:] = path
import os, runpy
if variable: os.environ["PYTHONPATH"] = variable
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this process's import path, to run in `python_environment()`.

    `python -m` would put the working directory first, and `PYTHONPATH` would go before the standard library.
    """
    path = [
        # An entry that is not a file may be the mark of an import hook, which knows it by its name.
        os.path.abspath(entry) if not entry or os.path.exists(entry) else entry
        for entry in sys.path
        if isinstance(entry, str) and "\0" not in entry
    ]
    if _PACKAGE_PARENT not in path:
        path.append(_PACKAGE_PARENT)
    values = [os.environ.get("PYTHONPATH", ""), *path]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    # An embedding server (uWSGI) names itself as the executable.
    is_python = os.path.basename(sys.executable or "").startswith("python")
    python = sys.executable if is_python else os.path.join(sys.prefix, "bin", "python3")
    return [python, *flags, "-P", "-c", _BOOT, str(len(values) + 2), *values, module, *arguments]


def python_environment() -> dict[str, str]:
    """Return this process's environment without `PYTHONPATH`, which a new interpreter would search while it starts."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def detach(directory: DataDirectory) -> Callable[[], None]:
    """Go on in the background, in a session of its own that no terminal or parent ends.

    The calling process ends with status 0 when the returned function is called, and with an error if it never is. That
    function also directs messages to `manager.log` in `directory`.
    """
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        if os.read(reader, 1):
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1)
    os.close(reader)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the starter may have blocked signals

    def ready() -> None:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            log = os.open(directory.path / "manager.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:  # no room for another file: go on without a log
            log = os.dup(nothing)
        for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        os.close(log)
        os.close(nothing)
        os.chdir("/")  # the file system of the app's directory can be unmounted
        os.write(writer, b"1")
        os.close(writer)

    return ready
