"""A manager as the standard library's documentation shows it, in a process of its own: what ours is compared with.

python -m tests.standard_server ADDRESS | --child
"""

import signal
import sys
import threading
from multiprocessing import get_context
from multiprocessing.managers import BaseManager

KEY = b"key"


class Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def increment(self) -> int:
        with self._lock:
            self._value += 1
            return self._value


class StandardManager(BaseManager):
    """The recipe."""


StandardManager.register("Counter", Counter)


def main() -> None:
    (argument,) = sys.argv[1:]
    if argument == "--child":
        manager = StandardManager(authkey=KEY, ctx=get_context("spawn"))
        manager.start()
        print("ready", vars(manager)["_process"].pid, flush=True)
        signal.pause()
    server = StandardManager(argument, KEY).get_server()
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
