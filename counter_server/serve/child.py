"""One place among the supervisor's children, and the processes that fill it one after the other.

They are forked, so that they start with everything imported: that is most of what a start takes. A successor, which a
rolling replacement starts, is a new interpreter: it runs the code that is installed by then.
"""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from ..errors import CounterServerError

BOOT_SECONDS = 30.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that the supervisor acts on, and its children do not
STABLE_SECONDS = 1.0  # one that lived this long after it was ready was not in a crash loop
_FIRST_PAUSE = 0.1  # seconds before the second restart in a crash loop; doubles
_LONGEST_PAUSE = 3.0

_fork, _spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


class Closable(Protocol):
    """What has a descriptor."""

    def close(self) -> None: ...


_held: set[Closable] = set()  # by the supervisor, for itself


def hold(*held: Closable) -> None:
    """Have no forked child keep its copies of these, but for what it is given as an argument."""
    _held.update(held)


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

    def start(self) -> None:
        context = _spawn if self.anew else _fork
        self.lifeline, theirs = context.Pipe()
        hold(self.lifeline)
        self.ready_since = None
        self.process = context.Process(target=_main, args=(self.target, *self.arguments, theirs), name=self.name)
        if self.anew:
            resource_tracker.ensure_running()  # else it is started below, and unblocks the signals
        # A signal to the whole process group, as a terminal or a service manager sends it, is for the supervisor to
        # act on: the children inherit that these are blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

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

    def end(self) -> int:
        """Kill its process, if it still runs, and bury it; return the exit code."""
        assert self.process is not None
        self.process.kill()
        return self.bury()

    def successor(self) -> "Child":
        """Another one for its place."""
        return Child(self.name, self.target, self.arguments, self.beats, anew=True)

    def let_go(self) -> None:
        """Close the lifeline."""
        if self.lifeline is not None:
            _held.discard(self.lifeline)
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
        stable = self.ready_since is not None and now - self.ready_since > STABLE_SECONDS
        self.failures = 1 if stable else self.failures + 1
        self.restart_at = now + (
            0.0 if self.failures == 1 else min(_FIRST_PAUSE * 2 ** (self.failures - 2), _LONGEST_PAUSE)
        )
        return code or 0


def _main(target: Callable[..., None], *arguments: Any) -> None:
    """What a child process runs: `target`, its errors told in one line."""
    signal.set_wakeup_fd(-1)  # the supervisor's, where this is a fork of it, and so are the handlers
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for held in _held:
        if held not in arguments:
            held.close()
    try:
        target(*arguments)
    except CounterServerError as error:
        sys.exit(f"Error: {error}")
