"""Classes that tests share between processes; the manager imports them from here."""

import threading


class SomeObj:
    """The seed's object, unchanged."""

    def __init__(self, param: int) -> None:
        self.param = param

    def query(self) -> int:
        self.param += 1
        return self.param


class Toolbox:
    """One method for each thing that can happen in a call."""

    kind = "toolbox"

    def __init__(self) -> None:
        self.items: list[object] = []
        self._secret = 1
        self.gate = False

    def echo(self, *arguments: object, **keywords: object) -> object:
        return (arguments, keywords)

    def add(self, item: object, size: int = 1) -> int:
        self.items.append(item)
        self.padding = "x" * size
        return len(self.items)

    def count(self) -> int:
        return len(self.items)

    def fail(self) -> None:
        self.items.append("failed")
        raise KeyError("no such tool", 7)

    def fail_in_its_own_way(self) -> None:
        raise OwnError("with a message")

    def give(self) -> object:
        return {1, 2}

    def break_pickle(self) -> None:
        self.items.append(threading.Lock())

    def _private(self) -> int:
        return self._secret


class OwnError(Exception):
    """Not a type that is built in."""


class Slow:
    """Its method waits for a file to be there."""

    def wait_for(self, path: str) -> str:
        import os
        import time

        while not os.path.exists(path):
            time.sleep(0.005)
        return "done"


class Refusing:
    """Cannot be made."""

    def __init__(self) -> None:
        raise ValueError("not today")


def not_a_class() -> None:
    """Something else that can be imported."""
