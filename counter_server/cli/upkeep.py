"""The commands for a manager and its data: `stop`, `backup`, `check` and `doctor`."""

import os
import sys
import time
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import click

from .. import settings
from ..commands import check_file, show
from ..errors import BatchRefused, CounterServerError, DirectoryHeld, Disconnected, StartupError
from ..manager.directory import DataDirectory
from ..store import Finding
from ..stores import open_store
from .options import data_dir_option, directory_of, store_option, url_of

_SECONDS_TO_STOP = 10.0
_SECONDS_OF_UPKEEP = 3600.0  # for the manager to read or copy all its data


@click.command()
@data_dir_option
def stop(data_dir: str | None) -> None:
    """Stop a directory's manager cleanly. All its data is kept, and the next use starts another manager."""
    from ..manager.client import end_manager

    directory = directory_of(data_dir)
    try:
        pid = end_manager(directory, _SECONDS_TO_STOP)
    except DirectoryHeld as error:
        raise click.ClickException(str(error)) from error
    if pid is None:
        raise click.ClickException(f"no manager is running in {directory}")
    show(f"The manager (pid {pid}) has ended." if pid else "The manager has ended.")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), callback=check_file)
@data_dir_option
def backup(file: Path, data_dir: str | None) -> None:
    """Copy all durable data into a new FILE, whether or not a manager is running.

    To restore it, copy FILE to journal.sqlite3 in the data directory while no manager is running, and remove
    journal.sqlite3-wal if it exists. Numbers that were returned after the backup will be returned again.
    """
    from ..journal import Journal

    directory, target = directory_of(data_dir), Path(os.path.abspath(file))
    if directory.is_held():
        size = _ask_manager(directory, "back_up", os.fsencode(target))
    else:
        with _unused(directory), closing(Journal(directory.journal)) as journal:
            size = journal.back_up(target)
    show(f"{target}: {size:,} bytes, of {directory.journal}")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), callback=check_file, required=False)
@data_dir_option
def check(file: Path | None, data_dir: str | None) -> None:
    """Check the journal, or the backup FILE, for damage. Exit status 0 if there is none, else 1.

    If a manager is running, its memory is compared with the journal.
    """
    from ..journal import read_checked

    directory = directory_of(data_dir)
    path = file or directory.journal
    memory = ""
    if file is None and directory.is_held():
        counters, clients, keys = _ask_manager(directory, "check")
        memory = "; the manager's memory is the same"
    else:
        with nullcontext() if file else _unused(directory):
            found = read_checked(path)
        counters, clients, keys = len(found.counters), len(found.clients), len(found.keys)
    show(f"{path} is whole: {counters:,} counters, {keys:,} idempotency keys, {clients:,} clients{memory}")


def _unused(directory: DataDirectory) -> AbstractContextManager[object]:
    if not directory.journal.exists():
        raise StartupError(f"{directory} contains no journal")
    return directory.hold()


def _ask_manager(directory: DataDirectory, method: str, *arguments: bytes) -> Any:
    from ..manager.client import StateProxy

    with closing(StateProxy(directory)) as proxy:
        try:
            return proxy.ask(method, arguments, time.monotonic() + _SECONDS_OF_UPKEEP)
        except BatchRefused as error:
            raise StartupError(str(error)) from error
        except Disconnected as error:
            raise StartupError(f"the manager of {directory} did not answer: {error}") from error


@click.command()
@data_dir_option
@store_option
def doctor(data_dir: str | None, store: str | None) -> None:
    """Ask the store's server whether it can lose numbers. Exit status 0 if no risk was found."""
    name, findings = diagnose(url_of(store, data_dir), settings.DEFAULT_DEADLINE)
    show(name)
    for finding in findings:
        show(f"{finding.level:<8}  {finding.sentence}")
    sys.exit(1 if any(finding.level != "ok" for finding in findings) else 0)


def diagnose(url: str, seconds: float) -> tuple[str, list[Finding]]:
    """Return the store's name and the findings about its server. No manager is started.

    :param seconds: the time limit.
    :raises InvalidRequest: if there is no such store.
    """
    store = open_store(url, settings.StoreOptions(start=False))
    try:
        return str(store), store.findings(time.monotonic() + seconds)
    except (CounterServerError, Disconnected) as error:
        return str(store), [Finding("problem", str(error))]
    finally:
        store.close()
