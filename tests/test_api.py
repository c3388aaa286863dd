"""The JSON API over a store in memory: its answers, and that refused requests change nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from counter_server.operations import LARGEST, SMALLEST
from counter_server.server.web import create_app
from counter_server.state import State
from counter_server.store import Finding, RoundTrip

COUNTERS = "/api/v1/counters"
LARGEST_BODY = 16 * 1024
JSON = "application/json"

# The counters before a bad request, to compare with the counters after it.
BEFORE = {"visits": 7, "full": 3, "größe": -1, "top": LARGEST, "bottom": SMALLEST}

NAMES = [
    "visits",
    "a",
    "x" * 255,
    "é" * 127,
    "счётчик",
    "計数器",
    "عداد",
    "काउंटर",
    "ตัวนับ",
    "μετρητής",
    "🐦",
    "two words",
    " ",
    " x ",
    "50%",
    "%41",
    "%2F",
    "a?b",
    "a#b",
    "a&b=c",
    "a+b",
    "a;b",
    ".",
    "..",
    "increment",
    "<script>",
    '"quoted"',
    "back\\slash",
    "None",
]

NAMES_WITH_SLASHES = [
    "a/b",
    "a/b/c",
    "a//b",
    "/a",
    "a/",
    "/",
    "//",
    "a/increment",
    "increment/increment",
    "a/../b",
]

BAD_NAMES = {
    "empty": "",
    "NUL": "a\0b",
    "newline": "a\nb",
    "newline-last": "a\n",
    "carriage-return": "a\rb",
    "tab": "a\tb",
    "escape": "\x1b[2J",
    "delete": "a\x7f",
    "C1-control": "a\x85",
    "line-separator": "a\u2028b",
    "paragraph-separator": "a\u2029b",
    "256-bytes": "x" * 256,
    "256-bytes-of-128-characters": "é" * 128,
    "4000-bytes": "x" * 4000,
    "not-NFC": "e\u0301",
    "not-NFC-angstrom": "\u212b",
}

# Bodies that are not JSON, or not an object with known members.
BAD_DOCUMENTS = {
    "cut-off": b'{"by": 1',
    "only-a-brace": b"{",
    "only-spaces": b"   ",
    "single-quotes": b"{'by': 1}",
    "trailing-comma": b'{"by": 1,}',
    "something-after-it": b'{"by": 1} x',
    "two-documents": b'{"by": 1}{"by": 1}',
    "comment": b'{"by": 1 /* one */}',
    "form": b"by=1",
    "array": b"[1]",
    "number": b"1",
    "string": b'"by"',
    "null": b"null",
    "true": b"true",
    "latin-1-member": '{"größe": 1}'.encode("latin-1"),
    "latin-1-value": '{"by": "größe"}'.encode("latin-1"),
    "UTF-16": '{"by": 1}'.encode("utf-16"),
    "byte-order-mark": b'\xef\xbb\xbf{"by": 1}',
    "NUL": b'{"by": 1}\0',
    "lone-surrogate": b'{"\\ud800": 1}',
    "deep-arrays": b"[" * 4000 + b"]" * 4000,
    "deep-arrays-cut-off": b"[" * 4000,
    "deep-value": b'{"by": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    "deep-objects": b'{"by":' * 1000 + b"1" + b"}" * 1000,
    "deep-unknown-member": b'{"x": ' + b"[" * 4000 + b"]" * 4000 + b"}",
    "unknown-member": b'{"step": 1}',
    "unknown-member-beside-a-known-one": b'{"by": 1, "maximun": 5}',
    "member-in-capitals": b'{"By": 1}',
}

BAD_NUMBERS = {
    "true": b"true",
    "false": b"false",
    "null": b"null",
    "string": b'"1"',
    "array": b"[1]",
    "object": b"{}",
    "fraction": b"1.5",
    "nearly-1": b"1." + b"0" * 5000 + b"1",
    "1e30": b"1e30",
    "huge-exponent": b"1e999",
    "exponent-of-9-digits": b"1e999999999",
    "exponent-of-30-digits": b"1e" + b"9" * 30,
    "tiny": b"1e-" + b"9" * 30,
    "2**63-as-float": b"9223372036854775808.0",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "minus-Infinity": b"-Infinity",
    "plus": b"+1",
    "leading-zero": b"01",
    "hexadecimal": b"0x1",
    "2**63": str(2**63).encode(),
    "-2**63-1": str(-(2**63) - 1).encode(),
    "2**64+1": str(2**64 + 1).encode(),
    "4000-digits": b"9" * 4000,
    "5000-digits": b"9" * 5000,
    "minus-4000-digits": b"-" + b"9" * 4000,
    "arabic-digit": "\u0661".encode(),
}

BAD_STEPS = {
    **{f"by-{label}": b'{"by": ' + number + b"}" for label, number in BAD_NUMBERS.items()},
    "by-0": b'{"by": 0}',
    "by-minus-0": b'{"by": -0}',
    "by-0.0": b'{"by": 0.0}',
    "by-minus-0.0": b'{"by": -0.0e5}',
    **{
        f"{bound}-{label}": b'{"%s": %s}' % (bound.encode(), BAD_NUMBERS[label])
        for bound in ("minimum", "maximum")
        for label in ("true", "string", "fraction", "NaN", "2**63", "4000-digits")
    },
    "minimum-over-maximum": b'{"minimum": 2, "maximum": 1}',
    "by-twice": b'{"by": 1, "by": 1}',
    "by-twice-once-escaped": b'{"by": 1, "b\\u0079": 2}',
    "maximum-twice": b'{"maximum": 1, "by": 1, "maximum": 100}',
    "value-as-for-PUT": b'{"value": 1}',
}

BAD_ASSIGNMENTS = {
    **{f"value-{label}": b'{"value": ' + number + b"}" for label, number in BAD_NUMBERS.items()},
    "value-twice": b'{"value": 1, "value": 2}',
    "no-value": b"{}",
    "no-body": b"",
    "by-as-for-POST": b'{"by": 1}',
}

BAD_KEYS = {
    "empty": "",
    "256-characters": "k" * 256,
    "space": "two words",
    "latin-1": "clé",
    "comma": "a,b",
    "tab": "a\tb",
    "DEL": "a\x7f",
}


@dataclass(frozen=True)
class Bad:
    """A request that must be refused, and the refusal."""

    method: str
    path: str
    status: int
    options: dict[str, Any] = field(default_factory=dict)
    says: str = ""  # part of the detail


def with_body(data: bytes, content_type: str | None = JSON) -> dict[str, Any]:
    return {"data": data, "content_type": content_type}


def with_headers(*headers: tuple[str, str]) -> dict[str, Any]:
    return {"headers": list(headers)}


def path_to(name: str) -> str:
    """Return the path of a counter."""
    return f"{COUNTERS}/{quote(name, safe='')}"


def path_info(raw: bytes) -> dict[str, Any]:
    """Return a path in bytes that the test client would not send unchanged."""
    return {"environ_overrides": {"PATH_INFO": raw.decode("latin-1")}}


@pytest.fixture
def app() -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_HOST": "127.0.0.1"})


@pytest.fixture
def state(state: State) -> State:
    """Make an application with the counters of `BEFORE`."""
    for name, value in BEFORE.items():
        state.counter(name).set(value)
    return state


def all_counters(state: State) -> dict[str, int]:
    page = state.counters(limit=1000)
    assert not page.more
    return dict(page.counters)


def listed(client: FlaskClient, query: str = "") -> tuple[list[tuple[str, int]], str | None]:
    """Return a page of counters, and the name to continue after."""
    response = client.get(f"{COUNTERS}{query}")
    assert response.status_code == 200, response.text
    assert response.mimetype == JSON
    body = response.get_json()
    assert set(body) == {"counters", "next"}
    return [(row["counter"], row["value"]) for row in body["counters"]], body["next"]


def assert_counter(response: TestResponse, name: str, value: int) -> None:
    assert response.status_code == 200, response.text
    assert response.mimetype == JSON
    assert response.get_json() == {"counter": name, "value": value}
    assert response.headers["Cache-Control"] == "no-store"


def assert_problem(response: TestResponse, status: int) -> str:
    """Check for a problem document that says that nothing was counted; return its detail."""
    assert response.status_code == status, response.text
    assert response.content_type == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    body = response.get_json()
    assert set(body) == {"type", "title", "status", "detail", "outcome"}
    assert body["status"] == status
    assert body["outcome"] == "not_applied"
    assert body["title"]
    detail = body["detail"]
    assert isinstance(detail, str)
    assert detail
    assert "\n" not in detail
    for trace in ("Traceback", 'File "', ".py"):
        assert trace not in response.text
    return detail


# Good requests


def test_an_increment_without_a_body_adds_one(client: FlaskClient) -> None:
    assert_counter(client.post(f"{COUNTERS}/x/increment"), "x", 1)
    assert_counter(client.post(f"{COUNTERS}/x/increment"), "x", 2)


@pytest.mark.parametrize("content_type", [JSON, f"{JSON}; charset=utf-8", "Application/JSON"])
def test_an_increment_adds_the_step_in_its_body(client: FlaskClient, content_type: str) -> None:
    response = client.post(f"{COUNTERS}/x/increment", data=b' {"by": -5} ', content_type=content_type)
    assert_counter(response, "x", -5)


def test_an_empty_object_and_bounds_of_null_are_an_increment_by_one(client: FlaskClient) -> None:
    assert_counter(client.post(f"{COUNTERS}/x/increment", json={}), "x", 1)
    assert_counter(client.post(f"{COUNTERS}/x/increment", json={"minimum": None, "maximum": None}), "x", 2)


INTEGERS = {
    "5.0": 5,
    "50e-1": 5,
    "1E+3": 1000,
    "-7.00": -7,
    "1." + "0" * 5000: 1,
    "9007199254740993.0": 2**53 + 1,
    "9.223372036854775807e18": LARGEST,
    "-9223372036854775808.0": SMALLEST,
}


@pytest.mark.parametrize("text", INTEGERS, ids=lambda text: text[:20])
def test_an_integer_may_be_spelled_in_every_way_of_json_schema(client: FlaskClient, text: str) -> None:
    """The value is exact, also if a float would be another number."""
    number = INTEGERS[text]
    sent = {"content_type": JSON}
    assert_counter(client.put(f"{COUNTERS}/x", data=f'{{"value": {text}}}', **sent), "x", number)
    bounds = f'"minimum": {text}, "maximum": {text}'
    assert_counter(client.post(f"{COUNTERS}/y/increment", data=f'{{"by": {text}, {bounds}}}', **sent), "y", number)
    assert_counter(client.put(f"{COUNTERS}/x", data='{"value": -0.0}', **sent), "x", 0)


def test_a_content_type_without_a_body_is_accepted(client: FlaskClient) -> None:
    assert_counter(client.post(f"{COUNTERS}/x/increment", content_type="text/plain"), "x", 1)


def test_the_bounds_themselves_are_reached(client: FlaskClient) -> None:
    body = {"by": 5, "minimum": -5, "maximum": 5}
    assert_counter(client.post(f"{COUNTERS}/x/increment", json=body), "x", 5)
    assert_counter(client.post(f"{COUNTERS}/x/increment", json={**body, "by": -10}), "x", -5)


def test_a_counter_reaches_the_ends_of_64_bits(client: FlaskClient) -> None:
    assert_counter(client.post(f"{COUNTERS}/x/increment", json={"by": LARGEST}), "x", LARGEST)
    assert_counter(client.put(f"{COUNTERS}/x", json={"value": 0}), "x", 0)
    assert_counter(client.post(f"{COUNTERS}/x/increment", json={"by": SMALLEST}), "x", SMALLEST)


def test_a_body_of_the_largest_size_is_accepted(client: FlaskClient) -> None:
    response = client.post(f"{COUNTERS}/x/increment", **with_body(b'{"by": 4}'.ljust(LARGEST_BODY)))
    assert_counter(response, "x", 4)


@pytest.mark.parametrize("slash", ["", "/"], ids=["escaped-slashes", "plain-slashes"])
@pytest.mark.parametrize("name", [*NAMES, *NAMES_WITH_SLASHES])
def test_every_route_takes_a_counter_of_any_name(client: FlaskClient, name: str, slash: str) -> None:
    if slash and "/" not in name:
        slash = ""
    path = f"{COUNTERS}/{quote(name, safe=slash)}"
    assert client.get(path).status_code == 404
    assert_counter(client.post(f"{path}/increment"), name, 1)
    assert_counter(client.post(f"{path}/increment"), name, 2)
    assert_counter(client.get(path), name, 2)
    assert_counter(client.put(path, json={"value": -7}), name, -7)
    assert listed(client) == ([(name, -7)], None)
    gone = client.delete(path)
    assert (gone.status_code, gone.get_data()) == (204, b"")
    assert listed(client) == ([], None)


def test_names_that_differ_in_slashes_or_spaces_are_different_counters(client: FlaskClient) -> None:
    names = ["a/b", "a//b", "/a/b", "a/b/", "a b", "a  b", "a%2Fb", "A/B"]
    for value, name in enumerate(names):
        assert_counter(client.put(path_to(name), json={"value": value}), name, value)
    for value, name in enumerate(names):
        assert_counter(client.get(path_to(name)), name, value)


def test_reading_a_counter_with_get_or_head_changes_nothing(client: FlaskClient, state: State) -> None:
    assert_counter(client.get(f"{COUNTERS}/visits"), "visits", 7)
    head = client.head(f"{COUNTERS}/visits")
    assert (head.status_code, head.get_data()) == (200, b"")
    assert client.head(COUNTERS).status_code == 200
    assert client.options(f"{COUNTERS}/visits").status_code == 200
    assert all_counters(state) == BEFORE


def test_a_deleted_counter_starts_again(client: FlaskClient, state: State) -> None:
    assert client.delete(f"{COUNTERS}/visits").status_code == 204
    assert_problem(client.delete(f"{COUNTERS}/visits"), 404)
    assert_counter(client.post(f"{COUNTERS}/visits/increment"), "visits", 1)


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_requests_of_this_site_and_of_programs_are_accepted(client: FlaskClient, site: str) -> None:
    headers = {"Sec-Fetch-Site": site}
    assert_counter(client.post(f"{COUNTERS}/x/increment", headers=headers), "x", 1)


def test_reading_from_another_site_is_not_refused(client: FlaskClient, state: State) -> None:
    assert_counter(client.get(f"{COUNTERS}/visits", headers={"Sec-Fetch-Site": "cross-site"}), "visits", 7)


# Idempotency keys


@pytest.mark.parametrize("key", ["k", "k" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324", '"quoted"', "!~;=%20"])
def test_a_key_is_answered_with_the_same_number_and_the_replay_says_so(client: FlaskClient, key: str) -> None:
    headers = {"Idempotency-Key": key}
    first = client.post(f"{COUNTERS}/x/increment", headers=headers)
    assert_counter(first, "x", 1)
    assert "Idempotent-Replayed" not in first.headers
    assert_counter(client.post(f"{COUNTERS}/x/increment"), "x", 2)
    for _ in range(2):
        again = client.post(f"{COUNTERS}/x/increment", headers=headers)
        assert_counter(again, "x", 1)
        assert again.headers["Idempotent-Replayed"] == "true"
    assert listed(client) == ([("x", 2)], None)


def test_the_same_request_in_other_words_is_a_replay(client: FlaskClient) -> None:
    headers = {"Idempotency-Key": "k"}
    assert_counter(client.post(f"{COUNTERS}/x/increment", headers=headers), "x", 1)
    for data in (b"{}", b'{"by": 1}', b'{ "maximum": null,\n "by":1 }'):
        again = client.post(f"{COUNTERS}/x/increment", headers=headers, **with_body(data))
        assert_counter(again, "x", 1)
        assert again.headers["Idempotent-Replayed"] == "true"


def test_a_replay_outlives_the_counter_and_its_bounds(client: FlaskClient) -> None:
    request: dict[str, Any] = {"headers": {"Idempotency-Key": "k"}, "json": {"maximum": 1}}
    assert_counter(client.post(f"{COUNTERS}/x/increment", **request), "x", 1)
    assert client.delete(f"{COUNTERS}/x").status_code == 204
    again = client.post(f"{COUNTERS}/x/increment", **request)
    assert_counter(again, "x", 1)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert listed(client) == ([], None)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("x/increment", {"by": 2}),
        ("x/increment", {"by": -1}),
        ("x/increment", {"maximum": 100}),
        ("x/increment", {"minimum": 0}),
        ("visits/increment", {}),
        ("X/increment", {}),
    ],
)
def test_a_key_for_another_request_is_refused(client: FlaskClient, state: State, path: str, body: object) -> None:
    headers = {"Idempotency-Key": "k"}
    assert_counter(client.post(f"{COUNTERS}/x/increment", headers=headers), "x", 1)
    refused = client.post(f"{COUNTERS}/{path}", headers=headers, json=body)
    assert "another request" in assert_problem(refused, 422)
    assert all_counters(state) == {**BEFORE, "x": 1}
    again = client.post(f"{COUNTERS}/x/increment", headers=headers)
    assert_counter(again, "x", 1)


def test_a_key_whose_request_was_refused_is_still_free(client: FlaskClient, state: State) -> None:
    request: dict[str, Any] = {"headers": {"Idempotency-Key": "k"}, "json": {"maximum": 3}}
    assert_problem(client.post(f"{COUNTERS}/full/increment", **request), 409)
    assert_counter(client.put(f"{COUNTERS}/full", json={"value": 0}), "full", 0)
    counted = client.post(f"{COUNTERS}/full/increment", **request)
    assert_counter(counted, "full", 1)
    assert "Idempotent-Replayed" not in counted.headers


# Pages


@pytest.mark.parametrize("limit", [1, 7, 99, 100, 1000])
def test_pages_hold_every_counter_once_in_the_order_of_their_names(app: Flask, limit: int) -> None:
    client = app.test_client()
    state = app.extensions["counter_server"]
    scripts = ("counter", "счётчик", "計数器", "عداد", "a b&c+d", "50%", "🐦", "x/y//z", "Zähler")
    expected = {f"{script}-{number:03}": number for script in scripts for number in range(130 if limit > 1 else 12)}
    for name, value in expected.items():
        state.counter(name).set(value)
    found: list[tuple[str, int]] = []
    query = f"?limit={limit}"
    while True:
        page, after = listed(client, query)
        assert not found or page[0] > found[-1], "the pages do not go on"
        found += page
        if after is None:
            break
        assert len(page) == limit
        assert after == page[-1][0]
        query = f"?limit={limit}&after={quote(after, safe='')}"
    assert found == sorted(expected.items())


def test_a_page_without_a_limit_has_100_counters(app: Flask) -> None:
    state = app.extensions["counter_server"]
    for number in range(101):
        state.counter(f"{number:03}").set(number)
    page, after = listed(app.test_client())
    assert len(page) == 100
    assert after == "099"
    assert listed(app.test_client(), "?after=099") == ([("100", 100)], None)


def test_a_page_that_ends_with_the_last_counter_has_no_next(client: FlaskClient, state: State) -> None:
    page, after = listed(client, f"?limit={len(BEFORE)}")
    assert dict(page) == BEFORE
    assert after is None


def test_a_page_after_a_missing_name_begins_with_the_next(client: FlaskClient, state: State) -> None:
    assert listed(client, "?after=g&limit=2") == ([("größe", -1), ("top", LARGEST)], "top")
    assert listed(client, "?after=zzz") == ([], None)


# Refused requests


INCREMENT = f"{COUNTERS}/visits/increment"
VISITS = f"{COUNTERS}/visits"


def _bad_names() -> Iterator[tuple[str, Bad]]:
    for label, name in BAD_NAMES.items():
        path = path_to(name)
        yield f"POST-name-{label}", Bad("POST", f"{path}/increment", 400, says="name")
        yield f"GET-name-{label}", Bad("GET", path, 400, says="name")
        yield f"PUT-name-{label}", Bad("PUT", path, 400, with_body(b'{"value": 1}'), says="name")
        yield f"DELETE-name-{label}", Bad("DELETE", path, 400, says="name")
        if name:
            yield f"page-after-{label}", Bad("GET", f"{COUNTERS}?after={quote(name)}", 400, says="name")


def _bad_paths() -> Iterator[tuple[str, Bad]]:
    for label, raw in {"latin-1": b"gr\xf6\xdfe", "cut-off": b"\xe2\x82", "surrogate": b"\xed\xa0\x80"}.items():
        whole = f"{COUNTERS}/".encode() + raw
        yield f"POST-path-not-UTF-8-{label}", Bad("POST", "/", 400, path_info(whole + b"/increment"), "UTF-8")
        for method in ("GET", "PUT", "DELETE"):
            yield f"{method}-path-not-UTF-8-{label}", Bad(method, "/", 400, path_info(whole), "UTF-8")
        yield f"page-path-not-UTF-8-{label}", Bad("GET", "/", 400, path_info(b"/" + raw), "UTF-8")
    for path in (
        "/nowhere",
        "/api",
        "/api/v1",
        "/api/v2/counters",
        f"{COUNTERS}x",
        "/visits",
        "/%00",
        "/static/",
        "/api//v1/counters",
    ):
        yield f"unknown-path-{path}", Bad("GET", path, 404)
    for name in ("nobody", "Visits", "visits "):
        yield f"GET-unknown-counter-{name}", Bad("GET", path_to(name), 404, says=name)
        yield f"DELETE-unknown-counter-{name}", Bad("DELETE", path_to(name), 404, says=name)
    for limit in ("0", "-1", "1001", "x", "", "1.5", "1e2", "9" * 5000, "0x10", str(2**64)):
        yield f"page-limit-{limit[:9]}", Bad("GET", f"{COUNTERS}?limit={limit}", 400, says="limit")


def _bad_bodies() -> Iterator[tuple[str, Bad]]:
    for label, data in {**BAD_DOCUMENTS, **BAD_STEPS}.items():
        yield f"POST-{label}", Bad("POST", INCREMENT, 400, with_body(data))
    for label, data in {**BAD_DOCUMENTS, **BAD_ASSIGNMENTS}.items():
        yield f"PUT-{label}", Bad("PUT", VISITS, 400, with_body(data))
    for content_type in (None, "text/plain", "application/x-www-form-urlencoded", "application/json5", "", "json"):
        yield f"POST-content-type-{content_type}", Bad("POST", INCREMENT, 415, with_body(b"{}", content_type))
        yield f"PUT-content-type-{content_type}", Bad("PUT", VISITS, 415, with_body(b'{"value": 1}', content_type))
    for label, size in {"by-one-byte": LARGEST_BODY + 1, "by-far": 2**20}.items():
        yield f"POST-body-over-the-limit-{label}", Bad("POST", INCREMENT, 413, with_body(b'{"by":1}'.ljust(size)))
        yield f"PUT-body-over-the-limit-{label}", Bad("PUT", VISITS, 413, with_body(b'{"value":1}'.ljust(size)))


def _bad_keys() -> Iterator[tuple[str, Bad]]:
    for label, key in BAD_KEYS.items():
        yield f"key-{label}", Bad("POST", INCREMENT, 400, with_headers(("Idempotency-Key", key)), "dempotency")
    twice = with_headers(("Idempotency-Key", "a"), ("Idempotency-Key", "a"))
    yield "key-given-twice", Bad("POST", INCREMENT, 400, twice, "once")


def _crossed_limits() -> Iterator[tuple[str, Bad]]:
    for label, name, body, says in [
        ("maximum", "full", b'{"maximum": 3}', "above 3"),
        ("minimum", "full", b'{"by": -4, "minimum": 0}', "below 0"),
        ("crossed-before", "visits", b'{"maximum": 5}', "above 5"),
        ("crossed-before-on-the-way-back", "visits", b'{"by": -1, "maximum": 5}', "above 5"),
        ("counter-not-there", "new", b'{"maximum": 0}', "above 0"),
        ("over-64-bits", "top", b'{"by": 1}', "above"),
        ("under-64-bits", "bottom", b'{"by": -1}', "below"),
    ]:
        yield f"limit-{label}", Bad("POST", f"{path_to(name)}/increment", 409, with_body(body), says)


def _from_other_sites() -> Iterator[tuple[str, Bad]]:
    for site in ("cross-site", "same-site"):
        reported = with_headers(("Sec-Fetch-Site", site))
        for method, path in [("POST", INCREMENT), ("DELETE", VISITS), ("POST", "/"), ("POST", "/nowhere")]:
            yield f"{site}-{method}-{path}", Bad(method, path, 403, reported, "other sites")
        yield f"{site}-PUT", Bad("PUT", VISITS, 403, {**reported, **with_body(b'{"value": 1}')}, "other sites")


BAD = dict(chain(_bad_names(), _bad_paths(), _bad_bodies(), _bad_keys(), _crossed_limits(), _from_other_sites()))


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_refused_and_changes_nothing(client: FlaskClient, state: State, bad: Bad) -> None:
    detail = assert_problem(client.open(bad.path, method=bad.method, **bad.options), bad.status)
    assert bad.says in detail
    assert all_counters(state) == BEFORE


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/", {"GET", "HEAD", "OPTIONS"}),
        ("PUT", "/", {"GET", "HEAD", "OPTIONS"}),
        ("POST", COUNTERS, {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", COUNTERS, {"GET", "HEAD", "OPTIONS"}),
        ("POST", f"{COUNTERS}/visits", {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}),
        ("PATCH", f"{COUNTERS}/visits", {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}),
        ("TRACE", f"{COUNTERS}/visits", {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}),
        ("BREW", f"{COUNTERS}/visits", {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}),
    ],
)
def test_an_unknown_method_is_refused_with_the_allowed_methods(
    client: FlaskClient, state: State, method: str, path: str, allowed: set[str]
) -> None:
    response = client.open(path, method=method, json={"value": 1})
    assert_problem(response, 405)
    assert set(response.headers["Allow"].split(", ")) == allowed
    assert all_counters(state) == BEFORE


@pytest.mark.parametrize("key", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_a_refused_key_is_not_repeated_in_full(client: FlaskClient, key: str) -> None:
    detail = assert_problem(client.post(f"{COUNTERS}/x/increment", headers=[("Idempotency-Key", key)]), 400)
    assert len(detail) < 200


# An unreachable store


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/", None),
        ("POST", f"{COUNTERS}/x/increment", None),
        ("GET", f"{COUNTERS}/x", None),
        ("GET", COUNTERS, None),
        ("PUT", f"{COUNTERS}/x", {"value": 1}),
        ("DELETE", f"{COUNTERS}/x", None),
    ],
)
def test_an_unreachable_store_is_a_503_that_says_so(
    stack: ExitStack, tmp_path: Path, method: str, path: str, body: object
) -> None:
    config = {
        "COUNTER_SERVER_STORE": f"manager://{tmp_path}",
        "COUNTER_SERVER_HOST": "127.0.0.1",
        "SECRET_KEY": "a key",
    }
    app = create_app({**config, "COUNTER_SERVER_DEADLINE": 0.2, "COUNTER_SERVER_START": False})
    stack.callback(app.extensions["counter_server"].close)
    response = app.test_client().open(path, method=method, json=body)
    detail = assert_problem(response, 503)
    assert int(response.headers["Retry-After"]) >= 1
    assert "could not be reached" in detail
    assert str(tmp_path) not in detail  # only the operator's log names the directory
    assert "nothing was counted" in detail
    assert list(tmp_path.iterdir()) == []


def test_a_bad_request_is_refused_even_if_the_store_is_unreachable(tmp_path: Path) -> None:
    app = create_app({"COUNTER_SERVER_STORE": f"manager://{tmp_path}", "COUNTER_SERVER_DEADLINE": 60})
    assert_problem(app.test_client().post(f"{COUNTERS}/x/increment", json={"by": 0}), 400)


def test_an_internal_error_reveals_nothing(app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        round_trip: RoundTrip = "short"

        def findings(self, _deadline: float) -> list[Finding]:
            return []

        def apply(self, batch: object, deadline: float) -> NoReturn:
            raise ZeroDivisionError(f"a secret: {batch} by {deadline}")

        def after_fork(self) -> None:
            """Do nothing."""

        def close(self) -> None:
            """Do nothing."""

    app.extensions["counter_server"] = State(Broken())
    response = client.post(f"{COUNTERS}/x/increment")
    assert response.status_code == 500
    assert response.content_type == "application/problem+json"
    assert response.get_json()["outcome"] == "unknown"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "a secret" in caplog.text


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://localhost:8001", "null", "https://localhost.evil.example"]
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_the_page_of_another_origin_changes_nothing(client: FlaskClient, method: str, origin: str) -> None:
    """Browsers send this header without Sec-Fetch-Site to plain http:// addresses of other machines."""
    client.put(f"{COUNTERS}/x", json={"value": 5})
    path = f"{COUNTERS}/x/increment" if method == "POST" else f"{COUNTERS}/x"
    response = client.open(
        path, method=method, json={"value": 7} if method == "PUT" else None, headers={"Origin": origin}
    )
    assert_problem(response, 403)
    assert client.get(f"{COUNTERS}/x").get_json()["value"] == 5


def test_our_own_page_and_programs_without_an_origin_may_count(client: FlaskClient) -> None:
    path = f"{COUNTERS}/x/increment"
    assert client.post(path, headers={"Origin": "http://localhost"}).get_json()["value"] == 1
    assert client.post(path).get_json()["value"] == 2
