"""The seam between a session and an engine: `apply`, which the manager's ledger and objects have too."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from .ledger import Contents
from .objects import Declaration
from .operations import Batch, Result
from .status import Status

RoundTrip = Literal["none", "short", "long"]


class Applies(Protocol):
    """Applies batches exactly once.

    An engine that cannot applies them at most once: it raises `OutcomeUnknown`, never `Disconnected`, for a batch that
    may have reached it.
    """

    def apply(self, batch: Batch, deadline: float, /) -> list[Result]:
        """Execute `batch`, or repeat its answer, in one atomic step.

        The last sequence of the batch's client gets the remembered results, and nothing is executed. The next one (1
        from an unknown client) is executed and remembered. Any other is refused. Sequence 0 has only reads.

        One thread at a time calls this with writes. A batch of reads may come at the same time.

        :param deadline: in `time.monotonic` seconds.
        :raises Disconnected: if there is no answer; the caller may send the same batch again.
        :raises BatchRefused: if the sequence does not follow; nothing was executed.
        :raises StateLost: if the store has started again without its memory.
        """
        ...


@dataclass(frozen=True)
class Finding:
    """One finding about a store's server: whether numbers can be lost, and how."""

    level: Literal["ok", "may lose", "problem"]
    sentence: str


class Store(Applies, Protocol):
    """An engine, as a session uses it."""

    # How long a call takes: "none", too short to be worth sharing; "short" or "long", less or more than waking the
    # threads that wait for it. A store may learn only at its first call whether it is "short" or "long".
    round_trip: RoundTrip

    def findings(self, deadline: float, /) -> list[Finding]:
        """Ask the live server what it promises, and change nothing. Raise as `ReportsStatus.status`."""
        ...

    def after_fork(self) -> None:
        """In the child of a fork, forget the parent's connections without disturbing them."""
        ...

    def close(self) -> None:
        """Close the connections. The next call opens them again."""
        ...

    def __str__(self) -> str:
        """Return the store's URL for messages, without secrets."""
        ...


class ObjectStore(Store, Protocol):
    """A store for the calls of one shared object."""

    def another(self) -> Store:
        """Return a store for another client of the same object, which waits for no call of this one."""
        ...


@runtime_checkable
class HostsObjects(Protocol):
    """A store that can host shared objects: `object` returns a store for the calls of one of them."""

    def object(self, declaration: Declaration) -> ObjectStore: ...


@runtime_checkable
class ShowsContents(Protocol):
    """A store that can return everything it counts."""

    def contents(self, deadline: float, /) -> Contents | None:
        """Return all counters and idempotency keys, as they are at one moment, while counting goes on.

        Return None if nothing was ever counted there. This starts and changes nothing. Expired keys are left out. When
        a key was used (`KeyRecord.used`), `clients` and `objects` are filled by `manager://` alone.

        :raises Disconnected: if there is no answer.
        :raises StateLost: if a part of it is missing.
        """
        ...


@runtime_checkable
class ReportsStatus(Protocol):
    """A store whose server has figures about itself."""

    def status(self, deadline: float) -> Status:
        """Return the server's figures. This starts and changes nothing, and delays no call.

        :raises Disconnected: if there is no answer.
        :raises CounterServerError: if the server does not let this process in.
        """
        ...


@runtime_checkable
class IsMade(Protocol):
    """A store whose first use makes something that stays: a directory, a file or tables."""

    def exists(self, deadline: float) -> bool:
        """Return whether that was made. This makes and starts nothing. Raise as `ReportsStatus.status`."""
        ...
