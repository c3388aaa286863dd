"""The stores; `open_store` picks one by the URL's scheme, and imports nothing for the others."""

from collections.abc import Callable

from ..errors import InvalidRequest
from ..objects import Declaration
from ..settings import DEFAULT_STORE_OPTIONS, StoreOptions, default_data_dir
from .base import Examined, Finding, HostsObjects, Store, TellsStatus

__all__ = ["Examined", "Finding", "HostsObjects", "Store", "TellsStatus", "open_store"]


def open_store(
    url: str,
    options: StoreOptions = DEFAULT_STORE_OPTIONS,
    declared: Callable[[str], list[Declaration]] = lambda _url: [],
) -> Store:
    """Return the store that `url` names. Nothing is connected yet.

    :param declared: returns the shared objects that a manager at a URL has to host, if this process starts it.
    :raises InvalidRequest: if the URL names none of the stores.
    """
    scheme, separator, _ = url.partition(":")
    match scheme if separator else "":
        case "manager":
            from ..manager.directory import DataDirectory
            from ..manager.starter import Starter
            from .manager import ManagerStore

            starter = None
            if options.start:
                starter = Starter(durability=options.durability, idle_timeout=options.idle_timeout, declared=declared)
            return ManagerStore(DataDirectory.from_url(url, default_data_dir(options.instance_path)), starter)
        case "redis" | "rediss" | "valkey" | "valkeys" | "unix":
            from .redis import RedisStore

            return RedisStore(url)
        case "postgresql" | "postgresql+psycopg" | "mysql" | "mysql+pymysql" | "mariadb" | "mariadb+pymysql" | "sqlite":
            from .databases import open_sql_store

            return open_sql_store(url)
        case "memcached":
            from .memcached import MemcachedStore

            return MemcachedStore(url)
        case "memory" if url == "memory://":
            from .memory import MemoryStore

            return MemoryStore()
        case _:
            raise InvalidRequest(
                f"no store is called {url!r}: use manager:///absolute/data/directory, redis://host, "
                "postgresql://host/database, mariadb://host/database, mysql://host/database, "
                "sqlite:////absolute/file.db, memcached://host or memory://"
            )
