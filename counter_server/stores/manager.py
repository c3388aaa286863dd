"""`manager://`: the manager process of a data directory on this machine."""

from ..manager.client import LedgerProxy
from ..manager.directory import DataDirectory
from ..manager.starter import Starter
from ..operations import Batch, Result


class ManagerStore:
    """A `Store` in the manager process: durable, shared by every process of this user."""

    def __init__(self, directory: DataDirectory, starter: Starter | None) -> None:
        self.directory = directory
        self.proxy = LedgerProxy(directory, starter)

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        return self.proxy.apply(batch, deadline)

    def after_fork(self) -> None:
        self.proxy.after_fork()

    def close(self) -> None:
        self.proxy.close()

    def __str__(self) -> str:
        return self.directory.url
