"""The command line works in real processes with real managers, and reports each mistake in one line."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from counter_server import open_state
from counter_server.cli import main
from counter_server.state import State
from tests.processes import PATIENCE, ROOT, Manager, Program

Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]

ANOTHER_UID = 12345
OVER_107_BYTES = "/".join(["x" * 100] * 3)

BEFORE = {"visits": 7, "full": 3}


def _environment(**variables: str) -> dict[str, str]:
    """Return our environment without the developer's settings of this package."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("COUNTER_SERVER_")}
    return {**mine, "PYTHONPATH": str(ROOT), **variables}


def _start(cwd: Path, *arguments: str | bytes | Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "counter_server", *arguments],
        cwd=cwd,
        env=_environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str]) -> Result:
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):  # it has usually exited
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run the command in an empty directory, with arguments and environment variables."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def run(*arguments: str | bytes | Path, **variables: str) -> Result:
        with _start(cwd, *arguments, **variables) as process:
            return _finish(process)

    return run


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """Return a manager for all tests that do not disturb it."""
    with Manager(tmp_path_factory.mktemp("cli") / "data", "--durability", "process") as manager:
        yield manager


@pytest.fixture
def state(manager: Manager) -> Iterator[State]:
    """Return the state of `manager` without the command line, with exactly the counters `BEFORE`."""
    with closing(open_state(manager.url, deadline=PATIENCE)) as state:
        for name, _ in state.counters(limit=1000).counters:
            state.counter(name).delete()
        for name, value in BEFORE.items():
            state.counter(name).set(value)
        yield state


def all_counters(state: State) -> dict[str, int]:
    return dict(state.counters(limit=1000).counters)


def assert_answered(result: Result, output: str) -> None:
    assert (result.returncode, result.stdout, result.stderr) == (0, output, "")


def assert_refused(result: Result) -> str:
    """Check that the command failed with one line, and return it. A usage error may print the usage too."""
    assert result.returncode in (1, 2, 75), result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    if result.returncode == 2:
        lines = [line for line in lines if line and not line.startswith(("Usage: ", "Try "))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert len(lines[0]) > len("Error: ") + 10
    return lines[0]


# Correct use


def test_the_commands_increment_get_set_delete_and_list(cli: Cli, manager: Manager, state: State) -> None:
    where = ("--store", manager.url)
    assert_answered(cli("increment", "x", *where), "1\n")
    assert_answered(cli("increment", "--by", "5", "x", *where), "6\n")
    assert_answered(cli("increment", "x", "--by", "-8", *where), "-2\n")
    assert_answered(cli("get", "x", *where), "-2\n")
    assert_answered(cli("set", "x", "-3", *where), "-3\n")
    assert_answered(cli("list", *where), "full\t3\nvisits\t7\nx\t-3\n")
    assert_answered(cli("delete", "x", *where), "")
    assert "there is no counter 'x'" in assert_refused(cli("get", "x", *where))
    assert "there is no counter 'x'" in assert_refused(cli("delete", "x", *where))
    assert all_counters(state) == BEFORE


def test_counters_reach_their_bounds_and_do_not_cross_them(cli: Cli, manager: Manager, state: State) -> None:
    where = ("--store", manager.url)
    assert_answered(cli("increment", "full", "--by", "2", "--maximum", "5", *where), "5\n")
    assert "above 5" in assert_refused(cli("increment", "full", "--maximum", "5", *where))
    assert_answered(cli("increment", "full", "--by", "-6", "--minimum", "-1", *where), "-1\n")
    assert "below -1" in assert_refused(cli("increment", "full", "--by", "-1", "--minimum", "-1", *where))
    assert all_counters(state) == {**BEFORE, "full": -1}


def test_a_repeated_key_is_counted_once(cli: Cli, manager: Manager, state: State) -> None:
    request = ("increment", "x", "--store", manager.url, "--key", "k-cli")
    assert_answered(cli(*request), "1\n")
    assert_answered(cli("increment", "x", "--store", manager.url), "2\n")
    assert_answered(cli(*request), "1\n")
    assert "another request" in assert_refused(cli(*request, "--by", "2"))
    assert all_counters(state) == {**BEFORE, "x": 2}


@pytest.mark.parametrize("name", ["счётчик", "🐦", " ", "a/b//c", "50%", "--", "-x", "--by"])
def test_any_name_can_follow_two_hyphens(cli: Cli, manager: Manager, state: State, name: str) -> None:
    assert_answered(cli("increment", "--store", manager.url, "--", name), "1\n")
    assert_answered(
        cli("list", "--store", manager.url), "".join(f"{n}\t{v}\n" for n, v in sorted({**BEFORE, name: 1}.items()))
    )
    assert all_counters(state) == {**BEFORE, name: 1}


def test_list_prints_more_counters_than_fit_on_a_page(cli: Cli, manager: Manager, state: State) -> None:
    for name in BEFORE:
        state.counter(name).delete()
    expected = [(f"{number:04}", number) for number in range(1001)]
    for name, value in expected:
        state.counter(name).set(value)
    assert_answered(cli("list", "--store", manager.url), "".join(f"{name}\t{value}\n" for name, value in expected))
    for name, _ in expected:
        state.counter(name).delete()


def test_list_without_counters_prints_nothing(cli: Cli, manager: Manager, state: State) -> None:
    for name in BEFORE:
        state.counter(name).delete()
    assert_answered(cli("list", "--store", manager.url), "")


def test_options_and_environment_variables_name_the_store(
    cli: Cli, manager: Manager, state: State, tmp_path: Path
) -> None:
    directory = manager.url.removeprefix("manager://")
    nowhere = str(tmp_path / "nowhere")
    assert_answered(cli("increment", "x", "--data-dir", directory), "1\n")
    assert_answered(cli("increment", "x", COUNTER_SERVER_STORE=manager.url), "2\n")
    assert_answered(cli("increment", "x", COUNTER_SERVER_DATA_DIR=directory), "3\n")
    assert_answered(cli("increment", "x", "--store", "manager://", COUNTER_SERVER_DATA_DIR=directory), "4\n")
    assert_answered(cli("increment", "x", "--store", manager.url, COUNTER_SERVER_STORE=f"manager://{nowhere}"), "5\n")
    assert_answered(cli("increment", "x", "--data-dir", directory, COUNTER_SERVER_STORE="memory://"), "6\n")
    assert_answered(cli("increment", "x", "--data-dir", os.path.relpath(directory, tmp_path / "cwd")), "7\n")


def test_by_default_the_data_directory_is_in_the_instance_folder(
    stack: ExitStack, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COUNTER_SERVER_DATA_DIR", raising=False)
    manager = stack.enter_context(Program(ROOT / "manager_process.py", cwd=tmp_path / "cwd"))
    assert manager.expect("Manager ready:") == f"manager://{tmp_path}/cwd/instance/counter-server"
    assert_answered(cli("increment", "x"), "1\n")


def test_the_installed_command_is_the_module() -> None:
    (found,) = entry_points(group="console_scripts", name="counter-server")
    assert found.load() is main


def test_help_and_version_need_no_manager(cli: Cli) -> None:
    for command in ("run", "manager", "increment"):
        result = cli(command, "--help")
        assert result.returncode == 0
        assert f"counter-server {command}" in result.stdout
    assert cli("--version").stdout.startswith("counter-server, version ")


# Mistakes that are refused, before or by the manager

NAMES: dict[str, str | bytes] = {
    "empty": "",
    "newline": "a\nb",
    "escape": "\x1b[2J",
    "256-bytes": "x" * 256,
    "not-NFC": "e\u0301",
    "not-UTF-8": b"gr\xf6\xdfe",
    "half-a-character": b"\xe2\x82",
}

BAD: dict[str, tuple[tuple[str | bytes, ...], str]] = {
    **{f"increment-name-{label}": (("increment", name), "name") for label, name in NAMES.items()},
    **{f"get-name-{label}": (("get", NAMES[label]), "name") for label in ("empty", "newline", "not-UTF-8")},
    **{f"set-name-{label}": (("set", NAMES[label], "1"), "name") for label in ("empty", "newline", "not-UTF-8")},
    **{f"delete-name-{label}": (("delete", NAMES[label]), "name") for label in ("empty", "newline", "not-UTF-8")},
    "by-0": (("increment", "visits", "--by", "0"), "by must not be 0"),
    "by-word": (("increment", "visits", "--by", "x"), "--by"),
    "by-fraction": (("increment", "visits", "--by", "1.5"), "--by"),
    "by-empty": (("increment", "visits", "--by", ""), "--by"),
    "by-not-given": (("increment", "visits", "--by"), "--by"),
    "by-2**63": (("increment", "visits", "--by", str(2**63)), "64 bits"),
    "by-5000-digits": (("increment", "visits", "--by", "9" * 5000), "--by"),
    "minimum-over-maximum": (("increment", "visits", "--minimum", "2", "--maximum", "1"), "minimum"),
    "maximum-2**64": (("increment", "visits", "--maximum", str(2**64)), "64 bits"),
    "maximum-word": (("increment", "visits", "--maximum", "x"), "--maximum"),
    "maximum-reached": (("increment", "full", "--maximum", "3"), "above 3"),
    "key-empty": (("increment", "visits", "--key", ""), "key"),
    "key-256-characters": (("increment", "visits", "--key", "k" * 256), "key"),
    "key-with-a-space": (("increment", "visits", "--key", "two words"), "key"),
    "key-not-ASCII": (("increment", "visits", "--key", "clé"), "key"),
    "key-not-UTF-8": (("increment", "visits", "--key", b"cl\xe9"), "key"),
    "value-2**63": (("set", "visits", str(2**63)), "64 bits"),
    "value-word": (("set", "visits", "x"), "VALUE"),
    "value-not-given": (("set", "visits"), "VALUE"),
    "name-not-given": (("increment",), "NAME"),
    "two-names": (("increment", "visits", "full"), "full"),
    "unknown-counter": (("get", "nobody"), "nobody"),
    "unknown-option-of-get": (("get", "visits", "--bogus"), "--bogus"),
    "unknown-option-of-list": (("list", "--bogus"), "--bogus"),
    "unknown-option-of-increment": (("increment", "visits", "--maximun=5"), "--maximun"),
    "unknown-option-of-increment-in-place-of-a-name": (("increment", "--maximun=5"), "--maximun"),
    "unknown-option-of-set-in-place-of-a-name": (("set", "--valeu", "5"), "--valeu"),
    "unknown-option-of-delete": (("delete", "--all"), "--all"),
    "another-store-too": (("list", "--data-dir", "data"), "give one of them"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_reported_in_one_line_and_changes_nothing(
    cli: Cli, manager: Manager, state: State, arguments: tuple[str | bytes, ...], says: str
) -> None:
    command, *rest = arguments
    assert says in assert_refused(cli(command, "--store", manager.url, *rest))
    assert all_counters(state) == BEFORE


@pytest.mark.parametrize(
    "url", ["nonsense://x", "memory://x", "manager://relative", "manager:///x?y", "http://[", "/directory", b"\xff://"]
)
def test_an_unknown_store_is_refused(cli: Cli, url: str | bytes) -> None:
    refused = assert_refused(cli("increment", "visits", "--store", url))
    assert "manager:///absolute/data/directory" in refused  # the correct form


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "--workers", "0"), "--workers"),
        (("run", "--workers", "-1"), "--workers"),
        (("run", "--workers", "513"), "--workers"),
        (("run", "--workers", "two"), "--workers"),
        (("run", "--threads", "0"), "--threads"),
        (("run", "--port", "65536"), "--port"),
        (("run", "--port", "-1"), "--port"),
        (("run", "--durability", "maybe"), "--durability"),
        (("manager", "--durability", "maybe"), "--durability"),
        (("run", "--bogus"), "--bogus"),
        (("run", "8000"), "8000"),
        (("manager", "--port", "8000"), "--port"),
        (("run", "--store", "memory://", "--data-dir", "data"), "give one of them"),
        (("run", "--port", "0", "--host", "192.0.2.1"), "192.0.2.1"),
        (("run", "--port", "0", "--host", "a..b"), "a..b"),
        (("run", "--port", "0", "--host", b"\xff"), "host"),
        (("run", "--port", "0", "--data-dir", ""), "--data-dir"),
        (("manager", "--data-dir", ""), "--data-dir"),
        (("increment", "visits", "--data-dir", ""), "--data-dir"),
        (("serve",), "serve"),
    ],
)
def test_an_invalid_option_of_a_server_or_manager_is_refused(
    tmp_path: Path, cli: Cli, arguments: tuple[str | bytes, ...], says: str
) -> None:
    assert says in assert_refused(cli(*arguments))
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_port_in_use_is_named_and_nothing_is_created(stack: ExitStack, cli: Cli, data_dir: Path) -> None:
    taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = str(taken.getsockname()[1])
    refused = assert_refused(cli("run", "--port", port, "--data-dir", data_dir))
    assert port in refused
    assert "in use" in refused
    assert not data_dir.exists()


# No manager


def test_without_a_manager_and_with_no_start_every_command_fails_and_creates_nothing(
    stack: ExitStack, tmp_path: Path, start_manager: Callable[[], Manager]
) -> None:
    nowhere, killed, file = tmp_path / "nowhere", tmp_path / "data", tmp_path / "file"
    start_manager().kill()  # its socket file remains
    file.write_text("mine")
    before = sorted(path.name for path in killed.iterdir())
    assert "manager.sock" in before
    commands: list[tuple[str, ...]] = [("increment", "x"), ("get", "x"), ("set", "x", "1"), ("delete", "x"), ("list",)]
    started = [(_start(tmp_path, *command, "--no-start", "--data-dir", nowhere), nowhere) for command in commands]
    started += [
        (_start(tmp_path, "increment", "x", "--no-start", "--data-dir", where), where) for where in (killed, file)
    ]
    for process, _ in started:
        stack.enter_context(process)
    for process, where in started:
        refused = assert_refused(_finish(process))
        assert str(where) in refused
        assert "nothing was counted" in refused
        if where is not file:
            assert f"no manager is running in {where}" in refused
            assert f"counter-server manager --data-dir {where}" in refused
    assert not nowhere.exists()
    assert sorted(path.name for path in killed.iterdir()) == before
    assert file.read_text() == "mine"


# Data directories


def _file(directory: Path) -> None:
    directory.write_text("mine")


def _below_a_file(directory: Path) -> None:
    directory.parent.rmdir()
    directory.parent.write_text("mine")


def _writable_by_all(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)


def _writable_by_the_group(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o770)


def _of_another_user(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    directory.mkdir()
    os.chown(directory, ANOTHER_UID, -1)


def _dangling_link(directory: Path) -> None:
    directory.symlink_to(directory.parent / "nowhere")


def _journal_of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.mkdir(0o700)
    (path / "journal.sqlite3").touch()
    os.chown(path / "journal.sqlite3", ANOTHER_UID, -1)


def _link_of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.mkdir(0o700)
    (path / "manager.lock").symlink_to(path.parent / "elsewhere")
    os.chown(path / "manager.lock", ANOTHER_UID, -1, follow_symlinks=False)


def _file_with_a_name_elsewhere(path: Path) -> None:
    path.mkdir(0o700)
    (path.parent / "elsewhere").touch()
    os.link(path.parent / "elsewhere", path / "manager.lock")


@pytest.mark.parametrize("command", ["run", "manager"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_journal_of_another_user, f"journal.sqlite3 belongs to another user (uid {ANOTHER_UID})"),
        (_link_of_another_user, f"manager.lock belongs to another user (uid {ANOTHER_UID})"),
        (_file_with_a_name_elsewhere, "manager.lock has another name elsewhere"),
        (_file, "cannot be made"),
        (_below_a_file, "cannot be made"),
        (_dangling_link, "cannot be made"),
        (_writable_by_all, "can be written by others"),
        (_writable_by_the_group, "can be written by others"),
        (_of_another_user, f"belongs to another user (uid {ANOTHER_UID})"),
    ],
)
def test_an_unusable_data_directory_is_named_and_left_unchanged(
    tmp_path: Path, cli: Cli, command: str, make: Callable[[Path], None], says: str
) -> None:
    (tmp_path / "parent").mkdir()
    directory = tmp_path / "parent" / "data"
    make(directory)
    before = sorted((path, path.lstat().st_mode) for path in tmp_path.rglob("*"))
    port = ("--port", "0") if command == "run" else ()
    refused = assert_refused(cli(command, *port, "--data-dir", directory))
    assert says in refused
    assert str(directory) in refused
    assert sorted((path, path.lstat().st_mode) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["run", "manager"])
@pytest.mark.parametrize("directory", ["/sys/counter-server", "/proc/counter-server/data", "x" * 300])
def test_a_data_directory_that_cannot_be_created_is_named(cli: Cli, command: str, directory: str) -> None:
    port = ("--port", "0") if command == "run" else ()
    refused = assert_refused(cli(command, *port, "--data-dir", directory))
    assert directory in refused
    assert "cannot be made" in refused


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_data_directory_is_private_to_this_user(
    stack: ExitStack, data_dir: Path, start_manager: Callable[[], Manager], umask: int
) -> None:
    stack.callback(os.umask, os.umask(umask))
    start_manager()
    assert data_dir.stat().st_mode & 0o777 == 0o700
    for path in data_dir.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_very_long_data_directory_works(stack: ExitStack, tmp_path: Path, cli: Cli) -> None:
    directory = tmp_path / OVER_107_BYTES
    manager = stack.enter_context(Manager(directory))
    assert_answered(cli("increment", "x", "--data-dir", directory), "1\n")
    assert_answered(cli("increment", "x", "--store", manager.url), "2\n")
    assert manager.stop() == 0
    stack.enter_context(Manager(directory))
    assert_answered(cli("increment", "x", "--data-dir", directory), "3\n")


@pytest.mark.parametrize(
    "name",
    ["größe", "50%", "100%25", "a?b", "a#b", "a[b", "a;b=c&d", "tab\there", "line\nbreak", " "],
)
def test_a_data_directory_may_have_any_name_in_the_option_and_in_the_url(
    stack: ExitStack, tmp_path: Path, cli: Cli, name: str
) -> None:
    directory = tmp_path / name
    manager = stack.enter_context(Manager(directory))
    assert directory.is_dir()
    assert_answered(cli("increment", "x", "--data-dir", directory), "1\n")
    assert_answered(cli("increment", "x", "--store", manager.url), "2\n")


def test_a_data_directory_whose_name_is_not_utf_8_works(stack: ExitStack, tmp_path: Path, cli: Cli) -> None:
    directory = os.fsencode(tmp_path) + b"/gr\xf6\xdfe"
    stack.enter_context(Manager(Path(os.fsdecode(directory))))
    assert_answered(cli("increment", "x", "--data-dir", directory), "1\n")


# Managers


def test_a_second_manager_exits_and_names_the_first(
    cli: Cli, data_dir: Path, start_manager: Callable[[], Manager]
) -> None:
    first = start_manager()
    refused = assert_refused(cli("manager", "--data-dir", data_dir))
    assert f"pid {first.pid}" in refused
    assert str(data_dir) in refused
    assert first.running
    assert_answered(cli("increment", "x", "--data-dir", data_dir), "1\n")


def test_a_manager_of_a_linked_directory_is_a_second_one(
    tmp_path: Path, cli: Cli, data_dir: Path, start_manager: Callable[[], Manager]
) -> None:
    first = start_manager()
    (tmp_path / "link").symlink_to(data_dir)
    assert f"pid {first.pid}" in assert_refused(cli("manager", "--data-dir", tmp_path / "link"))
    assert_answered(cli("increment", "x", "--data-dir", tmp_path / "link"), "1\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_manager_exits_silently_with_status_0_on_a_signal(
    data_dir: Path, start_manager: Callable[[], Manager], number: signal.Signals
) -> None:
    manager = start_manager()
    manager.send_signal(number)
    assert manager.wait() == 0
    assert manager.errors == []
    assert not (data_dir / "manager.sock").exists()


@pytest.mark.parametrize("make", [_file, Path.mkdir, _dangling_link, os.mkfifo], ids=["file", "folder", "link", "fifo"])
def test_a_foreign_file_in_place_of_the_socket_is_named_and_left_unchanged(
    cli: Cli, data_dir: Path, make: Callable[[Path], None]
) -> None:
    data_dir.mkdir(mode=0o700)
    stranger = data_dir / "manager.sock"
    make(stranger)
    before = stranger.lstat()
    assert str(stranger) in assert_refused(cli("manager", "--data-dir", data_dir))
    after = stranger.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


def test_the_socket_of_a_killed_manager_is_replaced(
    cli: Cli, data_dir: Path, start_manager: Callable[[], Manager]
) -> None:
    start_manager().kill()
    assert (data_dir / "manager.sock").is_socket()
    start_manager()
    assert_answered(cli("increment", "x", "--data-dir", data_dir), "1\n")


def test_durability_none_is_refused_if_counters_are_on_disk(
    cli: Cli, data_dir: Path, start_manager: Callable[..., Manager]
) -> None:
    first = start_manager()
    assert_answered(cli("set", "x", "41", "--data-dir", data_dir), "41\n")
    assert first.stop() == 0
    refused = assert_refused(cli("manager", "--data-dir", data_dir, "--durability", "none"))
    assert str(data_dir) in refused
    assert "durab" in refused
    start_manager("--durability", "process")
    assert_answered(cli("increment", "x", "--data-dir", data_dir), "42\n")


def test_durability_none_writes_no_journal_and_starts_empty(
    cli: Cli, data_dir: Path, start_manager: Callable[..., Manager]
) -> None:
    first = start_manager("--durability", "none")
    assert_answered(cli("set", "x", "41", "--data-dir", data_dir), "41\n")
    assert first.stop() == 0
    assert not (data_dir / "journal.sqlite3").exists()
    start_manager("--durability", "none")
    assert_answered(cli("increment", "x", "--data-dir", data_dir), "1\n")


# Damage


def _overwrite(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def _other_database(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")
        connection.commit()


def _newer_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def _lost_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE counters")


def _torn_header(path: Path) -> None:
    path.write_bytes(b"\0" * 50 + path.read_bytes()[50:])


def _torn_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


def _readable_by_others(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manager.key", _overwrite(b"")),
        ("manager.key", _overwrite(b"0123")),
        ("manager.key", _overwrite(b"g" * 64)),
        ("manager.key", _overwrite(b"\xff" * 64)),
        ("manager.key", _overwrite(b"00" * 33)),
        ("manager.key", _readable_by_others),
        ("journal.sqlite3", _overwrite(b"not a database, and long enough to tell" * 100)),
        ("journal.sqlite3", _other_database),
        ("journal.sqlite3", _newer_version),
        ("journal.sqlite3", _lost_table),
        ("journal.sqlite3", _torn_header),
        ("journal.sqlite3", _torn_pages),
        ("journal.sqlite3", _cut_off),
    ],
)
def test_a_damaged_file_is_named_and_left_unchanged(
    cli: Cli, data_dir: Path, start_manager: Callable[[], Manager], name: str, damage: Callable[[Path], None]
) -> None:
    first = start_manager()
    assert_answered(cli("increment", "x", "--data-dir", data_dir), "1\n")
    assert first.stop() == 0
    damage(data_dir / name)
    before = (data_dir / name).read_bytes()
    assert str(data_dir / name) in assert_refused(cli("manager", "--data-dir", data_dir))
    assert (data_dir / name).read_bytes() == before
    assert not (data_dir / "manager.sock").exists()
