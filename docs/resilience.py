"""What was done to a server and survived, measured on this machine, as a block in docs/guarantees.md.

    python docs/resilience.py [MINUTES [FILE]]

soaks a server in faults for some minutes (5), kills managers with few and with many counters, counts the bad inputs
that the tests try, and writes it between the two marks of the file.
"""

import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- the figures of docs/resilience.py -->", "<!-- until here -->"

COUNTERS = ["1", "1000", "10000", "100000", "1000000"]  # that a manager has when it is killed
# The tests that try bad inputs, each input a case of its own.
BAD_INPUTS = {
    "HTTP requests, to a whole server: refused by the application": [
        "tests/test_bad_requests.py::test_a_bad_request_is_refused_by_the_whole_server_and_changes_nothing"
    ],
    "HTTP requests, to a whole server: wrong as HTTP": [
        "tests/test_bad_requests.py::test_invalid_http_is_refused_with_a_problem_document_and_changes_nothing"
    ],
    "words to the manager's socket, without the key and with it": [
        "tests/test_manager.py::test_a_peer_that_does_not_know_the_key_is_closed_and_told_nothing",
        "tests/test_manager.py::test_none_of_the_standard_servers_functions_can_be_called",
        "tests/test_manager.py::test_an_invalid_call_closes_the_connection_and_changes_nothing",
    ],
}


def python(*arguments: str) -> str:
    """What a program of the checkout prints."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(arguments)} failed")
    return done.stdout


def soaked(minutes: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        print(python("-m", "tests.soak", "--minutes", minutes, "--json", str(report)), file=sys.stderr)
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def cases(tests: list[str]) -> int:
    """How many cases they have."""
    counted = re.search(
        r"^(\d+) tests? collected", python("-m", "pytest", "--all", "--collect-only", "-q", *tests), re.MULTILINE
    )
    assert counted is not None
    return int(counted[1])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(times: list[float]) -> list[str]:
    """The median and the worst."""
    return [f"{median(times):.2f} s", f"{max(times):.2f} s"]


def of_the_faults(report: dict[str, Any]) -> str:
    times: dict[str, list[float]] = {}
    for injury in report["injuries"]:
        times.setdefault(injury["kind"], []).append(injury["recovery"])
    rows = [[kind, str(len(taken)), *seconds(taken)] for kind, taken in sorted(times.items())]
    return table(["fault", "injected and survived", "back after (median)", "worst"], rows)


def of_the_kills(recoveries: dict[str, list[float]]) -> str:
    rows = [[f"{int(counters):,}", str(len(times)), *seconds(times)] for counters, times in recoveries.items()]
    return table(["counters", "kills of the manager", "back after (median)", "worst"], rows)


def of_the_inputs() -> str:
    rows = [[what, f"{cases(tests):,}"] for what, tests in BAD_INPUTS.items()]
    return table(["bad inputs", "tried and refused"], rows)


def versions() -> str:
    cores = os.cpu_count()
    names = {"Python": sys.version.split()[0], "SQLite": sqlite3.sqlite_version, "waitress": version("waitress")}
    told = ", ".join(f"{name} {number}" for name, number in names.items())
    return f"Linux {os.uname().release}, {cores} cores; {told}"


def block(minutes: str) -> str:
    """All of it."""
    report = soaked(minutes)
    recoveries = json.loads(python("-m", "tests.benchmarks.recovery", "--json", "--counters", *COUNTERS))
    paragraphs = [
        f"In {report['seconds'] / 60:.1f} minutes {report['clients']} clients made {report['answered']:,} increments,"
        f" while {len(report['injuries'])} faults were injected, in random order (seed {report['seed']}). Each"
        f" increment was counted exactly once, {report['unknown'] or 'none'} stayed without an answer, the slowest took"
        f" {report['slowest']:.1f} s, and no process grew in memory, descriptors or threads. (A frozen worker is"
        " replaced after 3 s here, and its time is from the freezing on; for a killed supervisor another starts.)",
        of_the_faults(report),
        "From `kill -9` of the manager to the next increment that was answered, by the number of counters:",
        of_the_kills(recoveries),
        "Bad inputs. Each was refused with the right status, and changed nothing:",
        of_the_inputs(),
        f"All measured by `python docs/resilience.py` on {versions()}; the data directory of the soak was on a small"
        " file system in memory that is filled and emptied, that of the kills on the machine's disk.",
    ]
    return "\n\n".join(p if p.startswith("|") else textwrap.fill(p, 130) for p in paragraphs)


def main(minutes: str = "5", file: str = str(ROOT / "docs" / "guarantees.md")) -> None:
    path, made = Path(file), block(minutes)
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
