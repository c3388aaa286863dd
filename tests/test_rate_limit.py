"""A limit on the requests of an address: one budget for all workers, shown in headers."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from counter_server.errors import InvalidRequest, Unsupported
from counter_server.server.web import create_app
from tests.processes import PATIENCE, Program, Server, eventually, frozen, holder
from tests.test_server import ask, assert_not_started

COUNTERS = "/api/v1/counters"
INCREMENT = f"{COUNTERS}/x/increment"
EXEMPT = ["/", "/session", "/docs", "/openapi.json", "/static/style.css"]


def limited(limit: str = "3/hour", **config: object) -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_RATE_LIMIT": limit, **config})


@pytest.fixture
def client() -> FlaskClient:
    return limited().test_client()


def left(headers: Mapping[str, str]) -> tuple[int, int]:
    """Return the remaining requests and seconds from the header."""
    value = {name.lower(): value for name, value in headers.items()}["ratelimit"]  # waitress spells it its own way
    found = re.fullmatch(r'"client";r=(\d+);t=(\d+)', value)
    assert found, value
    return int(found[1]), int(found[2])


def test_answers_contain_the_policy_and_the_remaining_requests(client: FlaskClient) -> None:
    for expected in (2, 1, 0):
        response = client.get(COUNTERS)
        assert response.status_code == 200
        assert response.headers["RateLimit-Policy"] == '"client";q=3;w=3600'
        remaining, seconds = left(dict(response.headers))
        assert remaining == expected
        assert 3590 < seconds <= 3600


def test_a_request_beyond_the_limit_is_refused_with_a_time_to_wait_and_counts_nothing(client: FlaskClient) -> None:
    for expected in (1, 2, 3):
        assert client.post(INCREMENT).get_json()["value"] == expected
    for _ in range(3):
        response = client.post(INCREMENT)
        assert response.status_code == 429
        assert response.content_type == "application/problem+json"
        assert response.get_json()["outcome"] == "not_applied"
        assert left(dict(response.headers))[0] == 0
        assert int(response.headers["Retry-After"]) == left(dict(response.headers))[1]
        assert response.headers["RateLimit-Policy"] == '"client";q=3;w=3600'
    with client.application.app_context():
        assert client.application.extensions["counter_server"].counter("x").value == 3


def test_refused_requests_and_badges_use_the_same_budget(client: FlaskClient) -> None:
    assert client.get(f"{COUNTERS}/nobody").status_code == 404
    assert client.post(INCREMENT, json={"by": 0}).status_code == 400
    badge = client.get("/badge/unknown.svg")
    assert badge.status_code == 404
    assert left(dict(badge.headers))[0] == 0
    assert client.get("/badge/unknown.svg").status_code == 429


@pytest.mark.parametrize("path", EXEMPT)
def test_pages_and_the_document_are_not_limited(client: FlaskClient, path: str) -> None:
    for _ in range(5):
        with client.get(path) as response:
            assert response.status_code == 200
            assert "RateLimit" not in response.headers
    assert left(dict(client.get(COUNTERS).headers))[0] == 2


def test_without_a_limit_there_are_no_headers_of_one() -> None:
    client = create_app({"COUNTER_SERVER_STORE": "memory://"}).test_client()
    response = client.get(COUNTERS)
    assert not [name for name, _ in response.headers if name.startswith("RateLimit")]


def remaining(client: FlaskClient, address: str, **headers: str) -> int:
    return left(dict(client.get(COUNTERS, environ_overrides={"REMOTE_ADDR": address}, headers=headers).headers))[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("192.0.2.1", "192.0.2.2"),
        ("2001:db8:0:1::1", "2001:db8:0:2::1"),
        ("", "192.0.2.1"),
        ("::1", "127.0.0.1"),
    ],
)
def test_each_address_has_its_own_budget(client: FlaskClient, one: str, other: str) -> None:
    assert [remaining(client, one) for _ in range(3)] == [2, 1, 0]
    assert remaining(client, other) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2"),
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("fe80::1%eth0", "fe80::2%eth0"),
    ],
)
def test_addresses_of_one_client_share_a_budget(client: FlaskClient, one: str, other: str) -> None:
    assert remaining(client, one) == 2
    assert remaining(client, other) == 1


def test_a_client_cannot_pretend_to_be_another(client: FlaskClient) -> None:
    assert remaining(client, "192.0.2.1") == 2
    assert remaining(client, "192.0.2.1", **{"X-Forwarded-For": "192.0.2.9", "Forwarded": "for=192.0.2.9"}) == 1


def test_after_a_window_the_next_begins() -> None:
    client = limited("2/second").test_client()
    assert [client.get(COUNTERS).status_code for _ in range(2)] == [200, 200]
    eventually(lambda: client.get(COUNTERS).status_code == 200, "a new window", seconds=5)


@pytest.mark.parametrize(
    "limit", ["", "x", "100", "minute", "0/minute", "-1/minute", "1/minute;2/hour", "1/fortnight", 100, ["1/minute"]]
)
def test_an_invalid_limit_is_refused_when_the_app_is_made(limit: object) -> None:
    with pytest.raises(InvalidRequest, match="such as 100/minute"):
        create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_RATE_LIMIT": limit})


def test_a_store_that_hosts_no_objects_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"rate limit.*sqlite:// hosts no shared objects"):
        limited(COUNTER_SERVER_STORE=f"sqlite:///{tmp_path}/x.db", SECRET_KEY="k")


def test_without_the_limits_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "counter_server.limiting")
    monkeypatch.setitem(sys.modules, "limits.storage", None)
    with pytest.raises(InvalidRequest, match=re.escape("pip install 'counter-server[limits]'")):
        limited()


def test_if_the_budget_does_not_answer_in_time_nothing_was_counted(on_demand: str, data_dir: Path) -> None:
    """The budget's own call was sent, with an unknown result; the requested call has not begun."""
    app, hasty = (
        limited("100/hour", COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=seconds)
        for seconds in (PATIENCE, 0.5)
    )
    assert app.test_client().post(INCREMENT).status_code == 200
    pid = holder(data_dir)
    assert pid is not None
    eventually(lambda: hasty.test_client().get(COUNTERS).status_code == 200, "an answer in time")
    with frozen(pid):
        response = hasty.test_client().post(INCREMENT)
        badge = hasty.test_client().get("/badge/x.svg")
    assert response.status_code == 503
    assert response.get_json()["outcome"] == "not_applied"
    assert badge.status_code == 503
    assert "unavailable" in badge.text
    for made in (app, hasty):
        made.extensions["counter_server"].close()


# As an operator runs it


def test_all_workers_share_one_budget(start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "2", "--rate-limit", "50/hour")

    def post(_: int) -> tuple[int, dict[str, str], str]:
        return ask(server.url, "POST", INCREMENT)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(post, range(80)))
    admitted = [answer for answer in answers if answer[0] == 200]
    assert sorted(json.loads(text)["value"] for _, _, text in admitted) == list(range(1, 51))
    assert sorted(left(headers)[0] for _, headers, _ in admitted) == list(range(50))
    assert {status for status, _, _ in answers} == {200, 429}
    assert len(server.children("worker")) == 2
    status, headers, _ = ask(server.url, "GET", "/badge/x.svg")
    assert status == 429
    assert int(headers["Retry-After"]) > 3000
    assert ask(server.url, "GET", "/")[0] == 200


def test_a_store_without_objects_is_refused_at_start_by_name(stack: ExitStack, data_dir: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/x.db"
    program = stack.enter_context(Program("run.py", "--port", "0", "--store", store, "--rate-limit", "1/second"))
    assert_not_started(program, "rate limit", "sqlite://")


def test_an_invalid_limit_is_refused_at_start(stack: ExitStack, data_dir: Path) -> None:
    program = stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir, "--rate-limit", "lots"))
    assert_not_started(program, "lots")
    assert len(program.errors) == 1
