"""A place for one server, and for all that it starts: what happens there, ends there.

The stage is a process in a session of its own, which a Ctrl-C does not reach. It starts the server, and is made the
parent of whatever that leaves behind, daemons too. When the pipe from the demonstration ends, for whatever reason, a
`kill -9` too, it kills all its descendants, removes the directory, and ends.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...errors import StartupError
from ...manager.directory import DataDirectory
from ...manager.starter import python_command, python_environment
from .servers import SERVERS
from .strategies import DATA, OURS, STRATEGIES
from .textbook import address_file

BACKLOG = 1024  # connections that may wait to be accepted; a server may lower it to its own
_BOOT_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def listen(port: int, sockets: int = 1) -> list[socket.socket]:
    """Listening sockets on one port of loopback; port 0 is a free one.

    :param sockets: among which the system spreads the connections evenly.
    :raises StartupError: if the port cannot be had.
    """
    found: list[socket.socket] = []
    try:
        for _ in range(sockets):
            found.append(socket.socket())
            found[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sockets > 1:
                found[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            found[-1].bind(("127.0.0.1", port))
            found[-1].listen(BACKLOG)
            port = found[-1].getsockname()[1]
    except OSError as error:
        close(found)
        raise StartupError(
            f"cannot listen on 127.0.0.1 port {port}: {error.strerror}; choose another with --port, or give none: then"
            " free ones are taken"
        ) from error
    return found


def close(sockets: list[socket.socket]) -> None:
    """Close them all."""
    for sock in sockets:
        sock.close()


class Stage:
    """The demonstration's side of a stage: a server that runs for as long as the block does.

    :raises StartupError: if the port cannot be had, or the server does not start.
    """

    def __init__(self, server: str, strategy: str, *, port: int = 0) -> None:
        self._strategy = strategy
        sockets = listen(port, SERVERS[server].sockets)
        self.port: int = sockets[0].getsockname()[1]
        descriptors = [sock.fileno() for sock in sockets]
        try:
            self._process = subprocess.Popen(
                python_command("counter_server.server.demo.stage", server, strategy, *map(str, descriptors)),
                env=python_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=descriptors,
                start_new_session=True,
            )
        finally:
            close(sockets)

    def __enter__(self) -> Self:
        try:
            told = self._hear()
        except BaseException:
            self._end()
            raise
        self._directory = Path(told["directory"])
        self._companion: int | None = told["companion"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def check(self) -> None:
        """Return if the server still runs, as far as is known.

        :raises StartupError: with its last words, if it has ended.
        """
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], 0)[0]:
            self._hear()

    def manager(self) -> int | None:
        """The process that holds the number for all others, where the strategy has one."""
        return DataDirectory(self._directory / DATA).manager_pid() if self._strategy == OURS else self._companion

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"failure": "its stage has gone"}
        if "failure" in told:
            raise StartupError(told["failure"])
        return told

    def _end(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()


class _Performance:
    """The stage's own side."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = directory / "log"
        self._environment = {
            **{name: value for name, value in python_environment().items() if name != "GUNICORN_CMD_ARGS"},
            "TMPDIR": str(directory),  # what they leave there, goes with it
            "PYTHONUNBUFFERED": "1",
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def begin(self, server: str, strategy: str, descriptors: list[int]) -> None:
        """Start everything, and say so."""
        companion = self._begin_companion(strategy)
        for descriptor in descriptors:
            self._start(SERVERS[server].command(descriptor, strategy, self._directory), descriptor)
            os.close(descriptor)  # when the server ends, its clients are to be told
        _say(directory=str(self._directory), companion=companion)

    def watch(self) -> None:
        """Return when the demonstration has gone, or wants this to end."""
        watched = {os.pidfd_open(process.pid): process for process in self._processes}
        poll = select.poll()
        for descriptor in (0, *watched):
            poll.register(descriptor, select.POLLIN)
        while 0 not in (ready := [descriptor for descriptor, _ in poll.poll()]):
            for descriptor in ready:
                poll.unregister(descriptor)
                _say(failure=self._last_words(watched[descriptor].wait()))

    def _start(self, command: list[str], *descriptors: int) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                env=self._environment,
                cwd=self._directory,  # gunicorn puts it first on its path
            )
        self._processes.append(process)
        return process

    def _begin_companion(self, strategy: str) -> int | None:
        module = STRATEGIES[strategy].companion
        if not module:
            return None
        process = self._start(python_command(module, strategy, str(self._directory)))
        deadline = time.monotonic() + _BOOT_SECONDS
        while not address_file(self._directory).exists():
            if process.poll() is not None or time.monotonic() > deadline or select.select([0], [], [], 0.01)[0]:
                raise StartupError(self._last_words(process.poll()))
        self._processes.remove(process)  # it may be killed: that is part of the play
        return process.pid

    def _last_words(self, status: int | None) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        return f"it ended with status {status}: {last}"


def _say(**what: object) -> None:
    with suppress(BrokenPipeError):  # the demonstration has gone: the pipe that is watched says it too
        os.write(1, json.dumps(what).encode() + b"\n")


def _children() -> list[int]:
    """The processes whose parent this one is."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                parent = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == os.getpid():
                    found.append(int(entry))
    return found


def _end_all() -> None:
    """Kill every descendant. Those of a killed one become children of this process, and are next."""
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def main(server: str, strategy: str, *descriptors: str) -> None:
    """Run a server until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot adopt what its children leave behind")
    directory = Path(tempfile.mkdtemp(prefix="counter-server-demo-"))
    try:
        performance = _Performance(directory)
        try:
            performance.begin(server, strategy, [int(descriptor) for descriptor in descriptors])
        except (StartupError, OSError) as error:
            _say(failure=str(error))
            return
        performance.watch()
    finally:
        _end_all()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
