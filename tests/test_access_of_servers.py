"""Who may what on real servers: waitress, gunicorn and Flask's own, what they read from the outside, and their keys."""

import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from counter_server.errors import StartupError
from counter_server.manager.directory import DataDirectory
from tests.launchers import launch
from tests.processes import Program, Server
from tests.test_access import OTHER_TOKEN, TOKEN, bearer, forwarded
from tests.test_server import ask, assert_not_started

pytestmark = pytest.mark.slow

COUNTER = "/api/v1/counters/x"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
APP = "from counter_server.server.web import create_app\napp = create_app({config})\n"

StartServer = Callable[..., Server]


def put(url: str, value: int, headers: dict[str, str] | None = None) -> int:
    """Return the status of the answer to a set."""
    body = json.dumps({"value": value}).encode()
    return ask(url, "PUT", COUNTER, body, {"Content-Type": "application/json", **(headers or {})})[0]


def value(url: str) -> int | None:
    status, _, text = ask(url, "GET", COUNTER)
    assert status in (200, 404), text
    return json.loads(text).get("value")  # type: ignore[no-any-return]


def sign_in(url: str, headers: dict[str, str] | None = None) -> str:
    """Return the cookie, with its attributes."""
    body = b"token=" + TOKEN.replace("=", "%3D").replace("+", "%2B").encode()
    status, answered, text = ask(url, "POST", "/sign-in", body, {**FORM, **(headers or {})})
    assert status == 303, text
    assert answered["Set-Cookie"].startswith("counter_server_sign_in=")
    return answered["Set-Cookie"]


def with_cookie(cookie: str) -> dict[str, str]:
    return {"Cookie": cookie.partition(";")[0]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("--workers", "1", "--data-dir", tmp_path_factory.mktemp("plain") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server with a token, behind a proxy."""
    data_dir = tmp_path_factory.mktemp("guarded") / "data"
    options = ("--workers", "1", "--trusted-proxy", "1", "--allow-host", "counter.example", "--data-dir", data_dir)
    with Server(*options, environment={"COUNTER_SERVER_TOKEN": TOKEN}) as server:
        yield server


def test_forwarded_headers_count_only_behind_a_declared_proxy(plain: Server, guarded: Server) -> None:
    for proto in ("https", "http"):
        headers = forwarded(proto=proto, host="counter.example")
        assert ("; Secure" in sign_in(guarded.url, headers)) is (proto == "https")
        own = {**headers, "Origin": f"{proto}://counter.example"}
        status, visited, _ = ask(guarded.url, "POST", "/session/inc", headers=own)
        assert (status, "; Secure" in visited["Set-Cookie"]) == (200, proto == "https")
        assert ask(plain.url, "POST", "/session/inc", headers=own)[0] == 403
        assert "; Secure" not in ask(plain.url, "GET", "/session", headers=headers)[1]["Set-Cookie"]


def test_a_cookie_holds_under_every_launcher(
    stack: ExitStack, on_demand: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))
    with Server("--workers", "2") as server:
        cookie = with_cookie(sign_in(server.url))
        key = (data_dir / "session.key").read_bytes()
        assert server.stop() == 0
    (tmp_path / "app.py").write_text(APP.format(config=""))
    for number, launcher in enumerate(("gunicorn, 4 sync workers", "flask run")):
        program, url = launch(stack, launcher, tmp_path)
        assert {put(url, number, cookie) for _ in range(8)} == {200}, launcher
        assert put(url, 99) == 401
        assert value(url) == number
        program.stop()
    assert (data_dir / "session.key").read_bytes() == key


@pytest.mark.parametrize("store", [None, "sqlite:///{}/counters.db"])
def test_a_copied_cookie_is_ended_at_every_worker_and_after_every_restart(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str | None
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))
    options = ("--workers", "2", *(("--store", store.format(tmp_path)) if store else ()))
    with Server(*options) as server:
        copied, kept = with_cookie(sign_in(server.url)), with_cookie(sign_in(server.url))
        assert {put(server.url, 1, cookie) for cookie in (copied, kept) for _ in range(8)} == {200}
        for cookie in (copied, {"Cookie": "counter_server_sign_in=nonsense.nonsense.nonsense"}, {}):
            assert ask(server.url, "POST", "/sign-out", b"", {**FORM, **cookie})[0] == 303
        for child in server.children("manager"):
            os.kill(child, signal.SIGKILL)
        assert {put(server.url, 2, copied) for _ in range(8)} == {401}
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    with Server(*options) as server:
        assert {put(server.url, 3, copied) for _ in range(8)} == {401}
        assert {put(server.url, 4, kept) for _ in range(8)} == {200}
    files = {"session.key", "signed-out"}  # a store without a directory has its key in the data directory, too
    assert {file.name for file in data_dir.iterdir()} == files if store else files <= {*os.listdir(data_dir)}
    assert stat.S_IMODE((data_dir / "session.key").stat().st_mode) == 0o600
    (ended,) = (data_dir / "signed-out").iterdir()  # nobody without a cookie makes any
    assert stat.S_IMODE(ended.parent.stat().st_mode) == 0o700
    assert ended.name not in copied["Cookie"]
    long_ago = time.time() - 4 * 24 * 3600
    os.utime(ended, (long_ago, long_ago))
    with Server(*options) as server:
        assert ask(server.url, "POST", "/sign-out", b"", {**FORM, **kept})[0] == 303
        assert put(server.url, 5, kept) == 401
    assert not ended.exists()  # its cookie expired long ago


def test_a_sign_in_whose_end_cannot_be_written_is_not_said_to_have_ended(
    start_server: StartServer, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    server = start_server("--workers", "1")
    cookie = with_cookie(sign_in(server.url))
    in_the_way = data_dir / "signed-out"
    in_the_way.touch()
    status, headers, text = ask(server.url, "POST", "/sign-out", b"", {**FORM, **cookie})
    assert (status, json.loads(text)["outcome"]) == (503, "not_applied")
    assert "Set-Cookie" not in headers
    assert put(server.url, 1, cookie) == 200
    in_the_way.unlink()
    assert ask(server.url, "POST", "/sign-out", b"", {**FORM, **cookie})[0] == 303
    assert put(server.url, 1, cookie) == 401


# Guessing

FROM = "X-Forwarded-For"


def try_token(url: str, token: str, way: str = "form", headers: dict[str, str] | None = None) -> int:
    """Return the status of the answer to this token; a refusal to answer says when to come back."""
    if way == "form":
        method, path, body, sent = "POST", "/sign-in", f"token={token.replace('=', '%3D').replace('+', '%2B')}", FORM
    else:
        method, path, body, sent = way, COUNTER, '{"value": 1}', {"Content-Type": "application/json", **bearer(token)}
    status, told, text = ask(url, method, path, body.encode(), {**sent, **(headers or {})})
    if status == 429:
        assert 1 <= int(told["Retry-After"]) <= 60
        assert json.loads(text)["outcome"] == "not_applied"
    return status


@pytest.mark.parametrize("options", [("--workers", "2"), ("--workers", "1", "--store", "sqlite:///{}/counters.db")])
def test_tokens_can_be_guessed_ten_times_a_minute_from_one_address(tmp_path: Path, options: tuple[str, ...]) -> None:
    """By any way, at any worker. If the store hosts no objects, each worker counts by itself."""
    environment = {"COUNTER_SERVER_TOKEN": TOKEN, "COUNTER_SERVER_DATA_DIR": str(tmp_path / "data")}
    formatted = [option.format(tmp_path) for option in options]
    ways = ["form", "PUT", "DELETE"]
    with Server(*formatted, "--trusted-proxy", "1", environment=environment) as server, ThreadPoolExecutor(8) as many:
        answers = list(many.map(lambda number: try_token(server.url, OTHER_TOKEN, ways[number % 3]), range(60)))
        assert sorted(answers) == [401] * 10 + [429] * 50
        for way in ways:
            assert try_token(server.url, TOKEN, way) == 429  # else a guesser would see it
            assert try_token(server.url, TOKEN, way, {FROM: "192.0.2.1"}) in (303, 200, 204)
        for number in range(25):  # an operator who mistypes it now and then
            assert try_token(server.url, OTHER_TOKEN, "form", {FROM: "192.0.2.1"}) == 401
            assert try_token(server.url, TOKEN, ways[number % 2], {FROM: "192.0.2.1"}) in (303, 200)


def test_many_addresses_together_guess_no_more_than_a_hundred_times_a_minute(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    server = start_server("--workers", "2", "--trusted-proxy", "1")
    operator = {FROM: "192.0.2.1"}
    assert try_token(server.url, TOKEN, "PUT", operator) == 200
    with ThreadPoolExecutor(8) as many:
        senders = [{FROM: f"198.51.100.{number}"} for number in range(150)]
        answers = list(many.map(lambda sender: try_token(server.url, OTHER_TOKEN, headers=sender), senders))
    assert sorted(answers) == [401] * 100 + [429] * 50
    assert try_token(server.url, TOKEN, headers={FROM: "203.0.113.1"}) == 429
    assert try_token(server.url, TOKEN, "PUT", operator) == 200
    assert put(server.url, 1) == 401  # without a token nothing is guessed


def test_under_another_launcher_set_and_delete_need_the_bound_address(
    stack: ExitStack, data_dir: Path, on_demand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_STORE", on_demand)
    for config, status in (("", 403), ('{"COUNTER_SERVER_HOST": "127.0.0.1"}', 200)):
        (tmp_path / "app.py").write_text(APP.format(config=config))
        program, url = launch(stack, "gunicorn, 4 sync workers", tmp_path)
        assert put(url, 1 if status == 200 else 5) == status
        ask(url, "POST", f"{COUNTER}/increment")
        assert value(url) == (2 if status == 200 else 1)
        program.stop()
    assert (data_dir / "session.key").exists()


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ((), {"COUNTER_SERVER_TOKEN": "has a space"}, "COUNTER_SERVER_TOKEN is not a token"),
        (("--store", "sqlite:////tmp/x.db"), {"COUNTER_SERVER_DATA_DIR": "/dev/null/x"}, "/dev/null/x cannot be made"),
        (("--allow-host", "http://x"), {}, ""),
    ],
)
def test_an_invalid_setting_stops_the_start_in_one_line(
    stack: ExitStack, data_dir: Path, options: tuple[str, ...], environment: dict[str, str], reason: str
) -> None:
    environment = {"COUNTER_SERVER_DATA_DIR": str(data_dir), **environment}
    program = stack.enter_context(Program("run.py", "--port", "0", *options, environment=environment))
    assert_not_started(program, reason)
    assert len([line for line in program.errors if " INFO " not in line]) == 1
    assert "has a space" not in program.errors[-1]
    assert not data_dir.exists()


def test_a_key_that_cannot_be_made_is_an_error() -> None:
    with pytest.raises(StartupError, match=r"the key /proc/\d+/session\.key cannot be made or read: "):
        DataDirectory("/proc/self").key("session")
