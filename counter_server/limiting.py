"""A `limits` storage in the manager: one budget for all workers.

Importing this registers the scheme: ``RATELIMIT_STORAGE_URI = "manager://..."`` for Flask-Limiter, or
`limits.storage.storage_from_string`.
"""

import logging

from .errors import CounterServerError
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE_OPTIONS, StoreOptions
from .state import forgetful, open_state
from .windows import Windows

try:
    from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
    from limits.storage.base import TimestampedSlidingWindow
except ImportError as error:
    raise ImportError("a limit's storage needs limits: pip install 'counter-server[limits]'") from error

__all__ = ["ManagerStorage", "Windows"]

log = logging.getLogger(__name__)

_NAME = "limits"


class ManagerStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport, TimestampedSlidingWindow):
    """A storage of `limits` in the manager process, for all three strategies.

    :param uri: `manager:///absolute/data/directory`, or as for `open_state`.
    :param wrap_exceptions: raise `limits.errors.StorageError` in place of `CounterServerError`.
    :param name: what the windows are known by in the manager; storages of one name share their budgets.
    :param deadline: seconds that each call may take.
    :param options: whether and how a manager is started where there is none.
    :raises InvalidRequest: if there is no such store, or no such name or deadline can be.

    Windows that were lost with a killed manager begin again. A clock that is set moves none of them.
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
        # What `flask limiter config` shows, by the name that it has in the storages of `limits`.
        self.storage = forgetful(open_state(uri, deadline=deadline, options=options).object(name, Windows))

    @property
    def base_exceptions(self) -> type[Exception]:
        return CounterServerError

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        return self.storage.incr(key, expiry, amount)

    def get(self, key: str) -> int:
        return self.storage.get(key)

    def get_expiry(self, key: str) -> float:
        return self.storage.get_expiry(key)

    def check(self) -> bool:
        """Whether the manager answers."""
        try:
            return self.storage.check()
        except CounterServerError as error:
            log.warning("%s", error)
            return False

    def reset(self) -> int | None:
        return self.storage.reset()

    def clear(self, key: str) -> None:
        self.storage.clear(key)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return self.storage.acquire_entry(key, limit, expiry, amount)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        return self.storage.get_moving_window(key, limit, expiry)

    def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return self.storage.acquire_sliding_window_entry(key, limit, expiry, amount)

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        return self.storage.get_sliding_window(key, expiry)

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self.storage.clear_sliding_window(key, expiry)
