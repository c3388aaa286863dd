"""The vocabulary: the operations of a store, the batches that carry them, and their results.

The same types are the arguments in Python, the messages on the manager's socket and the schema of JSON bodies. An
instance is always valid: `__post_init__` runs when it is made here *and* when it is decoded from bytes, so neither side
of a socket has to trust the other.
"""

import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated, TypeVar

from msgspec import Meta, Struct, msgpack, structs

from .errors import CounterServerError, InvalidRequest, KeyReused, LimitReached, StartupError, StorageFull, Unsupported

SMALLEST = -(2**63)
LARGEST = 2**63 - 1
LONGEST_NAME = 255  # bytes of UTF-8
LONGEST_KEY = 255  # characters
LARGEST_PAGE = 1000  # counters
LARGEST_BATCH = 1000  # operations; with names and keys of full length still below the frame limit
FINGERPRINT_BYTES = 16

Kind = TypeVar("Kind")

Integer = Annotated[int, Meta(ge=SMALLEST, le=LARGEST)]
_ONE = 1


def check_name(name: object) -> None:
    """Raise `InvalidRequest` unless `name` is 1 to 255 bytes of UTF-8 in NFC, without control characters."""
    if type(name) is not str:
        raise InvalidRequest(f"a counter's name must be a str, not {type(name).__name__}")
    _check_spelling(name)


@lru_cache(maxsize=4096)
def _check_spelling(name: str) -> None:
    if not name:
        raise InvalidRequest("a counter's name must not be empty")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("a counter's name must be valid Unicode text, without surrogates") from None
    if size > LONGEST_NAME:
        raise InvalidRequest(f"a counter's name has {size} bytes; at most {LONGEST_NAME} are allowed")
    if name.isascii() and name.isprintable():  # as most names are; the rest is slow
        return
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise InvalidRequest("a counter's name must not contain control characters")
    if not unicodedata.is_normalized("NFC", name):
        raise InvalidRequest("a counter's name must be in Unicode normal form C (NFC): normalize it first")


def check_key(key: object) -> None:
    """Raise `InvalidRequest` unless `key` can be an idempotency key: 1 to 255 visible ASCII characters."""
    if type(key) is not str:
        raise InvalidRequest(f"an idempotency key must be a str, not {type(key).__name__}")
    if not 1 <= len(key) <= LONGEST_KEY:
        raise InvalidRequest(f"an idempotency key has {len(key)} characters; 1 to {LONGEST_KEY} are allowed")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidRequest("an idempotency key must consist of visible ASCII characters, without spaces")


def _check_integer(what: str, value: object) -> None:
    if type(value) is not int:  # bool is a subclass of int, but True is not meant as a number
        raise InvalidRequest(f"{what} must be an integer, not {type(value).__name__}")
    if not SMALLEST <= value <= LARGEST:
        raise InvalidRequest(f"{what} must lie within 64 bits, {SMALLEST} to {LARGEST}")


def check_step(by: int, minimum: int | None, maximum: int | None) -> None:
    _check_integer("by", by)
    if by == 0:
        raise InvalidRequest("by must not be 0")
    if minimum is not None:
        _check_integer("minimum", minimum)
    if maximum is not None:
        _check_integer("maximum", maximum)
        if minimum is not None and minimum > maximum:
            raise InvalidRequest("minimum must not be greater than maximum")


class Step(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON body of an increment: its size and bounds."""

    by: Annotated[Integer, Meta(description="Not 0", extra_json_schema={"not": {"const": 0}})] = 1
    minimum: Annotated[Integer | None, Meta(description="The result is not less; not greater than `maximum`")] = None
    maximum: Annotated[Integer | None, Meta(description="The result is not greater")] = None

    def __post_init__(self) -> None:
        check_step(self.by, self.minimum, self.maximum)


class Assignment(Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON body that sets a counter."""

    value: Integer


class _Named(Struct, frozen=True, array_like=True, gc=False):
    name: str

    def __post_init__(self) -> None:
        check_name(self.name)


class Increment(_Named, frozen=True, tag="increment"):
    """Add `by` to a counter if the result lies within the bounds. Results in the new value."""

    by: Integer = _ONE
    minimum: Integer | None = None
    maximum: Integer | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        # Every increment passes here twice, on both sides of the socket: plain ones must be cheap.
        if type(self.name) is str:
            _check_spelling(self.name)
        else:
            check_name(self.name)
        if self.by is not _ONE or self.minimum is not None or self.maximum is not None:
            check_step(self.by, self.minimum, self.maximum)
        if self.key is not None:
            check_key(self.key)

    def fingerprint(self) -> bytes:
        """Return 16 bytes that identify this request among all requests with the same idempotency key."""
        return blake2b(msgpack.encode(structs.replace(self, key=None)), digest_size=FINGERPRINT_BYTES).digest()


class Set(_Named, frozen=True, tag="set"):
    """Set a counter to a value. Results in this value."""

    value: Integer

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("value", self.value)


class Keep(Struct, frozen=True, array_like=True, gc=False, tag="keep"):
    """Remember an idempotency key and its result, as if its increment were made now. Results in `value`.

    Nothing is counted. A key that has the same record keeps it, with its time. A key that has another record is refused
    with `KeyReused`, unless `overwrite`. Only a move between stores needs this: see `moving`.
    """

    key: str
    fingerprint: bytes  # of the increment: see `Increment.fingerprint`
    value: Integer
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_key(self.key)
        if type(self.fingerprint) is not bytes or len(self.fingerprint) != FINGERPRINT_BYTES:
            raise InvalidRequest(f"a fingerprint has {FINGERPRINT_BYTES} bytes")
        _check_integer("value", self.value)


class Delete(_Named, frozen=True, tag="delete"):
    """Remove a counter. Results in whether the counter existed."""


class Get(_Named, frozen=True, tag="get"):
    """Read a counter. Results in its value, or None if it does not exist."""


class Scan(Struct, frozen=True, array_like=True, gc=False, tag="scan"):
    """Read a page of counters, in the order of their names, that follow the name `after`."""

    after: str = ""
    limit: Integer = 100

    def __post_init__(self) -> None:
        if self.after != "":
            check_name(self.after)
        _check_integer("limit", self.limit)
        if not 1 <= self.limit <= LARGEST_PAGE:
            raise InvalidRequest(f"limit must be 1 to {LARGEST_PAGE}")


class Invoke(Struct, frozen=True, array_like=True, gc=False, tag="invoke"):
    """Call a method of a shared object. Results in `Returned` or `Raised`.

    `arguments` is encoded plain data: a tuple of the positional arguments and a dict of the keyword arguments.
    """

    method: str
    arguments: bytes

    def __post_init__(self) -> None:
        if not self.method.isidentifier() or self.method.startswith("_"):
            raise InvalidRequest(f"{self.method!r} cannot be the name of a public method")


Operation = Increment | Set | Keep | Delete | Get | Scan | Invoke
READS = (Get, Scan)
_READ_TYPES = frozenset[type[Operation]](READS)


class Replayed(Struct, frozen=True, array_like=True, gc=False, tag="replayed"):
    """The number that was returned for the same idempotency key before."""

    value: int


class Page(Struct, frozen=True, array_like=True, tag="page"):
    """Counters in the order of their names; `more` says whether others follow the last one."""

    counters: list[tuple[str, int]]
    more: bool


class Returned(Struct, frozen=True, array_like=True, gc=False, tag="returned"):
    """The return value of a method, as encoded plain data."""

    value: bytes


class Raised(Struct, frozen=True, array_like=True, gc=False, tag="raised"):
    """The exception of a method.

    `name` begins with `module`, unless the exception is built in. `content` is encoded plain data: a tuple of the
    exception's `args` and a dict of its attributes. Without it, the exception cannot be made again.
    """

    name: str
    text: str
    traceback: str
    module: str = ""
    content: bytes | None = None


class Refusal(Struct, frozen=True, array_like=True, gc=False, tag="refusal"):
    """The reason why one operation of a batch was not applied."""

    code: str
    message: str

    def error(self) -> CounterServerError:
        return _REFUSALS[self.code](self.message)


_REFUSALS: dict[str, type[CounterServerError]] = {
    "limit": LimitReached,
    "key_reused": KeyReused,
    "storage_full": StorageFull,
    "unsupported": Unsupported,
    "invalid": InvalidRequest,
    "not_made": StartupError,
}

Result = int | bool | None | Replayed | Page | Returned | Raised | Refusal


class Batch(Struct, frozen=True, array_like=True):
    """The unit of a round trip, of a commit and of exactly-once.

    `client` is 128 random bits. `sequence` counts the client's batches from 1; a batch that only reads has sequence 0
    and needs no memory. A `Scan` may stand beside other reads, not beside writes. The rule for batches that are sent
    again comes from Raft's client sessions (Ongaro, 2014, §6.3) and Kafka's idempotent producer.
    """

    client: bytes
    sequence: Integer
    operations: list[Operation]

    def __post_init__(self) -> None:
        count = len(self.operations)
        if len(self.client) != 16 or self.sequence < 0 or not 1 <= count <= LARGEST_BATCH:
            raise InvalidRequest(f"a batch has a client of 16 bytes, a sequence, and 1 to {LARGEST_BATCH} operations")
        may_write = self.sequence > 0 and (count == 1 or Scan not in map(type, self.operations))
        if not (may_write or _READ_TYPES.issuperset(map(type, self.operations))):
            raise InvalidRequest("a batch with writes needs a sequence, and must not contain a scan")


def expect(kind: type[Kind], result: object) -> Kind:
    if not isinstance(result, kind):
        raise TypeError(f"the store answered {result!r} instead of {kind.__name__}")
    return result
