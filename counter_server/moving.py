"""Contents from one store into another, or from a file: compared first, then only what is missing is written.

So the same call again continues one that was interrupted. Counters and idempotency keys are moved; shared objects,
dicts, caches and limits stay where they are.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice

from msgspec import Struct

from .errors import (
    CounterServerError,
    DeadlineExceeded,
    Disconnected,
    KeyReused,
    LimitReached,
    StartupError,
    Unsupported,
)
from .ledger import Contents
from .operations import LARGEST_BATCH, Get, Increment, Keep, Operation, Refusal, Result, Set
from .portable import Advance
from .session import Session
from .settings import DEFAULT_DEADLINE, LONGEST_DEADLINE
from .store import ShowsContents, Store

# Shows progress: called with what is done and the number of records, it gives a function that takes those just done.
Bar = Callable[[str, int], AbstractContextManager[Advance]]

_READ_SECONDS = 3600.0  # for a store to return its contents
_PAUSE = 0.1  # seconds before a store that did not answer is asked again
_NOTHING = "nothing was changed"
_NOT_COMPARED = "everything was written, and not compared: run the same command again"
_MOST_NAMED = 3  # of several counters or keys in a message


class StillChanging(CounterServerError):
    """Something else writes to a store while its contents are moved."""


class Moved(Struct):
    """The numbers of counters and keys that were written, and that the target had before."""

    counters: int
    keys: int
    counters_before: int
    keys_before: int


def silent(_what: str, _records: int) -> AbstractContextManager[Advance]:
    return nullcontext(lambda _records: None)


def contents_of(store: Store, done: str = _NOTHING) -> Contents:
    """Return everything that `store` counts, at one moment.

    :param done: the end of an error's message: how far the move was.

    :raises StartupError: if nothing was ever counted there.
    :raises Unsupported: if it cannot list its counters.
    :raises DeadlineExceeded: if it does not answer.
    """
    if not isinstance(store, ShowsContents):
        raise Unsupported(f"{store} cannot list its counters, so they cannot be exported or moved from there")
    contents = _read(store, done)
    if contents is None:
        raise StartupError(f"nothing was ever counted in {store}: is this the right place?")
    return contents


def move(source: Store, target: Store, *, overwrite: bool = False, bar: Bar = silent) -> tuple[Contents, Moved]:
    """Write what `source` counts into `target`, and check both afterwards; return it, and what was done.

    :raises StillChanging: if something counted in `source` meanwhile, or wrote to `target`.
    """
    contents = contents_of(source)
    moved = write(contents, target, overwrite=overwrite, bar=bar)
    now = contents_of(source, _NOT_COMPARED)
    counters, keys = _missing(now, contents)  # and keys that are gone have expired
    gone = contents.counters.keys() - now.counters.keys()
    _check_still(source, [*counters, *gone], keys, f"changed while all were moved to {target}")
    return contents, moved


def write(contents: Contents, target: Store, *, overwrite: bool = False, bar: Bar = silent) -> Moved:
    """Write counters and keys into `target`, and compare it afterwards. What is there already is not written again.

    :param overwrite: replace other values there. Without this, they are refused before anything is changed, and so are
        counters that `contents` does not have.
    :raises StartupError: if the target has other values.
    :raises StillChanging: if something else wrote to the target meanwhile.
    :raises CounterServerError: if the target fails or is full; the same call again continues.
    """
    session = Session(target, LARGEST_BATCH)
    if isinstance(target, ShowsContents):
        before = _read(target) or Contents()
    else:
        before = _of_one_that_cannot_list(session, contents, overwrite=overwrite)
    if not overwrite:
        _refuse_others(contents, before, target)
    counters, keys = _missing(contents, before)
    there = len(contents.counters) - len(counters), len(contents.keys) - len(keys)
    del before  # it is large
    values = (_operation(name, contents.counters[name], overwrite=overwrite) for name in counters)
    kept = (Keep(key, *contents.keys[key][:2], overwrite) for key in keys)
    with bar("Writing", len(counters) + len(keys)) as advance:
        _apply(session, chain(values, kept), advance)
    if isinstance(target, ShowsContents):
        after = _read(target, _NOT_COMPARED)
    else:
        after = _asked(session, contents, _NOT_COMPARED)
    _check_still(target, *_missing(contents, after or Contents()), "are not what was written there")
    return Moved(len(counters), len(keys), *there)


def _check_still(store: Store, counters: list[str], keys: list[str], what: str) -> None:
    if counters or keys:
        names = f" ({_some(counters or keys)})"
        raise StillChanging(
            f"{len(counters):,} counters and {len(keys):,} keys of {store} {what}{names}: stop what counts there, and"
            " run the same command with --overwrite"
        )


def _read(store: ShowsContents, done: str = _NOTHING) -> Contents | None:
    """Read everything. A store that does not answer is asked again, as by a session, for as long as a call may take.

    :param done: the end of an error's message: how far the move was.
    """
    patience = time.monotonic() + DEFAULT_DEADLINE
    while True:
        try:
            return store.contents(time.monotonic() + _READ_SECONDS)
        except Disconnected as error:
            if time.monotonic() >= patience:
                raise DeadlineExceeded(f"{store} does not answer: {error}; {done}", "not_applied") from error
        except CounterServerError as error:
            if done == _NOTHING:  # the error says so itself
                raise
            raise type(error)(f"{done} ({error})", error.outcome) from error
        time.sleep(_PAUSE)


def _of_one_that_cannot_list(session: Session, contents: Contents, *, overwrite: bool) -> Contents:
    """Return the counters that such a store has of these.

    :raises Unsupported: if it cannot take them all, or must not.
    """
    if not overwrite:
        raise Unsupported(
            f"{session.store} cannot list its counters, so nobody can see what else it has: nothing was changed; to"
            " write there all the same, use --overwrite"
        )
    # What it may not be able to take comes first, each alone: it then refuses that by name, and nothing was changed.
    lowest = min(contents.counters, key=contents.counters.__getitem__, default=None)
    if lowest is not None and contents.counters[lowest] < 0:
        _apply(session, iter([Set(lowest, contents.counters[lowest])]))
    for key, record in islice(contents.keys.items(), 1):
        _apply(session, iter([Keep(key, *record[:2], overwrite)]))
    return _asked(session, contents)


def _asked(session: Session, contents: Contents, done: str = _NOTHING) -> Contents:
    """Return the values that the session's store has of these counters."""
    found = _apply(session, map(Get, contents.counters), done=done)
    values = zip(contents.counters, found, strict=True)
    return Contents({name: value for name, value in values if isinstance(value, int)})


def _operation(name: str, value: int, *, overwrite: bool) -> Operation:
    """Return what gives a counter its value. Without `overwrite`, it fails if something made the counter meanwhile.

    A 0 does not fail, as no increment can give it.
    """
    if overwrite or value == 0:
        return Set(name, value)
    return Increment(name, value, minimum=value, maximum=value)


def _apply(
    session: Session,
    operations: Iterator[Operation],
    advance: Advance = lambda _records: None,
    done: str = _NOTHING,
) -> list[Result]:
    """Apply operations in the largest batches; return the results of reads. Raise the error of the first refusal.

    :param done: the end of an error's message: how far the move was.
    """
    written = 0
    results: list[Result] = []
    try:
        while batch := list(islice(operations, LARGEST_BATCH)):
            for operation, result in zip(
                batch, session.perform(batch, time.monotonic() + LONGEST_DEADLINE), strict=True
            ):
                if isinstance(result, Refusal):
                    raise result.error()
                if isinstance(operation, Get):
                    results.append(result)
                else:
                    written += 1
            advance(len(batch))
    except (LimitReached, KeyReused) as error:
        raise StillChanging(
            f"something else writes to {session.store}: {error}; stop it, and run the same command again"
        ) from error
    except CounterServerError as error:
        if written:
            done = f"{written:,} were written before, and the same command again continues"
        elif error.outcome == "unknown":
            done = "the same command again continues"
        raise type(error)(f"{error}; {done}", error.outcome) from error
    return results


def _missing(contents: Contents, there: Contents) -> tuple[list[str], list[str]]:
    """Return the names of counters and the keys that are not the same `there`, in order."""
    counters = [name for name, value in contents.counters.items() if there.counters.get(name) != value]
    keys = [key for key, record in contents.keys.items() if there.keys.get(key, ())[:2] != record[:2]]
    return sorted(counters), sorted(keys)


def _refuse_others(contents: Contents, there: Contents, target: Store) -> None:
    counters, keys = contents.counters, contents.keys
    others = {
        "counters with another value": [
            each for each, value in there.counters.items() if counters.get(each, value) != value
        ],
        "counters that the source does not have": [each for each in there.counters if each not in counters],
        "keys of another request or result": [
            each for each in there.keys if keys.get(each, there.keys[each])[:2] != there.keys[each][:2]
        ],
    }
    found = [f"{len(names):,} {what} ({_some(names)})" for what, names in others.items() if names]
    if found:
        raise StartupError(
            f"{target} has {', '.join(found)}; nothing was changed: use an empty one, or --overwrite, which replaces"
            " other values and keeps what the source does not have"
        )


def _some(names: list[str]) -> str:
    """Name the first few."""
    more = ", …" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, sorted(names)[:_MOST_NAMED])) + more
