"""The home page: each visit is counted once, and other requests are not counted."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from flask import Flask, session
from flask.testing import FlaskClient

from counter_server import SharedState
from counter_server.server.web import create_app
from counter_server.state import State

PREFETCHES = [
    ("Sec-Purpose", "prefetch"),
    ("Sec-Purpose", "prefetch;prerender"),
    ("Sec-Purpose", "prefetch;anonymous-client-ip"),
    ("Purpose", "prefetch"),
    ("Purpose", "Prefetch"),
    ("X-Purpose", "preview"),
    ("X-Moz", "prefetch"),
]


class Page(HTMLParser):
    """The elements of a page, each with its attributes and the text that follows its start."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def only(self, attribute: str, value: str) -> tuple[dict[str, str | None], str]:
        """Return the attributes and the text of the only element whose `attribute` is `value`."""
        found = [(found, text) for _, found, text in self.elements if found.get(attribute) == value]
        assert len(found) == 1, f"{len(found)} elements with {attribute}={value}"
        return found[0][0], found[0][1].strip()


@pytest.fixture
def app() -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_HOST": "127.0.0.1"})


def all_counters(state: State) -> dict[str, int]:
    return dict(state.counters(limit=1000).counters)


def test_each_visit_is_counted_and_shows_its_number(client: FlaskClient, state: State) -> None:
    for number in range(1, 4):
        response = client.get("/")
        assert response.status_code == 200
        assert response.mimetype == "text/html"
        attributes, text = Page(response.text).only("id", "number")
        assert attributes["data-number"] == str(number)
        assert text == str(number)
        assert all_counters(state) == {"visits": number}


def test_the_number_is_flashed_once_as_the_status_of_the_page(app: Flask) -> None:
    client = app.test_client()
    for number in (1, 2):
        _, text = Page(client.get("/").text).only("role", "status")
        assert text == f"You are visitor number {number}."


def test_visitors_without_cookies_share_the_count(app: Flask) -> None:
    for number in range(1, 4):
        response = app.test_client(use_cookies=False).get("/")
        assert Page(response.text).only("id", "number")[1] == str(number)


def test_a_visit_continues_from_the_value_that_was_set(client: FlaskClient) -> None:
    assert client.put("/api/v1/counters/visits", json={"value": 2**53}).status_code == 200
    attributes, text = Page(client.get("/").text).only("id", "number")
    assert attributes["data-number"] == text == str(2**53 + 1)


def test_a_changed_session_cookie_starts_a_new_session(app: Flask) -> None:
    client = app.test_client(use_cookies=False)
    for number, cookie in enumerate(["session=eyJ4IjoxfQ.x.y", "session=", "session=\x7f", 'session="'], 1):
        response = client.get("/", headers={"Cookie": cookie})
        assert response.status_code == 200
        assert Page(response.text).only("id", "number")[1] == str(number)


def test_the_page_is_never_cached(client: FlaskClient) -> None:
    for response in (client.get("/"), client.head("/"), client.get("/", headers={"Sec-Purpose": "prefetch"})):
        assert response.headers["Cache-Control"] == "no-store"
        assert "ETag" not in response.headers
        assert "Last-Modified" not in response.headers


def test_a_conditional_request_is_a_visit_like_any_other(client: FlaskClient, state: State) -> None:
    headers = {"If-None-Match": "*", "If-Modified-Since": "Fri, 31 Dec 9999 23:59:59 GMT", "Range": "bytes=0-1"}
    response = client.get("/", headers=headers)
    assert response.status_code == 200
    assert Page(response.text).only("id", "number")[1] == "1"
    assert all_counters(state) == {"visits": 1}


@pytest.mark.parametrize(("name", "value"), PREFETCHES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_prefetch_counts_nothing(client: FlaskClient, state: State, method: str, name: str, value: str) -> None:
    client.get("/")
    response = client.open("/", method=method, headers={name: value})
    assert response.status_code == 503
    assert response.content_type == "application/problem+json"
    assert "Retry-After" in response.headers
    if method == "GET":
        assert response.get_json()["outcome"] == "not_applied"
    assert all_counters(state) == {"visits": 1}
    assert Page(client.get("/").text).only("id", "number")[1] == "2"


@pytest.mark.parametrize(("name", "value"), [("Sec-Purpose", ""), ("Sec-Fetch-Mode", "navigate"), ("Purpose", "visit")])
def test_a_request_with_another_purpose_is_a_visit(client: FlaskClient, state: State, name: str, value: str) -> None:
    assert client.get("/", headers={name: value}).status_code == 200
    assert all_counters(state) == {"visits": 1}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_head_and_options_count_nothing(client: FlaskClient, state: State, method: str) -> None:
    client.get("/")
    response = client.open("/", method=method)
    assert response.status_code == 200
    assert response.get_data() == b""
    assert all_counters(state) == {"visits": 1}


def test_head_has_the_content_type_of_the_page(client: FlaskClient) -> None:
    assert client.head("/").content_type == client.get("/").content_type


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_other_methods_count_nothing(client: FlaskClient, state: State, method: str) -> None:
    assert client.open("/", method=method).status_code == 405
    assert all_counters(state) == {}


def test_the_files_that_a_page_uses_count_nothing(client: FlaskClient, state: State) -> None:
    page = Page(client.get("/").text)
    style, _ = page.only("rel", "stylesheet")
    assert style["href"] is not None
    served = client.get(style["href"])
    assert served.status_code == 200
    assert served.mimetype == "text/css"
    assert ".flash" in served.text
    served.close()
    assert client.get("/favicon.ico").status_code == 404
    assert client.get("/static/nothing.css").status_code == 404
    assert client.get("/static/../pages.py").status_code == 404
    assert all_counters(state) == {"visits": 1}


def test_the_page_links_to_the_counters(client: FlaskClient) -> None:
    links = [attributes["href"] for tag, attributes, _ in Page(client.get("/").text).elements if tag == "a"]
    assert "/api/v1/counters" in links
    response = client.get("/api/v1/counters")
    assert response.get_json() == {"counters": [{"counter": "visits", "value": 1}], "next": None}


def test_the_session_cookie_is_out_of_reach_for_scripts_and_other_sites(app: Flask) -> None:
    @app.get("/remember")
    def remember() -> str:
        session["x"] = 1
        return ""

    cookie = app.test_client().get("/remember").headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie


# The visitor's own counter

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_the_seeds_routes_count_for_one_visitor(client: FlaskClient) -> None:
    steps = ["reset", "inc", "inc", "inc", "dec", "reset", "dec"]
    answers = [client.post(f"/session/{step}").text for step in steps]
    assert answers == [
        "counter was reset",
        *(f"counter is {number}" for number in (1, 2, 3, 2)),
        "counter was reset",
        "counter is -1",
    ]


def test_two_browsers_do_not_share_a_counter(app: Flask) -> None:
    one, other = app.test_client(), app.test_client()
    assert one.post("/session/inc").text == "counter is 1"
    assert one.post("/session/inc").text == "counter is 2"
    assert other.post("/session/inc").text == "counter is 1"
    assert one.post("/session/inc").text == "counter is 3"


def test_the_page_has_a_button_for_each_route_and_shows_the_number(client: FlaskClient) -> None:
    page = Page(client.get("/session").text)
    assert page.only("id", "sentence")[1] == "counter is 0"
    forms = [attributes for tag, attributes, _ in page.elements if tag == "form"]
    assert {(form["method"], form["action"]) for form in forms} == {
        ("post", f"/session/{step}") for step in ("inc", "dec", "reset")
    }
    assert sum(tag == "button" for tag, _, _ in page.elements) == 3


def test_a_browser_sees_the_page_again_after_a_button(client: FlaskClient) -> None:
    client.get("/session", headers=BROWSER)
    response = client.post("/session/inc", headers=BROWSER)
    assert response.mimetype == "text/html"
    assert Page(response.text).only("id", "sentence")[1] == "counter is 1"


@pytest.mark.parametrize("step", ["inc", "dec", "reset"])
def test_a_link_changes_no_visitors_counter(client: FlaskClient, step: str) -> None:
    client.post("/session/inc")
    assert client.get(f"/session/{step}").status_code == 405
    assert client.post(f"/session/{step}", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert Page(client.get("/session").text).only("id", "sentence")[1] == "counter is 1"


def test_viewing_the_page_stores_nothing(client: FlaskClient, app: Flask) -> None:
    client.get("/session")
    with app.test_request_context():
        assert SharedState().dict("visitor counter session").keys() == []


def test_a_store_without_shared_objects_has_no_visitors_own_counter(tmp_path: Path) -> None:
    client = create_app({"COUNTER_SERVER_STORE": f"sqlite:///{tmp_path}/counters.db"}).test_client()
    assert client.get("/").status_code == 200
    for response in (client.get("/session"), client.post("/session/inc")):
        assert (response.status_code, response.get_json()["title"]) == (501, "Unsupported")
