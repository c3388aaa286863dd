"""A manager on demand: the first client that finds none starts one, for all clients that come later."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

from ..errors import Disconnected, StartupError
from ..objects import Declaration
from ..settings import StoreOptions, from_environment
from .directory import DataDirectory, forking, keep_from_children, release
from .hosting import Hosting, import_path, in_manager

EXIT_HELD = 75  # EX_TEMPFAIL of sysexits.h: another manager holds the directory, perhaps not for long
_PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent.parent)
_POLL_SECONDS = 0.005
_unfinished: list[subprocess.Popen[bytes]] = []  # of starts that took too long; they are reaped at the next one


@dataclass(frozen=True)
class Starter:
    """Starts managers, each in a process of its own that outlives this process.

    :param declared: returns the shared objects that a manager of a store URL has to host.
    """

    options: StoreOptions
    declared: Callable[[str], list[Declaration]]

    def start(self, directory: DataDirectory, before: int | None, deadline: float) -> bool:
        """Return when clients can connect to a new manager; return whether this process started it.

        If another one serves than `before`, somebody else has started that meanwhile, and it is not succeeded: each
        change of managers can lose objects that are not durable.

        If time runs out, the manager goes on starting: later calls find it.

        :param before: the pid of the manager to succeed; None if there was none.
        :param deadline: in `time.monotonic` seconds.
        :raises StartupError: if the manager cannot start, for a reason that stays.
        :raises Disconnected: if it may start later: another process is starting one, or time ran out.
        """
        if in_manager():
            raise StartupError(
                "shared state cannot be used here: the manager imports this module, too, for its shared objects;"
                " use it in a view, in a command or under if __name__ == '__main__'"
            )
        _open_standard_streams()
        directory.make()
        with directory.starting() as lock:
            if lock is None:
                raise Disconnected(f"the manager of {directory} is starting", sent=False, is_vague=True)
            if directory.manager_pid() not in (None, before):
                return False
            declarations = self.declared(directory.url)
            try:
                kind, text = self._run(directory, declarations, lock, deadline)
            except OSError as error:
                raise StartupError(f"the manager of {directory} could not be started: {error}") from error
        match kind:
            case "ready":
                return True
            case "":
                raise Disconnected(f"the manager of {directory} is still starting", sent=False, is_vague=True)
            case "later":
                raise Disconnected(text, sent=False)
            case _:
                raise StartupError(f"the manager of {directory} could not be started: {text}")

    def _run(
        self, directory: DataDirectory, declarations: list[Declaration], lock: int, deadline: float
    ) -> tuple[str, str]:
        reader, writer = os.pipe()
        try:
            # Files in memory, because a child that this process forks meanwhile would keep pipes open.
            with open(os.memfd_create("input"), "w+b") as stdin, open(os.memfd_create("errors"), "w+b") as stderr:
                stdin.write(Hosting.of_this_process(declarations).encode())
                stdin.seek(0)
                command = python_command(
                    *("counter_server", "manager", "--background", "--data-dir", str(directory)),
                    *("--durability", self.options.durability, "--idle-timeout", str(self.options.idle_timeout)),
                    *("--starter", str(writer), str(lock)),
                )
                with forking:
                    process = subprocess.Popen(
                        command, stdin=stdin, stdout=stderr if self.options.log == "file" else 2, stderr=stderr,
                        env={**python_environment(), "COUNTER_SERVER_LOG": self.options.log}, pass_fds=(writer, lock),
                    )  # fmt: skip
                _unfinished[:] = [each for each in [*_unfinished, process] if each.poll() is None]
                outcome = follow(reader, lambda: process.poll() is None, deadline)
                if outcome[0]:  # otherwise the manager holds the lock until it is ready
                    process.wait()  # it has forked the manager, and leaves no zombie
                    fcntl.flock(lock, fcntl.LOCK_UN)  # for copies that a fork made without Python's knowledge, too
                if outcome[0] == "ended":
                    stderr.seek(0)
                    said = stderr.read().decode(errors="replace").strip().removeprefix("Error: ")
                    return "ended", said or f"it ended without a word; see {directory.path}/manager.log"
                return outcome
        finally:
            os.close(reader)
            os.close(writer)


def _open_standard_streams() -> None:
    """Open those of this process's standard streams that are closed: no pipe or lock may get the number of one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        pass
    os.close(descriptor)


class Report:
    """A manager's report of its start, to the process that waits for it.

    :param writer: a pipe to that process; it may have given up.
    :param lock: held until the start is over, so that nobody starts another manager meanwhile.
    """

    def __init__(self, writer: int, lock: int | None = None) -> None:
        self._writer = writer
        self._lock = lock
        for descriptor in (writer, lock):
            if descriptor is not None:
                os.set_inheritable(descriptor, False)  # noqa: FBT003 - it takes no keyword
                keep_from_children(descriptor)

    def end(self, kind: str, text: str = "") -> None:
        """Report the outcome: ``ready``, an ``error``, or ``later``, if another attempt may succeed."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            release(self._lock)
            os.close(self._lock)
        _send(self._writer, kind, text)
        release(self._writer)
        os.close(self._writer)


def _send(writer: int, kind: str, text: str) -> None:
    with suppress(BrokenPipeError):  # the starter has given up
        os.write(writer, json.dumps([kind, text]).encode() + b"\n")


def follow(reader: int, is_starting: Callable[[], bool], deadline: float = inf) -> tuple[str, str]:
    """Wait for the outcome of a start: its kind, and a text. The kind is ``ended`` after an end without a report.

    It does not wait for the end of the pipe, which a process that the manager starts may keep open.

    :param is_starting: returns whether the first process, which forks the manager, is there.
    :returns: an empty kind at the deadline.
    """
    os.set_blocking(reader, False)
    received = b""
    manager: int | None = None  # a descriptor of the process
    try:
        while True:
            is_there = is_starting() if manager is None else not select.select([manager], [], [], 0)[0]
            with suppress(BlockingIOError):
                received += os.read(reader, 65536)
            while b"\n" in received:
                line, _, received = received.partition(b"\n")
                kind, text = json.loads(line)
                if kind != "pid":
                    return kind, text
                with suppress(ProcessLookupError):
                    manager = os.pidfd_open(int(text))
                is_there = True
            if not is_there:
                return "ended", ""
            if time.monotonic() >= deadline:
                return "", ""
            time.sleep(_POLL_SECONDS)
    finally:
        if manager is not None:
            os.close(manager)


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
    path = import_path()
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


def detach(directory: DataDirectory, starter: tuple[int, int] | None) -> Report:
    """Go on in the background, in a session of its own that no terminal or parent ends.

    The calling process ends: at once if a starter waits for the report, and otherwise with the outcome of the start.

    :param starter: the starter's pipe and its lock.
    """
    _open_standard_streams()
    directory.make()
    reader, *descriptors = (-1, *starter) if starter else os.pipe()
    if child := os.fork():
        _send(descriptors[0], "pid", str(child))
        if starter:
            os._exit(0)
        kind, text = follow(reader, lambda: True)
        if kind == "ready":
            print(f"Manager ready: {directory.url}", flush=True)
        else:
            print(f"Error: {text or f'it ended; see {directory.path}/manager.log'}", file=sys.stderr, flush=True)
        os._exit({"ready": 0, "later": EXIT_HELD}.get(kind, 1))
    os.setsid()
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the starter may have blocked signals
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        if from_environment("LOG") == "file":
            log = os.open(directory.path / "manager.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        else:
            log = os.dup(1 if starter else 2)  # a starter gives its standard error as the first, to read the second
    except OSError:  # no room for another file: go on without a log
        log = os.dup(nothing)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    os.close(log)
    os.close(nothing)
    return Report(*descriptors)
