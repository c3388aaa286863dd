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
from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results
from tests.engines import PostgresServer, RedisServer, find
from tests.processes import PATIENCE, Manager, Program

WORKERS = (1, 2, 4)
CONNECTIONS = (32, 256)
BAR = (2, 32)  # for the bars: the default number of workers on two cores
CEILING = "memory:// (wrong)"
PLAIN_REDIS = "view with redis-py"
_TICK = os.sysconf("SC_CLK_TCK")
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}


def case_of(workers: int, connections: int) -> str:
    """Return the results' name for a case."""
    return f"{workers} worker{'' if workers == 1 else 's'}, {connections} connections"


@dataclass(frozen=True)
class Engine:
    """A running store with which the application counts."""

    name: str
    url: str
    pid: int | None = None  # of its server
    plain_redis: bool = False
    shared: bool = True  # by all workers, so the total can be checked


class Application(Program):
    """`tests.benchmarks.application`, ready for requests."""

    def __init__(self, engine: Engine, workers: int) -> None:
        options = ["--plain-redis"] if engine.plain_redis else []
        super().__init__("-m", "tests.benchmarks.application", engine.url, "--workers", str(workers), *options)
        self.engine = engine
        try:
            self.url = self.expect("Serving on ")
            self.total()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def total(self) -> int:
        """Return the last returned number."""
        with urllib.request.urlopen(f"{self.url}/value", timeout=PATIENCE) as answer:  # noqa: S310 - our own
            return int(json.load(answer)["number"])

    def processor_seconds(self) -> float:
        """Return the processor time that its workers and the engine's server have used so far."""
        return sum(map(_processor_seconds, [self.pid, *([self.engine.pid] if self.engine.pid else [])]))


def _processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / _TICK + sum(_processor_seconds(int(child)) for child in children)


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Measure all applications in turn, for each number of workers and connections."""
    with ExitStack() as stack:
        try:
            wrk = find("wrk", "wrk")
        except pytest.skip.Exception as reason:
            results.missing["the level of HTTP"] = str(reason.msg)
            return
        say("starting the engines")
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = _engines(plan, results, stack, root)
        for workers in WORKERS:
            with ExitStack() as served:
                applications = [served.enter_context(Application(engine, workers)) for engine in engines]
                for connections in CONNECTIONS:
                    for number in range(plan.rounds(bar=(workers, connections) == BAR)):
                        for one in in_turn(applications, number):
                            case = case_of(workers, connections)
                            say(f"http {case}, round {number + 1}: {one.engine.name}")
                            figures = measure(wrk, one, connections, plan.seconds)
                            results.add(Place("http", case, one.engine.name), figures)


def _engines(plan: Plan, results: Results, stack: ExitStack, root: Path) -> list[Engine]:
    """Start the engines that are installed, and note the missing ones."""

    def manager(durability: str) -> Engine:
        server = stack.enter_context(Manager(root / durability, "--durability", durability))
        return Engine(f"ours, {durability}", server.url, server.pid)

    def redis(name: str, *, plain: bool = False) -> Engine:
        server = stack.enter_context(RedisServer(root / name.replace(" ", "-")))
        return Engine(name, server.url, server.pid, plain_redis=plain)

    def postgres(name: str) -> Engine:
        server = stack.enter_context(PostgresServer())
        return Engine(name, server.url, server.pid)

    starters: list[tuple[str, Callable[[str], Engine]]] = [
        (CEILING, lambda name: Engine(name, "memory://", shared=False)),
        *((f"ours, {one}", lambda name: manager(name.rpartition(" ")[2])) for one in reversed(DURABILITIES)),
        ("ours on Redis", redis),
        ("ours on PostgreSQL", postgres),
        ("ours on SQLite", lambda name: Engine(name, f"sqlite:///{root}/counters.db")),
        (PLAIN_REDIS, lambda name: redis(name, plain=True)),
    ]
    engines = []
    for name, start in starters:
        if plan.wants(name):
            try:
                engines.append(start(name))
            except pytest.skip.Exception as reason:
                results.missing[f"{name}, over HTTP"] = str(reason.msg)
    return engines


def measure(wrk: str, application: Application, connections: int, seconds: float) -> dict[str, float]:
    """Measure one round, and return its figures. "wrong" is the difference between the total and the answers."""
    whole = math.ceil(seconds)  # wrk accepts only whole seconds
    before, used = application.total(), application.processor_seconds()
    output = subprocess.run(
        [wrk, "--latency", "--timeout", "30s", "-t1", f"-c{connections}", f"-d{whole}s", f"{application.url}/"],
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
        raise RuntimeError(f"{application.engine.name}: {output}")
    # Requests in progress when wrk ended were counted, but their answers were not read.
    beyond = counted - int(requests)
    wrong = (max(-beyond, beyond - connections, 0) if application.engine.shared else 0) + refused
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
