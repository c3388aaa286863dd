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

import msgspec
from msgspec import Struct

from .errors import InvalidRequest


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


def assert_exactly_once(history: Iterable[Operation], final: int, save_to: Path | None = None) -> None:
    """Fail if the counter, which ended at `final`, miscounted.

    :param save_to: a file for the history of a failure; `counter-server prove --check` reads it.
    :raises AssertionError: with the first violations.
    """
    history = list(history)
    found = violations(history, final)
    if found and save_to:
        save(save_to, history, final)
    place = f"; the history is in {save_to}" if save_to else ""
    assert not found, f"{len(found)} violations, the first: {found[:5]}{place}"
