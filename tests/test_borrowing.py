"""What a request has of the app's state: it is borrowed at its first use, and ends with the request."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from flask import Flask, Response, appcontext_tearing_down, current_app, g, stream_with_context

from counter_server import SharedState, State
from counter_server.errors import DeadlineExceeded, InvalidRequest, LimitReached
from counter_server.operations import Invoke, Operation, Result
from counter_server.stores.memory import MemoryStore
from tests.hosted_classes import SomeObj
from tests.processes import PATIENCE, frozen, holder

LEASE = "_counter_server"  # in `g`
SETTING = "COUNTER_SERVER_REQUEST_DEADLINE"
TIMING = re.compile(r'counter-server;dur=(\d+\.\d+);desc="(\d+) calls"')
REFUSED = "refused, not_applied"


def make_app(shared: SharedState, **config: object) -> Flask:
    app = Flask(__name__)
    app.config.update({"TESTING": True, "COUNTER_SERVER_STORE": "memory://", **config})
    shared.init_app(app)
    return app


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """The number of calls of each lease whose context has ended, in order."""

    def note(sender: Flask, **_: object) -> None:
        if LEASE in g:
            calls.append(g.get(LEASE).calls)

    calls: list[int] = []
    with appcontext_tearing_down.connected_to(note):
        yield calls


def test_a_request_borrows_once_at_its_first_use(ended: list[int]) -> None:
    shared = SharedState()
    app = make_app(shared)
    obj = shared.object("obj", SomeObj, 0)
    leases: list[object] = []

    @app.get("/<int:times>")
    def use(times: int) -> str:
        assert LEASE not in g
        for _ in range(times):
            shared.counter("c").increment()
            leases.append(g.get(LEASE))
            obj.query()
            SharedState().dict("d")  # only declared, not called
            leases.append(g.get(LEASE))
        assert (LEASE in g) is (times > 0)
        return "done"

    for times in (3, 0, 1):
        assert app.test_client().get(f"/{times}").text == "done"
    assert ended == [6, 2]
    assert len({id(lease) for lease in leases[:6]}) == 1
    assert leases[6] is leases[7] is not leases[0]


def test_it_ends_with_a_request_that_fails_and_is_missed_by_nobody(ended: list[int]) -> None:
    shared = SharedState()
    app = make_app(shared, PROPAGATE_EXCEPTIONS=False, TESTING=False, COUNTER_SERVER_TIMING=True)

    @app.get("/<what>")
    def view(what: str) -> str:
        if what != "unused":
            shared.counter("c").increment(maximum=0 if what == "refused" else None)
        if what == "gone":
            g.pop(LEASE)
        if what == "error":
            raise OSError("of the view")
        return what

    assert "Server-Timing" in app.test_client().get("/error").headers
    for path, status in (("error", 500), ("refused", 409), ("no/ne", 404), ("unused", 200), ("gone", 200)):
        assert app.test_client().get(path).status_code == status
    assert ended == [1, 1, 1]
    with pytest.raises(LimitReached), app.test_request_context():
        shared.counter("c").increment(maximum=0)
    assert ended == [1, 1, 1, 1]


def test_it_ends_with_the_last_of_a_streamed_answer(ended: list[int]) -> None:
    shared = SharedState()
    app = make_app(shared, COUNTER_SERVER_TIMING=True)

    @app.get("/")
    def stream() -> Response:
        return Response(stream_with_context(f"{shared.counter('c').increment()}\n" for _ in range(3)))

    with app.test_client().get("/", buffered=False) as response:
        assert "Server-Timing" not in response.headers  # they left before the first call
        assert next(response.iter_encoded()) == b"1\n"
        assert ended == []
    assert ended == [1]


def test_nested_contexts_have_a_lease_each(ended: list[int]) -> None:
    shared = SharedState()
    one, two = make_app(shared), make_app(shared)
    counter = shared.counter("c")

    @one.get("/")
    def view() -> list[int]:
        numbers = [counter.increment()]
        outer = g.get(LEASE)
        for app in (two, one):
            with app.app_context():
                assert LEASE not in g
                numbers += [counter.increment(10), counter.increment(10)]
                assert g.get(LEASE).state is current_app.extensions["counter_server"]
        assert g.get(LEASE) is outer
        return [*numbers, counter.increment()]

    assert one.test_client().get("/").get_json() == [1, 10, 20, 11, 21, 22]
    assert ended == [2, 2, 2]


def outcomes(*calls: Callable[[], object]) -> list[str]:
    """Return what became of each call."""
    found = []
    for call in calls:
        try:
            call()
        except DeadlineExceeded as error:
            found.append("refused, " * ("this request has already waited" in str(error)) + str(error.outcome))
        else:
            found.append("done")
    return found


def test_all_calls_of_a_request_have_one_deadline_together(on_demand: str, data_dir: Path) -> None:
    """Each call alone could wait for half a minute; the first has all that the request may, the others nothing."""
    shared = SharedState()
    counter, obj = shared.counter("c"), shared.object("obj", SomeObj, 0)
    app = make_app(shared, COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=PATIENCE, COUNTER_SERVER_TIMING=True)

    @app.post("/<first>")
    def view(first: str) -> list[str]:
        found = outcomes(obj.query if first == "object" else counter.increment, counter.increment, obj.query)
        found += outcomes(lambda: counter.value)
        assert g.get(LEASE).waited < PATIENCE  # which one call could have waited alone
        return found

    client = app.test_client()
    with app.app_context():
        assert (counter.increment(), obj.query()) == (1, 1)
    with frozen(holder(data_dir) or 0), patch.dict(app.config, {SETTING: 0.5}):
        for first in ("object", "counter"):
            response = client.post(f"/{first}")
            assert response.get_json() == ["unknown", REFUSED, REFUSED, REFUSED]
            timing = TIMING.fullmatch(response.headers["Server-Timing"])
            assert timing
            assert timing[2] == "1"  # without the calls that were refused
            assert float(timing[1]) >= 500  # milliseconds
    assert client.post("/object").get_json() == ["done"] * 4  # the last one's waiting takes nothing from it
    with app.app_context():
        # Those left open are counted now, or later, or never; those refused are not.
        assert counter.value in (2, 3)
        assert obj.query() in (4, 5)
        app.extensions["counter_server"].close()


class Watched(State):
    """A state that remembers how long each call was let wait."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.within: list[float] = []

    def submit(self, operation: Operation, *, within: float = math.inf) -> Result:
        self.within.append(within)
        return super().submit(operation, within=within)

    def invoke(self, name: str, operation: Invoke, *, within: float = math.inf) -> Result:
        self.within.append(within)
        return super().invoke(name, operation, within=within)


def test_a_block_with_a_deadline_ends_a_call_early_in_a_request(on_demand: str, data_dir: Path) -> None:
    shared = SharedState()
    counter, obj = shared.counter("c"), shared.object("obj", SomeObj, 0)
    app = make_app(shared, COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=PATIENCE)

    @app.get("/")
    def view() -> list[str]:
        with shared.deadline(0.05):
            return outcomes(counter.increment, obj.query)

    with app.app_context():
        assert (counter.increment(), obj.query()) == (1, 1)
    with frozen(holder(data_dir) or 0):
        assert app.test_client().get("/").get_json() == ["unknown", "unknown"]
    app.extensions["counter_server"].close()


def test_what_a_call_has_waited_the_next_ones_have_less() -> None:
    shared = SharedState()
    counter, obj = shared.counter("c"), shared.object("obj", SomeObj, 0)
    app = make_app(shared, **{SETTING: 7})
    state = app.extensions["counter_server"] = Watched()
    state.object("obj", SomeObj, 0)

    def use() -> None:
        state.within.clear()
        with pytest.raises(LimitReached):
            counter.increment(maximum=0)
        assert obj.query() > 0
        assert counter.value == 0

    for _ in range(2):
        with app.test_request_context():
            use()
            waited = g.get(LEASE).waited
        first, second, third = state.within
        assert 7 == first > second > third > 7 - waited
    with app.app_context():
        use()
    assert state.within == [math.inf] * 3


@pytest.mark.parametrize("told", [True, False])
def test_responses_tell_the_time_if_asked_to_and_the_state_was_used(*, told: bool) -> None:
    shared = SharedState()
    app = make_app(shared, **{"COUNTER_SERVER_TIMING": True} if told else {})

    @app.get("/<int:times>")
    def use(times: int) -> Response:
        for _ in range(times):
            shared.counter("c").increment()
        return Response("done", headers={"Server-Timing": 'db;dur=53, app;desc="ours"'})

    for times in (0, 1, 12, 0):
        own, *ours = app.test_client().get(f"/{times}").headers.getlist("Server-Timing")
        assert own == 'db;dur=53, app;desc="ours"'
        calls = [match[2] for header in ours if (match := TIMING.fullmatch(header))]
        assert calls == [str(times)] * (told and times > 0)
        assert len(calls) == len(ours)


def test_a_request_within_a_context_that_was_there_borrows_again() -> None:
    """As in tests of an app: Flask makes no context of its own for a request then."""
    shared = SharedState()
    app = make_app(shared, COUNTER_SERVER_TIMING=True)
    app.add_url_rule("/", view_func=lambda: str(shared.counter("c").increment()))
    with app.app_context():
        shared.counter("c").increment()
        for number in (2, 3, 4):
            response = app.test_client().get("/")
            timing = TIMING.fullmatch(response.headers["Server-Timing"])
            assert timing
            assert (response.text, timing[2]) == (str(number), "1")


def test_a_requests_deadline_is_twice_that_of_a_call_unless_it_is_set() -> None:
    wrong: list[object] = [0, -1, 0.0, math.nan, -math.inf, "5", [1]]
    for seconds in wrong:
        with pytest.raises(InvalidRequest, match="request's deadline"):
            make_app(SharedState(), **{SETTING: seconds})
    assert make_app(SharedState()).config[SETTING] == 10
    assert make_app(SharedState(), COUNTER_SERVER_DEADLINE=0.5).config[SETTING] == 1
    assert make_app(SharedState(), COUNTER_SERVER_DEADLINE=5, **{SETTING: 0.1}).config[SETTING] == 0.1
    with make_app(SharedState(), **{SETTING: math.inf}).test_request_context():
        assert SharedState().counter("c").increment() == 1
