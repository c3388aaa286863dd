"""`manager://`: the manager process of a data directory on this machine."""

from ..manager.client import StateProxy
from ..manager.directory import DataDirectory
from ..manager.starter import Starter
from ..objects import Declaration
from ..operations import Batch, Result
from ..status import Status
from .base import Finding

_KEPT: dict[str, Finding] = {
    "commit": Finding("ok", "durability commit: a number is on the disk before it is answered"),
    "process": Finding("may lose", "durability process: survives kill -9; a power cut may take the last moments"),
    "none": Finding("may lose", "durability none: in memory only; a restart of the manager begins anew"),
}


class ManagerStore:
    """A `Store` in the manager process: durable, shared by every process of this user."""

    together = False

    def __init__(
        self, directory: DataDirectory, starter: Starter | None, declaration: Declaration | None = None
    ) -> None:
        self.directory = directory
        self._starter = starter
        self.proxy = StateProxy(directory, starter, declaration)

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        return self.proxy.apply(batch, deadline)

    def object(self, declaration: Declaration) -> "ManagerStore":
        return ManagerStore(self.directory, self._starter, declaration)

    def findings(self, deadline: float) -> list[Finding]:
        """See `Examined`."""
        told = self.status(deadline)
        manager = f"the manager, pid {told.pid}, epoch {told.epoch}, has {told.counters} counters"
        slow = [
            Finding("problem", f"{call.object}.{call.method} has run for {call.seconds:.0f} s: end it, or the manager")
            for call in told.slow_calls
        ]
        return [Finding("ok", f"{manager} in {self.directory}"), _KEPT[told.durability], *slow]

    def status(self, deadline: float) -> Status:
        """See `TellsStatus`."""
        # A connection of its own, for this once: the other one may wait for a commit, or carry what must not wait.
        proxy = StateProxy(self.directory)
        try:
            return proxy.status(deadline)
        finally:
            proxy.close()

    def after_fork(self) -> None:
        self.proxy.after_fork()

    def close(self) -> None:
        self.proxy.close()

    def __str__(self) -> str:
        return self.directory.url
