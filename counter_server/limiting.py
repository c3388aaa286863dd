"""A `limits` storage in the manager: one budget for all workers.

Importing this registers the scheme: ``RATELIMIT_STORAGE_URI = "manager://..."`` for Flask-Limiter, or
`limits.storage.storage_from_string`.
"""

import logging
import time

from .errors import CounterServerError
from .handles import forgetful
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE_OPTIONS, StoreOptions
from .state import open_state

try:
    from limits.storage import MemoryStorage, MovingWindowSupport, SlidingWindowCounterSupport, Storage
except ImportError as error:
    raise ImportError("a limit's storage needs limits: pip install 'counter-server[limits]'") from error

log = logging.getLogger(__name__)

_NAME = "limits"
_FORGET_EVERY = 1.0  # seconds
_LOOK_AT = 10_000  # windows a second, on average: where there are more, what is over is found later
_KEEP = 1.0  # seconds that a window is kept after its end: which side of its edge a hit is on is not for us to say


class _NoTimer:
    """What the memory storage takes for a timer that is about to run, so it starts no thread."""

    def is_alive(self) -> bool:
        return True


class Windows(MemoryStorage):
    """The windows of all limits: the memory storage of `limits`, as a shared object in the manager.

    Each call is alone there, under the object's lock. The thread by which the original forgets what has expired would
    come between the steps of a call; here it is done within calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.timer.cancel()
        self.timer.join()
        self.timer = _NoTimer()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        self._forgot = 0.0

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        self._forget()
        return super().incr(key, expiry, amount)

    def take(self, key: str, expiry: float) -> tuple[int, float]:
        """Take one from a fixed window; how many are taken with it, and the seconds that the window still has."""
        taken = self.incr(key, expiry)
        return taken, self.get_expiry(key) - time.time()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        self._forget()
        return super().acquire_entry(key, limit, expiry, amount)

    def _forget(self) -> None:
        """Let go of what has been over for a while, which no answer depends on any more.

        Of one key a fixed and a moving window may be there, and one of them be over.
        """
        now = time.time()
        pause = max(_FORGET_EVERY, len(self.locks) / _LOOK_AT)
        if 0 <= now - self._forgot < pause:  # less than 0 where the clock was set back
            return
        self._forgot = now
        past = now - _KEEP
        for key in [key for key, expires in self.expirations.items() if expires < past]:
            del self.expirations[key]
            self.storage.pop(key, None)
        for key, events in list(self.events.items()):
            while events and events[-1].expiry < past:  # the newest are in front
                events.pop()
            if not events:
                del self.events[key]
        for key in [key for key in self.locks if key not in self.expirations and key not in self.events]:
            del self.locks[key]


class ManagerStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """A storage of `limits` in the manager process, for all three strategies.

    :param uri: `manager:///absolute/data/directory`, or as for `open_state`.
    :param wrap_exceptions: raise `limits.errors.StorageError` in place of `CounterServerError`.
    :param name: what the windows are known by in the manager; storages of one name share their budgets.
    :param deadline: seconds that each call may take.
    :param options: whether and how a manager is started where there is none.
    :raises InvalidRequest: if there is no such store, or no such name or deadline can be.

    Windows that were lost with a killed manager begin anew.
    """

    STORAGE_SCHEME = ["manager"]  # noqa: RUF012 - the interface spells it so

    def __init__(
        self,
        uri: str,
        wrap_exceptions: bool = False,  # noqa: FBT001, FBT002 - the interface's own
        *,
        name: str = _NAME,
        deadline: float = DEFAULT_DEADLINE,
        options: StoreOptions = DEFAULT_STORE_OPTIONS,
    ) -> None:
        super().__init__(uri, wrap_exceptions)
        self._windows = forgetful(open_state(uri, deadline=deadline, options=options).object(name, Windows))

    @property
    def base_exceptions(self) -> type[Exception]:
        return CounterServerError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        return self._windows.incr(key, expiry, amount)

    def get(self, key: str) -> int:
        return self._windows.get(key)

    def get_expiry(self, key: str) -> float:
        return self._windows.get_expiry(key)

    def check(self) -> bool:
        """Whether the manager answers."""
        try:
            return self._windows.check()
        except CounterServerError as error:
            log.warning("%s", error)
            return False

    def reset(self) -> int | None:
        return self._windows.reset()

    def clear(self, key: str) -> None:
        self._windows.clear(key)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return self._windows.acquire_entry(key, limit, expiry, amount)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        return self._windows.get_moving_window(key, limit, expiry)

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return self._windows.acquire_sliding_window_entry(key, limit, expiry, amount)

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        return self._windows.get_sliding_window(key, expiry)

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._windows.clear_sliding_window(key, expiry)
