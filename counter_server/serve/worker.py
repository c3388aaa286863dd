"""A worker process: waitress on the inherited socket, until it is told to stop or its parent ends."""

import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

from waitress import wasyncore
from waitress.server import BaseWSGIServer, create_server

from ..extension import SharedState
from ..web import create_app

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that may wait to be accepted, over all workers
DRAIN_SECONDS = 10.0  # for requests under way, when asked to stop
_CONNECTION_LIMIT = 1000
_LARGEST_REQUEST = 2**20  # bytes; the application's own limit is lower and answers with a problem document
_POLL_SECONDS = 1.0


class Worker:
    """Runs `create_app` behind waitress on `sock`."""

    def __init__(self, sock: socket.socket, *, threads: int, config: dict[str, Any]) -> None:
        self._stopping = False
        self._map: dict[int, Any] = {}
        self._app = create_app(config)
        # One socket, so one server of this class; the function can also return one for several.
        self._server: BaseWSGIServer = create_server(  # pyright: ignore[reportAttributeAccessIssue]
            self._app,
            map=self._map,
            sockets=[sock],
            threads=threads,
            backlog=BACKLOG,
            connection_limit=_CONNECTION_LIMIT,
            max_request_body_size=_LARGEST_REQUEST,
            asyncore_use_poll=True,
            # It takes them away where they are not its own to trust; those of a declared proxy are the application's.
            clear_untrusted_proxy_headers=not self._app.config["COUNTER_SERVER_TRUSTED_PROXIES"],
            ident="counter_server",
        )

    def stop(self) -> None:
        """Have `run` finish the requests under way and return. Safe in a signal handler."""
        self._stopping = True
        self._server.pull_trigger()

    def check(self) -> None:
        """Make one round trip to the store.

        :raises CounterServerError: if there is none.
        """
        with self._app.app_context():
            _ = SharedState().counter("visits").value  # which every store can tell; not every one can list

    def run(self) -> None:
        """Serve until `stop`, then finish what was begun."""
        while not self._stopping:
            self._poll(_POLL_SECONDS)
        # The other workers go on accepting on the same socket; this process only lets go of its copy.
        wasyncore.dispatcher.close(self._server)
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._busy() and time.monotonic() < deadline:
            self._poll(0.1)
        self._server.task_dispatcher.shutdown()

    def _poll(self, seconds: float) -> None:
        wasyncore.loop(timeout=seconds, use_poll=True, map=self._map, count=1)

    def _busy(self) -> bool:
        """Whether any connection has a request begun, or an answer not yet sent."""
        active: Any = self._server.active_channels  # a dictionary, whatever the annotation there says
        channels = list(active.values())
        return any(channel.requests or channel.request is not None or channel.total_outbufs_len for channel in channels)


def work(sock: socket.socket, threads: int, config: dict[str, Any], lifeline: Connection) -> None:
    """The life of a worker process.

    :param lifeline: is told when the first request would be answered; its end means that the supervisor has gone.
    """
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s worker {os.getpid()} %(levelname)s %(message)s")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue under load is what the threads are for
    worker = Worker(sock, threads=threads, config=config)

    def stop(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    worker.check()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    lifeline.send(None)
    worker.run()


def _end_with(lifeline: Connection) -> NoReturn:
    """The supervisor's end of it is closed by the kernel, however that ends. Nobody is left to drain for."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
