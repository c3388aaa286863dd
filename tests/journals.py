"""Journals with known contents after each commit, to be damaged by tests."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from counter_server.journal import Journal
from counter_server.ledger import Changes, ClientRecord, Contents, KeyRecord


def written(directory: Path) -> tuple[dict[str, bytes], list[Contents]]:
    """Make a journal of 30 commits; return its files while much is in the log, and its contents after each commit.

    Then close it, which folds the log in.
    """
    directory.mkdir()
    with closing(Journal(directory / "journal")) as journal:
        states = [Contents()]
        for number in range(1, 31):
            journal.commit(_changes(number))
            states.append(journal.load())
            if number == 15:
                journal._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        return {path.name: path.read_bytes() for path in directory.iterdir()}, states


def _changes(number: int) -> Changes:
    return Changes(
        now=number,
        counters={"a": number, f"{number:040}": number},
        clients={bytes([number % 5]) * 16: ClientRecord(number, [number], number)},
        keys={f"k{number}": KeyRecord(b"f" * 16, number, number)},
        objects={"o": bytes([number]) * 30},
    )


class Committing:
    """A journal whose commits a test makes."""

    def __init__(self, commit: Callable[[Changes], None]) -> None:
        self.commit = commit
