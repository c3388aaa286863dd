"""What memcached is told, and what its answers mean: names as keys, operations as meta commands. No connection here.

The commands are those of https://github.com/memcached/memcached/blob/master/doc/protocol.txt.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ..errors import InvalidRequest
from ..operations import LARGEST, Delete, Get, Increment, Operation, Refusal, Result, Scan, Set
from ..store import Finding

_DEFAULT_PREFIX = "counter_server"
_DEFAULT_PORT = 11211
_LONGEST_SPELLING = 160  # bytes of a key's 250 that the name may take; the rest is for prefix and epoch
_PREFIX = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LARGEST_STEP = 2**48  # so that those who go beyond all numbers together come nowhere near 2**64, where all begins at 0
BEYOND = Refusal("limit", "the counter has gone beyond 64 bits; until it is set or deleted it has no number any more")


def parse(url: str) -> tuple[str | tuple[str, int], str, str]:
    """The server, the prefix of keys, and the URL for people."""
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORT
    except ValueError as error:
        raise InvalidRequest(f"a URL of memcached is not understood: {error}") from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = query.pop("prefix", _DEFAULT_PREFIX)
    place = parts.netloc.rpartition("@")[2] + parts.path
    name = f"memcached://{place}" + ("" if prefix == _DEFAULT_PREFIX else f"?prefix={quote(prefix)}")
    if not _PREFIX.fullmatch(prefix):
        raise InvalidRequest(f"a prefix of keys has 1 to 64 letters, digits, '_', '.' or '-', not {prefix!r}")
    if query or parts.fragment or "@" in parts.netloc:
        raise InvalidRequest(f"{name} takes no user, no fragment, and no option but prefix")
    if parts.hostname and parts.path in ("", "/"):
        return (parts.hostname, port), prefix, name
    if url.startswith("memcached:///") and len(parts.path) > 1:
        return unquote(parts.path), prefix, name
    raise InvalidRequest(f"{name} is neither memcached://host[:port] nor memcached:///path/of/a/socket")


def key(name: str, epoch: bytes) -> bytes:
    """Of a counter, under a prefix with its epoch."""
    return b"%b:%b" % (epoch, _spelled(name))


@lru_cache(maxsize=4096)
def _spelled(name: str) -> bytes:
    """A counter's name as memcached takes it: percent-encoded, and as its hash where that is too long.

    No two names become one: nothing that is encoded begins with ``#``.
    """
    encoded = quote(name, safe="")
    if len(encoded) <= _LONGEST_SPELLING:
        return encoded.encode()
    return b"#" + blake2b(name.encode(), digest_size=32).hexdigest().encode()


def refusal(operation: Operation) -> Refusal | None:
    """Why memcached cannot do this, by name; None if it can."""
    match operation:
        case Increment(key=str()):
            return _unsupported("keeps no idempotency keys")
        case Increment(minimum=int()) | Increment(maximum=int()):
            return _unsupported("knows no minimum or maximum of a counter")
        case Increment(by=by) if by < 0:
            return _unsupported("cannot count down: its decrement stops at 0 without a word")
        case Increment(by=by) if by > _LARGEST_STEP:
            return _unsupported(f"counts in steps of {_LARGEST_STEP} at most")
        case Set(value=value) if value < 0:
            return _unsupported("has no negative numbers")
        case Increment() | Get() | Set() | Delete():
            return None
        case Scan():
            return _unsupported("cannot list its counters")
        case _:
            return _unsupported("hosts no shared objects: counters have no methods")


def _unsupported(what: str) -> Refusal:
    return Refusal("unsupported", f"memcached {what}; use another store for it")


def command(operation: Operation, epoch: bytes) -> bytes:
    """What to send for one operation that is not refused."""
    match operation:
        case Increment(name, 1):
            return b"ma %b N0 J1 v\r\n" % key(name, epoch)
        case Increment(name, by):  # where there is none, it is made in the same step: nobody can come between
            return b"ma %b N0 J%d D%d v\r\n" % (key(name, epoch), by, by)
        case Get(name):
            return b"mg %b v\r\n" % key(name, epoch)
        case Set(name, value):
            return b"ms %b %d T0\r\n%d\r\n" % (key(name, epoch), len(str(value)), value)
        case Delete(name):
            return b"md %b\r\n" % key(name, epoch)
        case _:
            raise TypeError(f"{operation!r} should have been refused")


def data(lines: Iterator[bytes]) -> bytes:
    """What was read; nothing where there is nothing."""
    head = next(lines)
    if head == b"EN":
        return b""
    if not head.startswith(b"VA "):
        raise ValueError(f"it answered {head[:80]!r}")
    return next(lines)


def answer(operation: Operation, lines: Iterator[bytes]) -> Result:
    """The result of one operation, from the next lines.

    :raises ValueError: if they are none.
    """
    head = next(lines)
    if isinstance(operation, (Get, Increment)):
        if head == b"EN":
            return None
        if head.startswith(b"VA "):
            number = int(next(lines))
            return number if number <= LARGEST else BEYOND
        if head.startswith(b"SERVER_ERROR"):
            return Refusal("storage_full", f"memcached has no room ({head[13:].decode()}); nothing was counted")
        if head == b"ERROR":
            return _unsupported("before 1.6.10 cannot do this")
    elif isinstance(operation, Set) and head == b"HD":
        return operation.value
    elif isinstance(operation, Delete) and head in (b"HD", b"NF"):
        return head == b"HD"
    # A set without room has removed what was there: whatever else this is, it is not known to be nothing.
    raise ValueError(f"it answered {head[:80].decode(errors='replace')!r}")


def judge(told: dict[bytes, Any], settings: dict[bytes, Any]) -> list[Finding]:
    """What ``stats`` and ``stats settings`` mean for the numbers."""
    version, evictions, most = (_plain(told.get(name)) for name in (b"version", b"evictions", b"limit_maxbytes"))
    used, items = _plain(told.get(b"bytes")), _plain(told.get(b"curr_items"))
    found = [
        Finding("ok", f"memcached {version}, {items} items, {used} of {most} bytes used"),
        Finding("may lose", "all counters are in memory: a restart or a flush begins anew, which StateLost tells"),
        Finding("may lose", "an increment without an answer was counted at most once, and cannot be asked for again"),
    ]
    if evictions != "0":
        found.append(
            Finding("may lose", f"{evictions} items were evicted since it started: counters may be among them, untold")
        )
    if _plain(settings.get(b"evictions")) == "off":
        found.append(Finding("ok", "evictions are off: a server without room refuses new counters, and drops none"))
    else:
        found.append(
            Finding("may lose", "evictions are on: without room it drops what was used least recently (-M refuses)")
        )
    return found


def _plain(value: object) -> str:
    """A figure of memcached's, which pymemcache may have made a number of, or not."""
    return value.decode(errors="replace") if isinstance(value, bytes) else "?" if value is None else str(value)
