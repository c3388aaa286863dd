"""Permissions: every way to set and delete, with and without permission, and the counters afterwards."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.cookies import Morsel, SimpleCookie
from itertools import product
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from counter_server.errors import StartupError
from counter_server.server.web import create_app
from counter_server.server.web.security import SIGNED_IN_SECONDS, is_loopback, may_operate, operators_only, why_not
from counter_server.state import State

COUNTER = "/api/v1/counters/x"
VALUE = 5  # of the counter, before any request
TOKEN = "with=signs,and-16+characters/at~least="
OTHER_TOKEN = "another-token-of-this-server"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}

LOOPBACK = ["127.0.0.1", "127.8.9.10", "::1", "localhost"]
ELSEWHERE = ["0.0.0.0", "::", "192.0.2.1", "127.0.0.1.example.org", "localhost.example.org", "", None]


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {token}"}


def make_app(**config: object) -> Flask:
    """Make the application with the counter x. Names get the prefix COUNTER_SERVER_; no token is set by default."""
    keys = {name if name.isupper() else f"COUNTER_SERVER_{name.upper()}": value for name, value in config.items()}
    app = create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_TOKEN": None, **keys})
    state_of(app).counter("x").set(VALUE)
    return app


def state_of(app: Flask) -> State:
    state = app.extensions["counter_server"]
    assert isinstance(state, State)
    return state


def value_of(app: Flask) -> int | None:
    return dict(state_of(app).counters().counters).get("x")


def send(client: FlaskClient, method: str, headers: dict[str, str] | None = None) -> TestResponse:
    return client.open(COUNTER, method=method, json={"value": 9} if method == "PUT" else None, headers=headers)


def assert_refused(response: TestResponse, status: int) -> str:
    """Check for a problem document of this status that says that nothing was changed; return its detail."""
    assert response.status_code == status, response.text
    assert response.content_type == "application/problem+json"
    body = response.get_json()
    assert (body["status"], body["outcome"]) == (status, "not_applied")
    detail = body["detail"]
    assert isinstance(detail, str)
    assert "\n" not in detail
    assert TOKEN not in response.text
    return detail


# Permission to set and delete

CREDENTIALS: dict[str, dict[str, str]] = {
    "none": {},
    "the token": bearer(TOKEN),
    "the token, scheme in capitals": bearer(TOKEN, "BEARER"),
    "another token": bearer(OTHER_TOKEN),
    "the token's beginning": bearer(TOKEN[:-1]),
    "the token and more": bearer(TOKEN + "="),
    "the token in capitals": bearer(TOKEN.upper()),
    "no token after Bearer": {"Authorization": "Bearer"},
    "not ASCII": bearer("größer als sechzehn"),
    "the token by another scheme": bearer(TOKEN, "Basic"),
    "the token twice": bearer(f"{TOKEN}, Bearer {TOKEN}"),
    "the token in the wrong header": {"X-Token": TOKEN, "Cookie": f"session={TOKEN}"},
}
RIGHT = {"the token", "the token, scheme in capitals"}


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("credentials", CREDENTIALS)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", None])
def test_with_a_token_only_clients_that_send_it_set_and_delete(host: str | None, credentials: str, method: str) -> None:
    app = make_app(host=host, token=TOKEN)
    response = send(app.test_client(), method, CREDENTIALS[credentials])
    if credentials in RIGHT:
        assert response.status_code == {"PUT": 200, "DELETE": 204}[method]
        assert value_of(app) == {"PUT": 9, "DELETE": None}[method]
    else:
        assert_refused(response, 401)
        assert response.headers["WWW-Authenticate"].startswith("Bearer realm=")
        assert value_of(app) == VALUE


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@pytest.mark.parametrize("credentials", ["none", "the token"])
@pytest.mark.parametrize(("host", "proxies"), [*product(LOOPBACK, [0]), *product(ELSEWHERE, [0]), ("127.0.0.1", 1)])
def test_without_a_token_set_and_delete_are_on_if_only_this_machine_can_connect(
    host: str | None, proxies: int, credentials: str, method: str
) -> None:
    app = make_app(host=host, trusted_proxies=proxies)
    here = host in LOOPBACK and not proxies
    assert is_loopback(app) is here
    response = send(app.test_client(), method, CREDENTIALS[credentials])
    if here:
        assert response.status_code == {"PUT": 200, "DELETE": 204}[method]
        assert value_of(app) == {"PUT": 9, "DELETE": None}[method]
    else:
        detail = assert_refused(response, 403)
        assert "set and delete are off" in detail
        assert "COUNTER_SERVER_TOKEN" in detail
        assert "127.0.0.1" in detail
        assert value_of(app) == VALUE


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("host", ["127.0.0.1", None])
def test_everyone_reads_and_counts(host: str | None, token: str | None) -> None:
    client = make_app(host=host, token=token).test_client()
    assert client.get(COUNTER).get_json()["value"] == VALUE
    assert client.post(f"{COUNTER}/increment").get_json()["value"] == VALUE + 1
    assert client.get("/").status_code == 200


def test_the_token_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    app = create_app({"COUNTER_SERVER_STORE": "memory://"})
    assert send(app.test_client(), "PUT").status_code == 401
    assert send(app.test_client(), "PUT", bearer(TOKEN)).status_code == 200


@pytest.mark.parametrize(
    "token", ["", " ", "short", "x" * 15, "with a space in it", f"{TOKEN}\n", "größer" * 3, 10**20]
)
def test_an_unusable_token_is_refused_at_the_start_and_not_repeated(token: object) -> None:
    with pytest.raises(StartupError, match="COUNTER_SERVER_TOKEN") as caught:
        make_app(token=token)
    assert "\n" not in str(caught.value)
    assert not str(token).strip() or str(token) not in str(caught.value)


def test_a_token_of_16_characters_is_long_enough() -> None:
    assert send(make_app(token="x" * 16).test_client(), "PUT", bearer("x" * 16)).status_code == 200


# Signing in


@dataclass
class Setting:
    """An application that has a page for operators: `/form`, which posts to `/set`."""

    app: Flask
    done: int = 0

    def __post_init__(self) -> None:
        @self.app.get("/form")
        @operators_only
        def form() -> str:
            return "the form"

        @self.app.post("/set")
        @operators_only
        def change() -> str:
            self.done += 1
            return "set"

        @self.app.get("/may")
        def may() -> dict[str, object]:
            return {"may": may_operate(), "why": why_not()}


@pytest.fixture
def setting() -> Setting:
    return Setting(make_app(host="127.0.0.1", token=TOKEN))


def sign_in(client: FlaskClient, token: str = TOKEN, **form: str) -> TestResponse:
    return client.post("/sign-in", data={"token": token, **form}, headers=BROWSER)


def cookie_of(response: TestResponse) -> "Morsel[str]":
    for header in response.headers.getlist("Set-Cookie"):
        cookies = SimpleCookie(header)
        if "session" in cookies:
            return cookies["session"]
    raise AssertionError(f"no cookie: {response.headers}")


def with_cookie(value: str) -> dict[str, str]:
    return {"Cookie": f"session={value}"}


def test_after_signing_in_an_operator_may_set_and_delete(setting: Setting) -> None:
    client = setting.app.test_client()
    assert send(client, "PUT").status_code == 401
    response = sign_in(client)
    assert (response.status_code, response.location) == (303, "/")
    assert client.get("/may").get_json() == {"may": True, "why": ""}
    assert client.post("/set").text == "set"
    assert send(client, "PUT").status_code == 200
    assert send(client, "DELETE").status_code == 204
    assert "You are signed in" in client.get("/sign-in").text


def test_after_signing_out_an_operator_may_not_set_and_delete(setting: Setting) -> None:
    client = setting.app.test_client()
    sign_in(client)
    response = client.post("/sign-out", headers=BROWSER)
    assert (response.status_code, response.location) == (303, "/")
    assert cookie_of(response)["max-age"] == "0"
    assert send(client, "PUT").status_code == 401
    assert client.get("/may").get_json()["may"] is False


def test_signing_out_ends_copies_of_the_cookie_and_leaves_other_sign_ins(setting: Setting) -> None:
    client = setting.app.test_client(use_cookies=False)
    mine, other = (with_cookie(cookie_of(sign_in(client)).value) for _ in range(2))
    assert client.post("/sign-out", headers=mine).status_code == 303
    for _ in range(2):
        assert_refused(send(client, "PUT", mine), 401)
        assert client.get("/may", headers=mine).get_json()["may"] is False
        assert send(client, "PUT", other).status_code == 200
        client.post("/sign-out", headers=mine)  # a second time


@pytest.mark.parametrize("token", ["", "short", OTHER_TOKEN, TOKEN + "=", "größer"])
def test_a_wrong_token_does_not_sign_in(setting: Setting, token: str) -> None:
    client = setting.app.test_client()
    response = sign_in(client, token, next="/form")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Bearer ")
    assert "Set-Cookie" not in response.headers
    assert 'role="alert"' in response.text
    assert 'value="/form"' in response.text  # the next attempt still leads there
    assert_refused(client.post("/sign-in", data={"token": token}), 401)
    assert send(client, "PUT").status_code == 401


def test_the_form_shows_no_error_at_first(setting: Setting) -> None:
    response = setting.app.test_client().get("/sign-in", headers=BROWSER)
    assert response.status_code == 200
    assert 'role="alert"' not in response.text
    assert 'type="password"' in response.text


def test_without_a_token_the_form_says_why_it_is_missing() -> None:
    for host, says in (("127.0.0.1", "everyone on this machine"), ("0.0.0.0", "set and delete are off")):
        client = make_app(host=host).test_client()
        page = client.get("/sign-in", headers=BROWSER)
        assert page.status_code == 200
        assert says in page.text
        assert "password" not in page.text
        assert "token" in assert_refused(sign_in(client), 403)


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}])
@pytest.mark.parametrize("path", ["/sign-in", "/sign-out"])
def test_another_site_cannot_sign_a_visitor_in_or_out(setting: Setting, path: str, headers: dict[str, str]) -> None:
    client = setting.app.test_client()
    response = client.post(path, data={"token": TOKEN}, headers=headers)
    assert_refused(response, 403)
    assert "Set-Cookie" not in response.headers


def test_another_site_cannot_use_the_cookie(setting: Setting) -> None:
    client = setting.app.test_client()
    sign_in(client)
    assert_refused(send(client, "PUT", {"Sec-Fetch-Site": "same-site"}), 403)
    assert_refused(send(client, "DELETE", {"Origin": "http://evil.example"}), 403)
    assert_refused(client.post("/set", headers={"Origin": "null"}), 403)
    assert (value_of(setting.app), setting.done) == (VALUE, 0)


def test_a_wrong_token_is_refused_despite_a_good_cookie(setting: Setting) -> None:
    client = setting.app.test_client()
    sign_in(client)
    assert_refused(send(client, "PUT", bearer(OTHER_TOKEN)), 401)
    assert value_of(setting.app) == VALUE


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_cookies_are_out_of_reach_for_scripts_and_other_sites_and_stay_on_https(setting: Setting, scheme: str) -> None:
    client = setting.app.test_client()
    url = f"{scheme}://localhost"
    response = client.post("/sign-in", base_url=url, data={"token": TOKEN})
    for cookie in (cookie_of(response), cookie_of(client.get("/session", base_url=url))):
        assert cookie["httponly"]
        assert cookie["samesite"] == "Lax"
        assert bool(cookie["secure"]) is (scheme == "https")
        assert cookie["path"] == "/"
        assert not cookie["domain"]
    assert cookie_of(response)["expires"], "the window may be closed before the sign-in is over"
    assert bool(cookie_of(client.post("/sign-out", base_url=url))["secure"]) is (scheme == "https")


def damaged(cookie: str) -> Iterator[tuple[str, str]]:
    value, time, signature = cookie.rsplit(".", 2)
    yield "whole", cookie
    yield "nothing", ""
    yield "no signature", f"{value}.{time}"
    yield "empty signature", f"{value}.{time}."
    yield "no time", f"{value}.{signature}"
    yield "another value", f"administrator.{time}.{signature}"
    yield "another time", f"{value}.{time[:-1]}{'B' if time[-1] == 'A' else 'A'}.{signature}"
    yield "another signature", f"{value}.{time}.{signature[::-1]}"
    yield "cut off", cookie[:-1]
    yield "in capitals", cookie.upper()
    yield "not ASCII", "\xff" * 20
    yield "long", "a" * 5000


def test_a_changed_cookie_is_ignored(setting: Setting) -> None:
    client = setting.app.test_client(use_cookies=False)
    cookie = cookie_of(sign_in(client)).value
    for name, value in damaged(cookie):
        assert client.get("/may", headers=with_cookie(value)).get_json()["may"] is (name == "whole"), name
        if name != "whole":
            assert_refused(send(client, "PUT", with_cookie(value)), 401)
    assert value_of(setting.app) == VALUE


@pytest.mark.parametrize(("age", "holds"), [(0, True), (SIGNED_IN_SECONDS - 60, True), (SIGNED_IN_SECONDS + 60, False)])
def test_a_sign_in_expires(setting: Setting, age: int, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    client = setting.app.test_client(use_cookies=False)
    with monkeypatch.context() as then:
        now = time.time()
        then.setattr(time, "time", lambda: now - age)
        cookie = cookie_of(sign_in(client)).value
    assert send(client, "PUT", with_cookie(cookie)).status_code == (200 if holds else 401)


def test_a_new_token_or_a_new_key_signs_everyone_out() -> None:
    def app(token: str, key: str) -> FlaskClient:
        return make_app(host="127.0.0.1", token=token, SECRET_KEY=key).test_client(use_cookies=False)

    cookie = with_cookie(cookie_of(sign_in(app(TOKEN, "a key"))).value)
    assert send(app(TOKEN, "a key"), "PUT", cookie).status_code == 200
    assert_refused(send(app(OTHER_TOKEN, "a key"), "PUT", cookie), 401)
    assert_refused(send(app(TOKEN, "another key"), "PUT", cookie), 401)


def test_a_visitors_session_is_not_a_sign_in(setting: Setting) -> None:
    client = setting.app.test_client(use_cookies=False)
    session = cookie_of(client.get("/session")).value
    assert_refused(send(client, "PUT", with_cookie(session)), 401)


@pytest.mark.parametrize("path", ["/", "/counters", "/counters?after=a%2Fb&q=%F0%9F%90%A6", "/a//b", "/@evil.example"])
def test_signing_in_redirects_to_the_requested_page(setting: Setting, path: str) -> None:
    response = sign_in(setting.app.test_client(), next=path)
    assert (response.status_code, response.location) == (303, path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "counters",
        "//evil.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "\t//evil.example",
        "/\r\nSet-Cookie: x=y",
        "http://evil.example/",
        "https:evil.example",
        "javascript:alert(1)",
        " //evil.example",
        "/é",
    ],
)
@pytest.mark.parametrize("way", ["/sign-in", "/sign-out"])
def test_signing_in_and_out_never_redirect_to_another_site(setting: Setting, way: str, path: str) -> None:
    response = setting.app.test_client().post(way, data={"token": TOKEN, "next": path})
    assert (response.status_code, response.location) == (303, "/")
    page = setting.app.test_client().get("/sign-in", query_string={"next": path})
    assert 'name="next" value="/"' in page.text


# Pages for operators


def test_a_browser_is_redirected_to_sign_in_and_back(setting: Setting) -> None:
    client = setting.app.test_client()
    led = client.get("/form?a=%2F&b=ü", headers=BROWSER)
    assert led.status_code == 303
    assert led.location.startswith("/sign-in?next=")
    form = client.get(led.location, headers=BROWSER)
    assert 'value="/form?a=%2F&amp;b=%C3%BC"' in form.text
    assert sign_in(client, next="/form?a=%2F&b=%C3%BC").location == "/form?a=%2F&b=%C3%BC"
    assert client.get("/form", headers=BROWSER).text == "the form"


@pytest.mark.parametrize(
    ("referrer", "back"),
    [
        ("http://localhost/form?page=2", "/sign-in?next=/form?page%3D2"),
        ("http://evil.example/", "/sign-in"),
        (None, "/sign-in"),
    ],
)
def test_after_a_refused_form_signing_in_redirects_to_its_page(
    setting: Setting, referrer: str | None, back: str
) -> None:
    headers = {**BROWSER, "Origin": "http://localhost", **({"Referer": referrer} if referrer else {})}
    response = setting.app.test_client().post("/set", headers=headers)
    assert (response.status_code, response.location) == (303, back)
    assert setting.done == 0


@pytest.mark.parametrize("accept", [None, "*/*", "application/json"])
def test_a_program_gets_a_problem_document(setting: Setting, accept: str | None) -> None:
    headers = {"Accept": accept} if accept else {}
    detail = assert_refused(setting.app.test_client().post("/set", headers=headers), 401)
    assert "sign in" in detail
    assert setting.done == 0


@pytest.mark.parametrize("headers", [{}, BROWSER])
def test_if_set_and_delete_are_off_a_browser_learns_why(headers: dict[str, str]) -> None:
    off = Setting(make_app(host="0.0.0.0"))
    assert "COUNTER_SERVER_TOKEN" in assert_refused(off.app.test_client().post("/set", headers=headers), 403)
    assert off.done == 0
    assert "set and delete are off" in off.app.test_client().get("/may").get_json()["why"]


# Names: the Host header

OWN_NAMES = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "127.255.0.1", "[::1]", "[::1]:8000"]
OTHER_NAMES = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example@localhost",
    "localhost@evil.example",
    "localhost evil.example",
    "localhost, evil.example",
    "192.0.2.1",
    "0.0.0.0",
    "[::]",
    "[localhost]",
    "2130706433",
    "",
]


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_on_loopback_the_loopback_names_are_accepted(name: str, token: str | None) -> None:
    app = make_app(host="127.0.0.1", token=token)
    response = send(app.test_client(), "PUT", {"Host": name, **bearer(TOKEN)})
    assert response.status_code == 200


@pytest.mark.parametrize("name", OTHER_NAMES)
@pytest.mark.parametrize("allowed", [(), ("counter.example",)])
def test_on_loopback_every_other_name_is_refused(name: str, allowed: tuple[str, ...]) -> None:
    app = make_app(host="127.0.0.1", TRUSTED_HOSTS=allowed)
    client = app.test_client()
    for method, path in (
        ("GET", "/"),
        ("GET", COUNTER),
        ("GET", "/static/style.css"),
        ("GET", "/nowhere"),
        ("POST", "/"),
    ):
        assert "--allow-host" in assert_refused(client.open(path, method=method, headers={"Host": name}), 421)
    # If a site's name points here, the browser takes the site and us for the same origin.
    rebound = {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}
    assert_refused(send(client, "PUT", rebound), 421)
    assert_refused(send(client, "DELETE", rebound), 421)
    assert_refused(client.post(f"{COUNTER}/increment", headers=rebound), 421)
    assert dict(state_of(app).counters().counters) == {"x": VALUE}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", None])
def test_configured_names_are_accepted(host: str | None) -> None:
    names = ["Counter.example", "[2001:db8::1]", "app_1", ".Zone.example"]
    client = make_app(host=host, TRUSTED_HOSTS=names).test_client()
    own = ("counter.example", "COUNTER.example:8000", "[2001:DB8::1]:80", "localhost:1", "127.0.0.1", "a.zone.example")
    for name in own:
        assert client.get(COUNTER, headers={"Host": name}).status_code == 200, name
    for name in ("evil.example", "x.counter.example", "counter.example.evil.example", "[2001:db8::2]", "2001"):
        assert_refused(client.get(COUNTER, headers={"Host": name}), 421)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", None])
def test_bound_elsewhere_a_server_accepts_every_name(host: str | None) -> None:
    client = make_app(host=host).test_client()
    for name in ("evil.example", "counter.example:80", "192.0.2.1"):
        assert client.get(COUNTER, headers={"Host": name}).status_code == 200


@pytest.mark.parametrize(
    "names",
    ["localhost", ["http://counter.example"], ["counter.example:80"], ["a b"], ["a..b"], ["a" * 64], [""], [7], 7],
)
def test_an_invalid_host_name_is_refused_at_the_start(names: object) -> None:
    with pytest.raises(StartupError, match="name"):
        make_app(TRUSTED_HOSTS=names)


# Proxies


def forwarded(**values: str) -> dict[str, str]:
    return {f"X-Forwarded-{name.title()}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("proxies", "headers", "secure"),
    [
        (0, forwarded(proto="https", host="counter.example"), False),
        (1, forwarded(proto="https", host="counter.example"), True),
        (1, forwarded(proto="http", host="counter.example"), False),
        (1, forwarded(proto="https, http", host="counter.example"), False),
        (2, forwarded(proto="https, http", host="counter.example, inner"), True),
        (2, forwarded(proto="https", host="counter.example"), False),
    ],
)
def test_only_headers_of_declared_proxies_are_trusted(
    proxies: int,
    headers: dict[str, str],
    secure: bool,  # noqa: FBT001
) -> None:
    client = make_app(token=TOKEN, trusted_proxies=proxies).test_client()
    cookie = cookie_of(client.post("/sign-in", data={"token": TOKEN}, headers=headers))
    assert bool(cookie["secure"]) is secure
    own = {**headers, "Origin": "https://counter.example"}
    assert client.post(f"{COUNTER}/increment", headers=own).status_code == (200 if secure else 403)


def test_an_undeclared_proxy_cannot_name_the_host() -> None:
    client = make_app(host="127.0.0.1").test_client()
    assert_refused(client.get(COUNTER, headers={"Host": "evil.example", **forwarded(host="localhost")}), 421)


@pytest.mark.parametrize("proxies", [-1, "1", 1.0, True, None])
def test_an_invalid_number_of_proxies_is_refused_at_the_start(proxies: object) -> None:
    with pytest.raises(StartupError, match="TRUSTED_PROXIES"):
        make_app(trusted_proxies=proxies)


# Other sites


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"}, False),
        ({"Sec-Fetch-Site": "of-next-year"}, False),
        ({"Origin": "http://localhost"}, True),
        ({"Origin": "HTTP://LOCALHOST"}, True),
        ({"Origin": "https://localhost"}, False),
        ({"Origin": "http://localhost:8001"}, False),
        ({"Origin": "http://localhost.evil.example"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "localhost"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
    ],
)
def test_requests_from_other_sites_change_nothing(headers: dict[str, str], passes: bool, method: str) -> None:  # noqa: FBT001
    app = make_app(host="127.0.0.1")
    client = app.test_client()
    response = (
        client.post(f"{COUNTER}/increment", headers=headers) if method == "POST" else send(client, method, headers)
    )
    if passes:
        assert response.status_code in (200, 204), response.text
        assert value_of(app) == {"POST": VALUE + 1, "PUT": 9, "DELETE": None}[method]
    else:
        assert "other sites" in assert_refused(response, 403)
        assert value_of(app) == VALUE


# Headers

POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "form-action 'self'",
    "base-uri 'none'",
    "frame-ancestors 'none'",
}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("HEAD", "/", {}, 200),
        ("OPTIONS", "/", {}, 200),
        ("GET", "/session", {}, 200),
        ("GET", "/sign-in", {}, 200),
        ("POST", "/sign-out", {}, 303),
        ("GET", COUNTER, {}, 200),
        ("GET", "/static/style.css", {}, 200),
        ("GET", "/nowhere", {}, 404),
        ("PATCH", COUNTER, {}, 405),
        ("DELETE", COUNTER, {}, 401),
        ("DELETE", COUNTER, {"Origin": "null"}, 403),
        ("GET", "/", {"Host": "evil.example"}, 421),
        ("GET", "/fails", {}, 500),
    ],
)
def test_every_answer_has_the_protective_headers(method: str, path: str, headers: dict[str, str], status: int) -> None:
    app = make_app(host="127.0.0.1", token=TOKEN)
    app.add_url_rule("/fails", view_func=lambda: str(1 // 0))
    response = app.test_client().open(path, method=method, headers=headers)
    assert response.status_code == status
    assert set(response.headers["Content-Security-Policy"].split("; ")) == POLICY
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "X-Powered-By" not in response.headers
    assert "Strict-Transport-Security" not in response.headers
    response.close()


def test_a_view_may_allow_other_sites_to_show_its_answer() -> None:
    app = make_app()
    app.add_url_rule("/badge", view_func=lambda: ("", {"Cross-Origin-Resource-Policy": "cross-origin"}))
    assert app.test_client().get("/badge").headers.getlist("Cross-Origin-Resource-Policy") == ["cross-origin"]


# The key


def test_a_store_in_memory_writes_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(tmp_path / "data"))
    keys = {make_app().secret_key for _ in range(2)}
    assert len(keys) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_configured_key_is_used(tmp_path: Path) -> None:
    app = create_app({"COUNTER_SERVER_STORE": f"manager://{tmp_path}/data", "SECRET_KEY": "of this test"})
    assert app.secret_key == "of this test"
    assert list(tmp_path.iterdir()) == []
