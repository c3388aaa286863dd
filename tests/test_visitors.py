"""A counter for each visitor, under simultaneous tabs, with cookies that nobody made, and in time."""

import base64
import json
import urllib.request
import zlib
from contextlib import ExitStack
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient

from counter_server import SharedState
from counter_server.dicts import BoundedDict
from counter_server.errors import InvalidRequest, LimitReached, StateLost
from counter_server.extension import VisitorCounter
from counter_server.operations import LARGEST, SMALLEST
from tests.launchers import listening_port
from tests.load import at_once
from tests.processes import PATIENCE, ROOT, Program, end_manager, eventually, holder
from tests.test_dicts import Clock

BASKET = "_counter_server_visitor"  # the session's key


def make_app(**config: object) -> tuple[Flask, SharedState]:
    app = Flask(__name__)
    app.config.update(TESTING=True, SECRET_KEY="of this test", COUNTER_SERVER_STORE="memory://")
    app.config.update(config)
    return app, SharedState(app)


def with_routes(app: Flask, basket: VisitorCounter) -> Flask:
    """What can be done with `basket`, each as a page; arguments as JSON."""

    @app.post("/<method>")
    def call(method: str) -> dict[str, int]:
        from flask import request

        return {"value": getattr(basket, method)(**request.get_json(silent=True) or {}) or 0}

    @app.get("/")
    def value() -> dict[str, int]:
        return {"value": basket.value}

    return app


@pytest.fixture
def app() -> Flask:
    app, shared = make_app()
    return with_routes(app, shared.visitor_counter("basket"))


def value(client: FlaskClient) -> Any:
    return client.get("/").get_json()["value"]


def increment(client: FlaskClient, **arguments: Any) -> Any:
    return client.post("/increment", json=arguments).get_json()["value"]


def test_two_browsers_never_share_a_number(app: Flask) -> None:
    one, two = app.test_client(), app.test_client()
    assert [increment(one), increment(one), increment(two), increment(one)] == [1, 2, 1, 3]
    assert (value(one), value(two), value(app.test_client())) == (3, 1, 0)


def test_it_counts_up_and_down_within_bounds_and_begins_again(app: Flask) -> None:
    client = app.test_client()
    assert [increment(client, by=5), increment(client, by=-2), increment(client, by=2, maximum=5)] == [5, 3, 5]
    for method, arguments in (
        ("increment", {"maximum": 5}),
        ("increment", {"by": -1, "minimum": 5}),
        ("decrement", {"minimum": 5}),
        ("decrement", {"by": -1, "maximum": 5}),
    ):
        with pytest.raises(LimitReached, match="'basket' would lie outside the bounds"):
            client.post(f"/{method}", json=arguments)
    assert value(client) == 5
    assert client.post("/decrement", json={"by": 7, "minimum": -2}).get_json() == {"value": -2}
    client.post("/reset")
    assert (value(client), increment(client)) == (0, 1)
    client.post("/reset")
    client.post("/reset")  # of what is not there
    assert value(client) == 0


@pytest.mark.parametrize("method", ["increment", "decrement"])
@pytest.mark.parametrize(
    "by", [0, True, False, 1.5, float("nan"), LARGEST + 1, SMALLEST - 1, "1", b"1", None, [1]], ids=repr
)
def test_a_step_that_cannot_be_is_refused_and_changes_nothing(method: str, by: Any) -> None:
    app, shared = make_app()
    basket = shared.visitor_counter("basket")
    with app.test_request_context():
        assert basket.increment(3) == 3
        with pytest.raises(InvalidRequest, match="by must"):
            getattr(basket, method)(by)
        assert basket.value == 3


@pytest.mark.parametrize("bound", ["1", True, 1.5, LARGEST + 1], ids=repr)
def test_bounds_that_cannot_be_are_refused_and_change_nothing(bound: Any) -> None:
    app, shared = make_app()
    basket = shared.visitor_counter("basket")
    with app.test_request_context():
        for method in (basket.increment, basket.decrement):
            for bounds in ({"minimum": bound}, {"maximum": bound}, {"minimum": 2, "maximum": 1}):
                with pytest.raises(InvalidRequest, match=r"minimum|maximum"):
                    method(**bounds)
        assert basket.value == 0


def test_a_number_may_be_larger_than_64_bits() -> None:
    app, shared = make_app()
    basket = shared.visitor_counter("basket")
    with app.test_request_context():
        assert [basket.increment(LARGEST) for _ in range(3)][-1] == 3 * LARGEST
        assert [basket.increment(SMALLEST), basket.value] == [2 * LARGEST - 1, 2 * LARGEST - 1]


def test_counters_of_different_names_are_different_and_of_one_name_the_same() -> None:
    app, shared = make_app()
    basket, again, wishes = (shared.visitor_counter(name) for name in ("basket", "basket", "wishes, ключ"))
    with app.test_request_context():
        assert [basket.increment(), wishes.increment(), again.increment()] == [1, 1, 2]
        assert shared.counter("basket").value == 0
    with pytest.raises(InvalidRequest, match="already has that name"):
        shared.visitor_counter("basket", max_visitors=7)


@pytest.mark.parametrize(
    "wrong", [{"ttl": 0}, {"ttl": True}, {"ttl": -1.0}, {"max_visitors": 0}, {"max_visitors": True}], ids=str
)
def test_a_counter_that_cannot_be_is_refused_when_it_is_declared(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        SharedState().visitor_counter("basket", **wrong)


# Simultaneous tabs


def test_simultaneous_tabs_of_one_browser_lose_no_update(app: Flask) -> None:
    browser = app.test_client()
    assert increment(browser) == 1
    cookie = browser.get_cookie("session")
    assert cookie is not None

    def tab() -> list[int]:
        client = app.test_client()
        client.set_cookie("session", cookie.value)
        return [increment(client) for _ in range(10)]

    numbers = [number for tens in at_once(8, tab) for number in tens]
    assert sorted(numbers) == list(range(2, 82))
    assert value(browser) == 81


APP = """
from flask import Flask, request
from counter_server import SharedState

app = Flask(__name__)
app.config["SECRET_KEY"] = "of this test"
app.config["COUNTER_SERVER_DEADLINE"] = 30
shared = SharedState(app)
basket = shared.visitor_counter("basket")

@app.post("/")
def add():
    return {"value": basket.increment(int(request.args.get("by", 1)))}

@app.get("/")
def show():
    return {"value": basket.value}
"""


class Browser:
    """A client that keeps cookies; a tab of it has those of the moment it was opened."""

    def __init__(self, url: str, cookies: CookieJar | None = None) -> None:
        self._url = url
        self._cookies = CookieJar()
        for cookie in cookies or ():
            self._cookies.set_cookie(cookie)
        # No proxy: the environment may name one.
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self._cookies)
        self._opener = urllib.request.build_opener(*handlers)

    def tab(self) -> "Browser":
        return Browser(self._url, self._cookies)

    def ask(self, method: str, query: str = "") -> int:
        request = urllib.request.Request(self._url + query, method=method)  # noqa: S310 - http, to ourselves
        with self._opener.open(request, timeout=PATIENCE) as response:
            return int(json.load(response)["value"])


def test_visitors_of_an_app_of_4_workers(on_demand: str, tmp_path: Path, stack: ExitStack) -> None:
    """Each has a number of his own, whichever worker answers, and no tab's click is lost."""
    (tmp_path / "app.py").write_text(APP)
    launcher = ("-m", "gunicorn", "-w", "4", "-b", "127.0.0.1:0", "app:app")
    program = stack.enter_context(Program(*launcher, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}))
    eventually(lambda: listening_port(program.pid), "gunicorn listens")
    url = f"http://127.0.0.1:{listening_port(program.pid)}/"

    one, two = Browser(url), Browser(url)
    assert [one.ask("POST"), two.ask("POST", "?by=100"), one.ask("GET"), two.ask("GET")] == [1, 100, 1, 100]
    tabs = iter([browser.tab() for browser in (one, two) for _ in range(8)])
    mine = at_once(16, lambda: [tab.ask("POST") for tab in [next(tabs)] for _ in range(5)])
    numbers = sorted(number for five in mine for number in five)
    assert numbers == [*range(2, 42), *range(101, 141)], program.errors
    assert [one.ask("GET"), two.ask("GET"), Browser(url).ask("GET")] == [41, 140, 0]
    strangers = at_once(20, lambda: [browser.ask("POST") for browser in [Browser(url)] for _ in range(3)])
    assert strangers == [[1, 2, 3]] * 20, program.errors
    assert holder(tmp_path / "instance" / "counter-server") is not None
    program.stop()


def test_after_a_kill_of_the_manager_visitors_begin_anew_and_one_is_told(on_demand: str, data_dir: Path) -> None:
    app, shared = make_app(COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=PATIENCE)
    with_routes(app, shared.visitor_counter("basket"))
    one, two = app.test_client(), app.test_client()
    assert [increment(one), increment(one), increment(two)] == [1, 2, 1]
    end_manager(data_dir / "manager.lock")
    with pytest.raises(StateLost, match="begins again"):
        increment(one)
    assert [increment(one), increment(two), value(one)] == [1, 1, 1]
    with app.app_context():
        shared.state.close()


# Time, and room


@pytest.fixture
def clock() -> Clock:
    return Clock()


def timed(clock: Clock, *, ttl: float = 10, max_visitors: int = 100) -> tuple[Flask, VisitorCounter, BoundedDict]:
    """An app whose visitors' counter keeps its numbers here, by `clock`."""
    numbers = BoundedDict(max_visitors, clock)
    app, _ = make_app()
    basket = VisitorCounter("basket", numbers, ttl)
    return with_routes(app, basket), basket, numbers


@pytest.mark.parametrize("use", ["increment", "value"])
def test_a_number_is_forgotten_after_a_time_without_use_and_reading_is_use(clock: Clock, use: str) -> None:
    app, _, numbers = timed(clock, ttl=10)
    client = app.test_client()
    expected = increment(client, by=5)
    for _ in range(3):
        clock.now += 9.5
        if use == "value":
            assert value(client) == expected
        else:
            expected += 1
            assert increment(client) == expected
    clock.now += 10
    assert numbers.size() == 0
    assert (value(client), increment(client)) == (0, 1)


def test_to_look_makes_no_number(clock: Clock) -> None:
    app, _, numbers = timed(clock)
    assert [value(app.test_client()) for _ in range(3)] == [0, 0, 0]
    assert numbers.size() == 0


def test_a_refused_step_does_not_make_a_number_live_longer(clock: Clock) -> None:
    app, _, numbers = timed(clock, ttl=10)
    client = app.test_client()
    increment(client)
    clock.now = 9
    with pytest.raises(LimitReached):
        increment(client, maximum=1)
    clock.now = 10
    assert numbers.size() == 0


def test_there_are_as_many_numbers_as_may_be_and_those_used_last(clock: Clock) -> None:
    app, _, numbers = timed(clock, max_visitors=3)
    regular = app.test_client()
    increment(regular, by=7)
    others = [app.test_client() for _ in range(6)]
    for other in others:
        increment(other)
        assert value(regular) == 7
        assert numbers.size() <= 3
    assert [value(other) for other in others] == [0, 0, 0, 0, 1, 1]


# The cookie


def payload_of(cookie: str) -> Any:
    """What Flask's signed session holds, as anybody may read it."""
    compressed, cookie = cookie.startswith("."), cookie.lstrip(".")
    packed = cookie.split(".")[0]
    data = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
    return json.loads(zlib.decompress(data) if compressed else data)


def session_cookie(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def test_the_cookie_holds_an_opaque_id_and_not_the_number(app: Flask) -> None:
    clients = [app.test_client() for _ in range(20)]
    ids = set()
    for client in clients:
        assert increment(client, by=123456789) == 123456789
        before = session_cookie(client)
        assert increment(client) == 123456790
        assert session_cookie(client) == before
        content = payload_of(before)
        assert [*content] == [BASKET]
        assert "1234567" not in content[BASKET]
        assert len(base64.urlsafe_b64decode(content[BASKET] + "==")) == 16  # bytes, of the system's randomness
        ids.add(content[BASKET])
    assert len(ids) == 20


def test_reading_is_enough_to_be_known(app: Flask) -> None:
    client = app.test_client()
    assert value(client) == 0
    cookie = session_cookie(client)
    assert increment(client) == 1
    assert session_cookie(client) == cookie


def test_a_cookie_that_was_tampered_with_is_a_new_visitors(app: Flask) -> None:
    victim = app.test_client()
    increment(victim, by=5)
    genuine = session_cookie(victim)
    packed, time, signature = genuine.split(".")
    forged_content = base64.urlsafe_b64encode(json.dumps({BASKET: "chosen"}).encode()).decode().rstrip("=")
    wrong_signature = ("A" if signature[0] != "A" else "B") + signature[1:]
    for cookie in (
        f"{packed}.{time}.{wrong_signature}",
        f"{forged_content}.{time}.{signature}",
        f"{packed}.{time}",
        packed,
        payload_of(genuine)[BASKET],
        "",
        "é",
    ):
        client = app.test_client()
        client.set_cookie("session", cookie)
        assert (value(client), increment(client)) == (0, 1), cookie
        assert payload_of(session_cookie(client))[BASKET] not in ("chosen", payload_of(genuine)[BASKET])
    assert value(victim) == 5


@pytest.mark.parametrize("entry", [None, 7, True, 1.5, ["x"], {"a": 1}, b"bytes"], ids=repr)
def test_an_entry_of_the_session_that_is_no_text_is_replaced(app: Flask, entry: Any) -> None:
    client = app.test_client()
    with client.session_transaction() as content:
        content[BASKET] = entry
        content["own"] = "kept"
    assert [increment(client), increment(client)] == [1, 2]
    with client.session_transaction() as content:
        assert isinstance(content[BASKET], str)
        assert content["own"] == "kept"


def test_who_clears_the_session_is_a_new_visitor(app: Flask) -> None:
    @app.post("/logout")
    def logout() -> dict[str, int]:
        session.clear()
        return {}

    client = app.test_client()
    assert [increment(client), increment(client)] == [1, 2]
    client.post("/logout")
    assert value(client) == 0


def test_without_a_secret_key_the_error_says_so() -> None:
    app, shared = make_app(SECRET_KEY=None)
    basket = shared.visitor_counter("basket")
    uses: list[Any] = [basket.increment, basket.decrement, basket.reset, lambda: basket.value]
    for use in uses:
        with app.test_request_context(), pytest.raises(RuntimeError, match="secret key"):
            use()


def test_without_a_request_the_error_says_so() -> None:
    app, shared = make_app()
    basket = shared.visitor_counter("basket")
    with app.app_context(), pytest.raises(RuntimeError, match="request context"):
        basket.increment()
