"""The pages for machines: is this process alive, is the store ready, and the figures."""

import multiprocessing
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import pytest
from flask.testing import FlaskClient
from msgspec import msgpack
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from counter_server import State
from counter_server.errors import Unsupported
from counter_server.manager import client as client_module
from counter_server.manager.directory import DataDirectory
from counter_server.server.supervisor import Processes
from counter_server.server.web import create_app
from counter_server.status import Process, Status
from tests.engines import MemcachedServer, RedisServer
from tests.load import at_once, open_client
from tests.processes import PATIENCE, Manager, Server, eventually, fill, frozen
from tests.test_manager import received_until_closed
from tests.test_server import Answer, address, ask, increment

pytestmark = pytest.mark.slow

StartServer = Callable[..., Server]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("health") / "data"


@pytest.fixture(scope="module")
def server(data: Path) -> Iterator[Server]:
    """Run a server for all tests that only ask it."""
    with Server("--workers", "2", "--frozen-after", str(2 * PATIENCE), "--data-dir", data) as server:
        yield server


@pytest.fixture
def state(server: Server, data: Path) -> Iterator[State]:
    with open_client(DataDirectory(data).url) as state:
        yield state


def parsed(text: str, parse: Callable[[str], Any] = parser.text_string_to_metric_families) -> dict[str, float]:
    """Return the samples of a text by Prometheus' own parser: values by names with labels, without the program's."""
    families = [family for family in parse(text) if not family.name.startswith("counter_server_build")]
    samples = [sample for family in families for sample in family.samples]
    found = {}
    for sample in samples:
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        found[sample.name.removeprefix("counter_server_") + (f"{{{labels}}}" if labels else "")] = sample.value
    assert len(found) == len(samples), "a figure appears twice"
    return found


def figures(url: str) -> dict[str, float]:
    """Return the figures, the manager's included: it has a second to answer, not always enough on a busy machine."""

    def reported() -> dict[str, float] | None:
        status, headers, text = ask(url, "GET", "/metrics")
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        found = parsed(text)
        return found if found["up"] == 1 else None

    return eventually(reported, "the manager's figures") or {}


def status_of(state: State) -> Status:
    reported = state.status()
    assert reported is not None
    return reported


def readyz_of(client: FlaskClient) -> Answer:
    response = client.get("/readyz")
    return response.status_code, response.headers, response.text


def assert_not_ready(answer: Answer, words: str) -> None:
    status, headers, text = answer
    assert (status, headers["Content-Type"]) == (503, "application/problem+json")
    assert headers["Cache-Control"] == "no-store"
    assert headers["Retry-After"] == "1"
    assert words in text
    assert "/" not in text.replace("about:blank", "").replace("application/", ""), "a path is shown to anybody"


def becomes_ready(url: str) -> None:
    eventually(lambda: ask(url, "GET", "/readyz")[0] == 200, "readiness")


def test_a_probe_of_readiness_is_committed_and_changes_no_counter(server: Server, state: State) -> None:
    becomes_ready(server.url)
    before = status_of(state)
    probes = [ask(server.url, "GET", "/readyz")[0] for _ in range(5)]
    after = status_of(state)
    assert probes.count(200) <= after.commits - before.commits <= 5
    assert after.journal_bytes > before.journal_bytes
    assert "ready?" not in dict(state.counters().counters)
    state.counter("ready?").set(-(2**63))  # a counter like any other
    becomes_ready(server.url)
    assert state.counter("ready?").value == -(2**63)


def test_with_a_full_disk_a_server_is_alive_not_ready_gives_its_figures_and_recovers(
    start_server: StartServer, small_disk: Path
) -> None:
    server = start_server("--workers", "2", "--data-dir", small_disk / "data")
    assert increment(server.url) == 1
    becomes_ready(server.url)
    filler = small_disk / "filler"
    fill(filler)
    refused = "cannot write for now"

    def answer_of_a_refused_write() -> Answer | None:
        answer = ask(server.url, "GET", "/readyz")
        return answer if refused in answer[2] else None

    answer = eventually(answer_of_a_refused_write, "a write that is refused")
    assert answer is not None
    assert_not_ready(answer, refused)
    assert ask(server.url, "HEAD", "/readyz")[0] == 503
    assert ask(server.url, "GET", "/livez")[0] == 200
    assert ask(server.url, "GET", "/api/v1/counters/x")[0] == 200  # reads continue
    assert figures(server.url)["up"] == 1
    filler.unlink()
    becomes_ready(server.url)
    assert increment(server.url) == 2


def test_with_the_manager_frozen_livez_answers_at_once_and_readyz_within_its_deadline(
    start_manager: Callable[..., Manager],
) -> None:
    manager = start_manager()
    client = client_of(manager.url, COUNTER_SERVER_DEADLINE=2 * PATIENCE)
    assert client.get("/readyz").status_code == 200
    began = time.monotonic()
    with frozen(manager.pid):
        assert client.get("/livez").status_code == 200
        assert_not_ready(readyz_of(client), "has not answered within 1 s")
        assert parsed(client.get("/metrics").text) == {"up": 0}
        assert 1.9 < time.monotonic() - began < PATIENCE
    eventually(lambda: client.get("/readyz").status_code == 200, "readiness, with the manager there again")


def test_livez_is_answered_within_a_second_while_200_requests_wait(stack: ExitStack, start_server: StartServer) -> None:
    server = start_server("--workers", "1", "--threads", "8")
    (manager,) = server.children("manager")
    assert increment(server.url) == 1
    with frozen(manager):
        waiting = [stack.enter_context(socket.create_connection(address(server), PATIENCE)) for _ in range(200)]
        for connection in waiting:
            connection.sendall(b"POST /api/v1/counters/x/increment HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for method, path, status in (("GET", "/livez", 200), ("HEAD", "//%6civez?x", 200), ("GET", "/livez", 421)):
            given = {"Host": "evil.example"} if status == 421 else {}

            def within_a_second() -> bool:
                began = time.monotonic()
                answered, headers, _ = ask(server.url, method, path, headers=given)
                assert answered == status
                assert headers["X-Content-Type-Options"] == "nosniff"
                return time.monotonic() - began < 1

            eventually(within_a_second, "an answer within a second")  # on a busy machine, perhaps not the first
        assert select.select(waiting[-1:], [], [], 0) == ([], [], []), "the others do not wait any more"
        # On one connection the answers keep their order.
        waiting[0].sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answers = re.findall(rb"HTTP/1.1 (\d+)|(alive)", received_until_closed(waiting[0]))
    assert answers[1:] == [(b"200", b""), (b"", b"alive")]


def test_many_probes_do_not_pile_up_behind_a_frozen_manager(start_server: StartServer) -> None:
    server = start_server("--workers", "1", "--threads", "2")
    (manager,) = server.children("manager")
    with frozen(manager):
        # If each waited for a second, 2 at a time, the last would get no answer within PATIENCE.
        for answer in at_once(100, lambda: ask(server.url, "GET", "/readyz")):
            assert_not_ready(answer, "has not answered")


def test_the_figures_match_the_operations(server: Server, data: Path, state: State) -> None:
    before = figures(server.url)
    for number in range(7):
        headers = {"Idempotency-Key": f"key-{number % 5}"}
        assert ask(server.url, "POST", f"/api/v1/counters/c{number % 5}/increment", headers=headers)[0] == 200
    state.counter("c0").value  # noqa: B018 - connects, and is a read
    after, status = figures(server.url), status_of(state)
    gained = {name: after[name] - before[name] for name in before if name in after}
    assert (gained["counters"], gained["idempotency_keys"]) == (5, 5)
    for kind in ("operations", "batches"):
        assert gained[f"{kind}_total"] == 7
    # They were sent one by one, so each has its own commit.
    assert gained["commit_duration_seconds_count{of=counters}"] == 7
    assert gained["commit_duration_seconds_bucket{le=+Inf,of=counters}"] == 7
    assert gained["commit_duration_seconds_sum{of=counters}"] > 0
    assert gained["manager_uptime_seconds"] > 0
    assert after["connections"] >= 2  # a worker's, and ours
    assert after["clients"] == status.clients > 0
    app = create_app({"COUNTER_SERVER_STORE": DataDirectory(data).url, "COUNTER_SERVER_HOST": "127.0.0.1"})
    assert after["objects"] == status.objects == len(app.extensions["counter_server"].declarations) > 0
    assert after["journal_bytes"] == sum(file.stat().st_size for file in data.glob("journal.sqlite3*"))
    assert after[f"manager_info{{durability=commit,epoch={status.epoch}}}"] == 1
    assert (after["up"], after["manager_starts_total"]) == (1, 1)


def test_the_surviving_worker_reports_a_killed_manager_and_worker(start_server: StartServer) -> None:
    server = start_server("--workers", "2")
    increment(server.url)
    (manager,) = server.children("manager")
    before = figures(server.url)
    assert (before["batches_total"], before["process_restarts_total{process=manager}"]) == (1, 0)
    killed = time.monotonic()
    os.kill(manager, signal.SIGKILL)
    os.kill(server.children("worker")[0], signal.SIGKILL)
    places = ("manager", "worker-1", "worker-2")

    def reported() -> dict[str, list[float]]:
        now = figures(server.url)
        kinds = ("up", "restarts_total", "uptime_seconds")
        return {kind: [now[f"process_{kind}{{process={place}}}"] for place in places] for kind in kinds}

    def manager_and_one_worker_restarted() -> bool:
        try:
            now = reported()
        except (OSError, HTTPException):  # the killed worker may have been about to answer
            return False
        manager, *workers = now["restarts_total"]
        return (manager, sorted(workers)) == (1, [0, 1]) and sum(now["up"]) == 3

    eventually(manager_and_one_worker_restarted, "the restarts, and the processes again")
    after = figures(server.url)
    assert (after["manager_starts_total"], after["counters"], after["batches_total"]) == (2, 1, 0)
    assert after["manager_uptime_seconds"] < time.monotonic() - killed  # it is a new manager
    uptimes, restarts = reported()["uptime_seconds"], reported()["restarts_total"]
    assert max(zip(uptimes, restarts, strict=True))[1] == 0  # the survivor is the oldest


def test_openmetrics_is_sent_on_request(server: Server) -> None:
    wish = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    status, headers, text = ask(server.url, "GET", "/metrics", headers={"Accept": wish})
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert headers["Cache-Control"] == "no-store"
    assert text.endswith("# EOF\n")
    assert set(parsed(text, openmetrics_parser.text_string_to_metric_families)) == set(figures(server.url))
    assert ask(server.url, "HEAD", "/metrics")[2] == ""


def test_the_operator_names_counters_by_options(start_server: StartServer) -> None:
    server = start_server("--workers", "1", "--metrics-counter", "orders.*", "--metrics-counter", "tickets")
    for name in ("orders.eu", "tickets", "other"):
        assert ask(server.url, "POST", f"/api/v1/counters/{name}/increment")[0] == 200
    found = {name: value for name, value in figures(server.url).items() if name.startswith("counter{")}
    assert found == {"counter{name=orders.eu}": 1, "counter{name=tickets}": 1}
    assert figures(server.url)["counters_cut"] == 0


def client_of(url: str, **config: object) -> FlaskClient:
    """Make a client of the application under another launcher, which may not start a manager."""
    return create_app({"COUNTER_SERVER_STORE": url, "COUNTER_SERVER_START": False, **config}).test_client()


def test_without_a_manager_there_is_one_figure_and_no_readiness_and_none_is_started(
    start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    manager = start_manager("--durability", "none")
    client = client_of(manager.url)
    assert client.get("/readyz").status_code == 200
    reported = parsed(client.get("/metrics").text)
    assert (reported["up"], reported["manager_starts_total"], reported["journal_bytes"]) == (1, 1, 0)
    assert not [name for name in reported if name.startswith("process_")]  # only a supervisor knows them
    manager.kill()
    assert parsed(client.get("/metrics").text) == {"up": 0}
    assert_not_ready(readyz_of(client), "has not answered")
    assert client.get("/livez").status_code == 200
    start_manager("--durability", "none")  # a new manager with a new epoch
    assert client.get("/readyz").status_code == 200
    assert parsed(client.get("/metrics").text)["up"] == 1
    other = create_app({"COUNTER_SERVER_STORE": f"{manager.url}/other", "SECRET_KEY": "k"})
    assert other.test_client().get("/metrics").status_code == 200
    assert not (data_dir / "other").exists()


@pytest.mark.parametrize("engine", ["sqlite", "memcached", "postgresql"])
def test_every_other_store_is_ready_and_up_without_figures(
    request: pytest.FixtureRequest, stack: ExitStack, tmp_path: Path, engine: str
) -> None:
    if engine == "postgresql":
        url = request.getfixturevalue("postgres").url
    elif engine == "memcached":
        url = stack.enter_context(MemcachedServer(tmp_path)).url
    else:
        url = f"sqlite:///{tmp_path}/counters.db"
    client = client_of(url)
    for _ in range(2):  # to connect may take longer than a probe
        eventually(lambda: client.get("/readyz").status_code == 200, "readiness")
        eventually(lambda: parsed(client.get("/metrics").text) == {"up": 1}, "its only figure")
    assert client.get("/api/v1/counters/ready%3F").status_code == 404


def test_a_redis_that_is_full_or_gone_is_not_ready_with_a_reason(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as redis:
        client = client_of(redis.url)
        assert client.get("/readyz").status_code == 200
        redis.command("CONFIG", "SET", "maxmemory", "1")
        assert_not_ready(readyz_of(client), "cannot write for now")
        assert parsed(client.get("/metrics").text) == {"up": 1}  # it answers
        redis.kill()
        assert_not_ready(readyz_of(client), "has not answered")
        assert parsed(client.get("/metrics").text) == {"up": 0}
        redis.start()
        eventually(lambda: client.get("/readyz").status_code == 200, "readiness, with redis there again")


def test_a_status_and_other_calls_do_not_wait_for_each_other(start_manager: Callable[..., Manager]) -> None:
    manager = start_manager()
    with open_client(manager.url, deadline=30) as state:
        state.counter("c").increment()
        proxy = cast(Any, state.store)
        with ThreadPoolExecutor(1) as thread, proxy._calling:  # held like a call that waits for its commit
            reported = thread.submit(state.status).result(PATIENCE)
        assert reported is not None
        assert (reported.pid, reported.counters) == (manager.pid, 1)


def test_a_manager_of_another_version_is_recognized(
    start_manager: Callable[..., Manager], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Newer(Status, frozen=True, kw_only=True):
        figure: int

    manager = start_manager()
    monkeypatch.setattr(client_module, "_decode_status", msgpack.Decoder(Newer).decode)
    with open_client(manager.url) as state, pytest.raises(Unsupported, match=r"another version.*figure"):
        state.status()


def _note_for_ever(processes: Processes) -> None:
    processes.note("one", 1)
    for number in range(2, 2**62):
        processes.note("two", None)
        processes.note("two", number)


def test_figures_of_a_process_are_never_mixed_with_those_of_the_next() -> None:
    processes = Processes(["one", "two"])
    assert [(process.pid, process.restarts, process.uptime) for process in processes()] == [(None, 0, 0.0)] * 2
    writer = multiprocessing.get_context("spawn").Process(target=_note_for_ever, args=(processes,))
    writer.start()
    try:
        eventually(lambda: processes()[1].restarts, "the writer at work")
        seen: list[list[Process]] = []

        def looked_often_enough() -> bool:
            seen.extend(processes() for _ in range(100))
            return len({two.pid for _, two in seen}) > 20 and len(seen) > 2_000

        eventually(looked_often_enough, "both running at the same time")
    finally:
        writer.kill()
        writer.join()
        writer.close()
    assert {(one.name, one.pid, one.restarts) for one, _ in seen} == {("one", 1, 0)}
    numbers = [two.pid for _, two in seen if two.pid is not None]
    assert len(numbers) < len(seen), "its end was never seen"
    assert all(two.restarts == two.pid - 2 for _, two in seen if two.pid is not None)
