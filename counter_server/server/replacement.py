"""The workers replaced one by one, with none less at any moment."""

import logging
import os
import signal
import time

from .child import BOOT_SECONDS, Child
from .worker import DRAIN_SECONDS, LINGER_SECONDS

log = logging.getLogger(__name__)


class Replacement:
    """Puts new processes into the places of all workers: each when it is ready, and then the old one retires.

    :param workers: the places; changed here.
    """

    def __init__(self, workers: list[Child]) -> None:
        self._workers = workers
        self._to_do: list[Child] = []  # whose first is being replaced by
        self._next: Child | None = None
        self._deadline = 0.0  # when that has to be ready
        self._again = False
        self._retired: dict[Child, float] = {}  # and when each has to be gone

    @property
    def children(self) -> list[Child]:
        """Those that are in no place: not yet, or no more."""
        return [*self._retired, *([self._next] if self._next else [])]

    def begin(self) -> None:
        """Have all be replaced that are in their places now; while others are, when those have been."""
        if self._to_do:
            self._again = True
        else:
            self._to_do = list(self._workers)
            self._start()

    def go_on(self) -> bool:
        """Do what can be done by now; whether that was the end of it."""
        now = time.monotonic()
        self._bury_retired(now)
        new = self._next
        if new is None:
            return False
        if new.ready_since is not None:
            self._install(new, self._to_do.pop(0), now)
        elif new.process is None or new.ended or now > self._deadline:
            log.error("a new %s does not start; the old ones go on", new.name)
            new.end()
            self._to_do = []
        else:
            return False
        self._next = None
        if not self._to_do and self._again:
            self._again = False
            self._to_do = list(self._workers)
        if self._to_do:
            self._start()
        return self._next is None

    def _start(self) -> None:
        self._next = self._to_do[0].successor()
        self._deadline = time.monotonic() + BOOT_SECONDS
        self._next.start()

    def _install(self, new: Child, old: Child, now: float) -> None:
        log.info("%s: pid %s takes the place of pid %s", new.name, new.pid, old.pid)
        self._workers[self._workers.index(old)] = new
        if old.pid is not None:
            if not old.ended:
                os.kill(old.pid, signal.SIGHUP)
            self._retired[old] = now + LINGER_SECONDS + DRAIN_SECONDS + 1

    def _bury_retired(self, now: float) -> None:
        for child, deadline in list(self._retired.items()):
            if child.ended or now > deadline:
                child.end()
                del self._retired[child]
