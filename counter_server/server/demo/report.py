"""The report of a demonstration: a table for people, JSON for programs, and a picture."""

import io
import os
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .runner import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DISTRIBUTIONS = ("counter-server", "flask", "werkzeug", "waitress", "gunicorn", "gevent", "cachelib", "flask-caching")

# Of Okabe and Ito: people with any colour vision can distinguish them. The cells have signs, too.
ONCE, SEVERAL, NEVER = "#0072B2", "#E69F00", "#D9D9D9"
_WRONG = "#A33B00"
_IN_A_ROW = 10  # cells
_PANELS_IN_A_ROW = 5
_PANEL = (2.6, 3.1)  # inches
_HEAD = 0.9  # inches


def machine() -> str:
    """Describe this machine: processor, cores, system and Python."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return (
        f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
        f" {platform.release()}, {platform.python_implementation()} {platform.python_version()}"
    )


def versions() -> dict[str, str]:
    """Return the versions of the installed distributions that take part."""
    return {name: version(name) for name in _DISTRIBUTIONS if find_spec(name.replace("-", "_"))}


def as_json(outcomes: list[Outcome], clients: int, rounds: int) -> str:
    """Format the outcomes for programs; seconds are from the start of all requests to the complete answer."""
    content = {"clients": clients, "rounds": rounds, "machine": machine(), "versions": versions()}
    described = [
        {"name": outcome.pair.name, "title": outcome.pair.title, "verdict": outcome.verdict}
        | ({"reason": outcome.left_out} if outcome.left_out else _rounds(outcome))
        for outcome in outcomes
    ]
    return msgspec.json.format(msgspec.json.encode({**content, "outcomes": described})).decode()


def _rounds(outcome: Outcome) -> dict[str, Any]:
    shown = outcome.rounds.index(outcome.shown)
    return {"sentence": outcome.sentence, "shown": shown, "rounds": outcome.rounds}


def table(outcomes: list[Outcome], clients: int, width: int) -> Iterator[str]:
    """Yield the lines of the table, with the sentence of each row on lines of its own."""
    room = max(width - 43, 20)

    def row(verdict: str, title: str, *figures: str) -> Iterator[str]:
        unique, duplicates, skipped, slowest = figures
        first, *rest = textwrap.wrap(title, room)
        yield f"{verdict} {first:<{room}} {unique:>6} {duplicates:>10} {skipped:>7} {slowest:>7}"
        for line in rest:
            yield f"{'':<8} {line}"

    yield from row(f"{'':<8}", f"{clients} clients at once", "unique", "duplicates", "skipped", "slowest")
    for outcome in outcomes:
        if outcome.left_out:
            yield f"left out  {outcome.pair.title}: {outcome.left_out}"
            continue
        shown = outcome.shown
        right = outcome.verdict == "right"
        verdict = click.style("✓ right ", "green") if right else click.style("✗ wrong ", "red", bold=True)
        figures = (str(shown.unique), str(shown.duplicates), str(shown.skipped), f"{shown.slowest_seconds:.2f} s")
        yield from row(verdict, outcome.pair.title, *figures)
        for line in textwrap.wrap(outcome.sentence, width - 9):
            yield f"{'':<8} {click.style(line, dim=True)}"
    yield ""
    yield from textwrap.wrap(
        f"{machine()}; {', '.join(f'{name} {number}' for name, number in versions().items())}", width
    )


def draw(outcomes: list[Outcome], file: Path) -> None:
    """Draw for each outcome a grid of the numbers, and how many clients got each; PNG or SVG, as the file's name ends.

    :raises OSError: if the file cannot be written; no part of it is left then.
    """
    from matplotlib.figure import Figure

    shown = [outcome for outcome in outcomes if outcome.rounds]
    clients = len(shown[0].shown.numbers)
    columns = min(_PANELS_IN_A_ROW, len(shown))
    rows = -(-len(shown) // columns)
    width, height = columns * _PANEL[0], rows * _PANEL[1] + _HEAD
    figure = Figure(figsize=(width, height), dpi=100)
    figure.subplots_adjust(0.2 / width, 0.1 / height, 1 - 0.2 / width, 1 - (_HEAD + 0.55) / height, 0.15, 0.4)
    title = f"How many of {clients} simultaneous clients got each number"
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", fontsize=9)
    for place, colour, words in ((0.2, ONCE, "7 one client"), (0.5, SEVERAL, "x3 several"), (0.8, NEVER, "- none")):
        box = {"facecolor": colour, "edgecolor": "none", "pad": 4}
        figure.text(place, 1 - 0.65 / height, words, ha="center", fontsize=7, color=_ink(colour), bbox=box)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, outcome in zip(panels, shown, strict=False):
        _grid(panel, outcome)
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.lower()[1:])
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(picture.getvalue())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _grid(panel: "Axes", outcome: Outcome) -> None:
    from matplotlib.patches import Rectangle

    shown = outcome.shown
    given = Counter(shown.numbers)
    panel.set_xlim(0, _IN_A_ROW)
    panel.set_ylim(-(-len(shown.numbers) // _IN_A_ROW), 0)
    panel.set_aspect("equal", anchor="N")
    for place in range(len(shown.numbers)):
        clients = given[place + 1]
        row, column = divmod(place, _IN_A_ROW)
        colour, sign = (SEVERAL, f"x{clients}") if clients > 1 else (ONCE, f"{place + 1}") if clients else (NEVER, "-")
        cell = Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8)
        cell.set_gid(f"{outcome.pair.name}/{place + 1}={clients}")
        panel.add_patch(cell)
        panel.text(column + 0.5, row + 0.53, sign, ha="center", va="center", fontsize=5.5, color=_ink(colour))
    server, _, strategy = outcome.pair.title.partition(" · ")
    words = f"{shown.unique} unique, {shown.duplicates} duplicates, {shown.skipped} skipped"
    if shown.unanswered:
        words += f"\n{shown.unanswered} got no number"
    colour = "black" if outcome.verdict == "right" else _WRONG
    panel.set_title(f"{server}\n{strategy}\n{outcome.verdict}: {words}", fontsize=7, color=colour)


def _ink(colour: str) -> str:
    return "white" if colour == ONCE else "black"
