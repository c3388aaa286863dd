"""Which processes a server consists of, as every worker can tell: the supervisor notes it where all of them look.

Only the supervisor knows its children, whatever becomes of them; so it alone writes, into memory that it shares with
the workers. Nothing is sent: a worker that is frozen holds up nobody, one that is started again sees what is so now,
and it is told without the manager.

The application finds it in its configuration, as a callable; under another launcher it is not there::

    processes = current_app.config.get("COUNTER_SERVER_PROCESSES")
    if processes is not None:
        for process in processes():     # a list of `counter_server.status.Process`: the manager, then the workers
            process.name, process.pid, process.uptime, process.restarts
"""

import ctypes
import multiprocessing
import time
from collections.abc import Sequence

from ..status import Process


class _Place(ctypes.Structure):
    """One child's. `pid` is 0 while the rest is written, and while no process fills the place."""

    _fields_ = (("pid", ctypes.c_int64), ("began", ctypes.c_double), ("starts", ctypes.c_int64))

    pid: int
    began: float  # in `time.monotonic` seconds, which all processes of a machine share
    starts: int


class Processes:
    """The children of a supervisor. Can be handed to a process that is spawned.

    :param names: of the children, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._places = multiprocessing.get_context("spawn").RawArray(_Place, len(self._names))

    def note(self, name: str, pid: int | None) -> None:
        """Note which process fills a child's place now, if any."""
        place = self._places[self._names.index(name)]
        if place.pid == (pid or 0):
            return
        place.pid = 0
        if pid is not None:
            place.began = time.monotonic()
            place.starts += 1
            place.pid = pid

    def __call__(self) -> list[Process]:
        """What is so now."""
        return [self._read(name, place) for name, place in zip(self._names, self._places, strict=True)]

    @staticmethod
    def _read(name: str, place: _Place) -> Process:
        # No lock: who is killed while holding it would stop the supervisor. A pid that is the same before and after
        # belongs to what was read in between, as the writer clears it first and writes it last.
        while True:
            pid, began, starts = place.pid, place.began, place.starts
            if place.pid == pid:
                uptime = time.monotonic() - began if pid else 0.0
                return Process(name=name, pid=pid or None, uptime=uptime, restarts=max(starts - 1, 0))
