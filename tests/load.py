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
from contextlib import AbstractContextManager, closing, suppress
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
_forked = multiprocessing.get_context("forkserver")  # of a process that has imported everything already
_forked.set_forkserver_preload(["pytest", "tests.load"])
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

    def begin(_number: int) -> Answer:
        barrier.wait(PATIENCE)
        return work()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def visit(url: str, path: str = "/") -> Any:
    """Return the JSON content that a new client receives."""
    with closing(Client(url)) as client:
        status, content = client.request("GET", path)
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
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*known: object) -> None:
        os.write(file, json.dumps(known).encode() + b"\n")

    def work(number: int) -> None:
        turn = 0
        while turn < each and not stop.value:
            turn += 1
            name = f"{os.getpid()}-{number}-{turn}"
            note(name, time.monotonic())
            with suppress(OutcomeUnknown, DeadlineExceeded):
                value = state.counter(counter).increment(key=name if keys and turn % 2 else None)
                note(name, time.monotonic(), value)

    start.wait(_START)
    with open_client(url, deadline=PATIENCE) as state, ThreadPoolExecutor(threads) as workers:
        list(workers.map(work, range(threads)))


class StoreLoad:
    """Processes that call a store directly, in threads that share a state, `each` times or until they are stopped.

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
        start = self._start = _forked.Barrier(processes)  # kept until the processes have unpickled it
        self._stop = _forked.RawValue("b", 0)  # not an event: a process killed while it reads an event leaves it locked
        self._logs = [directory / f"{counter}-{number}.log" for number in range(processes)]
        arguments = (url, counter, threads, each, keys, start, self._stop)
        self._processes = [_forked.Process(target=_count, args=(*arguments, str(log))) for log in self._logs]
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
                operation = Operation(name, known.invoked, moment, tuple(value)) if known else Operation(name, moment)
                history[name] = operation
        return list(history.values())
