"""Shared state for Flask workers without a database server: every increment is counted exactly once.

from counter_server import SharedState

shared = SharedState(app)
number = shared.counter("visits").increment()
"""

from typing import TYPE_CHECKING, Any

from .errors import CounterServerError
from .manager.hosting import in_manager
from .settings import StoreOptions
from .state import Counter, State, open_state

if TYPE_CHECKING:
    from .extension import SharedState

__all__ = ["Counter", "CounterServerError", "SharedState", "State", "StoreOptions", "in_manager", "open_state"]


def __getattr__(name: str) -> Any:
    # Importing Flask takes long, and the manager process does not need it.
    if name == "SharedState":
        from .extension import SharedState

        return SharedState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
