"""Frames of MessagePack on the manager's socket, with a cap and deadlines.

They replace pickle in the standard library's `BaseManager`, `Server` and `BaseProxy`: a peer with the key can send
plain data to the offered methods, and no code. A frame is a length of 4 bytes, big-endian, and the message.
"""

import os
import socket
import struct
import time
from contextlib import suppress
from math import inf
from multiprocessing import managers
from multiprocessing.connection import Connection as StandardConnection
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, cast

from msgspec import Raw, Struct, msgpack

from ..errors import AccessDenied
from ..objects import Declaration
from ..os_errors import not_ours
from ..plain import largest_value
from .directory import peer, short_address

SERIALIZER = "counter_server"
_FRAME_VALUES = 16  # of the largest; a batch of the largest calls of shared objects is smaller
_LARGEST_CHUNK = 2**20  # bytes to receive at once
HANDSHAKE_SECONDS = 2.0  # for all of it: a silent peer holds a thread no longer
FRAME_SECONDS = 2.0  # to finish a frame once begun, and to take a frame that was sent; not less than _LONGEST_WAIT
ACCEPT_PAUSE = 0.05  # seconds, while no descriptor is left for a new connection
_LONGEST_WAIT = 2.0  # seconds in the kernel before the deadline is looked at again
_CHUNK = 479  # bytes to receive at once: most frames are shorter, and Python allocates larger objects more slowly
_REFUSED = b"#REFUSED"  # begins the only message to another user
_BACKLOG = 1024  # the standard library's 16 refuses or blocks a crowd of fresh clients

_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder().decode
_pack_length = struct.Struct(">I").pack
_unpack_length = struct.Struct(">I").unpack_from


def largest_frame() -> int:
    """Return the most bytes of a frame that a manager accepts. Its clients accept any answer of it."""
    return _FRAME_VALUES * largest_value()


def object_ident(name: str) -> str:
    """Return the address of a shared object. (The ledger's is ``"ledger"``.)"""
    return f"object:{name}"


class Call(Struct, array_like=True, frozen=True):
    """A request: the tuple that the standard library's proxies send, without its keywords."""

    ident: str | None
    method: str
    arguments: Raw


class Greeting(Struct, array_like=True, frozen=True):
    """The arguments of a client's first call: what it wants to reach.

    :param may_succeed: whether the client would start a manager that succeeds this one.
    """

    ident: str
    declaration: Declaration | None
    may_succeed: bool = False
    largest_value: int = 0  # that the client may send


class Connection:
    """A stream socket that carries frames, with the interface of `multiprocessing.connection.Connection`.

    For one thread at a time. After any exception close it: half a frame may be on the way.

    The kernel keeps the time: the socket blocks, with a timer that is set only when a deadline is nearer. Python's own
    timeouts would cost a `poll` before each call. Only a socket that gevent or eventlet has patched needs them, as it
    never blocks in the kernel.
    """

    pid = 0  # of the process at the other end; 0 if it cannot be seen from here
    is_watching = False  # whether the client has asked about the manager itself

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)  # whatever `socket.setdefaulttimeout` says
        self._is_patched = not os.get_blocking(sock.fileno())
        self._socket = sock
        self._received = b""
        self._timer = inf  # seconds until a wait ends and the deadline is looked at, at most `_LONGEST_WAIT`
        self.set_deadline(time.monotonic() + HANDSHAKE_SECONDS)

    def set_deadline(self, deadline: float) -> None:
        """Make sending and receiving raise `TimeoutError` at `deadline`, in `time.monotonic` seconds."""
        self._deadline = deadline
        remaining = deadline - time.monotonic()
        if remaining < self._timer:
            self._set_timer(remaining)

    def _set_timer(self, seconds: float) -> None:
        self._timer = min(max(seconds, 0.001), _LONGEST_WAIT)  # 0 would mean for ever
        if self._is_patched:
            self._socket.settimeout(self._timer)
            return
        whole = int(self._timer)
        interval = struct.pack("ll", whole, int((self._timer - whole) * 1e6) or 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def _wait_again(self) -> None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no answer in time")
        self._set_timer(remaining)

    def send(self, message: object) -> None:
        self.send_bytes(_encode(message))

    def send_bytes(self, message: bytes) -> None:
        frame: bytes | memoryview = _pack_length(len(message)) + message
        while True:
            try:
                sent = self._socket.send(frame)
            except (BlockingIOError, TimeoutError):
                self._wait_again()
            else:
                if sent == len(frame):
                    return
                frame = memoryview(frame)[sent:]  # a slice of bytes would copy them again and again

    def await_frame(self) -> None:
        """Wait without limit for the next frame to begin; it then has `FRAME_SECONDS` to arrive."""
        if not self._received:
            self._deadline = inf
            self._receive(1)
        self._deadline = time.monotonic() + FRAME_SECONDS  # the timer is not longer

    def recv(self) -> Any:
        return _decode(self.recv_bytes())

    def recv_bytes(self, maxlength: int = 2**32) -> bytes:
        """Return the next message; raise `EOFError` after the peer's last, `OSError` beyond `maxlength` bytes."""
        if len(self._received) < 4:
            self._receive(4)
        end = 4 + _unpack_length(self._received)[0]
        if end - 4 > maxlength:
            raise OSError(f"a frame of {end - 4} bytes; at most {maxlength}")
        if len(self._received) < end:
            self._receive(end)
        received = self._received
        self._received = received[end:]
        return received[4:end]

    def peek(self) -> bytes:
        """Return the next message, which the next `recv` returns again."""
        message = self.recv_bytes()
        self._received = _pack_length(len(message)) + message + self._received
        return message

    def _receive(self, size: int) -> None:
        """Receive until `_received` has at least `size` bytes."""
        chunks = [self._received]
        missing = size - len(self._received)
        while True:
            try:
                chunk = self._socket.recv(min(max(_CHUNK, missing), _LARGEST_CHUNK))
            except (BlockingIOError, TimeoutError):
                self._wait_again()
                continue
            if not chunk:
                raise EOFError("the other end has closed the connection")
            chunks.append(chunk)
            missing -= len(chunk)
            if missing <= 0:
                self._received = b"".join(chunks)
                return
            if time.monotonic() > self._deadline:
                raise TimeoutError("a frame that came too slowly")

    def fileno(self) -> int:
        return self._socket.fileno()

    def shutdown(self) -> None:
        """End the connection, from any thread: a wait for the other end is over."""
        with suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class Listener:
    """A listening AF_UNIX socket that accepts connections of this user alone."""

    def __init__(self, address: str, backlog: int = 0) -> None:  # noqa: ARG002 - the standard server asks for too few
        self.address = address
        self._closed = False
        self._socket = self._bound()

    def _bound(self) -> socket.socket:
        bound = socket.socket(socket.AF_UNIX)
        try:
            with short_address(self.address) as short:
                bound.bind(short)
            self._file = os.lstat(self.address)
            bound.listen(_BACKLOG)
        except BaseException:
            bound.close()
            raise
        return bound

    @property
    def is_found(self) -> bool:
        """Whether the address still leads here: its file was not removed or replaced."""
        try:
            return os.path.samestat(self._file, os.lstat(self.address))
        except OSError:
            return False

    def rebind(self) -> None:
        """Listen again at the address, where no file is left; raise `OSError` if that fails."""
        before, self._socket = self._socket, self._bound()
        before.shutdown(socket.SHUT_RDWR)  # ends the `accept` that waits there
        before.close()

    def accept(self) -> Connection:
        """Return the next connection; raise `OSError` if it failed or is another user's: the server tries again."""
        try:
            sock, _ = self._socket.accept()
        except OSError:
            if self._closed:
                raise SystemExit from None  # ends the accepting thread, which would try for ever
            time.sleep(ACCEPT_PAUSE)
            raise
        pid, uid = peer(sock)
        if uid != os.geteuid():
            with sock, suppress(OSError):
                refusal = _REFUSED + f": this manager serves uid {os.geteuid()} alone, and not uid {uid}".encode()
                sock.send(_pack_length(len(refusal)) + refusal)  # never blocks: it is the first
            raise PermissionError("a connection of another user")
        connection = Connection(sock)
        connection.pid = pid
        return connection

    def close(self) -> None:
        self._closed = True
        self._socket.close()


def connect(address: str, authkey: bytes | None = None, *, deadline: float = inf) -> Connection:
    """Connect to a manager, and have both ends prove that they hold the key.

    :param deadline: in `time.monotonic` seconds; the time limit of the handshake holds as well.
    :raises OSError: if no manager accepts or answers in time.
    :raises AccessDenied: if the manager belongs to another user.
    :raises multiprocessing.AuthenticationError: if the keys differ.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        connection = Connection(sock)
        connection.set_deadline(min(time.monotonic() + HANDSHAKE_SECONDS, deadline))
        with short_address(address) as short:
            sock.connect(short)
        connection.pid, uid = peer(sock)
        if authkey is not None:
            if connection.peek().startswith(_REFUSED):
                raise AccessDenied(f"the manager of {not_ours(uid, Path(address).parent)}")
            other = cast(StandardConnection, connection)
            answer_challenge(other, authkey)
            deliver_challenge(other, authkey)
        return connection
    except BaseException:
        sock.close()
        raise


vars(managers)["listener_client"][SERIALIZER] = (Listener, connect)
