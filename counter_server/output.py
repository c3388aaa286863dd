"""Standard output and standard error that never wait for their reader.

A pipe that nobody reads, a terminal that is stopped and a full disk would stop every process that writes a line. Here a
line is written at once if that needs no waiting. If not, it waits in a queue for a thread that writes it. Lines that do
not fit into the queue, or cannot be written, are dropped and counted. The log says how many as soon as it can be
written again.
"""

import _thread
import atexit
import fcntl
import io
import logging
import os
import stat
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger(__name__)

_MOST_BYTES = 2**20  # that wait to be written
_DRAIN_SECONDS = 1.0


class _Output(io.RawIOBase):
    """A descriptor, as the lower half of a text stream. `write` takes all, at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._name = "standard output" if descriptor == 1 else "standard error"
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        """Start with nothing to write. A fork has no thread, and what waits there is its parent's to write."""
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()  # the first is being written
        self._bytes = 0
        self._dropped = 0
        self._stuck = False  # nothing was written since `drain` last waited in vain
        self._has_writer = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: "ReadableBuffer", /) -> int:
        line = bytes(data)
        with self._changed:
            if not (self._waiting or self._dropped) and self._has_room(line):
                self._dropped += not self._write_one(line)
                return len(line)
            if self._bytes + len(line) > _MOST_BYTES or not self._ensure_writer():
                self._dropped += 1
                return len(line)
            self._waiting.append(line)
            self._bytes += len(line)
            self._changed.notify_all()
        return len(line)

    def _has_room(self, line: bytes) -> bool:
        """Return whether writing the line surely needs no waiting: to a file, or to a pipe that is far from full.

        Other processes write to the same pipe, so the room that is seen may be gone a moment later.
        """
        try:
            mode = os.fstat(self._descriptor).st_mode
            if stat.S_ISFIFO(mode):
                waiting = int.from_bytes(fcntl.ioctl(self._descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
                return waiting + len(line) <= fcntl.fcntl(self._descriptor, fcntl.F_GETPIPE_SZ) // 4
            return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(self._descriptor))
        except OSError:
            return False

    def _ensure_writer(self) -> bool:
        """Start the thread that writes, if none runs; return whether one does: there may be no room for another."""
        if not self._has_writer:
            with suppress(RuntimeError):
                # Not `threading.Thread`: its `start` waits for ever if the new thread dies without memory.
                _thread.start_new_thread(self._write_all, ())
                self._has_writer = True
        return self._has_writer

    def drain(self, now: Callable[[], float] = time.monotonic, seconds: float = _DRAIN_SECONDS) -> None:
        """Wait a moment until all is written. As the interpreter ends, too, when this module's names are gone."""
        deadline = now() + seconds
        with self._changed:
            while self._waiting and not self._stuck:
                left = deadline - now()
                self._stuck = left <= 0
                self._changed.wait(max(left, 0))

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                line = self._waiting[0]
            written = self._write_one(line)
            with self._changed:
                self._waiting.popleft()
                self._stuck = False
                self._bytes -= len(line)
                self._dropped += not written
                told = self._dropped if written and not self._waiting else 0
                self._dropped -= told
                self._changed.notify_all()
            if told:
                log.warning("%d lines to %s were dropped: it was not read, or was full", told, self._name)

    def _write_one(self, line: bytes) -> bool:
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:  # the disk is full, or the reader has gone: it is counted, and nobody can be told now
            return False
        return True


class _Text(io.TextIOWrapper):
    """A text stream over an output, whose lines are on their way at once. Only `flush` waits for them, for a moment."""

    def __init__(self, output: _Output) -> None:
        # The output takes all that is written at once, as the buffer does that is expected here.
        super().__init__(output, "utf-8", "backslashreplace", line_buffering=True)  # type: ignore[arg-type]
        self._output = output

    def flush(self) -> None:
        super().flush()
        self._output.drain()


def protect() -> None:
    """Have this process and its forks never wait for a reader of their standard output and standard error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take its place, and get the log
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it takes no keyword
    if not isinstance(sys.stderr, _Text):
        sys.stdout, sys.stderr = _Text(_Output(1)), _Text(_Output(2))
        for name in ("stdout", "stderr"):  # the standard manager server puts these back
            setattr(sys, f"__{name}__", getattr(sys, name))
        atexit.register(sys.stdout.flush)  # at Python's own flush, later, no thread runs any more
        atexit.register(sys.stderr.flush)
