"""A storage for the `limits` library in the manager: one budget for all workers.

Importing this module registers the scheme: ``RATELIMIT_STORAGE_URI = "manager://..."`` for Flask-Limiter, or
`limits.storage.storage_from_string`.
"""

import logging

from .errors import CounterServerError
from .handles import forgetful
from .settings import DEFAULT_DEADLINE, DEFAULT_STORE_OPTIONS, StoreOptions
from .state import open_state
from .windows import Windows as Windows

try:
    from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
    from limits.storage.base import TimestampedSlidingWindow
except ImportError as error:
    raise ImportError("a limit's storage needs limits: pip install 'counter-server[limits]'") from error

log = logging.getLogger(__name__)


class ManagerStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport, TimestampedSlidingWindow):
    """A storage of `limits` in the manager process, for all three strategies.

    If the manager is killed, all windows begin again. Setting the system's clock moves none of them.

    :param uri: `manager:///absolute/data/directory`, or any URL that `open_state` takes; or a handle on `Windows`.
    :param wrap_exceptions: raise `limits.errors.StorageError` instead of `CounterServerError`.
    :param name: identifies the windows in the manager; storages with the same name share their budgets.
    :param deadline: seconds that each call may take.
    :param options: whether and how to start a manager if none is running.
    :raises InvalidRequest: if the URL, the name or the deadline is not acceptable.
    """

    STORAGE_SCHEME = ["manager"]  # noqa: RUF012 - as in the interface

    def __init__(
        self,
        uri: str | Windows,
        wrap_exceptions: bool = False,  # noqa: FBT001, FBT002 - as in the interface
        *,
        name: str = "limits",
        deadline: float = DEFAULT_DEADLINE,
        options: StoreOptions = DEFAULT_STORE_OPTIONS,
    ) -> None:
        super().__init__(None, wrap_exceptions)
        if isinstance(uri, str):
            uri = forgetful(open_state(uri, deadline=deadline, options=options).object(name, Windows))
        self.storage = uri  # by this name `flask limiter config` shows it

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
        """Return whether the manager answers."""
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
