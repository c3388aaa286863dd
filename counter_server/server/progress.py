"""Show on standard error how far a command is: a bar at a terminal where rich is installed, else lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_BAR = 12  # columns


class Progress:
    """Lines, as a log takes them.

    :param interval: the least progress between two lines that `show` prints.
    """

    def __init__(self, interval: float) -> None:
        self._interval = self._next = interval

    def say(self, line: str) -> None:
        """Print a line that stays."""
        print(line, file=sys.stderr, flush=True)

    def show(self, done: float, what: str) -> None:
        """Show how much is done, and what happens now."""
        if done >= self._next:
            self._next = done + self._interval
            self.say(what)


class _Bar(Progress):
    def __init__(self, bar: "RichProgress", total: float) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def show(self, done: float, what: str) -> None:
        self._bar.update(self._task, completed=done, description=what)


@contextmanager
def progress(total: float, interval: float = 0.0) -> Iterator[Progress]:
    """Show progress while the block runs, up to `total`."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column
    except ImportError:  # the extra `demo` installs it
        yield Progress(interval)
        return
    if not sys.stderr.isatty():
        yield Progress(interval)
        return
    columns = (
        BarColumn(_BAR, table_column=Column(min_width=_BAR)),
        TextColumn("{task.completed:.0f}/{task.total:g}", table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        yield _Bar(bar, total)
