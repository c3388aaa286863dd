"""The last few of something, for all workers one list; the manager hosts it."""

from collections import deque
from typing import Any


class Recent:
    """Keeps what was added last.

    :param size: how many.
    """

    def __init__(self, size: int) -> None:
        self._items: deque[Any] = deque(maxlen=size)

    def add(self, item: Any) -> list[Any]:
        """Add one, and return all: the greatest first, whichever worker was quicker to add its own."""
        self._items.append(item)
        return sorted(self._items, reverse=True)
