"""Invalid operations are refused, in Python and in bytes from a socket."""

import unicodedata
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import msgpack

from counter_server.errors import InvalidRequest, KeyReused, LimitReached, StorageFull
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
    Page,
    Refusal,
    Replayed,
    Result,
    Scan,
    Set,
    Step,
    check_key,
    check_name,
)

CLIENT = bytes(range(16))

decode_operation = msgpack.Decoder(Operation).decode
decode_batch = msgpack.Decoder(Batch).decode

GOOD_NAMES = [
    "a",
    " ",
    "visits",
    "two words",
    "/a/path?with=query#and-more",
    "x" * 255,
    "\u00e9" * 127 + "x",  # 2 bytes each: 255
    "\u4e2d" * 85,  # 3 bytes each: 255
    "\U0001f600" * 63 + "abc",  # 4 bytes each: 255
    "\u05d0\u05d1\u05d2",  # right to left
    "\u0915\u094d\u0937",  # with a combining mark that is part of NFC
    unicodedata.normalize("NFC", "A\u030angstro\u0308m"),
]

BAD_NAMES = [
    pytest.param("", id="empty"),
    pytest.param("\0", id="NUL"),
    pytest.param("a\0b", id="NUL-inside"),
    pytest.param("a\nb", id="newline"),
    pytest.param("a\tb", id="tab"),
    pytest.param("\x1b[31m", id="escape"),
    pytest.param("a\x7f", id="DEL"),
    pytest.param("a\x85b", id="C1-next-line"),
    pytest.param("a\u2028b", id="line-separator"),
    pytest.param("a\u2029b", id="paragraph-separator"),
    pytest.param("x" * 256, id="256-bytes-ascii"),
    pytest.param("\u00e9" * 128, id="256-bytes-latin"),
    pytest.param("\u4e2d" * 85 + "x", id="256-bytes-chinese"),
    pytest.param("\U0001f600" * 64, id="256-bytes-emoji"),
    pytest.param("e\u0301", id="not-NFC-decomposed"),
    pytest.param("\u212b", id="not-NFC-angstrom-sign"),
    pytest.param("\u1100\u1161", id="not-NFC-jamo"),
]

SURROGATES = ["\ud800", "a\udfffb", "\ud83d\ude00"]

NAMED: list[Callable[[str], Operation]] = [Increment, lambda name: Set(name, 1), Delete, Get, Scan]
NAMED_IDS = ["increment", "set", "delete", "get", "scan"]

BAD_KEYS = ["", "x" * 256, "two words", "tab\t", "new\nline", "NUL\0", "\x7f", "\u00e9", "\u4e2d", "\ud800"]

NOT_INTEGERS: list[object] = [True, False, "1", 1.5, 1.0, b"1", [1], 2**63, -(2**63) - 1, 2**64, 10**4000]


def encoded(tag: str, *fields: object) -> bytes:
    """Encode an operation as a peer might, without our checks."""
    return msgpack.encode([tag, *fields])


@pytest.mark.parametrize("make", NAMED, ids=NAMED_IDS)
@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_valid_name_survives_encoding_unchanged(name: str, make: Callable[[str], Operation]) -> None:
    operation = make(name)
    assert decode_operation(msgpack.encode(operation)) == operation
    assert name in (getattr(operation, "name", None), getattr(operation, "after", None))


@pytest.mark.parametrize("make", NAMED[:4], ids=NAMED_IDS[:4])
@pytest.mark.parametrize("name", [*BAD_NAMES, *SURROGATES])
def test_an_invalid_name_is_refused_by_every_operation(name: str, make: Callable[[str], Operation]) -> None:
    with pytest.raises(InvalidRequest):
        make(name)


@pytest.mark.parametrize("name", [*[p for p in BAD_NAMES if p.id != "empty"], *SURROGATES])
def test_a_page_after_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        Scan(name)
    if name not in SURROGATES:
        with pytest.raises(msgspec.ValidationError):
            decode_operation(encoded("scan", name))


@pytest.mark.parametrize("tag", ["increment", "set", "delete", "get"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_invalid_name_is_refused_when_decoded(name: str, tag: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_operation(encoded(tag, name, *([1] if tag == "set" else [])))


@pytest.mark.parametrize("raw", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82"])
def test_a_name_in_bytes_that_are_not_utf_8_is_refused(raw: bytes) -> None:
    message = b"\x92" + msgpack.encode("get") + bytes([0xA0 + len(raw)]) + raw
    with pytest.raises(ValueError, match="utf-8"):
        decode_operation(message)


@pytest.mark.parametrize("name", [None, 1, 0, b"bytes", ["a"], True])
def test_a_name_that_is_not_a_str_is_refused(name: object) -> None:
    for tag, make in (("increment", Increment), ("delete", Delete), ("get", Get)):
        with pytest.raises(InvalidRequest):
            make(name)  # type: ignore[arg-type]  # what a caller without type checks does
        with pytest.raises(msgspec.ValidationError):
            decode_operation(encoded(tag, name))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy with other tests
@given(st.text(max_size=300))
def test_a_name_is_valid_exactly_if_it_follows_the_rules(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    categories = {unicodedata.category(character) for character in name}
    acceptable = (
        1 <= size <= 255 and not categories & {"Cc", "Cs", "Zl", "Zp"} and unicodedata.normalize("NFC", name) == name
    )
    try:
        check_name(name)
    except InvalidRequest:
        assert not acceptable
    else:
        assert acceptable


@pytest.mark.parametrize("key", ["k", "!", "~", "x" * 255, "8e03978e-40d5-43e8-bc93-6894a57f9324"])
def test_a_valid_key_survives_encoding(key: str) -> None:
    check_key(key)
    operation = Increment("visits", key=key)
    assert decode_operation(msgpack.encode(operation)) == operation
    assert operation.key == key


@pytest.mark.parametrize("key", BAD_KEYS)
def test_an_invalid_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest):
        Increment("visits", key=key)
    if key not in SURROGATES:
        with pytest.raises(msgspec.ValidationError):
            decode_operation(encoded("increment", "visits", 1, None, None, key))


@pytest.mark.parametrize("key", [1, b"key", True, ["key"]])
def test_a_key_that_is_not_a_str_is_refused(key: object) -> None:
    with pytest.raises(InvalidRequest):
        Increment("visits", key=key)  # type: ignore[arg-type]  # what a caller without type checks does
    with pytest.raises(msgspec.ValidationError):
        decode_operation(encoded("increment", "visits", 1, None, None, key))


@pytest.mark.parametrize("by", [1, -1, 5, LARGEST, SMALLEST])
def test_by_may_be_any_64_bit_integer_except_0(by: int) -> None:
    operation = Increment("visits", by)
    assert decode_operation(msgpack.encode(operation)) == operation
    assert Step(by).by == by


@pytest.mark.parametrize("by", [0, None, *NOT_INTEGERS], ids=lambda by: f"{type(by).__name__}-{str(by)[:24]}")
def test_an_invalid_by_is_refused(by: object) -> None:
    with pytest.raises(InvalidRequest):
        Increment("visits", by)  # type: ignore[arg-type]  # what a caller without type checks does
    with pytest.raises(InvalidRequest):
        Step(by)  # type: ignore[arg-type]


def _fits_messagepack(value: object) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**64


@pytest.mark.parametrize("by", [0, None, *filter(_fits_messagepack, NOT_INTEGERS)], ids=repr)
def test_an_invalid_by_is_refused_when_decoded(by: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_operation(encoded("increment", "visits", by))


@pytest.mark.parametrize("body", ["0", "true", '"1"', "1.5", str(2**63), "1" * 4000, "null", "[1]", "NaN"])
def test_an_invalid_by_is_refused_in_a_json_body(body: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(f'{{"by": {body}}}'.encode(), type=Step)


def test_a_json_body_with_an_unknown_field_is_refused() -> None:
    assert msgspec.json.decode(b'{"by": 2}', type=Step) == Step(2)
    with pytest.raises(msgspec.ValidationError, match="often"):
        msgspec.json.decode(b'{"by": 2, "often": 3}', type=Step)


@pytest.mark.parametrize("bound", NOT_INTEGERS, ids=lambda by: f"{type(by).__name__}-{str(by)[:24]}")
def test_a_bound_that_is_not_a_64_bit_integer_is_refused(bound: object) -> None:
    for minimum, maximum in ((bound, None), (None, bound)):
        with pytest.raises(InvalidRequest):
            Increment("visits", 1, minimum, maximum)  # type: ignore[arg-type]  # as above
        if _fits_messagepack(bound):
            with pytest.raises(msgspec.ValidationError):
                decode_operation(encoded("increment", "visits", 1, minimum, maximum))


def test_equal_bounds_are_valid_and_reversed_ones_are_refused() -> None:
    for minimum, maximum in ((1, 0), (LARGEST, SMALLEST), (0, -1)):
        with pytest.raises(InvalidRequest, match="minimum"):
            Increment("visits", 1, minimum, maximum)
        with pytest.raises(msgspec.ValidationError, match="minimum"):
            decode_operation(encoded("increment", "visits", 1, minimum, maximum))
    assert Increment("visits", 1, 5, 5).maximum == 5
    assert Increment("visits", 1, SMALLEST, LARGEST).minimum == SMALLEST


@pytest.mark.parametrize("value", [0, 1, -1, SMALLEST, LARGEST])
def test_a_counter_can_be_set_to_any_64_bit_value(value: int) -> None:
    assert decode_operation(msgpack.encode(Set("visits", value))) == Set("visits", value)


@pytest.mark.parametrize("value", [None, *NOT_INTEGERS], ids=lambda by: f"{type(by).__name__}-{str(by)[:24]}")
def test_a_counter_cannot_be_set_to_anything_else(value: object) -> None:
    with pytest.raises(InvalidRequest):
        Set("visits", value)  # type: ignore[arg-type]  # as above
    if _fits_messagepack(value):
        with pytest.raises(msgspec.ValidationError):
            decode_operation(encoded("set", "visits", value))


@pytest.mark.parametrize("limit", [0, -1, LARGEST_PAGE + 1, True, "5", 1.5, None])
def test_a_page_of_no_counters_or_of_too_many_is_refused(limit: object) -> None:
    with pytest.raises(InvalidRequest):
        Scan("", limit)  # type: ignore[arg-type]  # as above
    with pytest.raises(msgspec.ValidationError):
        decode_operation(encoded("scan", "", limit))


def test_a_page_may_have_1_to_1000_counters() -> None:
    assert Scan("", 1).limit == 1
    assert decode_operation(encoded("scan", "", LARGEST_PAGE)) == Scan("", LARGEST_PAGE)


@pytest.mark.parametrize("message", [[], ["increment"], ["exec", "x"], ["Increment", "x"], [1, "x"], {}, "get", None])
def test_bytes_that_are_not_an_operation_are_refused(message: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_operation(msgpack.encode(message))


def test_requests_that_differ_in_anything_but_the_key_have_different_fingerprints() -> None:
    requests = [
        Increment("a"),
        Increment("b"),
        Increment("a", 2),
        Increment("a", -1),
        Increment("a", 1, 0),
        Increment("a", 1, None, 0),
        Increment("a", 1, 0, 0),
        Increment("a", 1, 1),
        Increment("a", 1, None, 1),
    ]
    fingerprints = [request.fingerprint() for request in requests]
    assert len(set(fingerprints)) == len(requests)
    assert {len(fingerprint) for fingerprint in fingerprints} == {16}


def test_equal_requests_have_equal_fingerprints_whatever_their_keys() -> None:
    request = Increment("a", 2, -5, 5, "first")
    other = decode_operation(msgpack.encode(Increment("a", 2, -5, 5, "second")))
    assert isinstance(other, Increment)
    assert request.fingerprint() == other.fingerprint() == Increment("a", 2, -5, 5).fingerprint()


def test_a_fingerprint_never_changes_because_it_is_stored_on_disk() -> None:
    assert Increment("visits").fingerprint().hex() == "f10405e4d611917eb8756b6a7555d9af"
    assert Increment("visits", -3, 0, 10).fingerprint().hex() == "d722cd2f2b0964d5ec40e80de876cfa3"


def test_a_batch_survives_encoding() -> None:
    operations: list[Operation] = [Increment("a", 2, 0, 9, "key"), Set("b", 3), Delete("c"), Get("d")]
    batch = Batch(CLIENT, 7, operations)
    assert decode_batch(msgpack.encode(batch)) == batch


@pytest.mark.parametrize("client", [b"", b"x" * 15, b"x" * 17, "x" * 16, 5, None])
def test_a_client_is_exactly_16_bytes(client: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_batch(msgpack.encode([client, 1, [Get("a")]]))


@pytest.mark.parametrize("sequence", [-1, 2**63, True, "1", 1.5, None])
def test_a_sequence_is_a_64_bit_integer_from_0_on(sequence: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_batch(msgpack.encode([CLIENT, sequence, [Get("a")]]))


@pytest.mark.parametrize("count", [0, LARGEST_BATCH + 1])
def test_a_batch_of_no_operations_or_of_too_many_is_refused(count: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_batch(msgpack.encode([CLIENT, 1, [Get("a")] * count]))


def test_a_batch_may_have_1000_operations() -> None:
    batch = decode_batch(msgpack.encode([CLIENT, 1, [Increment("a")] * LARGEST_BATCH]))
    assert len(batch.operations) == LARGEST_BATCH


@pytest.mark.parametrize("write", [Increment("a"), Set("a", 1), Delete("a")], ids=lambda write: type(write).__name__)
def test_a_batch_with_any_write_in_it_needs_a_sequence(write: Operation) -> None:
    for operations in ([write], [Get("a"), write]):
        with pytest.raises(InvalidRequest, match="sequence"):
            Batch(CLIENT, 0, operations)
        with pytest.raises(msgspec.ValidationError, match="sequence"):
            decode_batch(msgpack.encode([CLIENT, 0, operations]))
        assert Batch(CLIENT, 1, operations).sequence == 1


@pytest.mark.parametrize("sequence", [0, 1])
def test_a_scan_and_a_write_need_batches_of_their_own(sequence: int) -> None:
    operations: list[Operation] = [Scan(), Get("a"), Increment("a")]
    with pytest.raises(InvalidRequest, match="scan"):
        Batch(CLIENT, sequence, operations)
    with pytest.raises(msgspec.ValidationError, match="scan"):
        decode_batch(msgpack.encode([CLIENT, sequence, operations]))
    assert Batch(CLIENT, sequence, [Scan(), Get("a")]).sequence == sequence


def test_a_batch_of_reads_needs_no_sequence() -> None:
    batch = Batch(CLIENT, 0, [Get("a"), Scan("a", 3)])
    assert decode_batch(msgpack.encode(batch)) == batch


def test_one_bad_operation_refuses_the_whole_batch() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_batch(msgpack.encode([CLIENT, 1, [Increment("a"), ["increment", "b", 0]]]))


@pytest.mark.parametrize(
    "result",
    [5, 0, SMALLEST, LARGEST, True, False, None, Replayed(7), Page([("a", 1)], more=True), Refusal("limit", "full")],
    ids=repr,
)
def test_every_kind_of_result_survives_encoding(result: Result) -> None:
    decoded = msgpack.decode(msgpack.encode(result), type=Result)
    assert decoded == result
    assert type(decoded) is type(result)


@pytest.mark.parametrize(
    ("code", "kind"), [("limit", LimitReached), ("key_reused", KeyReused), ("storage_full", StorageFull)]
)
def test_a_refusal_becomes_its_own_error_with_the_outcome_not_applied(code: str, kind: type[Exception]) -> None:
    error = Refusal(code, "because").error()
    assert type(error) is kind
    assert str(error) == "because"
    assert error.outcome == "not_applied"


def test_an_invalid_request_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        Get("")
