"""Disk faults, injected between a program and the kernel: a system call that fails, or never returns."""

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
    """Return the path of strace, or skip the test if it is not installed."""
    return shutil.which("strace") or pytest.skip("strace is not installed (Debian package strace)")


def faulty(call: str, fault: str, *arguments: str | Path) -> Program:
    """Start Python with a fault in a system call, in strace's syntax, such as `error=EIO:when=3`."""
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    if fault.startswith("error="):  # not for a signal, which strace 6.1 then does not send
        options.append("--seccomp-bpf")  # stops only at these calls: a start is four times faster
    return Program(*options, "-e", f"inject={call}:{fault}", sys.executable, *arguments, program=needed())


def killed_at(call: str, when: int, *arguments: str | Path) -> Program:
    """Start Python, and kill it when it begins a system call for the `when`th time."""
    return faulty(call, f"signal=SIGKILL:when={when}", *arguments)


def failing(pid: int, call: str, error: str) -> AbstractContextManager[None]:
    """Make system calls, one or several, fail with `error` in all threads of a process while the block runs."""
    return injected(pid, call, f"error={error}")


@contextmanager
def injected(pid: int, call: str, fault: str) -> Iterator[None]:
    """Put a fault into system calls of a process while the block runs."""
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
        eventually(lambda: _has_ended(tracer, pid), "the end of strace", 3 * PATIENCE)


def _has_ended(tracer: subprocess.Popen[bytes], pid: int) -> bool:
    # strace detaches at SIGINT, which it has missed once. If the process ends meanwhile, strace can wait
    # for its first thread and never for the others, which must come before: then it is killed.
    try:
        ended = "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        ended = True
    tracer.send_signal(signal.SIGKILL if ended else signal.SIGINT)  # does nothing after a wait for its end
    with suppress(subprocess.TimeoutExpired):
        tracer.wait(1)
    return tracer.poll() is not None
