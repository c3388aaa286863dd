"""Run a command so that it leaves nothing behind, whatever ends this process.

The guard is a process between this process and the command: `python -m counter_server.server.guard COMMAND...`. It runs
the command in a new temporary directory, and adopts every process that the command leaves behind, daemons too. When
the command ends, or the pipe from this process closes (a `kill -9` of this process closes it too), the guard kills all
its descendants, removes the directory, and exits.
"""

import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import StartupError
from ..manager.starter import python_command, python_environment

_BOOT_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_MOST_OUTPUT = 2**24  # bytes


class Guarded:
    """A command under a guard; `pid` is the command's, `directory` its working directory."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self._process = process
        self._output = output
        pid, directory = self.expect("pid ").split(" ", 1)
        self.pid = int(pid)
        self.directory = Path(directory)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """The output until now."""
        return os.pread(self._output.fileno(), _MOST_OUTPUT, 0).decode(errors="replace")

    @property
    def last_line(self) -> str:
        return self.output.rstrip().rpartition("\n")[2].strip()

    def check(self) -> None:
        """Return if the command still runs.

        :raises StartupError: if it has ended, with its exit status and its last line.
        """
        if not self.running:
            raise StartupError(f"it ended with status {self._process.wait()}: {self.last_line.removeprefix('Error: ')}")

    def expect(self, start: str, seconds: float = _BOOT_SECONDS) -> str:
        """Wait for a line of output that begins with `start`, and return the rest of it.

        :raises StartupError: if the command ends before, or prints no such line in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            running = self.running
            if found := re.search(rf"^{re.escape(start)}(.*)\n", self.output, re.MULTILINE):  # a complete line
                return found[1]
            if not running:
                self.check()
            time.sleep(0.01)
        raise StartupError(f"it did not start within {seconds:g} seconds: {self.last_line}")


@contextmanager
def guarded(
    command: Sequence[str], *, descriptors: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Guarded]:
    """Run a command under a guard while the block runs, in a session of its own, which Ctrl-C does not reach.

    The settings of counter-server and gunicorn in this process's environment do not apply to it.

    :param descriptors: open files that the command inherits.
    :param environment: additional variables.
    :raises StartupError: if the command cannot be started.
    """
    kept = {name: value for name, value in python_environment().items() if not name.startswith("COUNTER_SERVER_")}
    kept.pop("GUNICORN_CMD_ARGS", None)
    # In memory: a Ctrl-C while `tempfile` looks for its directory can leave a file there.
    with open(os.memfd_create("output"), "rb") as output:
        process = subprocess.Popen(
            python_command("counter_server.server.guard", *command),
            env={**kept, **(environment or {}), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            pass_fds=descriptors,
            start_new_session=True,
        )
        assert process.stdin
        try:
            yield Guarded(process, output)
        finally:
            process.stdin.close()
            process.wait()


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
        select.select([0, os.pidfd_open(process.pid)], [], [])
        return process.poll() or 0
    finally:
        with suppress(ChildProcessError):  # the last one is reaped
            while True:  # the guard adopts the children of a killed process, and they are next
                for pid in Path("/proc/thread-self/children").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
                os.wait()
        shutil.rmtree(directory)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        print(f"Error: {error}", flush=True)
        sys.exit(1)
