"""Faults of the disk, injected between a program and the kernel: a system call that fails, or never returns."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.processes import PATIENCE, Program, eventually


def needed() -> str:
    """The program's path; a test that needs it is skipped where it is not."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed (Debian package strace)")
    return found


def faulty(call: str, fault: str, *arguments: str | Path) -> Program:
    """A program of Python's with a fault of strace's words in its system calls of that name: `error=EIO:when=3`."""
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    if fault.startswith("error="):  # not where it is a signal: strace 6.1 then sends none
        options.append("--seccomp-bpf")  # stops at those calls only: a start is four times faster
    return Program(*options, "-e", f"inject={call}:{fault}", sys.executable, *arguments, program=needed())


def killed_at(call: str, when: int, *arguments: str | Path) -> Program:
    """A program of Python's that is killed as it begins the system call of that name for the `when`th time."""
    return faulty(call, f"signal=SIGKILL:when={when}", *arguments)


def failing(pid: int, call: str, error: str) -> AbstractContextManager[None]:
    """While the block runs, every system call of that name, or those, in the process fails so, in all its threads."""
    return _injected(pid, call, f"error={error}")


def late(pid: int, call: str, seconds: float) -> AbstractContextManager[None]:
    """While the block runs, every system call of that name, or those, in the process returns so much later."""
    return _injected(pid, call, f"delay_exit={round(seconds * 1e6)}")


@contextmanager
def _injected(pid: int, call: str, fault: str) -> Iterator[None]:
    options = ["-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]
    tracer = subprocess.Popen([needed(), *options, "-p", str(pid)], stderr=subprocess.DEVNULL)

    def traced() -> bool:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        try:
            tracers = [re.search(r"TracerPid:\t(\d+)", (task / "status").read_text()) for task in tasks]
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
            return False
        return all(found is not None and int(found[1]) == tracer.pid for found in tracers)

    try:
        eventually(traced, "strace to watch every thread")
        yield
    finally:
        with suppress(ProcessLookupError):
            tracer.send_signal(signal.SIGINT)  # lets go of what it watches
        tracer.wait(PATIENCE)
