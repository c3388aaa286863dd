"""The last visits, for people to see: one list for all workers, in the manager's memory."""

import logging
import time
from typing import NamedTuple

from ...errors import CounterServerError, Unsupported
from ...extension import SharedState
from ...state import forgetful
from ...windows import Recent

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


class LastVisits:
    """The list that pages show. A visit counts without it: where it cannot be had, it is empty."""

    def __init__(self, shared: SharedState) -> None:
        self._log: Recent | None = None
        try:
            self._log = forgetful(shared.object("last visits", Recent, _SHOWN))
        except Unsupported as error:
            log.info("the home page shows no last visits: %s", error)

    def add(self, number: int, pid: int) -> list[Visit]:
        """Add the visit that is being answered, and return the last ones, the newest first."""
        if self._log is None:
            return []
        try:
            return [Visit(*visit) for visit in self._log.add([number, pid, time.time()])]
        except CounterServerError as error:
            log.warning("visit %s was counted, but the last visits could not be had: %s", number, error)
            return []
