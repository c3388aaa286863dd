"""What a manager counts while it works: the calls of a shared object, and how long commits take.

It begins with the process: a number that a restart may reset is a counter of Prometheus, and any reader can tell a new
process by its pid.
"""

import threading
import time
from bisect import bisect_left
from threading import get_ident

from .operations import Raised, Refusal, Result, Returned
from .status import COMMIT_BOUNDS, CommitTimes, LastError, shortened


class CallFigures:
    """Counts the calls of one shared object. Any number of threads may make calls; any may read, without a lock."""

    def __init__(self) -> None:
        self.calls = 0  # that were answered; an answer that is sent again is not another call
        self.errors = 0  # of these, whose method raised an exception, or that were refused or undone
        self.slowest = (0.0, "")  # the seconds of the slowest call without its commit, and its method
        self.last_error: LastError | None = None
        self._running: dict[int, tuple[str, float]] = {}  # by thread: a method, and its start
        self.after_fork()

    def after_fork(self) -> None:
        self._comparing = threading.Lock()
        self._running.clear()

    @property
    def running(self) -> dict[int, tuple[str, float]]:
        """By thread, the methods of the calls that run now, their commits included, and when each began."""
        return self._running.copy()  # `copy` is one step, so no other thread changes it meanwhile

    def begin(self, method: str) -> float:
        """Note that this thread calls a method. Return the time, in `time.monotonic` seconds."""
        began = time.monotonic()
        self._running[get_ident()] = (method, began)
        return began

    def end(self, method: str, began: float) -> None:
        """Note that a method has returned, or raised."""
        seconds = time.monotonic() - began
        if seconds > self.slowest[0]:
            with self._comparing:
                self.slowest = max(self.slowest, (seconds, method))

    def count(self, results: list[Result]) -> None:
        """Count the calls of a batch. This thread has made them all.

        The caller holds the object's lock, so one thread counts at a time.
        """
        self.calls += len(results)
        for result in results:
            if type(result) is not Returned:
                self._count_error(result)
        self._running.pop(get_ident(), None)

    def _count_error(self, result: Result) -> None:
        self.errors += 1
        if isinstance(result, Raised):
            self.last_error = LastError(shortened(result.name), shortened(result.text), time.time())
        elif isinstance(result, Refusal):
            error = result.error()
            self.last_error = LastError(type(error).__name__, shortened(str(error)), time.time())


class Durations:
    """Counts durations in the buckets of a histogram, under the lock of its owner."""

    def __init__(self) -> None:
        self._counts = [0] * (len(COMMIT_BOUNDS) + 1)
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(COMMIT_BOUNDS, seconds)] += 1
        self._seconds += seconds

    def now(self) -> CommitTimes:
        return CommitTimes(list(self._counts), self._seconds)
