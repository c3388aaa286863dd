"""`memory://`: this process only. For tests, and to show what goes wrong with several workers."""

from ..ledger import Ledger
from ..objects import Declaration, HostedObject
from ..store import Finding, RoundTrip


class _InMemory:
    """The parts of a store that a store in this process's own memory does not need."""

    def close(self) -> None:
        """Do nothing: there is no connection to close."""

    def __str__(self) -> str:
        return "memory://"

    def findings(self, deadline: float) -> list[Finding]:  # noqa: ARG002 - it never waits
        return [Finding("may lose", "memory:// ends with its process, and each process counts alone: for tests only")]


class MemoryObject(_InMemory, HostedObject):
    """The store of one shared object's calls."""

    round_trip: RoundTrip = "short"


class MemoryStore(_InMemory, Ledger):
    """A `Store` that is exactly-once, and gone with its process."""

    round_trip: RoundTrip = "none"

    def object(self, declaration: Declaration) -> MemoryObject:
        return MemoryObject(declaration, self.now)
