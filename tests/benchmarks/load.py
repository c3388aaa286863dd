"""Load on a store: processes with many threads count as fast as they can, and every number is checked."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

# Each client is a new process, forked from one that has imported everything and has no threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.benchmarks.peers"])

Increment = Callable[[], int]


class Shape(NamedTuple):
    """The size of a load: processes, and threads in each of them."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes}x{self.threads}"

    @classmethod
    def parse(cls, text: str) -> Self:
        processes, _, threads = text.partition("x")
        shape = cls(int(processes), int(threads))
        if min(shape) < 1:
            raise ValueError(f"a shape needs at least one process and one thread, not {text}")
        return shape


@dataclass
class Peer:
    """A store to measure: how a client opens it, and its place."""

    name: str
    open: Callable[[Any], Increment]
    place: Any
    one_writer: bool = False  # measured with one process of one thread in every shape
    commits: Callable[[Any], int] | None = None  # returns the number so far
    last: int = 0  # the last returned number


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run a Python server in its own process. Its last argument is a pipe to which it sends when it is ready."""
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, writer))
    process.start()
    writer.close()
    reader.recv()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def client(
    open_one: Callable[[Any], Increment], place: Any, threads: int, seconds: float, start: Any, results: Any
) -> None:
    """Run one process of the load: `threads` threads that increment for `seconds`."""
    increment = open_one(place)
    first = increment()
    values: list[list[int]] = [[] for _ in range(threads)]
    times: list[list[float]] = [[] for _ in range(threads)]
    begin = threading.Barrier(threads + 1)
    connecting = threading.Lock()  # one after the other: the standard library's listener has a backlog of 16
    stop = threading.Event()
    errors: list[BaseException] = []

    def work(mine: list[int], took: list[float]) -> None:
        try:
            with connecting:  # many a peer has a connection for each thread: made before the clock runs
                mine.append(increment())
            begin.wait()
            clock = time.perf_counter
            while not stop.is_set():
                before = clock()
                mine.append(increment())
                took.append(clock() - before)
        except Exception as error:  # noqa: BLE001 - reported to the run
            errors.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(values, times, strict=True)]
    for worker in workers:
        worker.start()
    while begin.n_waiting < threads and not errors:
        time.sleep(0.001)
    if errors:
        results.put(errors)
        return
    start.wait()
    began = time.perf_counter()
    begin.wait()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    results.put(
        errors or (elapsed, [first, *(v for mine in values for v in mine)], [t for took in times for t in took])
    )


def measure(peer: Peer, shape: Shape, seconds: float) -> dict[str, float]:
    """Measure one round, and return its figures. "wrong" counts the expected numbers that no client received."""
    processes, threads = (1, 1) if peer.one_writer else shape
    start, results = context.Barrier(processes), context.SimpleQueue()
    before = peer.commits(peer.place) if peer.commits else 0
    clients = [
        context.Process(target=client, args=(peer.open, peer.place, threads, seconds, start, results), daemon=True)
        for _ in range(processes)
    ]
    for process in clients:
        process.start()
    answers = []
    for _ in clients:
        answers.append(results.get())
        if isinstance(answers[-1], list):
            for process in clients:
                process.terminate()
            raise RuntimeError(f"{peer.name}, {shape}: {answers[-1]}")
    for process in clients:
        process.join()
    values = [value for _, mine, _ in answers for value in mine]
    due = range(peer.last + 1, peer.last + 1 + len(values))
    peer.last = max(values)
    times = sorted(t for _, _, took in answers for t in took)
    figures = {
        "increments/s": sum(len(took) / elapsed for elapsed, _, took in answers),
        "p50 us": times[len(times) // 2] * 1e6,
        "p99 us": times[len(times) * 99 // 100] * 1e6,
        "slowest ms": times[-1] * 1e3,
        "wrong": len(due) - len(set(values).intersection(due)),
    }
    if peer.commits:
        figures["commits/s"] = (peer.commits(peer.place) - before) / max(elapsed for elapsed, _, _ in answers)
    return figures
