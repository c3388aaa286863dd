"""The home page: each visit is counted once, and other requests are not counted."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from counter_server import SharedState
from counter_server.server.web import create_app
from counter_server.state import State
from counter_server.status import Process
from tests.test_access import TOKEN
from tests.test_dashboard import BROWSER, Page


@pytest.fixture
def app() -> Flask:
    return create_app({"COUNTER_SERVER_STORE": "memory://", "COUNTER_SERVER_HOST": "127.0.0.1"})


def number_in(response: TestResponse) -> str:
    assert response.status_code == 200
    number = Page(response.text).texts["number"].replace(",", "")
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


def processes(*pids: int | None) -> Callable[[], list[Process]]:
    """Return what a supervisor would say: the manager's pid, then the workers'."""
    names = ["manager", *(f"worker-{number}" for number in range(1, len(pids)))]
    found = [Process(name=name, pid=pid, uptime=1.0, restarts=0) for name, pid in zip(names, pids, strict=True)]
    return lambda: found


def workers(page: str) -> list[tuple[str, str]]:
    """Return the colour and the text of each worker that the page shows."""
    return re.findall(r'class="worker (w\d)">([^<]+)<', page)


def test_what_the_page_polls_counts_nothing_and_says_what_is_new(client: FlaskClient, state: State) -> None:
    assert client.get("/visits.json").get_json() == {"number": "0", "pids": "", "rows": ""}
    client.get("/")
    pid = os.getpid()
    news = client.get("/visits.json?after=0")
    assert news.get_json()["number"] == "1"
    assert workers(news.get_json()["rows"]) == [("w0", f"A · {pid}")]
    same = client.get("/visits.json?after=1")
    assert (same.status_code, same.data, same.headers["Cache-Control"]) == (204, b"", "no-store")
    state.counter("visits").set(2**63 - 1)
    assert client.get("/visits.json?after=1").get_json()["number"] == str(2**63 - 1)
    assert dict(state.counters().counters) == {"visits": 2**63 - 1}


def test_a_worker_has_one_letter_and_colour_on_a_page(app: Flask, client: FlaskClient) -> None:
    pid = os.getpid()
    manager, second, new, early, late = (pid + more for more in range(1, 6))  # in a container, all pids are small
    recent = app.extensions["counter_server.last_visits"]
    app.config["COUNTER_SERVER_PROCESSES"] = processes(manager, None, pid, second)
    for number, of in enumerate((second, late, early), -3):
        recent.add([number, of, "00:00:00"])
    page = client.get("/").text
    shown = [("w1", f"B · {pid}"), ("w3", f"D · {early}, gone"), ("w4", f"E · {late}, gone"), ("w2", f"C · {second}")]
    assert sorted(workers(page)[:4]) == sorted(shown)
    app.config["COUNTER_SERVER_PROCESSES"] = processes(manager, new, pid)
    app.config["COUNTER_SERVER_HOST"] = "127.0.0.1"
    assert client.get(f"/visits.json?after=1 {manager} {new} {pid}").status_code == 204
    # A worker was replaced, and nobody came meanwhile.
    news = client.get(f"/visits.json?after=1 {manager} {second}").get_json()
    assert (news["number"], news["pids"]) == ("1", f"{manager} {new} {pid}")
    assert re.findall(r"kill -9 (\d+)", news["kill"]) == [str(manager), str(new), str(pid)]
    assert workers(news["kill"]) == [("w0", "A · worker"), ("w1", "B · worker")]
    app.config["COUNTER_SERVER_HOST"] = None
    news = client.get("/visits.json").get_json()  # other machines may reach this server
    assert (news["pids"], "kill" in news) == ("", False)
    app.config["COUNTER_SERVER_PROCESSES"] = processes(manager, *range(pid + 10, pid + 20), pid)
    assert workers(client.get("/").text)[0] == ("w2", f"K · {pid}")
    del app.config["COUNTER_SERVER_PROCESSES"]
    in_order = zip("ABC", sorted((early, late, pid)), strict=True)  # without a supervisor
    expected = {(f"w{place}", f"{letter} · {one}") for place, (letter, one) in enumerate(in_order)}
    assert set(workers(client.get("/").text)) == expected


def commands(client: FlaskClient, **headers: str) -> list[str]:
    page = client.get("/", headers=headers).text
    return re.findall(r"<code>(kill -9 \d+)</code>", page)


@pytest.mark.slow
def test_the_commands_to_kill_are_for_people_on_this_machine_and_operators(tmp_path: Path) -> None:
    store = {"COUNTER_SERVER_STORE": f"sqlite:///{tmp_path}/counters.db", "SECRET_KEY": "k"}
    operator = {"Authorization": f"Bearer {TOKEN}"}
    for host, token, may in (("127.0.0.1", None, (3, 3)), ("127.0.0.1", TOKEN, (3, 3)), ("0.0.0.0", TOKEN, (0, 3))):
        config = {**store, "COUNTER_SERVER_HOST": host, "COUNTER_SERVER_TOKEN": token}
        app = create_app({**config, "COUNTER_SERVER_PROCESSES": processes(3, 4, 5)})
        client = app.test_client()
        assert (len(commands(client)), len(commands(client, **operator))) == may
        assert "sqlite://</code>, not in a worker" in client.get("/").text
        app.config["COUNTER_SERVER_DURABILITY"] = "none"
        assert "kill -9 3" not in commands(client, **operator), "its count would be lost"
    other = create_app({**config, "COUNTER_SERVER_HOST": "127.0.0.1"}).test_client()
    assert commands(other) == []
    assert "Another launcher started the workers" in other.get("/").text


def test_in_memory_the_page_promises_no_more_than_the_store_keeps(app: Flask, client: FlaskClient) -> None:
    app.config["COUNTER_SERVER_PROCESSES"] = processes(3, 4, 5)
    page = client.get("/").text
    assert "This process alone keeps the count" in page
    assert "No other visitor" not in page
    assert "Nothing happens" not in page
    assert commands(client) == []


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
    response = client.post("/session/inc", headers=BROWSER)  # leads back to the page: a reload counts nothing
    assert (response.status_code, response.location) == (303, "/session")
    assert Page(client.get("/session").text).texts["sentence"] == "counter is 1"
    client.post("/session/reset", headers=BROWSER)
    sentences = [Page(client.get("/session").text).texts["sentence"] for _ in range(2)]
    assert sentences == ["counter was reset", "counter is 0"]
    client.post("/session/inc", headers=BROWSER)
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
    page = client.get("/")
    assert page.status_code == 200
    assert "The last visits" not in page.text
    assert client.get("/visits.json?after=0").get_json() == {"number": "1", "pids": "", "rows": ""}
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
