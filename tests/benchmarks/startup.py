"""The level of start-up: the time from the command to the first answer, beside the smallest server."""

import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results
from tests.processes import PATIENCE, Program

CASE = "first answer"
OURS = "python run.py"
BARE = "bare Flask and waitress"


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Start both in turn, ours on a new data directory each time."""
    for number in range(plan.rounds(bar=True)):
        for who in in_turn((OURS, BARE), number):
            say(f"start-up, round {number + 1}: {who}")
            with tempfile.TemporaryDirectory() as directory:
                port = str(_free_port())
                arguments: list[str | Path] = (
                    ["run.py", "--port", port, "--data-dir", Path(directory) / "data"]
                    if who is OURS
                    else ["-m", "tests.benchmarks.bare", port]
                )
                results.add(Place("startup", CASE, who), {"ms": _until_answered(arguments, int(port))})


def _until_answered(arguments: list[str | Path], port: int) -> float:
    """Start a program; return the milliseconds until its first answer."""
    began = time.perf_counter()
    with Program(*arguments) as program:
        while time.perf_counter() < began + PATIENCE:
            try:
                with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
                    connection.request("GET", "/")
                    if connection.getresponse().status == 200:
                        return (time.perf_counter() - began) * 1e3
            except (OSError, HTTPException):
                time.sleep(0.002)
            if not program.running:
                break
        raise RuntimeError(f"no answer of {arguments}: {program.errors}")


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])
