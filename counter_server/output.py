"""Standard output, standard error and the log of our processes. They never wait for a reader.

A line is written at once if that cannot block. Otherwise a thread writes it from a queue. Lines that do not fit into
the queue, or cannot be written, are dropped; the log reports their number as soon as it can be written again.
"""

import _thread
import atexit
import fcntl
import io
import json
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
from datetime import UTC, datetime
from typing import Any, Literal

log = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]
_MAX_QUEUED_BYTES = 2**20
_LARGEST_LOG = 2**20  # bytes of a log that is bounded
_KEPT_LOG = 2**18  # bytes of it, the last, that stay when it is cut
_DRAIN_SECONDS = 1.0
_STANDARD_ATTRIBUTES = {*vars(logging.makeLogRecord({})), "asctime", "message", "taskName"}  # of a log record


def configure(process: str, form: LogFormat, level: int = logging.INFO) -> None:
    """Protect the output of this process and its forks from slow readers, and set up its log on standard error.

    :param process: ``supervisor``, ``manager`` or ``worker``.
    """
    _protect()
    handler = logging.StreamHandler(sys.stderr)
    handler.flush = lambda: None  # type: ignore[method-assign] # flushing the stream would wait for its reader
    place = process if process == "supervisor" else f"{process} {os.getpid()}"
    text = _Text(f"%(asctime)s {place} %(levelname)s %(message)s")
    handler.setFormatter(_JSON(process) if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)  # a fork has its parent's handlers


_is_bounded = False  # whether standard output and standard error write a log that must stay small


def bound(log_file: str) -> None:
    """Keep a log below a MiB, if it is what standard error writes: cut it now, and from now on before each line.

    Call it regularly: lines of a child process make the log longer too.
    """
    global _is_bounded
    with suppress(OSError):
        _is_bounded = os.path.samestat(os.fstat(2), os.stat(log_file))
    if _is_bounded:
        _cut(0)


def _cut(more: int) -> None:
    """Keep the last lines of the log, in the same file, if it would grow over a MiB by `more` bytes."""
    if os.fstat(2).st_size + more <= _LARGEST_LOG:
        return
    last = b""
    with suppress(OSError), open("/proc/self/fd/2", "rb") as log_file:  # also if its name was removed
        log_file.seek(-_KEPT_LOG, os.SEEK_END)
        _, _, last = log_file.read(_KEPT_LOG).partition(b"\n")
    os.ftruncate(2, 0)
    os.write(2, b"(earlier lines were removed)\n" + last)  # to the end, as each write to it


class _JSON(logging.Formatter):
    """A JSON object a line. The fields that a call passed as `extra` stand beside the standard ones."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = {"process": process, "pid": os.getpid()}

    def format(self, record: logging.LogRecord) -> str:
        fields = {"message": record.getMessage(), **self._process, "logger": record.name, "level": record.levelname}
        if record.exc_info:
            fields["exc_info"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack_info"] = self.formatStack(record.stack_info)
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
        fields["time"] = datetime.fromtimestamp(record.created, UTC).isoformat()
        return json.dumps(fields, default=str)


class _Text(logging.Formatter):
    """Text in which a logged value cannot fake another line: control characters are escaped, tracebacks indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of the standard library
        return _escaped(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another formatter may have cached it
        first, *others = super().format(record).split("\n")
        return "\n    ".join([first, *map(_escaped, others)])


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Output(io.FileIO):
    """A descriptor under a text stream. `write` always takes the whole line."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin with an empty queue: a fork lacks the thread, and its parent writes the lines that are queued."""
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()  # the first is being written
        self._queued_bytes = 0
        self._dropped = 0
        self._stuck = False  # nothing was written since `drain` last timed out
        self._has_writer = False

    def write(self, data: Any, /) -> int:
        line = bytes(data)
        with self._changed:
            if not (self._queue or self._dropped) and self._has_room(len(line)):
                self._dropped += not self._write_now(line)
            elif self._queued_bytes + len(line) > _MAX_QUEUED_BYTES:
                self._dropped += 1
            else:
                self._queue.append(line)
                self._queued_bytes += len(line)
                self._changed.notify_all()
                if not self._has_writer:
                    with suppress(RuntimeError):  # no room for a thread: the next line tries again
                        # `threading.Thread.start` would hang if the new thread dies without memory.
                        _thread.start_new_thread(self._write_queue, ())
                        self._has_writer = True
        return len(line)

    def _has_room(self, size: int) -> bool:
        """Return whether a write cannot block: to a file, or to a pipe that is far from full, as others write to it."""
        try:
            mode = os.fstat(self.fileno()).st_mode
            if stat.S_ISFIFO(mode):
                unread = int.from_bytes(fcntl.ioctl(self.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)
                return unread + size <= fcntl.fcntl(self.fileno(), fcntl.F_GETPIPE_SZ) // 4
            return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not self.isatty())
        except OSError:
            return False

    def drain(self, now: Callable[[], float] = time.monotonic, seconds: float = _DRAIN_SECONDS) -> None:
        """Wait a moment until the queue is empty. The defaults outlive this module's names at interpreter exit."""
        deadline = now() + seconds
        with self._changed:
            while self._queue and not self._stuck:
                left = deadline - now()
                self._stuck = left <= 0
                self._changed.wait(max(left, 0))

    def _write_queue(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                line = self._queue[0]
            written = self._write_now(line)
            with self._changed:
                self._queue.popleft()
                self._queued_bytes -= len(line)
                self._stuck = False
                self._dropped += not written
                reported = self._dropped if written and not self._queue else 0
                self._dropped -= reported
                self._changed.notify_all()
            if reported:
                name = "standard output" if self.fileno() == 1 else "standard error"
                log.warning("%d lines to %s were dropped: its reader was too slow, or it was full", reported, name)

    def _write_now(self, line: bytes) -> bool:
        try:
            if _is_bounded:
                line = line[-_KEPT_LOG:]
                _cut(len(line))
            while line:
                line = line[os.write(self.fileno(), line) :]
        except OSError:  # the disk is full, or the reader is gone
            return False
        return True


class _Stream(io.TextIOWrapper):
    """A text stream that passes each line on at once. `flush` waits a moment until it is written."""

    def __init__(self, descriptor: int) -> None:
        self._output = _Output(descriptor)  # takes whole lines, so it needs no buffer
        super().__init__(self._output, "utf-8", "backslashreplace", line_buffering=True)

    def flush(self) -> None:
        super().flush()
        self._output.drain()


def _protect() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take its number, and receive the log
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it takes no keyword
    if not isinstance(sys.stderr, _Stream):
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            stream = _Stream(descriptor)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)  # the standard manager server restores these
            atexit.register(stream.flush)  # Python's own flush comes later, when no thread runs any more
