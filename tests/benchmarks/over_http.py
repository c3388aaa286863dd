"""The level of HTTP: requests per second, their latency and their processor time."""

import json
import math
import os
import re
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from counter_server.settings import DURABILITIES
from tests.benchmarks.application import PATH
from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results
from tests.engines import PostgresServer, RedisServer, find
from tests.processes import PATIENCE, Manager, Program

WORKERS = (1, 2, 4)
CONNECTIONS = (32, 256)
BAR = (2, 32)  # for the bars: the default number of workers on two cores
BARE = "bare view (wrong)"
PLAIN_REDIS = "view with redis-py"
_POST = str(Path(__file__).with_name("post.lua"))
_TICK = os.sysconf("SC_CLK_TCK")
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}


def case_of(workers: int, connections: int) -> str:
    """Return the results' name for a case."""
    return f"{workers} worker{'' if workers == 1 else 's'}, {connections} connections"


@dataclass(frozen=True)
class Contestant:
    """A way to serve numbers.

    :param command: starts it; the number of workers is missing.
    :param pid: of the running server of its store.
    :param shared: whether all workers share the numbers, so that the total can be checked.
    """

    name: str
    command: tuple[str, ...]
    pid: int | None = None
    shared: bool = True


class Application(Program):
    """A contestant, ready for requests."""

    def __init__(self, contestant: Contestant, workers: int) -> None:
        super().__init__(*contestant.command, "--workers", str(workers))
        self.contestant = contestant
        try:
            self.url = self.expect("Serving on ") + PATH
            urllib.request.urlopen(f"{self.url}/increment", b"", timeout=PATIENCE).close()  # noqa: S310 - our own
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def total(self) -> int:
        """Return the last returned number."""
        with urllib.request.urlopen(self.url, timeout=PATIENCE) as answer:  # noqa: S310 - our own
            return int(json.load(answer)["value"])

    def processor_seconds(self) -> float:
        """Return the processor time that its workers and its store's server have used so far."""
        pids = [self.pid, *([self.contestant.pid] if self.contestant.pid else [])]
        return sum(map(_processor_seconds, pids))


def _processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / _TICK + sum(_processor_seconds(int(child)) for child in children)


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Measure all contestants in turn, for each number of workers and connections."""
    with ExitStack() as stack:
        try:
            wrk = find("wrk", "wrk")
        except pytest.skip.Exception as reason:
            results.missing["the level of HTTP"] = str(reason.msg)
            return
        say("starting the stores")
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contestants = _contestants(plan, results, stack, root)
        for workers in WORKERS:
            with ExitStack() as served:
                applications = [served.enter_context(Application(one, workers)) for one in contestants]
                for connections in CONNECTIONS:
                    for number in range(plan.rounds(bar=(workers, connections) == BAR)):
                        for one in in_turn(applications, number):
                            case = case_of(workers, connections)
                            say(f"http {case}, round {number + 1}: {one.contestant.name}")
                            figures = measure(wrk, one, connections, plan.seconds)
                            results.add(Place("http", case, one.contestant.name), figures)


def _contestants(plan: Plan, results: Results, stack: ExitStack, root: Path) -> list[Contestant]:
    """Start the stores that are installed, and note the missing ones."""

    def view(source: str, url: str = "") -> tuple[str, ...]:
        return ("-m", "tests.benchmarks.application", source, "--store", url)

    def manager(name: str) -> Contestant:
        server = stack.enter_context(Manager(root / name, "--durability", name.rpartition(" ")[2]))
        return Contestant(name, view("ours", server.url), server.pid)

    def api(name: str) -> Contestant:
        data_dir = str(root / name)
        return Contestant(name, ("run.py", "--port", "0", "--data-dir", data_dir, "--durability", name.split()[-1]))

    def redis(name: str, source: str = "ours") -> Contestant:
        server = stack.enter_context(RedisServer(root / name.replace(" ", "-")))
        return Contestant(name, view(source, server.url), server.pid)

    def postgres(name: str) -> Contestant:
        server = stack.enter_context(PostgresServer())
        return Contestant(name, view("ours", server.url), server.pid)

    starters: list[tuple[str, Callable[[str], Contestant]]] = [
        (BARE, lambda name: Contestant(name, view("bare"), shared=False)),
        *((f"ours, API, {durability}", api) for durability in ("none", "commit")),
        *((f"ours, {durability}", manager) for durability in reversed(DURABILITIES)),
        ("ours on Redis", redis),
        ("ours on PostgreSQL", postgres),
        ("ours on SQLite", lambda name: Contestant(name, view("ours", f"sqlite:///{root}/counters.db"))),
        (PLAIN_REDIS, lambda name: redis(name, "redis-py")),
    ]
    contestants = []
    for name, start in starters:
        if plan.wants(name):
            try:
                contestants.append(start(name))
            except pytest.skip.Exception as reason:
                results.missing[f"{name}, over HTTP"] = str(reason.msg)
    return contestants


def measure(wrk: str, application: Application, connections: int, seconds: float) -> dict[str, float]:
    """Measure one round, and return its figures. "wrong" is the difference between the total and the answers."""
    whole = math.ceil(seconds)  # wrk accepts only whole seconds
    url = f"{application.url}/increment"
    before, used = application.total(), application.processor_seconds()
    output = subprocess.run(
        [wrk, "--latency", "--timeout", "30s", "-t1", f"-c{connections}", f"-d{whole}s", "-s", _POST, url],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    used = application.processor_seconds() - used
    counted = application.total() - before
    (requests,) = re.findall(r"(\d+) requests in", output)
    (rate,) = re.findall(r"Requests/sec: +([\d.]+)", output)
    refused = sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", output))
    if "Socket errors" in output:
        raise RuntimeError(f"{application.contestant.name}: {output}")
    # Requests in progress when wrk ended were counted, but their answers were not read.
    beyond = counted - int(requests)
    wrong = (max(-beyond, beyond - connections, 0) if application.contestant.shared else 0) + refused
    return {
        "requests/s": float(rate),
        "p50 us": _latency(output, "50%"),
        "p99 us": _latency(output, "99%"),
        "cpu us/request": used / int(requests) * 1e6,
        "wrong": wrong,
    }


def _latency(output: str, percentile: str) -> float:
    """Return a latency in microseconds."""
    (found,) = re.findall(rf"^ +{percentile} +([\d.]+)([a-z]+)$", output, re.MULTILINE)
    return float(found[0]) * _UNITS[found[1]]
