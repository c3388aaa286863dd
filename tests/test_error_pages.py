"""Errors: a page in a browser, a problem document for programs, everywhere and for every status."""

import re
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from counter_server import SharedState
from counter_server.errors import CounterServerError, DeadlineExceeded, KeyReused, LimitReached, Unsupported
from counter_server.server.web import create_app, problems
from counter_server.state import State
from tests.test_access import TOKEN, bearer
from tests.test_dashboard import BROWSER, Page

OTHER_SITE = {"Sec-Fetch-Site": "cross-site"}
SECRET = "/secret/directory"  # only the log may show it


def make_client(**config: Any) -> FlaskClient:
    config = {"STORE": "memory://", "HOST": "127.0.0.1", "TOKEN": TOKEN, **config}
    return create_app({f"COUNTER_SERVER_{name}": value for name, value in config.items()}).test_client()


@pytest.fixture
def app() -> Flask:
    return make_client().application


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(State, "submit", fail)


ERRORS: dict[int, Exception] = {
    409: LimitReached("of this test"),
    422: KeyReused("of this test"),
    500: ZeroDivisionError(SECRET),
    501: Unsupported("of this test"),
    503: CounterServerError(SECRET),
}
REQUESTS: dict[int, tuple[str, str, dict[str, Any]]] = {
    400: ("POST", "/counters/increment", {"data": {"name": ""}}),
    401: ("POST", "/counters/set", {"headers": bearer("not-the-token-of-this-server")}),
    403: ("POST", "/counters/increment", {"headers": OTHER_SITE}),
    404: ("GET", "/no<where", {}),
    405: ("POST", "/docs", {}),
    413: ("POST", "/counters/increment", {"data": {"name": "x" * 20_000}}),
}


@pytest.mark.parametrize("status", [*REQUESTS, *ERRORS])
@pytest.mark.parametrize("prefix", ["", "/below/it"])
def test_a_browser_gets_a_page_and_a_program_a_document(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, status: int, prefix: str
) -> None:
    method, path, options = REQUESTS.get(status, ("POST", "/counters/increment", {"data": {"name": "x"}}))
    if status in ERRORS:
        fail_with(monkeypatch, ERRORS[status])
    given = options.get("headers", {})
    mount = {"SCRIPT_NAME": prefix}
    answers = [
        client.open(path, method=method, environ_overrides=mount, **{**options, "headers": {**given, **more}})
        for more in ({}, BROWSER)
    ]
    document, page = answers
    assert [answer.status_code for answer in answers] == [status, status]
    assert (document.mimetype, page.mimetype) == ("application/problem+json", "text/html")
    found, shown = document.get_json(), Page(page.text)
    assert f"Error {status}" in page.text
    words = found["detail"].rstrip(".")
    assert words[1:].replace("'", "&#39;") in page.text
    assert ("It may have been counted" in page.text) == (found["outcome"] == "unknown")
    assert ("Nothing was counted or changed." in page.text) == (found["outcome"] == "not_applied" and status != 503)
    assert (shown.links["Home"], shown.links["Open the dashboard"]) == (f"{prefix}/", f"{prefix}/counters")
    assert all(link.startswith((f"{prefix}/", "#")) for link in shown.links.values())
    assert SECRET not in page.text + document.text
    assert "<where" not in page.text
    for name in ("Allow", "WWW-Authenticate", "Retry-After", "Content-Security-Policy", "Cache-Control"):
        assert document.headers.get(name) == page.headers.get(name)
    assert "Refresh" not in page.headers, "a form is not sent again by itself"


def test_a_page_that_is_not_available_asks_again_by_itself(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, DeadlineExceeded(SECRET, "unknown"))
    page = client.get("/", headers=BROWSER)
    assert (page.status_code, page.headers["Refresh"], page.headers["Retry-After"]) == (503, "3", "1")
    assert "asks again every 3 seconds" in page.text
    assert "may have been done, once at most" in page.text
    assert Page(page.text).links["Try again"] == ""
    assert "Refresh" not in client.get("/").headers


def test_too_many_wrong_tokens_are_a_page_too(client: FlaskClient) -> None:
    for _ in range(11):
        page = client.get("/counters/delete", headers={**BROWSER, **bearer("not-the-token-of-this-server")})
    assert (page.status_code, page.mimetype) == (429, "text/html")
    assert int(page.headers["Retry-After"]) > 0
    assert "Too many requests" in page.text


@pytest.mark.parametrize(
    "path", ["/api/v1/counters/none", "/api/v1/counters/%00", "/api/v2", "/api", "/api/v1/counters/"]
)
def test_the_api_answers_a_browser_with_a_document(client: FlaskClient, path: str) -> None:
    for headers in ({}, BROWSER):
        response = client.get(path, headers=headers)
        assert response.status_code in (400, 404)
        assert (response.mimetype, response.get_json()["outcome"]) == ("application/problem+json", "not_applied")


@pytest.mark.parametrize(
    ("headers", "mount", "status"),
    [({"Host": "evil.example"}, "", 421), ({}, "//evil.example", 400), ({}, "/\\evil.example", 400)],
)
def test_a_request_for_another_server_gets_a_page_without_links(
    client: FlaskClient, headers: dict[str, str], mount: str, status: int
) -> None:
    for path in ("/", "/nowhere", "/counters"):
        page = client.get(path, headers={**BROWSER, **headers}, environ_overrides={"SCRIPT_NAME": mount})
        assert (page.status_code, page.mimetype) == (status, "text/html")
        assert f"Error {status}" in page.text
        assert not re.search("href|src|evil", page.text)


def test_an_error_in_the_page_of_an_error_is_a_document(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(problems, "render_template", fail)
    response = client.get("/nowhere", headers=BROWSER)
    assert (response.status_code, response.mimetype) == (404, "application/problem+json")
    assert SECRET not in response.text
    assert "the page of an error failed" in caplog.text


def test_another_apps_routes_keep_their_errors() -> None:
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE="memory://", COUNTER_SERVER_TOKEN=TOKEN)
    app.register_blueprint(SharedState(app).blueprint(), url_prefix="/ours")
    client = app.test_client()
    for prefix in ("", "/below"):
        mount = {"SCRIPT_NAME": prefix}
        headers = {**BROWSER, **bearer(TOKEN)}
        page = client.get("/ours/counters?limit=x", headers=headers, environ_overrides=mount)
        assert (page.status_code, page.mimetype) == (400, "text/html")
        assert "Limit must be an integer from 1 to 500." in page.text
        links = Page(page.text).links
        assert (links["Open the dashboard"], "Home" in links) == (f"{prefix}/ours/counters", False)
        document = client.get("/ours/counters/delete?name=none", headers=bearer(TOKEN), environ_overrides=mount)
        assert (document.status_code, document.mimetype) == (404, "application/problem+json")
        api = client.get("/ours/api/v1/counters/none", headers=headers, environ_overrides=mount)
        assert (api.status_code, api.mimetype) == (404, "application/problem+json")
    for path in ("/nowhere", "/ours/nowhere", "/api"):
        page = client.get(path, headers=BROWSER)
        assert page.status_code == 404
        assert "counter_server" not in page.text
