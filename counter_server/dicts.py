"""A bounded dict with expiry, one for all workers.

`SharedDict` is what a worker holds; `BoundedDict` is what it reaches, a shared object in the manager.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from math import inf
from typing import Any, NamedTuple

from cachetools import TLRUCache

from . import plain
from .errors import InvalidRequest, LimitReached
from .settings import check_seconds

DEFAULT_ENTRIES = 10_000


def check_entries(number: object) -> int:
    """`number`, if it can be the most entries of a dict.

    :raises InvalidRequest: if it cannot.
    """
    if type(number) is not int or number < 1:
        raise InvalidRequest(f"the most entries of a dict is an int, 1 or more, not {number!r}")
    return number


def check_ttl(seconds: object) -> float | None:
    """`seconds`, if an entry can live so long; None is for ever.

    :raises InvalidRequest: if it cannot.
    """
    return None if seconds is None else check_seconds(seconds, "a ttl")


class _Entry(NamedTuple):
    value: Any
    expires: float  # by the dict's timer


def _expires(_key: Hashable, entry: _Entry, _now: float) -> float:
    return entry.expires


def _spread(key: Hashable) -> int:
    """A hash by which any two keys can be parted: Python's own is the same for many numbers, as 1 and 2**61."""
    return hash(key if isinstance(key, (str, bytes)) else (key, plain.encode(key, "a key")))


class BoundedDict:
    """At most so many entries, each with a time to live; for one thread at a time, as in a `HostedObject`.

    An entry is there until its time is over, and not an instant longer. Where a new one has no room, the one that was
    used least recently goes: read or written; never one that lives while there is one that does not. A time to
    live, `ttl`, is in seconds, None for ever. (The rules are those of `cachetools.TLRUCache`.)

    :param max_entries: 1 or more.
    :param timer: a clock that never goes back, in seconds.
    """

    def __init__(self, max_entries: int, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._entries: TLRUCache[Any, _Entry] = TLRUCache(max_entries, _expires, timer)

    def _until(self, ttl: float | None) -> float:
        return inf if ttl is None else self._timer() + ttl

    def find(self, key: Any) -> tuple[Any, ...]:
        """The value, alone, of a key that is there; else nothing."""
        entry = self._entries.get(key)
        return () if entry is None else (entry.value,)

    def has(self, key: Any) -> bool:
        return key in self._entries

    def set(self, key: Any, value: Any, ttl: float | None) -> None:
        self._entries[key] = _Entry(value, self._until(ttl))

    def add(self, key: Any, value: Any, ttl: float | None) -> bool:
        """Set what is not there; whether that was so."""
        if key in self._entries:
            return False
        self.set(key, value, ttl)
        return True

    def setdefault(self, key: Any, default: Any, ttl: float | None) -> Any:
        entry = self._entries.get(key)
        if entry is not None:
            return entry.value
        self.set(key, default, ttl)
        return default  # not read again: its time may be over by now

    def remove(self, key: Any) -> tuple[Any, ...]:
        """What was there, as it is found."""
        entry = self._entries.pop(key, None)
        return () if entry is None else (entry.value,)

    def delete(self, key: Any) -> bool:
        """Remove it; whether it was there."""
        return self._entries.pop(key, None) is not None

    def incr(
        self,
        key: Any,
        by: float,
        ttl: float | None,
        minimum: float | None = None,
        maximum: float | None = None,
        *,
        renew: bool = False,
    ) -> float | None:
        """Add to a number, 0 where there is none, and return the result; out of bounds it is None, and nothing is done.

        :param ttl: of an entry that is made; with `renew` of any.
        :raises TypeError: if either is not a number.
        """
        if not isinstance(by, (int, float)):  # else two lists would be one
            raise TypeError(f"a number can be added, not {type(by).__name__}")
        entry = self._entries.get(key)
        number: float = (0 if entry is None else entry.value) + by
        # Said so that not a number, which is neither less nor more, lies within no bounds.
        if not ((minimum is None or number >= minimum) and (maximum is None or number <= maximum)):
            return None
        expires = self._until(ttl) if entry is None or renew else entry.expires
        self._entries[key] = _Entry(number, expires)
        return number

    def renew(self, key: Any, default: Any, ttl: float | None) -> Any:
        """Read, and let it live so long from now on. What is not there is not made."""
        entry = self._entries.get(key)
        if entry is None:
            return default
        self.set(key, entry.value, ttl)
        return entry.value

    def keys(self, part: int, parts: int) -> list[Any] | None:
        """The keys of one of so many parts, by their hash; None if that is too much for one answer."""
        found = [key for key in self._entries if parts == 1 or _spread(key) % parts == part]
        try:
            plain.encode(found, "keys")
        except InvalidRequest:
            return None
        return found

    def size(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()


class SharedDict:
    """A handle on a bounded dict with expiry, one for all workers; see `State.dict`.

    Each method is one call: atomic, made exactly once, with the deadline of the state. Keys and values are plain
    data, and keys hashable, as in any dict.

    :param hosted: a handle on the shared object.
    :param ttl: seconds that an entry lives after it was set, where none are given; None for ever.
    """

    def __init__(self, hosted: BoundedDict, ttl: float | None) -> None:
        self._hosted = hosted
        self._ttl = check_ttl(ttl)

    def __repr__(self) -> str:
        return f"<SharedDict of {self._hosted!r}>"

    def _seconds(self, ttl: float | None) -> float | None:
        return self._ttl if ttl is None else check_ttl(ttl)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of `key`, or `default`. Reading does not make an entry live longer."""
        found = self._hosted.find(key)
        return found[0] if found else default

    def set(self, key: Any, value: Any, *, ttl: float | None = None) -> None:
        """Set a value, which lives for `ttl` seconds from now, or as the dict's do."""
        self._hosted.set(key, value, self._seconds(ttl))

    def setdefault(self, key: Any, default: Any = None, *, ttl: float | None = None) -> Any:
        """The value of `key`, which is set to `default` if it is not there."""
        return self._hosted.setdefault(key, default, self._seconds(ttl))

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove `key` and return its value, or `default`.

        :raises KeyError: if it is not there and there is no default.
        """
        found = self._hosted.remove(key) or default
        if not found:
            raise KeyError(key)
        return found[0]

    def incr(
        self,
        key: Any,
        by: float = 1,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
        ttl: float | None = None,
    ) -> Any:
        """Add `by` to a number, 0 where there is none, and return the result. Its time to live goes on as before.

        :param minimum: the result may not be less.
        :param maximum: the result may not be more.
        :param ttl: seconds that it lives, if it is made.
        :raises LimitReached: if the result would lie outside the bounds; nothing is changed.
        :raises TypeError: if the value is not a number.
        """
        number = self._hosted.incr(key, by, self._seconds(ttl), minimum, maximum)
        return within_bounds(number, key)

    def keys(self) -> list[Any]:
        """All keys, in no order. Where they are too many for one answer, those set meanwhile may be missing."""
        found: list[Any] = []
        parts = [(0, 1)]
        while parts:
            part, count = parts.pop()
            some = self._hosted.keys(part, count)
            if some is None:
                parts += [(part, 2 * count), (part + count, 2 * count)]
            else:
                found += some
        return found

    def clear(self) -> None:
        """Remove all entries."""
        self._hosted.clear()

    def __len__(self) -> int:
        return self._hosted.size()

    def __contains__(self, key: Any) -> bool:
        return self._hosted.has(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def __getitem__(self, key: Any) -> Any:
        found = self._hosted.find(key)
        if not found:
            raise KeyError(key)
        return found[0]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Any) -> None:
        if not self._hosted.delete(key):
            raise KeyError(key)


def within_bounds(number: float | None, key: Any) -> float:
    """What an increment has given.

    :raises LimitReached: if it was out of bounds.
    """
    if number is None:
        raise LimitReached(f"the result for {key!r} would lie outside the bounds; nothing was changed")
    return number
