"""A client's connection, as waitress has it, with limits: of time, of requests at once; and with an orderly end."""

import threading
import time
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ThreadedTaskDispatcher

from .refusal import Parser, Refusal
from .web.health import LIVEZ

_MOST_AT_ONCE = 16  # requests; the answers to so many fit into the buffer, so no thread waits for one who does not read


class Channel(HTTPChannel):  # type: ignore[misc] # waitress has no types
    """One connection. `server.ending` says that the worker takes no more requests on it than the next."""

    server: Any
    requests: Any
    requests_lock: threading.Lock
    parser_class = Parser
    error_task_class = Refusal

    _began = 0.0  # when the first byte came of the request that is being received
    _took = 0.0  # when the client last sent something, took something of an answer, or there was none to take

    def received(self, data: bytes) -> bool:
        self._took = time.monotonic()
        before = self.request
        taken = bool(super().received(data))
        if self.request is not before:
            self._began = time.monotonic()
        if len(self.requests) > _MOST_AT_ONCE:
            self._drop_excess()
        return taken

    def _drop_excess(self) -> None:
        """The client is told that the connection ends with the last answer, so it knows that the others were not."""
        with self.requests_lock:
            if len(self.requests) > _MOST_AT_ONCE:
                self.requests[_MOST_AT_ONCE - 1].headers["CONNECTION"] = "close"
                del self.requests[_MOST_AT_ONCE:]

    def _flush_some(self, do_close: bool = True) -> bool:  # noqa: FBT001, FBT002 - waitress's own
        sent = bool(super()._flush_some(do_close))  # pyright: ignore[reportAttributeAccessIssue]
        if sent:
            self._took = time.monotonic()
        return sent

    @property
    def is_probe(self) -> bool:
        """Whether the next request asks if this process is alive, which must not wait behind the others."""
        request = self.requests[0]
        # waitress, too, takes the slashes before a path for one.
        path = "/" + request.path.lstrip("/") if request.error is None else ""
        return path == LIVEZ and request.command in ("GET", "HEAD")

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

    def stalled_for(self, now: float) -> float:
        """The seconds for which the client has taken nothing of what is there for it; to be asked every second."""
        if self.requests or not self.total_outbufs_len:
            self._took = now
        return now - self._took

    def give_up(self) -> None:
        """Close it, from the thread of the loop, also if the client takes nothing any more."""
        self.handle_close()


def channels(server: Any) -> list[Channel]:
    """The connections of a server; a copy, for its threads make and end some."""
    return list(server.active_channels.values())


class Dispatcher(ThreadedTaskDispatcher):  # type: ignore[misc]
    """Serves requests by threads. One more thread is for probes alone: they are answered when all others are busy.

    The application answers both, so a probe gets the same checks, headers and line in the log. The channel hands over
    one request at a time, so answers on one connection keep their order. Written for waitress 3.0.2.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.set_thread_count(threads)
        self._probes: Any = ThreadedTaskDispatcher()
        self._probes.set_thread_count(1)

    def add_task(self, task: Any) -> None:
        if task.is_probe:
            self._probes.add_task(task)
        else:
            super().add_task(task)

    def shutdown(self, cancel_pending: bool = True, timeout: int = 5) -> bool:  # noqa: FBT001, FBT002 - waitress's own
        self._probes.shutdown(cancel_pending, timeout)
        return bool(super().shutdown(cancel_pending, timeout))
