"""A command that leaves nothing behind, run as `python -m counter_server.server.prove.guard COMMAND...`.

It runs in a new directory, in a process group of its own, until standard input ends: which it does when whoever
started this ends, however that happens. Then every process of the group is killed and the directory removed.
The first line that is printed is the pid of the command; all else is what the command prints.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

_SECONDS = 2.0  # that killed processes may take to be gone


def guard(command: list[str]) -> None:
    """Run `command` until standard input ends."""
    directory = tempfile.mkdtemp(prefix="counter-server-")
    try:
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            print(process.pid, flush=True)
            # From now on only the command holds the output open, so its reader sees when all of it has ended.
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            sys.stdin.buffer.read()
        finally:
            _end(process)
    finally:
        shutil.rmtree(directory)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole group. Its leader is not waited for before that: until then nobody else can have its number."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)


if __name__ == "__main__":
    try:
        guard(sys.argv[1:])
    except OSError as error:
        print(f"Error: {error}", flush=True)
        sys.exit(1)
