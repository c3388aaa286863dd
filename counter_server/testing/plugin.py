"""The pytest plugin: the fixture `memory_state`. pytest finds it by the package's entry point."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def memory_state() -> Iterator[None]:
    """Keep all shared state of a test in memory, and begin empty; see `counter_server.testing.in_memory`."""
    from ..state import in_memory  # not before it is used: pytest imports this file at each start

    with in_memory():
        yield
