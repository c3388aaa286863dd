"""What goes over the manager's socket: frames of MessagePack, capped, with deadlines.

It is registered with the standard library's own `listener_client` under the name `SERIALIZER`, so
`BaseManager`, `Server` and `BaseProxy` use it in place of pickle: who holds the key can send plain data to
the methods that are offered, and no code. A frame is a length of 4 bytes, big-endian, and the message.
"""

import os
import socket
import struct
import time
from math import inf
from multiprocessing import managers
from multiprocessing.connection import Connection as StandardConnection
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import Any, cast

from msgspec import Raw, Struct, msgpack

from .directory import peer_uid, short_address

SERIALIZER = "counter_server"
LARGEST_FRAME = 2**24  # bytes; a batch of the largest calls of shared objects has under 16 MiB
HANDSHAKE_SECONDS = 2.0  # for all of it: a peer that says nothing holds a thread no longer
FRAME_SECONDS = 2.0  # to finish a frame once begun, and to take one that was sent
_CHUNK = 8192  # bytes asked of the kernel at least; nearly every frame is shorter
_BACKLOG = 1024  # the standard 16 refuses or hangs a crowd of fresh clients
ACCEPT_PAUSE = 0.05  # seconds, when there is no descriptor left for a new connection

_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder().decode


def object_ident(name: str) -> str:
    """How a shared object is addressed: by its name, which no counter's ledger has."""
    return f"object:{name}"


class Call(Struct, array_like=True, frozen=True):
    """A request: the tuple that the standard library's proxies send."""

    ident: str | None
    method: str
    arguments: Raw
    keywords: dict[str, Any] = {}


class Connection:
    """A stream socket that carries frames; the interface is that of `multiprocessing.connection.Connection`.

    Not for two threads at a time. After any exception it must be closed: there may be half a frame on the way.

    The kernel keeps the time: the socket blocks, with a timer for sending and receiving that is set only when
    a deadline is nearer than it. Python's own socket timeouts cost a `poll` before each call. Only a socket that
    gevent or eventlet has patched needs them: it never blocks in the kernel, so that other greenlets can run.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # whatever `socket.setdefaulttimeout` says
        self._is_patched = not os.get_blocking(sock.fileno())
        self._socket = sock
        self._received = b""
        self._timer = inf  # seconds after which a wait ends, for us to look at the deadline
        self.set_deadline(time.monotonic() + HANDSHAKE_SECONDS)

    def set_deadline(self, deadline: float) -> None:
        """From now on, sending and receiving raise `TimeoutError` at `deadline` (`time.monotonic` seconds)."""
        self._deadline = deadline
        remaining = deadline - time.monotonic()
        if remaining < self._timer:
            self._set_timer(remaining)

    def _set_timer(self, seconds: float) -> None:
        self._timer = max(seconds, 0.001)  # 0 would mean: for ever
        if self._is_patched:
            self._socket.settimeout(self._timer)
            return
        whole = int(self._timer)
        interval = struct.pack("ll", whole, int((self._timer - whole) * 1e6) or 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def _waited(self) -> None:
        """The timer has ended a wait: go on with what is left of the time, if anything is."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no answer in time")
        self._set_timer(min(remaining, HANDSHAKE_SECONDS))

    def connect(self, address: str) -> None:
        """:raises OSError: also where so many are waiting to be accepted that there is no place in the queue."""
        self._socket.connect(address)

    def send_bytes(self, message: bytes) -> None:
        frame = len(message).to_bytes(4, "big") + message
        while frame:
            try:
                frame = frame[self._socket.send(frame) :]
            except (BlockingIOError, TimeoutError):
                self._waited()

    def recv_bytes(self, maxlength: int = LARGEST_FRAME) -> bytes:
        """The next message.

        :raises EOFError: if the peer has closed.
        :raises OSError: if the message is longer than `maxlength`.
        """
        self._receive(4)
        end = 4 + int.from_bytes(self._received[:4], "big")
        if end - 4 > maxlength:
            raise OSError(f"a frame of {end - 4} bytes; at most {maxlength}")
        self._receive(end)
        message, self._received = self._received[4:end], self._received[end:]
        return message

    def _receive(self, size: int) -> None:
        """Have at least `size` bytes in `_received`."""
        while len(self._received) < size:
            try:
                chunk = self._socket.recv(max(_CHUNK, size - len(self._received)))
            except (BlockingIOError, TimeoutError):
                self._waited()
                continue
            if not chunk:
                raise EOFError("the other end has closed the connection")
            self._received += chunk
            if len(self._received) < size and time.monotonic() > self._deadline:
                raise TimeoutError("a frame that came too slowly")

    def await_frame(self) -> None:
        """Wait without limit for the next frame to begin; it then has `FRAME_SECONDS` to arrive."""
        self._deadline = inf
        self._receive(1)
        self.set_deadline(time.monotonic() + FRAME_SECONDS)

    def send(self, message: object) -> None:
        self.send_bytes(_encode(message))

    def recv(self) -> Any:
        return _decode(self.recv_bytes())

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


class Listener:
    """A listening AF_UNIX socket that takes connections of this user alone."""

    def __init__(self, address: str, backlog: int = _BACKLOG) -> None:
        self.address = address
        self._backlog = max(backlog, _BACKLOG)
        self._closed = False
        self._socket = self._bound()

    def _bound(self) -> socket.socket:
        bound = socket.socket(socket.AF_UNIX)
        try:
            with short_address(self.address) as short:
                bound.bind(short)
            self._file = os.lstat(self.address)
            bound.listen(self._backlog)
        except BaseException:
            bound.close()
            raise
        return bound

    @property
    def is_found(self) -> bool:
        """Whether who connects to the address comes here: its file was not removed or replaced."""
        try:
            return os.path.samestat(self._file, os.lstat(self.address))
        except OSError:
            return False

    def rebind(self) -> None:
        """Listen at the address anew, where nothing stands any more.

        :raises OSError: if that cannot be.
        """
        before, self._socket = self._socket, self._bound()
        before.shutdown(socket.SHUT_RDWR)  # wakes who waits in `accept`, and closes it

    def accept(self) -> Connection:
        """The next connection.

        :raises OSError: for one that failed or is another user's; the standard server asks again.
        """
        listening = self._socket
        try:
            sock, _ = listening.accept()
        except OSError:
            if self._closed:
                raise SystemExit from None  # ends the accepting thread, which would ask for ever
            if listening is not self._socket:
                listening.close()
            time.sleep(ACCEPT_PAUSE)
            raise
        if peer_uid(sock) != os.geteuid():
            sock.close()
            raise PermissionError("a connection of another user")
        return Connection(sock)

    def close(self) -> None:
        self._closed = True
        self._socket.close()


def connect(address: str, authkey: bytes | None = None, *, deadline: float | None = None) -> Connection:
    """Connect to a manager and prove to each other that both hold the key.

    :param deadline: in `time.monotonic` seconds; the handshake's own limit holds as well.
    :raises OSError: if nobody listens there, or does not answer in time.
    :raises multiprocessing.AuthenticationError: if the keys differ.
    """
    limit = time.monotonic() + HANDSHAKE_SECONDS
    sock = socket.socket(socket.AF_UNIX)
    try:
        connection = Connection(sock)
        peer = cast(StandardConnection, connection)
        connection.set_deadline(limit if deadline is None else min(limit, deadline))
        with short_address(address) as short:
            connection.connect(short)
        if authkey is not None:
            answer_challenge(peer, authkey)
            deliver_challenge(peer, authkey)
        return connection
    except BaseException:
        sock.close()
        raise


vars(managers)["listener_client"][SERIALIZER] = (Listener, connect)
