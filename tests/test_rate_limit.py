"""A limit on the requests of an address: one budget for all workers, shown in headers."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.datastructures import Headers

from counter_server.errors import InvalidRequest
from counter_server.server.web import create_app
from tests.load import at_once
from tests.processes import PATIENCE, Program, Server, eventually, frozen, holder
from tests.test_server import ask, assert_not_started

COUNTERS = "/api/v1/counters"
INCREMENT = f"{COUNTERS}/x/increment"


def limited(limit: str = "3/hour", **config: object) -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_RATE_LIMIT": limit, **config})


@pytest.fixture
def client() -> FlaskClient:
    return limited().test_client()


def left(headers: Mapping[str, str] | Headers) -> tuple[int, int]:
    """Return the remaining requests and seconds from the header."""
    value = {name.lower(): value for name, value in headers.items()}["ratelimit"]  # waitress spells it its own way
    found = re.fullmatch(r'"client";r=(\d+);t=(\d+)', value)
    assert found, value
    return int(found[1]), int(found[2])


def test_a_request_beyond_the_limit_is_refused_and_counts_nothing(client: FlaskClient) -> None:
    for expected in (1, 2, 3):
        response = client.post(INCREMENT)
        assert response.get_json()["value"] == expected
        assert response.headers["RateLimit-Policy"] == '"client";q=3;w=3600'
        remaining, seconds = left(response.headers)
        assert remaining == 3 - expected
        assert 0 < seconds <= 3600
    for _ in range(3):
        response = client.post(INCREMENT)
        assert (response.status_code, response.content_type) == (429, "application/problem+json")
        assert response.get_json()["outcome"] == "not_applied"
        assert left(response.headers) == (0, int(response.headers["Retry-After"]))
        assert response.headers["RateLimit-Policy"] == '"client";q=3;w=3600'
    assert client.application.extensions["counter_server"].counter("x").value == 3


def test_refused_requests_and_badges_use_the_budget_and_pages_do_not(client: FlaskClient) -> None:
    assert client.get(f"{COUNTERS}/nobody").status_code == 404
    assert client.post(INCREMENT, json={"by": 0}).status_code == 400
    badge = client.get("/badge/unknown.svg")
    assert (badge.status_code, left(badge.headers)[0]) == (404, 0)
    assert client.get("/badge/unknown.svg").status_code == 429
    for path in ("/", "/session", "/docs", "/openapi.json", "/static/style.css"):
        with client.get(path) as response:
            assert response.status_code == 200
            assert "RateLimit" not in response.headers
    unlimited = create_app({"COUNTER_SERVER_STORE": "memory://"}).test_client().get(COUNTERS)
    assert not [name for name, _ in unlimited.headers if name.startswith("RateLimit")]


def remaining(client: FlaskClient, address: str, **headers: str) -> int:
    return left(client.get(COUNTERS, environ_overrides={"REMOTE_ADDR": address}, headers=headers).headers)[0]


def test_each_client_has_its_own_budget(client: FlaskClient) -> None:
    for one, other in [
        *(("192.0.2.1", "192.0.2.2"), ("2001:db8:0:1::1", "2001:db8:0:2::1")),
        *(("", "198.51.100.1"), ("::1", "127.0.0.1")),
    ]:
        assert [remaining(client, one) for _ in range(3)] == [2, 1, 0]
        assert remaining(client, other) == 2
    for one, other in [  # addresses of one client
        *(("2001:db8:0:3::1", "2001:db8:0:3:ffff::2"), ("203.0.113.1", "::ffff:203.0.113.1")),
        ("fe80::1%eth0", "fe80::2%eth0"),
    ]:
        assert remaining(client, one) == 2
        assert remaining(client, other) == 1
        pretended = {"X-Forwarded-For": "192.0.2.9", "Forwarded": "for=192.0.2.9"}
        assert remaining(client, one, **pretended) == 0


@pytest.mark.parametrize("limit", ["", "100", "minute", "0/minute", "-1/minute", "1/minute;2/hour", 100, ["1/minute"]])
def test_an_invalid_limit_is_refused_when_the_app_is_made(limit: object) -> None:
    with pytest.raises(InvalidRequest, match="such as 100/minute"):
        create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_RATE_LIMIT": limit})


def test_without_the_limits_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "counter_server.limiting")
    monkeypatch.setitem(sys.modules, "limits.storage", None)
    with pytest.raises(InvalidRequest, match=re.escape("pip install 'counter-server[limits]'")):
        limited()


@pytest.mark.slow
def test_if_the_budget_does_not_answer_in_time_nothing_was_counted(on_demand: str, data_dir: Path) -> None:
    """The budget's own call was sent, with an unknown result; the requested call has not begun."""
    client, hasty = (
        limited("100/hour", COUNTER_SERVER_STORE=on_demand, COUNTER_SERVER_DEADLINE=seconds).test_client()
        for seconds in (PATIENCE, 0.5)
    )
    assert client.post(INCREMENT).status_code == 200
    eventually(lambda: hasty.get(COUNTERS).status_code == 200, "an answer in time")
    with frozen(holder(data_dir) or 0):
        response = hasty.post(INCREMENT)
        badge = hasty.get("/badge/x.svg")
    assert (response.status_code, response.get_json()["outcome"]) == (503, "not_applied")
    assert (badge.status_code, "unavailable" in badge.text) == (503, True)
    for made in (client, hasty):
        made.application.extensions["counter_server"].close()


@pytest.mark.slow
def test_all_workers_share_one_budget(start_server: Callable[..., Server]) -> None:
    server = start_server("--workers", "2", "--rate-limit", "50/hour")

    answers = at_once(80, lambda: ask(server.url, "POST", INCREMENT))
    admitted = [answer for answer in answers if answer[0] == 200]
    assert sorted(json.loads(text)["value"] for _, _, text in admitted) == list(range(1, 51))
    assert sorted(left(headers)[0] for _, headers, _ in admitted) == list(range(50))
    assert {status for status, _, _ in answers} == {200, 429}
    assert len(server.children("worker")) == 2
    status, headers, _ = ask(server.url, "GET", "/badge/x.svg")
    assert status == 429
    assert int(headers["Retry-After"]) > 3000
    assert ask(server.url, "GET", "/")[0] == 200


@pytest.mark.slow
def test_a_limit_that_cannot_work_stops_the_start(stack: ExitStack, tmp_path: Path) -> None:
    options = ("--store", f"sqlite:///{tmp_path}/x.db", "--rate-limit", "1/second")
    program = stack.enter_context(Program("run.py", "--port", "0", *options))
    assert_not_started(program, "rate limit", "sqlite://")
