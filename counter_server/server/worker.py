"""A worker process: waitress on the inherited socket, until it is told to stop or its parent ends."""

import logging
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server

from ..extension import SharedState
from ..settings import ServerSettings
from .application import Application
from .channel import Channel, Dispatcher, channels
from .logs import configure
from .refusal import LARGEST_HEAD, LARGEST_REQUEST

log = logging.getLogger(__name__)

BACKLOG = 1024  # connections that may wait to be accepted, over all workers
DRAIN_SECONDS = 10.0  # for requests under way, when asked to stop
LINGER_SECONDS = 2.0  # for clients that keep a connection, when it is replaced: the next answer on it is the last
BEAT_SECONDS = 1.0  # between signs of life
_MOST_CONNECTIONS = 4000
_SPARE_DESCRIPTORS = 100  # for all else that a worker opens
# Answers up to this many bytes are sent whole, by waitress's loop, when their thread has done with them. Were they sent
# by the thread, in parts, each part would give the GIL to the loop, which then turns and turns on a socket that the
# thread has yet to empty: 20 turns and 600 us of processor time for a request that waits for a store, in place of 1
# turn and 200 us.
_SEND_BYTES = 18_000


class Worker:
    """Runs `app` behind waitress on `sock`."""

    def __init__(self, sock: socket.socket, settings: ServerSettings, app: Flask) -> None:
        self._request_timeout = settings.request_timeout
        self._stopping = False
        self._linger = 0.0  # seconds
        self._most = _connection_limit()
        self._map: dict[int, Any] = {}
        self._app = app
        self._server: Any = create_server(
            app,
            map=self._map,
            sockets=[sock],
            _dispatcher=Dispatcher(settings.threads),
            backlog=BACKLOG,
            connection_limit=self._most,
            max_request_header_size=LARGEST_HEAD,
            max_request_body_size=LARGEST_REQUEST,
            asyncore_use_poll=True,
            send_bytes=_SEND_BYTES,
            # It takes them away where they are not its own to trust; those of a declared proxy are the application's.
            clear_untrusted_proxy_headers=not app.config.get("COUNTER_SERVER_TRUSTED_PROXIES"),
            ident="counter_server",
        )
        self._server.channel_class = Channel
        self._server.ending = False

    def stop(self, *, linger: float = 0.0) -> None:
        """Have `run` finish the requests under way and return. Safe in a signal handler.

        :param linger: seconds in which connections that clients keep are still answered, once, and told to close.
        """
        self._linger = linger
        self._stopping = True
        self._server.pull_trigger()

    def check(self) -> None:
        """Make one round trip to the store.

        :raises CounterServerError: if there is none.
        """
        with self._app.app_context():
            _ = SharedState().counter("visits").value  # which every store can tell; not every one can list

    def run(self, beat: Callable[[], None]) -> None:
        """Serve until `stop`, then finish what was begun.

        :param beat: called every second, as long as this process is not stuck.
        """
        next_beat = 0.0
        while not self._stopping:
            self._poll(BEAT_SECONDS)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                beat()
                self._tidy(now)
        # The other workers go on accepting on the same socket; this process only lets go of its copy.
        wasyncore.dispatcher.close(self._server)
        self._server.ending = True
        ending = time.monotonic()
        while self._unfinished(time.monotonic() - ending):
            self._poll(0.1)
        self._server.task_dispatcher.shutdown()

    def _poll(self, seconds: float) -> None:
        wasyncore.loop(timeout=seconds, use_poll=True, map=self._map, count=1)

    def _tidy(self, now: float) -> None:
        """Close what was coming, or not taken, for too long; for want of room, also what was idle for longest."""
        connections = channels(self._server)
        for channel in connections:
            if max(channel.coming_for(now), channel.stalled_for(now)) > self._request_timeout:
                channel.give_up()
        excess = len(connections) - self._most * 9 // 10
        if excess > 0:
            for channel in sorted((c for c in connections if c.idle), key=lambda c: c.last_activity)[:excess]:
                channel.give_up()

    def _unfinished(self, seconds: float) -> bool:
        """Whether there is still something to wait for, so long after the end began."""
        connections = channels(self._server)
        if seconds < self._linger and connections:
            return True
        return seconds < DRAIN_SECONDS and any(not channel.idle for channel in connections)


def _connection_limit() -> int:
    """How many connections there is room for: descriptors, as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _SPARE_DESCRIPTORS
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(soft - _SPARE_DESCRIPTORS, _MOST_CONNECTIONS), _SPARE_DESCRIPTORS)


def work(sock: socket.socket, settings: ServerSettings, application: Application, lifeline: Connection) -> None:
    """The life of a worker process.

    :param lifeline: is told when the first request would be answered, and from then on every second; its end means that
        the supervisor has gone.
    """
    configure("worker", settings.log_format)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue under load is what the threads are for
    worker = Worker(sock, settings, application.app)

    def stop(_number: int, _frame: FrameType | None) -> None:
        worker.stop()

    def retire(_number: int, _frame: FrameType | None) -> None:
        worker.stop(linger=LINGER_SECONDS)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, retire)
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    worker.check()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})

    poller = select.poll()
    poller.register(lifeline, select.POLLOUT)

    def beat() -> None:
        if poller.poll(0):  # a supervisor that is stopped does not read
            lifeline.send(None)

    lifeline.send(None)
    worker.run(beat)


def _end_with(lifeline: Connection) -> NoReturn:
    """The supervisor's end of it is closed by the kernel, however that ends. Nobody is left to drain for."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
