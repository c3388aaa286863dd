"""A client's connection, as waitress has it, with limits: a time for each request, and an orderly end."""

import time
from typing import Any

from waitress.channel import HTTPChannel


class Channel(HTTPChannel):  # type: ignore[misc] # waitress has no types
    """One connection. `server.ending` says that the worker takes no more requests on it than the next."""

    _began = 0.0  # when the first byte came of the request that is being received

    def received(self, data: bytes) -> bool:
        before = self.request
        taken = bool(super().received(data))
        if self.request is not before:
            self._began = time.monotonic()
        return taken

    def service(self) -> None:
        if self.server.ending:
            # waitress then says so to the client, and closes when the answer is sent.
            self.requests[0].headers["CONNECTION"] = "close"
        super().service()

    @property
    def idle(self) -> bool:
        """Whether no request has begun on it, and no answer is yet to be sent."""
        return not (self.requests or self.request is not None or self.total_outbufs_len)

    def coming_for(self, now: float) -> float:
        """The seconds since the first byte of a request that is not all there; 0 where there is none."""
        return now - self._began if self.request is not None and not self.requests else 0.0

    def give_up(self) -> None:
        """Have it closed."""
        self.will_close = True


def channels(server: Any) -> list[Channel]:
    """The connections of a server; a copy, for its threads make and end some."""
    return list(server.active_channels.values())
