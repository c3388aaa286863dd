"""One file per store; `open_store` picks by the URL's scheme and imports only that one."""

from ..errors import InvalidRequest
from ..settings import default_data_dir
from .base import Store

__all__ = ["Store", "open_store"]


def open_store(url: str, *, instance_path: str = "instance") -> Store:
    """The store that `url` names. Nothing is connected yet.

    :param instance_path: the folder that holds the data directory of a `manager://` that names none.
    :raises InvalidRequest: if there is no such store.
    """
    match url.partition(":")[0]:
        case "manager":
            from ..manager.directory import DataDirectory
            from .manager import ManagerStore

            return ManagerStore(DataDirectory.from_url(url, default_data_dir(instance_path)))
        case "memory" if url == "memory://":
            from .memory import MemoryStore

            return MemoryStore()
        case _:
            raise InvalidRequest(f"no store is called {url!r}: use manager:///absolute/data/directory or memory://")
