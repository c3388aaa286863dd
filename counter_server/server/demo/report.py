"""The report of a demonstration: a table for people, JSON for programs, and a picture."""

import io
import os
import platform
import re
from collections import Counter
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


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _DISTRIBUTIONS if find_spec(name.replace("-", "_"))}


def print_json(outcomes: list[Outcome], clients: int, rounds: int) -> None:
    """Print the outcomes for programs; seconds are from the start of all requests to the complete answer."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        rows.append({"name": outcome.pair.name, "title": outcome.pair.title, "verdict": outcome.verdict})
        if outcome.left_out:
            rows[-1]["reason"] = outcome.left_out
        else:
            shown = outcome.rounds.index(outcome.shown)
            rows[-1] |= {"sentence": outcome.sentence, "shown": shown, "rounds": outcome.rounds}
    head = {"clients": clients, "rounds": rounds, "machine": machine(), "versions": _versions()}
    click.echo(msgspec.json.format(msgspec.json.encode({**head, "outcomes": rows})))


def print_table(outcomes: list[Outcome], clients: int) -> None:
    """Print the figures of each outcome, and below its title what happened."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)

    def print_row(verdict: Text | str, title: str, *figures: object) -> None:
        columns = [Column(width=width, justify="right") for width in (6, 10, 7, 7)]
        row = Table.grid(Column(width=7), Column(ratio=1), *columns, padding=(0, 1, 0, 0), expand=True)
        row.add_row(verdict, title, *map(str, figures))
        console.print(row)

    print_row("", f"{clients} clients at once", "unique", "duplicates", "skipped", "slowest")
    for outcome in outcomes:
        if outcome.left_out:
            console.print(f"left out {outcome.pair.title}: {outcome.left_out}", markup=False)
            continue
        shown = outcome.shown
        verdict = Text("✓ right", "green") if outcome.verdict == "right" else Text("✗ wrong", "bold red")
        slowest = f"{shown.slowest_seconds:.2f} s"
        print_row(verdict, outcome.pair.title, shown.unique, shown.duplicates, shown.skipped, slowest)
        console.print(Padding(Text(outcome.sentence, "dim"), (0, 0, 0, 9)))
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    console.print(f"\n{machine()}; {versions}", markup=False)


def draw(outcomes: list[Outcome], file: Path) -> None:
    """Draw for each outcome a grid of the numbers, and how many clients got each; PNG or SVG, as the file's name ends.

    :raises OSError: if the file cannot be written; no part of it is left then.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [outcome for outcome in outcomes if outcome.rounds]
    columns = min(_PANELS_IN_A_ROW, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(columns * _PANEL[0], rows * _PANEL[1] + _HEAD), dpi=100, layout="constrained")
    legend = {"7: one client": ONCE, "x3: several": SEVERAL, "-: none": NEVER}
    figure.legend(
        handles=[Patch(facecolor=colour, label=label) for label, colour in legend.items()],
        title=f"{len(shown[0].shown.numbers)} simultaneous clients:\nhow many got each number",
        loc="outside upper center",
        ncols=3,
        fontsize=7,
        title_fontsize=9,
        columnspacing=1,
        handlelength=1,
        frameon=False,
    )
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, outcome in zip(panels, shown, strict=False):
        _draw_grid(panel, outcome)
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.lower()[1:])
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(picture.getvalue())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_grid(panel: "Axes", outcome: Outcome) -> None:
    from matplotlib.patches import Rectangle

    shown = outcome.shown
    given = Counter(shown.numbers)
    panel.set_xlim(0, _IN_A_ROW)
    panel.set_ylim(-(-len(shown.numbers) // _IN_A_ROW), 0)
    panel.set_aspect("equal", anchor="N")
    for number in range(1, len(shown.numbers) + 1):
        clients = given[number]
        row, column = divmod(number - 1, _IN_A_ROW)
        colour, sign = (SEVERAL, f"x{clients}") if clients > 1 else (ONCE, str(number)) if clients else (NEVER, "-")
        ink = "white" if colour == ONCE else "black"
        name = f"{outcome.pair.name}/{number}={clients}"
        panel.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8, gid=name))
        panel.text(column + 0.5, row + 0.53, sign, ha="center", va="center", fontsize=5.5, color=ink)
    title = outcome.pair.title.replace(" · ", "\n")
    words = f"{outcome.verdict}: {shown.unique} unique, {shown.duplicates} duplicates, {shown.skipped} skipped"
    if shown.unanswered:
        words += f"\n{shown.unanswered} got no number"
    panel.set_title(f"{title}\n{words}", fontsize=7, color="black" if outcome.verdict == "right" else _WRONG)
