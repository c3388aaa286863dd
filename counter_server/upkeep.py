"""Backups and checks of a data directory, by the manager that holds it, or in this process if none is running."""

import os
import time
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from .errors import BatchRefused, Disconnected, StartupError
from .journal import Journal
from .journal_file import examine
from .manager.client import StateProxy
from .manager.directory import DataDirectory

_SECONDS = 3600.0  # for the manager to read or copy all its data


def back_up(directory: DataDirectory, target: Path) -> str:
    """Copy all durable data, as of one moment, into the new file `target`. Return a report.

    :raises StartupError: if there is no data, or the file cannot be written.
    """
    target = Path(os.path.abspath(target))
    if directory.is_held():
        size = _ask(directory, "back_up", os.fsencode(target))
    else:
        with _unused(directory), closing(Journal(directory.journal)) as journal:
            size = journal.back_up(target)
    return f"{target}: {size:,} bytes, of {directory.journal}"


def check(directory: DataDirectory) -> str:
    """Check all durable data, and a running manager's memory against it. Return a report.

    :raises StartupError: with the file's name, if it is damaged.
    """
    if directory.is_held():
        found = _ask(directory, "check")
        return _report(directory.journal, *found) + "; the manager's memory is the same"
    with _unused(directory):
        return check_file(directory.journal)


def check_file(path: Path) -> str:
    """Check a backup, or an unused journal, without changing it. Return a report.

    :raises StartupError: with the file's name, if it is damaged or not a journal.
    """
    found = examine(path)
    return _report(path, len(found.counters), len(found.clients), len(found.keys))


def _report(path: Path, counters: int, clients: int, keys: int) -> str:
    return f"{path} is whole: {counters:,} counters, {keys:,} idempotency keys, {clients:,} clients"


def _unused(directory: DataDirectory) -> AbstractContextManager[object]:
    if not directory.journal.exists():
        raise StartupError(f"there is no journal in {directory}")
    return directory.hold()


def _ask(directory: DataDirectory, method: str, *arguments: bytes) -> Any:
    with closing(StateProxy(directory)) as proxy:
        try:
            return proxy.ask(method, arguments, time.monotonic() + _SECONDS)
        except BatchRefused as error:
            raise StartupError(str(error)) from error
        except Disconnected as error:
            raise StartupError(f"the manager of {directory} did not answer: {error}") from error
