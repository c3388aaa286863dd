"""Writes the results of a run into docs/performance.md, between two markers."""

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.benchmarks.bars import Verdict
from tests.benchmarks.reasons import WHY
from tests.benchmarks.report import figure_of, limit_of, measured_on, rows
from tests.benchmarks.results import Results

BEGIN = "<!-- measured: begin (written by python -m tests.benchmarks --document) -->"
END = "<!-- measured: end -->"
_LEVELS = {
    "store": "Store",
    "http": "HTTP",
    "thread": "One thread",
    "growth": "Growth",
    "startup": "Start-up",
    "pages": "Pages",
}


def write(document: Path, results: Results, verdicts: list[Verdict], pictures: Iterable[Path]) -> None:
    """Put the results into `document`, and the pictures into `pictures` beside it.

    :raises ValueError: if the markers are missing.
    """
    text = document.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no place for the results: {BEGIN} and {END}")
    beside = document.parent / "pictures"
    beside.mkdir(exist_ok=True)
    names = [Path(shutil.copy(picture, beside)).name for picture in pictures]
    block = "\n".join(_lines(results, verdicts, names))
    document.write_text(f"{head}{BEGIN}\n\n{block}\n{END}{tail}")


def _lines(results: Results, verdicts: list[Verdict], pictures: list[str]) -> Iterator[str]:
    yield _wrapped(f"Measured on {measured_on(results.load)}.") + "\n"
    yield "| bar | limit | measured | |"
    yield "| --- | ---: | ---: | --- |"
    for verdict in verdicts:
        words = verdict.words if verdict.reached else f"**{verdict.words}**"
        yield f"| {verdict.bar.title} | {limit_of(verdict)} | {figure_of(verdict)} | {words} |"
    yield ""
    short = [verdict for verdict in verdicts if verdict.figure is not None and not verdict.reached]
    for verdict in short:
        yield _wrapped(f"- **{verdict.bar.title}**: {WHY.get(verdict.bar.title, 'not looked into yet')}.", "  ")
    if short:
        yield ""
    shown = ""
    for level, case, medians in results.tables():
        if level != shown:
            shown = level
            yield f"### {_LEVELS[level]}\n"
            if f"{level}.png" in pictures:
                yield f"![{_LEVELS[level]}: the medians below as bars](pictures/{level}.png)\n"
        head, *lines = rows(medians)
        yield f"| {' | '.join([case, *head[1:]])} |"
        yield f"| --- |{' ---: |' * (len(head) - 1)}"
        yield from (f"| {' | '.join(line)} |" for line in lines)
        yield ""
    for name, reason in results.missing.items():
        yield f"Missing: {name}: {reason}.\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 138, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
