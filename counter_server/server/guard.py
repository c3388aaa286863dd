"""Run a command so that it leaves nothing behind, whatever ends this process.

The guard is a process between this one and the command: `python -m counter_server.server.guard COMMAND...`. It runs
the command in a new temporary directory, and adopts every process that the command leaves behind, daemons too. When
the command ends, or the pipe from this process closes (a `kill -9` of this process closes it too), the guard kills all
its descendants, removes the directory, and exits.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from ..errors import StartupError
from ..manager.starter import python_command, python_environment

_BOOT_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


class Guarded:
    """A command under a guard; `pid` is the command's, `directory` its working directory."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.pid = 0
        self.directory = Path()
        self.said: deque[str] = deque(maxlen=20)  # the last lines that the command printed
        self._process = process
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.said.append(line.strip())
            self._lines.put(line.strip())
        self._lines.put(None)

    @property
    def running(self) -> bool:
        return self._reader.is_alive()

    def check(self) -> None:
        """Return if the command still runs.

        :raises StartupError: if it has ended, with its exit status and its last line.
        """
        if not self.running:
            last = next((line for line in reversed(self.said) if line), "it printed nothing")
            raise StartupError(f"it ended with status {self._process.wait()}: {last.removeprefix('Error: ')}")

    def expect(self, start: str = "", seconds: float = _BOOT_SECONDS) -> str:
        """Wait for a line of output that begins with `start`, and return the rest of it.

        :raises StartupError: if the command ends before, or prints no such line in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except Empty:
                raise StartupError(f"it printed nothing of its start in {seconds:g} seconds") from None
            if line is None:
                self._reader.join()
                self.check()
            elif line.startswith(start):
                return line.removeprefix(start)


@contextmanager
def guarded(
    command: Sequence[str], *, descriptors: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Guarded]:
    """Run a command under a guard while the block runs; in its own session, so that Ctrl-C does not reach it.

    :param descriptors: open files that the command inherits.
    :param environment: variables beyond this process's own, from which the settings of our server and gunicorn are left
        out.
    :raises StartupError: if the command cannot be started.
    """
    kept = {
        name: value
        for name, value in python_environment().items()
        if not name.startswith("COUNTER_SERVER_") and name != "GUNICORN_CMD_ARGS"
    }
    process = subprocess.Popen(
        python_command("counter_server.server.guard", *command),
        env={**kept, **(environment or {}), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=descriptors,
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout
    program = Guarded(process)
    try:
        pid, directory = program.expect("pid ").split(" ", 1)
        program.pid, program.directory = int(pid), Path(directory)
        yield program
    finally:
        process.stdin.close()
        process.wait()
        program._reader.join()
        process.stdout.close()


def _children() -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):  # the process has ended
                parent = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == os.getpid():
                    yield int(entry)


def _kill_descendants() -> None:
    """Kill and reap; the children of a killed process become children of this one, and are next."""
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def main(*command: str) -> int:
    """Guard a command until it ends or standard input closes; return its exit status."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot adopt the orphans of its children")
    directory = tempfile.mkdtemp(prefix="counter-server-")
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, "TMPDIR": directory},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            close_fds=False,  # the descriptors that this process was given are for the command
            start_new_session=True,
        )
        print("pid", process.pid, directory, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # only the command keeps the output open
        select.select([0, os.pidfd_open(process.pid)], [], [])
        return process.poll() or 0
    finally:
        _kill_descendants()
        shutil.rmtree(directory)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        print(f"Error: {error}", flush=True)
        sys.exit(1)
