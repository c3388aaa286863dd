"""The picture: for each pair a grid of the numbers, and how many clients were given each."""

import io
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .outcome import Outcome, Round

FORMATS = (".png", ".svg")

# Of Okabe and Ito: people who see fewer colours can tell them apart. The cells say it in signs, too.
ONCE = "#0072B2"
SEVERAL = "#E69F00"
NEVER = "#D9D9D9"
_WRONG = "#A33B00"

_IN_A_ROW = 10
_PANELS_IN_A_ROW = 5
_PANEL = (2.6, 3.1)  # inches
_HEAD = 0.9  # inches
_DPI = 100


def draw(outcomes: list[Outcome], file: Path) -> None:
    """Write the picture of what was shown; PNG or SVG, as the file's name ends.

    :raises OSError: if it cannot be written; nothing is left of it then.
    """
    shown = [outcome for outcome in outcomes if outcome.rounds]
    clients = len(shown[0].shown.answers)
    columns = min(_PANELS_IN_A_ROW, len(shown))
    rows = -(-len(shown) // columns)
    width, height = columns * _PANEL[0], rows * _PANEL[1] + _HEAD
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.subplots_adjust(0.2 / width, 0.1 / height, 1 - 0.2 / width, 1 - (_HEAD + 0.55) / height, 0.15, 0.4)
    figure.text(
        0.5, 1 - 0.3 / height, f"Who was given 1 to {clients}, of {clients} clients at once", ha="center", fontsize=9
    )
    _legend(figure, height)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.set_axis_off()
    for panel, outcome in zip(panels, shown, strict=False):
        _grid(panel, outcome)
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.lower()[1:])
    _write(file, picture.getvalue())


def _legend(figure: Figure, height: float) -> None:
    for place, colour, words in ((0.2, ONCE, "7 one client"), (0.5, SEVERAL, "x3 several"), (0.8, NEVER, "- nobody")):
        figure.text(
            place,
            1 - 0.65 / height,
            words,
            ha="center",
            fontsize=7,
            color=_ink(colour),
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 4},
        )


def _grid(panel: Axes, outcome: Outcome) -> None:
    shown = outcome.shown
    rows = -(-len(shown.answers) // _IN_A_ROW)
    panel.set_xlim(0, _IN_A_ROW)
    panel.set_ylim(rows, 0)
    panel.set_aspect("equal", anchor="N")
    for place in range(len(shown.answers)):
        _cell(panel, outcome, place, shown.numbers[place + 1])
    server, _, strategy = outcome.pair.title.partition(" · ")
    panel.set_title(
        f"{server}\n{strategy}\n{outcome.verdict}: {_in_words(shown)}",
        fontsize=7,
        color="black" if outcome.right else _WRONG,
    )


def _cell(panel: Axes, outcome: Outcome, place: int, clients: int) -> None:
    colour, sign = (
        (NEVER, "-") if clients == 0 else (ONCE, str(place + 1)) if clients == 1 else (SEVERAL, f"x{clients}")
    )
    row, column = divmod(place, _IN_A_ROW)
    cell = Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8)
    cell.set_gid(f"{outcome.pair.name}/{place + 1}={clients}")
    panel.add_patch(cell)
    panel.text(column + 0.5, row + 0.53, sign, ha="center", va="center", fontsize=5.5, color=_ink(colour))


def _ink(colour: str) -> str:
    return "white" if colour == ONCE else "black"


def _in_words(shown: Round) -> str:
    """The figures of a round."""
    words = f"{shown.unique} unique, {shown.duplicates} duplicates, {shown.skipped} skipped"
    return f"{words}\n{shown.unanswered} got no number" if shown.unanswered else words


def _write(file: Path, content: bytes) -> None:
    """All of it or nothing."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
