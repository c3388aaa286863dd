"""How a manager process ends: in order when it is told to or nobody needs it, at once when it cannot be trusted."""

import logging
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from ..errors import StartupError, Stopped
from ..journal import Journal, JournalFailed
from .directory import DataDirectory
from .wire import Listener

log = logging.getLogger(__name__)

_EXIT_JOURNAL_FAILED = 74  # EX_IOERR of sysexits.h
_SECONDS_TO_STOP = 2.0
_LOOK_SECONDS = 0.5

Lifeline = multiprocessing.connection.Connection  # to the supervisor: its end is closed when that stops, or ends


def stop(_number: int, _frame: object) -> NoReturn:
    raise Stopped(0)


def fail(error: BaseException) -> NoReturn:
    """Stop at once, with nothing answered: what the disk says at the next start is what happened."""
    try:
        reason = str(error) or type(error).__name__
        sys.stderr.write(
            f"manager: {reason}; what was being written is unknown; stopping to start again from the disk\n"
        )
        sys.stderr.flush()
    finally:  # even where there is no memory for a message, or its log is on a full disk
        os._exit(_EXIT_JOURNAL_FAILED)


def keep_found(
    directory: DataDirectory,
    listener: Listener,
    is_held: Callable[[], bool],
    journal: Journal | None,
    is_ending: threading.Event,
) -> None:
    """Look now and then whether clients still find this process, and have them find it again, until it is ending.

    What it cannot put back are its directory and its journal: without them it ends.
    """
    told = ""
    while not is_ending.wait(_LOOK_SECONDS):
        if not is_held():  # then its files are nobody's, and whoever comes next begins with others
            fail(StartupError(f"the data directory {directory} was removed, or replaced by another"))
        if journal:
            try:
                journal.look_after_files()
            except JournalFailed as error:
                fail(error)
        if listener.is_found:
            continue
        try:
            directory.remove_stale_socket()
            listener.rebind()
            log.warning("the socket %s was removed; it is there again", directory.socket)
        except (StartupError, OSError) as error:
            if str(error) != told:
                log.error("no new client can connect: %s", error)
            told = str(error)


def end_with(lifeline: Lifeline) -> None:
    """Have the main thread end in order when the lifeline does; if it hangs on the disk, end without."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    end_main_thread()
    time.sleep(_SECONDS_TO_STOP)
    os._exit(1)  # a commit that hangs on the disk; it is there or it is not, and nobody waits


def end_when_idle(idle_for: Callable[[], float], seconds: float) -> None:
    """Have the main thread end when there was no client for so long. Who comes just then starts another manager."""
    while (idle := idle_for()) < seconds:
        time.sleep(seconds - idle)
    end_main_thread()


def end_main_thread() -> None:
    """Have the main thread end in order, as a signal from outside does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
