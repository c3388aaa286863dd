"""All errors of this package, and whether anything was counted when they occurred.

Every error carries an `outcome`, which is one of two words:

- ``"not_applied"``: nothing was counted, and trying again is safe.
- ``"unknown"``: the call was counted at most once. To find out, repeat it with the same idempotency key, or read the
  counter.

`RemoteError` is not a `CounterServerError`: the call was made, once, and the error is its result. It has an `outcome`
too, which is always ``"unknown"``, as only the object's class knows what the method had changed before it raised.
`Disconnected` and `BatchRefused` are internal to a store and its session; users never see them.
"""

from typing import Literal

Outcome = Literal["not_applied", "unknown"]


class CounterServerError(Exception):
    """The base of all errors that this package raises on purpose.

    :param outcome: if it differs from the usual outcome of its class.
    """

    outcome: Outcome = "not_applied"

    def __init__(self, message: str, outcome: Outcome | None = None) -> None:
        super().__init__(message)
        if outcome is not None:
            self.outcome = outcome


class InvalidRequest(CounterServerError, ValueError):
    """A name, number, bound, key, argument or new state is not acceptable. Nothing was changed."""


class LimitReached(CounterServerError):
    """The result would lie outside the caller's bounds, or outside 64 bits."""


class KeyReused(CounterServerError):
    """The idempotency key belongs to another request."""


class DeadlineExceeded(CounterServerError):
    """There was no answer before the deadline. The outcome is ``"not_applied"`` if the operation was never sent."""

    outcome: Outcome = "unknown"


class OutcomeUnknown(CounterServerError):
    """The store no longer remembers a batch that may have reached it."""

    outcome: Outcome = "unknown"


class StateLost(CounterServerError):
    """The store has lost what it held, or a part of it. The next call continues from what it holds now."""


class StorageFull(CounterServerError):
    """The store is full or read-only. Nothing was changed; reads continue, and writes do when there is room again."""


class AccessDenied(CounterServerError):
    """The store refused this process's key or user."""


class Unsupported(CounterServerError):
    """The store does not have this feature."""


class NotHosted(CounterServerError):
    """The manager was started by hand without this object, or another class has its name."""


class RemoteError(Exception):
    """A method of a shared object raised an exception whose class this process does not have. The call was made once.

    :param name: the exception's type, qualified.
    :param text: its message.
    :param remote_traceback: the traceback in the manager process.
    """

    outcome: Outcome = "unknown"

    def __init__(self, name: str, text: str, remote_traceback: str) -> None:
        super().__init__(name, text, remote_traceback)
        self.name = name
        self.text = text
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


class ResultLost(RemoteError):
    """The call was made once, but its result cannot be sent, or cannot be read here. Do not repeat it for this."""

    def __str__(self) -> str:
        return self.text


class StartupError(CounterServerError):
    """A server, a manager or a data directory cannot be used as requested."""


class DirectoryHeld(StartupError):
    """Another process is the manager of the data directory."""


class Stopped(SystemExit):
    """A signal asks this process to exit. The interrupted code did nothing wrong."""


class BatchRefused(Exception):
    """The store refused a batch because its sequence does not follow. Nothing was executed."""


class Disconnected(Exception):
    """The connection to the store broke, or could not be made.

    :param sent: whether any part of the batch may have left this process.
    :param is_vague: whether the reason of an earlier attempt says more.
    """

    def __init__(self, message: str, *, sent: bool, is_vague: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.is_vague = is_vague
