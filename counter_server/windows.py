"""The windows of limits: how often something was done of late. The manager hosts them, one budget for all workers."""

import bisect
import time
from math import floor
from typing import NamedTuple

_FORGET_EVERY = 1.0  # seconds
_LOOK_AT = 10_000  # windows a second, on average: with more of them, those that are over are found later
_KEEP = 1.0  # seconds that a window is kept after its end, so that forgetting never decides on which side a hit is


class _Count(NamedTuple):
    number: int
    expires: float


class _Event(NamedTuple):
    at: float
    expires: float


class Windows:
    """Fixed, moving and sliding windows, by key; for one thread at a time, as in a `HostedObject`.

    The answers are those of the memory storage of `limits`, but a clock that is set moves no window: time is the
    monotonic clock's, and begins where the calendar was when this was made. (Sliding windows begin by the calendar.)
    """

    def __init__(self) -> None:
        self._calendar = time.time() - time.monotonic()
        self._forgot = self._now()
        self.counts: dict[str, _Count] = {}
        self.events: dict[str, list[_Event]] = {}  # of each key the newest first

    def _now(self) -> float:
        return time.monotonic() + self._calendar

    def _by_wall_clock(self, moment: float) -> float:
        """Return when a moment is by the clock on the wall, which may have been set since."""
        return moment - self._now() + time.time()

    def check(self) -> bool:
        """Answer."""
        return True

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add to the count of a fixed window, which begins with the first addition, and return the count."""
        self._forget()
        count = self._count(key)
        if count is None or not count.number:
            count = _Count(0, self._now() + expiry)
        self.counts[key] = count = count._replace(number=count.number + amount)
        return count.number

    def take(self, key: str, expiry: float) -> tuple[int, float]:
        """Add 1 to the count of a fixed window; return the count, and the seconds until the window ends."""
        return self.incr(key, expiry), self._left(key)

    def _left(self, key: str) -> float:
        return self.counts[key].expires - self._now()

    def get(self, key: str) -> int:
        """Return the count of a fixed window."""
        count = self._count(key)
        return 0 if count is None else count.number

    def _count(self, key: str) -> _Count | None:
        count = self.counts.get(key)
        return None if count is None or count.expires <= self._now() else count

    def get_expiry(self, key: str) -> float:
        """Return when a fixed window ends."""
        count = self._count(key)
        return time.time() if count is None else self._by_wall_clock(count.expires)

    def clear(self, key: str) -> None:
        self.counts.pop(key, None)
        self.events.pop(key, None)

    def reset(self) -> int:
        """Clear all keys, and return how many there were."""
        number = max(len(self.counts), len(self.events))
        self.counts.clear()
        self.events.clear()
        return number

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Add events to a moving window if they fit; return whether they did."""
        self._forget()
        if amount > limit:
            return False
        events = self.events.setdefault(key, [])
        now = self._now()
        if limit - amount < len(events) and events[limit - amount].at >= now - expiry:
            return False
        events[:0] = [_Event(now, now + expiry)] * amount
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002 - as in `limits`
        """Return when a moving window begins, and how many events are in it."""
        events = self.events.get(key)
        if not events:
            return time.time(), 0
        number = bisect.bisect_left(events, expiry - self._now(), key=lambda event: -event.at)
        return self._by_wall_clock(events[number - 1].at), number

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Add to the count of a sliding window if that fits; return whether it did."""
        self._forget()
        if amount > limit:
            return False
        before, before_left, number, _ = self.get_sliding_window(key, expiry)
        if floor(before * before_left / expiry + number) + amount > limit:
            return False
        self.incr(self._sliding_keys(key, expiry)[1], 2 * expiry, amount)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Return the counts of the window before and of the current one, each with the seconds that it still counts."""
        before, number = map(self.get, self._sliding_keys(key, expiry))
        left = (1 - self._now() / expiry % 1) * expiry
        return before, left if before else 0.0, number, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        for name in self._sliding_keys(key, expiry):
            self.clear(name)

    def _sliding_keys(self, key: str, expiry: int) -> tuple[str, str]:
        now = self._now()
        return f"{key}/{int((now - expiry) / expiry)}", f"{key}/{int(now / expiry)}"

    def _forget(self) -> None:
        """Forget windows that have been over for a while: no answer depends on them."""
        now = self._now()
        if now - self._forgot < max(_FORGET_EVERY, (len(self.counts) + len(self.events)) / _LOOK_AT):
            return
        self._forgot = now
        past = now - _KEEP
        for key in [key for key, count in self.counts.items() if count.expires < past]:
            del self.counts[key]
        for key, events in list(self.events.items()):
            while events and events[-1].expires < past:
                events.pop()
            if not events:
                del self.events[key]


_WRONG_SECONDS = 60  # of the window in which wrong tokens are counted
_MOST_WRONG = 10  # from one address, since the last right one
_MOST_WRONG_IN_ALL = 100  # from addresses that never gave a right one
_KNOWN_SECONDS = 24 * 3600  # that an address is known for its right token: guesses from elsewhere do not lock it out


class Attempts(Windows):
    """The wrong tokens that were given of late."""

    def note(self, address: str, right: bool) -> float:  # noqa: FBT001 - a call of a shared object is short
        """Count an attempt; return 0 if it may be answered, else the seconds after which the next one may be.

        An attempt that may not be answered must not tell whether its token was right.
        """
        known = self.get(f"known {address}")
        if not known and self.get("in all") >= _MOST_WRONG_IN_ALL:
            return max(self._left("in all"), 1.0)
        if self.get(f"from {address}") >= _MOST_WRONG:
            return max(self._left(f"from {address}"), 1.0)
        if right:
            self.clear(f"from {address}")
            self.clear(f"known {address}")
            self.incr(f"known {address}", _KNOWN_SECONDS)
        else:
            self.incr(f"from {address}", _WRONG_SECONDS)
            if not known:
                self.incr("in all", _WRONG_SECONDS)
        return 0.0
