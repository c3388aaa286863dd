"""A worker process: waitress on the inherited socket, until a signal stops it or the supervisor ends.

It extends internals of waitress: the channel, the parser, the receiver of chunks, the error task and the dispatcher.
All of this was written against the source of waitress 3.0.2; pyproject.toml keeps the version below 3.1.
"""

# waitress has no types.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false

import logging
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, MutableSequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn

import msgspec
from flask import Flask

from ..errors import Outcome, StartupError
from ..extension import SharedState
from ..output import configure
from ..system import room_for
from .settings import ServerSettings
from .web import create_app, create_dashboard
from .web.health import LIVEZ
from .web.problems import Problem

try:
    from waitress import channel, parser, receiver, server, task, utilities, wasyncore
except ImportError as error:
    raise StartupError("the server needs waitress: pip install 'counter-server[server]'") from error

BACKLOG = 1024  # connections that may wait to be accepted, over all workers
DRAIN_SECONDS = 10.0  # for open requests, when asked to stop
LINGER_SECONDS = 2.0  # for idle connections of a worker that is replaced: the next answer on one is its last
BEAT_SECONDS = 1.0  # between signs of life
LARGEST_HEAD = 2**16  # bytes
LARGEST_REQUEST = 2**20  # bytes; the application's own limit is lower
_HOLD_SECONDS = 0.002  # for which a worker with more connections than another leaves new ones to it
_MAX_CONNECTIONS = 4000
_OTHER_DESCRIPTORS = 100
_MAX_PIPELINED = 16  # their answers fit into the buffer, so no thread waits for a client that does not read
# waitress's loop sends answers of up to this size whole. Their own thread would send them in parts, and hand the GIL to
# the loop each time: 600 us of processor time for a request, instead of 200.
_SEND_BYTES = 18_000


def listen(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens on the host and the port of `settings`; `StartupError` says what prevents it."""
    host, port = settings.host, settings.port
    if not host:
        raise StartupError("--host is empty: name an address, 127.0.0.1 for this machine, 0.0.0.0 for all")
    try:
        *kind, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(*kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
        return sock
    except (OSError, ValueError) as error:  # ValueError: the host is not even a valid name
        reason = getattr(error, "strerror", None) or error
        raise StartupError(
            f"cannot listen on {host!r} port {port}: {reason}; choose another --host or --port"
        ) from error


def announce(sock: socket.socket) -> None:
    host, port = sock.getsockname()[:2]
    print(f"Serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def show(settings: ServerSettings) -> None:
    """Serve the dashboard of a store alone, in this process, until SIGTERM or Ctrl-C.

    It starts no manager and no workers, and writes no file.
    """
    configure("dashboard", settings.log_format)
    with listen(settings) as sock:
        address = {"COUNTER_SERVER_HOST": sock.getsockname()[0], "COUNTER_SERVER_STORE": settings.store}
        worker = Worker(sock, settings, create_dashboard({**settings.web, **address}))

        def stop(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)  # a second one ends everything
            worker.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        announce(sock)
        worker.run(lambda: None)


def work(
    sock: socket.socket,
    settings: ServerSettings,
    config: Mapping[str, Any],
    connections: MutableSequence[int],
    place: int,
    app: Flask | None,
    lifeline: Connection,
) -> None:
    """Run a worker process.

    :param connections: how many each worker has, in memory that they share; the number of this one is at `place`.
    :param app: made by the supervisor, if this is its fork.
    :param lifeline: receives a message when this worker is ready, and then every second. It ends with the supervisor.
    """
    configure("worker", settings.log_format)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # under load a queue is normal
    app = app or create_app(config)
    worker = Worker(sock, settings, app, connections, place)
    signal.signal(signal.SIGTERM, lambda _number, _frame: worker.stop())
    signal.signal(signal.SIGHUP, lambda _number, _frame: worker.stop(linger=LINGER_SECONDS))
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    with app.app_context():
        _ = SharedState().counter("visits").value  # raises an error if the store does not answer
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    poller = select.poll()
    poller.register(lifeline, select.POLLOUT)

    def beat() -> None:
        if poller.poll(0):  # a stopped supervisor does not read
            lifeline.send(None)

    worker.run(beat)


def _end_with(lifeline: Connection) -> NoReturn:
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


class Worker:
    """Runs `app` behind waitress on `sock`."""

    def __init__(
        self,
        sock: socket.socket,
        settings: ServerSettings,
        app: Flask,
        connections: MutableSequence[int] | None = None,
        place: int = 0,
    ) -> None:
        self._counts, self._place = connections or [0], place
        self._hold_until = 0.0  # no connection is accepted before, in `time.monotonic` seconds
        self._request_timeout = settings.request_timeout
        self._stopping = False
        self._linger = 0.0
        self._max_connections = room_for(_MAX_CONNECTIONS, _OTHER_DESCRIPTORS)
        channels: dict[int, Any] = {}
        self._poll = partial(wasyncore.loop, use_poll=True, map=channels, count=1)
        self._server: Any = server.create_server(
            app,
            map=channels,
            sockets=[sock],
            threads=settings.threads,
            backlog=BACKLOG,
            connection_limit=self._max_connections,
            max_request_header_size=LARGEST_HEAD,
            max_request_body_size=LARGEST_REQUEST,
            send_bytes=_SEND_BYTES,
            # The application reads the headers of trusted proxies itself.
            clear_untrusted_proxy_headers=not app.config.get("COUNTER_SERVER_TRUSTED_PROXIES"),
            ident="counter_server",
        )
        self._server.channel_class = Channel
        self._server.add_task = self._add_task
        self._server.readable, self._readable = self._may_accept, self._server.readable
        self._server.handle_accept, self._accept = self._accept_in_turn, self._server.handle_accept
        self._server.ending = False
        self._probes: Any = task.ThreadedTaskDispatcher()
        self._probes.set_thread_count(1)

    def _add_task(self, connection: "Channel") -> None:
        # Probes have their own thread, so that a busy worker answers them.
        (self._probes if connection.is_probe else self._server.task_dispatcher).add_task(connection)

    def _may_accept(self) -> bool:
        return time.monotonic() >= self._hold_until and bool(self._readable())

    def _accept_in_turn(self) -> None:
        """Accept a connection, but leave it to the other workers for a moment if this one has more than they.

        All wait at one socket. Otherwise the first that wakes would accept a whole crowd, and use one core for it.
        """
        now, own = time.monotonic(), len(self._server.active_channels)
        if own > min(self._counts) + 1 and now > self._hold_until + _HOLD_SECONDS:
            self._hold_until = now + _HOLD_SECONDS
            return
        self._accept()
        self._counts[self._place] = own + 1

    def stop(self, *, linger: float = 0.0) -> None:
        """Make `run` finish open requests and return; for `linger` seconds, idle connections get one last answer."""
        self._linger = linger
        self._stopping = True
        self._server.pull_trigger()

    def run(self, beat: Callable[[], None]) -> None:
        """Serve until `stop`, and call `beat` every second."""
        next_beat = 0.0
        while not self._stopping:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                beat()
                self._close_overdue(now)
            self._counts[self._place] = len(self._server.active_channels)
            self._poll(timeout=_HOLD_SECONDS if now < self._hold_until else BEAT_SECONDS)
        # This closes a copy of the socket: the other workers go on accepting.
        wasyncore.dispatcher.close(self._server)
        self._server.ending = True
        ending = time.monotonic()
        while connections := list(self._server.active_channels.values()):  # a copy: other threads close some
            elapsed = time.monotonic() - ending
            drained = elapsed > DRAIN_SECONDS or all(connection.idle for connection in connections)
            if drained and elapsed > self._linger:
                break
            self._poll(timeout=0.1)
        self._probes.shutdown()
        self._server.task_dispatcher.shutdown()

    def _close_overdue(self, now: float) -> None:
        """Close connections whose clients send or read too slowly, and the longest idle ones if there are too many."""
        connections = list(self._server.active_channels.values())
        for connection in connections:
            if connection.is_overdue(now, self._request_timeout):
                connection.handle_close()
        excess = max(len(connections) - self._max_connections * 9 // 10, 0)
        for connection in sorted((c for c in connections if c.idle), key=lambda c: c.last_activity)[:excess]:
            connection.handle_close()


class Chunks(receiver.ChunkedReceiver):  # type: ignore[misc] # waitress has no types
    """A chunked body that consists of sizes and data only.

    The receiver of waitress also accepts a lone LF after a size, empty lines, extensions and any trailer. Other
    programs read those differently, which lets a client smuggle a request past them.
    """

    # Each match begins with the end of the chunk before it; the first chunk gets one for free.
    _CHUNK = re.compile(rb"\r\n(?!0+\r)([0-9A-Fa-f]{1,16})\r\n")
    _LAST = re.compile(rb"\r\n0{1,16}\r\n\r\n")
    _INCOMPLETE = re.compile(rb"\r?|\r\n[0-9A-Fa-f]{0,16}\r?|\r\n0{1,16}\r\n\r?")

    completed: bool
    error: Any
    _missing = 0  # bytes of the current chunk

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer)
        self._unread = bytearray(b"\r\n")

    def received(self, s: bytes) -> int:
        self._unread += s
        while not self.completed and self.error is None:
            data = bytes(self._unread[: self._missing])
            self.buf.append(data)
            self._missing -= len(data)
            del self._unread[: len(data)]
            if self._missing or self._INCOMPLETE.fullmatch(self._unread):
                break
            if last := self._LAST.match(self._unread):
                self.completed = True
                del self._unread[: last.end()]
            elif chunk := self._CHUNK.match(self._unread):
                self._missing = int(chunk[1], 16)
                del self._unread[: chunk.end()]
                if len(self) + self._missing >= LARGEST_REQUEST:
                    self.error = utilities.RequestEntityTooLarge(f"exceeds max_body of {LARGEST_REQUEST}")
            else:
                self.error = utilities.BadRequest(
                    "a chunk must be its size in hexadecimal digits and its data, each with CR LF"
                )
        return len(s) - len(self._unread) if self.completed else len(s)


class Parser(parser.HTTPRequestParser):  # type: ignore[misc]
    """Refuses also requests whose end or host other programs might read differently (RFC 9112)."""

    # A lone CR or LF (except a CR at the end of the data, whose LF may follow), or a line that begins with a space.
    _MALFORMED = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|(?:\A|\n)[ \t\v\f]")
    _FIRST_LINE = re.compile(rb"[^ ]+ (?:/|(?i:https?)://|\*(?= |\Z))[!\"$-~]*(?: HTTP/1\.[01])?")
    _TRANSFER_ENCODING = re.compile(rb"^transfer-encoding:[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
    _ENDS_CHUNKED = re.compile(rb"(?:(?!chunked)[^,]+,[ \t]*)*chunked", re.IGNORECASE)  # waitress answers others by 501

    body_rcv: Any
    path = ""  # until the first line is parsed

    def received(self, data: bytes) -> int:
        """Read what belongs to the request, and return its number of bytes."""
        if self.body_rcv is None:
            head = self.header_plus + data
            end = utilities.find_double_newline(head)
            # Checked here, because waitress strips the head and finds its end in its own way.
            if self._MALFORMED.search(head, max(len(self.header_plus) - 1, 0), end if end >= 0 else len(head)):
                self.error = utilities.BadRequest(
                    "each line must end with CR LF, contain neither, and not begin with a space"
                )
                self.completed = True
                return len(data)
        taken = int(super().received(data))
        if self.completed:  # waitress would still send 100 Continue, and wait for a body
            self.expect_continue = False
        return taken

    def parse_header(self, header_plus: bytes) -> None:
        first_line, _, headers = header_plus.partition(b"\r\n")
        if not self._FIRST_LINE.fullmatch(first_line):
            raise parser.ParsingError(
                "the first line must be a method, a path or URL, and HTTP/1.1, with single spaces"
            )
        encodings = self._TRANSFER_ENCODING.findall(headers)
        if len(encodings) > 1 or not all(map(self._ENDS_CHUNKED.fullmatch, encodings)):
            raise parser.ParsingError("only one Transfer-Encoding is allowed, and it must end with chunked")
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # from Python's parsers of numbers and URLs
            raise parser.ParsingError(str(error)) from None
        if encodings and ("CONTENT_LENGTH" in self.headers or self.version != "1.1"):
            raise parser.ParsingError("Transfer-Encoding is not allowed with Content-Length, or before HTTP/1.1")
        if "," in self.headers.get("HOST", "" if self.version != "1.1" else ","):
            raise parser.ParsingError("exactly one Host header is required")
        if self.proxy_scheme:  # then the host of the URL counts (RFC 9112, 3.2.2)
            host = self.headers.setdefault("HOST", self.proxy_netloc)
            if not host or host.lower() != self.proxy_netloc.lower():
                raise parser.ParsingError("the URL and the Host header name different hosts")
        if self.chunked:
            self.body_rcv = Chunks(self.body_rcv.getbuf())


class Refusal(task.ErrorTask):  # type: ignore[misc]
    """Answers malformed requests, and failures of the application, with a problem document."""

    def execute(self) -> None:
        error: Any = self.request.error
        outcome: Outcome = "unknown" if error.code == 500 else "not_applied"
        body = msgspec.json.encode(Problem("about:blank", error.reason, error.code, str(error.body)[:200], outcome))
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [
            ("Content-Type", "application/problem+json"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(channel.HTTPChannel):  # type: ignore[misc]
    """A client's connection with limits. Once `server.ending` is true, its next answer closes it."""

    parser_class = Parser
    error_task_class = Refusal

    _progress: Any = None
    _progressed = 0.0  # when `is_overdue` last saw progress

    def received(self, data: bytes) -> bool:
        taken = bool(super().received(data))
        with self.requests_lock:
            if len(self.requests) > _MAX_PIPELINED:
                # The last answer announces the close, so the client knows that the others were not applied.
                self.requests[_MAX_PIPELINED - 1].headers["CONNECTION"] = "close"
                del self.requests[_MAX_PIPELINED:]
        return taken

    def service(self) -> None:
        if self.server.ending:
            self.requests[0].headers["CONNECTION"] = "close"  # waitress then closes after the answer
        super().service()

    @property
    def is_probe(self) -> bool:
        """Whether the next request asks if this process is alive."""
        request = self.requests[0]
        path = "/" + request.path.lstrip("/") if request.error is None else ""  # as waitress reads it
        return path == LIVEZ and request.command in ("GET", "HEAD")

    @property
    def idle(self) -> bool:
        """Whether no request has begun and no answer is left to send."""
        return not (self.requests or self.request is not None or self.total_outbufs_len)

    def is_overdue(self, now: float, seconds: float) -> bool:
        """Return whether the client has made no progress for `seconds`, as seen by calls of this every second."""
        progress = (self.request, self.total_outbufs_len and self.last_activity)
        if self.requests or self.idle or progress != self._progress:
            self._progress, self._progressed = progress, now
        return now - self._progressed > seconds
