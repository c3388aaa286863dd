"""What is told while the demonstration works: a bar on a terminal, lines anywhere else."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .outcome import Outcome

_BAR = 12  # columns


class Progress(Protocol):
    """Is told what happens."""

    def tell(self, what: str) -> None:
        """In a few words."""

    def done(self, outcome: Outcome) -> None:
        """A pair is through."""


class _Lines:
    """For a log."""

    def tell(self, what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    def done(self, outcome: Outcome) -> None:
        self.tell(in_a_line(outcome))


@contextmanager
def progress(pairs: int) -> Iterator[Progress]:
    """On standard error, for as long as the block runs."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    room = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # what is left by the others
    columns = (
        BarColumn(_BAR, table_column=Column(min_width=_BAR)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=room),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("", total=pairs)

        class Bar:
            def tell(self, what: str) -> None:
                bar.update(task, description=what)

            def done(self, outcome: Outcome) -> None:
                bar.console.print(in_a_line(outcome), markup=False, highlight=False)
                bar.advance(task)

        yield Bar()


def in_a_line(outcome: Outcome) -> str:
    """The verdict on a pair."""
    return f"{outcome.verdict:<8}  {outcome.pair.title}"
