"""`counter-server top`: what a store and its manager do, live in a terminal."""

import os
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import click

from .. import settings
from ..commands import check_lasts
from ..errors import CounterServerError, StartupError
from ..scan import beginning_with
from ..state import State, open_state
from ..status import Status
from .options import data_dir_option, store_option, url_of

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

_PERIOD = 1.0  # seconds between two samples
_WINDOW = 5  # periods in the mean of a rate
_MOST_COUNTERS = 10_000  # that are followed; the manager computes for less than 20 ms to list them
_DEADLINE = 2.0  # seconds for all answers of one sample
_WIDTH = 140  # columns without a terminal
_HEIGHT = 100  # lines of one snapshot
_LINES_OF_A_TABLE = 4  # beside its rows
_NUMBER = 7  # columns for a number, at least
_TEXTS = {"counter", "object", "class", "slowest call", "last error", "command"}  # columns that may be cut
_OF_CALLS = ("calls", "/s", "running", "errors")
_OF_ENTRIES = {"now": "entries", "most": "at most"}
_OF_ENTRIES |= {name: name for name in ("hits", "misses", "evictions", "expired")}


class Sample(NamedTuple):
    """The figures of a store at one moment."""

    time: float  # in `time.monotonic` seconds
    status: Status | None  # None: the store has no figures, or does not answer
    counters: dict[str, int]
    calls: dict[str, int]  # of each shared object
    is_whole: bool = True  # whether `counters` has all of them
    problem: str = ""  # why something is missing


class Samples:
    """The samples of the last seconds, and the rates in them. A new manager, which counts from 0, begins them again."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=_WINDOW + 1)

    @property
    def last(self) -> Sample:
        return self._samples[-1]

    def add(self, sample: Sample) -> None:
        if self._samples and (self.last.problem or _manager_of(sample) != _manager_of(self.last)):
            self._samples.clear()
        self._samples.append(sample)

    def rate(self, total: Callable[[Sample], float]) -> float | None:
        """Return by how much a total grew in a second, or None with one sample alone."""
        first, last = self._samples[0], self.last
        return None if first is last else (total(last) - total(first)) / (last.time - first.time)

    def rates(self, totals: Callable[[Sample], dict[str, int]]) -> dict[str, float | None]:
        """Return by how much each of several totals grew in a second, by its name. A new total grew from 0."""
        first, last = self._samples[0], self.last
        before, seconds = totals(first), last.time - first.time
        return {
            name: None if first is last else (total - before.get(name, 0)) / seconds
            for name, total in totals(last).items()
        }


def _manager_of(sample: Sample) -> tuple[int, str] | None:
    return (sample.status.pid, sample.status.epoch) if sample.status else None


@click.command()
@data_dir_option
@store_option
@click.option("--prefix", default="", help="Follow only counters whose names begin with this text.")
@click.option("--once", is_flag=True, help="Print one snapshot, with the rates of one second, and end.")
def top(data_dir: str | None, store: str | None, prefix: str, *, once: bool) -> None:
    """Watch counters, shared objects and processes, live. It starts nothing and counts nothing; q ends it."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise StartupError("top needs rich: pip install 'counter-server[top]'") from error

    url = url_of(store, data_dir)
    console = Console()
    with open_state(url, deadline=_DEADLINE, options=settings.StoreOptions(start=False)) as state:
        check_lasts(state.store)
        samples = Samples()
        samples.add(_sample(state, prefix))
        is_terminal = sys.stdout.isatty() and not console.is_dumb_terminal
        if once or not is_terminal:
            if not is_terminal and "COLUMNS" not in os.environ:
                console = Console(width=_WIDTH)
            _print_once(console, state, samples, prefix)
            return
        with _keyboard() as is_ended, Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_screen(state, samples, console.size.height), refresh=True)
                if is_ended(_PERIOD):
                    return
                samples.add(_sample(state, prefix))


def _print_once(console: "Console", state: State, samples: Samples, prefix: str) -> None:
    if not samples.last.problem:
        time.sleep(_PERIOD)
        samples.add(_sample(state, prefix))
    if samples.last.problem:
        raise StartupError(samples.last.problem)
    console.print(_screen(state, samples, _HEIGHT))


@contextmanager
def _keyboard() -> Iterator[Callable[[float], bool]]:
    """Return a function that waits for some seconds, and returns whether q was pressed.

    Ctrl-C and SIGTERM end the block. After it, the terminal has its former settings.
    """

    def end(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def is_ended(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while select.select([keyboard] if keyboard else [], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            if keyboard and os.read(keyboard.fileno(), 1) in (b"q", b"Q", b""):  # without a byte, the terminal is gone
                return True
        return False

    keyboard = sys.stdin if sys.stdin is not None and sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard else []
    handler = signal.signal(signal.SIGTERM, end)
    try:
        if keyboard:
            tty.setcbreak(keyboard)
        yield is_ended
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, handler)
        if keyboard:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _sample(state: State, prefix: str) -> Sample:
    deadline = time.monotonic() + _DEADLINE
    status, calls = None, {}
    try:
        status = state.status(within=_DEADLINE)
        calls = {each.name: each.calls for each in status.hosted} if status else {}
        found = beginning_with(prefix, lambda operation: state.submit(operation, within=deadline - time.monotonic()))
        counters = dict(islice(found, _MOST_COUNTERS))
        is_whole = next(found, None) is None
    except CounterServerError as error:
        return Sample(time.monotonic(), status, {}, calls, problem=str(error))
    return Sample(time.monotonic(), status, counters, calls, is_whole)


# The screen


def _screen(state: State, samples: Samples, height: int) -> "Group":
    """Draw the last sample.

    :param height: of the screen, in lines.
    """
    from rich.console import Group
    from rich.text import Text

    sample = samples.last
    lines = [Text(str(state.store), style="bold")]
    if sample.problem:
        lines.append(Text(sample.problem, style="bold red"))
    tables = []
    height -= len(lines) + _LINES_OF_A_TABLE
    if sample.status is not None:
        lines += [Text(line) for line in _head(samples, sample.status)]
        height -= 2
        rows = max(height // 4 - _LINES_OF_A_TABLE, 1)
        tables = [
            _objects(samples, sample.status, rows),
            _entries(sample.status, rows),
            _processes(sample.status, rows),
        ]
    tables = [table for table in tables if table.row_count]
    if sample.counters:  # they have all lines that are left
        height -= sum(table.row_count + _LINES_OF_A_TABLE for table in tables)
        tables.insert(0, _counters(samples, max(height, 1)))
    return Group(*lines, *(part for table in tables for part in (Text(), table)))


def _head(samples: Samples, status: Status) -> Iterator[str]:
    commits = samples.rate(lambda at: at.status.journal_commits if at.status else 0)
    busy = samples.rate(lambda at: at.status.commit_seconds if at.status else 0.0)
    mean = f", each {1000 * busy / commits:.2f} ms" if commits and busy else ""
    yield (
        f"manager {status.pid}, up {_duration(status.uptime)}, durability {status.durability},"
        f" journal {status.journal_bytes / 1e6:,.1f} MB, {status.connections:,} connections"
    )
    yield f"{_per_second(commits)} commits/s{mean}; {status.counters:,} counters, {status.objects:,} shared objects"


def _table(title: str, left_out: int, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    more = f" ({left_out:,} more)" if left_out > 0 else ""
    table = Table(title=title + more, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        if column in _TEXTS:
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        else:  # a number is shown whole
            table.add_column(column, justify="right", no_wrap=True, min_width=max(len(column), _NUMBER))
    return table


def _counters(samples: Samples, rows: int) -> "Table":
    """Show the counters that change fastest, then those with the greatest values."""
    from rich.text import Text

    values = samples.last.counters
    rates = samples.rates(lambda at: at.counters)
    order = sorted(values, key=lambda name: (-abs(rates[name] or 0.0), -abs(values[name]), name))
    which = "" if samples.last.is_whole else f", of the first {_MOST_COUNTERS:,} by name (--prefix chooses others)"
    table = _table(f"Counters{which}", len(order) - rows, "counter", "value", "/s")
    for name in order[:rows]:
        table.add_row(Text(name), f"{values[name]:,}", _per_second(rates[name]))
    return table


def _objects(samples: Samples, status: Status, rows: int) -> "Table":
    from rich.text import Text

    rates = samples.rates(lambda at: at.calls)
    order = sorted(status.hosted, key=lambda each: (-(rates[each.name] or 0.0), -each.calls, each.name))
    table = _table("Shared objects", len(order) - rows, "object", "class", *_OF_CALLS, "slowest call", "last error")
    for each in order[:rows]:
        error = "it could not be made" if each.not_made else each.last_error.kind if each.last_error else ""
        table.add_row(
            *(Text(each.name), Text(each.cls.rpartition(".")[2])),
            *(f"{each.calls:,}", _per_second(rates[each.name]), f"{each.running:,}", f"{each.errors:,}"),
            f"{each.slowest_method} {each.slowest_seconds * 1000:,.1f} ms" if each.slowest_method else "",
            Text(error.rpartition(".")[2]),
        )
    return table


def _entries(status: Status, rows: int) -> "Table":
    from rich.text import Text

    found = [(each.name, each.entries) for each in status.hosted if each.entries]
    table = _table("Dicts, caches and limits", len(found) - rows, "object", *_OF_ENTRIES.values())
    for name, entries in sorted(found, key=lambda each: (-each[1].now, each[0]))[:rows]:
        counts = [getattr(entries, field) for field in _OF_ENTRIES]
        table.add_row(Text(name), *("" if count is None else f"{count:,}" for count in counts))
    return table


def _processes(status: Status, rows: int) -> "Table":
    from rich.text import Text

    left_out = len(status.processes) - rows + status.more_processes
    table = _table("Connected processes", left_out, "pid", "connections", "for", "command")
    for each in status.processes[:rows]:
        since = _duration(max(time.time() - each.since, 0.0))
        table.add_row(str(each.pid) if each.pid else "not visible", f"{each.connections:,}", since, Text(each.command))
    return table


def _per_second(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
