"""One file per store; `open_store` picks by the URL's scheme and imports only that one."""

from urllib.parse import unquote, urlsplit

from ..errors import InvalidRequest
from ..settings import default_data_dir
from .base import Store

__all__ = ["Store", "manager_directory", "open_store"]


def open_store(url: str, *, instance_path: str = "instance") -> Store:
    """The store that `url` names. Nothing is connected yet.

    :param instance_path: the folder that holds the data directory of a `manager://` that names none.
    :raises InvalidRequest: if there is no such store.
    """
    match urlsplit(url).scheme:
        case "manager":
            from ..manager.directory import DataDirectory
            from .manager import ManagerStore

            return ManagerStore(DataDirectory(manager_directory(url) or default_data_dir(instance_path)))
        case "memory" if url == "memory://":
            from .memory import MemoryStore

            return MemoryStore()
        case _:
            raise InvalidRequest(f"no store is called {url!r}: use manager:///absolute/data/directory or memory://")


def manager_directory(url: str) -> str:
    """The absolute directory that a `manager://` URL names, or an empty string.

    :raises InvalidRequest: if it names something else.
    """
    parts = urlsplit(url)
    if parts.netloc or parts.query or parts.fragment:
        raise InvalidRequest(
            f"{url!r} is not a manager's URL: it has three slashes, manager:///absolute/data/directory"
        )
    return unquote(parts.path)
