"""The command line counts, and reports each mistake in one line."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from counter_server import State, open_state
from counter_server.cli import main
from counter_server.errors import StartupError
from counter_server.manager.directory import DataDirectory
from counter_server.operations import Operation, Scan
from tests.processes import PATIENCE, ROOT, Manager, Program

Result = tuple[int, str, str]  # exit status, standard output, standard error
Cli = Callable[..., Result]
StartManager = Callable[..., Manager]
BEFORE = {"visits": 7, "full": 3}
FOR_ALL_STORES = [("list",), ("get", "x"), ("increment", "x"), ("set", "x", "1"), ("export", "-"), ("top", "--once")]


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty directory, without the developer's settings."""
    for name in [name for name in os.environ if name.startswith("COUNTER_SERVER_")]:
        monkeypatch.delenv(name)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    return cwd


@pytest.fixture
def cli(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process, with arguments and environment variables."""
    monkeypatch.setattr(
        "counter_server.cli.options.open_state", lambda *a, **options: stack.enter_context(open_state(*a, **options))
    )

    def run(*arguments: str | Path, **variables: str) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], env=variables)
        return result.exit_code, result.stdout, result.stderr

    return run


def launch(*arguments: str | bytes | Path) -> Result:
    """Run a command as a program."""
    command = [sys.executable, "-m", "counter_server", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, check=False, encoding="utf-8", env=environment, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    """Return a manager for all tests that do not disturb it. Its directory has a long and unusual name."""
    directory = tmp_path_factory.mktemp("cli") / ("größe 100%25?#[;\n" + "x" * 100)
    with Manager(directory, "--durability", "process") as manager:
        yield manager


@pytest.fixture
def state(manager: Manager, stack: ExitStack) -> State:
    """Return the state of `manager` without the command line, with exactly the counters `BEFORE`."""
    state = stack.enter_context(open_state(manager.url, deadline=PATIENCE))
    while names := all_counters(state):  # a page
        for name in names:
            state.counter(name).delete()
    for name, value in BEFORE.items():
        state.counter(name).set(value)
    return state


def all_counters(state: State) -> dict[str, int]:
    return dict(state.counters(limit=1000).counters)


def refused(result: Result) -> str:
    """Check that the command failed with one line, and return it. A usage error may print the usage too."""
    status, output, errors = result
    assert status in (1, 2, 75), result
    (line,) = (line for line in errors.splitlines() if line and not line.startswith(("Usage: ", "Try ")))
    assert (output, line[:7]) == ("", "Error: ")
    assert len(line) > len("Error: ") + 10
    return line


def test_no_garbage_is_collected_while_the_commands_are_imported_but_afterwards() -> None:
    """Their objects stay visible: Hypothesis refuses a random generator whose referrers it cannot find."""
    code = (
        "import gc; before = gc.get_stats()[2]['collections']; import counter_server.cli;"
        "print(gc.get_stats()[2]['collections'] - before, gc.isenabled(), gc.get_freeze_count())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "0 True 0\n"


def test_counters_are_incremented_read_set_listed_and_deleted(cli: Cli, manager: Manager, state: State) -> None:
    where = ("--store", manager.url)
    for arguments, printed in [
        (("increment", "x"), "1\n"),
        (("increment", "--by", "5", "x"), "6\n"),
        (("increment", "x", "--by", "-8"), "-2\n"),
        (("get", "x"), "-2\n"),
        (("set", "x", "-3"), "-3\n"),
        (("list",), "full\t3\nvisits\t7\nx\t-3\n"),
        (("delete", "x"), ""),
        (("increment", "full", "--by", "2", "--maximum", "5"), "5\n"),
        (("increment", "full", "--by", "-6", "--minimum", "-1"), "-1\n"),
        (("increment", "key", "--key", "k-cli"), "1\n"),
        (("increment", "key"), "2\n"),
        (("increment", "key", "--key", "k-cli"), "1\n"),
    ]:
        assert cli(*arguments, *where) == (0, printed, "")
    for arguments, says in [
        (("get", "x"), "there is no counter 'x'"),
        (("delete", "x"), "there is no counter 'x'"),
        (("increment", "full", "--by", "7", "--maximum", "5"), "above 5"),
        (("increment", "full", "--by", "-1", "--minimum", "-1"), "below -1"),
        (("increment", "key", "--key", "k-cli", "--by", "2"), "another request"),
    ]:
        assert says in refused(cli(*arguments, *where))
    assert all_counters(state) == {"visits": 7, "full": -1, "key": 2}


@pytest.mark.parametrize("name", ["счётчик 🐦", " ", "a/b//c", "--"])
def test_any_name_can_follow_two_hyphens(cli: Cli, manager: Manager, state: State, name: str) -> None:
    assert cli("increment", "--store", manager.url, "--", name) == (0, "1\n", "")
    listed = "".join(f"{n}\t{v}\n" for n, v in sorted({**BEFORE, name: 1}.items()))
    assert cli("list", "--store", manager.url) == (0, listed, "")


def test_list_prints_every_page_and_nothing_without_counters(cli: Cli, manager: Manager, state: State) -> None:
    for name in BEFORE:
        state.counter(name).delete()
    assert cli("list", "--store", manager.url) == (0, "", "")
    expected = [(f"{number:04}", number) for number in range(1001)]
    for name, value in expected:
        state.counter(name).set(value)
    assert cli("list", "--store", manager.url)[1] == "".join(f"{name}\t{value}\n" for name, value in expected)


def test_list_prints_a_part_in_order_of_name_or_value_also_as_json(cli: Cli, manager: Manager, state: State) -> None:
    values = {"a": 5, "a/": 2**63 - 1, "a/é": -(2**63), "a/é/x": 5, "a0": 0, "b": -1}
    for name, value in values.items():
        state.counter(name).set(value)
    listed = partial(cli, "list", "--store", manager.url)

    def names(*options: str) -> list[str]:
        return [line.partition("\t")[0] for line in listed(*options)[1].splitlines()]

    assert names() == ["a", "a/", "a/é", "a/é/x", "a0", "b", "full", "visits"]
    assert names("--prefix", "a/") == ["a/", "a/é", "a/é/x"]
    assert names("--prefix", "a/e") == names("--prefix", "aa") == names("--prefix", "w") == []
    assert names("--prefix", "v") == ["visits"]
    assert names("--sort", "value") == ["a/é", "b", "a0", "full", "a", "a/é/x", "visits", "a/"]
    assert names("--sort", "value", "--prefix", "a/") == ["a/é", "a/é/x", "a/"]
    lines = listed("--json", "--prefix", "a/")[1].splitlines()
    assert lines == [
        '{"counter":"a/","value":9223372036854775807}',
        '{"counter":"a/é","value":-9223372036854775808}',
        '{"counter":"a/é/x","value":5}',
    ]
    assert names("--prefix", "a/e\u0301") == ["a/é", "a/é/x"]  # as a keyboard may type it
    assert "--sort" in refused(listed("--sort", "size"))


def test_a_prefix_is_found_across_pages_and_no_page_after_it_is_read(
    cli: Cli, manager: Manager, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1001):
        state.counter(f"m{number:04}").set(number)
    pages: list[str] = []
    submit = State.submit

    def noted(self: State, operation: Operation, **options: float) -> Any:
        if isinstance(operation, Scan):
            pages.append(operation.after)
        return submit(self, operation, **options)

    monkeypatch.setattr(State, "submit", noted)
    told = cli("list", "--store", manager.url, "--prefix", "m01")[1]
    assert told == "".join(f"m{number:04}\t{number}\n" for number in range(100, 200))
    assert pages == ["m01"]
    told = cli("list", "--store", manager.url, "--prefix", "m")[1]
    assert len(told.splitlines()) == 1001
    assert pages[1:] == ["m", "m0999"]


@pytest.mark.parametrize("command", [("get", "x"), ("list",), ("list", "--prefix", "x", "--json"), ("delete", "x")])
def test_a_command_that_reads_makes_nothing_where_nothing_was_counted(
    cli: Cli, cwd: Path, command: tuple[str, ...]
) -> None:
    (cwd / "empty").mkdir()
    for store, place in [
        (("--data-dir", "typo"), f"{cwd}/typo"),
        (("--data-dir", "empty"), f"{cwd}/empty"),
        ((), f"{cwd}/instance/counter-server"),
        (("--store", f"sqlite:///{cwd}/typo.db"), f"sqlite:///{cwd}/typo.db"),
        (("--store", "sqlite:///typo.db"), "sqlite:///typo.db"),
    ]:
        assert f"there is no state in {place}: nothing was counted there yet" in refused(cli(*command, *store))
    assert sorted(cwd.rglob("*")) == [cwd / "empty"]


def test_what_was_counted_is_read_whether_or_not_a_manager_runs(cli: Cli, cwd: Path, on_demand: str) -> None:
    """An orderly end, with a journal or with a snapshot alone, and a store in a file."""
    for store in (on_demand, f"sqlite:///{cwd}/new.db"):
        assert cli("set", "x", "5", "--store", store) == (0, "5\n", "")
        if store == on_demand:
            assert cli("stop", "--data-dir", DataDirectory.from_url(store, "").path)[0] == 0
        assert cli("get", "x", "--store", store) == (0, "5\n", "")
        assert cli("list", "--store", store) == (0, "x\t5\n", "")
        assert "there is no counter 'y'" in refused(cli("get", "y", "--store", store))


def test_a_place_that_cannot_be_entered_is_not_said_to_be_empty(cli: Cli, cwd: Path) -> None:
    (cwd / "file").touch()
    line = refused(cli("get", "x", "--data-dir", cwd / "file"))
    assert f"{cwd}/file/journal.sqlite3 cannot be found: Not a directory" in line


def test_options_and_variables_name_the_store(cli: Cli, manager: Manager, state: State, cwd: Path) -> None:
    directory = DataDirectory.from_url(manager.url, "").path
    for expected, (options, variables) in enumerate(
        [
            (("--data-dir", directory), {}),
            ((), {"STORE": manager.url}),
            ((), {"DATA_DIR": str(directory)}),
            (("--store", "manager://"), {"DATA_DIR": str(directory)}),
            (("--store", manager.url), {"STORE": f"manager://{cwd}/nowhere"}),
            (("--data-dir", directory), {"STORE": "memory://"}),
            (("--data-dir", os.path.relpath(directory)), {}),
        ],
        start=1,
    ):
        named = {f"COUNTER_SERVER_{name}": value for name, value in variables.items()}
        assert cli("increment", "x", *options, **named) == (0, f"{expected}\n", "")


@pytest.mark.parametrize(
    ("variable", "text", "arguments", "expected"),
    [
        ("COUNTER_SERVER_INCREMENT_BY", "5", ["increment", "by"], "5"),
        ("COUNTER_SERVER_DEADLINE", "nonsense", ["get", "x"], "COUNTER_SERVER_DEADLINE"),
        ("COUNTER_SERVER_RUN_PORT", "nonsense", ["run"], "--port"),
        ("COUNTER_SERVER_RUN_WORKERS", "0", ["run"], "--workers"),
        ("COUNTER_SERVER_DURABILITY", "nonsense", ["run"], "--durability"),
        ("COUNTER_SERVER_DURABILITY", "nonsense", ["manager"], "--durability"),
        ("COUNTER_SERVER_TRUSTED_PROXIES", "nonsense", ["run"], "--trusted-proxy"),
        ("COUNTER_SERVER_PORT", "tcp://10.0.0.1:80", ["increment", "port"], "1"),  # Kubernetes sets this for a service
    ],
)
def test_the_environment_has_options_too(
    cli: Cli, manager: Manager, variable: str, text: str, arguments: list[str], expected: str
) -> None:
    result = cli(*arguments, **{variable: text, "COUNTER_SERVER_STORE": manager.url})
    if expected.isdigit():
        assert result == (0, f"{expected}\n", "")
    else:
        assert expected in refused(result)


def options(group: click.Group) -> Iterator[tuple[str, click.Option]]:
    for name, command in group.commands.items():
        yield from ((name, option) for option in command.params if isinstance(option, click.Option))


def test_each_option_has_the_variable_that_its_name_says() -> None:
    shown = [(command, option) for command, option in options(main) if not option.hidden]
    assert len(shown) > 50
    for command, option in shown:
        assert option.envvar or f"--{option.name}".replace("_", "-") in option.opts, (command, option.opts)


def test_the_environment_of_a_manager_is_checked_at_its_start(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTER_SERVER_LARGEST_VALUE", "nonsense")
    assert "COUNTER_SERVER_LARGEST_VALUE" in refused(launch("manager", "--data-dir", cwd / "data"))


def test_with_no_start_in_the_environment_nothing_is_started(cli: Cli, cwd: Path) -> None:
    line = refused(cli("increment", "x", COUNTER_SERVER_START="0", COUNTER_SERVER_DEADLINE="0.1"))
    assert "no manager is running" in line
    assert list(cwd.iterdir()) == []


def test_the_command_and_the_module_are_the_same_program(manager: Manager, state: State) -> None:
    (found,) = entry_points(group="console_scripts", name="counter-server")
    assert found.load() is main
    assert launch("increment", "x", "--store", manager.url) == (0, "1\n", "")


def test_help_and_version_need_no_manager(cli: Cli) -> None:
    assert "main increment [OPTIONS]" in cli("increment", "--help")[1]
    assert "version " in cli("--version")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("get", "a\nb"), "name"),
        (("delete", "a\nb"), "name"),
        (("set", "a\nb", "1"), "name"),
        *((("increment", name), "name") for name in ("", "\x1b[2J", "x" * 256, os.fsdecode(b"gr\xf6\xdfe"))),
        (("increment", "visits", "--by", "0"), "by must not be 0"),
        (("increment", "visits", "--by", "1.5"), "--by"),
        (("increment", "visits", "--by"), "--by"),
        (("increment", "visits", "--by", str(2**63)), "64 bits"),
        (("increment", "visits", "--by", "9" * 5000), "--by"),
        (("increment", "visits", "--minimum", "2", "--maximum", "1"), "minimum"),
        (("increment", "full", "--maximum", "3"), "above 3"),
        (("increment", "visits", "--key", ""), "key"),
        (("increment", "visits", "--key", os.fsdecode(b"cl\xe9")), "key"),
        (("set", "visits", str(2**63)), "64 bits"),
        (("set", "visits", "x"), "VALUE"),
        (("increment",), "NAME"),
        (("increment", "visits", "full"), "full"),
        (("get", "nobody"), "nobody"),
        (("list", "--bogus"), "--bogus"),
        (("increment", "visits", "--maximun=5"), "--maximun"),
        (("increment", "--maximun=5"), "--maximun"),
        (("set", "--valeu", "5"), "--valeu"),
        (("set", "--valeu", "5", "--"), "--valeu"),
        (("delete", "--all"), "--all"),
        (("list", "--data-dir", "data"), "give one of them"),
        (("export", ""), "must not be empty"),
        *(((*command, "--store", "memory://"), "ends with this command") for command in FOR_ALL_STORES),
        (("list", "--store", "manager://u:secret@h/x"), "'manager://' is not the URL of a manager"),
    ],
    ids=repr,
)
def test_a_mistake_is_reported_in_one_line_and_changes_nothing(
    cli: Cli, manager: Manager, state: State, arguments: tuple[str, ...], says: str
) -> None:
    command, *rest = arguments
    assert says in refused(cli(command, "--store", manager.url, *rest))
    assert all_counters(state) == BEFORE


@pytest.mark.parametrize(
    ("arguments", "redirected", "says"),
    [
        *(
            (arguments, ">/dev/full", "what the command did is done: [Errno 28]")
            for arguments in ("list", "get visits")
        ),
        ("increment visits", ">/dev/full", "what the command did is done: [Errno 28]"),
        *((arguments, ">/dev/full", "[Errno 28] No space left on device") for arguments in ("export -", "top --once")),
        ("list --prefix Ж", "PYTHONIOENCODING=latin-1", "what the command did is done: 'latin-1' codec"),
        ("export -", ">&-", "stdout is closed"),
        ("import -", "<&-", "stdin is closed"),
    ],
)
def test_output_or_input_that_fails_is_one_line(
    manager: Manager, state: State, arguments: str, redirected: str, says: str
) -> None:
    state.counter("Ж").set(1)
    before, after = (redirected, "") if "=" in redirected else ("", redirected)
    command = f"{before} {sys.executable} -m counter_server {arguments} --store {shlex.quote(manager.url)} {after}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, text=True, env=environment)
    assert says in refused((done.returncode, done.stdout, done.stderr))
    assert state.counter("visits").value == BEFORE["visits"] + arguments.startswith("increment")


def test_a_name_may_begin_with_hyphens_after_two(cli: Cli, manager: Manager, state: State) -> None:
    assert cli("set", "--store", manager.url, "--", "--x", "-5") == (0, "-5\n", "")
    assert cli("set", "y", "-6", "--store", manager.url) == (0, "-6\n", "")
    assert (state.counter("--x").value, state.counter("y").value) == (-5, -6)


@pytest.mark.parametrize("url", ["nonsense://x", "memory://x", "manager://relative", "\udcff://"])
def test_an_unknown_store_is_refused(cli: Cli, url: str) -> None:
    assert "manager:///absolute/data/directory" in refused(cli("increment", "visits", "--store", url))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run --workers 0", "--workers"),
        ("run --workers 513", "--workers"),
        ("run --threads 0", "--threads"),
        ("run --port 65536", "--port"),
        ("run --durability maybe", "--durability"),
        ("run 8000", "8000"),
        ("run --store memory:// --data-dir data", "give one of them"),
        ("run --data-dir=", "--data-dir"),
        ("manager --durability maybe", "--durability"),
        ("manager --port 8000", "--port"),
        ("serve", "serve"),
    ],
)
def test_an_invalid_option_is_refused(
    cli: Cli, cwd: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    for place in ("server.supervisor.Supervisor.run", "manager.process.serve"):  # rather than to serve for ever
        monkeypatch.setattr(f"counter_server.{place}", lambda *_, **__: pytest.fail("it started"))
    assert says in refused(cli(*arguments.split(" ")))
    assert list(cwd.iterdir()) == []


@pytest.mark.slow
def test_an_unusable_address_or_directory_is_named(cwd: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(launch("run", "--port", port))
    assert port in line
    assert "in use" in line
    for host in ("192.0.2.1", "a..b"):
        assert host in refused(launch("run", "--port", "0", "--host", host))
    assert "host" in refused(launch("run", "--port", "0", "--host", b"\xff"))
    for command in (["run", "--port", "0"], ["manager"]):
        line = refused(launch(*command, "--data-dir", "/sys/counter-server"))
        assert "/sys/counter-server" in line
        assert "cannot be made" in line
    assert list(cwd.iterdir()) == []


def test_with_no_start_nothing_is_created(cli: Cli, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("counter_server.cli.options.open_state", partial(open_state, deadline=0.1))
    killed, file = cwd / "killed", cwd / "file"
    killed.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("killed/manager.sock")  # as a killed manager leaves them
    (killed / "journal.sqlite3").touch()
    file.write_text("mine")
    before = sorted(cwd.rglob("*"))
    for command in (("increment", "x"), ("get", "x"), ("set", "x", "1"), ("delete", "x"), ("list",)):
        line = refused(cli(*command, "--no-start", "--data-dir", killed))
        assert f"no manager is running in {killed}" in line
        assert f"counter-server manager --data-dir {killed}" in line
    for where in (cwd / "nowhere", file):
        assert "nothing was counted" in refused(cli("increment", "x", "--no-start", "--data-dir", where))
    assert sorted(cwd.rglob("*")) == before
    assert file.read_text() == "mine"


def for_a_group(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def with_a_second_name(path: Path) -> None:
    path.mkdir(0o700)
    (path.parent / "elsewhere").touch()
    os.link(path.parent / "elsewhere", path / "manager.lock")


def given_away(name: str, path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path.mkdir(0o700)
    if name == "manager.lock":
        (path / name).symlink_to("elsewhere")
    elif name:
        (path / name).touch()
    os.chown(path / name, 12345, -1, follow_symlinks=False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.touch, "cannot be made"),
        (lambda path: path.symlink_to("nowhere"), "cannot be made"),
        (for_a_group, "can be written by others"),
        (with_a_second_name, "manager.lock has another name elsewhere"),
        (partial(given_away, ""), "belongs to another user ('#12345', uid 12345)"),
        (partial(given_away, "manager.lock"), "manager.lock belongs to another user"),
        (partial(given_away, "journal.sqlite3"), "journal.sqlite3 belongs to another user"),
    ],
)
def test_an_unusable_data_directory_is_named_and_left_unchanged(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    directory = tmp_path / "data"
    make(directory)
    before = sorted((path, path.lstat().st_mode) for path in tmp_path.rglob("*"))
    with pytest.raises(StartupError, match=rf"{directory}.*{re.escape(reason)}"):
        DataDirectory(directory).make()
    assert sorted((path, path.lstat().st_mode) for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_data_directory_is_private_and_ctrl_c_ends_its_manager(
    stack: ExitStack, data_dir: Path, start_manager: StartManager
) -> None:
    stack.callback(os.umask, os.umask(0))
    manager = start_manager()
    assert data_dir.stat().st_mode & 0o777 == 0o700
    for path in data_dir.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    manager.send_signal(signal.SIGINT)
    assert (manager.wait(), manager.errors) == (0, [])
    assert not (data_dir / "manager.sock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [os.fsdecode(b"gr\xf6\xdfe"), "x/" * 100])
def test_a_data_directory_may_have_any_name(stack: ExitStack, tmp_path: Path, cli: Cli, name: str) -> None:
    manager = stack.enter_context(Manager(tmp_path / name))
    assert (tmp_path / name).is_dir()
    assert cli("increment", "x", "--data-dir", tmp_path / name) == (0, "1\n", "")
    assert cli("increment", "x", "--store", manager.url) == (0, "2\n", "")


@pytest.mark.slow
def test_by_default_the_data_directory_is_in_the_instance_folder(stack: ExitStack, cwd: Path, cli: Cli) -> None:
    manager = stack.enter_context(Program(ROOT / "manager_process.py", cwd=cwd))
    directory = cwd / "instance" / "counter-server"
    assert manager.expect("Manager ready:") == f"manager://{directory}"
    assert cli("increment", "x") == (0, "1\n", "")
    (cwd / "link").symlink_to(directory)
    line = refused(launch("manager", "--data-dir", cwd / "link"))
    assert f"pid {manager.pid}" in line
    assert str(directory) in line
    assert cli("increment", "x", "--data-dir", cwd / "link") == (0, "2\n", "")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_foreign_file_in_place_of_the_socket_is_left_unchanged(cwd: Path, make: Callable[[Path], None]) -> None:
    directory = DataDirectory(cwd)
    make(directory.socket)
    before = directory.socket.lstat()
    with pytest.raises(StartupError, match=str(directory.socket)):
        directory.remove_stale_socket()
    assert directory.socket.lstat().st_ino == before.st_ino


@pytest.mark.parametrize("content", [b"", b"g" * 64, b"\xff" * 64, b"00" * 33, None])
def test_a_damaged_key_is_named_and_left_unchanged(cwd: Path, content: bytes | None) -> None:
    directory = DataDirectory(cwd)
    assert directory.key("manager") == directory.key("manager")
    key = cwd / "manager.key"
    if content is None:
        key.chmod(0o644)
    else:
        key.write_bytes(content)
    before = key.read_bytes()
    with pytest.raises(StartupError, match=str(key)):
        directory.key("manager")
    assert key.read_bytes() == before


@pytest.mark.slow
def test_durability_none_is_refused_where_counters_are_on_disk(data_dir: Path, start_manager: StartManager) -> None:
    assert start_manager().stop() == 0
    line = refused(launch("manager", "--data-dir", data_dir, "--durability", "none"))
    assert str(data_dir) in line
    assert "durab" in line
