"""The checker: did a recorded history of increments of one counter happen exactly once, in real-time order?

One operation is one thing that a client wanted counted once, however often it had to send it (under one
idempotency key). It was invoked before its first sending, and it returned at its first definite answer; one
that never got one may or may not have been applied, at any time after it was invoked.

The rule: there must be an order in which the operations took the numbers 1 to the final value, each one number,
such that none took its number before it was invoked or after it had returned. Going up from 1, each number
belongs to the operation that was answered with it, or else to some operation that was never answered: the one
invoked first is the best choice, as it forbids the least.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path

import msgspec
from msgspec import Struct

from ...errors import InvalidRequest


@dataclass(frozen=True)
class Operation:
    """One increment as its client saw it; times are those of the machine's monotonic clock, in seconds."""

    key: str
    invoked: float
    returned: float = inf
    answers: tuple[int, ...] = ()  # all that it was ever answered: they must be equal


def violations(history: Iterable[Operation], final: int) -> list[str]:
    """What shows that the counter, which ended at `final`, miscounted; an empty list if nothing does."""
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
    earliest = -inf  # the moment before which the number under consideration cannot have been taken
    for value in range(1, final + 1):
        operation_of_value = takers.get(value) or (unanswered.pop() if unanswered else None)
        if operation_of_value is None:
            found.append(f"nobody can have taken {value}")
            continue
        earliest = max(earliest, operation_of_value.invoked)
        if earliest > operation_of_value.returned:
            found.append(f"{operation_of_value.key} returned {value} before a smaller number was asked for")
    return found


def save(path: Path, history: Iterable[Operation], final: int | None, *, new: bool = False) -> None:
    """Write a history as JSON lines: what the counter came to, then an operation each, in the order given.

    :param final: none, if it could not be read.
    :param new: refuse a file, or a link, that exists: in a shared directory somebody else may have made it.
    """
    with open(path, "x" if new else "w", encoding="utf-8") as file:
        file.write(json.dumps({"final": final}) + "\n")
        for operation in history:
            returned = None if operation.returned == inf else operation.returned
            line = {"key": operation.key, "invoked": operation.invoked, "returned": returned}
            file.write(json.dumps({**line, "answers": operation.answers}) + "\n")


class _Final(Struct, forbid_unknown_fields=True):
    final: int | None


class _Line(Struct, forbid_unknown_fields=True):
    key: str
    invoked: float
    returned: float | None
    answers: tuple[int, ...]


def load(path: Path) -> tuple[list[Operation], int | None]:
    """What `save` wrote.

    :raises InvalidRequest: if the file cannot be read, or is none of these.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            first, *rest = file.read().splitlines() or [b""]
        number = 1
        final = msgspec.json.decode(first, type=_Final).final
        history = []
        for number, data in enumerate(rest, 2):  # noqa: B007 - the error names it
            line = msgspec.json.decode(data, type=_Line)
            returned = inf if line.returned is None else line.returned
            history.append(Operation(line.key, line.invoked, returned, line.answers))
    except OSError as error:
        raise InvalidRequest(f"the history {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} holds no history of increments: line {number}: {error}") from error
    return history, final
