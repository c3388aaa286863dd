"""`shared.blueprint()`: our pages and the API inside another app, which they do not affect otherwise."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from html import unescape
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlencode

import pytest
from flask import Blueprint, Flask, flash, get_flashed_messages, render_template, request
from jinja2 import StrictUndefined

from counter_server import SharedState, open_state
from counter_server.errors import StartupError
from tests.launchers import SYNC, launch
from tests.processes import eventually
from tests.test_access import BROWSER, OTHER_TOKEN, TOKEN, assert_refused, bearer, cookie_of
from tests.test_dashboard import Page, look, press, sentence
from tests.test_documentation import example
from tests.test_server import ask

if TYPE_CHECKING:  # the fast tier does without Playwright
    from tests.browser import Browser

PREFIX = "/-/counters"
OTHER_SITE = {"Sec-Fetch-Site": "cross-site"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COUNTER_SERVER_TOKEN", raising=False)


def bare_app(**config: object) -> Flask:
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE="memory://", **config)
    return app


def make_app(*, allow: Callable[[], bool] | None = None, **config: object) -> Flask:
    """Make an app as a module does, without a secret key."""
    app = bare_app(**config)
    shared = SharedState(app)
    app.register_blueprint(shared.blueprint(allow=allow), url_prefix=PREFIX)
    return app


def create_app(**config: object) -> Flask:
    """Make an app as a factory does, with extensions at the top of a module."""
    app = bare_app(**config)
    app.register_blueprint(SHARED.blueprint())  # before there is any state
    SHARED.init_app(app)
    return app


SHARED = SharedState()
MAKERS: list[Callable[..., Flask]] = [make_app, create_app]


def routes(app: Flask) -> list[tuple[str, str]]:
    """Return every method and path of the blueprint, without its static files."""
    return [
        (method, re.sub(r"<.*?>", "x", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
        if rule.rule.startswith(PREFIX) and not rule.endpoint.endswith(".static")
    ]


@pytest.mark.parametrize("make", MAKERS)
def test_without_a_token_or_a_function_every_route_is_closed(make: Callable[..., Flask]) -> None:
    app = make()
    assert len(routes(app)) > 15
    for (method, path), headers in product(routes(app), ({}, BROWSER, bearer(TOKEN))):
        detail = assert_refused(app.test_client().open(path, method=method, headers=headers), 403)
        assert "COUNTER_SERVER_TOKEN" in detail
        assert "shared.blueprint(allow=…)" in detail
    with app.test_client().get(f"{PREFIX}/static/style.css") as style:
        assert style.status_code == 200
    with app.app_context():
        assert SharedState().counters().counters == []


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("is_in_environment", [False, True])
def test_with_a_token_programs_send_it_and_browsers_sign_in(
    make: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch, *, is_in_environment: bool
) -> None:
    if is_in_environment:
        monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    app = make(**({} if is_in_environment else {"COUNTER_SERVER_TOKEN": TOKEN}))
    client = app.test_client()
    for method, path in routes(app):
        if "/sign-" not in path:
            assert_refused(client.open(path, method=method), 401)
            led = client.open(path, method=method, headers=BROWSER)
            assert (led.status_code, led.location.partition("?")[0]) == (303, f"{PREFIX}/sign-in")
    assert_refused(client.get(f"{PREFIX}/counters", headers=bearer(OTHER_TOKEN)), 401)
    for path in ("/livez", "/readyz", "/metrics", "/openapi.json", "/counters", "/counters.json", "/docs"):
        assert client.get(PREFIX + path, headers=bearer(TOKEN)).status_code == 200, path
    document = client.get(f"{PREFIX}/openapi.json", headers=bearer(TOKEN)).get_json()
    for operation in (operation for item in document["paths"].values() for operation in item.values()):
        assert (operation["security"], "401" in operation["responses"]) == ([{"token": []}], True)
        assert operation["x-codeSamples"][0]["source"].count("Authorization: Bearer $COUNTER_SERVER_TOKEN") == 1
    assert client.get(f"{PREFIX}/docs", headers=bearer(TOKEN)).text.count(" data-operators") == sum(
        len(item) for item in document["paths"].values()
    )
    assert client.put(f"{PREFIX}/api/v1/counters/x", json={"value": 7}, headers=bearer(TOKEN)).status_code == 200

    led = client.get(f"{PREFIX}/", headers=BROWSER)
    form = look(client, led.location).form(f"{PREFIX}/sign-in")
    signed_in = client.post(form.action, data={**form.fields, "token": TOKEN}, headers=BROWSER)
    cookie = cookie_of(signed_in)
    assert (signed_in.location, cookie["path"], bool(cookie["httponly"])) == (f"{PREFIX}/", PREFIX, True)
    assert client.get(signed_in.location).location == "counters"
    page = press(client, look(client, f"{PREFIX}/counters").form(f"{PREFIX}/counters/increment", "x"))
    assert (sentence(page), page.counters) == ("x is now 8.", {"x": "8"})
    assert sentence(look(client, f"{PREFIX}/counters")) == "", "it was said once"
    copied = {"Cookie": f"counter_server_sign_in={cookie.value}"}
    bare = app.test_client(use_cookies=False)
    assert bare.get(f"{PREFIX}/counters", headers=copied).status_code == 200
    assert client.post(f"{PREFIX}/sign-out", headers=BROWSER).status_code == 303
    assert_refused(client.get(f"{PREFIX}/counters"), 401)
    assert_refused(bare.get(f"{PREFIX}/counters", headers=copied), 401)


def test_a_function_of_the_app_lets_in_with_and_without_a_token() -> None:
    def allow() -> bool:
        return request.headers.get("X-User") == "anna"

    anna = {"X-User": "anna"}
    for config, status in (({}, 403), ({"COUNTER_SERVER_TOKEN": TOKEN}, 401)):
        client = make_app(allow=allow, **config).test_client()
        for path in ("/livez", "/metrics", "/counters", "/api/v1/counters"):
            assert client.get(PREFIX + path, headers=anna).status_code == 200
            assert_refused(client.get(PREFIX + path), status)
        assert client.put(f"{PREFIX}/api/v1/counters/x", json={"value": 7}, headers=anna).status_code == 200
        assert_refused(client.delete(f"{PREFIX}/api/v1/counters/x"), status)
        assert_refused(client.post(f"{PREFIX}/api/v1/counters/x/increment", headers={**anna, **OTHER_SITE}), 403)
        origin = {**anna, "Origin": "http://evil.example"}
        assert_refused(client.post(f"{PREFIX}/counters/increment", data={"name": "x"}, headers=origin), 403)
        page = Page(client.get(f"{PREFIX}/counters", headers=anna).text)
        assert page.counters == {"x": "7"}
        detail = Page(client.get(page.links["x"], headers=anna).text)
        assert detail.form(f"{PREFIX}/counters/set", "x")
        assert "Sign out" not in page.links
    assert "there is no token" in assert_refused(make_app(allow=allow).test_client().get(f"{PREFIX}/counters"), 403)


def test_a_function_that_fails_or_gives_no_bool_lets_nobody_in() -> None:
    def fails() -> bool:
        raise ZeroDivisionError

    async def is_admin() -> bool:
        return False

    for allow in (fails, lambda: object(), lambda: 1, lambda: None, is_admin):
        app = make_app(allow=cast(Any, allow))
        for path in ("/counters", "/livez", "/api/v1/counters"):
            assert app.test_client().get(PREFIX + path).status_code in (403, 500)


def test_the_function_is_asked_once_for_a_request() -> None:
    asked: list[str] = []

    def allow() -> bool:
        asked.append(request.path)
        return True

    client = make_app(allow=allow).test_client()
    assert client.get(f"{PREFIX}/counters").status_code == 200
    assert asked == [f"{PREFIX}/counters"]


@pytest.mark.parametrize("token", ["", "short", "with a space in it"])
def test_an_unusable_token_is_refused_when_the_app_is_made(token: str) -> None:
    with pytest.raises(StartupError, match="COUNTER_SERVER_TOKEN"):
        make_app(COUNTER_SERVER_TOKEN=token)


def test_ten_wrong_tokens_a_minute_are_answered() -> None:
    client = make_app(COUNTER_SERVER_TOKEN=TOKEN).test_client()
    answers = [client.get(f"{PREFIX}/livez", headers=bearer(OTHER_TOKEN)).status_code for _ in range(12)]
    assert answers == [401] * 10 + [429] * 2
    assert client.post(f"{PREFIX}/sign-in", data={"token": TOKEN}).status_code == 429
    with client.application.app_context():
        assert not SharedState().state.declarations, "the manager need not host anything for it"


def someones_app(directory: Path) -> Flask:
    """Make an app with everything that ours could get in the way of."""
    for name in ("base.html", "dashboard.html", "sign_in.html"):
        (directory / "templates").mkdir(exist_ok=True)
        (directory / "templates" / name).write_text(f"their {name}, {{{{ may_operate }}}}, {{{{ link }}}}")
    (directory / "static").mkdir()
    (directory / "static" / "style.css").write_text("their style")
    app = Flask("theirs", root_path=str(directory))
    app.config.update(COUNTER_SERVER_STORE="memory://", SECRET_KEY="k", COUNTER_SERVER_TOKEN=TOKEN)
    app.jinja_env.undefined = StrictUndefined
    app.context_processor(lambda: {"may_operate": "their variable", "link": "another"})
    for kind in (404, 405, Exception):
        app.register_error_handler(kind, lambda error: (f"their page for {type(error).__name__}", 418))
    app.before_request(lambda: flash("their message"))
    app.url_map.strict_slashes = False
    for name in ("api", "dashboard", "health"):
        theirs = Blueprint(name, name, url_prefix=f"/{name}")
        theirs.add_url_rule("/", "page", lambda: " ".join(map(str, get_flashed_messages())))
        app.register_blueprint(theirs)
    app.add_url_rule("/fails", "fails", lambda: str(1 // 0))
    app.add_url_rule("/a/b", "a", lambda: "their a/b")
    app.add_url_rule("/<name>.html", "template", lambda name: render_template(f"{name}.html"))
    return app


def test_the_rest_of_the_app_is_as_before(tmp_path: Path) -> None:
    answers: list[list[Any]] = []
    for number, with_ours in enumerate((False, True)):
        (tmp_path / str(number)).mkdir()
        app = someones_app(tmp_path / str(number))
        shared = SharedState(app)
        registries = app.before_request_funcs, app.after_request_funcs, app.template_context_processors
        before = [list(registry.get(None, ())) for registry in registries]
        config, converters = dict(app.config), dict(app.url_map.converters)
        handlers = {code: dict(found) for code, found in app.error_handler_spec[None].items()}
        if with_ours:
            app.register_blueprint(shared.blueprint(), url_prefix=PREFIX)
        assert [list(registry.get(None, ())) for registry in registries] == before
        assert {code: dict(found) for code, found in app.error_handler_spec[None].items() if found} == {
            code: found for code, found in handlers.items() if found
        }
        assert (dict(app.config), type(app.session_interface).__module__) == (config, "flask.sessions")
        assert set(app.url_map.converters) - set(converters) == ({"counter_server_name"} if with_ours else set())
        client = app.test_client()
        paths = ["/static/style.css", "/base.html", "/dashboard.html", "/sign_in.html", "/nowhere", "/fails", "/api"]
        paths += ["/dashboard/", "/health/", "/a//b", "/api//v1", f"{PREFIX}/nowhere", "/static/favicon.svg"]
        answers.append([])
        for path in paths:
            with client.get(path) as response:
                headers = {
                    name: text for name, text in response.headers if name not in ("Date", "Last-Modified", "ETag")
                }
                headers.pop("Set-Cookie", None)
                answers[-1].append((path, response.status_code, headers, response.get_data()))
    assert answers[0] == answers[1]
    client = app.test_client()
    missing = client.get(f"{PREFIX}/api/v1/counters/none", headers=bearer(TOKEN))
    assert (missing.status_code, missing.content_type) == (404, "application/problem+json")
    for path in ("/counters", "/docs", "/sign-in"):
        page = client.get(PREFIX + path, headers=bearer(TOKEN))
        assert page.status_code == 200
        assert not re.search("their (message|variable|page)|their [a-z_]+\\.html", page.text)
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert page.headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in page.headers or "counter_server" not in page.headers["Set-Cookie"]
    messages = client.get("/api/").text
    assert messages.count("their message") == 5, "no page of ours has shown one of the app's messages"


NAMES = ("a", "a/b", "a//b", "/a", "a/", "%25", "ü", "a b", "x/increment")


def test_names_are_those_of_the_api_everywhere() -> None:
    app = make_app(COUNTER_SERVER_TOKEN=TOKEN)
    client = app.test_client()
    for name in NAMES:
        path = f"{PREFIX}/api/v1/counters/{name}"
        assert client.post(f"{path}/increment", headers=bearer(TOKEN)).status_code == 200, name
        assert client.get(path, headers=bearer(TOKEN)).get_json()["value"] == 1
    with app.app_context():
        assert {name for name, _ in SharedState().counters().counters} == {*NAMES} - {"%25"} | {"%"}


def under_a_prefix(app: Flask, shared: SharedState) -> str:
    app.register_blueprint(shared.blueprint(), url_prefix="/deep/down")
    return "/deep/down"


def under_another_name(app: Flask, shared: SharedState) -> str:
    app.register_blueprint(shared.blueprint(), name="stats")
    return PREFIX


def within_another_blueprint(app: Flask, shared: SharedState) -> str:
    admin = Blueprint("admin", "admin", url_prefix="/admin")
    admin.register_blueprint(shared.blueprint(), url_prefix="/counters")
    app.register_blueprint(admin)
    return "/admin/counters"


def twice(app: Flask, shared: SharedState) -> str:
    app.register_blueprint(shared.blueprint(allow=lambda: True), url_prefix="/first", name="first")
    app.register_blueprint(shared.blueprint(), url_prefix="/second", name="second")
    return "/second"


@pytest.mark.parametrize("register", [under_a_prefix, under_another_name, within_another_blueprint, twice])
def test_every_link_leads_to_the_place_where_it_is_registered(register: Callable[[Flask, SharedState], str]) -> None:
    app = bare_app(COUNTER_SERVER_TOKEN=TOKEN)
    prefix = register(app, SharedState(app))
    for below in ("", "/mounted"):
        client = app.test_client()
        mount = {"SCRIPT_NAME": below} if below else {}
        led = client.get(f"{prefix}/counters", headers=BROWSER, environ_overrides=mount)
        assert led.location.startswith(f"{below}{prefix}/sign-in?next=")
        form = {"token": TOKEN, "next": f"{below}{prefix}/counters"}
        done = client.post(f"{prefix}/sign-in", data=form, headers=BROWSER, environ_overrides=mount)
        assert (done.location, cookie_of(done)["path"]) == (f"{below}{prefix}/counters", f"{below}{prefix}")
        links = set()
        for path in ("/counters", "/docs", "/sign-in"):
            page = client.get(prefix + path, headers=bearer(TOKEN), environ_overrides=mount)
            assert page.status_code == 200
            assert ('aria-current="page"' in page.text) is (path != "/sign-in")
            links |= {unescape(link) for link in re.findall(r'(?:href|src|action|data-live)="([^"#][^"]*)"', page.text)}
        assert len(links) > 8
        for link in links:
            assert link.startswith(f"{below}{prefix}/")
            with client.get(link.removeprefix(below), headers=bearer(TOKEN), environ_overrides=mount) as followed:
                asks_for_a_name = link.endswith(("/counters/delete", "/counters/detail", "/counters/detail.json"))
                assert followed.status_code in ({400} if asks_for_a_name else {200, 302, 405}), link  # forms send POST
        served = client.get(f"{prefix}/openapi.json", headers=bearer(TOKEN), environ_overrides=mount).get_json()
        assert served["servers"] == [{"url": f"{below}{prefix}"}]
        assert "/badge/{name}.svg" not in served["paths"]


def test_the_examples_of_the_page_are_closed_to_all_but_the_admin() -> None:
    for start, headers in (("app.register_blueprint", bearer(TOKEN)), ("def is_admin", {"X-User": "anna"})):
        app = bare_app(COUNTER_SERVER_TOKEN=TOKEN)
        names = {"app": app, "shared": SharedState(app), "request": request}
        exec(example("docs/any-app.md", start), names)  # noqa: S102 - the example of our own document
        client = app.test_client()
        assert_refused(client.get("/-/counters/counters"), 401)
        assert client.get("/-/counters/counters", headers=headers).status_code == 200


@pytest.mark.slow
def test_an_extension_that_protects_every_form_of_the_app_leaves_ours_out() -> None:
    from flask_wtf import CSRFProtect

    app = bare_app(SECRET_KEY=TOKEN)
    csrf = CSRFProtect(app)
    app.add_url_rule("/own", view_func=lambda: "done", methods=["POST"])
    app.register_blueprint(SharedState(app).blueprint(allow=lambda: True), url_prefix=PREFIX)
    client = app.test_client()

    def statuses() -> list[int]:
        form = client.post(f"{PREFIX}/counters/increment", data={"name": "a"})
        return [form.status_code, client.put(f"{PREFIX}/api/v1/counters/a", json={"value": 7}).status_code]

    assert statuses() == [400, 400]
    exec(example("docs/any-app.md", "for name, part"), {"app": app, "csrf": csrf})  # noqa: S102 - our own document
    assert statuses() == [303, 200]
    assert client.post("/own").status_code == 400


def test_one_blueprint_serves_two_apps_each_with_its_own_state() -> None:
    shared = SharedState()
    blueprint = shared.blueprint(allow=lambda: True)
    for number in (3, 4):
        app = bare_app()
        shared.init_app(app)
        app.register_blueprint(blueprint)
        client = app.test_client()
        assert client.put(f"{PREFIX}/api/v1/counters/x", json={"value": number}).status_code == 200
        assert client.get(f"{PREFIX}/counters.json").get_json()["counters"] == [{"name": "x", "value": str(number)}]
        assert client.get(f"{PREFIX}/readyz").status_code == 200


APP = """
import os
from flask import Flask
from counter_server import SharedState

app = Flask(__name__)
app.config.update(COUNTER_SERVER_STORE={url!r}, COUNTER_SERVER_TOKEN={token!r})
shared = SharedState(app)
app.register_blueprint(shared.blueprint(), url_prefix="/-/counters")

@app.after_request
def name_worker(response):
    response.headers["X-Worker"] = os.getpid()
    return response
"""


@pytest.mark.slow
def test_a_sign_in_and_its_end_hold_at_every_worker_without_a_secret_key(
    stack: ExitStack, on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP.format(url=on_demand, token=TOKEN))
    _, url = launch(stack, SYNC, tmp_path)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    body = urlencode({"token": TOKEN}).encode()
    status, headers, _ = ask(url, "POST", f"{PREFIX}/sign-in", body, form)
    assert status == 303
    cookie = {"Cookie": headers["Set-Cookie"].partition(";")[0]}

    def answers_of_all_workers() -> set[int]:
        workers, statuses = set(), set()

        def seen_all() -> bool:
            status, headers, _ = ask(url, "GET", f"{PREFIX}/counters", headers=cookie)
            workers.add(headers["X-Worker"])
            statuses.add(status)
            return len(workers) == 4

        eventually(seen_all, "an answer of each worker")
        return statuses

    assert answers_of_all_workers() == {200}
    assert ask(url, "POST", f"{PREFIX}/sign-out", b"", {**form, **cookie})[0] == 303
    assert answers_of_all_workers() == {401}
    assert (data_dir / "session.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_person_signs_in_and_sees_the_numbers_change(
    browser: "Browser", stack: ExitStack, on_demand: str, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    from tests.browser import assert_looks

    (tmp_path / "app.py").write_text(APP.format(url=on_demand, token=TOKEN))
    _, url = launch(stack, SYNC, tmp_path)
    with open_state(on_demand) as state:
        state.counter("tickets").set(41)
        page = browser.open(f"{url}{PREFIX}/")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
        expect(page).to_have_url(f"{url}{PREFIX}/counters")
        expect(page.locator("#updates")).to_have_text("Up to date.")
        expect(page.locator("[data-value]")).to_have_text("41")
        assert state.counter("tickets").increment() == 42
        expect(page.locator("[data-value]")).to_have_text("42")
        page.get_by_role("button", name="Add one to tickets").click()
        expect(page.locator("#said")).to_have_text(re.compile("is now 43"))
        assert_looks(page, "blueprint")
        page.get_by_role("link", name="Sign out").click()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()


def test_a_large_body_is_refused_whatever_the_app_accepts() -> None:
    client = make_app(allow=lambda: True).test_client()
    body = b" " * 20_000
    response = client.put(f"{PREFIX}/api/v1/counters/x", data=body, content_type="application/json")
    assert_refused(response, 413)
