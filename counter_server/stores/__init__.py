"""The stores. `open_store` chooses one by the URL's scheme, and imports only its file."""

from collections.abc import Callable

from ..errors import InvalidRequest
from ..objects import Declaration
from ..settings import StoreOptions, default_data_dir
from ..store import Store


def open_store(
    url: str,
    options: StoreOptions | None = None,
    declared: Callable[[str], list[Declaration]] = lambda _url: [],
) -> Store:
    """Return the store of `url`, which connects at its first use, or raise `InvalidRequest`.

    :param declared: returns, for a URL, the shared objects of a manager that is started from here.
    """
    scheme, separator, _ = url.partition(":")
    match scheme if separator else "":
        case "manager":
            from ..manager.client import StateProxy
            from ..manager.directory import DataDirectory
            from ..manager.starter import Starter

            options, starter = options or StoreOptions(), None
            if options.start:
                starter = Starter(options, declared)
            return StateProxy(DataDirectory.from_url(url, options.data_dir or default_data_dir()), starter)
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
            named = f"{scheme}://" if set(url) & set("@?") else url  # the rest may hold a password
            raise InvalidRequest(
                f"no store is called {named!r}: use manager:///absolute/data/directory, redis://host, "
                "postgresql://host/database, mariadb://host/database, mysql://host/database, "
                "sqlite:////absolute/file.db, memcached://host or memory://"
            )
