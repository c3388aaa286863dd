"""An unforeseen error at any line between a change and its remembered answer: nothing counts twice.

After the first change, an error ends the process, and the next process reads the disk.
"""

import linecache
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import pytest

from counter_server import combiner, journal, ledger, objects
from counter_server.errors import BatchRefused
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.manager import process
from counter_server.objects import declare
from counter_server.operations import Batch, Increment, Invoke, Operation, Raised, Refusal, Result, Returned
from counter_server.plain import decode_plain, encode_plain
from counter_server.settings import Caps
from tests.hosted_classes import SomeObj

FILES = {module.__file__ for module in (combiner, journal, ledger, objects, process)}
LOCKING = {"try:", "finally:", "self._lock.release()"}
CLIENT = b"c" * 16


class Ended(BaseException):
    """Stands for the end of the manager process."""


def end(_error: BaseException) -> NoReturn:
    raise Ended


@contextmanager
def error_at(line: int, error: type[BaseException]) -> Iterator[list[str]]:
    """Raise an error at the nth executed line of the core, and yield its place.

    Skip steps that take or release a lock, such as the end of a `with` block: they need no memory.
    """
    places: list[str] = []
    left = line
    entered: set[tuple[FrameType, int]] = set()

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        file, number = frame.f_code.co_filename, frame.f_lineno
        if file not in FILES or places:
            return None
        text = linecache.getline(file, number).strip()
        if event == "line" and text not in LOCKING and (frame, number) not in entered:
            if text.startswith("with "):
                entered.add((frame, number))
            left -= 1
            if left == 0:
                places.append(f"{Path(file).name}:{number}")
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield places
    finally:
        sys.settrace(before)


def serve(kind: str, kept: Journal) -> Callable[..., list[Result]]:
    """Return the `apply` of what has this journal."""
    contents = kept.load()
    if kind == "counters":
        return Ledger(contents, kept, caps=Caps(), fail=end).apply
    declaration = declare("obj", SomeObj, (0,), {}, durable=True)
    return process._host(declaration, None, Ledger(contents), kept, contents, {}, Caps()).applies.apply


def numbers(results: list[Result]) -> list[int]:
    """Return the numbers in an answer, without calls of an object that raised the error or were undone."""
    found = [result for result in results if not isinstance(result, Raised | Refusal)]
    return [decode_plain(result.value) if isinstance(result, Returned) else cast(int, result) for result in found]


OPERATIONS: dict[str, Operation] = {
    "counters": Increment("c"),
    "object": Invoke("query", encode_plain(((), {}), "nothing")),
}


@pytest.mark.parametrize(
    ("kind", "error", "step"),  # the fast tier tries every third line
    [
        ("counters", MemoryError, 3),
        pytest.param("counters", SystemExit, 1, marks=pytest.mark.slow),
        pytest.param("object", MemoryError, 1, marks=pytest.mark.slow),
    ],
)
def test_an_error_at_any_line_counts_nothing_twice(
    kind: str, error: type[BaseException], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[kind]
    monkeypatch.setattr(process, "fail", end)
    monkeypatch.setattr(journal, "_SYNCHRONOUS", {"process": "OFF"})  # nothing is killed here
    with closing(Journal(tmp_path / "first.sqlite3", "process")) as first:
        assert numbers(serve(kind, first)(Batch(CLIENT, 1, [operation]))) == [1]
    path = tmp_path / "journal.sqlite3"
    ended = 0
    for line in range(1, 2000, step):
        shutil.copyfile(tmp_path / "first.sqlite3", path)
        with ExitStack() as stack:

            def start(stack: ExitStack = stack) -> Callable[..., list[Result]]:
                stack.close()  # the process before has ended, and its locks with it
                return serve(kind, stack.enter_context(closing(Journal(path, "process"))))

            apply = start()
            batch = Batch(CLIENT, 2, [operation, operation])
            answer: list[int] | None = None
            with error_at(line, error) as places:
                try:
                    answer = numbers(apply(batch))
                except Ended:
                    ended += 1
                    apply = start()  # the next process reads the last commit
                except (error, BatchRefused):
                    pass  # the connection is closed, and the client sends the batch again
            if not places:
                break
            again = numbers(apply(batch))
            assert answer in (None, again), places
            (following,) = numbers(apply(Batch(CLIENT, 3, [operation])))
            assert sorted({1, *again, following}) == [1, *again, following], places
            assert len(again) + 2 <= following <= 4, places
            assert kind == "object" or again == [2, 3], places
    else:
        pytest.fail("there were more lines than any code should have")
    assert ended > 10
