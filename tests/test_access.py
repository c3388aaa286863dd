"""Permissions: every way to set and delete, with and without permission, and the counters afterwards."""

import html
import re
import time
from collections.abc import Iterator
from http.cookies import Morsel, SimpleCookie
from itertools import product

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


def send(client: FlaskClient, method: str, headers: dict[str, str] | None = None, **environ: str) -> TestResponse:
    json = {"value": 9} if method == "PUT" else None
    return client.open(COUNTER, method=method, json=json, headers=headers, environ_overrides=environ)


def assert_refused(response: TestResponse, status: int) -> str:
    """Check for a problem document or page of this status that says that nothing was changed; return its detail."""
    assert response.status_code == status, response.text
    if response.mimetype == "text/html":
        assert "Nothing was counted or changed." in response.text
        assert TOKEN not in response.text
        return html.unescape(response.text.partition('role="alert">')[2].partition("</p>")[0])
    assert response.content_type == "application/problem+json"
    body = response.get_json()
    assert (body["status"], body["outcome"]) == (status, "not_applied")
    detail = body["detail"]
    assert "\n" not in detail
    assert TOKEN not in response.text
    return str(detail)


# Permission to set and delete

GOOD_CREDENTIALS = [bearer(TOKEN), bearer(TOKEN, "BEARER")]
BAD_CREDENTIALS = [
    *(bearer(token) for token in (OTHER_TOKEN, TOKEN[:-1], TOKEN + "=", TOKEN.upper(), "größer als sechzehn")),
    *({}, {"Authorization": "Bearer"}, bearer(TOKEN, "Basic"), bearer(f"{TOKEN}, Bearer {TOKEN}")),
    {"X-Token": TOKEN, "Cookie": f"counter_server_sign_in={TOKEN}"},
]


def assert_done(app: Flask, method: str, headers: dict[str, str]) -> None:
    """Check that a request sets or deletes x, and restore its value."""
    assert send(app.test_client(), method, headers).status_code == {"PUT": 200, "DELETE": 204}[method]
    assert value_of(app) == {"PUT": 9, "DELETE": None}[method]
    state_of(app).counter("x").set(VALUE)


def test_with_a_token_only_clients_that_send_it_set_and_delete() -> None:
    app = make_app(token=TOKEN)
    for host, method in product(["127.0.0.1", "0.0.0.0", None], ["PUT", "DELETE"]):
        app.config["COUNTER_SERVER_HOST"] = host
        for number, headers in enumerate(BAD_CREDENTIALS):
            response = send(app.test_client(), method, headers, REMOTE_ADDR=f"192.0.2.{number}")
            assert_refused(response, 401)
            assert response.headers["WWW-Authenticate"].startswith("Bearer realm=")
            assert value_of(app) == VALUE
        for headers in GOOD_CREDENTIALS:
            assert_done(app, method, headers)
    client = app.test_client()  # anybody reads and counts
    assert client.get(COUNTER).get_json()["value"] == VALUE
    assert client.post(f"{COUNTER}/increment").get_json()["value"] == VALUE + 1


def test_without_a_token_only_a_loopback_address_allows_set_and_delete() -> None:
    app = make_app()
    for host, proxies in [*product([*LOOPBACK, *ELSEWHERE], [0]), ("127.0.0.1", 1)]:
        app.config.update(COUNTER_SERVER_HOST=host, COUNTER_SERVER_TRUSTED_PROXIES=proxies)
        here = host in LOOPBACK and not proxies
        assert is_loopback(app) is here
        for method, headers in product(["PUT", "DELETE"], [{}, bearer(TOKEN)]):
            if here:
                assert_done(app, method, headers)
            else:
                detail = assert_refused(send(app.test_client(), method, headers), 403)
                for words in ("set and delete are off", "COUNTER_SERVER_TOKEN", "127.0.0.1"):
                    assert words in detail
                assert value_of(app) == VALUE
        client = app.test_client()  # accepts every name if it is bound elsewhere
        for name in ("evil.example", "counter.example:80", "192.0.2.1"):
            assert client.get(COUNTER, headers={"Host": name}).status_code == (421 if here else 200)


def test_the_token_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shortest = "x" * 16
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", shortest)
    client = create_app({"COUNTER_SERVER_STORE": "memory://"}).test_client()
    assert (send(client, "PUT").status_code, send(client, "PUT", bearer(shortest)).status_code) == (401, 200)


@pytest.mark.parametrize("token", ["", "x" * 15, "with a space in it", f"{TOKEN}\n", "größer" * 3, 10**20])
def test_an_unusable_token_is_refused_at_the_start_and_not_repeated(token: object) -> None:
    with pytest.raises(StartupError, match="COUNTER_SERVER_TOKEN") as caught:
        make_app(token=token)
    assert "\n" not in str(caught.value)
    assert not str(token).strip() or str(token) not in str(caught.value)


def test_ten_wrong_tokens_a_minute_are_answered() -> None:
    """Real servers count them for all workers: `test_access_of_servers`."""
    client = make_app(token=TOKEN).test_client()
    for number in range(10):
        way = ("PUT", "DELETE", "form")[number % 3]
        response = sign_in(client, OTHER_TOKEN) if way == "form" else send(client, way, bearer(OTHER_TOKEN))
        assert response.status_code == 401
    for response in (sign_in(client), sign_in(client, OTHER_TOKEN), send(client, "PUT", bearer(TOKEN))):
        assert response.status_code == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 60
    assert send(client, "PUT", bearer(TOKEN), REMOTE_ADDR="192.0.2.1").status_code == 200


def test_a_page_tells_no_more_about_a_token_than_the_api() -> None:
    client = make_app(token=TOKEN).test_client()
    answers = [client.get("/sign-in", headers=bearer(OTHER_TOKEN)).status_code for _ in range(20)]
    assert answers == [200] * 10 + [429] * 10
    assert client.get("/sign-in", headers=bearer(TOKEN)).status_code == 429
    assert client.get("/sign-in").status_code == 200


def with_pages(app: Flask) -> Flask:
    """Add a page for operators: `/form`, which posts to `/set`."""
    app.add_url_rule("/form", view_func=operators_only(lambda: "the form"))
    app.add_url_rule("/set", endpoint="set", view_func=operators_only(lambda: "set"), methods=["POST"])
    app.add_url_rule("/may", endpoint="may", view_func=lambda: {"may": may_operate(), "why": why_not()})
    return app


@pytest.fixture
def app() -> Flask:
    return with_pages(make_app(host="127.0.0.1", token=TOKEN))


@pytest.fixture
def bare(app: Flask) -> FlaskClient:
    """Return a client that keeps no cookies."""
    return app.test_client(use_cookies=False)


def sign_in(client: FlaskClient, token: str = TOKEN, **form: str) -> TestResponse:
    return client.post("/sign-in", data={"token": token, **form}, headers=BROWSER)


def cookie_of(response: TestResponse, name: str = "counter_server_sign_in") -> "Morsel[str]":
    for header in response.headers.getlist("Set-Cookie"):
        cookies = SimpleCookie(header)
        if name in cookies:
            return cookies[name]
    raise AssertionError(f"no cookie: {response.headers}")


def with_cookie(value: str) -> dict[str, str]:
    return {"Cookie": f"counter_server_sign_in={value}"}


def test_signing_in_allows_set_and_delete_until_signing_out(client: FlaskClient) -> None:
    form = client.get("/sign-in", headers=BROWSER)
    assert 'role="alert"' not in form.text
    assert 'type="password"' in form.text
    assert send(client, "PUT").status_code == 401
    response = sign_in(client)
    assert (response.status_code, response.location) == (303, "/")
    assert cookie_of(response)["expires"], "the window may be closed before the sign-in is over"
    assert client.get("/may").get_json() == {"may": True, "why": ""}
    assert client.post("/set").text == "set"
    assert [send(client, method).status_code for method in ("PUT", "DELETE")] == [200, 204]
    assert "You are signed in" in client.get("/sign-in").text
    response = client.post("/sign-out", headers=BROWSER)
    assert (response.status_code, response.location) == (303, "/")
    assert cookie_of(response)["max-age"] == "0"
    assert send(client, "PUT").status_code == 401
    assert client.get("/may").get_json()["may"] is False


def test_signing_out_ends_copies_of_the_cookie_and_leaves_other_sign_ins(bare: FlaskClient) -> None:
    mine, other = (with_cookie(cookie_of(sign_in(bare)).value) for _ in range(2))
    for _ in range(2):  # a second time changes nothing
        assert bare.post("/sign-out", headers=mine).status_code == 303
        assert_refused(send(bare, "PUT", mine), 401)
        assert bare.get("/may", headers=mine).get_json()["may"] is False
        assert send(bare, "PUT", other).status_code == 200


def test_a_wrong_token_does_not_sign_in(client: FlaskClient) -> None:
    for token in ("", "short", OTHER_TOKEN, TOKEN + "=", "größer"):
        response = sign_in(client, token, next="/form")
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer ")
        assert "Set-Cookie" not in response.headers
        assert 'role="alert"' in response.text
        assert 'value="/form"' in response.text  # the next attempt still leads there
        assert_refused(client.post("/sign-in", data={"token": token}), 401)
        assert send(client, "PUT").status_code == 401


def test_without_a_token_the_form_says_why_it_is_missing() -> None:
    for host, says in (("127.0.0.1", "everyone on this machine"), ("0.0.0.0", "set and delete are off")):
        client = make_app(host=host).test_client()
        page = client.get("/sign-in", headers=BROWSER)
        assert page.status_code == 200
        assert says in page.text
        assert "password" not in page.text
        assert "token" in assert_refused(sign_in(client), 403)
    off = with_pages(make_app(host="0.0.0.0")).test_client()
    assert "COUNTER_SERVER_TOKEN" in assert_refused(off.post("/set", headers=BROWSER), 403)
    assert "set and delete are off" in off.get("/may").get_json()["why"]


def test_another_site_cannot_sign_in_or_out_or_use_the_cookie(client: FlaskClient) -> None:
    sign_in(client)
    foreign: list[dict[str, str]] = [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}]
    for path, headers in product(["/sign-in", "/sign-out"], foreign):
        response = client.post(path, data={"token": TOKEN}, headers=headers)
        assert_refused(response, 403)
        assert "Set-Cookie" not in response.headers
    assert_refused(send(client, "PUT", {"Sec-Fetch-Site": "same-site"}), 403)
    assert_refused(send(client, "DELETE", {"Origin": "http://evil.example"}), 403)
    assert_refused(client.post("/set", headers={"Origin": "null"}), 403)
    assert_refused(send(client, "PUT", bearer(OTHER_TOKEN)), 401)  # a wrong token, despite a good cookie
    assert value_of(client.application) == VALUE
    assert send(client, "PUT").status_code == 200


def test_cookies_are_out_of_reach_for_scripts_and_other_sites(app: Flask) -> None:
    for url, secure in (("http://localhost", False), ("https://localhost", True)):
        client = app.test_client()
        signed_in = cookie_of(client.post("/sign-in", base_url=url, data={"token": TOKEN}))
        for cookie in (signed_in, cookie_of(client.get("/session", base_url=url), "session")):
            assert cookie["httponly"]
            assert cookie["samesite"] == "Lax"
            assert bool(cookie["secure"]) is secure
            assert cookie["path"] == "/"
            assert not cookie["domain"]
        assert bool(cookie_of(client.post("/sign-out", base_url=url))["secure"]) is secure


def test_a_changed_cookie_is_ignored(app: Flask, bare: FlaskClient) -> None:
    cookie = cookie_of(sign_in(bare)).value
    value, time, signature = cookie.rsplit(".", 2)
    other_time = f"{time[:-1]}{'B' if time[-1] == 'A' else 'A'}"
    for damaged in [
        *("", f"{value}.{time}", f"{value}.{time}.", f"{value}.{signature}", f"administrator.{time}.{signature}"),
        *(f"{value}.{other_time}.{signature}", f"{value}.{time}.{signature[::-1]}", cookie[:-1], cookie.upper()),
        *("\xff" * 20, "a" * 5000, cookie_of(bare.get("/session"), "session").value),  # the last is a visitor's own
    ]:
        assert bare.get("/may", headers=with_cookie(damaged)).get_json()["may"] is False, damaged
        assert_refused(send(bare, "PUT", with_cookie(damaged)), 401)
    assert value_of(app) == VALUE
    assert bare.get("/may", headers=with_cookie(cookie)).get_json()["may"] is True


def test_a_sign_in_expires(bare: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, status in ((0, 200), (SIGNED_IN_SECONDS - 60, 200), (SIGNED_IN_SECONDS + 60, 401)):
        with monkeypatch.context() as then:
            now = time.time()
            then.setattr(time, "time", lambda: now - age)
            cookie = cookie_of(sign_in(bare)).value
        assert send(bare, "PUT", with_cookie(cookie)).status_code == status


def test_a_new_token_or_a_new_key_signs_everyone_out() -> None:
    def app(token: str, key: str) -> FlaskClient:
        return make_app(host="127.0.0.1", token=token, SECRET_KEY=key).test_client(use_cookies=False)

    cookie = with_cookie(cookie_of(sign_in(app(TOKEN, "a key"))).value)
    assert send(app(TOKEN, "a key"), "PUT", cookie).status_code == 200
    assert_refused(send(app(OTHER_TOKEN, "a key"), "PUT", cookie), 401)
    assert_refused(send(app(TOKEN, "another key"), "PUT", cookie), 401)


def test_signing_in_redirects_only_to_pages_of_this_site(client: FlaskClient) -> None:
    for path in ("/", "/counters", "/counters?after=a%2Fb&q=%F0%9F%90%A6", "/a//b", "/@evil.example"):
        response = sign_in(client, next=path)
        assert (response.status_code, response.location) == (303, path)
    for path in [
        *("", "counters", "//evil.example", "///evil.example", "/\\evil.example", "\\\\evil.example", "/é"),
        *("/\t/evil.example", "\t//evil.example", "/\r\nSet-Cookie: x=y", "http://evil.example/", "https:evil.example"),
        *("javascript:alert(1)", " //evil.example"),
    ]:
        for way in ("/sign-in", "/sign-out"):
            response = client.post(way, data={"token": TOKEN, "next": path})
            assert (response.status_code, response.location) == (303, "/"), path
        assert 'name="next" value="/"' in client.get("/sign-in", query_string={"next": path}).text


def test_a_browser_is_redirected_to_sign_in_and_back(client: FlaskClient) -> None:
    led = client.get("/form?a=%2F&b=ü", headers=BROWSER)
    assert led.status_code == 303
    assert led.location.startswith("/sign-in?next=")
    form = client.get(led.location, headers=BROWSER)
    assert 'value="/form?a=%2F&amp;b=%C3%BC"' in form.text
    for referrer, back in [  # after a refused form, to its page
        ("http://localhost/form?page=2", "/sign-in?next=/form?page%3D2"),
        ("http://evil.example/", "/sign-in"),
        (None, "/sign-in"),
    ]:
        headers = {**BROWSER, "Origin": "http://localhost", **({"Referer": referrer} if referrer else {})}
        response = client.post("/set", headers=headers)
        assert (response.status_code, response.location) == (303, back)
    assert "sign in" in assert_refused(client.post("/set", headers={"Accept": "*/*"}), 401)  # a program
    assert sign_in(client, next="/form?a=%2F&b=%C3%BC").location == "/form?a=%2F&b=%C3%BC"
    assert client.get("/form", headers=BROWSER).text == "the form"


# Names: the Host header

OWN_NAMES = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "127.255.0.1", "[::1]", "[::1]:8000"]
OTHER_NAMES = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
    *("evil.example@localhost", "localhost@evil.example", "localhost evil.example", "localhost, evil.example"),
    *("192.0.2.1", "0.0.0.0", "[::]", "[localhost]", "2130706433", ""),
]


@pytest.mark.parametrize(("token", "allowed"), [(None, ()), (TOKEN, ("counter.example",))])
def test_on_loopback_only_loopback_names_are_accepted(token: str | None, allowed: tuple[str, ...]) -> None:
    app = make_app(host="127.0.0.1", token=token, TRUSTED_HOSTS=allowed)
    client = app.test_client()
    reading = [("GET", path) for path in ("/", COUNTER, "/static/style.css", "/nowhere")]
    for name in OTHER_NAMES:
        for method, path in [*reading, ("POST", "/")]:
            response = client.open(path, method=method, headers={"Host": name})
            assert "--allow-host" in assert_refused(response, 421), name
        # If a site's name points here, the browser takes the site and us for the same origin.
        rebound = {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin", **bearer(TOKEN)}
        assert_refused(send(client, "PUT", rebound), 421)
        assert_refused(send(client, "DELETE", rebound), 421)
        assert_refused(client.post(f"{COUNTER}/increment", headers=rebound), 421)
    assert dict(state_of(app).counters().counters) == {"x": VALUE}
    for name in OWN_NAMES:
        assert send(client, "PUT", {"Host": name, **bearer(TOKEN)}).status_code == 200


def test_configured_names_are_accepted() -> None:
    app = make_app(TRUSTED_HOSTS=["Counter.example", "[2001:db8::1]", "app_1", ".Zone.example"])
    own = ("counter.example", "COUNTER.example:8000", "[2001:DB8::1]:80", "localhost:1", "127.0.0.1", "a.zone.example")
    client = app.test_client()
    for host in ("127.0.0.1", "0.0.0.0", None):
        app.config["COUNTER_SERVER_HOST"] = host
        for name in own:
            assert client.get(COUNTER, headers={"Host": name}).status_code == 200, name
        for name in ("evil.example", "x.counter.example", "counter.example.evil.example", "[2001:db8::2]", "2001"):
            assert_refused(client.get(COUNTER, headers={"Host": name}), 421)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        *(("TRUSTED_HOSTS", wrong, "name") for wrong in ("localhost", ["http://x.example"], ["x.example:80"], [""], 7)),
        *(("TRUSTED_HOSTS", [wrong], "name") for wrong in ("a b", "a..b", "a" * 64, 7)),
        *(("trusted_proxies", wrong, "TRUSTED_PROXIES") for wrong in (-1, "1", 1.0, True, None)),
    ],
)
def test_an_invalid_host_name_or_number_of_proxies_is_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(StartupError, match=says):
        make_app(**{key: value})


def forwarded(**values: str) -> dict[str, str]:
    return {f"X-Forwarded-{name.title()}": value for name, value in values.items()}


def test_only_headers_of_declared_proxies_are_trusted() -> None:
    for proxies, proto, host, secure in [
        (0, "https", "counter.example", False),
        (1, "https", "counter.example", True),
        (1, "http", "counter.example", False),
        (1, "https, http", "counter.example", False),
        (2, "https, http", "counter.example, inner", True),
        (2, "https", "counter.example", False),
    ]:
        headers = forwarded(proto=proto, host=host)
        client = make_app(token=TOKEN, trusted_proxies=proxies).test_client()
        cookie = cookie_of(client.post("/sign-in", data={"token": TOKEN}, headers=headers))
        assert bool(cookie["secure"]) is secure
        own = {**headers, "Origin": "https://counter.example"}
        assert client.post(f"{COUNTER}/increment", headers=own).status_code == (200 if secure else 403)
    client = make_app(host="127.0.0.1").test_client()
    assert_refused(client.get(COUNTER, headers={"Host": "evil.example", **forwarded(host="localhost")}), 421)


def test_below_a_url_prefix_every_link_form_and_cookie_begins_with_it() -> None:
    """Links in scripts come from these pages, in `data-` attributes."""
    headers = forwarded(prefix="/counting")
    client = make_app(token=TOKEN, trusted_proxies=1, lab=True).test_client()
    for path in ("/", "/lab", "/counters", "/session", "/docs", "/sign-in"):
        page = client.get(path, headers=headers).text
        links = re.findall(r'(?:href|src|action|data-live|data-runs)="([^"#][^"]*)"', page)
        assert len(links) > 5
        assert [link for link in links if not link.startswith("/counting/")] == []
    (sign_in,) = re.findall(r'href="(/counting/sign-in\?[^"]+)"', client.get("/counters?q=x", headers=headers).text)
    assert "next=/counting/counters?q%3Dx" in sign_in
    done = client.post("/sign-in", data={"token": TOKEN}, headers=headers)
    assert (done.location, cookie_of(done)["path"]) == ("/counting/", "/counting")
    assert client.get("/openapi.json", headers=headers).get_json()["servers"] == [{"url": "/counting"}]
    # Without a declared proxy the header means nothing, and no proxy leads to another site.
    unknown = make_app(host="127.0.0.1").test_client().get("/", headers=headers).text
    assert "/counting" not in unknown
    for prefix in ("//evil.example", "/\\evil.example", "https://evil.example"):
        assert_refused(client.get("/api/v1/counters", headers=forwarded(prefix=prefix)), 400)


def test_requests_from_other_sites_change_nothing() -> None:
    app = make_app(host="127.0.0.1")
    client = app.test_client()

    def requests(headers: dict[str, str]) -> Iterator[tuple[TestResponse, int | None]]:
        """Yield the answer to each method, and the value that the counter would have."""
        yield client.post(f"{COUNTER}/increment", headers=headers), VALUE + 1
        yield send(client, "PUT", headers), 9
        yield send(client, "DELETE", headers), None

    for headers in [
        *({"Sec-Fetch-Site": site} for site in ("same-site", "cross-site", "of-next-year")),
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
        *({"Origin": f"http://{name}"} for name in ("localhost:8001", "localhost.evil.example", "evil.example")),
        *({"Origin": origin} for origin in ("https://localhost", "localhost", "null", "")),
    ]:
        for response, _ in requests(headers):
            assert "other sites" in assert_refused(response, 403)
            assert value_of(app) == VALUE
    own = [{}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]
    for headers in [*own, {"Origin": "http://localhost"}, {"Origin": "HTTP://LOCALHOST"}]:
        for response, changed in requests(headers):
            assert response.status_code in (200, 204), response.text
            assert value_of(app) == changed
            state_of(app).counter("x").set(VALUE)


def test_every_answer_has_the_protective_headers() -> None:
    app = make_app(host="127.0.0.1", token=TOKEN)
    app.add_url_rule("/fails", view_func=lambda: str(1 // 0))
    requests: list[tuple[str, str, dict[str, str], int]] = [
        *((method, "/", {}, 200) for method in ("GET", "HEAD", "OPTIONS")),
        *(("GET", path, {}, 200) for path in ("/session", "/sign-in", COUNTER, "/static/style.css")),
        *(("POST", "/sign-out", {}, 303), ("GET", "/nowhere", {}, 404), ("PATCH", COUNTER, {}, 405)),
        *(("DELETE", COUNTER, {}, 401), ("DELETE", COUNTER, {"Origin": "null"}, 403), ("GET", "/fails", {}, 500)),
        ("GET", "/", {"Host": "evil.example"}, 421),
    ]
    for method, path, headers, status in requests:
        with app.test_client().open(path, method=method, headers=headers) as response:
            assert response.status_code == status
            assert set(response.headers["Content-Security-Policy"].split("; ")) == {
                "default-src 'none'",
                *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
                *("form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"),
            }
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            for name in ("Referrer-Policy", "Cross-Origin-Opener-Policy", "Cross-Origin-Resource-Policy"):
                assert response.headers[name] == "same-origin"
            assert "Strict-Transport-Security" not in response.headers
