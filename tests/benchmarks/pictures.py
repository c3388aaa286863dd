"""The pictures: rates, growth, and the bars."""

from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from tests.benchmarks.bars import Verdict
from tests.benchmarks.results import Results

# From the palette of Okabe and Ito, which colour-blind people can distinguish.
OURS, OTHERS, SHORT = "#0072B2", "#999999", "#D55E00"
_DPI = 100


def draw(results: Results, verdicts: list[Verdict], directory: Path) -> list[Path]:
    """Write a PNG for each measured level, and one for the bars."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for level, figure in (("store", "increments/s"), ("http", "requests/s"), ("startup", "ms")):
        panels = {
            case: {who: f[figure] for who, f in medians.items()}
            for lv, case, medians in results.tables()
            if lv == level
        }
        if panels:
            files.append(_rates(panels, figure, directory / f"{level}.png"))
    if any(place.level == "growth" for place in results.figures):
        files.append(_growth(results, directory / "growth.png"))
    measured = [verdict for verdict in verdicts if verdict.figure is not None]
    if measured:
        files.append(_bars(measured, directory / "bars.png"))
    return files


def _rates(panels: dict[str, dict[str, float]], name: str, file: Path) -> Path:
    """Draw a panel for each case, with a bar for each contestant."""
    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(9, len(panels) * (0.2 * rows + 0.6) + 0.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False).flatten()
    for panel, (case, rates) in zip(axes, panels.items(), strict=True):
        bars = panel.barh(list(rates), list(rates.values()), color=[_colour(who) for who in rates])
        panel.bar_label(bars, [f" {rate:,.0f}" for rate in rates.values()], fontsize=7)
        panel.set_xscale("log")
        panel.margins(x=0.15, y=0.01)
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.set_title(f"{case}: {name}", fontsize=8, loc="left")
    figure.savefig(file)
    return file


def _colour(who: str) -> str:
    return OURS if who.startswith(("ours", "python run.py")) else OTHERS


def _growth(results: Results, file: Path) -> Path:
    """Draw the median of a call against each growing number."""
    lines: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for level, case, medians in results.tables():
        if level == "growth":
            for step, figures in medians.items():
                who, _, number = step.partition(": ")
                lines[case][who][int(number.replace(",", ""))] = figures["p50 us"]
    figure = Figure(figsize=(9, 3), dpi=_DPI, layout="constrained")
    for panel, (what, curves) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for who, points in curves.items():
            panel.plot(list(points), list(points.values()), "o-", label=who, color=OURS if "none" in who else SHORT)
        panel.set_xscale("log")
        panel.set_ylim(bottom=0)
        panel.set_title(f"median us against {what}", fontsize=8, loc="left")
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7)
    figure.savefig(file)
    return file


def _bars(verdicts: list[Verdict], file: Path) -> Path:
    """Draw each figure relative to its limit, which is 1; further right is better."""
    heights = [
        (v.figure / v.bar.limit if v.bar.at_least else v.bar.limit / v.figure) if v.figure else 0.0 for v in verdicts
    ]
    figure = Figure(figsize=(9, 0.28 * len(verdicts) + 0.8), dpi=_DPI, layout="constrained")
    panel = figure.subplots()
    drawn = panel.barh([v.bar.title for v in verdicts], heights, color=[OURS if v.reached else SHORT for v in verdicts])
    panel.bar_label(drawn, [f" {v.figure:.2f} ({v.words})" for v in verdicts], fontsize=7)
    panel.axvline(1, color="black", linewidth=1)
    panel.margins(x=0.25, y=0.01)
    panel.invert_yaxis()
    panel.tick_params(labelsize=7)
    panel.set_title("the bars: 1 is the limit, and more is better", fontsize=8, loc="left")
    figure.savefig(file)
    return file
