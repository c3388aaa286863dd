"""One file per store; `open_store` picks by the URL's scheme and imports only that one."""

from ..errors import InvalidRequest
from ..settings import DEFAULT_STORE_OPTIONS, StoreOptions, default_data_dir
from .base import Store

__all__ = ["Store", "open_store"]


def open_store(url: str, options: StoreOptions = DEFAULT_STORE_OPTIONS) -> Store:
    """The store that `url` names. Nothing is connected yet.

    :raises InvalidRequest: if there is no such store.
    """
    match url.partition(":")[0]:
        case "manager":
            from ..manager.directory import DataDirectory
            from ..manager.starter import Starter
            from .manager import ManagerStore

            starter = (
                Starter(durability=options.durability, idle_timeout=options.idle_timeout) if options.start else None
            )
            return ManagerStore(DataDirectory.from_url(url, default_data_dir(options.instance_path)), starter)
        case "memory" if url == "memory://":
            from .memory import MemoryStore

            return MemoryStore()
        case _:
            raise InvalidRequest(f"no store is called {url!r}: use manager:///absolute/data/directory or memory://")
