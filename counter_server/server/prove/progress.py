"""How far a proof is, on standard error: a bar at a terminal where rich is installed, else plain lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from .proof import Audience

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 5  # that say how far it is, about


@contextmanager
def audience(seconds: float) -> Iterator[Audience]:
    """Who is told, while the block runs, of a proof that is to take so long."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:  # the extra `demo` has it
        yield _Lines(seconds)
        return
    if not sys.stderr.isatty():
        yield _Lines(seconds)
        return
    from rich.console import Console

    columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total:g} s"), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress, seconds)


class _Lines:
    def __init__(self, seconds: float) -> None:
        self._interval = max(seconds / _LINES, 1.0)
        self._next = self._interval

    def tell(self, line: str) -> None:
        click.echo(line, err=True)

    def show(self, elapsed: float, answered: int) -> None:
        if elapsed >= self._next:
            self._next = elapsed + self._interval
            self.tell(f"{elapsed:.1f} s: {answered:,} increments answered")


class _Bar:
    def __init__(self, progress: "Progress", seconds: float) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=seconds)

    def tell(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def show(self, elapsed: float, answered: int) -> None:
        self._progress.update(self._task, completed=elapsed, description=f"{answered:,} increments answered")
