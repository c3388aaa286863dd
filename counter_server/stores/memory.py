"""`memory://`: this process only. For tests, and to show what goes wrong with several workers."""

from ..errors import NotHosted
from ..ledger import Changes, Contents, Ledger
from ..objects import Declaration, HostedObject
from ..settings import Caps
from ..store import Finding, RoundTrip


class _InMemory:
    """The parts of a store that a store in this process's own memory does not need."""

    def close(self) -> None:
        """Do nothing: there is no connection to close."""

    def __str__(self) -> str:
        return "memory://"

    def findings(self, deadline: float) -> list[Finding]:  # noqa: ARG002 - it never waits
        return [Finding("may lose", "memory:// ends with its process, and each process counts alone: for tests only")]


class _NoDisk:
    """Keeps nothing; but with a journal, a durable object must be one that can be pickled, as in the manager."""

    def commit(self, changes: Changes) -> None:
        """Do nothing."""


class MemoryObject(_InMemory, HostedObject):
    """The store of one shared object's calls."""

    round_trip: RoundTrip = "short"

    def another(self) -> "MemoryObject":
        return self


class MemoryStore(_InMemory, Ledger):
    """A `Store` that is exactly-once, and gone with its process."""

    round_trip: RoundTrip = "none"

    def __init__(self, contents: Contents | None = None, *, caps: Caps | None = None) -> None:
        self._objects: dict[str, MemoryObject] = {}
        super().__init__(contents, caps=caps)

    def contents(self, deadline: float) -> Contents:  # noqa: ARG002 - it never waits
        """See `ShowsContents`."""
        return self.copied()

    def object(self, declaration: Declaration) -> MemoryObject:
        """Return the one object of that name, or raise `NotHosted` if it is of another class."""
        hosted = self._objects.get(declaration.name)
        if hosted is None:
            hosted = self._objects.setdefault(declaration.name, MemoryObject(declaration, self.now, journal=_NoDisk()))
        if not hosted.declaration.means(declaration):
            raise NotHosted(f"{declaration} is not hosted in {self}: {hosted.declaration} has that name")
        return hosted

    def after_fork(self) -> None:
        super().after_fork()
        for hosted in self._objects.values():
            hosted.after_fork()
