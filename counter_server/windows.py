"""Small shared objects of this package itself, which the manager hosts: rate limits, wrong tokens, last visits."""

import time
from bisect import bisect_left, bisect_right
from collections import deque
from math import floor, inf
from operator import neg
from typing import Any

from .dicts import BoundedDict
from .status import Entries

_SLACK = 1.0  # seconds that a moving window is kept past its end, which is part of it


class Windows:
    """Fixed, moving and sliding windows by key. Not thread-safe: `HostedObject` locks it.

    They answer like the memory storage of `limits`, but setting the system's clock moves no window.
    """

    def __init__(self) -> None:
        self._calendar = time.time() - time.monotonic()  # sliding windows begin by the calendar
        self.counts = BoundedDict(inf, time.monotonic)
        self.events = BoundedDict(inf, time.monotonic)  # lists of monotonic times, the newest first

    @property
    def entries(self) -> Entries:
        """The windows of all kinds together, also while another thread changes them."""
        counts, events = self.counts.entries, self.events.entries
        return Entries(kind="limit", now=counts.now + events.now, expired=counts.expired + events.expired)

    def check(self) -> bool:
        return True  # it answers

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to the count of a fixed window, which begins with the first addition. Return the count."""
        return int(self.counts.incr(key, amount, expiry, renew=not self.get(key)) or 0)

    def take(self, key: str, expiry: float) -> tuple[int, float]:
        """Add 1 to the count of a fixed window. Return the count, and the seconds until the window ends."""
        return self.incr(key, expiry), self.counts.left(key)

    def get(self, key: str) -> int:
        """Return the count of a fixed window."""
        return int((self.counts.find(key) or (0,))[0])

    def get_expiry(self, key: str) -> float:
        """Return when a fixed window ends, by the system's clock."""
        return time.time() + self.counts.left(key)

    def clear(self, key: str) -> None:
        self.counts.delete(key)
        self.events.delete(key)

    def reset(self) -> int:
        """Clear all keys. Return their number."""
        number = max(self.counts.size(), self.events.size())
        self.counts.clear()
        self.events.clear()
        return number

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Add events to a moving window if they fit. Return whether they did."""
        if amount > limit:
            return False
        now = time.monotonic()
        (events,) = self.events.find(key) or ([],)
        del events[bisect_right(events, expiry - now, key=neg) :]
        if len(events) + amount > limit:
            return False
        self.events.set(key, [now] * amount + events, expiry + _SLACK)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002 - as in `limits`
        """Return when a moving window begins, by the system's clock, and the number of its events."""
        now = time.monotonic()
        (events,) = self.events.find(key) or ([],)
        number = bisect_left(events, expiry - now, key=neg)
        return time.time() + (events[number - 1] - now if events else 0.0), number

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Add to the count of a sliding window if the sum fits. Return whether it did."""
        if amount > limit:
            return False
        before, before_left, number, _ = self.get_sliding_window(key, expiry)
        if floor(before * before_left / expiry + number) + amount > limit:
            return False
        self.incr(self._sliding_keys(key, expiry)[1], 2 * expiry, amount)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return the counts of the previous and the current window, each with its remaining seconds."""
        before, number = map(self.get, self._sliding_keys(key, expiry))
        left = (1 - self._now() / expiry % 1) * expiry
        return before, left if before else 0.0, number, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        for name in self._sliding_keys(key, expiry):
            self.clear(name)

    def _sliding_keys(self, key: str, expiry: int) -> tuple[str, str]:
        now = self._now()
        return f"{key}/{int((now - expiry) / expiry)}", f"{key}/{int(now / expiry)}"

    def _now(self) -> float:
        return time.monotonic() + self._calendar


_WRONG_SECONDS = 60  # during which wrong tokens count
_MOST_WRONG = 10  # from one address, since its last right token
_MOST_WRONG_IN_ALL = 100  # from addresses that never gave a right token
_KNOWN_SECONDS = 24 * 3600  # for which a right token protects an address from guesses made elsewhere


class Attempts:
    """Limits how many wrong tokens are answered. Not thread-safe: `HostedObject` locks it."""

    def __init__(self) -> None:
        self._counts = BoundedDict(inf)

    def note(self, address: str, right: bool) -> float:  # noqa: FBT001 - calls of shared objects are short
        """Count an attempt. Return 0 if it may be answered, else the seconds until the next attempt.

        A refused attempt must not reveal whether its token was right.
        """
        known = self._counts.has(f"known {address}")
        limits = [(f"from {address}", _MOST_WRONG)] + ([] if known else [("in all", _MOST_WRONG_IN_ALL)])
        for key, most in reversed(limits):
            if self._counts.find(key) >= (most,):
                return max(self._counts.left(key), 1.0)
        if right:
            self._counts.delete(f"from {address}")
            self._counts.set(f"known {address}", 1, _KNOWN_SECONDS)
        else:
            for key, _ in limits:
                self._counts.incr(key, 1, _WRONG_SECONDS)
        return 0.0


class Recent:
    """Keeps the last items, up to `size`."""

    def __init__(self, size: int) -> None:
        self._items: deque[Any] = deque(maxlen=size)

    def add(self, item: Any) -> list[Any]:
        """Add an item, and return `items`."""
        self._items.append(item)
        return self.items()

    def items(self) -> list[Any]:
        """Return all items, the greatest first, as workers may add theirs out of order."""
        return sorted(self._items, reverse=True)
