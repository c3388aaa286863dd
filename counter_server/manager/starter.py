"""A manager on demand: the first client that finds none starts one, for all that come after it."""

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
from .directory import DataDirectory, forking, keep_from_children, release

EXIT_HELD = 75  # EX_TEMPFAIL of sysexits.h: another manager holds the directory, perhaps not for long
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Starts the manager of a directory, as a process of its own that outlives this one.

    :param durability: of the manager that is started.
    :param idle_timeout: seconds without any client after which it ends by itself.
    :param declared: tells, of a store's URL, the shared objects that it is to host: those declared when it is started.
    """

    durability: Durability
    idle_timeout: float
    declared: Callable[[str], list[Declaration]]

    def start(self, directory: DataDirectory, deadline: float) -> None:
        """Return when clients can connect, or when another process is starting one just now.

        :param deadline: in `time.monotonic` seconds.
        :raises StartupError: if it cannot be started, for a reason that stays.
        :raises Disconnected: if it may be there later: another one still holds the directory, or time ran out.
        """
        if _hosts:
            raise StartupError(
                "shared state cannot be used here: the manager, too, imports the module that declares shared objects;"
                " use them in a view, in a command or under if __name__ == '__main__'"
            )
        directory.make()
        with directory.starting() as mine:
            if not mine:
                return
            declarations = self.declared(directory.url)
            command = python_command(
                *("counter_server", "manager", "--background", "--data-dir", str(directory)),
                *("--durability", self.durability, "--idle-timeout", str(self.idle_timeout)),
                *(["--host-objects"] if declarations else []),
            )
            try:
                status, said = _run(command, hosting(declarations), deadline)
            except subprocess.TimeoutExpired:
                raise Disconnected("the manager was not ready in time; it is still starting", sent=False) from None
            except OSError as error:
                raise StartupError(f"the manager of {directory} could not be started: {error}") from error
        if status == EXIT_HELD:
            raise Disconnected(f"another manager of {directory} is coming or going", sent=False)
        if status != 0:
            message = said.decode(errors="replace").strip().removeprefix("Error: ")
            raise StartupError(f"the manager of {directory} could not be started: {message or status}")


def _run(command: list[str], handed_over: bytes, deadline: float) -> tuple[int, bytes]:
    """Run a command and return its status and what it wrote to standard error.

    `subprocess.run` would leave the pipes to children that this process forks meanwhile, and wait for their end.

    :raises subprocess.TimeoutExpired: at `deadline`.
    """
    environment = python_environment()
    with forking:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )
        assert process.stdin
        assert process.stderr
        pipes = (process.stdin.fileno(), process.stderr.fileno())
        keep_from_children(*pipes)
    try:
        _, said = process.communicate(handed_over, max(deadline - time.monotonic(), 0.001))
    finally:
        release(*pipes)
        process.kill()  # only where time ran out: the manager itself is another process by then
        process.__exit__(None, None, None)
    return process.returncode, said


_hosts = False  # whether this process is to host what it imports, and so can start no other one


def begin_to_host() -> None:
    """From now on this process starts no manager, and nothing is patched: it is a manager, or is about to be."""
    global _hosts
    _hosts = True
    sys.meta_path.insert(0, _PatchingNothing)


class _PatchingNothing(SourceFileLoader):
    """Imports the modules with which gevent and eventlet patch the standard library, so that they patch nothing.

    A manager imports an app, and that may patch: the manager's own threads would become greenlets of one thread.
    """

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


class _Hosting(Struct, array_like=True):
    """What a starter hands over: the declarations, and how their classes are found."""

    declarations: list[Declaration]
    preparation: dict[str, Any]
    files: dict[str, str]  # of modules that no import finds by their name


def hosting(declarations: list[Declaration]) -> bytes:
    """The declarations as bytes, with what another process needs to import their classes as this one did."""
    data = spawn.get_preparation_data("manager")
    wanted = {"sys_argv"}
    if any(declaration.module == "__main__" for declaration in declarations):
        wanted |= {"init_main_from_name", "init_main_from_path"}
    modules = {declaration.module for declaration in declarations} - {"__main__"}
    files = {name: file for name in modules if (file := _file_of(name))}
    handed_over = _Hosting(declarations, {name: data[name] for name in wanted & set(data)}, files)
    # A Python literal, for paths and arguments may hold bytes that are not UTF-8.
    return ascii(to_builtins(handed_over, builtin_types=(bytes,))).encode()


def _file_of(name: str) -> str | None:
    """The file of a module that was loaded from it under a name of the loader's own, as `uwsgi --wsgi-file` does."""
    package = name.partition(".")[0]
    if any(finder.find_spec(package, None) for finder in sys.meta_path):
        return None
    file = getattr(sys.modules[name], "__file__", None)
    return os.path.abspath(file) if file else None


def prepare_to_host(handed_over: bytes) -> list[Declaration]:
    """The declarations, when this process has been made to find their classes.

    The main program of the starter is imported where it holds one of them, as `multiprocessing` does for a spawned
    process: not under the name of `__main__`, so that it does not begin to serve.
    """
    begin_to_host()
    received = convert(literal_eval(handed_over.decode()), _Hosting)
    try:
        spawn.prepare(received.preparation)
        for name, file in received.files.items():
            _load(name, file)
    except Exception as error:
        raise StartupError(f"the program that declares the shared objects cannot be imported: {error!r}") from error
    return received.declarations


def _load(name: str, file: str) -> None:
    spec = spec_from_file_location(name, file, loader=SourceFileLoader(name, file))
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded as a module")
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


# Runs a module as `-m` does. Until the path is set, only what is built in is imported.
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
    """Return the command that runs a module with exactly what this process could import, in the same order.

    `python -m` would put the working directory first, and `PYTHONPATH` would put packages before the standard library.
    Run it in `python_environment()`.
    """
    path = [_absolute(entry) for entry in sys.path if isinstance(entry, str) and "\0" not in entry]
    if _PACKAGE_PARENT not in path:
        path.append(_PACKAGE_PARENT)
    handed_over = [os.environ.get("PYTHONPATH", ""), *path]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    return [_python(), *flags, "-P", "-c", _BOOT, str(len(handed_over) + 2), *handed_over, module, *arguments]


def _absolute(entry: str) -> str:
    # An entry that is no file may be the mark of an import hook, which knows it by its name.
    return os.path.abspath(entry) if not entry or os.path.exists(entry) else entry


def _python() -> str:
    # An embedding server (uWSGI) names itself as the executable.
    if os.path.basename(sys.executable or "").startswith("python"):
        return sys.executable
    return os.path.join(sys.prefix, "bin", "python3")


def python_environment() -> dict[str, str]:
    """Return this process's environment without `PYTHONPATH`, which `python_command` hands over.

    The new interpreter would look there while it starts, and relative entries would mean another directory by now.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def detach(directory: DataDirectory) -> Callable[[], None]:
    """Go on as a process in the background, in a session of its own, that no terminal or parent ends.

    The process that called ends with status 0 when the returned function is called, and with 1 if that never
    happens. From then on messages go to `manager.log` in `directory`.
    """
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        if os.read(reader, 1):
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1)
    os.close(reader)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the one who started it may have blocked some

    def ready() -> None:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            log = os.open(directory.path / "manager.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError:  # no room for another file: it counts without a log
            log = os.dup(nothing)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.close(nothing)
        os.chdir("/")  # a file system where an app was started can be unmounted
        os.write(writer, b"1")
        os.close(writer)

    return ready
