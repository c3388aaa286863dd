"""The lab: its wrong strategies are really wrong, its right ones always right, and it leaves nothing behind."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from flask.testing import FlaskClient
from itsdangerous.timed import TimestampSigner
from werkzeug.datastructures import Headers
from werkzeug.exceptions import ServiceUnavailable

from counter_server.server.strategies import YIELD_SECONDS, SomeObj
from counter_server.server.web import create_app
from counter_server.server.web.lab import FORGOTTEN, Memory, is_over
from tests.load import at_once
from tests.processes import Server, eventually
from tests.test_server import ask

CLIENTS = 50
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@dataclass(frozen=True)
class Answer:
    number: int
    worker: int
    read: int | None
    began: float
    ended: float


def post(url: str, path: str, form: str = "", cookie: str = "") -> tuple[Headers, Any]:
    status, got, text = ask(url, "POST", path, form.encode(), {**FORM, "Cookie": cookie})
    assert status in (200, 201), text
    return got, json.loads(text)


def begin(url: str, strategy: str) -> Any:
    return post(url, "/lab/runs", f"strategy={strategy}&clients={CLIENTS}")[1]


def play(url: str, strategy: str) -> list[Answer]:
    """Make a whole run, with all clients at once, and return their answers."""
    run = begin(url, strategy)
    answers = at_once(CLIENTS, lambda: Answer(**post(url, run["ask"])[1]))
    assert ask(url, "DELETE", run["run"])[0] == 204
    return answers


def numbers(answers: list[Answer]) -> list[int]:
    return sorted(answer.number for answer in answers)


def raced(one: Answer, other: Answer) -> bool:
    """Return whether both had read before either wrote, and so got the same number."""
    together = one.began < other.ended and other.began < one.ended
    return one is not other and together and one.number == other.number


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory for the data of `two`, and for the temporary files of its servers."""
    path = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(path))
        yield path


@pytest.fixture(scope="module")
def two(scratch: Path) -> Iterator[str]:
    """Return the URL of a server with two workers."""
    with Server("--workers", "2", "--data-dir", scratch / "data") as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["global", "file"])
def test_threads_that_read_before_another_has_written_get_the_same_number(two: str, strategy: str) -> None:
    answers = play(two, strategy)
    assert len(set(numbers(answers))) < CLIENTS
    assert all(answer.number == (answer.read or 0) + 1 for answer in answers)
    assert all(answer.ended - answer.began >= YIELD_SECONDS for answer in answers)
    assert any(raced(one, other) for one in answers for other in answers if one.worker == other.worker)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["lock", "value"])
def test_a_lock_in_each_of_two_workers_keeps_each_to_itself(two: str, strategy: str) -> None:
    def play_on_both() -> list[list[int]] | None:
        """Return the numbers that each worker gave: of clients that connect at once, one worker may get all."""
        answers = play(two, strategy)
        workers = {answer.worker for answer in answers}
        return (
            [numbers([a for a in answers if a.worker == worker]) for worker in workers] if len(workers) == 2 else None
        )

    for own in eventually(play_on_both, "a run on both workers") or []:
        assert own == list(range(1, len(own) + 1))


@pytest.mark.slow
def test_a_session_gives_one_number_to_all_requests_with_the_same_cookie(two: str) -> None:
    run = begin(two, "session")
    cookie = ""
    for expected in (1, 2, 3):  # one after the other it counts
        headers, answer = post(two, run["ask"], cookie=cookie)
        assert answer["number"] == expected
        cookie, *rest = headers["Set-Cookie"].split("; ")
        assert cookie.startswith("session_lab=")  # not the visitor's own
        assert {"HttpOnly", "Path=/lab", "SameSite=Lax"} <= set(rest)
    together = at_once(CLIENTS, lambda: Answer(**post(two, run["ask"], cookie=cookie)[1]))
    assert set(numbers(together)) == {4}


@pytest.mark.slow
def test_ours_gives_each_number_once_beside_every_wrong_way_and_leaves_nothing(two: str, scratch: Path) -> None:
    for strategy in ("global", "lock", "file", "session", "value"):
        runs = [begin(two, strategy)["run"], begin(two, "store")["run"]]
        turns = SimpleQueue[str]()
        for _ in range(CLIENTS):
            for run in runs:
                turns.put(run)

        def take_turn(turns: SimpleQueue[str] = turns) -> tuple[str, int]:
            run = turns.get()
            return run, post(two, f"{run}/clients")[1]["number"]

        taken = at_once(2 * CLIENTS, take_turn)
        wrong, ours = (sorted(number for run, number in taken if run == side) for side in runs)
        assert ours == list(range(1, CLIENTS + 1))
        assert len(wrong) == CLIENTS
        assert set(wrong) <= set(ours)
        assert [ask(two, "DELETE", run)[0] for run in runs] == [204, 204]
    assert "lab/" not in ask(two, "GET", "/api/v1/counters")[2]
    (data_dir,) = scratch.iterdir()
    assert list((data_dir / "lab").iterdir()) == []


def make_client(data_dir: Path, store: str = "memory://", **config: object) -> FlaskClient:
    config = {"STORE": store, "DATA_DIR": str(data_dir), "LAB": True, **config}
    return create_app({f"COUNTER_SERVER_{name}": value for name, value in config.items()}).test_client()


@pytest.fixture
def client(data_dir: Path) -> FlaskClient:
    return make_client(data_dir)


def started(client: FlaskClient, strategy: str) -> Any:
    response = client.post("/lab/runs", data={"strategy": strategy, "clients": "100"})
    assert response.status_code == 201
    return response.json


def count(client: FlaskClient, run: Any) -> int:
    """Return the number that a client of a run gets."""
    response = client.post(run["ask"])
    assert response.status_code == 200
    return int(response.get_json()["number"])


def test_each_run_begins_at_one_and_knows_nothing_of_another(client: FlaskClient) -> None:
    for strategy in ("global", "lock", "file", "value", "store"):
        runs = [started(client, strategy) for _ in range(2)]
        assert [count(client, run) for _ in range(2) for run in runs] == [1, 1, 2, 2]
        assert [client.delete(run["run"]).status_code for run in runs] == [204, 204]
    for _ in range(2):
        run = started(client, "session")
        assert [count(client, run) for _ in range(3)] == [1, 2, 3]  # the client keeps the cookie


def test_our_side_is_the_configured_store_and_every_way_works_without_other_extras(
    client: FlaskClient, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("cachelib", "flask_caching", "gevent", "gunicorn", "matplotlib", "rich"):  # of the extra `demo`
        monkeypatch.setitem(sys.modules, package, None)
    assert "memory:// is each worker process's own" in started(client, "store")["wrong"]
    sqlite = make_client(data_dir, f"sqlite:///{data_dir}.db")
    page = sqlite.get("/lab").text
    assert "one number for all, in the store, sqlite://" in page
    ways = re.findall(r'name="strategy" id="[^"]+" value="(\w+)"', page)
    assert len(ways) == page.count('type="radio"') >= 5
    assert started(sqlite, "store")["place"] == "the store, sqlite://"
    for strategy in ways:
        runs = [started(sqlite, name) for name in (strategy, "store")]
        assert [count(sqlite, run) for _ in range(2) for run in runs] == [1, 1, 2, 2]


def test_a_link_selects_the_wrong_way_and_the_number_of_clients(client: FlaskClient) -> None:
    assert re.findall(r'value="(\w+)"[^>]* checked', client.get("/lab").text) == ["global"]
    page = client.get("/lab?strategy=lock&clients=40").text
    assert re.findall(r'value="(\w+)"[^>]* checked', page) == ["lock"]
    assert re.search('id="clients"[^>]* value="40"', page)
    response = client.get("/lab?strategy=store")  # which is on the page beside each of them
    assert (response.status_code, response.get_json()["title"]) == (400, "InvalidRequest")


@pytest.fixture
def long_ago(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Put back the clock that runs are signed with, by a number of seconds."""

    def put_back(seconds: int) -> None:
        monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda _: int(time.time()) - seconds)

    return put_back


def test_the_data_of_old_runs_is_removed_when_another_run_begins(
    client: FlaskClient, long_ago: Callable[[int], None], data_dir: Path
) -> None:
    state = client.application.extensions["counter_server"]
    state.counter("lab/mine").increment()
    for seconds, left in ((FORGOTTEN + 2, 0), (0, 1)):
        long_ago(seconds)
        for strategy in ("file", "store"):
            assert count(client, started(client, strategy)) == 1
        long_ago(0)
        for strategy in ("file", "store"):
            started(client, strategy)
        assert len(list((data_dir / "lab").glob("*/param"))) == left
        assert len([name for name, _ in state.counters().counters if name != "lab/mine"]) == left
    assert state.counter("lab/mine").value == 1


def test_the_files_are_for_this_user_only(client: FlaskClient, data_dir: Path) -> None:
    run = started(client, "file")
    assert count(client, run) == 1
    (directory,) = (data_dir / "lab").iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "param").read_text() == "1"  # and no pickle
    assert client.delete(run["run"]).status_code == 204
    assert list((data_dir / "lab").iterdir()) == []
    assert client.post(run["ask"]).status_code == 410


def test_no_directory_of_another_is_used_for_files(client: FlaskClient, data_dir: Path, tmp_path: Path) -> None:
    choice = {"strategy": "file", "clients": "1"}
    theirs, lab = tmp_path / "theirs", data_dir / "lab"
    theirs.mkdir()
    data_dir.mkdir(0o700)
    lab.symlink_to(theirs)
    assert client.post("/lab/runs", data=choice).status_code == 503
    lab.unlink()
    lab.mkdir()
    lab.chmod(0o777)
    assert client.post("/lab/runs", data=choice).status_code == 503
    assert list(theirs.iterdir()) == list(lab.iterdir()) == []


def test_a_run_is_over_after_a_minute(client: FlaskClient, long_ago: Callable[[int], None]) -> None:
    long_ago(62)
    run = started(client, "global")["ask"]
    assert client.post(run).status_code == 200
    long_ago(0)
    response = client.post(run)
    assert (response.status_code, response.mimetype) == (410, "application/problem+json")
    assert "start another" in response.text
    for unknown in ("/lab/runs/x/clients", run.replace("/clients", "x/clients"), run.replace("runs/", "runs/x")):
        response = client.post(unknown)
        assert (response.status_code, response.mimetype) == (404, "application/problem+json")


def test_an_invalid_choice_is_refused(client: FlaskClient) -> None:
    bad_clients = ("", "0", "101", "-1", "1.5", "1e2", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 4300)
    choices = [*(("global", clients) for clients in bad_clients), ("", "100"), ("__class__", "100")]
    for strategy, clients in choices:
        choice = {"strategy": strategy, "clients": clients}
        for response in (client.post("/lab/runs", data=choice), client.get("/lab", query_string=choice)):
            assert (response.status_code, response.get_json()["title"]) == (400, "InvalidRequest")
        assert client.post("/lab/runs", json=choice).status_code == 400


def test_other_sites_and_other_methods_start_nothing(client: FlaskClient) -> None:
    run = started(client, "store")
    for path in ("/lab/runs", run["ask"]):
        assert client.post(path, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert client.get(path).status_code == 405
    assert client.delete(run["run"], headers={"Origin": "http://elsewhere"}).status_code == 403
    assert count(client, run) == 1


@pytest.mark.slow
def test_a_worker_keeps_a_hundred_runs_and_forgets_none_of_them_for_another() -> None:
    memory = Memory()
    runs = [f"{number}-x" for number in range(101)]

    def count(run: str) -> int:
        return memory.take_of(run, lambda: SomeObj().take)().number

    assert {count(run) for run in runs[:100]} == {1}
    with pytest.raises(ServiceUnavailable):
        count(runs[100])
    assert {count(run) for run in runs[:100]} == {2}
    memory.forget(runs[0])
    assert count(runs[100]) == 1


def test_only_the_names_of_runs_that_are_over_count_as_over() -> None:
    now, nonce = int(time.time()), "0123456789abcdef"
    assert is_over(f"{now - FORGOTTEN - 2}-{nonce}")
    for other in (f"{now}-{nonce}", f"{now - 60}-{nonce}", f"-1-{nonce}", f"{'9' * 5000}-{nonce}"):
        assert not is_over(other)
    for other in ("1-mine", f"1-{nonce}x", ""):
        assert not is_over(other)


def test_the_lab_is_on_if_configured_or_if_only_this_machine_can_connect() -> None:
    for host, wanted, on in [
        *(("127.0.0.1", None, True), ("0.0.0.0", None, False), (None, None, False)),  # other hosts: `test_access`
        *(("127.0.0.1", False, False), ("0.0.0.0", True, True), (None, True, True)),
    ]:
        config = {"COUNTER_SERVER_HOST": host, "COUNTER_SERVER_LAB": wanted, "COUNTER_SERVER_STORE": "memory://"}
        client = create_app({name: value for name, value in config.items() if value is not None}).test_client()
        assert ('href="/lab"' in client.get("/").text) == on
        run = "/lab/runs/x"
        for method, path in (("GET", "/lab"), ("POST", "/lab/runs"), ("POST", f"{run}/clients"), ("DELETE", run)):
            response = client.open(path, method=method)
            assert response.status_code != 404 or response.mimetype == "application/problem+json"
            assert ("the lab is off" in response.text and "run --lab" in response.text) == (not on)


@pytest.mark.slow
def test_the_command_line_turns_it_on_and_off(start_server: Callable[..., Server]) -> None:
    off = start_server("--workers", "1", "--no-lab")
    assert ask(off.url, "GET", "/lab")[0] == 404
    off.stop()
    on = start_server("--workers", "1", "--host", "0.0.0.0", "--lab").url.replace("0.0.0.0", "127.0.0.1")
    answers = play(on, "lock")  # which is enough for one worker
    assert numbers(answers) == list(range(1, CLIENTS + 1))
    assert not any(raced(one, other) for one in answers for other in answers)
