"""One place among the supervisor's children, and the processes that fill it one after the other.

They are forked, so that they start with everything imported: that is most of what a start takes. A successor, which a
rolling replacement starts, is a new interpreter: it runs the code that is installed by then.
"""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ..errors import CounterServerError
from ..journal import REFUSALS

log = logging.getLogger(__name__)

BOOT_SECONDS = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that the supervisor acts on, and its children do not
STABLE_SECONDS = 1.0  # one that lived this long after it was ready was not in a crash loop
_FIRST_PAUSE = 0.1  # seconds before the second restart in a crash loop; doubles
_LONGEST_PAUSE = 3.0
_EXIT_NO_ROOM = 73  # EX_CANTCREAT of sysexits.h: the file system takes no writes for now

_fork, _spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


@dataclass(eq=False)
class Child:
    """One place among the children: the process that fills it now, and how its predecessors fared."""

    name: str
    target: Callable[..., None]
    arguments: tuple[Any, ...]
    beats: bool = False  # gives a sign of life every second
    anew: bool = False  # in a new interpreter
    process: BaseProcess | None = None
    lifeline: Connection | None = None  # on which it says that it is ready; closing it ends a manager
    ready_since: float | None = None
    heard_at: float = 0.0  # the last sign of life
    failures: int = 0  # deaths in a row before it was stable
    restart_at: float = 0.0

    def start(self) -> bool:
        """Have a process fill it. Whether one does: where there is no room for any, that is tried again later."""
        before: set[int] | None = None
        try:
            if self.anew:
                resource_tracker.ensure_running()  # else it is started where signals are blocked, and unblocks them
            before = _descriptors()
            self._start(before)
        except OSError as error:
            log.error("%s cannot be started for now: %s", self.name, error)
            self.let_go()
            self.process = None
            self.restart_at = time.monotonic() + _LONGEST_PAUSE
            for left_open in _descriptors() - before if before is not None else ():
                os.close(left_open)
            return False
        return True

    def _start(self, open_here: set[int]) -> None:
        context = _spawn if self.anew else _fork
        self.lifeline, theirs = context.Pipe()
        with theirs:
            given = (*self.arguments, theirs)
            kept = {0, 1, 2, *(each.fileno() for each in given if hasattr(each, "fileno"))}
            not_its_own = () if self.anew else {self.lifeline.fileno(), *open_here} - kept
            self.ready_since = None
            process = context.Process(target=_main, args=(not_its_own, self.target, *given), name=self.name)
            # A signal to the whole process group, as a terminal or a service manager sends it, is for the supervisor to
            # act on: the children inherit that these are blocked.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.process = process

    def hear(self) -> None:
        """Take note that it is ready, or lives. An end of file is followed by its death, which is seen elsewhere."""
        assert self.lifeline is not None
        try:
            while self.lifeline.poll():
                self.lifeline.recv()
                self.heard_at = time.monotonic()
                if self.ready_since is None:
                    self.ready_since = self.heard_at
        except (EOFError, OSError):
            self.let_go()

    def silent_for(self, now: float) -> float:
        """The seconds since its last sign of life, if it has to give any."""
        alive = self.beats and self.process is not None and self.ready_since is not None
        return now - self.heard_at if alive else 0.0

    @property
    def ended(self) -> bool:
        """Whether its process has died, and is not yet buried."""
        return self.process is not None and not self.process.is_alive()

    @property
    def pid(self) -> int | None:
        """Of its process, if there is one."""
        return self.process.pid if self.process is not None else None

    def end(self) -> None:
        """Kill its process, if there is one, and bury it."""
        if self.process is not None:
            self.process.kill()
            self.bury()

    def successor(self) -> "Child":
        """Another one for its place."""
        return Child(self.name, self.target, self.arguments, self.beats, anew=True)

    def let_go(self) -> None:
        """Close the lifeline."""
        if self.lifeline is not None:
            self.lifeline.close()
            self.lifeline = None

    def bury(self) -> int:
        """Count the death of its process, set when to start the next, and return the exit code."""
        assert self.process is not None
        self.let_go()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.process = None
        now = time.monotonic()
        if code == _EXIT_NO_ROOM:  # which passes, and is no failure of its own
            self.restart_at = now + _LONGEST_PAUSE
            return code
        stable = self.ready_since is not None and now - self.ready_since > STABLE_SECONDS
        self.failures = 1 if stable else self.failures + 1
        self.restart_at = now + (
            0.0 if self.failures == 1 else min(_FIRST_PAUSE * 2 ** (self.failures - 2), _LONGEST_PAUSE)
        )
        return code or 0


def _main(not_its_own: Iterable[int], target: Callable[..., None], *arguments: Any) -> None:
    """What a child process runs: `target`, its errors told in one line.

    :param not_its_own: the supervisor's descriptors, of which a fork has copies. The objects that they belong to do not
        close them again: they live on in the frames below, to which a fork never returns.
    """
    signal.set_wakeup_fd(-1)  # the supervisor's, where this is a fork of it, and so are the handlers
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for descriptor in not_its_own:
        os.close(descriptor)
    multiprocessing.set_start_method("spawn", force=True)  # it has threads: what it starts, if anything, is no fork
    try:
        target(*arguments)
    except CounterServerError as error:
        print(f"Error: {error}", file=sys.stderr)
        is_refusal = isinstance(error.__cause__, OSError) and error.__cause__.errno in REFUSALS
        sys.exit(_EXIT_NO_ROOM if is_refusal else 1)


def _descriptors() -> set[int]:
    """What this process has open."""
    return {number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)}


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:  # that of the list itself, which is closed by now
        return False
    return True
