"""The vocabulary: what can be asked of a store, in which batches, and what comes back.

The same types are the arguments in Python, the messages on the manager's socket and the rules that
JSON bodies are validated by. A value of these types is valid: `__post_init__` runs when one is
made here *and* when one is decoded from bytes, so neither side has to trust the other.
"""

import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated

from msgspec import Meta, Struct, msgpack, structs

from .errors import CounterServerError, InvalidRequest, KeyReused, LimitReached, StartupError, StorageFull, Unsupported

SMALLEST = -(2**63)
LARGEST = 2**63 - 1
LONGEST_NAME = 255  # bytes of UTF-8
LONGEST_KEY = 255  # characters
LARGEST_PAGE = 1000  # counters
LARGEST_BATCH = 1000  # operations; with names and keys of full length still under the frame limit

Integer = Annotated[int, Meta(ge=SMALLEST, le=LARGEST)]


def check_name(name: object) -> None:
    """Raise `InvalidRequest` unless `name` can be the name of a counter.

    1 to 255 bytes of UTF-8, in Unicode normal form C (so that what looks the same is the same),
    without control characters, surrogates or separators other than the space.
    """
    if type(name) is not str:
        raise InvalidRequest(f"a counter's name must be a str, not {type(name).__name__}")
    _check_spelling(name)


@lru_cache(maxsize=4096)
def _check_spelling(name: str) -> None:
    if not name:
        raise InvalidRequest("a counter's name is empty")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("a counter's name is not valid Unicode text") from None
    if size > LONGEST_NAME:
        raise InvalidRequest(f"a counter's name has {size} bytes; at most {LONGEST_NAME}")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
        raise InvalidRequest("a counter's name holds a control character")
    if not unicodedata.is_normalized("NFC", name):
        raise InvalidRequest("a counter's name is not in Unicode normal form C (NFC)")


def check_key(key: str) -> None:
    """Raise `InvalidRequest` unless `key` can be an idempotency key: 1 to 255 visible ASCII characters."""
    if not 1 <= len(key) <= LONGEST_KEY:
        raise InvalidRequest(f"an idempotency key has {len(key)} characters; 1 to {LONGEST_KEY}")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidRequest("an idempotency key may hold only visible ASCII characters")


def _check_integer(what: str, value: object) -> None:
    # bool is an int to Python, and True is not a number that anybody meant to count by.
    if type(value) is not int:
        raise InvalidRequest(f"{what} must be an integer, not {type(value).__name__}")
    if not SMALLEST <= value <= LARGEST:
        raise InvalidRequest(f"{what} must lie within 64 bits, {SMALLEST} to {LARGEST}")


def _check_text(what: str, value: object) -> None:
    if type(value) is not str:
        raise InvalidRequest(f"{what} must be a str, not {type(value).__name__}")


class Step(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """By how much, and within which bounds: the JSON body of an increment."""

    by: Annotated[Integer, Meta(description="Not 0", extra_json_schema={"not": {"const": 0}})] = 1
    minimum: Annotated[Integer | None, Meta(description="The result is not less; not greater than `maximum`")] = None
    maximum: Annotated[Integer | None, Meta(description="The result is not greater")] = None

    def __post_init__(self) -> None:
        check_step(self.by, self.minimum, self.maximum)


class Assignment(Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON body that sets a counter."""

    value: Integer


def check_step(by: int, minimum: int | None, maximum: int | None) -> None:
    """Raise `InvalidRequest` unless these can be an increment's size and bounds."""
    _check_integer("by", by)
    if by == 0:
        raise InvalidRequest("by must not be 0")
    if minimum is not None:
        _check_integer("minimum", minimum)
    if maximum is not None:
        _check_integer("maximum", maximum)
        if minimum is not None and minimum > maximum:
            raise InvalidRequest("minimum is greater than maximum")


class Increment(Struct, frozen=True, array_like=True, gc=False, tag="increment"):
    """Add `by` to a counter, if the result lies within the bounds; the answer is the result."""

    name: str
    by: Integer = 1
    minimum: Integer | None = None
    maximum: Integer | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        # Nearly every increment is the plain one, and this runs twice for each of them.
        if self.by != 1 or type(self.by) is not int or self.minimum is not None or self.maximum is not None:
            check_step(self.by, self.minimum, self.maximum)
        if self.key is not None:
            _check_text("an idempotency key", self.key)
            check_key(self.key)

    def fingerprint(self) -> bytes:
        """16 bytes that tell this request from any other one under the same idempotency key."""
        return blake2b(msgpack.encode(structs.replace(self, key=None)), digest_size=16).digest()


class Set(Struct, frozen=True, array_like=True, gc=False, tag="set"):
    """Give a counter a value; the answer is that value."""

    name: str
    value: Integer

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_integer("value", self.value)


class Delete(Struct, frozen=True, array_like=True, gc=False, tag="delete"):
    """Remove a counter; the answer is whether there was one."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name)


class Get(Struct, frozen=True, array_like=True, gc=False, tag="get"):
    """Read a counter; the answer is its value, or None where there is none."""

    name: str

    def __post_init__(self) -> None:
        check_name(self.name)


class Scan(Struct, frozen=True, array_like=True, gc=False, tag="scan"):
    """Read a page of counters in the order of their names, those after `after`."""

    after: str = ""
    limit: Integer = 100

    def __post_init__(self) -> None:
        _check_text("after", self.after)
        if self.after:
            check_name(self.after)
        _check_integer("limit", self.limit)
        if not 1 <= self.limit <= LARGEST_PAGE:
            raise InvalidRequest(f"limit must be 1 to {LARGEST_PAGE}")


class Invoke(Struct, frozen=True, array_like=True, gc=False, tag="invoke"):
    """Call a method of a shared object; the answer is `Returned` or `Raised`.

    `arguments` is plain data, encoded: a tuple of the positional ones and a dict of those by keyword.
    """

    method: str
    arguments: bytes

    def __post_init__(self) -> None:
        check_method(self.method)


def check_method(name: str) -> None:
    """Raise `InvalidRequest` unless `name` can be a public method's."""
    if not name.isidentifier() or name.startswith("_"):
        raise InvalidRequest(f"{name!r} is not the name of a public method")


Operation = Increment | Set | Delete | Get | Scan | Invoke
READS = (Get, Scan)


class Replayed(Struct, frozen=True, array_like=True, gc=False, tag="replayed"):
    """The number that this idempotency key was given before."""

    value: int


class Page(Struct, frozen=True, array_like=True, tag="page"):
    """Counters in the order of their names; `more` says whether others follow the last."""

    counters: list[tuple[str, int]]
    more: bool


class Returned(Struct, frozen=True, array_like=True, gc=False, tag="returned"):
    """What a method returned: plain data, encoded."""

    value: bytes


class Raised(Struct, frozen=True, array_like=True, gc=False, tag="raised"):
    """What a method raised. `arguments` are the exception's, encoded, where its type is built in and they are plain."""

    name: str
    text: str
    traceback: str
    arguments: bytes | None = None


class Refusal(Struct, frozen=True, array_like=True, gc=False, tag="refusal"):
    """One operation of a batch that was not applied, and why."""

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

    `client` is 128 random bits. `sequence` counts that client's batches from 1; a batch of reads
    alone has sequence 0, and nothing has to be remembered of it. The rule for resent batches is that
    of Raft's client sessions (Ongaro, 2014, §6.3) and of Kafka's idempotent producer.
    """

    client: bytes
    sequence: Integer
    operations: list[Operation]

    def __post_init__(self) -> None:
        if len(self.client) != 16 or self.sequence < 0 or not 1 <= len(self.operations) <= LARGEST_BATCH:
            raise InvalidRequest(f"a batch has a client of 16 bytes, a sequence, and 1 to {LARGEST_BATCH} operations")
        if self.sequence == 0 and not all(isinstance(operation, READS) for operation in self.operations):
            raise InvalidRequest("only a batch of reads may go without a sequence")
