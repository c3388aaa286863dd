"""Show on standard error how far a command is: a bar at a terminal where rich is installed, else lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_BAR = 12  # columns


class Progress:
    """Draws a bar up to `total`; without a bar prints lines, one for each `interval` of progress."""

    def __init__(self, total: float, interval: float, bar: "RichProgress | None") -> None:
        self._interval = self._next = interval
        self._bar = bar
        self._task = bar.add_task("", total=total) if bar else None

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            click.echo(line, err=True)

    def show(self, done: float, what: str) -> None:
        """Show how much is done, and what happens now."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, description=what)
        elif done >= self._next:
            self._next = done + self._interval
            self.say(what)


@contextmanager
def progress(total: float, interval: float = 0.0) -> Iterator[Progress]:
    """Show progress up to `total` while the block runs."""
    bar = None
    with suppress(ImportError):  # the extra `demo` installs it
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column

            whole = Column(no_wrap=True)
            rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            bar = RichProgress(
                BarColumn(_BAR, table_column=Column(min_width=_BAR)),
                TextColumn("{task.completed:.0f}/{task.total:g}", table_column=whole),
                TimeElapsedColumn(table_column=whole.copy()),
                TextColumn("{task.description}", markup=False, table_column=rest),
                console=Console(stderr=True),
                transient=True,
                expand=True,
            )
    with bar or nullcontext():
        yield Progress(total, interval, bar)
