"""A counter for each visitor, under simultaneous tabs, with cookies that nobody made, and in time."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, request
from flask.testing import FlaskClient

from counter_server import SharedState
from counter_server.dicts import BoundedDict
from counter_server.errors import InvalidRequest, LimitReached
from counter_server.extension import VisitorCounter
from counter_server.operations import LARGEST, SMALLEST
from tests.load import at_once
from tests.test_dicts import Clock

BASKET = "_counter_server_visitor"  # the session's key


def make_app(**config: object) -> tuple[Flask, SharedState]:
    app = Flask(__name__)
    app.config.update({"TESTING": True, "SECRET_KEY": "of this test", "COUNTER_SERVER_STORE": "memory://", **config})
    app.config["COUNTER_SERVER_ERROR_HANDLER"] = False  # errors reach the test
    return app, SharedState(app)


def with_routes(app: Flask, basket: VisitorCounter) -> Flask:
    """Make `value` and `increment` of `basket` pages; arguments are JSON."""
    app.add_url_rule("/", "value", lambda: {"value": basket.value})
    app.add_url_rule("/", "more", lambda: {"value": basket.increment(**request.get_json())}, methods=["POST"])
    return app


@pytest.fixture
def app() -> Flask:
    app, shared = make_app()
    return with_routes(app, shared.visitor_counter("basket"))


def value(client: FlaskClient) -> Any:
    return client.get("/").get_json()["value"]


def increment(client: FlaskClient, **arguments: Any) -> Any:
    return client.post("/", json=arguments).get_json()["value"]


def test_it_counts_up_and_down_within_bounds_and_begins_again() -> None:
    app, shared = make_app()
    basket, again, wishes = (shared.visitor_counter(name) for name in ("basket", "basket", "wishes, ключ"))
    with app.test_request_context():
        assert [basket.increment(5), basket.increment(-2), again.increment(2, maximum=5)] == [5, 3, 5]
        refused: list[Callable[[], object]] = [
            *(lambda: basket.increment(maximum=5), lambda: basket.increment(-1, minimum=5)),
            *(lambda: basket.decrement(minimum=5), lambda: basket.decrement(-1, maximum=5)),
        ]
        for call in refused:
            with pytest.raises(LimitReached, match="'basket' would lie outside the bounds"):
                call()
        steps: list[Any] = [0, True, 1.5, float("nan"), LARGEST + 1, SMALLEST - 1, "1", None, [1]]
        wrong: list[dict[str, Any]] = [{"by": step} for step in steps]
        wrong += [{bound: number} for bound in ("minimum", "maximum") for number in ("1", True, 1.5, LARGEST + 1)]
        for arguments in [*wrong, {"minimum": 2, "maximum": 1}]:
            for method in (basket.increment, basket.decrement):
                with pytest.raises(InvalidRequest, match="by must" if "by" in arguments else r"minimum|maximum"):
                    method(**arguments)
        assert basket.value == 5
        assert basket.decrement(7, minimum=-2) == -2
        for _ in range(2):
            basket.reset()
            assert basket.value == 0
        assert [basket.increment(LARGEST) for _ in range(3)][-1] == 3 * LARGEST  # more than 64 bits
        assert (wishes.increment(), shared.counter("basket").value) == (1, 0)
    with pytest.raises(InvalidRequest, match="already has that name"):
        shared.visitor_counter("basket", max_visitors=7)
    options: list[dict[str, Any]] = [{"ttl": 0}, {"ttl": True}, {"ttl": -1.0}, {"max_visitors": 0}]
    for option in options:
        with pytest.raises(InvalidRequest):
            SharedState().visitor_counter("other", **option)


def test_simultaneous_tabs_of_one_browser_lose_no_update(app: Flask) -> None:
    browser, other = app.test_client(), app.test_client()
    assert [increment(browser), increment(other)] == [1, 1]

    def tab() -> list[int]:
        client = app.test_client()
        client.set_cookie("session", session_cookie(browser))
        return [increment(client) for _ in range(10)]

    numbers = [number for tens in at_once(8, tab) for number in tens]
    assert sorted(numbers) == list(range(2, 82))
    assert (value(browser), value(other), value(app.test_client())) == (81, 1, 0)


def test_a_number_expires_after_a_time_without_use_and_reading_is_use() -> None:
    for reading in (True, False):
        clock = Clock()
        numbers = BoundedDict(3, clock)
        client = with_routes(make_app()[0], VisitorCounter("basket", numbers, ttl=10)).test_client()
        assert increment(client, by=5) == 5
        for number in (6, 7, 8):
            clock.now += 9.5
            assert (value(client) == 5) if reading else (increment(client) == number)
        clock.now += 9
        with pytest.raises(LimitReached):
            increment(client, maximum=1)  # which is no use
        clock.now += 1
        assert (value(client), numbers.size()) == (0, 0)  # reading makes no number
        assert increment(client) == 1


def session_cookie(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def visitor_of(client: FlaskClient) -> str:
    """Return the id in Flask's signed session, as anybody may read it; check that nothing else is there."""
    packed = session_cookie(client).split(".")[0]
    content = json.loads(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
    assert [*content] == [BASKET]
    return str(content[BASKET])


def test_the_cookie_holds_an_opaque_id_and_a_forged_one_is_a_new_visitors(app: Flask) -> None:
    victim = app.test_client()
    assert value(victim) == 0  # reading is enough to be known
    cookie, own = session_cookie(victim), visitor_of(victim)
    assert increment(victim, by=123456789) == 123456789
    assert session_cookie(victim) == cookie
    assert len(base64.urlsafe_b64decode(own + "==")) == 16  # bytes, of the system's randomness
    packed, time, signature = cookie.split(".")
    forged = base64.urlsafe_b64encode(json.dumps({BASKET: "chosen"}).encode()).decode().rstrip("=")
    wrong = ("A" if signature[0] != "A" else "B") + signature[1:]
    ids = {own, "chosen"}
    for cookie in (
        f"{packed}.{time}.{wrong}",
        f"{forged}.{time}.{signature}",
        f"{packed}.{time}",
        packed,
        own,
        "",
        "é",
    ):
        client = app.test_client()
        client.set_cookie("session", cookie)
        assert (value(client), increment(client)) == (0, 1), cookie
        ids.add(visitor_of(client))
    assert len(ids) == 9
    assert value(victim) == 123456789


def test_an_invalid_entry_of_the_session_is_replaced_and_a_cleared_one_is_new(app: Flask) -> None:
    client = app.test_client()
    for entry in (None, 7, True, ["x"], {"a": 1}, b"bytes"):
        with client.session_transaction() as content:
            content.update({BASKET: entry, "own": "kept"})
        assert [increment(client), increment(client)] == [1, 2]
        with client.session_transaction() as content:
            assert (type(content[BASKET]), content["own"]) == (str, "kept")
    with client.session_transaction() as content:
        content.clear()
    assert value(client) == 0


def test_without_a_secret_key_or_a_request_the_error_says_so() -> None:
    app, shared = make_app(SECRET_KEY=None)
    basket = shared.visitor_counter("basket")
    uses: list[Any] = [basket.increment, basket.decrement, basket.reset, lambda: basket.value]
    for use in uses:
        with app.test_request_context(), pytest.raises(RuntimeError, match="secret key"):
            use()
        with app.app_context(), pytest.raises(RuntimeError, match="request context"):
            use()
