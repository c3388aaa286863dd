"""The last visits, for people to see: one list for all workers, in the manager's memory."""

import logging
import time
from collections import deque
from typing import NamedTuple

from ..errors import CounterServerError, Unsupported
from ..extension import SharedState
from ..handles import forgetful

log = logging.getLogger(__name__)

_SHOWN = 5


class Visit(NamedTuple):
    """One visit: the number it was given, the worker process that answered, and when, in seconds of Unix time."""

    number: int
    pid: int
    at: float

    @property
    def time(self) -> str:
        """The time of day, UTC."""
        return time.strftime("%H:%M:%S", time.gmtime(self.at))


class VisitLog:
    """The visits made last. The manager hosts it."""

    def __init__(self, size: int) -> None:
        self._visits: deque[tuple[int, int, float]] = deque(maxlen=size)

    def add(self, number: int, pid: int, at: float) -> list[tuple[int, int, float]]:
        """Add one, and return all, the newest first: by their numbers, whichever worker was quicker to add its own."""
        self._visits.append((number, pid, at))
        return sorted(self._visits, reverse=True)


class LastVisits:
    """The list that pages show. A visit counts without it: where it cannot be had, it is empty."""

    def __init__(self, shared: SharedState) -> None:
        self._log: VisitLog | None = None
        try:
            self._log = forgetful(shared.object("last visits", VisitLog, _SHOWN))
        except Unsupported as error:
            log.info("the home page shows no last visits: %s", error)

    def add(self, number: int, pid: int) -> list[Visit]:
        """Add the visit that is being answered, and return the last ones, the newest first."""
        if self._log is None:
            return []
        try:
            return [Visit(*visit) for visit in self._log.add(number, pid, time.time())]
        except CounterServerError as error:
            log.warning("visit %s was counted, but the last visits could not be had: %s", number, error)
            return []
