"""`redis://`, `rediss://`, `valkey://`, `valkeys://` and `unix://`: Redis or Valkey, one script call for each batch.

What is durable is what the server keeps: with `appendonly yes` and `appendfsync always`, each number is on its disk
before it is answered.
"""

import logging
import os
import time
from contextlib import suppress
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from msgspec import msgpack

from ..errors import (
    AccessDenied,
    BatchRefused,
    CounterServerError,
    Disconnected,
    InvalidRequest,
    OutcomeUnknown,
    StateLost,
    StorageFull,
)
from ..ledger import CLIENT_LIFETIME, KEY_LIFETIME, KEY_REUSED, beyond_bounds
from ..operations import Batch, Delete, Get, Increment, Operation, Page, Refusal, Replayed, Result, Scan, Set
from ..store import Finding, RoundTrip
from .redis_findings import SETTINGS, eviction, judge

try:
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.connection import Connection, parse_url
    from redis.retry import Retry
except ImportError as error:
    raise InvalidRequest("this store needs redis-py: pip install 'counter-server[redis]'") from error

log = logging.getLogger(__name__)

_DEFAULT_PREFIX = "counter_server"
_SCRIPT = files(__name__.rpartition(".")[0]).joinpath("redis_batch.lua").read_bytes()
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()
_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}

# What a server's answers mean, by redis-py's class for them or, where it has none, by their first word.
_DENIED = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
_DENIED_WORDS = ("Protocol error: unauthenticated",)
_PASSING = (  # it will do it later, or another one will in its place: the same batch is sent again
    exceptions.ReadOnlyError,
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.AskError,
)
_PASSING_WORDS = ("BUSY", "NOREPLICAS")
_FULL = (exceptions.OutOfMemoryError,)
_FULL_WORDS = ("MISCONF",)

_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(list[str | list[str]]).decode


class RedisStore:
    """A `Store` in a Redis or Valkey server.

    :param url: as redis-py takes it; `prefix` in its query keeps apart what shares a database.
    :raises InvalidRequest: if it cannot be one.
    """

    round_trip: RoundTrip = "long"

    def __init__(self, url: str) -> None:
        if "://" not in url:
            raise InvalidRequest(f"{url!r} is not a URL of Redis: it begins with redis://")
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        tag = query.pop("prefix", _DEFAULT_PREFIX)
        if not tag or set(tag) & set("{}"):
            raise InvalidRequest(f"a prefix of keys has one character or more, and no braces, not {tag!r}")
        scheme = _SCHEMES.get(parts.scheme, parts.scheme)
        host = parts.netloc.rpartition("@")[2]
        self._name = _url(parts.scheme, host + parts.path, {} if tag == _DEFAULT_PREFIX else {"prefix": tag})
        try:
            options = dict(parse_url(_url(scheme, parts.netloc + parts.path, query)))  # type: ignore[no-untyped-call]
            kind = options.pop("connection_class", Connection)
            options.pop("max_connections", None)  # of redis-py's pool
            # The session keeps the deadline, and so it alone tries again.
            options |= {"retry": Retry(NoBackoff(), 0), "retry_on_error": [], "protocol": 2}
            self._connect = partial(kind, **options)
            self._connect()  # an object only: does it accept the options?
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{self._name} is not a URL of Redis: {error}") from None
        self._idle: list[Any] = []  # connections for the next call
        prefix = f"{{{tag}}}:"  # a hash tag: all keys are in one slot of a cluster
        self._client_prefix, self._key_prefix = f"{prefix}client:", f"{prefix}key:"
        self._shared_keys = (f"{prefix}counters", f"{prefix}names", f"{prefix}epoch")
        self._epoch = ""  # as it was when it was last told
        self._is_eviction_known = False

    def __str__(self) -> str:
        return self._name

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        if not self._is_eviction_known:
            self._warn_of_eviction(deadline)
        keys = [*self._shared_keys, self._client_prefix + batch.client.hex()]
        operations = []
        for operation in batch.operations:
            operations.append(_pack(operation))
            if isinstance(operation, Increment) and operation.key is not None:
                keys.append(self._key_prefix + operation.key)
        lifetimes = (int(CLIENT_LIFETIME), int(KEY_LIFETIME))
        arguments = (self._epoch, os.urandom(16).hex(), batch.sequence, *lifetimes, _encode(operations))
        status, told, *packed = self._call(deadline, len(keys), *keys, *arguments)
        if status == b"refused":
            raise BatchRefused(f"batch {batch.sequence} does not follow batch {told.decode()}")
        self._epoch = told.decode()
        if status == b"lost":
            raise StateLost(f"{self} has lost what it held: its counters begin anew")
        return [_unpack(*pair) for pair in zip(batch.operations, _decode(packed[0]), strict=True)]

    def _call(self, deadline: float, *arguments: object) -> list[bytes]:
        """Have the script run, which may have to be sent first.

        :raises Disconnected: if there is no answer by `deadline`.
        """
        try:
            answer: list[bytes] = self._exchange(deadline, "EVALSHA", _SHA, *arguments)
        except exceptions.NoScriptError:
            answer = self._exchange(deadline, "EVAL", _SCRIPT, *arguments)
        return answer

    def _exchange(self, deadline: float, *command: object) -> Any:
        sent = False
        connection = None
        try:
            connection = self._connected(deadline)
            sent = True
            connection.send_command(*command, check_health=False)
            answer = connection.read_response(disable_decoding=True, timeout=_remaining(deadline))
        except BaseException as error:
            if connection is not None and isinstance(error, exceptions.ResponseError):
                self._idle.append(connection)
            elif connection is not None:
                connection.disconnect()  # a late answer is nobody else's
            if isinstance(error, exceptions.RedisError) and not isinstance(error, exceptions.NoScriptError):
                raise self._translated(error, sent=sent) from error
            raise
        self._idle.append(connection)
        return answer

    def _connected(self, deadline: float) -> Any:
        """A connection for one call. (redis-py's pool connects again with the timeouts of an earlier call.)"""
        with suppress(IndexError):  # none is left
            while connection := self._idle.pop():
                with suppress(exceptions.ConnectionError):  # the server has closed it
                    if not connection.can_read():
                        return connection
                connection.disconnect()
        connection = self._connect(socket_connect_timeout=_remaining(deadline), socket_timeout=_remaining(deadline))
        connection.connect()
        return connection

    def _translated(self, error: exceptions.RedisError, *, sent: bool) -> Exception:
        """Our own error for each of redis-py's."""
        text = str(error)
        if isinstance(error, _DENIED) or text.startswith(_DENIED_WORDS):
            return AccessDenied(f"{self} does not let this process in: {text}; nothing was counted")
        if isinstance(error, _FULL) or text.startswith(_FULL_WORDS):
            return StorageFull(f"{self} cannot write: {text}; nothing was counted, and reads go on")
        if isinstance(error, _PASSING) or text.startswith(_PASSING_WORDS):
            self.close()  # the name may lead to another server now
            return Disconnected(f"{self}: {text}", sent=False)
        if isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError)):
            return Disconnected(f"{self}: {text}", sent=sent)
        return OutcomeUnknown(f"{self} failed: {text}")

    def _warn_of_eviction(self, deadline: float) -> None:
        try:
            found = eviction(self._info(deadline))
        except Disconnected:  # the batch meets the same fault
            return
        except CounterServerError as error:
            found = Finding("problem", f"whether it evicts keys cannot be known: {error}")
        self._is_eviction_known = True
        if found.level != "ok":
            log.warning("%s may lose numbers: %s", self, found.sentence)

    def _info(self, deadline: float) -> dict[str, str]:
        told: bytes = self._exchange(deadline, "INFO")
        return dict(line.split(":", 1) for line in told.decode(errors="replace").splitlines() if ":" in line)

    def findings(self, deadline: float) -> list[Finding]:
        """See `Examined`."""
        info = self._info(deadline)
        config: dict[str, str] = {}
        try:
            for name in SETTINGS:
                words = [word.decode() for word in self._exchange(deadline, "CONFIG", "GET", name)]
                config.update(zip(words[::2], words[1::2], strict=True))
        except (AccessDenied, OutcomeUnknown) as error:
            return judge(info, None, str(error.__cause__))
        return judge(info, config)

    def after_fork(self) -> None:
        """Begin with no connection; redis-py leaves the parent's alone."""
        self._idle = []

    def close(self) -> None:
        with suppress(IndexError):
            while connection := self._idle.pop():
                connection.disconnect()


def _url(scheme: str, place: str, query: dict[str, str]) -> str:
    return f"{scheme}://{place}{'?' if query else ''}{urlencode(query)}"


def _remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _pack(operation: Operation) -> str | list[str | int]:
    """An operation as the script takes it; nearly every one is the plain increment, which is just a name."""
    match operation:
        case Increment(name, 1, None, None, None):
            return name
        case Increment(name, by, minimum, maximum, key):
            fingerprint = "" if key is None else operation.fingerprint().hex()
            return ["increment", name, str(by), _text(minimum), _text(maximum), fingerprint]
        case Get(name):
            return ["get", name]
        case Set(name, value):
            return ["set", name, str(value)]
        case Delete(name):
            return ["delete", name]
        case Scan(after, limit):
            return ["scan", after, limit]
        case _:
            return ["invoke", ""]


def _unpack(operation: Operation, result: str | list[str]) -> Result:
    if isinstance(result, list):
        more, *rest = result
        return Page([(name, int(value)) for name, value in zip(rest[::2], rest[1::2], strict=True)], more == "more")
    kind, value = result[0], result[1:]
    match kind:
        case "i":
            return int(value)
        case "n":
            return None
        case "t" | "f":
            return kind == "t"
        case "r":
            return Replayed(int(value))
        case "k":
            return KEY_REUSED
        case "l" if isinstance(operation, Increment):
            return beyond_bounds(operation, int(value))
        case _:
            return Refusal("unsupported", "counters have no methods")
