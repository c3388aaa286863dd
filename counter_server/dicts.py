"""A bounded dict with expiry, shared by all workers: a `SharedDict` calls a `BoundedDict` in the manager."""

import time
from collections.abc import Callable, Hashable, Iterator
from math import inf
from typing import Any, NamedTuple

from cachetools import Cache, TLRUCache

from .errors import InvalidRequest, LimitReached
from .plain import encode_plain
from .settings import check_seconds
from .status import Entries

DEFAULT_ENTRIES = 10_000
Limit = float | None  # a bound, or a time to live in seconds; None: unlimited


def check_entries(number: object) -> int:
    if type(number) is not int or number < 1:
        raise InvalidRequest(f"the maximum number of entries must be an int of 1 or more, not {number!r}")
    return number


def check_ttl(seconds: object) -> Limit:
    return None if seconds is None else check_seconds(seconds, "a ttl")


class _Entry(NamedTuple):
    value: Any
    expires: float  # by the dict's timer


def _expiry(_key: Any, entry: _Entry, _now: float) -> float:
    return entry.expires


class _Entries(TLRUCache[Any, _Entry]):
    """Counts the entries that it removes. It is pickled without that, as the class that it extends."""

    evictions = expirations = 0

    def popitem(self) -> tuple[Any, _Entry]:
        self.evictions += 1
        return super().popitem()

    def expire(self, time: float | None = None) -> list[tuple[Any, _Entry]]:
        expired = super().expire(time)
        if expired:
            self.expirations += len(expired)
        return expired

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in ("evictions", "expirations")}
        return object.__new__, (TLRUCache,), state


class BoundedDict:
    """A dict with a maximum number of entries, each with a time to live. Not thread-safe: `HostedObject` locks it.

    An entry is removed exactly when its time to live, `ttl`, is over. If a new entry has no room, it replaces the entry
    that was read or written least recently; expired entries go first, as in `cachetools.TLRUCache`.
    """

    keeps_values_sealed = True  # its manager need not have the classes of its keys and values

    _hits = _misses = 0  # since it was made, or unpickled

    def __init__(self, max_entries: float, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._entries = _Entries(max_entries, _expiry, timer)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_timer": self._timer,
            "_entries": self._entries,
        }  # without figures: a read alone must not write to the disk

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._entries.__class__ = _Entries

    @property
    def entries(self) -> Entries:
        """The figures of the entries. Another thread may change them meanwhile."""
        return Entries(
            kind="dict",
            now=Cache.__len__(self._entries),  # its own `len` would remove expired entries
            most=None if self._entries.maxsize == inf else int(self._entries.maxsize),
            hits=self._hits,
            misses=self._misses,
            evictions=self._entries.evictions,
            expired=self._entries.expirations,
        )

    def find(self, key: Any) -> tuple[Any, ...]:
        """Return a tuple of the key's value, or an empty tuple."""
        found: tuple[Any, ...] = self._entries.get(key, ())[:1]
        if found:
            self._hits += 1
        else:
            self._misses += 1
        return found

    def has(self, key: Any) -> bool:
        return key in self._entries

    def left(self, key: Any) -> float:
        """Return the seconds until a key expires; 0 if it does not exist."""
        entry = self._entries.get(key)
        return 0.0 if entry is None else entry.expires - self._timer()

    def set(self, key: Any, value: Any, ttl: Limit) -> None:
        self._entries[key] = _Entry(value, inf if ttl is None else self._timer() + ttl)

    def add(self, key: Any, value: Any, ttl: Limit) -> bool:
        """Set a key that does not exist. Return whether it was set."""
        if key in self._entries:
            return False
        self.set(key, value, ttl)
        return True

    def setdefault(self, key: Any, default: Any, ttl: Limit) -> Any:
        found = self.find(key)
        if not found:
            self.set(key, default, ttl)
        return found[0] if found else default  # not read again: it may have expired

    def remove(self, key: Any) -> tuple[Any, ...]:
        """Remove a key. Return a tuple of its value, or an empty tuple."""
        return self._entries.pop(key, ())[:1]

    def delete(self, key: Any) -> bool:
        return self._entries.pop(key, None) is not None

    def incr(
        self, key: Any, by: float, ttl: Limit, minimum: Limit = None, maximum: Limit = None, *, renew: bool = False
    ) -> float | None:
        """Add to a number, which starts at 0, and return the result, or None if it would lie outside the bounds.

        :param ttl: for a new entry; with `renew` for any.
        :raises TypeError: if the value or `by` is not a number.
        """
        if not isinstance(by, (int, float)):  # or two lists would be concatenated
            raise TypeError(f"by must be a number, not {type(by).__name__}")
        entry = self._entries.get(key)
        number: float = (0 if entry is None else entry.value) + by
        # A NaN, which is neither less nor more than any number, lies outside all bounds.
        if not ((minimum is None or number >= minimum) and (maximum is None or number <= maximum)):
            return None
        if entry is None or renew:
            self.set(key, number, ttl)
        else:
            self._entries[key] = _Entry(number, entry.expires)
        return number

    def renew(self, key: Any, default: Any, ttl: Limit) -> Any:
        """Read a key and restart its time to live. A key that does not exist is not created."""
        found = self.find(key)
        if found:
            self.set(key, found[0], ttl)
        return found[0] if found else default

    def keys(self, part: int, parts: int) -> list[Any] | None:
        """Return the keys whose hash falls into one of several parts, or None if they are too large for one answer."""
        found = [key for key in self._entries if parts == 1 or _spread(key) % parts == part]
        try:
            encode_plain(found, "keys")
        except InvalidRequest:
            return None
        return found

    def size(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()


def _spread(key: Hashable) -> int:
    # Python's own hash cannot separate all keys: it is the same for 1 and 2**61.
    return hash(key if isinstance(key, (str, bytes)) else (key, encode_plain(key, "a key")))


class SharedDict:
    """A handle on a bounded dict with expiry, shared by all workers; see `State.dict`.

    Each method is one call: atomic, made exactly once, with the deadline of the state. Keys and values are plain
    data, and keys are hashable. Entries expire after the dict's `ttl`, or their own; None means never.
    """

    def __init__(self, hosted: BoundedDict, ttl: Limit) -> None:
        self._hosted = hosted
        self._ttl = check_ttl(ttl)

    def __repr__(self) -> str:
        return f"<SharedDict of {self._hosted!r}>"

    def _seconds(self, ttl: Limit) -> Limit:
        return self._ttl if ttl is None else check_ttl(ttl)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of `key`, or `default`. Reading does not extend an entry's time to live."""
        return _value(self._hosted.find(key) or (default,), key)

    def set(self, key: Any, value: Any, *, ttl: Limit = None) -> None:
        self._hosted.set(key, value, self._seconds(ttl))

    def setdefault(self, key: Any, default: Any = None, *, ttl: Limit = None) -> Any:
        """Return the value of `key`. If it does not exist, set it to `default`."""
        return self._hosted.setdefault(key, default, self._seconds(ttl))

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove `key` and return its value or `default`, or raise `KeyError` if there is neither."""
        return _value(self._hosted.remove(key) or default, key)

    def incr(self, key: Any, by: float = 1, *, minimum: Limit = None, maximum: Limit = None, ttl: Limit = None) -> Any:
        """Add `by` to a number, which starts at 0, and return the result. Its time to live is not extended.

        :raises LimitReached: if the result would lie outside the bounds; nothing is changed.
        :raises TypeError: if the value is not a number.
        """
        return within_bounds(self._hosted.incr(key, by, self._seconds(ttl), minimum, maximum), key)

    def keys(self) -> list[Any]:
        """Return all keys, in no order. If they need several answers, keys that are set meanwhile may be missing."""
        return self._keys(0, 1)

    def _keys(self, part: int, parts: int) -> list[Any]:
        found = self._hosted.keys(part, parts)
        return self._keys(part, 2 * parts) + self._keys(part + parts, 2 * parts) if found is None else found

    def clear(self) -> None:
        self._hosted.clear()

    def __len__(self) -> int:
        return self._hosted.size()

    def __contains__(self, key: Any) -> bool:
        return self._hosted.has(key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys())

    def __getitem__(self, key: Any) -> Any:
        return _value(self._hosted.find(key), key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Any) -> None:
        if not self._hosted.delete(key):
            raise KeyError(key)


def _value(found: tuple[Any, ...], key: Any) -> Any:
    if not found:
        raise KeyError(key)
    return found[0]


def within_bounds(number: float | None, key: Any) -> float:
    if number is None:
        raise LimitReached(f"the result for {key!r} would lie outside the bounds; nothing was changed")
    return number
