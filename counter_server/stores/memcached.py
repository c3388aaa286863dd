"""`memcached://`: memcached's own increment, at most once, in its memory only.

memcached does not remember batches, so a batch that may have reached it is never sent again: without an answer its
outcome is unknown. Numbers may be skipped; no number is given twice.
"""

import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from hashlib import blake2b
from os import urandom
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ..errors import AccessDenied, Disconnected, InvalidRequest, OutcomeUnknown, StateLost, StorageFull
from ..operations import LARGEST, Batch, Delete, Get, Increment, Keep, Operation, Refusal, Result, Scan, Set
from ..store import Finding, RoundTrip

try:
    from pymemcache import exceptions
    from pymemcache.client.base import Client
except ImportError as error:
    raise InvalidRequest("this store needs pymemcache: pip install 'counter-server[memcached]'") from error

_DEFAULT_PREFIX = "counter_server"
_LONGEST_SPELLING = 160  # bytes of a key's 250 that the name may take; the rest is for prefix and epoch
_PREFIX = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LARGEST_STEP = 2**48  # even many steps beyond 64 bits with a sign stay far from 2**64, where memcached starts at 0
_BEYOND = Refusal("limit", "the counter has gone beyond 64 bits; it has no number until it is set or deleted")
_ok, _risk = partial(Finding, "ok"), partial(Finding, "may lose")
_FAILURES = (OSError, exceptions.MemcacheError, ValueError)


class MemcachedStore:
    """A `Store` in a memcached server: counters only, at most once, not durable.

    The epoch is a random word in memcached's memory, and part of each counter's key: after a restart, a flush or an
    eviction of it, old counters are never read again, and `StateLost` says so. A batch ends with a read of the epoch,
    and its operations share one outcome. The eviction of a single counter is not noticed.

    memcached adds before this store can refuse a number beyond 64 bits with a sign: the counter is then pinned to
    2**63, and refuses, reads too, until it is set or deleted. An operation that memcached does not know is refused by
    name, and nothing is sent for it.

    :param url: `memcached://host[:port]`, or `memcached:///path` for a socket file; `prefix` in its query separates
        programs that share a server.
    :raises InvalidRequest: if the URL is not one of these.
    """

    round_trip: RoundTrip = "long"

    def __init__(self, url: str) -> None:
        self._server, prefix, self._name = _parse(url)
        self._prefix = prefix.encode()
        self._epoch = b""  # as last seen
        self._client: Any = None  # pymemcache has no types
        self._sent: tuple[bytes, int] | None = None  # the last batch of writes that may have reached the server
        self._results: list[Result] | None = None  # of that batch, if it has an answer
        self._calling = threading.Lock()  # guards the four above, through a whole call

    def __str__(self) -> str:
        return self._name

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        """See `Store.apply`; but a batch of writes that may have been sent is not sent again.

        :raises OutcomeUnknown: for a batch that was sent and has no answer, and for the same batch again.
        """
        refusals = [_refusal(operation) for operation in batch.operations]
        if all(refusals):
            return list(refusals)
        with self._call():
            if batch.sequence and (batch.client, batch.sequence) == self._sent:
                # The session does not know that it must not send a batch again after an interrupt.
                if self._results is None:
                    raise self._unknown("it was interrupted")
                return self._results
            self._connect(deadline)
            self._epoch = self._epoch or self._find_epoch(deadline, make=batch.sequence > 0)
            if not self._epoch:
                return list(refusals)  # a batch of reads, before the first write
            _remaining(deadline)
            if batch.sequence:
                self._sent, self._results = (batch.client, batch.sequence), None
            try:
                pairs = zip(batch.operations, refusals, strict=True)
                results = [refusal or self._execute(operation, deadline) for operation, refusal in pairs]
                epoch = self._find_epoch(deadline)
            except _FAILURES as error:
                if batch.sequence:
                    raise self._unknown(_text(error)) from error
                raise Disconnected(f"{self}: {_text(error)}", sent=True) from error
            if epoch != self._epoch:
                self._epoch = b""
                raise self._lost()
            if batch.sequence:
                self._results = results
            return results

    def _find_epoch(self, deadline: float, *, make: bool = False) -> bytes:
        """Return the epoch of the counters; empty if there is none. Only a write makes it.

        :raises StateLost: if the server dropped it right after it was made.
        """
        key = b"%b:epoch" % self._prefix
        if make:
            self._ask(deadline, "add", key, urandom(8).hex())  # unless another client did
        found: bytes | None = self._ask(deadline, "get", key)
        if make and not found:
            raise self._lost()
        return found or b""

    def _lost(self) -> StateLost:
        return StateLost(f"{self} has lost its contents: its counters begin again")

    def _unknown(self, reason: str) -> OutcomeUnknown:
        return OutcomeUnknown(f"no answer from {self} ({reason}): it may have been counted, at most once")

    def _execute(self, operation: Operation, deadline: float) -> Result:
        assert isinstance(operation, (Increment, Get, Set, Delete))
        key = b"%b:%b:%b" % (self._prefix, self._epoch, _spelled(operation.name))
        match operation:
            case Increment(_, by):
                return self._increment(key, by, deadline)
            case Get():
                value = self._ask(deadline, "get", key)
                return None if value is None else int(value) if int(value) <= LARGEST else _BEYOND
            case Set(_, value):  # without room it fails after it removed the counter: the outcome is unknown
                self._ask(deadline, "set", key, value)
                return value
            case Delete():
                return bool(self._ask(deadline, "delete", key))

    def _increment(self, key: bytes, by: int, deadline: float) -> Result:
        try:
            while (number := self._ask(deadline, "incr", key, by)) is None:
                if self._ask(deadline, "add", key, by):  # unless another client did
                    return by
        except exceptions.MemcacheServerError as error:
            if isinstance(error, exceptions.MemcacheUnexpectedCloseError):
                raise
            return Refusal("storage_full", f"memcached has no room ({_text(error)}); nothing was counted")
        if number <= LARGEST:
            return int(number)
        # Pin it, unless another client changed it. Should that fail, the next refused increment pins it.
        value, unchanged = self._ask(deadline, "gets", key)
        if value is not None and int(value) > LARGEST:
            self._ask(deadline, "cas", key, LARGEST + 1, unchanged)
        return _BEYOND

    def _ask(self, deadline: float, method: str, *arguments: Any) -> Any:
        client, seconds = self._client, _remaining(deadline)
        client.timeout = client.connect_timeout = seconds  # after an error pymemcache connects again
        if client.sock is not None:
            client.sock.settimeout(seconds)
        return getattr(client, method)(*arguments)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Keep other threads out of a call. An error in it closes the connection.

        :raises Disconnected: for pymemcache's errors, which the block raises only before it counts.
        """
        with self._calling:
            try:
                yield
            except BaseException as error:
                self._drop()  # a late answer must not reach the next call
                if not isinstance(error, _FAILURES):
                    raise
                if type(error) is exceptions.MemcacheServerError:
                    raise StorageFull(f"{self} has no room: {_text(error)}; nothing was counted") from error
                if type(error) is exceptions.MemcacheClientError:
                    raise AccessDenied(f"{self} does not let this process in: {_text(error)}") from error
                raise Disconnected(f"{self}: {_text(error)}", sent=False) from error

    def _connect(self, deadline: float) -> None:
        """Have a connection that was alive a moment ago."""
        if self._client is not None and self._client.sock is not None and _is_alive(self._client.sock):
            return
        self._drop()
        self._client = Client(self._server, default_noreply=False)
        if isinstance(self._server, tuple):  # try all addresses of a name, which pymemcache does not
            self._client.sock = socket.create_connection(self._server, _remaining(deadline))
            self._client.server = self._client.sock.getpeername()[:2]
        self._ask(deadline, "version")

    def _drop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def exists(self, deadline: float) -> bool:
        """See `IsMade`: without an epoch there are no counters."""
        with self._call():
            self._connect(deadline)
            return self._find_epoch(deadline) != b""

    def after_fork(self) -> None:
        """Close this process's copy of the descriptor; the parent's connection goes on."""
        self._calling = threading.Lock()
        self._drop()

    def close(self) -> None:
        with self._calling:
            self._drop()

    def findings(self, deadline: float) -> list[Finding]:
        """See `Store`."""
        with self._call():
            self._connect(deadline)
            figures = self._ask(deadline, "stats")
            return _judge({**figures, b"evict": self._ask(deadline, "stats", "settings").get(b"evictions")})


def _parse(url: str) -> tuple[str | tuple[str, int], str, str]:
    """Return the server, the prefix of keys, and the URL for people."""
    try:
        parts = urlsplit(url)
        port = parts.port or 11211
    except ValueError as error:
        raise InvalidRequest(f"a URL of memcached is not understood: {error}") from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = query.pop("prefix", _DEFAULT_PREFIX)
    place = parts.netloc.rpartition("@")[2] + parts.path
    name = f"memcached://{place}" + ("" if prefix == _DEFAULT_PREFIX else f"?prefix={quote(prefix)}")
    if not (query or parts.fragment or "@" in parts.netloc) and _PREFIX.fullmatch(prefix):
        if parts.hostname and parts.path in ("", "/"):
            return (parts.hostname, port), prefix, name
        if url.startswith("memcached:///") and len(parts.path) > 1:
            return unquote(parts.path), prefix, name
    option = "with no option but prefix: 1 to 64 letters, digits, '_', '.' or '-'"
    raise InvalidRequest(f"{name} is not memcached://host[:port] or memcached:///socket/file, {option}")


@lru_cache(maxsize=4096)
def _spelled(name: str) -> bytes:
    """Return a counter's name percent-encoded, or as a hash if it is too long; ``#`` begins no encoded name."""
    encoded = quote(name, safe="")
    if len(encoded) <= _LONGEST_SPELLING:
        return encoded.encode()
    return b"#" + blake2b(name.encode(), digest_size=32).hexdigest().encode()


def _refusal(operation: Operation) -> Refusal | None:
    """Return why memcached cannot do this; None if it can."""
    match operation:
        case Increment(key=str()) | Keep():
            reason = "keeps no idempotency keys"
        case Increment(minimum=int()) | Increment(maximum=int()):
            reason = "knows no minimum or maximum of a counter"
        case Increment(by=by) if by < 0:
            reason = "cannot count down: its decrement stops at 0 and reports no error"
        case Increment(by=by) if by > _LARGEST_STEP:
            reason = f"counts in steps of at most {_LARGEST_STEP}"
        case Set(value=value) if value < 0:
            reason = "has no negative numbers"
        case Increment() | Get() | Set() | Delete():
            return None
        case _:
            lists = isinstance(operation, Scan)
            reason = "cannot list its counters" if lists else "hosts no shared objects: counters have no methods"
    return Refusal("unsupported", f"memcached {reason}; use another store for it")


def _judge(figures: dict[bytes, Any]) -> list[Finding]:
    """Return what ``stats`` mean for the numbers; `evict` is `evictions` of ``stats settings``."""
    version, evicted, most, used, items, evict = (
        value.decode() if isinstance(value := figures.get(name, "?"), bytes) else str(value)
        for name in (b"version", b"evictions", b"limit_maxbytes", b"bytes", b"curr_items", b"evict")
    )
    found = [_risk(f"{evicted} items were evicted since it started, perhaps counters")] if evicted != "0" else []
    if evict == "off":
        found.append(_ok("evictions are off: without room it refuses new counters, and drops none"))
    else:
        found.append(_risk("evictions are on: without room it drops the least recently used items (-M refuses)"))
    return [
        _ok(f"memcached {version}, {items} items, {used} of {most} bytes used"),
        _risk("all counters are in memory: a restart or a flush loses them, and StateLost reports it"),
        _risk("an increment without an answer was counted at most once, and cannot be asked for again"),
        *found,
    ]


def _is_alive(connection: socket.socket) -> bool:
    """Return whether there is nothing to read: neither the end nor an unexpected answer."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return not selector.select(0)


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("not within the deadline")
    return seconds


def _text(error: BaseException) -> str:
    if isinstance(error, exceptions.MemcacheUnknownCommandError):
        return "it has too many connections"
    return str(error) or type(error).__name__
