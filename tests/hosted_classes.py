"""Classes that tests share between processes; the manager imports them from here."""

import os
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import InitVar, dataclass, field, replace
from enum import Enum, Flag, IntEnum, StrEnum
from typing import Any, cast

from counter_server.errors import InvalidRequest


class Colour(Enum):
    RED = ("red", object())
    BLUE = ("blue", object())


class Level(IntEnum):
    LOW = 1


class Word(StrEnum):
    YES = "yes"


class Access(Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    colour: Colour = Colour.RED
    seen: list[str] = field(default_factory=list, compare=False)


@dataclass
class Measured:
    """A dataclass whose constructor takes other than its fields, and counts."""

    made = 0
    unit: InitVar[str]
    text: str = field(init=False)

    def __post_init__(self, unit: str) -> None:
        Measured.made += 1
        self.text = f"5 {unit}"


@dataclass
class Entries(dict[str, int]):
    """Not plain data, as it is more than its fields."""


class SomeObj:
    """The seed's object, unchanged."""

    def __init__(self, param: int) -> None:
        self.param = param

    def query(self) -> int:
        self.param += 1
        return self.param


class OwnError(Exception):
    """An exception that is not built in, whose constructor takes other arguments than it keeps."""

    def __init__(self, item: object, *, number: int = 0) -> None:
        super().__init__(f"no {item}")
        self.item, self.number = item, number


class OtherError(Exception):
    pass


class Toolbox:
    """An object with one method for each possible outcome of a call."""

    kind = "toolbox"
    word, error = Word.YES, OtherError

    def __init__(self) -> None:
        self.items: list[object] = []
        self._secret = 1

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
        raise OwnError("tool", number=5)

    def give(self) -> object:
        """Return what cannot be sent."""
        self.items.append("given")
        return OrderedDict()

    def give_word(self) -> Word:
        self.items.append("given")
        return self.word

    def fail_in_another_way(self) -> None:
        raise self.error("with a message")

    def fail_as_this_package(self) -> None:
        raise InvalidRequest("of another call")

    def change(self, point: "Point") -> "Point":
        """Return another point, if this one has arrived as what it was sent as."""
        return replace(point, colour=Colour.BLUE if point.colour is Colour.RED else Colour.RED)

    def break_pickle(self) -> None:
        self.items.append(threading.Lock())

    def _private(self) -> int:
        return self._secret


class UntellableError(Exception):
    def __str__(self) -> str:
        raise SystemExit(4)

    __iter__ = __repr__ = __str__


class StrangeText(str):
    __slots__ = ()

    def encode(self, *_: object, **__: object) -> bytes:
        raise SystemExit(5)

    __getitem__ = __len__ = __str__ = encode  # type: ignore[assignment]


class StrangeError(Exception):
    def __str__(self) -> str:
        return StrangeText("strange")


class Hostile(type):
    """A class whose every operation ends the program."""

    def _raise(cls, *_: object) -> Any:
        raise SystemExit(6)

    __eq__ = _raise
    __hash__ = _raise  # pyright: ignore[reportAssignmentType]
    __module__ = property(_raise)  # pyright: ignore[reportAssignmentType]
    __name__ = property(_raise)  # pyright: ignore[reportAssignmentType]


class HostileError(Exception, metaclass=Hostile):
    pass


def awkward_errors() -> dict[str, BaseException]:
    """Return errors that are hard to describe."""
    misplaced, noted = SyntaxError("misplaced"), OwnError("noted")
    misplaced.lineno, misplaced.text = cast(Any, ("not", "a", "line")), cast(Any, 5)
    vars(noted)["__notes__"] = UntellableError()
    return {
        "a place that is none": misplaced,
        "notes that end the program": noted,
        "a message that ends the program": UntellableError(),
        "a strange message": StrangeError(),
        "a class that raises": HostileError(),
        "a number too long for str()": KeyError(10**5000),
        "a message that cannot be encoded": ValueError("\ud800"),
        "a message longer than a frame": OwnError("x" * 2**25),
        "arguments longer than a frame": ValueError("y" * 2**25),
        "arguments that do not make it again": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "object " * 300_000),
        "the end of the program": SystemExit(3),
    }


class Awkward:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def fail(self, how: str) -> None:
        self.calls += 1
        raise awkward_errors()[how]

    def count(self) -> int:
        return self.calls


class Unpicklable:
    def __getstate__(self) -> object:
        raise SystemExit(7)


class TwoArgumentsError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Spoiled:
    """A call can spoil its state, so that it cannot be stored. It adds a line to a file."""

    def __init__(self) -> None:
        self.calls = 0
        self.spoiled: object = None

    def spoil(self, how: str, file: str) -> None:
        with open(file, "a") as lines:
            lines.write("called\n")
        self.calls += 1
        self.spoiled = {
            "not pickled": threading.Lock(),
            "the end of the program": Unpicklable(),
            "not loaded again": TwoArgumentsError(1, 2),
        }[how]

    def count(self) -> int:
        self.calls += 1
        return self.calls


class OneWay:
    """An object that can be pickled but not unpickled."""

    def __init__(self) -> None:
        self.error = TwoArgumentsError(1, 2)

    def query(self) -> None: ...


class Gated:
    """An object whose `wait`, pickling and unpickling each wait while a file exists, and say so with another one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.number = 0

    def query(self) -> int:
        self.number += 1
        return self.number

    def wait(self) -> None:
        self._pass("method")

    def _pass(self, gate: str) -> None:
        if os.path.exists(f"{self.path}.{gate}"):
            with open(f"{self.path}.{gate}.waits", "w"):
                pass
        while os.path.exists(f"{self.path}.{gate}"):
            time.sleep(0.005)

    def __getstate__(self) -> dict[str, Any]:
        self._pass("pickling")
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pass("loading")


class Slow:
    """An object whose method waits until a file exists. Its manager may report calls after other than 10 seconds."""

    def __init__(self, reported_after: float | None = None) -> None:
        if reported_after is not None:
            from counter_server.manager import server

            server.SLOW_SECONDS = reported_after

    def wait_for(self, path: str) -> str:
        while not os.path.exists(path):
            time.sleep(0.005)
        return "done"

    def compute(self) -> None:
        while True:
            pass

    def switch_interval(self) -> float:
        return sys.getswitchinterval()


class Tally:
    """Counts under a lock of its own, which its pickle leaves out. It notes the name of each call in a file."""

    def __init__(self, path: str, parties: int = 1, number: int = 0) -> None:
        self.path, self.parties, self.number = path, parties, number
        self._lock, self._barrier = threading.Lock(), threading.Barrier(parties)

    def __reduce__(self) -> tuple[type["Tally"], tuple[str, int, int]]:
        return Tally, (self.path, self.parties, self.number)

    def add(self, name: str = "") -> tuple[int, int]:
        """Return the process and the number."""
        with open(self.path, "a", buffering=1) as calls:
            calls.write(f"{name}\n")
        with self._lock:
            number = self.number + 1
            time.sleep(0)  # another thread would read the same number
            self.number = number
            return os.getpid(), number

    def meet(self, name: str = "") -> tuple[int, int]:
        """Return when as many calls as there are parties are in here."""
        self._barrier.wait(30)
        return self.add(name)

    def add_after(self, gate: str, name: str = "") -> tuple[int, int]:
        """Return when the file `gate` exists. The file `gate`.waits says that this waits."""
        with open(f"{gate}.waits", "w"):
            pass
        while not os.path.exists(gate):
            time.sleep(0.005)
        return self.add(name)


class Refusing:
    """A class that cannot be instantiated."""

    def __init__(self) -> None:
        raise ValueError("not today")

    def anything(self) -> None: ...


def not_a_class() -> None: ...
