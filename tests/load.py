"""Load for tests, with its history recorded: clients over HTTP, and processes straight at the store."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from counter_server import Counter, CounterServerError, State, StoreOptions, open_state
from counter_server.server.prove.history import Operation
from counter_server.server.prove.load import Client, Load
from counter_server.settings import DEFAULT_DEADLINE
from tests.processes import PATIENCE, eventually

Answer = TypeVar("Answer")

spawn = multiprocessing.get_context("spawn")


def open_client(url: str, *, deadline: float = DEFAULT_DEADLINE) -> State:
    """A state on a manager that the test starts, and starts again, by itself."""
    return open_state(url, deadline=deadline, options=StoreOptions(start=False))


def impatient(state: State, seconds: float = 0.5) -> AbstractContextManager[object]:
    """While the block runs the state's calls may take only so long; those before it had all the time they needed."""
    return patch.object(state, "_deadline", seconds)


def at_once(count: int, work: Callable[[], Answer]) -> list[Answer]:
    """What `count` threads, begun on a barrier, are each given by `work`; or the first failure of one."""
    barrier = threading.Barrier(count)

    def begin() -> Answer:
        barrier.wait(PATIENCE)
        return work()

    with ThreadPoolExecutor(count) as threads:
        return [future.result() for future in [threads.submit(begin) for _ in range(count)]]


def visit(url: str, path: str = "/") -> Any:
    """The JSON content that a fresh client is given."""
    client = Client(url)
    try:
        status, content = client.request("GET", path)
    finally:
        client.close()
    assert status == 200, content
    return content


class HttpLoad(Load):
    """The package's own load, its failures those of the test."""

    def progress(self, operations: int) -> None:
        """Wait until so many more operations have ended."""
        goal = len(self.history) + operations
        eventually(lambda: len(self.history) >= goal or self.failures, f"{goal} operations")

    def finish(self, *, stop: bool = True) -> list[Operation]:
        """The whole history, when every client has ended."""
        if stop:
            self.stop()
        self.join()
        if self.failures:
            raise self.failures[0]
        return self.operations()


def store_client(url: str, counter: str, threads: int, each: int, start: Any, results: Any) -> None:
    """One process straight at the store; its threads share a state."""
    state = open_client(url)
    history: list[Operation] = []
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        barrier.wait(PATIENCE)
        for count in range(each):
            key = f"{os.getpid()}-{number}-{count}"
            history.append(_keep_asking(state.counter(counter), key))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    start.wait(PATIENCE)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    state.close()
    results.send([(o.key, o.invoked, o.returned, o.answers) for o in history])


def _keep_asking(counter: Counter, key: str) -> Operation:
    invoked = time.monotonic()
    deadline = invoked + PATIENCE
    while time.monotonic() < deadline:
        with suppress(CounterServerError):
            return Operation(key, invoked, answers=(counter.increment(key=key),), returned=time.monotonic())
    return Operation(key, invoked)


class StoreLoad:
    """`processes` x `threads` clients straight at a store, `each` increments per thread, begun on a barrier."""

    def __init__(self, url: str, counter: str, processes: int, threads: int, each: int) -> None:
        self._start = spawn.Barrier(processes)  # kept: it must be there when the processes come to unpickle it
        self._clients = []
        for _ in range(processes):
            reader, writer = spawn.Pipe(duplex=False)
            process = spawn.Process(target=store_client, args=(url, counter, threads, each, self._start, writer))
            process.start()
            writer.close()  # theirs alone: if it dies, reading ends
            self._clients.append((process, reader))

    def finish(self) -> list[Operation]:
        history: list[Operation] = []
        for process, reader in self._clients:
            with reader:
                history += [Operation(*fields) for fields in reader.recv()]
            process.join()
            process.close()
        return history


def logging_client(url: str, counter: str, threads: int, start: Any, stop: Any, log: str) -> None:
    """One process that may be killed at any moment: what it knows is in its log by then, in single writes."""
    state = open_client(url, deadline=PATIENCE)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def work(number: int) -> None:
        turn = 0
        while not stop.value:
            turn += 1
            key = f"{os.getpid()}-{number}-{turn}"
            os.write(file, json.dumps([key, time.monotonic()]).encode() + b"\n")
            value = state.counter(counter).increment()
            os.write(file, json.dumps([key, time.monotonic(), value]).encode() + b"\n")

    start.wait(PATIENCE)
    with ThreadPoolExecutor(threads) as workers:
        for done in [workers.submit(work, number) for number in range(threads)]:
            done.result()
    state.close()


class LoggedLoad:
    """Like a `StoreLoad`, of processes that may be killed, until it is finished: without keys, each call made once."""

    def __init__(self, url: str, counter: str, processes: int, threads: int, directory: Path) -> None:
        self._start = spawn.Barrier(processes)
        self._stop = spawn.RawValue("b", 0)  # not an event: who is killed as he looks at one leaves it locked
        self._logs = [directory / f"client-{number}.log" for number in range(processes)]
        self._processes = [
            spawn.Process(target=logging_client, args=(url, counter, threads, self._start, self._stop, str(log)))
            for log in self._logs
        ]
        for process in self._processes:
            process.start()

    def kill_one(self) -> None:
        """`kill -9` the first that lives."""
        victim = next(process for process in self._processes if process.is_alive())
        victim.kill()
        victim.join()

    def kill(self) -> None:
        """Have none of them left."""
        for process in self._processes:
            process.kill()
            process.join()

    def finish(self) -> list[Operation]:
        """The whole history, with those that were never answered."""
        self._stop.value = 1
        for process in self._processes:
            process.join()
        assert any(process.exitcode == 0 for process in self._processes)
        history: dict[str, Operation] = {}
        for log in self._logs:
            for line in log.read_text().splitlines():
                key, moment, *value = json.loads(line)
                known = history.get(key)
                history[key] = Operation(key, known.invoked, moment, tuple(value)) if known else Operation(key, moment)
        return list(history.values())
