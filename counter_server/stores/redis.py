"""`redis://`, `rediss://`, `valkey://`, `valkeys://` and `unix://`: Redis or Valkey, one script call for each batch.

The server's settings decide about durability: with `appendonly yes` and `appendfsync always`, each number is on its
disk before it is answered.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, AnyStr
from urllib.parse import parse_qsl, urlencode, urlsplit

from msgspec import msgpack

from ..errors import (
    AccessDenied,
    BatchRefused,
    CounterServerError,
    Disconnected,
    InvalidRequest,
    OutcomeUnknown,
    StartupError,
    StateLost,
    StorageFull,
)
from ..ledger import CLIENT_LIFETIME, KEY_LIFETIME, KEY_REUSED, Contents, KeyRecord, beyond_bounds
from ..operations import Batch, Delete, Get, Increment, Keep, Operation, Page, Refusal, Replayed, Result, Scan, Set
from ..store import Finding, RoundTrip

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
_CONTENTS = files(__name__.rpartition(".")[0]).joinpath("redis_contents.lua").read_bytes()
_SPECIAL = re.compile(r"[][*?^\\-]")  # in Redis' patterns
_SHA = sha1(_SCRIPT, usedforsecurity=False).hexdigest()
_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}

# The meaning of a server's errors, by redis-py's class or, if it has no class for one, by the first word.
_DENIED = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
_PASSING = (  # it works later, or on another server: the same batch is sent again
    exceptions.ReadOnlyError,
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.AskError,
)

_ok, _risk, _problem = (partial(Finding, level) for level in ("ok", "may lose", "problem"))
_UNSUPPORTED = Refusal("unsupported", "counters have no methods")
_RESULTS: dict[str, Result] = {"n": None, "t": True, "f": False, "k": KEY_REUSED, "u": _UNSUPPORTED}
_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(list[str | list[str]]).decode


class RedisStore:
    """A `Store` in a Redis or Valkey server.

    :param url: as redis-py takes it; `prefix` in its query separates programs that share a database.
    :raises InvalidRequest: if redis-py does not accept it.
    """

    round_trip: RoundTrip = "long"

    def __init__(self, url: str) -> None:
        if "://" not in url:
            raise InvalidRequest(f"{url!r} is not a URL of Redis: it begins with redis://")
        try:
            parts = urlsplit(url)
        except ValueError:  # it would quote a part of the URL, which may be the password
            raise InvalidRequest("this is not a URL of Redis: its host or password needs percent-encoding") from None
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
            # The session keeps the deadline, so it alone tries again.
            options |= {"retry": Retry(NoBackoff(), 0), "retry_on_error": [], "protocol": 2}
            self._connect = partial(kind, **options)
            self._connect()  # connects to nothing, but checks the options
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{self._name} is not a URL of Redis: {error}") from None
        self._idle: list[Any] = []  # connections for the next call
        prefix = f"{{{tag}}}:"  # a hash tag: all keys are in one slot of a cluster
        self._client_prefix, self._key_prefix = f"{prefix}client:", f"{prefix}key:"
        self._shared_keys = (f"{prefix}counters", f"{prefix}names", f"{prefix}epoch")
        self._epoch = ""  # as last seen
        self._is_eviction_known = False

    def __str__(self) -> str:
        return self._name

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        if not self._is_eviction_known:
            self._warn_of_eviction(deadline)
        keys = [*self._shared_keys, self._client_prefix + batch.client.hex()]
        keys += [
            self._key_prefix + operation.key
            for operation in batch.operations
            if isinstance(operation, (Increment, Keep)) and operation.key is not None
        ]
        lifetimes = (int(CLIENT_LIFETIME), int(KEY_LIFETIME))
        operations = _encode([_pack(operation) for operation in batch.operations])
        arguments = (len(keys), *keys, self._epoch, os.urandom(16).hex(), batch.sequence, *lifetimes, operations)
        try:
            status, detail, *packed = self._exchange(deadline, "EVALSHA", _SHA, *arguments)
        except exceptions.NoScriptError:
            status, detail, *packed = self._exchange(deadline, "EVAL", _SCRIPT, *arguments)
        if status == b"refused":
            raise BatchRefused(f"batch {batch.sequence} does not follow batch {detail.decode()}")
        self._epoch = detail.decode()
        if status == b"lost":
            raise StateLost(f"{self} has lost its contents: its counters begin again")
        return [_unpack(*pair) for pair in zip(batch.operations, _decode(packed[0]), strict=True)]

    def contents(self, deadline: float) -> Contents | None:
        """See `ShowsContents`. The server answers nobody else meanwhile: about a second for a million counters."""
        pattern = _SPECIAL.sub(r"\\\g<0>", self._key_prefix) + "*"
        epoch, witness, counters, keys = self._exchange(deadline, "EVAL", _CONTENTS, 3, *self._shared_keys, pattern)
        if (witness and witness != epoch) or (self._epoch and self._epoch.encode() != epoch):
            raise StateLost(f"{self} has lost its contents, or some of them")
        if epoch is None:
            return None
        found, start = Contents(), len(self._key_prefix.encode())
        try:
            found.counters = {name.decode(): int(value) for name, value in _pairs(counters) if name}
            for key, record in _pairs(keys):
                fingerprint = bytes.fromhex(record[:32].decode())
                found.keys[key[start:].decode()] = KeyRecord(fingerprint, int(record[32:]), 0.0)
        except ValueError as error:
            raise StartupError(f"{self} holds something that is not of counter_server: {error}") from None
        return found

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
                connection.disconnect()  # a late answer must not reach the next call
            if isinstance(error, exceptions.RedisError) and not isinstance(error, exceptions.NoScriptError):
                raise self._translated(error, sent=sent) from error
            raise
        self._idle.append(connection)
        return answer

    def _connected(self, deadline: float) -> Any:
        """Return a connection for one call. (redis-py's pool connects again with the timeouts of an earlier call.)"""
        with suppress(IndexError):  # at the end of the list
            while connection := self._idle.pop():
                with suppress(exceptions.ConnectionError):  # the server has closed it
                    if not connection.can_read():
                        return connection
                connection.disconnect()
        connection = self._connect(socket_connect_timeout=_remaining(deadline), socket_timeout=_remaining(deadline))
        connection.connect()
        return connection

    def _translated(self, error: exceptions.RedisError, *, sent: bool) -> Exception:
        """Return our own error for one of redis-py's."""
        text = str(error)
        if isinstance(error, _DENIED) or text.startswith("Protocol error: unauthenticated"):
            return AccessDenied(f"{self} does not let this process in: {text}; nothing was counted")
        if isinstance(error, exceptions.OutOfMemoryError) or text.startswith("MISCONF"):
            return StorageFull(f"{self} cannot be written to: {text}; nothing was counted, and reads continue")
        if isinstance(error, _PASSING) or text.startswith(("BUSY", "NOREPLICAS")):
            self.close()  # the name may lead to another server now
            return Disconnected(f"{self}: {text}", sent=False)
        if isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError)):
            return Disconnected(f"{self}: {text}", sent=sent)
        return OutcomeUnknown(f"{self} failed: {text}")

    def _warn_of_eviction(self, deadline: float) -> None:
        try:
            found = _eviction(self._info(deadline))
        except Disconnected:  # the batch meets the same fault
            return
        except CounterServerError as error:
            found = _problem(f"cannot tell whether it evicts keys: {error}")
        self._is_eviction_known = True
        if found.level != "ok":
            log.warning("%s may lose numbers: %s", self, found.sentence)

    def _info(self, deadline: float) -> dict[str, str]:
        answer: bytes = self._exchange(deadline, "INFO")
        return dict(line.split(":", 1) for line in answer.decode(errors="replace").splitlines() if ":" in line)

    def findings(self, deadline: float) -> list[Finding]:
        """See `Store`."""
        config: dict[str, str] = {}
        info = self._info(deadline)
        product = "Valkey" if "valkey_version" in info else "Redis"
        version = info.get("valkey_version") or info.get("redis_version", "of an unknown version")
        found = [_ok(f"{product} {version}, a {info.get('role', 'server')}")]
        try:
            for name in ("appendfsync", "no-appendfsync-on-rewrite", "save", "min-replicas-to-write"):
                words = [word.decode() for word in self._exchange(deadline, "CONFIG", "GET", name)]
                config.update(_pairs(words))
        except (AccessDenied, OutcomeUnknown) as error:
            found.append(_risk(f"CONFIG is not permitted, so its settings are unknown: {error.__cause__}"))
        return [*found, *_durability(info, config), _eviction(info), _replication(info, config)]

    def after_fork(self) -> None:
        """Begin without connections; redis-py does not touch the parent's."""
        self._idle = []

    def close(self) -> None:
        with suppress(IndexError):
            while connection := self._idle.pop():
                connection.disconnect()


def _url(scheme: str, place: str, query: dict[str, str]) -> str:
    return f"{scheme}://{place}{'?' if query else ''}{urlencode(query)}"


def _pairs(flat: list[AnyStr]) -> Iterator[tuple[AnyStr, AnyStr]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _pack(operation: Operation) -> str | list[str | int]:
    """Return an operation as the script takes it; a plain increment, as nearly all are, is just a name."""
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
        case Keep(_, fingerprint, value, overwrite):
            return ["keep", fingerprint.hex() + str(value), "overwrite" if overwrite else ""]
        case Delete(name):
            return ["delete", name]
        case Scan(after, limit):
            return ["scan", after, limit]
        case _:
            return ["invoke", ""]


def _unpack(operation: Operation, result: str | list[str]) -> Result:
    if isinstance(result, list):
        more, *rest = result
        return Page([(name, int(value)) for name, value in _pairs(rest)], more == "more")
    kind, value = result[0], result[1:]
    if kind == "i":
        return int(value)
    if kind == "r":
        return Replayed(int(value))
    if kind == "l" and isinstance(operation, Increment):
        return beyond_bounds(operation, int(value))
    return _RESULTS[kind]


# Findings, by the answer to INFO and the settings that CONFIG reports, none if it is not permitted. See
# https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/ and .../replication/.

_FSYNC = {
    "always": _ok("appendonly yes, appendfsync always: a number is on its disk before it is answered"),
    "everysec": _risk("appendfsync everysec: a power cut may take the last second or two"),
    "no": _risk("appendfsync no: a power cut may take everything that the kernel had not written yet"),
}


def _durability(info: Mapping[str, str], config: Mapping[str, str]) -> list[Finding]:
    found = []
    fsync, points = config.get("appendfsync"), config.get("save")
    if info.get("aof_enabled") != "1":
        since = "since its last snapshot" if points is None else f"since a snapshot ({points})"
        lost = "everything: there are no snapshots either" if points == "" else f"all numbers {since}"
        found.append(_risk(f"appendonly no: a restart loses {lost}"))
    elif fsync is not None:
        found.append(_FSYNC.get(fsync, _problem(f"appendfsync {fsync!r} is unknown to this version")))
        if fsync == "always" and config.get("no-appendfsync-on-rewrite") == "yes":
            found.append(_risk("no-appendfsync-on-rewrite yes: a power cut while the file is rewritten loses numbers"))
    faults = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    return found + [_problem(f"{name} is {info[name]}: its disk failed, or is full") for name in faults]


def _eviction(info: Mapping[str, str]) -> Finding:
    """Return whether a full server deletes its contents."""
    most, policy = info.get("maxmemory", "?"), info.get("maxmemory_policy", "?")
    if most == "0":
        return _ok("maxmemory 0: nothing is evicted")
    if policy == "noeviction":
        return _ok(f"maxmemory {most}, noeviction: a full server refuses to count, and loses nothing")
    if policy.startswith("volatile"):
        lost = "counters stay, but idempotency keys and the memory of clients go, so a repeated call may count twice"
    else:
        lost = "a full server deletes counters, all of them at once"
    return _problem(f"maxmemory {most}, {policy}: {lost}; run CONFIG SET maxmemory-policy noeviction")


def _replication(info: Mapping[str, str], config: Mapping[str, str]) -> Finding:
    replicas = info.get("connected_slaves", "0")
    if info.get("role") != "master":
        return _problem("this is a replica, which takes no writes: name the master")
    if replicas == "0":
        return _ok("no replicas: no failover that could lose numbers")
    which = f"{replicas} connected replicas, min-replicas-to-write {config.get('min-replicas-to-write', '?')}"
    lost = "replication is asynchronous, so a failover may lose the last numbers, and repeat them"
    return _risk(f"{which}: {lost}")
