"""The checker: whether a recorded history of increments of one counter happened exactly once, in real-time order.

One operation is one thing that a client wanted counted once, however often it had to send it (under one idempotency
key). It is invoked before its first sending, and returns at its first definite answer. An operation without an answer
may have been applied, at any time after it was invoked, or not.

The rule: there must be an order in which the operations took the numbers 1 to the final value, one number each, such
that each took its number after it was invoked and before it returned. Going up from 1, each number belongs to the
operation that was answered with it, or else to an operation without an answer: the first invoked is the
best choice, because it excludes the least.
"""

from collections.abc import Iterable
from math import inf
from pathlib import Path
from statistics import median

import msgspec
from jinja2 import Environment
from msgspec import Struct

from ...errors import InvalidRequest


class Operation(Struct, frozen=True, forbid_unknown_fields=True):
    """One increment as its client saw it; times are in seconds of the machine's monotonic clock."""

    key: str
    invoked: float
    returned: float | None = None  # None if it was not answered
    answers: tuple[int, ...] = ()  # all that it ever got: they must be equal


def violations(history: Iterable[Operation], final: int) -> list[str]:
    """Return the proofs that the counter, which ended at `final`, miscounted; an empty list if there are none."""
    found: list[str] = []
    takers: dict[int, Operation] = {}
    unanswered: list[Operation] = []
    for operation in history:
        if not operation.answers:
            unanswered.append(operation)
            continue
        value = operation.answers[0]
        if len(set(operation.answers)) > 1:
            found.append(f"{operation.key} was answered with {sorted(set(operation.answers))}")
        if not 1 <= value <= final:
            found.append(f"{operation.key} was answered {value}, outside of 1 to {final}")
        elif value in takers:
            found.append(f"{operation.key} and {takers[value].key} were both answered {value}")
        else:
            takers[value] = operation
    unanswered.sort(key=lambda operation: operation.invoked, reverse=True)
    earliest = -inf  # the number under consideration was taken at this moment or later
    for value in range(1, final + 1):
        taker = takers.get(value) or (unanswered.pop() if unanswered else None)
        if taker is None:
            found.append(f"no operation can have taken {value}")
            continue
        earliest = max(earliest, taker.invoked)
        if taker.returned is not None and earliest > taker.returned:
            found.append(f"{taker.key} returned {value} before a smaller number was asked for")
    return found


class _Head(Struct, forbid_unknown_fields=True):
    final: int | None


def save(path: Path, history: Iterable[Operation], final: int | None, *, new: bool = False) -> None:
    """Write a history as JSON lines: the final value of the counter, then one operation each, in the order given.

    :param final: None if it could not be read.
    :param new: refuse a file or link that exists: in a shared directory another user may have made it.
    """
    with open(path, "xb" if new else "wb") as file:
        file.writelines(msgspec.json.encode(line) + b"\n" for line in (_Head(final), *history))


def load(path: Path) -> tuple[list[Operation], int | None]:
    """Read the file that `save` wrote.

    :raises InvalidRequest: if the file cannot be read, or is not a history.
    """
    history, number = [], 1
    try:
        first, *rest = path.read_bytes().splitlines() or [b""]
        final = msgspec.json.decode(first, type=_Head).final
        for number, line in enumerate(rest, 2):  # noqa: B007 - the error names it
            history.append(msgspec.json.decode(line, type=Operation))
    except OSError as error:
        raise InvalidRequest(f"the history {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not a history of increments: line {number}: {error}") from error
    return history, final


class Kill(Struct, frozen=True, kw_only=True):
    """One `kill -9` and its effect."""

    victim: str  # "manager" or "worker"
    pid: int
    moment: float  # seconds after the load began
    recovery: float | None  # seconds until service was back; None if it did not come back


class Verdict(Struct, frozen=True, kw_only=True):
    """The outcome of one proof. Times are in seconds."""

    right: bool
    violation: str | None  # the first, in words
    violations: int
    answered: int  # increments
    unknown: int  # increments without an answer: they may have been counted, or not
    asked_again: int  # increments sent once more under their keys, in the end
    final: int | None  # the value of the counter; None if it could not be read
    slowest: float | None  # answer, from the first sending
    median: float | None
    kills: list[Kill]
    url: str | None = None  # of the server; None for a saved history
    counter: str | None = None
    clients: int | None = None
    seconds: float | None = None  # of load
    per_second: float | None = None  # increments answered
    stopped_early: bool = False
    stays: str | None = None  # why the counter was not deleted
    history: str | None = None  # the file of the saved history


def judge(history: list[Operation], final: int | None, kills: Iterable[Kill] = (), seen: Iterable[str] = ()) -> Verdict:
    """Judge a history, together with other faults that were `seen`."""
    kills = list(kills)
    found = list(seen)
    found += [f"service was not back after the kill of the {kill.victim}" for kill in kills if kill.recovery is None]
    answered = [operation for operation in history if operation.answers]
    if final is not None:
        found += violations(history, final)
    elif not found:
        found.append("the counter could not be read in the end")
    if not answered:
        found.append("no increment was answered, so nothing was shown")
    times = [operation.returned - operation.invoked for operation in answered if operation.returned is not None]
    return Verdict(
        right=not found,
        violation=found[0] if found else None,
        violations=len(found),
        answered=len(answered),
        unknown=len(history) - len(answered),
        asked_again=sum(len(operation.answers) > 1 for operation in answered),
        final=final,
        slowest=max(times, default=None),
        median=median(times) if times else None,
        kills=kills,
    )


def screen(verdict: Verdict) -> str:
    """Format the verdict for people."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - plain text
    environment.filters |= {"n": "{:,}".format, "time": _time, "median": median}
    template = environment.from_string(Path(__file__).with_name("verdict.txt").read_text(encoding="utf-8"))
    return template.render(verdict=verdict).rstrip()


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
