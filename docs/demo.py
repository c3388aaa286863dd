"""Write the outcome of `counter-server demo` on this machine into README.md (five rows) and docs/race.md (all rows).

    python docs/demo.py [DIRECTORY [OPTION ...]]

runs the demonstration, with the options if there are any, and replaces the table between the two marks of each file
below DIRECTORY, which is the current one by default.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- the outcome of docs/demo.py -->", "<!-- until here -->"
HEAD = ["server", "the number is in", "", "unique", "duplicates", "skipped", "slowest", "why"]
IN_README = ["development/global", "threaded/global", "waitress/lock", "gunicorn/textbook-killed", "gunicorn/ours"]


def row(outcome: dict[str, Any]) -> str:
    server, _, strategy = outcome["title"].partition(" · ")
    shown = outcome["rounds"][outcome["shown"]]
    figures = [shown["unique"], shown["duplicates"], shown["skipped"], f"{shown['slowest_seconds']:.2f} s"]
    return line([server, strategy, f"**{outcome['verdict']}**", *figures, outcome["sentence"]])


def line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(report: dict[str, Any], outcomes: list[dict[str, Any]]) -> str:
    """Format outcomes as a table, followed by the omitted ones and the machine."""
    lines = [line(HEAD), line(["---"] * 3 + ["---:"] * 4 + ["---"])]
    lines += [row(outcome) for outcome in outcomes if "rounds" in outcome]
    notes = [f"Left out: {outcome['title']}: {outcome['reason']}." for outcome in outcomes if "reason" in outcome]
    rounds = "one round" if report["rounds"] == 1 else f"{report['rounds']} rounds"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    notes.append(f"{report['clients']} clients at once, {rounds}. {report['machine']}; {versions}.")
    return "\n".join(lines) + "".join(f"\n\n{textwrap.fill(note, 130)}" for note in notes)


def replace(file: Path, block: str) -> None:
    """Replace the text between the marks of a file."""
    before, rest = file.read_text().split(BEGIN)
    _, after = rest.split(END)
    file.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")


def main(directory: str = ".", *options: str) -> None:
    command = [sys.executable, "-m", "counter_server", "demo", "--json", *options]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    outcomes = report["outcomes"]
    replace(Path(directory, "docs", "race.md"), table(report, outcomes))
    replace(
        Path(directory, "README.md"), table(report, [outcome for outcome in outcomes if outcome["name"] in IN_README])
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
