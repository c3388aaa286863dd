"""Backups and checks of a data directory: by its manager, where one runs and holds it, and else from here."""

import os
import time
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from .errors import BatchRefused, Disconnected, StartupError
from .journal import Journal, examine
from .ledger import Contents
from .manager.client import StateProxy
from .manager.directory import DataDirectory

_SECONDS = 3600.0  # that a manager may take to read or copy all that it has


def back_up(directory: DataDirectory, target: Path) -> str:
    """Copy what is durable, as it is at one moment, into the new file `target`; tell what was done.

    :raises StartupError: if there is nothing to copy, or no way to write it.
    """
    target = Path(os.path.abspath(target))
    if directory.is_held():
        size = _ask(directory, "back_up", os.fsencode(target))
    else:
        with _at_rest(directory), closing(Journal(directory.journal)) as journal:
            size = journal.back_up(target)
    return f"{target}: {size:,} bytes, of {directory.journal}"


def check(directory: DataDirectory) -> str:
    """Look at all that is durable, and in a manager that runs also whether its memory is the same; tell what is there.

    :raises StartupError: naming the file, if it is damaged.
    """
    if directory.is_held():
        counters, clients, keys = _ask(directory, "check")
        return _told(directory.journal, counters, clients, keys) + "; the manager's memory is the same"
    with _at_rest(directory):
        return check_file(directory.journal)


def check_file(path: Path) -> str:
    """Look at a backup, or at a journal that nobody uses. It is not changed.

    :raises StartupError: naming it, if it is damaged, or is none.
    """
    found: Contents = examine(path)
    return _told(path, len(found.counters), len(found.clients), len(found.keys))


def _told(path: Path, counters: int, clients: int, keys: int) -> str:
    return f"{path} is whole: {counters:,} counters, {keys:,} idempotency keys, {clients:,} clients"


def _at_rest(directory: DataDirectory) -> AbstractContextManager[object]:
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
            raise StartupError(f"the manager of {directory} could not be asked: {error}") from error
