"""Simultaneous HTTP clients: connected, gathered at a barrier, and let go at once."""

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

PATIENCE = 30.0  # seconds that a client waits for its answer


@dataclass(frozen=True)
class Answer:
    """What one client came back with."""

    number: int | None  # none: it got no answer, or another one
    seconds: float
    error: str = ""


def visit_at_once(
    port: int, count: int, path: str = "/", *, told: Callable[[int], None] = lambda _: None, patience: float = PATIENCE
) -> list[Answer]:
    """Have `count` clients ask at the same moment, each on a connection of its own that is open by then.

    :param told: is called after each number with how many have come, by one thread at a time.
    :param patience: seconds that each waits.
    """
    visit = _Visit(port, path, count, told, patience)
    threads = [threading.Thread(target=visit.run, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        visit.end()
    return visit.answers


class _Visit:
    def __init__(self, port: int, path: str, count: int, told: Callable[[int], None], patience: float) -> None:
        self._barrier = threading.Barrier(count)
        self.answers: list[Answer] = []
        self._lock = threading.Lock()  # guards the answers and their number, and lets one thread tell
        self._numbers = 0
        self._port = port
        self._path = path
        self._told = told
        self._patience = patience

    def end(self) -> None:
        """From now on nobody is told anything; after a Ctrl-C there may be clients yet."""
        self._barrier.abort()
        with self._lock:
            self._told = lambda _: None

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._patience)
        began = time.monotonic()
        error = ""
        number = None
        try:
            connection.connect()
            self._barrier.wait(self._patience)
            began = time.monotonic()
            connection.request("GET", self._path, headers={"Connection": "close"})
            response = connection.getresponse()
            body = response.read()
            if response.status == http.HTTPStatus.OK:
                number = int(body)
            else:
                error = f"{response.status} {response.reason}"
        except (OSError, http.client.HTTPException, threading.BrokenBarrierError, ValueError) as failure:
            error = str(failure) or type(failure).__name__
        finally:
            connection.close()
        with self._lock:
            self.answers.append(Answer(number, time.monotonic() - began, error))
            if number is not None:
                self._numbers += 1
                self._told(self._numbers)
