"""Who may what on real servers: waitress, gunicorn and Flask's own, what they read from the outside, and their keys."""

import json
import os
import signal
import socket
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
from tests.processes import PATIENCE, Program, Server, end_manager
from tests.test_access import OTHER_NAMES, OTHER_TOKEN, OWN_NAMES, TOKEN, bearer, forwarded
from tests.test_server import address, ask, assert_not_started, read_all

COUNTER = "/api/v1/counters/x"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
APP = "from counter_server.server.web import create_app\napp = create_app({config})\n"

StartServer = Callable[..., Server]


def put(url: str, value: int, headers: dict[str, str] | None = None) -> int:
    """The status of the answer to a set."""
    body = json.dumps({"value": value}).encode()
    return ask(url, "PUT", COUNTER, body, {"Content-Type": "application/json", **(headers or {})})[0]


def value(url: str) -> int | None:
    status, _, text = ask(url, "GET", COUNTER)
    assert status in (200, 404), text
    return json.loads(text).get("value")  # type: ignore[no-any-return]


def sign_in(url: str, headers: dict[str, str] | None = None) -> str:
    """The cookie, with what is said about it."""
    body = b"token=" + TOKEN.replace("=", "%3D").replace("+", "%2B").encode()
    status, answered, text = ask(url, "POST", "/sign-in", body, {**FORM, **(headers or {})})
    assert status == 303, text
    assert answered["Set-Cookie"].startswith("session=")
    return answered["Set-Cookie"]


def with_cookie(cookie: str) -> dict[str, str]:
    return {"Cookie": cookie.partition(";")[0]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As most people start it: on loopback, with no token."""
    with Server("--workers", "1", "--data-dir", tmp_path_factory.mktemp("plain") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a token, behind a proxy."""
    options = ("--trusted-proxy", "1", "--allow-host", "counter.example")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
            data_dir = tmp_path_factory.mktemp("guarded") / "data"
            server = stack.enter_context(Server("--workers", "1", *options, "--data-dir", data_dir))
        yield server


def test_on_loopback_this_machine_sets_and_deletes_by_loopbacks_names_only(plain: Server) -> None:
    for number, name in enumerate(OWN_NAMES):
        assert put(plain.url, number, {"Host": name}) == 200
        assert value(plain.url) == number
    assert put(plain.url, 5) == 200
    for name in [*OTHER_NAMES, "[::::]", "[::1", "::1", "counter.example"]:
        status, headers, text = ask(plain.url, "DELETE", COUNTER, None, {"Host": name})
        # What may be two names is no request at all.
        assert (status, headers["Content-Type"]) == (400 if "," in name else 421, "application/problem+json"), name
        assert "," in name or "--allow-host" in json.loads(text)["detail"]
    assert value(plain.url) == 5
    assert ask(plain.url, "DELETE", COUNTER)[0] == 204
    assert value(plain.url) is None


@pytest.mark.parametrize("lines", ["", "Host: localhost\r\nHost: evil.example\r\n"])
def test_a_request_by_no_name_or_by_two_is_refused(plain: Server, lines: str) -> None:
    before = value(plain.url)
    with socket.create_connection(address(plain), timeout=PATIENCE) as connection:
        connection.sendall(f"POST {COUNTER}/increment HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
        assert read_all(connection).startswith("HTTP/1.1 400 ")
    assert value(plain.url) == before


@pytest.mark.parametrize("proto", ["https", "http"])
def test_what_a_proxy_says_holds_only_where_it_was_declared(plain: Server, guarded: Server, proto: str) -> None:
    headers = forwarded(proto=proto, host="counter.example")
    assert ("; Secure" in sign_in(guarded.url, headers)) is (proto == "https")
    _, visited, _ = ask(guarded.url, "GET", "/session", headers=headers)
    assert ("; Secure" in visited["Set-Cookie"]) is (proto == "https")
    _, visited, _ = ask(plain.url, "GET", "/session", headers=headers)
    assert "; Secure" not in visited["Set-Cookie"]
    own = {**headers, "Origin": f"{proto}://counter.example"}
    assert ask(guarded.url, "POST", "/session/inc", headers=own)[0] == 200
    assert ask(plain.url, "POST", "/session/inc", headers=own)[0] == 403


def test_a_server_with_a_token_takes_no_request_without_it(guarded: Server) -> None:
    assert put(guarded.url, 5, bearer(TOKEN)) == 200
    for headers in ({}, bearer(OTHER_TOKEN), bearer(TOKEN[:-1]), {"Cookie": f"session={TOKEN}"}):
        assert put(guarded.url, 6, headers) == 401
        status, answered, _ = ask(guarded.url, "DELETE", COUNTER, headers=headers)
        assert status == 401
        assert answered["Www-Authenticate"].startswith("Bearer ")  # as waitress writes it
        assert value(guarded.url) == 5
    assert put(guarded.url, 6, {"Host": "evil.example", **bearer(TOKEN)}) == 421
    assert put(guarded.url, 7, {"Host": "counter.example", **with_cookie(sign_in(guarded.url))}) == 200
    assert value(guarded.url) == 7


def test_a_cookie_holds_after_a_restart_on_every_worker_and_under_every_launcher(
    start_server: StartServer,
    stack: ExitStack,
    on_demand: str,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))
    first = start_server("--workers", "2")
    cookie = with_cookie(sign_in(first.url))
    session = with_cookie(ask(first.url, "POST", "/session/inc")[1]["Set-Cookie"])
    file = data_dir / "session.key"
    key = file.read_bytes()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first.stop() == 0

    second = start_server("--workers", "2")
    assert [put(second.url, number, cookie) for number in range(8)] == [200] * 8
    assert second.stop() == 0

    (tmp_path / "app.py").write_text(APP.format(config=""))
    for number, launcher in enumerate(("gunicorn, 4 sync workers", "flask run")):
        program, url = launch(stack, launcher, tmp_path)
        assert {put(url, number, cookie) for _ in range(8)} == {200}, launcher
        assert put(url, 99) == 401
        assert value(url) == number
        assert "counter is 0" in ask(url, "GET", "/session", headers=session)[2]  # it is the manager that is a new one
        assert cookie["Cookie"].partition("=")[2] not in sign_in(url)
        program.stop()
    assert file.read_bytes() == key
    end_manager(data_dir / "manager.lock")

    monkeypatch.setenv("COUNTER_SERVER_TOKEN", OTHER_TOKEN)
    third = start_server("--workers", "1")
    assert put(third.url, 99, cookie) == 401
    assert value(third.url) == 1


@pytest.mark.parametrize("store", [None, "sqlite:///{}/counters.db"])
def test_a_copied_cookie_is_ended_at_every_worker_and_after_every_restart(
    stack: ExitStack, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str | None
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))
    options = ("--workers", "2", *(("--store", store.format(tmp_path)) if store else ()))
    with Server(*options) as server:
        copied, kept = with_cookie(sign_in(server.url)), with_cookie(sign_in(server.url))
        assert {put(server.url, 1, cookie) for cookie in (copied, kept) for _ in range(8)} == {200}
        for cookie in (copied, {"Cookie": "session=nonsense.nonsense.nonsense"}, {}):
            assert ask(server.url, "POST", "/sign-out", b"", {**FORM, **cookie})[0] == 303
        for child in server.children("manager"):
            os.kill(child, signal.SIGKILL)
        assert {put(server.url, 2, copied) for _ in range(8)} == {401}
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    with Server(*options) as server:
        assert {put(server.url, 3, copied) for _ in range(8)} == {401}
        assert {put(server.url, 4, kept) for _ in range(8)} == {200}
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
    """The status of the answer to who gives this token; a refusal to answer says when to come back."""
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
def test_tokens_can_be_guessed_ten_times_a_minute_from_one_address(
    stack: ExitStack, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """By whichever way, at whichever worker; a store that hosts nothing has each worker count by itself."""
    data = ("--data-dir", str(tmp_path / "data")) if "--store" not in options else ()
    environment = {"COUNTER_SERVER_TOKEN": TOKEN, "COUNTER_SERVER_DATA_DIR": str(tmp_path / "data")}
    server = stack.enter_context(
        Server(*(option.format(tmp_path) for option in options), *data, "--trusted-proxy", "1", environment=environment)
    )
    ways = ["form", "PUT", "DELETE"]
    with ThreadPoolExecutor(8) as several:
        answers = list(several.map(lambda number: try_token(server.url, OTHER_TOKEN, ways[number % 3]), range(60)))
    assert sorted(answers) == [401] * 10 + [429] * 50
    for way in ways:
        assert try_token(server.url, TOKEN, way) == 429  # else who guesses would see it
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
    with ThreadPoolExecutor(8) as several:
        answers = list(
            several.map(lambda n: try_token(server.url, OTHER_TOKEN, headers={FROM: f"198.51.100.{n}"}), range(150))
        )
    assert sorted(answers) == [401] * 100 + [429] * 50
    assert try_token(server.url, TOKEN, headers={FROM: "203.0.113.1"}) == 429
    assert try_token(server.url, TOKEN, "PUT", operator) == 200
    assert put(server.url, 1) == 401  # who gives no token guesses nothing


def test_a_page_tells_no_more_about_a_token_than_the_api(start_server: StartServer, stack: ExitStack) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
        server = start_server("--workers", "2")
    answers = [ask(server.url, "GET", "/sign-in", headers=bearer(OTHER_TOKEN)) for _ in range(20)]
    assert [status for status, _, _ in answers] == [200] * 10 + [429] * 10
    assert ask(server.url, "GET", "/sign-in", headers=bearer(TOKEN))[0] == 429
    assert ask(server.url, "GET", "/sign-in")[0] == 200


@pytest.mark.parametrize(("config", "status"), [("", 403), ('{"COUNTER_SERVER_HOST": "127.0.0.1"}', 200)])
def test_under_another_launcher_set_and_delete_are_off_until_it_says_where_it_is_bound(
    stack: ExitStack, data_dir: Path, on_demand: str, tmp_path: Path, config: str, status: int
) -> None:
    (tmp_path / "app.py").write_text(APP.format(config=config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COUNTER_SERVER_STORE", on_demand)
        _, url = launch(stack, "gunicorn, 4 sync workers", tmp_path)
    assert ask(url, "POST", f"{COUNTER}/increment")[0] == 200
    assert put(url, 5) == status
    assert value(url) == (5 if status == 200 else 1)
    assert (data_dir / "session.key").exists()


def test_a_store_without_a_directory_has_its_key_in_the_data_directory_all_the_same(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(data_dir))
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", TOKEN)
    cookie: dict[str, str] = {}
    for number in range(2):
        with Server("--workers", "2", "--store", f"sqlite:///{tmp_path}/counters.db") as server:
            cookie = cookie or with_cookie(sign_in(server.url))
            assert {put(server.url, number, cookie) for _ in range(8)} == {200}
            assert server.stop() == 0
    assert [file.name for file in data_dir.iterdir()] == ["session.key"]
    assert stat.S_IMODE((data_dir / "session.key").stat().st_mode) == 0o600


# What cannot be, told at the start


@pytest.mark.parametrize("token", ["", "too-short", "with a space in the middle"])
def test_a_token_that_is_none_stops_the_start_in_one_line(
    stack: ExitStack, data_dir: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTER_SERVER_TOKEN", token)
    program = stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir))
    assert_not_started(program, "COUNTER_SERVER_TOKEN is not a token")
    assert len(program.errors) == 1
    assert not token or token not in program.errors[0]


def test_a_data_directory_that_cannot_be_made_stops_the_start_in_one_line(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COUNTER_SERVER_DATA_DIR", str(tmp_path / "file" / "data"))
    program = stack.enter_context(Program("run.py", "--port", "0", "--store", f"sqlite:///{tmp_path}/counters.db"))
    assert_not_started(program, f"the data directory {tmp_path}/file/data cannot be made")
    assert len([line for line in program.errors if " INFO " not in line]) == 1


def test_a_key_that_cannot_be_made_is_told_in_one_line() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, where nobody makes a file")
    with pytest.raises(StartupError, match=r"the key /proc/self/session\.key cannot be made or read: ") as caught:
        DataDirectory("/proc/self").key("session")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [("--allow-host", "http://x"), ("--allow-host", ""), ("--trusted-proxy", "-1")])
def test_an_option_that_cannot_be_stops_the_start(stack: ExitStack, data_dir: Path, option: tuple[str, str]) -> None:
    program = stack.enter_context(Program("run.py", "--port", "0", "--data-dir", data_dir, *option))
    assert program.wait() in (1, 2)
    assert program.errors[-1].startswith("Error: ")
    assert not data_dir.exists()
