"""The outcome of `counter-server demo` on this machine, as a table in README.md.

    python docs/demo.py [FILE [OPTION ...]]

runs it, with the options if any are given, and writes the table between the two marks of the file.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- the outcome of docs/demo.py -->", "<!-- until here -->"
HEAD = ["server", "the number is in", "", "unique", "duplicates", "skipped", "slowest", "why"]


def row(outcome: dict[str, Any]) -> str:
    """One line of the table."""
    server, _, strategy = outcome["title"].partition(" · ")
    shown = outcome["rounds"][outcome["shown"]]
    figures = [shown["unique"], shown["duplicates"], shown["skipped"], f"{shown['slowest_seconds']:.2f} s"]
    return line([server, strategy, f"**{outcome['verdict']}**", *figures, outcome["sentence"]])


def line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(report: dict[str, Any]) -> str:
    """The whole of it, with what was left out and what it ran on."""
    lines = [line(HEAD), line(["---"] * 3 + ["---:"] * 4 + ["---"])]
    lines += [row(outcome) for outcome in report["outcomes"] if "rounds" in outcome]
    notes = [
        f"Left out: {outcome['title']}: {outcome['reason']}." for outcome in report["outcomes"] if "reason" in outcome
    ]
    rounds = "one round" if report["rounds"] == 1 else f"{report['rounds']} rounds"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    notes.append(f"{report['clients']} clients at once, {rounds}. {report['machine']}; {versions}.")
    return "\n".join(lines) + "".join(f"\n\n{textwrap.fill(note, 130)}" for note in notes)


def replaced(text: str, block: str) -> str:
    """The text, with what stands between the marks replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(file: str = "README.md", *options: str) -> None:
    command = [sys.executable, "-m", "counter_server", "demo", "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    path = Path(file)
    path.write_text(replaced(path.read_text(), table(json.loads(done.stdout))))


if __name__ == "__main__":
    main(*sys.argv[1:])
