"""The package's own checker, as tests ask it."""

from counter_server.history import assert_exactly_once

__all__ = ["assert_exactly_once"]
