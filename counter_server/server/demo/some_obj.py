"""The object of the question: its answer depends on all requests before."""

import threading
import time

YIELD_SECONDS = 0.01  # as long as a query to a database takes


def pause() -> None:
    """Let others run: what any read of a file or a socket does, and what a thread may be made to do at any moment."""
    time.sleep(YIELD_SECONDS)


class SomeObj:
    """Counts how often it was asked. Between the increment and the return others may come."""

    def __init__(self, param: int) -> None:
        self.param = param

    def query(self) -> int:
        self.param += 1
        pause()
        return self.param


class LockedObj(SomeObj):
    """The same, for threads: one at a time."""

    def __init__(self, param: int) -> None:
        super().__init__(param)
        self._lock = threading.Lock()  # guards param, until its value has been returned

    def query(self) -> int:
        with self._lock:
            return super().query()
