"""Load for tests, with a recorded history: clients over HTTP, and processes that call the store directly."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from counter_server import State, StoreOptions, open_state
from counter_server.errors import DeadlineExceeded, OutcomeUnknown
from counter_server.history import Operation
from counter_server.server.prove.load import Client, Load
from counter_server.settings import DEFAULT_DEADLINE
from tests.processes import PATIENCE, eventually

Answer = TypeVar("Answer")

spawn = multiprocessing.get_context("spawn")
_START = 4 * PATIENCE  # seconds in which several processes import everything on a busy machine


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


def _count(url: str, counter: str, threads: int, each: float, keys: bool, start: Any, stop: Any, log: str) -> None:  # noqa: FBT001
    """Run one process of a `StoreLoad`; it may be killed at any moment. Its log has all it knows, one write a line."""
    state = open_client(url, deadline=PATIENCE)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*known: object) -> None:
        os.write(file, json.dumps(known).encode() + b"\n")

    def work(number: int) -> None:
        turn = 0
        while turn < each and not stop.value:
            turn += 1
            name = f"{os.getpid()}-{number}-{turn}"
            note(name, time.monotonic())
            key = name if keys and turn % 2 else None
            with suppress(OutcomeUnknown, DeadlineExceeded):
                value = state.counter(counter).increment(key=key)
                note(name, time.monotonic(), value)

    start.wait(_START)
    with ThreadPoolExecutor(threads) as workers:
        for done in [workers.submit(work, number) for number in range(threads)]:
            done.result()
    state.close()


class StoreLoad:
    """Processes that call a store directly, in threads that share a state, until they are told to finish.

    :param each: the most increments of a thread.
    :param keys: give every other increment an idempotency key.
    """

    def __init__(
        self,
        url: str,
        counter: str,
        processes: int,
        threads: int,
        directory: Path,
        *,
        each: float = math.inf,
        keys: bool = True,
    ) -> None:
        start = self._start = spawn.Barrier(processes)  # kept until the processes have unpickled it
        self._stop = spawn.RawValue("b", 0)  # not an event: a process killed while it reads an event leaves it locked
        self._logs = [directory / f"{counter}-{number}.log" for number in range(processes)]
        self._processes = [
            spawn.Process(target=_count, args=(url, counter, threads, each, keys, start, self._stop, str(log)))
            for log in self._logs
        ]
        for process in self._processes:
            process.start()
        eventually(lambda: all(log.exists() for log in self._logs), "the start of the load", _START)

    def progress(self, increments: int) -> None:
        """Wait until about `increments` more were answered."""
        goal = self._written() + 90 * increments  # bytes; an increment has two lines
        eventually(lambda: self._written() > goal, "progress of the load")

    def _written(self) -> int:
        return sum(log.stat().st_size for log in self._logs if log.exists())

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

    def finish(self, *, stop: bool = True) -> list[Operation]:
        """Return the whole history, including operations without an answer."""
        self._stop.value = stop
        for process in self._processes:
            process.join()
        assert {process.exitcode for process in self._processes} <= {0, -signal.SIGKILL}
        history: dict[str, Operation] = {}
        for log in self._logs:
            for line in log.read_text().splitlines():
                name, moment, *value = json.loads(line)
                known = history.get(name)
                history[name] = (
                    Operation(name, known.invoked, moment, tuple(value)) if known else Operation(name, moment)
                )
        return list(history.values())
