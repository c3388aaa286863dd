"""A storage for the `limits` library in the manager: one budget for all workers.

Importing this module registers the scheme: ``RATELIMIT_STORAGE_URI = "manager://..."`` for Flask-Limiter, or
`limits.storage.storage_from_string`.
"""

import logging
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from .errors import CounterServerError
from .extension import open_for_app
from .settings import DEFAULT_STORE, StoreOptions
from .state import forgetful
from .windows import Windows

try:
    from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
    from limits.storage.base import TimestampedSlidingWindow
except ImportError as error:
    raise ImportError("a limit's storage needs limits: pip install 'counter-server[limits]'") from error

log = logging.getLogger(__name__)


def _remotely(method: str) -> Callable[..., Any]:
    return lambda self, *arguments, **keywords: getattr(self.storage, method)(*arguments, **keywords)


if TYPE_CHECKING:
    _Remote = Windows
else:  # its public methods, called in the manager
    _Remote = type("_Remote", (), {name: _remotely(name) for name in vars(Windows) if not name.startswith("_")})


class ManagerStorage(_Remote, Storage, MovingWindowSupport, SlidingWindowCounterSupport, TimestampedSlidingWindow):
    """A storage of `limits` in the manager process, for all three strategies.

    If the manager is killed, all windows begin again. Setting the system's clock moves none of them.

    :param uri: `manager:///absolute/data/directory`; without a directory, the app's that first uses the storage.
    :param wrap_exceptions: raise `limits.errors.StorageError` instead of `CounterServerError`.
    :param name: storages with the same name share their budgets.
    :param deadline: seconds that each call may take.
    :param options: whether and how to start a manager on demand.
    """

    STORAGE_SCHEME = ["manager"]  # noqa: RUF012 - as in the interface

    def __init__(
        self,
        uri: str,
        wrap_exceptions: bool = False,  # noqa: FBT001, FBT002 - as in the interface
        *,
        name: str = "limits",
        deadline: float | None = None,
        options: StoreOptions | None = None,
    ) -> None:
        Storage.__init__(self, None, wrap_exceptions)
        self._open = partial(open_for_app, uri, deadline=deadline, options=options)
        self._name = name
        if uri != DEFAULT_STORE:
            _ = self.storage  # reports a wrong URI now

    @cached_property
    def storage(self) -> Windows:
        """The shared object; `flask limiter config` shows it by this name.

        Without a directory in the URI it is opened at its first use, in the app whose directory it takes.
        """
        return forgetful(self._open().object(self._name, Windows, durable=False))

    @property
    def base_exceptions(self) -> type[Exception]:
        return CounterServerError

    def check(self) -> bool:
        try:
            return self.storage.check()
        except CounterServerError as error:
            log.warning("%s", error)
            return False
