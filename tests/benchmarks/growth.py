"""The level of growth: latency by counters, clients and workers; memory, journal and recovery by counters."""

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from counter_server import open_state
from counter_server.operations import Batch, Increment
from counter_server.status import Status
from counter_server.stores import open_store
from tests.benchmarks.load import Peer, Shape, measure
from tests.benchmarks.pages import fill, name_of
from tests.benchmarks.peers import commits_of_ours, open_ours
from tests.benchmarks.plan import Plan, in_turn
from tests.benchmarks.results import Place, Results
from tests.processes import PATIENCE, Manager, end_manager, eventually, holder

COUNTERS = (1, 1_000, 100_000, 1_000_000)
CLIENTS = (1, 10, 100, 1_000)
WORKERS = (1, 2, 4, 8)
DURABILITIES = ("none", "commit")
_THREADS = 4  # of each worker


def run(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Measure all of it."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for durability in DURABILITIES:
            if plan.wants(f"ours, {durability}"):
                _counters(plan, results, say, durability, root / durability)
        if plan.wants("ours, none"):
            _clients(plan, results, say, stack.enter_context(Manager(root / "clients", "--durability", "none")).url)
        for durability in DURABILITIES:
            if plan.wants(f"ours, {durability}"):
                manager = stack.enter_context(Manager(root / f"workers-{durability}", "--durability", durability))
                _workers(plan, results, say, durability, manager.url)


def place(what: str, number: int, durability: str) -> Place:
    """Return the results' name for one step of a growth."""
    return Place("growth", what, f"ours, {durability}: {number:,}")


def _counters(plan: Plan, results: Results, say: Callable[[str], None], durability: str, root: Path) -> None:
    """Measure managers with more and more counters, side by side."""
    root.mkdir()
    who = f"ours, {durability}"
    with ExitStack() as stack:
        managers = {}
        for counters in COUNTERS:
            say(f"growth, {who}: filling {counters:,} counters")
            directory = root / str(counters)
            managers[counters] = stack.enter_context(Manager(directory, "--durability", durability))
            empty = _memory(managers[counters].pid)
            fill(managers[counters].url, counters)
            figures = {"journal bytes": float(_status(managers[counters].url).journal_bytes)}
            if counters > 1:
                figures["bytes/counter"] = (_memory(managers[counters].pid) - empty) / counters
            results.add(place("counters", counters, durability), figures)
        for number in range(plan.rounds(bar=True)):
            for counters in in_turn(COUNTERS, number):
                say(f"growth, {who}, round {number + 1}: {counters:,} counters")
                took = _one_client(managers[counters].url, counters, plan.seconds)
                results.add(place("counters", counters, durability), took)
    if durability != "none":
        for number in range(plan.rounds(bar=False)):
            for counters in COUNTERS:
                say(f"growth, {who}, round {number + 1}: recovery of {counters:,} counters")
                recovery = _recovery(root / str(counters))
                results.add(place("counters", counters, durability), {"recovery ms": recovery})


def _one_client(url: str, counters: int, seconds: float) -> dict[str, float]:
    """Measure one client that increments random counters, one after the other."""
    names = [name_of(random.randrange(counters)) for _ in range(10_000)]
    with closing(open_store(url)) as store:
        return _took([store.apply], names, seconds)


def _took(asks: Sequence[Callable[[Batch, float], object]], names: Sequence[str], seconds: float) -> dict[str, float]:
    """Measure calls in turn, each callable with its own client."""
    clients = [os.urandom(16) for _ in asks]
    sequences = [0] * len(asks)
    took: list[float] = []

    def ask(number: int) -> None:
        who = number % len(asks)
        sequences[who] += 1
        batch = Batch(clients[who], sequences[who], [Increment(names[number % len(names)])])
        before = time.perf_counter()
        asks[who](batch, time.monotonic() + PATIENCE)
        took.append(time.perf_counter() - before)

    for number in range(len(asks)):
        ask(number)  # connects
    took.clear()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        ask(number)
        number += 1
    return {"p50 us": statistics.median(took) * 1e6, "p99 us": sorted(took)[len(took) * 99 // 100] * 1e6}


def _clients(plan: Plan, results: Results, say: Callable[[str], None], url: str) -> None:
    """Measure more and more connections, used in turn; the manager has a thread for each."""
    with ExitStack() as stack:
        asks = {
            clients: [stack.enter_context(closing(open_store(url))).apply for _ in range(clients)]
            for clients in CLIENTS
        }
        for number in range(plan.rounds(bar=False)):
            for clients in in_turn(CLIENTS, number):
                say(f"growth, round {number + 1}: {clients:,} clients")
                took = _took(asks[clients], ["hot"], plan.seconds)
                results.add(place("clients", clients, "none"), took)


def _workers(plan: Plan, results: Results, say: Callable[[str], None], durability: str, url: str) -> None:
    peer = Peer(f"ours, {durability}", open_ours, url, commits=commits_of_ours)
    for number in range(plan.rounds(bar=False)):
        for workers in in_turn(WORKERS, number):
            say(f"growth, {peer.name}, round {number + 1}: {workers} workers")
            figures = measure(peer, Shape(workers, _THREADS), plan.seconds)
            results.add(place("workers", workers, durability), figures)


def _recovery(directory: Path) -> float:
    """Return the milliseconds from the `kill -9` of a manager to an increment by the next one."""
    with open_state(f"manager://{directory}", deadline=PATIENCE) as state:
        counter = state.counter(name_of(0))
        before = counter.increment()
        pid = holder(directory)
        assert pid is not None
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        after = counter.increment()
        took = time.perf_counter() - began
        if after != before + 1:
            raise RuntimeError(f"{after} follows {before} after a kill")
    end_manager(directory / "manager.lock")
    eventually(lambda: holder(directory) is None, "the end of a manager")
    return took * 1e3


def _status(url: str) -> Status:
    with open_state(url) as state:
        status = state.status()
    assert status is not None
    return status


def _memory(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
