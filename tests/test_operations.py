"""Invalid operations are refused, in Python and in bytes from a socket."""

import unicodedata
from typing import Any

import msgspec
import pytest
from msgspec import msgpack

from counter_server.errors import InvalidRequest
from counter_server.operations import (
    LARGEST,
    LARGEST_BATCH,
    LARGEST_PAGE,
    SMALLEST,
    Batch,
    Delete,
    Get,
    Increment,
    Operation,
    Scan,
    Set,
    Step,
)

CLIENT = bytes(range(16))

decode_operation = msgpack.Decoder(Operation).decode
decode_batch = msgpack.Decoder(Batch).decode

GOOD_NAMES = [
    *("a", " ", "two words", "/a/path?with=query#and-more", "x" * 255),
    *("\u00e9" * 127 + "x", "\u4e2d" * 85, "\U0001f600" * 63 + "abc"),  # 255 bytes, of 2, 3 and 4 a character
    "\u05d0\u05d1\u05d2",  # right to left
    "\u0915\u094d\u0937",  # with a combining mark that is part of NFC
    unicodedata.normalize("NFC", "A\u030angstro\u0308m"),
]
BAD_NAMES = [
    *("\0", "a\0b", "a\nb", "a\tb", "\x1b[31m", "a\x7f", "a\x85b", "a\u2028b", "a\u2029b"),  # control characters
    *("x" * 256, "\u00e9" * 128, "\u4e2d" * 85 + "x", "\U0001f600" * 64, "\u00e9" * 127 + "xy"),  # too long
    *("e\u0301", "\u212b", "\u1100\u1161"),  # not NFC: decomposed, an Angstrom sign, Jamo
    *("\ud800", "a\udfffb", "\ud83d\ude00"),  # surrogates
    *(None, 1, b"bytes", ["a"], True),
]
BAD_KEYS = [
    *("", "x" * 256, "two words", "tab\t", "new\nline", "NUL\0", "\x7f", "\u00e9", "\u4e2d", "\ud800"),
    *(1, b"key", True, ["key"]),
]
NOT_INTEGERS: list[object] = [None, True, False, "1", 1.5, 1.0, b"1", [1], 2**63, -(2**63) - 1, 2**64, 10**4000]


def refuse(kind: Any, *fields: object) -> None:
    """Check that an operation with these fields is refused in Python, and from a peer without our checks."""
    with pytest.raises(InvalidRequest):
        kind(*fields)
    try:
        message = msgpack.encode([kind.__struct_config__.tag, *fields])
    except (UnicodeEncodeError, OverflowError):  # no peer can send it
        return
    with pytest.raises(msgspec.ValidationError):
        decode_operation(message)


def accept(operation: Operation) -> None:
    assert decode_operation(msgpack.encode(operation)) == operation


def shown(value: object) -> str:
    return repr(value)[:40]


@pytest.mark.parametrize("name", GOOD_NAMES, ids=shown)
def test_a_valid_name_is_encoded_unchanged(name: str) -> None:
    for operation in (Increment(name), Set(name, 1), Delete(name), Get(name), Scan(name)):
        accept(operation)
        assert (operation.after if isinstance(operation, Scan) else operation.name) == name


@pytest.mark.parametrize("name", ["", *BAD_NAMES], ids=shown)
def test_an_invalid_name_is_refused(name: object) -> None:
    for kind in (Increment, Delete, Get):
        refuse(kind, name)
    refuse(Set, name, 1)
    if name != "":
        refuse(Scan, name)


@pytest.mark.parametrize("raw", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82"])
def test_a_name_in_bytes_that_are_not_utf_8_is_refused(raw: bytes) -> None:
    message = b"\x92" + msgpack.encode("get") + bytes([0xA0 + len(raw)]) + raw
    with pytest.raises(ValueError, match="utf-8"):
        decode_operation(message)


def test_a_key_has_1_to_255_visible_ascii_characters() -> None:
    for key in ("k", "!", "~", "x" * 255, "8e03978e-40d5-43e8-bc93-6894a57f9324"):
        accept(Increment("visits", key=key))
    for bad in BAD_KEYS:
        refuse(Increment, "visits", 1, None, None, bad)


def test_a_number_is_any_integer_of_64_bits() -> None:
    for number in (1, -1, LARGEST, SMALLEST):
        accept(Set("visits", number))
        accept(Increment("visits", number, number, number))
        assert Step(number).by == number
    accept(Set("visits", 0))
    accept(Increment("visits", 1, 0, 0))


@pytest.mark.parametrize("number", NOT_INTEGERS, ids=shown)
def test_a_number_that_is_no_integer_of_64_bits_is_refused(number: Any) -> None:
    refuse(Increment, "visits", number)
    refuse(Set, "visits", number)
    refuse(Scan, "", number)
    with pytest.raises(InvalidRequest):
        Step(number)
    if number is not None:
        refuse(Increment, "visits", 1, number, None)
        refuse(Increment, "visits", 1, None, number)


def test_an_increment_by_0_and_reversed_bounds_are_refused() -> None:
    refuse(Increment, "visits", 0)
    with pytest.raises(InvalidRequest):
        Step(0)
    for minimum, maximum in ((1, 0), (LARGEST, SMALLEST), (0, -1)):
        refuse(Increment, "visits", 1, minimum, maximum)
        with pytest.raises(InvalidRequest, match="minimum"):
            Step(1, minimum, maximum)
    assert Increment("visits", 1, SMALLEST, LARGEST).minimum == SMALLEST


def test_an_invalid_json_body_is_refused() -> None:
    assert msgspec.json.decode(b'{"by": 2}', type=Step) == Step(2)
    for value in ("0", "true", '"1"', "1.5", str(2**63), "1" * 4000, "null", "[1]", "NaN", '2, "often": 3'):
        with pytest.raises(msgspec.DecodeError):
            msgspec.json.decode(f'{{"by": {value}}}'.encode(), type=Step)


def test_a_page_has_1_to_1000_counters() -> None:
    for limit in (0, -1, LARGEST_PAGE + 1):
        refuse(Scan, "", limit)
    for limit in (1, LARGEST_PAGE):
        accept(Scan("", limit))


def test_bytes_that_are_not_an_operation_are_refused() -> None:
    messages: list[object] = [[], ["increment"], ["exec", "x"], ["Increment", "x"], [1, "x"], {}, "get", None]
    for message in messages:
        with pytest.raises(msgspec.ValidationError):
            decode_operation(msgpack.encode(message))


def test_a_fingerprint_is_of_all_of_a_request_but_its_key() -> None:
    others: list[tuple[Any, ...]] = [(2,), (-1,), (1, 0), (1, None, 0), (1, 0, 0), (1, 1), (1, None, 1)]
    fingerprints = {Increment("a", *other).fingerprint() for other in others}
    fingerprints |= {Increment("a").fingerprint(), Increment("b").fingerprint()}
    assert len(fingerprints) == len(others) + 2
    assert set(map(len, fingerprints)) == {16}
    keyed = decode_operation(msgpack.encode(Increment("a", 2, -5, 5, "key")))
    assert isinstance(keyed, Increment)
    assert keyed.fingerprint() == Increment("a", 2, -5, 5).fingerprint()
    # They are stored on disks, so they never change.
    assert Increment("visits").fingerprint().hex() == "f10405e4d611917eb8756b6a7555d9af"
    assert Increment("visits", -3, 0, 10).fingerprint().hex() == "d722cd2f2b0964d5ec40e80de876cfa3"


WRITES = (Increment("a"), Set("a", 1), Delete("a"))


@pytest.mark.parametrize(
    ("client", "sequence", "operations"),
    [
        *[(client, 1, [Get("a")]) for client in (b"", b"x" * 15, b"x" * 17, "x" * 16, 5, None)],
        *[(CLIENT, sequence, [Get("a")]) for sequence in (-1, 2**63, True, "1", 1.5, None)],
        *[(CLIENT, 1, [Get("a")] * count) for count in (0, LARGEST_BATCH + 1)],
        *[(CLIENT, 0, [*reads, write]) for write in WRITES for reads in ([], [Get("a")])],
        *[(CLIENT, sequence, [Scan(), Get("a"), Increment("a")]) for sequence in (0, 1)],
        (CLIENT, 1, [Increment("a"), ["increment", "b", 0]]),
    ],
    ids=shown,
)
def test_an_invalid_batch_is_refused(client: object, sequence: object, operations: list[object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_batch(msgpack.encode([client, sequence, operations]))


def test_an_invalid_request_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        Get("")
    with pytest.raises(ValueError, match="needs a sequence"):
        Batch(CLIENT, 0, [Increment("a")])
