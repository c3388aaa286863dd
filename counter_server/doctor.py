"""What decides whether numbers can be lost, asked of the live server: `counter-server doctor`."""

import time

from .errors import CounterServerError, Disconnected
from .settings import StoreOptions
from .stores import Finding, open_store


def examine(url: str, seconds: float) -> tuple[str, list[Finding]]:
    """The store's name, and what it says of itself, or why it cannot be asked. No manager is started for it.

    :param seconds: that it may take.
    :raises InvalidRequest: if there is no such store.
    """
    store = open_store(url, StoreOptions(start=False))
    try:
        return str(store), store.findings(time.monotonic() + seconds)
    except (CounterServerError, Disconnected) as error:
        return str(store), [Finding("problem", str(error))]
    finally:
        store.close()
