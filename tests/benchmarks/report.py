"""The report: tables for people, JSON for programs, and a description of the machine."""

import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from counter_server.server.demo.report import machine
from tests.benchmarks.bars import Verdict
from tests.benchmarks.results import Results

_DISTRIBUTIONS = (
    "flask", "waitress", "msgspec", "redis", "hiredis", "pymemcache", "psycopg", "sqlalchemy", "diskcache", "cachelib",
    "pyro5",
)  # fmt: skip
_WIDTH = 130  # columns
_PROGRAMS = ("redis-server", "memcached", "postgres", "wrk")


def versions() -> dict[str, str]:
    """Return the versions of the installed participants."""
    found = {"sqlite": sqlite3.sqlite_version}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for name in _PROGRAMS:
        program = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
        if program:
            told = subprocess.run([program, "-v" if name == "wrk" else "--version"], capture_output=True, text=True)
            number = re.search(r"\d+\.\d+(\.\d+)?", told.stdout + told.stderr)
            found[name] = number[0] if number else "of an unknown version"
    return found


def measured_on(load: float) -> str:
    """Describe machine, load and versions in a sentence."""
    told = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"{machine()}, with a load of {load:.1f} at the start; {told}"


def as_json(results: Results, verdicts: list[Verdict]) -> bytes:
    """Encode everything, with each figure of every round."""
    content = {
        "machine": machine(),
        "load": results.load,
        "versions": versions(),
        "figures": [{**place._asdict(), "rounds": figures} for place, figures in results.figures.items()],
        "missing": results.missing,
        "bars": [
            {"title": v.bar.title, "figure": v.figure, "limit": v.bar.limit, "at_least": v.bar.at_least, "is": v.words}
            for v in verdicts
        ],
    }
    return msgspec.json.format(msgspec.json.encode(content))


def spelled(name: str, figure: float | None) -> str:
    """Format a figure with its significant digits; empty for None."""
    if figure is None:
        return ""
    digits = 0 if name == "wrong" or abs(figure) >= 100 else 1
    return f"{figure:,.{digits}f}"


def rows(medians: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    """Yield the head of a table, then a line for each contestant; omit the column "wrong" if all numbers were right."""
    names = list(dict.fromkeys(name for figures in medians.values() for name in figures))
    names = [name for name in names if name != "wrong" or any(figures.get("wrong") for figures in medians.values())]
    yield ["", *names]
    for who, figures in medians.items():
        yield [who, *(spelled(name, figures.get(name)) for name in names)]


def limit_of(verdict: Verdict) -> str:
    """Return the limit of a bar in words."""
    return f"{'at least' if verdict.bar.at_least else 'at most'} {verdict.bar.limit:g}"


def figure_of(verdict: Verdict) -> str:
    """Return the figure of a bar with two decimals."""
    return "-" if verdict.figure is None else f"{verdict.figure:.2f}"


def print_tables(results: Results, verdicts: list[Verdict]) -> None:
    """Print the tables on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH  # in a file nothing is cut
    for level, case, medians in results.tables():
        head, *lines = rows(medians)
        table = Table(title=f"{level}: {case}", title_justify="left")
        for name in head:
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    if verdicts:
        table = Table(title="bars", title_justify="left")
        for name in ("bar", "limit", "measured", ""):
            table.add_column(name, justify="right" if name == "measured" else "left")
        for verdict in verdicts:
            colour = "green" if verdict.reached else "yellow" if verdict.figure is None else "bold red"
            table.add_row(verdict.bar.title, limit_of(verdict), figure_of(verdict), f"[{colour}]{verdict.words}")
        console.print(table)
    for name, reason in results.missing.items():
        console.print(f"missing  {name}: {reason}", markup=False)
    for place, wrong in results.wrong().items():
        console.print(f"wrong  {' '.join(place)}: {wrong:,} expected numbers were not received", markup=False)
    console.print(measured_on(results.load), markup=False)
