"""For tests: an app's state in memory, the contract of a store as pytest tests, and the checker of histories."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..history import Operation, assert_exactly_once, violations
    from ..state import in_memory
    from .contract import NAMES, RandomBatches, StoreContract, apply

__all__ = [
    "NAMES",
    "Operation",
    "RandomBatches",
    "StoreContract",
    "apply",
    "assert_exactly_once",
    "in_memory",
    "violations",
]

_PLACES = {
    "in_memory": "counter_server.state",
    **dict.fromkeys(("Operation", "assert_exactly_once", "violations"), "counter_server.history"),
    **dict.fromkeys(("NAMES", "RandomBatches", "StoreContract", "apply"), f"{__name__}.contract"),
}


def __getattr__(name: str) -> Any:
    # At its first use: pytest imports this package at each start, for the plugin in it.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _PLACES[name]
    if place.endswith(".contract"):
        import pytest

        pytest.register_assert_rewrite(place)
    found = globals()[name] = getattr(import_module(place), name)
    return found
