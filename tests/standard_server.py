"""Run a manager as the standard library's documentation shows it, to compare ours with.

python -m tests.standard_server ADDRESS
"""

import sys
import threading
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from typing import Any

KEY = b"key"


class Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def value(self) -> int:
        return self._value

    def increment(self) -> int:
        with self._lock:
            self._value += 1
            return self._value


class StandardManager(BaseManager):
    """The manager of the documentation's recipe."""


_counter = Counter()


StandardManager.register("Counter", Counter)  # a new one for each caller
StandardManager.register("shared", lambda: _counter)


def serve(address: Any, ready: Callable[[], None]) -> None:
    server = StandardManager(address, KEY).get_server()
    ready()
    server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], lambda: print("ready", flush=True))
