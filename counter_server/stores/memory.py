"""`memory://`: this process only. For tests, and to see what goes wrong with several workers."""

from ..ledger import Ledger, results_of
from ..objects import Declaration, HostedObject
from ..operations import Batch, Result
from .base import Finding


class MemoryStore:
    """A `Store` in this process's own memory: exactly once, and gone with the process."""

    together = False

    def __init__(self) -> None:
        self._ledger = Ledger()

    def apply(self, batch: Batch, deadline: float) -> list[Result]:  # noqa: ARG002 - it never waits
        if batch.sequence == 0:
            return self._ledger.read(batch)
        return results_of(self._ledger.apply([batch])[0])

    def object(self, declaration: Declaration) -> "MemoryObject":
        return MemoryObject(HostedObject(declaration, self._ledger.now))

    def after_fork(self) -> None:
        self._ledger.after_fork()

    def close(self) -> None:
        """Nothing to let go of."""

    def findings(self, deadline: float) -> list[Finding]:  # noqa: ARG002 - it never waits
        """See `Examined`."""
        return [
            Finding("may lose", "memory:// ends with its process, and each process counts on its own: for tests only")
        ]

    def __str__(self) -> str:
        return "memory://"


class MemoryObject:
    """The store of one shared object's calls, in this process's own memory."""

    together = False

    def __init__(self, hosted: HostedObject) -> None:
        self._hosted = hosted

    def apply(self, batch: Batch, deadline: float) -> list[Result]:  # noqa: ARG002 - it never waits
        return results_of(self._hosted.apply(batch))

    def after_fork(self) -> None:
        self._hosted.after_fork()

    def close(self) -> None:
        """Nothing to let go of."""

    def __str__(self) -> str:
        return "memory://"
