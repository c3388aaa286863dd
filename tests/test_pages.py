"""The home page: each visit is counted once, and other requests are not counted."""

import re
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from counter_server import SharedState
from counter_server.server.web import create_app
from counter_server.state import State
from tests.test_dashboard import BROWSER, Page


@pytest.fixture
def app() -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_HOST": "127.0.0.1"})


def number_in(response: TestResponse) -> str:
    assert response.status_code == 200
    number = Page(response.text).texts["number"]
    assert f'data-number="{number}"' in response.text
    return number


def test_each_visit_is_counted_and_shows_its_number(client: FlaskClient, state: State) -> None:
    for number in range(1, 4):
        response = client.get("/")
        assert response.mimetype == "text/html"
        assert number_in(response) == str(number)
        assert response.text.count(f'role="status">You are visitor number {number}.<') == 1
        assert response.text.count('role="status"') == 1
        assert dict(state.counters().counters) == {"visits": number}
    state.counter("visits").set(2**53)
    response = client.get("/", headers={"If-None-Match": "*", "If-Modified-Since": "Fri, 31 Dec 9999 23:59:59 GMT"})
    assert number_in(response) == str(2**53 + 1)
    assert response.headers["Cache-Control"] == "no-store"
    assert not {"ETag", "Last-Modified"} & set(response.headers.keys())


def test_visitors_share_the_count_whatever_their_cookies(app: Flask) -> None:
    cookies = [None, None, "session=eyJ4IjoxfQ.x.y", "session=", "session=\x7f", 'session="']
    for number, cookie in enumerate(cookies, 1):
        client = app.test_client(use_cookies=False)
        assert number_in(client.get("/", headers={"Cookie": cookie} if cookie else {})) == str(number)


def test_a_prefetch_counts_nothing(client: FlaskClient, state: State) -> None:
    client.get("/")
    for name, value in [
        *(("Sec-Purpose", f"prefetch{more}") for more in ("", ";prerender", ";anonymous-client-ip")),
        *(("Purpose", "prefetch"), ("Purpose", "Prefetch"), ("X-Purpose", "preview"), ("X-Moz", "prefetch")),
    ]:
        for method in ("GET", "HEAD"):
            response = client.open("/", method=method, headers={name: value})
            assert response.status_code == 503
            assert response.content_type == "application/problem+json"
            assert "Retry-After" in response.headers
            assert method == "HEAD" or response.get_json()["outcome"] == "not_applied"
    assert dict(state.counters().counters) == {"visits": 1}
    for number, (name, value) in enumerate([("Sec-Purpose", ""), ("Sec-Fetch-Mode", "navigate"), ("Purpose", "visit")]):
        assert number_in(client.get("/", headers={name: value})) == str(number + 2)


def test_other_methods_count_nothing(client: FlaskClient, state: State) -> None:
    content_type = client.get("/").content_type
    for method in ("HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH"):
        response = client.open("/", method=method)
        assert response.status_code == (200 if method in ("HEAD", "OPTIONS") else 405)
        assert method != "HEAD" or (response.content_type, response.get_data()) == (content_type, b"")
        assert dict(state.counters().counters) == {"visits": 1}


def test_the_files_and_links_of_the_page_count_nothing(client: FlaskClient, state: State) -> None:
    page = client.get("/").text
    style = re.search(r'<link rel="stylesheet" href="([^"]+)">', page)
    assert style
    with client.get(style[1]) as served:
        assert (served.status_code, served.mimetype) == (200, "text/css")
        assert b".flash" in served.data
    for path in ("/favicon.ico", "/static/nothing.css", "/static/../pages.py"):
        assert client.get(path).status_code == 404
    assert "/api/v1/counters" in Page(page).links.values()
    assert dict(state.counters().counters) == {"visits": 1}


def test_the_seeds_routes_count_for_one_visitor(client: FlaskClient) -> None:
    steps = ["reset", "inc", "inc", "inc", "dec", "reset", "dec"]
    answers = [client.post(f"/session/{step}").text for step in steps]
    counted = [f"counter is {number}" for number in (1, 2, 3, 2)]
    assert answers == ["counter was reset", *counted, "counter was reset", "counter is -1"]


def test_the_page_has_a_button_for_each_route_and_shows_the_number(client: FlaskClient) -> None:
    page = Page(client.get("/session", headers=BROWSER).text)
    assert page.texts["sentence"] == "counter is 0"
    paths = [f"/session/{step}" for step in ("inc", "dec", "reset")]
    assert sorted((form.method, form.action) for form in page.forms) == sorted(("post", path) for path in paths)
    assert all(form.button for form in page.forms)
    response = client.post("/session/inc", headers=BROWSER)  # shows the page again
    assert response.mimetype == "text/html"
    assert Page(response.text).texts["sentence"] == "counter is 1"
    for path in paths:
        assert client.get(path).status_code == 405
        assert client.post(path, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert Page(client.get("/session").text).texts["sentence"] == "counter is 1"


def test_viewing_the_page_stores_nothing(client: FlaskClient, app: Flask) -> None:
    client.get("/session")
    with app.test_request_context():
        assert SharedState().dict("visitor counter session").keys() == []


@pytest.mark.slow
def test_a_store_without_shared_objects_has_no_visitors_own_counter(tmp_path: Path) -> None:
    client = create_app({"COUNTER_SERVER_STORE": f"sqlite:///{tmp_path}/counters.db"}).test_client()
    assert client.get("/").status_code == 200
    for response in (client.get("/session"), client.post("/session/inc")):
        assert (response.status_code, response.get_json()["title"]) == (501, "Unsupported")


def test_a_store_in_memory_is_alive_ready_and_up(client: FlaskClient, state: State) -> None:
    for _ in range(2):
        for path, text in (("/livez", "alive\n"), ("/readyz", "ready\n")):
            for response, body in ((client.get(path), text), (client.head(path), "")):
                assert (response.status_code, response.text) == (200, body)
                assert response.headers["Cache-Control"] == "no-store"
                assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert client.post(path).status_code == 405
    for accept in ("", "application/openmetrics-text; version=x.y", "text/plain; version=1.0.z", ";,;=", "é"):
        response = client.get("/metrics", headers={"Accept": accept})  # a malformed header is ignored
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "\ncounter_server_up 1.0\n" in response.text
    assert dict(state.counters().counters) == {}
