"""`manager://`: the manager process of a data directory on this machine."""

from ..manager.client import StateProxy
from ..manager.directory import DataDirectory
from ..manager.starter import Starter
from ..objects import Declaration
from ..operations import Batch, Result


class ManagerStore:
    """A `Store` in the manager process: durable, shared by every process of this user."""

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

    def after_fork(self) -> None:
        self.proxy.after_fork()

    def close(self) -> None:
        self.proxy.close()

    def __str__(self) -> str:
        return self.directory.url
