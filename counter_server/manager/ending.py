"""How a manager process ends: in order when it is asked to or idle, at once when its state cannot be trusted."""

import logging
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, main_thread
from typing import NoReturn

from ..errors import StartupError, Stopped
from ..journal import Journal, JournalFailed
from .directory import DataDirectory
from .wire import Listener

log = logging.getLogger(__name__)

_SECONDS_TO_STOP = 2.0
_LOOK_SECONDS = 0.5

Lifeline = multiprocessing.connection.Connection  # to the supervisor, which closes its end when it stops or dies


def stop(_number: int, _frame: object) -> NoReturn:
    raise Stopped(0)


def fail(error: BaseException) -> NoReturn:
    """End the process at once, without an answer: the next start reads from the disk what happened."""
    try:
        reason = str(error) or type(error).__name__
        sys.stderr.write(f"manager: {reason}; the last write is unknown; stopping to start again from the disk\n")
        sys.stderr.flush()
    finally:  # even without memory for a message, or with a log on a full disk
        os._exit(74)  # EX_IOERR of sysexits.h


def keep_found(
    directory: DataDirectory, listener: Listener, is_held: Callable[[], bool], journal: Journal | None, is_ending: Event
) -> None:
    """Restore the socket when its file vanishes; end the process when its directory or journal does."""
    reported = ""
    while not is_ending.wait(_LOOK_SECONDS):
        if not is_held():  # another manager may begin with other files
            fail(StartupError(f"the data directory {directory} was removed, or replaced by another"))
        try:
            if journal:
                journal.look_after_files()
            if not listener.is_found:
                directory.remove_stale_socket()
                listener.rebind()
                log.warning("the socket %s was removed; a new one is in its place", directory.socket)
        except JournalFailed as error:
            fail(error)
        except (StartupError, OSError) as error:
            if str(error) != reported:
                log.error("no new client can connect: %s", error)
            reported = str(error)


def end_with(lifeline: Lifeline) -> None:
    """End the main thread in order when the lifeline ends, and the process if that hangs on the disk."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    end_main_thread()
    time.sleep(_SECONDS_TO_STOP)
    os._exit(1)  # a commit that hangs is on the disk or is not, and no client waits for it


def end_when_idle(idle_for: Callable[[], float], seconds: float) -> None:
    """End the main thread after `seconds` without a client. A client that comes just then starts another manager."""
    while (idle := idle_for()) < seconds:
        time.sleep(seconds - idle)
    end_main_thread()


def end_main_thread() -> None:
    """End the main thread in order, as a signal from outside does."""
    signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR1)
