"""Measure recovery: the time from `kill -9` of the manager to the next increment answered over HTTP.

    python -m tests.benchmarks.recovery [--counters 1 1000 1000000] [--kills 5] [--json]

It uses a real server of two workers with durability commit and counters in its journal, and one client.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from counter_server.manager.directory import DataDirectory
from counter_server.server.prove.load import Client
from counter_server.server.prove.proof import group_members
from counter_server.server.supervisor import STABLE_SECONDS
from tests.benchmarks.pages import fill
from tests.processes import PATIENCE, Server, eventually


def recoveries(counters: int, kills: int) -> list[float]:
    """Return the seconds of recovery of each kill."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory, "data")
        with Server("--workers", "2", "--data-dir", data_dir) as server, closing(Client(server.url)) as client:
            fill(DataDirectory(data_dir).url, counters)
            return [_recovery(server, client, f"kill-{number}") for number in range(kills)]


def _recovery(server: Server, client: Client, key: str) -> float:
    time.sleep(STABLE_SECONDS + 0.5)  # a manager killed earlier would count as part of a crash loop
    (manager,) = server.children("manager")
    killed = time.monotonic()
    os.kill(manager, signal.SIGKILL)
    eventually(lambda: manager not in group_members(server.pid), "the end of the manager")
    operation = client.increment("counted", key, killed + PATIENCE)
    if operation.returned is None:
        raise AssertionError(f"no increment was answered within {PATIENCE} s of the kill")
    return operation.returned - killed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.recovery")
    parser.add_argument("--counters", type=int, nargs="+", default=[1, 1000, 1_000_000])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the seconds of each kill, by the number of counters")
    options = parser.parse_args()
    found = {}
    for counters in options.counters:
        found[counters] = taken = recoveries(counters, options.kills)
        line = (
            f"{counters:>9,} counters: {median(taken):.2f} s (median), {max(taken):.2f} s (worst) of {len(taken)} kills"
        )
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
