"""`memcached://`: memcached's own increment, at most once; numbers live as long as its memory does.

memcached has no memory of batches, so one that may have reached it is never sent again: without an answer its outcome
is unknown, and its numbers may be skipped, but no number is given twice.
"""

import socket
import threading
import time
from os import urandom
from typing import Any

from ..errors import AccessDenied, Disconnected, InvalidRequest, OutcomeUnknown, StateLost, StorageFull
from ..operations import LARGEST, Batch, Increment, Operation, Result
from ..store import Finding, RoundTrip
from . import memcached_protocol as protocol

try:
    from pymemcache.client.base import Client
    from pymemcache.exceptions import (
        MemcacheClientError,
        MemcacheError,
        MemcacheServerError,
        MemcacheUnknownCommandError,
    )
except ImportError as error:
    raise InvalidRequest("this store needs pymemcache: pip install 'counter-server[memcached]'") from error

_RECEIVE = 65536  # bytes
_DONE = b"\r\nMN\r\n"  # the end of the answer to a last command that does nothing


class MemcachedStore:
    """A `Store` in a memcached server, 1.6.10 or later: counters only, at most once, not durable.

    A batch is one write and one answer: a meta command for each operation, then a read of the epoch. All operations of
    a batch share its outcome, for it is the epoch, read last, that shows that what was counted is still there; so
    answers that came before a connection broke say nothing, and are given to nobody.

    The epoch is a random word that is there as long as memcached's memory is, and part of every counter's key. Where it
    is gone, by a restart, a flush or an eviction, what was done under the old one is nothing that anybody reads, and
    `StateLost` says so. A single counter that is evicted is not noticed.

    A number beyond 64 bits with a sign is refused, but memcached has added by then: the counter is pinned to 2**63,
    and refuses, reads too, until it is set or deleted. What is not here at all (idempotency keys, bounds, counting
    down, negative numbers, lists) is refused by name, each operation for itself; nothing of it is sent.

    :param url: `memcached://host[:port]`, or `memcached:///path` for a socket file; `prefix` in its query keeps apart
        what shares a server.
    :raises InvalidRequest: if it cannot be one.
    """

    round_trip: RoundTrip = "long"

    def __init__(self, url: str) -> None:
        self._server, prefix, self._name = protocol.parse(url)
        self._prefix = prefix.encode()
        self._epoch = b""  # as it was when it was last told
        self._client: Any = None  # connected; pymemcache has no types
        self._sent: tuple[bytes, int] | None = None  # the last batch of writes that may have reached the server
        self._results: list[Result] | None = None  # of that batch, if it was answered
        self._calling = threading.Lock()  # guards the four above, through a whole call

    def __str__(self) -> str:
        return self._name

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        """See `Store.apply`, but a batch of writes that may have been sent is not sent again.

        :raises OutcomeUnknown: for one that was sent and has no answer, and for the same one again.
        """
        refusals = [protocol.refusal(operation) for operation in batch.operations]
        asked = [operation for operation, refusal in zip(batch.operations, refusals, strict=True) if refusal is None]
        if not asked:
            return list(refusals)
        with self._calling:
            if batch.sequence and (batch.client, batch.sequence) == self._sent:
                # An interrupt came in its middle, or after it; the session does not know that it is not to ask again.
                if self._results is None:
                    raise self._unknown("it was interrupted")
                return self._results
            self._connect(deadline)
            self._begin_epoch(deadline)
            answers = iter(self._ask(batch, asked, deadline))
            results = [next(answers) if refusal is None else refusal for refusal in refusals]
            if batch.sequence:
                self._results = results
            return results

    def _ask(self, batch: Batch, asked: list[Operation], deadline: float) -> list[Result]:
        epoch = self._epoch
        prefix = b"%b:%b" % (self._prefix, epoch)
        commands = [protocol.command(operation, prefix) for operation in asked]
        commands.append(b"mg %b:epoch v\r\n" % self._prefix)
        if time.monotonic() >= deadline:
            raise Disconnected(f"{self}: too late to begin", sent=False)
        if batch.sequence:
            self._sent, self._results = (batch.client, batch.sequence), None
        try:
            lines = iter(self._exchange(b"".join(commands), deadline))
            answers = [protocol.answer(operation, lines) for operation in asked]
            told = protocol.data(lines)
        except (OSError, ValueError, StopIteration) as error:
            self._drop()
            if not batch.sequence:
                raise Disconnected(f"{self}: {_text(error)}", sent=True) from error
            raise self._unknown(_text(error)) from error
        if told != epoch:
            self._epoch = b""
            raise StateLost(f"{self} has lost what it held: its counters begin anew")
        for operation, answer in zip(asked, answers, strict=True):
            if isinstance(operation, Increment) and answer is protocol.BEYOND:
                self._pin(protocol.key(operation.name, prefix), deadline)
        return answers

    def _unknown(self, reason: str) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"no answer from {self} ({reason}), which cannot be asked again; it may have been counted, at most once"
        )

    def _pin(self, key: bytes, deadline: float) -> None:
        """Have a counter that is beyond all numbers stay there, far from where memcached begins at 0 again.

        Only if it is still as it was read. That it fails is no harm: the next one that is refused does it.
        """
        try:
            lines = iter(self._exchange(b"mg %b v c\r\n" % key, deadline))
            head = next(lines)
            if head.startswith(b"VA ") and int(next(lines)) > LARGEST:
                unchanged = head.rpartition(b" c")[2]
                self._exchange(b"ms %b 19 T0 C%b\r\n%d\r\n" % (key, unchanged, LARGEST + 1), deadline)
        except (OSError, ValueError, StopIteration):
            self._drop()

    # The connection

    def _connect(self, deadline: float) -> None:
        """See to it that there is a connection which was alive a moment ago.

        :raises Disconnected: if there is none by `deadline`.
        """
        if self._client is not None:
            if _is_alive(self._client.sock):
                return
            self._drop()
        failure: Exception = OSError("no address")
        try:
            for server in _addresses(self._server):
                try:
                    self._client = _greeted(server, deadline)
                except (OSError, MemcacheUnknownCommandError, MemcacheServerError) as error:
                    failure = error
                else:
                    return
        except MemcacheClientError as error:
            raise AccessDenied(f"{self} does not let this process in: {_text(error)}; nothing was counted") from error
        except OSError as error:  # a host without an address
            failure = error
        raise Disconnected(f"{self}: {_text(failure)}", sent=False) from failure

    def _begin_epoch(self, deadline: float) -> None:
        """Know the epoch that is there, or a new one: whoever comes first makes it.

        :raises Disconnected: if there is no answer; no counter was touched.
        """
        if self._epoch:
            return
        command = b"ms %b:epoch 16 ME T0\r\n%b\r\nmg %b:epoch v\r\n"
        try:
            made, *told = self._exchange(command % (self._prefix, urandom(8).hex().encode(), self._prefix), deadline)
            if made.startswith(b"SERVER_ERROR"):
                raise StorageFull(f"{self} has no room: {made.decode()}; nothing was counted")
            self._epoch = protocol.data(iter(told))
        except (OSError, ValueError, StopIteration) as error:
            self._drop()
            raise Disconnected(f"{self}: {_text(error)}", sent=False) from error

    def _exchange(self, command: bytes, deadline: float) -> list[bytes]:
        """Send commands at once, and return the lines that answer them.

        pymemcache sends several increments only one by one, and its `raw_command` loses what is longer than one read.
        """
        connection = self._client.sock
        answer = b""
        try:
            connection.settimeout(_remaining(deadline))
            connection.sendall(command + b"mn\r\n")
            while not answer.endswith(_DONE):
                connection.settimeout(_remaining(deadline))
                received = connection.recv(_RECEIVE)
                if not received:
                    raise ConnectionResetError("the connection was closed")
                answer += received
        except BaseException:
            self._drop()  # a late answer is nobody else's
            raise
        return answer.removesuffix(_DONE).split(b"\r\n")

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def after_fork(self) -> None:
        """Close this process's copy of the descriptor; the parent's connection goes on."""
        self._calling = threading.Lock()
        self._drop()

    def close(self) -> None:
        with self._calling:
            self._drop()

    def findings(self, deadline: float) -> list[Finding]:
        """See `Examined`."""
        with self._calling:
            self._connect(deadline)
            try:
                told: dict[bytes, Any] = self._client.stats()
                settings: dict[bytes, Any] = self._client.stats("settings")
            except (OSError, MemcacheError) as error:
                self._drop()
                raise Disconnected(f"{self}: {_text(error)}", sent=False) from error
        return protocol.judge(told, settings)


def _addresses(server: str | tuple[str, int]) -> list[str | tuple[str, int]]:
    """All of them: a name like localhost may have two, and the server listen on one."""
    if isinstance(server, str):
        return [server]
    found = socket.getaddrinfo(*server, type=socket.SOCK_STREAM)
    return [(str(address[0]), int(address[1])) for *_, address in found]


def _greeted(server: str | tuple[str, int], deadline: float) -> Any:
    """A client that is connected to a memcached which knows meta commands."""
    seconds = _remaining(deadline)
    client = Client(server, connect_timeout=seconds, timeout=seconds, no_delay=True)
    try:
        if client.raw_command(b"mn") != b"MN":
            raise ConnectionRefusedError("something that is not memcached answers")
    except BaseException:
        client.close()
        raise
    return client


def _is_alive(connection: socket.socket) -> bool:
    """Whether nothing is there to be read: neither its end nor what nobody asked for."""
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("not within the deadline")
    return seconds


def _text(error: BaseException) -> str:
    if isinstance(error, MemcacheUnknownCommandError):
        return "it has too many connections, or is older than 1.6.10"
    return str(error) or type(error).__name__
