"""Load for tests, with a recorded history: clients over HTTP, and processes that call the store directly."""

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
    """Open a state on a manager that only the test starts and restarts."""
    return open_state(url, deadline=deadline, options=StoreOptions(start=False))


def impatient(state: State, seconds: float = 0.5) -> AbstractContextManager[object]:
    """Shorten the deadline of the state's calls while the block runs."""
    return patch.object(state, "_deadline", seconds)


def at_once(count: int, work: Callable[[], Answer]) -> list[Answer]:
    """Run `work` in `count` threads that start on a barrier, and return the results, or raise the first failure."""
    barrier = threading.Barrier(count)

    def begin() -> Answer:
        barrier.wait(PATIENCE)
        return work()

    with ThreadPoolExecutor(count) as threads:
        return [future.result() for future in [threads.submit(begin) for _ in range(count)]]


def visit(url: str, path: str = "/") -> Any:
    """Return the JSON content that a new client receives."""
    client = Client(url)
    try:
        status, content = client.request("GET", path)
    finally:
        client.close()
    assert status == 200, content
    return content


class HttpLoad(Load):
    """The package's own load; its failures fail the test."""

    def progress(self, operations: int) -> None:
        """Wait until `operations` more operations have ended."""
        goal = len(self.history) + operations
        eventually(lambda: len(self.history) >= goal or self.failures, f"{goal} operations")

    def finish(self, *, stop: bool = True) -> list[Operation]:
        """Wait for the end of every client, and return the whole history."""
        if stop:
            self.stop()
        self.join()
        if self.failures:
            raise self.failures[0]
        return self.operations()


def store_client(url: str, counter: str, threads: int, each: int, start: Any, results: Any) -> None:
    """Run one process that calls the store directly; its threads share a state."""
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
    """Clients that call a store directly: `each` increments in each thread of each process, started on a barrier."""

    def __init__(self, url: str, counter: str, processes: int, threads: int, each: int) -> None:
        self._start = spawn.Barrier(processes)  # kept until the processes have unpickled it
        self._clients = []
        for _ in range(processes):
            reader, writer = spawn.Pipe(duplex=False)
            process = spawn.Process(target=store_client, args=(url, counter, threads, each, self._start, writer))
            process.start()
            writer.close()  # only the child has it open: if the child dies, reading ends
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
    """Run one process that may be killed at any moment. Its log has everything it knows, one write per line."""
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
    """A `StoreLoad` of processes that may be killed. It runs until it is finished, without keys or retries."""

    def __init__(self, url: str, counter: str, processes: int, threads: int, directory: Path) -> None:
        self._start = spawn.Barrier(processes)
        self._stop = spawn.RawValue("b", 0)  # not an event: a process killed while it reads an event leaves it locked
        self._logs = [directory / f"client-{number}.log" for number in range(processes)]
        self._processes = [
            spawn.Process(target=logging_client, args=(url, counter, threads, self._start, self._stop, str(log)))
            for log in self._logs
        ]
        for process in self._processes:
            process.start()

    def kill_one(self) -> None:
        """Kill the first living process with `kill -9`."""
        victim = next(process for process in self._processes if process.is_alive())
        victim.kill()
        victim.join()

    def kill(self) -> None:
        """Kill all of them."""
        for process in self._processes:
            process.kill()
            process.join()

    def finish(self) -> list[Operation]:
        """Return the whole history, including operations without an answer."""
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
