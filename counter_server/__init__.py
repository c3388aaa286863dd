"""Shared state for Flask workers without a database server: every increment is counted exactly once.

from counter_server import SharedState

shared = SharedState(app)
number = shared.counter("visits").increment()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import CounterServerError
    from .extension import SharedState
    from .manager.hosting import in_manager
    from .settings import StoreOptions
    from .state import Counter, State, open_state

__all__ = ["Counter", "CounterServerError", "SharedState", "State", "StoreOptions", "in_manager", "open_state"]

_PLACES = {
    "Counter": ".state",
    "CounterServerError": ".errors",
    "SharedState": ".extension",
    "State": ".state",
    "StoreOptions": ".settings",
    "in_manager": ".manager.hosting",
    "open_state": ".state",
}


def __getattr__(name: str) -> Any:
    # At its first use: the manager process does not need Flask, and pytest, which finds our plugin, needs nothing.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_PLACES[name], __name__), name)
    return found
