"""Increments per second and latency of our store beside the plain standard-library proxy, in one run.

    python -m tests.benchmarks.store [--rounds 5] [--seconds 1]

Rounds are interleaved and medians are told, because machines are noisy; every value that comes back is checked.
Not a test: nothing here passes or fails by the clock in the suite.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from counter_server import open_state

spawn = multiprocessing.get_context("spawn")

SHAPES = [(1, 1), (4, 4), (2, 16)]
DURABILITIES = ["none", "process", "commit"]

Increment = Callable[[], int]


class LockedCounter:
    """The counter of the textbook: a lock and a number in the manager process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def increment(self) -> int:
        with self._lock:
            self._value += 1
            return self._value


_the_counter = LockedCounter()


class PlainManager(BaseManager):
    """The textbook recipe: one object behind a proxy of the standard library, over AF_UNIX."""


PlainManager.register("counter", callable=lambda: _the_counter)


def serve_plain(address: str, ready: Any) -> None:
    server = PlainManager(address, b"key").get_server()
    ready.send(None)
    server.serve_forever()


def serve_ours(path: str, durability: Any, ready: Any) -> None:
    from counter_server.manager.directory import DataDirectory
    from counter_server.manager.server import serve

    serve(DataDirectory(path), durability, ready=lambda: ready.send(None))


def open_plain(place: str) -> Increment:
    manager = PlainManager(place, b"key")
    manager.connect()
    proxy = manager.counter()  # type: ignore[attr-defined]
    return proxy.increment  # type: ignore[no-any-return]


def open_ours(url: str) -> Increment:
    return open_state(url).counter("hot").increment


@dataclass
class Peer:
    """A store to be measured: how a client reaches it, and where it listens."""

    name: str
    open: Callable[[str], Increment]
    place: str


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    reader, writer = spawn.Pipe(duplex=False)
    process = spawn.Process(target=target, args=(*arguments, writer))
    process.start()
    writer.close()
    reader.recv()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def client(peer: Peer, threads: int, seconds: float, start: Any, results: Any) -> None:
    """One process of the load: `threads` threads, each incrementing for `seconds`."""
    increment = peer.open(peer.place)
    increment()
    values: list[list[int]] = [[] for _ in range(threads)]
    times: list[list[float]] = [[] for _ in range(threads)]
    begin = threading.Barrier(threads + 1)
    stop = threading.Event()

    def work(mine: list[int], took: list[float]) -> None:
        increment()  # each thread of a plain proxy has its own connection: made before the clock runs
        begin.wait()
        clock = time.perf_counter
        while not stop.is_set():
            before = clock()
            mine.append(increment())
            took.append(clock() - before)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(values, times, strict=True)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    begin.wait()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    results.put((elapsed, [v for mine in values for v in mine], [t for took in times for t in took]))


@dataclass
class Round:
    rate: float  # increments/s
    median: float  # microseconds
    p99: float  # microseconds
    slowest: float  # milliseconds


def measure(peer: Peer, processes: int, threads: int, seconds: float) -> Round:
    start = spawn.Barrier(processes)
    results = spawn.SimpleQueue()
    clients = [spawn.Process(target=client, args=(peer, threads, seconds, start, results)) for _ in range(processes)]
    for process in clients:
        process.start()
    answers = [results.get() for _ in clients]
    for process in clients:
        process.join()
    values = [value for _, mine, _ in answers for value in mine]
    if len(set(values)) != len(values):
        raise SystemExit(f"{peer.name}: {len(values) - len(set(values))} duplicate numbers")
    times = sorted(t for _, _, took in answers for t in took)
    rate = sum(len(mine) / elapsed for elapsed, mine, _ in answers)
    return Round(rate, times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6, times[-1] * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(running(serve_plain, str(root / "plain.sock")))
        peers = [Peer("BaseProxy (AF_UNIX)", open_plain, str(root / "plain.sock"))]
        for durability in DURABILITIES:
            stack.enter_context(running(serve_ours, str(root / durability), durability))
            peers.append(Peer(f"ours, {durability}", open_ours, f"manager://{root / durability}"))
        compare(peers, SHAPES, options.rounds, options.seconds)


def compare(peers: list[Peer], shapes: list[tuple[int, int]], rounds: int, seconds: float) -> None:
    """Measure all peers in turn, several times, and print a table; ratios are to the first peer."""
    print(f"Python {sys.version.split()[0]}, {multiprocessing.cpu_count()} cores, median of {rounds} rounds\n")
    head = f"{'shape':>6} {'store':<30} {'increments/s':>12} {'ratio':>6} {'median us':>10} {'ratio':>6} {'p99 us':>8}"
    print(f"{head} {'slowest ms':>10}")
    for processes, threads in shapes:
        measured: dict[str, list[Round]] = {peer.name: [] for peer in peers}
        for _ in range(rounds):
            for peer in peers:
                measured[peer.name].append(measure(peer, processes, threads, seconds))
        first: tuple[float, float] | None = None
        for peer in peers:
            rate, median, p99, slowest = (
                statistics.median(getattr(r, what) for r in measured[peer.name])
                for what in ("rate", "median", "p99", "slowest")
            )
            first = first or (rate, median)
            print(
                f"{processes:>3}x{threads:<2} {peer.name:<30} {rate:>12,.0f} {rate / first[0]:>6.2f}"
                f" {median:>10.1f} {median / first[1]:>6.2f} {p99:>8.1f} {slowest:>10.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
