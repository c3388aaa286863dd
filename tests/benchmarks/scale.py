"""Measure the input of `docs/scale.py`: the time of a call on each engine, alone and beside others.

    python -m tests.benchmarks.scale [--seconds 1]

Clients and servers share this machine; an engine with its own machine goes further.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from counter_server import open_state
from counter_server.operations import Batch, Increment
from counter_server.stores import open_store
from tests.benchmarks.load import context
from tests.engines import DURABLE, MemcachedServer, PostgresServer, RedisServer
from tests.processes import Manager

CALLERS = 4
COMPANY = 16


def alone(url: str, company: int, seconds: float) -> float:
    """Return the median seconds of a call with `company` increments, without other calls."""
    store, client, took = open_store(url), os.urandom(16), []
    for sequence, _ in enumerate(_until(seconds), 1):
        began = time.perf_counter()
        store.apply(Batch(client, sequence, [Increment("hot")] * company), time.monotonic() + 10)
        took.append(time.perf_counter() - began)
    store.close()
    return statistics.median(took)


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def caller(url: str, counter: str, seconds: float, start: Any, results: Any) -> None:
    store = open_store(url)
    client = os.urandom(16)
    store.apply(Batch(client, 1, [Increment(counter)] * COMPANY), time.monotonic() + 10)
    start.wait()
    calls = 0
    for calls, _ in enumerate(_until(seconds), 1):
        store.apply(Batch(client, calls + 1, [Increment(counter)] * COMPANY), time.monotonic() + 10)
    results.put(calls / seconds)
    store.close()


def together(url: str, seconds: float, *, one_counter: bool) -> float:
    """Return the seconds between calls of several processes, on one counter or each on its own."""
    start, results = context.Barrier(CALLERS), context.SimpleQueue()
    counters = ["hot"] * CALLERS if one_counter else [f"own-{number}" for number in range(CALLERS)]
    processes = [context.Process(target=caller, args=(url, name, seconds, start, results)) for name in counters]
    for process in processes:
        process.start()
    rate: float = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return 1 / rate


def threaded(url: str, seconds: float) -> float:
    """Return the increments per second of one process with `COMPANY` threads."""
    counts = [0] * COMPANY
    with open_state(url) as state:
        counter = state.counter("hot")
        counter.increment()
        start = threading.Barrier(COMPANY)

        def work(number: int) -> None:
            start.wait()
            for _ in _until(seconds):
                counter.increment()
                counts[number] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(COMPANY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(counts) / seconds


def figures(url: str, seconds: float) -> list[float]:
    """Return the five figures for `docs/scale.py`, in microseconds."""
    call, large, company = alone(url, 1, seconds), alone(url, 256, seconds), alone(url, COMPANY, seconds)
    operation = max(large - call, 0.0) / 255
    thread = max(1 / threaded(url, seconds) - company / COMPANY, 0.0)
    hot, spread = (together(url, seconds, one_counter=one) for one in (True, False))
    return [1e6 * figure for figure in (call, operation, thread, hot, spread)]


@contextmanager
def engines() -> Iterator[dict[str, str]]:
    """Start all engines; yield the URL of each by its name in `docs/scale.md`."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        managers = {one: stack.enter_context(Manager(root / one, "--durability", one)) for one in ("none", "commit")}
        yield {
            "manager, `none`": managers["none"].url,
            "manager, `commit`": managers["commit"].url,
            "Redis, nothing on disk": stack.enter_context(RedisServer(root / "redis")).url,
            "Redis, `appendfsync always`": stack.enter_context(RedisServer(root / "durable", *DURABLE)).url,
            "PostgreSQL": stack.enter_context(PostgresServer()).url,
            "SQLite": f"sqlite:///{root}/counters.db",
            "memcached": stack.enter_context(MemcachedServer(root / "memcached")).url,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    with engines() as urls:
        rounds = [{name: figures(url, options.seconds) for name, url in urls.items()} for _ in range(options.rounds)]
        for name in urls:
            medians = (statistics.median(column) for column in zip(*(one[name] for one in rounds), strict=True))
            print(f'    "{name}": Figures({", ".join(f"{figure:.1f}" for figure in medians)}),', flush=True)


if __name__ == "__main__":
    main()
