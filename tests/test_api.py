"""The JSON API over a store in memory: its answers, and that refused requests change nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from counter_server.operations import LARGEST, SMALLEST
from counter_server.server.web import create_app
from counter_server.state import State

COUNTERS = "/api/v1/counters"
VISITS = f"{COUNTERS}/visits"
INCREMENT = f"{VISITS}/increment"
LARGEST_BODY = 16 * 1024
JSON = "application/json"

# The counters before a bad request, to compare with the counters after it.
BEFORE = {"visits": 7, "full": 3, "größe": -1, "top": LARGEST, "bottom": SMALLEST}

NAMES = [
    *("visits", "a", "x" * 255, "é" * 127, "счётчик", "計数器", "عداد", "काउंटर", "ตัวนับ", "μετρητής", "🐦"),
    *("two words", " ", " x ", "50%", "%41", "%2F", "a?b", "a#b", "a&b=c", "a+b", "a;b", ".", "..", "increment"),
    *("<script>", '"quoted"', "back\\slash", "None"),
]
NAMES_WITH_SLASHES = [*("a/b", "a/b/c", "a//b", "/a", "a/", "/", "//", "a/increment", "increment/increment", "a/../b")]
BAD_NAMES = [
    *("", "a\0b", "a\nb", "a\n", "a\rb", "a\tb", "\x1b[2J", "a\x7f", "a\x85", "a\u2028b", "a\u2029b"),
    *("x" * 256, "é" * 128, "x" * 4000, "e\u0301", "\u212b"),  # too long in bytes; not NFC
]

# Bodies that are not JSON, or not an object with known members.
BAD_DOCUMENTS = [
    *(b'{"by": 1', b"{", b"   ", b"{'by': 1}", b'{"by": 1,}', b'{"by": 1} x', b'{"by": 1}{"by": 1}'),
    *(b'{"by": 1 /* one */}', b"by=1", b"[1]", b"1", b'"by"', b"null", b"true", b'{"by": 1}\0', b'{"\\ud800": 1}'),
    *('{"größe": 1}'.encode("latin-1"), '{"by": "größe"}'.encode("latin-1"), '{"by": 1}'.encode("utf-16")),
    *(b'\xef\xbb\xbf{"by": 1}', b"[" * 4000 + b"]" * 4000, b"[" * 4000, b'{"by":' * 1000 + b"1" + b"}" * 1000),
    *(b'{"by": ' + b"[" * 4000 + b"]" * 4000 + b"}", b'{"x": ' + b"[" * 4000 + b"]" * 4000 + b"}"),
    *(b'{"step": 1}', b'{"by": 1, "maximun": 5}', b'{"By": 1}'),
]
BAD_BOUNDS = [b"true", b'"1"', b"1.5", b"NaN", str(2**63).encode(), b"9" * 4000]
BAD_NUMBERS = [
    *(*BAD_BOUNDS, b"false", b"null", b"[1]", b"{}", b"1." + b"0" * 5000 + b"1", b"1e30", b"1e999", b"1e999999999"),
    *(b"1e" + b"9" * 30, b"1e-" + b"9" * 30, b"9223372036854775808.0", b"Infinity", b"-Infinity", b"+1", b"01"),
    *(b"0x1", str(-(2**63) - 1).encode(), str(2**64 + 1).encode(), b"9" * 5000, b"-" + b"9" * 4000),
    "\N{ARABIC-INDIC DIGIT ONE}".encode(),
]
BAD_STEPS = [
    *(b'{"by": ' + number + b"}" for number in [*BAD_NUMBERS, b"0", b"-0", b"0.0", b"-0.0e5"]),
    *(b'{"%s": %s}' % (bound, number) for bound in (b"minimum", b"maximum") for number in BAD_BOUNDS),
    *(b'{"minimum": 2, "maximum": 1}', b'{"by": 1, "by": 1}', b'{"by": 1, "b\\u0079": 2}'),
    *(b'{"maximum": 1, "by": 1, "maximum": 100}', b'{"value": 1}'),
]
BAD_ASSIGNMENTS = [
    *(b'{"value": ' + number + b"}" for number in BAD_NUMBERS),
    *(b'{"value": 1, "value": 2}', b"{}", b"", b'{"by": 1}'),
]


class Bad(NamedTuple):
    """A request that must be refused, and the refusal."""

    method: str
    path: str
    status: int
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    says: str = ""  # part of the detail


def with_body(data: bytes, content_type: str | None = JSON) -> dict[str, Any]:
    return {"data": data, "content_type": content_type}


def path_to(name: str) -> str:
    return f"{COUNTERS}/{quote(name, safe='')}"


def _bad_names() -> Iterator[Bad]:
    for name in BAD_NAMES:
        path = path_to(name)
        yield Bad("POST", f"{path}/increment", 400, says="name")
        yield Bad("GET", path, 400, says="name")
        yield Bad("PUT", path, 400, with_body(b'{"value": 1}'), says="name")
        yield Bad("DELETE", path, 400, says="name")
        if name:
            yield Bad("GET", f"{COUNTERS}?after={quote(name)}", 400, says="name")


def _bad_paths() -> Iterator[Bad]:
    def path_info(path: bytes) -> dict[str, Any]:  # the test client would change these bytes
        return {"environ_overrides": {"PATH_INFO": path.decode("latin-1")}}

    for raw in (b"gr\xf6\xdfe", b"\xe2\x82", b"\xed\xa0\x80"):  # not UTF-8: latin-1, cut off, a surrogate
        path = f"{COUNTERS}/".encode() + raw
        yield Bad("POST", "/", 400, path_info(path + b"/increment"), "UTF-8")
        for method in ("GET", "PUT", "DELETE"):
            yield Bad(method, "/", 400, path_info(path), "UTF-8")
        yield Bad("GET", "/", 400, path_info(b"/" + raw), "UTF-8")
    unknown = ("/nowhere", "/api", "/api/v1", "/api/v2/counters", f"{COUNTERS}x", "/visits", "/%00", "/static/")
    for unknown_path in (*unknown, "/api//v1/counters"):
        yield Bad("GET", unknown_path, 404)
    for name in ("nobody", "Visits", "visits "):
        yield Bad("GET", path_to(name), 404, says=name)
        yield Bad("DELETE", path_to(name), 404, says=name)
    for limit in ("0", "-1", "1001", "x", "", "1.5", "1e2", "9" * 5000, "0x10", str(2**64)):
        yield Bad("GET", f"{COUNTERS}?limit={limit}", 400, says="limit")


def _bad_bodies() -> Iterator[Bad]:
    for data in (*BAD_DOCUMENTS, *BAD_STEPS):
        yield Bad("POST", INCREMENT, 400, with_body(data))
    for data in (*BAD_DOCUMENTS, *BAD_ASSIGNMENTS):
        yield Bad("PUT", VISITS, 400, with_body(data))
    for content_type in (None, "text/plain", "application/x-www-form-urlencoded", "application/json5", "", "json"):
        yield Bad("POST", INCREMENT, 415, with_body(b"{}", content_type))
        yield Bad("PUT", VISITS, 415, with_body(b'{"value": 1}', content_type))
    for size in (LARGEST_BODY + 1, 2**20):
        yield Bad("POST", INCREMENT, 413, with_body(b'{"by":1}'.ljust(size)))
        yield Bad("PUT", VISITS, 413, with_body(b'{"value":1}'.ljust(size)))


def _bad_keys() -> Iterator[Bad]:
    for key in ("", "k" * 256, "two words", "clé", "a,b", "a\tb", "a\x7f"):
        yield Bad("POST", INCREMENT, 400, {"headers": [("Idempotency-Key", key)]}, "dempotency")
    yield Bad("POST", INCREMENT, 400, {"headers": [("Idempotency-Key", "a")] * 2}, "once")


def _crossed_limits() -> Iterator[Bad]:
    for name, body, says in [
        ("full", b'{"maximum": 3}', "above 3"),
        ("full", b'{"by": -4, "minimum": 0}', "below 0"),
        ("visits", b'{"maximum": 5}', "above 5"),  # crossed before
        ("visits", b'{"by": -1, "maximum": 5}', "above 5"),  # and on the way back
        ("new", b'{"maximum": 0}', "above 0"),
        ("top", b'{"by": 1}', "above"),
        ("bottom", b'{"by": -1}', "below"),
    ]:
        yield Bad("POST", f"{path_to(name)}/increment", 409, with_body(body), says)


def _from_other_sites() -> Iterator[Bad]:
    for site in ("cross-site", "same-site"):
        headers = {"headers": [("Sec-Fetch-Site", site)]}
        for method, path in [("POST", INCREMENT), ("DELETE", VISITS), ("POST", "/"), ("POST", "/nowhere")]:
            yield Bad(method, path, 403, headers, "other sites")
        yield Bad("PUT", VISITS, 403, {**headers, **with_body(b'{"value": 1}')}, "other sites")


BAD = {
    "names": [*_bad_names()],
    "paths": [*_bad_paths()],
    "bodies": [*_bad_bodies()],
    "keys": [*_bad_keys()],
    "limits": [*_crossed_limits()],
    "sites": [*_from_other_sites()],
}


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


def assert_counter(response: TestResponse, name: str, value: int, *, replayed: bool = False) -> None:
    assert response.status_code == 200, response.text
    assert response.mimetype == JSON
    assert response.get_json() == {"counter": name, "value": value}
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers.get("Idempotent-Replayed") == ("true" if replayed else None)


def assert_problem(response: TestResponse, status: int, what: object = None) -> str:
    """Check for a problem document that says that nothing was counted; return its detail."""
    assert response.status_code == status, (what, response.text)
    assert response.content_type == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    body = response.get_json()
    assert set(body) == {"type", "title", "status", "detail", "outcome"}
    assert (body["status"], body["outcome"]) == (status, "not_applied")
    detail = str(body["detail"])
    assert body["title"]
    assert detail
    assert "\n" not in detail
    assert ".py" not in response.text
    return detail


def test_increments_add_what_their_body_says(client: FlaskClient) -> None:
    path = f"{COUNTERS}/x/increment"
    assert_counter(client.post(path), "x", 1)
    assert_counter(client.post(path, content_type="text/plain"), "x", 2)  # without a body, its type is nothing
    assert_counter(client.post(path, json={}), "x", 3)
    assert_counter(client.post(path, json={"minimum": None, "maximum": None}), "x", 4)
    for value, content_type in ((-1, JSON), (-6, f"{JSON}; charset=utf-8"), (-11, "Application/JSON")):
        assert_counter(client.post(path, data=b' {"by": -5} ', content_type=content_type), "x", value)
    assert_counter(client.post(path, **with_body(b'{"by": 4}'.ljust(LARGEST_BODY))), "x", -7)
    for site in ("same-origin", "none"):
        assert_counter(client.post(f"{COUNTERS}/{site}/increment", headers={"Sec-Fetch-Site": site}), site, 1)


def test_bounds_and_the_ends_of_64_bits_are_reached(client: FlaskClient) -> None:
    path = f"{COUNTERS}/x/increment"
    assert_counter(client.post(path, json={"by": 5, "minimum": -5, "maximum": 5}), "x", 5)
    assert_counter(client.post(path, json={"by": -10, "minimum": -5, "maximum": 5}), "x", -5)
    for end in (LARGEST, SMALLEST):
        assert_counter(client.put(f"{COUNTERS}/x", json={"value": 0}), "x", 0)
        assert_counter(client.post(path, json={"by": end}), "x", end)


def test_an_integer_may_be_spelled_in_every_way_of_json_schema(client: FlaskClient) -> None:
    """The value is exact, also if a float would be another number."""
    for text, number in [
        *(("5.0", 5), ("50e-1", 5), ("1E+3", 1000), ("-7.00", -7), ("1." + "0" * 5000, 1), ("-0.0", 0)),
        *(("9007199254740993.0", 2**53 + 1), ("9.223372036854775807e18", LARGEST)),
        ("-9223372036854775808.0", SMALLEST),
    ]:
        assert_counter(client.put(f"{COUNTERS}/x", **with_body(f'{{"value": {text}}}'.encode())), "x", number)
        if number:
            body = f'{{"by": {text}, "minimum": {text}, "maximum": {text}}}'.encode()
            assert_counter(client.post(f"{path_to(text[:20])}/increment", **with_body(body)), text[:20], number)


def test_every_route_takes_a_counter_of_any_name(client: FlaskClient) -> None:
    for name, slash in [*product(NAMES, [""]), *product(NAMES_WITH_SLASHES, ["", "/"])]:
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


def test_reading_changes_nothing(client: FlaskClient, state: State) -> None:
    assert_counter(client.get(VISITS), "visits", 7)
    assert_counter(client.get(VISITS, headers={"Sec-Fetch-Site": "cross-site"}), "visits", 7)
    head = client.head(VISITS)
    assert (head.status_code, head.get_data()) == (200, b"")
    assert client.head(COUNTERS).status_code == 200
    assert client.options(VISITS).status_code == 200
    assert all_counters(state) == BEFORE


def test_a_key_is_answered_again_with_the_same_number(client: FlaskClient) -> None:
    for key in ("k", "k" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324", '"quoted"', "!~;=%20"):
        path, headers = f"{path_to(key[:9])}/increment", {"Idempotency-Key": key}
        assert_counter(client.post(path, headers=headers), key[:9], 1)
        assert_counter(client.post(path), key[:9], 2)
        for data in (b"", b"{}", b'{"by": 1}', b'{ "maximum": null,\n "by":1 }'):  # the same request in other words
            again = client.post(path, headers=headers, **with_body(data))
            assert_counter(again, key[:9], 1, replayed=True)
        assert_counter(client.get(path_to(key[:9])), key[:9], 2)


def test_a_key_for_another_request_is_refused(client: FlaskClient, state: State) -> None:
    headers = {"Idempotency-Key": "k"}
    assert_counter(client.post(f"{COUNTERS}/x/increment", headers=headers), "x", 1)
    others: list[tuple[str, object]] = [("x", body) for body in ({"by": 2}, {"by": -1}, {"maximum": 9}, {"minimum": 0})]
    for name, body in [*others, ("visits", {}), ("X", {})]:
        refused = client.post(f"{COUNTERS}/{name}/increment", headers=headers, json=body)
        assert "another request" in assert_problem(refused, 422, (name, body))
        assert all_counters(state) == {**BEFORE, "x": 1}
        assert_counter(client.post(f"{COUNTERS}/x/increment", headers=headers), "x", 1, replayed=True)


def test_pages_hold_every_counter_once_in_the_order_of_their_names(app: Flask) -> None:
    client, state = app.test_client(), app.extensions["counter_server"]
    scripts = ("counter", "счётчик", "計数器", "عداد", "a b&c+d", "50%", "🐦", "x/y//z", "Zähler")
    expected = {f"{script}-{number:03}": number for script in scripts for number in range(20)}
    for name, value in expected.items():
        state.counter(name).set(value)
    for limit, query in ((7, "?limit=7"), (100, "?"), (180, "?limit=180")):
        found: list[tuple[str, int]] = []
        page, after = listed(client, query)
        while after is not None:
            assert (len(page), after) == (limit, page[-1][0])
            found += page
            page, after = listed(client, f"{query}&after={quote(after, safe='')}")
        assert found + page == sorted(expected.items())
    assert listed(client, "?after=Zz&limit=1") == ([("Zähler-000", 0)], "Zähler-000")  # no counter has this name


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_refused_and_changes_nothing(client: FlaskClient, state: State, kind: str) -> None:
    for bad in BAD[kind]:
        detail = assert_problem(client.open(bad.path, method=bad.method, **bad.options), bad.status, bad)
        assert bad.says in detail, bad
        assert kind != "keys" or len(detail) < 200, "a refused key is not repeated in full"
        assert all_counters(state) == BEFORE, bad


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match", "If-Unmodified-Since"])
def test_a_change_with_a_condition_is_refused_and_changes_nothing(
    client: FlaskClient, state: State, header: str
) -> None:
    state.counter("visits").set(7)
    for method, path in (("PUT", VISITS), ("DELETE", VISITS), ("POST", INCREMENT)):
        response = client.open(
            path, method=method, json={"value": 3} if method == "PUT" else None, headers={header: "*"}
        )
        assert (response.status_code, response.get_json()["outcome"]) == (400, "not_applied")
        assert header in response.get_json()["detail"]
    assert client.get(VISITS, headers={"If-None-Match": "*"}).get_json()["value"] == 7


def test_an_unknown_method_is_refused_with_the_allowed_methods(client: FlaskClient, state: State) -> None:
    reading, all_of_them = {"GET", "HEAD", "OPTIONS"}, {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}
    for method, path, allowed in [
        *(("POST", "/", reading), ("PUT", "/", reading), ("POST", COUNTERS, reading), ("DELETE", COUNTERS, reading)),
        *((method, VISITS, all_of_them) for method in ("POST", "PATCH", "TRACE", "BREW")),
    ]:
        response = client.open(path, method=method, json={"value": 1})
        assert_problem(response, 405, (method, path))
        assert set(response.headers["Allow"].split(", ")) == allowed
        assert all_counters(state) == BEFORE


def test_an_unreachable_store_is_a_503_that_says_so(stack: ExitStack, tmp_path: Path) -> None:
    config = {"COUNTER_SERVER_STORE": f"manager://{tmp_path}", "COUNTER_SERVER_HOST": "127.0.0.1", "SECRET_KEY": "k"}
    app = create_app({**config, "COUNTER_SERVER_DEADLINE": 0.05, "COUNTER_SERVER_START": False})
    stack.callback(app.extensions["counter_server"].close)
    client = app.test_client()
    for method, path in [
        *(("GET", "/"), ("POST", f"{COUNTERS}/x/increment"), ("GET", f"{COUNTERS}/x"), ("GET", COUNTERS)),
        *(("PUT", f"{COUNTERS}/x"), ("DELETE", f"{COUNTERS}/x")),
    ]:
        response = client.open(path, method=method, json={"value": 1} if method == "PUT" else None)
        detail = assert_problem(response, 503)
        assert int(response.headers["Retry-After"]) >= 1
        assert "could not be reached" in detail
        assert str(tmp_path) not in detail  # only the operator's log names the directory
        assert "nothing was counted" in detail
    assert_problem(client.post(f"{COUNTERS}/x/increment", json={"by": 0}), 400)  # a bad request stays one
    assert list(tmp_path.iterdir()) == []


def test_an_internal_error_reveals_nothing(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(State, "submit", fail)
    response = client.post(INCREMENT)
    assert (response.status_code, response.content_type) == (500, "application/problem+json")
    assert response.get_json()["outcome"] == "unknown"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "a secret" in caplog.text
