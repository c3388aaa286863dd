"""The report: a table for people, JSON for programs, and the machine that it was on."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .demonstration import Demonstration
from .outcome import Outcome, Round

if TYPE_CHECKING:
    from rich.console import RenderableType

_INDENT = 9  # columns, of the verdict
_HEAD = ("unique", "duplicates", "skipped", "slowest")
_DISTRIBUTIONS = ("counter-server", "flask", "werkzeug", "waitress", "gunicorn", "gevent", "cachelib", "flask-caching")


def machine() -> str:
    """What it ran on: processor, cores, system and Python."""
    return (
        f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()},"
        f" {platform.python_implementation()} {platform.python_version()}"
    )


def versions() -> dict[str, str]:
    """The distributions that took part, and are installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def as_json(demonstration: Demonstration, outcomes: list[Outcome]) -> str:
    """All that is known, for programs; seconds are from the barrier to the whole answer."""
    content = {
        "clients": demonstration.clients,
        "rounds": demonstration.rounds,
        "machine": machine(),
        "versions": versions(),
        "outcomes": [_outcome(outcome) for outcome in outcomes],
    }
    return msgspec.json.format(msgspec.json.encode(content)).decode()


def _outcome(outcome: Outcome) -> dict[str, Any]:
    pair = outcome.pair
    described = {"name": pair.name, "title": pair.title, "verdict": outcome.verdict}
    if outcome.left_out:
        return {**described, "reason": outcome.left_out}
    return {
        **described,
        "sentence": outcome.sentence,
        "shown": outcome.rounds.index(outcome.shown),
        "rounds": [_round(each) for each in outcome.rounds],
    }


def _round(each: Round) -> dict[str, Any]:
    return {
        "right": each.right,
        "unique": each.unique,
        "duplicates": each.duplicates,
        "skipped": each.skipped,
        "unanswered": each.unanswered,
        "slowest_seconds": round(each.slowest, 3),
        "killed_after": each.killed_after,
        "numbers": [answer.number for answer in each.answers],
        "errors": sorted({answer.error for answer in each.answers if answer.error}),
    }


def print_table(demonstration: Demonstration, outcomes: list[Outcome]) -> None:
    """For people, on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in _lines(demonstration, outcomes):
        console.print(line)
    for outcome in outcomes:
        if outcome.left_out:
            console.print(f"left out  {outcome.pair.title}: {outcome.left_out}", markup=False)
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    console.print(f"\n{machine()}; {told}", markup=False)


def _lines(demonstration: Demonstration, outcomes: list[Outcome]) -> Iterator["RenderableType"]:
    """The table, with the sentence of each row on a line of its own, so that it fits on a narrow terminal."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def row(verdict: Text, what: str, *figures: str) -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=_INDENT - 1)
        grid.add_column(ratio=1)
        for name in _HEAD:
            grid.add_column(width=len(name), justify="right")
        grid.add_row(verdict, Text(what, "bold"), *figures)
        return grid

    yield row(Text(), f"{demonstration.clients} clients at once", *_HEAD)
    for outcome in outcomes:
        if outcome.rounds:
            shown = outcome.shown
            verdict = Text("✓ right", "green") if outcome.right else Text("✗ wrong", "bold red")
            figures = (str(shown.unique), str(shown.duplicates), str(shown.skipped), f"{shown.slowest:.2f} s")
            yield row(verdict, outcome.pair.title, *figures)
            yield Padding(Text(outcome.sentence, "dim"), (0, 0, 0, _INDENT))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
