"""What can go wrong, and whether anything was counted when it did.

Every error carries `outcome`, and there are only two:

- ``"not_applied"``: nothing was counted; trying again is safe.
- ``"unknown"``: it may or may not have been counted, exactly once at the most; ask again with the
  same idempotency key, or read the counter.

The tree::

    CounterServerError
    ├── InvalidRequest        a name, number, bound or key that is not acceptable (also a ValueError)
    ├── LimitReached          the result would lie outside the bounds that the caller gave
    ├── KeyReused             an idempotency key that was used for another request
    ├── DeadlineExceeded      no answer in time; the outcome says whether it may have been applied
    ├── OutcomeUnknown        the store has no memory of a batch that may have reached it
    ├── StateLost             the store started again without its memory (durability `none`)
    ├── StorageFull           the store cannot write; reads go on, and it heals by itself
    ├── AccessDenied          the store refused the key, or the user, of this process
    ├── Unsupported           the store cannot do this, by name
    ├── NotHosted             the manager that runs does not have this object, or has another of its name
    └── StartupError          a server, manager or data directory that cannot be used as asked
        └── DirectoryHeld     the data directory has a manager, which is another process

`RemoteError` stands beside the tree: the call was made, once, and its own error is the answer.

`Disconnected` and `BatchRefused` are between a store and its session; users never see them.
"""

from typing import Literal

Outcome = Literal["not_applied", "unknown"]


class CounterServerError(Exception):
    """The base of every error that this package raises on purpose."""

    outcome: Outcome = "not_applied"


class InvalidRequest(CounterServerError, ValueError):
    """A name, number, bound or key that is not acceptable. Nothing was sent."""


class LimitReached(CounterServerError):
    """The result would lie outside the bounds that the caller gave, or outside 64 bits."""


class KeyReused(CounterServerError):
    """This idempotency key belongs to another request."""


class DeadlineExceeded(CounterServerError):
    """No answer before the deadline.

    :param outcome: ``"not_applied"`` if the operation was never sent, else ``"unknown"``.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message, outcome)
        self.message = message
        self.outcome = outcome

    def __str__(self) -> str:
        return self.message


class OutcomeUnknown(CounterServerError):
    """The store no longer knows a batch that may have reached it before."""

    outcome: Outcome = "unknown"


class StateLost(CounterServerError):
    """The store started again without its memory; the next call begins in the new epoch."""


class StorageFull(CounterServerError):
    """The store takes no writes: no room, or read-only. Nothing was changed, reads go on, and it heals by itself."""


class AccessDenied(CounterServerError):
    """The store refused the key, or the user, of this process."""


class Unsupported(CounterServerError):
    """The store in use cannot do this."""


class NotHosted(CounterServerError):
    """The manager that runs was started without this object, or with another one of its name."""


class RemoteError(Exception):
    """A method of a shared object raised an error of a type that is not built in. The call was made, once.

    :param name: the error's type, qualified.
    :param text: its message.
    :param remote_traceback: where it was raised, as text.
    """

    def __init__(self, name: str, text: str, remote_traceback: str) -> None:
        super().__init__(name, text, remote_traceback)
        self.name = name
        self.text = text
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


class StartupError(CounterServerError):
    """A server, a manager or a data directory that cannot be used as asked."""


class DirectoryHeld(StartupError):
    """The data directory has a manager, which is another process."""


class Stopped(SystemExit):
    """A signal asks this process to end. It is not an error of the code that it interrupts."""


class BatchRefused(Exception):
    """The store's definite answer that a batch's sequence does not follow: nothing was executed."""


class Disconnected(Exception):
    """The way to the store broke, or is not there.

    :param sent: whether any part of the batch may have left this process.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent
