"""`counter-server dashboard`: it looks at a running app, and counts, starts and writes nothing."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from counter_server import open_state
from counter_server.manager.client import StateProxy
from counter_server.manager.directory import DataDirectory
from counter_server.server.web import create_dashboard
from counter_server.settings import StoreOptions
from tests.launchers import SYNC, Browser, launch
from tests.processes import PATIENCE, Manager, Program, eventually, holder
from tests.test_access import TOKEN
from tests.test_access_of_servers import put
from tests.test_dashboard import BROWSER, Page
from tests.test_documentation import example
from tests.test_server import ask

NO_MANAGER = "no manager is running: the app starts one at its next use"
APP = """
from flask import Flask
from counter_server import SharedState
from tests.hosted_classes import SomeObj

app = Flask(__name__)
app.config["COUNTER_SERVER_STORE"] = {url!r}
shared = SharedState(app)
some_obj = shared.object("some_obj", SomeObj, 0) if {url!r}.startswith("manager:") else None

@app.post("/")
def index():
    if some_obj is not None:
        some_obj.query()
    return str(shared.counter("visits").increment())
"""


class Dashboard(Program):
    """`counter-server dashboard` on a free port, ready for requests."""

    def __init__(self, *options: str | Path, environment: dict[str, str] | None = None) -> None:
        program = ("-m", "counter_server", "dashboard", "--port", "0")
        super().__init__(*program, *options, environment=environment)
        try:
            self.url = self.expect("Serving on ")
        except AssertionError:
            self.__exit__(None, None, None)
            raise

    def counters(self) -> dict[str, int] | None:
        """Return what the page shows, or None while there is no manager."""
        status, _, text = ask(self.url, "GET", "/counters.json")
        found = json.loads(text)
        if status == 503:
            assert found["outcome"] == "not_applied"
            return None
        return {counter["name"]: int(counter["value"]) for counter in found["counters"]}


StartDashboard = Callable[..., Dashboard]


@pytest.fixture
def start_dashboard(stack: ExitStack) -> StartDashboard:
    return lambda *options: stack.enter_context(Dashboard(*options))


def visit_every_page(url: str) -> None:
    for path in ("/", "/counters", "/counters.json", "/docs", "/openapi.json", "/sign-in", "/readyz", "/metrics"):
        assert ask(url, "GET", path, headers=BROWSER)[0] in (200, 302, 503), path
    assert ask(url, "GET", "/livez")[0] == 200
    assert ask(url, "POST", "/sign-out")[0] == 303


def contents(directory: Path) -> list[tuple[str, int, int]]:
    """Return every file below a directory, with its size and the time of its last change."""
    return sorted(
        (str(file.relative_to(directory)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in [directory, *directory.rglob("*")]
    )


@pytest.mark.parametrize("exists", [True, False])
def test_without_a_manager_the_page_says_so_and_nothing_is_made(
    on_demand: str, data_dir: Path, tmp_path: Path, *, exists: bool
) -> None:
    if exists:
        data_dir.mkdir(0o700)
    before = contents(tmp_path)
    app = create_dashboard({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_TOKEN": TOKEN})
    client = app.test_client()
    page = client.get("/", follow_redirects=True)
    assert (page.status_code, page.request.path) == (200, "/counters")
    assert NO_MANAGER in page.text.replace("No manager", "no manager")
    for path in ("/counters.json", "/api/v1/counters", "/api/v1/counters/x"):
        refused = client.get(path)
        assert (refused.status_code, refused.content_type) == (503, "application/problem+json")
        assert (refused.get_json()["detail"], refused.get_json()["outcome"]) == (NO_MANAGER, "not_applied")
    assert client.post("/sign-in", data={"token": TOKEN}).status_code == 303
    assert client.post("/sign-out").status_code == 303
    assert client.put("/api/v1/counters/x", json={"value": 1}).status_code == 503
    assert [client.get(path).status_code for path in ("/livez", "/readyz", "/metrics")] == [200, 503, 200]
    assert contents(tmp_path) == before


def test_where_nothing_was_counted_a_look_makes_no_file(tmp_path: Path) -> None:
    app = create_dashboard({"COUNTER_SERVER_STORE": f"sqlite:///{tmp_path}/counters.db"})
    client = app.test_client()
    assert "There are no counters yet" in client.get("/counters").text
    assert client.get("/api/v1/counters").get_json() == {"counters": [], "next": None}
    assert client.get("/api/v1/counters/x").status_code == 404
    assert [client.get(path).status_code for path in ("/readyz", "/metrics", "/docs")] == [200] * 3
    assert list(tmp_path.iterdir()) == []


def test_it_starts_none_even_if_the_manager_has_just_gone(
    on_demand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataDirectory, "has_no_manager", lambda _directory: False)
    client = create_dashboard({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_DEADLINE": 0.01}).test_client()
    for path in ("/counters", "/counters.json", "/api/v1/counters"):
        assert client.get(path).status_code == 503
    assert list(tmp_path.iterdir()) == []


def test_it_declares_no_objects_and_has_none_of_the_pages_that_count(on_demand: str) -> None:
    app = create_dashboard({"COUNTER_SERVER_STORE": on_demand, "COUNTER_SERVER_TOKEN": TOKEN})
    assert not app.extensions["counter_server"].declarations
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    assert not [path for path in paths if path.startswith(("/session", "/lab", "/badge"))]


def await_growth(shown: list[int]) -> None:
    begun = len(shown)
    eventually(lambda: shown[begun:] and shown[-1] > shown[begun], "numbers that grow")


@pytest.mark.slow
def test_beside_gunicorn_it_shows_every_number_and_changes_none(
    stack: ExitStack, start_dashboard: StartDashboard, on_demand: str, data_dir: Path, tmp_path: Path
) -> None:
    """Four workers count while the dashboard is asked all the time, and the manager is killed three times."""
    (tmp_path / "app.py").write_text(APP.format(url=on_demand))
    dashboard = start_dashboard("--data-dir", data_dir)
    assert dashboard.counters() is None
    _, url = launch(stack, SYNC, tmp_path)
    numbers: list[int] = []
    shown: list[int] = []
    over = threading.Event()

    def count() -> None:
        browser = Browser(url)
        while not over.is_set():
            answer = browser.visit(method="POST")
            assert answer.status == 200
            numbers.append(answer.content)

    def look() -> None:
        while not over.is_set():
            seen = dashboard.counters()
            if seen is not None:
                assert set(seen) <= {"visits"}
                shown.extend(seen.values())
            for path in ("/counters", "/readyz", "/metrics", "/api/v1/counters/visits"):
                assert ask(dashboard.url, "GET", path, headers=BROWSER)[0] in (200, 404, 503)

    threads = [threading.Thread(target=target) for target in (count, count, count, look, look)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            await_growth(shown)
            pid = holder(data_dir)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: holder(data_dir) not in (None, pid), "the next manager")  # type: ignore[misc]
        await_growth(shown)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert dashboard.counters() == {"visits": len(numbers)}
    assert set(shown) <= set(range(len(numbers) + 1))
    page = Page(ask(dashboard.url, "GET", "/counters", headers=BROWSER)[2])
    assert page.counters == {"visits": str(len(numbers))}
    metrics = ask(dashboard.url, "GET", "/metrics")[2]
    assert "\ncounter_server_up 1.0\n" in metrics
    assert "\ncounter_server_objects 1.0\n" in metrics, "there are only the app's own objects"
    with closing(StateProxy(DataDirectory(data_dir))) as proxy:
        assert [each.name for each in proxy.hosting(time.monotonic() + PATIENCE).declarations] == ["some_obj"]
    assert dashboard.stop() == 0
    assert Browser(url).visit(method="POST").content == len(numbers) + 1


@pytest.mark.slow
def test_while_there_is_no_manager_it_says_so_and_comes_back(
    start_dashboard: StartDashboard, start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    manager = start_manager()
    dashboard = start_dashboard("--data-dir", data_dir)
    with open_state(manager.url) as state:
        state.counter("visits").set(41)
        assert dashboard.counters() == {"visits": 41}
        manager.kill()
        visit_every_page(dashboard.url)
        assert dashboard.counters() is None
        assert "No manager is running" in ask(dashboard.url, "GET", "/counters", headers=BROWSER)[2]
        start_manager()
        assert dashboard.counters() == {"visits": 41}
        assert put(dashboard.url, 7) == 200, "the deed of an operator, who is everyone on this machine"
        assert dashboard.counters() == {"visits": 41, "x": 7}


@pytest.mark.slow
def test_reading_commits_nothing_and_writes_no_file(
    start_dashboard: StartDashboard, start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    manager = start_manager()
    with open_state(manager.url) as state:
        state.counter("visits").increment()
        before, status = contents(data_dir), state.status()
        assert status is not None
        dashboard = start_dashboard("--data-dir", data_dir)
        visit_every_page(dashboard.url)
        visit_every_page(dashboard.url)
        after = state.status()
        assert after is not None
        assert (after.commits, after.clients, after.objects) == (status.commits, status.clients, status.objects)
        assert contents(data_dir) == before
        assert ask(dashboard.url, "GET", "/readyz")[0] == 200


@pytest.mark.slow
def test_a_manager_that_nobody_else_uses_exits_although_the_dashboard_runs(
    start_dashboard: StartDashboard, on_demand: str, data_dir: Path
) -> None:
    with open_state(on_demand, options=StoreOptions(idle_timeout=0.5)) as state:
        state.counter("visits").increment()
        dashboard = start_dashboard("--data-dir", data_dir)
        assert dashboard.counters() == {"visits": 1}
        assert ask(dashboard.url, "GET", "/readyz")[0] == 200
    eventually(lambda: holder(data_dir) is None, "the manager's end")
    assert dashboard.counters() is None
    with open_state(on_demand) as state:
        assert state.counter("visits").increment() == 2


@pytest.fixture(params=["redis", "sqlite", "memcached"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    from tests.engines import MemcachedServer, RedisServer

    match request.param:
        case "redis":
            with RedisServer(tmp_path / "redis") as redis:
                yield redis.url
        case "memcached":
            with MemcachedServer(tmp_path / "memcached") as memcached:
                yield memcached.url
        case _:
            yield f"sqlite:///{tmp_path}/counters.db"


@pytest.mark.slow
def test_on_every_other_store_it_shows_what_the_app_counts(
    stack: ExitStack, start_dashboard: StartDashboard, store: str, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP.format(url=store))
    _, url = launch(stack, SYNC, tmp_path)
    browser = Browser(url)
    assert [browser.visit(method="POST").content for _ in range(3)] == [1, 2, 3]
    dashboard = start_dashboard("--store", store)
    visit_every_page(dashboard.url)
    status, _, text = ask(dashboard.url, "GET", "/counters?q=visits", headers=BROWSER)
    assert (status, Page(text).counters) == (200, {"visits": "3"})
    assert "reports no figures" in text
    if store.startswith("memcached"):
        assert "memcached cannot list its counters" in text
    eventually(lambda: ask(dashboard.url, "GET", "/readyz")[0] == 200, "readiness")
    assert browser.visit(method="POST").content == 4
    assert not (tmp_path / "instance").exists()


@pytest.mark.slow
def test_the_rules_of_the_server_hold(stack: ExitStack, start_manager: Callable[..., Manager], data_dir: Path) -> None:
    start_manager()
    environment = {"COUNTER_SERVER_TOKEN": TOKEN}
    dashboard = stack.enter_context(Dashboard("--data-dir", data_dir, environment=environment))
    assert (put(dashboard.url, 1), put(dashboard.url, 1, {"Authorization": f"Bearer {TOKEN}"})) == (401, 200)
    assert ask(dashboard.url, "GET", "/counters", headers={"Host": "evil.example"})[0] == 421
    status, headers, _ = ask(dashboard.url, "GET", "/counters")
    assert (status, headers["Content-Security-Policy"].split(";")[0]) == (200, "default-src 'none'")
    foreign = {"Sec-Fetch-Site": "cross-site", "Authorization": f"Bearer {TOKEN}"}
    assert put(dashboard.url, 2, foreign) == 403
    assert not (data_dir / "session.key").exists()


@pytest.mark.slow
def test_the_command_of_the_page_shows_the_numbers(
    stack: ExitStack, start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    manager = start_manager()
    with open_state(manager.url) as state:
        state.counter("visits").increment()
    (command,) = example("docs/any-app.md", "counter-server dashboard").splitlines()
    _, _, option, _ = command.split()
    dashboard = stack.enter_context(Dashboard(option, data_dir))
    assert dashboard.counters() == {"visits": 1}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_open_requests(
    start_dashboard: StartDashboard, start_manager: Callable[..., Manager], data_dir: Path, number: signal.Signals
) -> None:
    start_manager()
    dashboard = start_dashboard("--data-dir", data_dir)
    host, _, port = dashboard.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        eventually(lambda: ask(dashboard.url, "GET", "/livez")[0] == 200, "another request after that")
        dashboard.send_signal(number)
        connection.sendall(b"\r\n")
        answer = b""
        while received := connection.recv(4096):
            answer += received
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"alive\n")
    assert dashboard.wait() == 0


@pytest.mark.slow
def test_what_it_cannot_show_is_refused_in_one_line(stack: ExitStack) -> None:
    for options, reason in (
        (("--store", "memory://"), "shared.blueprint()"),
        (("--host", "192.0.2.1"), "choose another --host or --port"),
        (("--data-dir", "/tmp/x", "--store", "redis://localhost"), "give one of them"),
    ):
        program = stack.enter_context(Program("-m", "counter_server", "dashboard", "--port", "0", *options))
        assert program.wait() == 1
        assert len(program.errors) == 1
        assert reason in program.errors[0]
