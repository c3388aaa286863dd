"""`flask counters` and `flask shell` use the state of the current app."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from flask import Flask
from flask.cli import ScriptInfo

from counter_server import SharedState
from counter_server.cli import main
from counter_server.flask_commands import counters
from tests.processes import PATIENCE, ROOT, eventually, holder

slow = pytest.mark.slow

MODULE = """
from flask import Flask
from counter_server import SharedState

app = Flask(__name__)
app.config.update(COUNTER_SERVER_IDLE_TIMEOUT=0.2, COUNTER_SERVER_DEADLINE=30)
shared = SharedState(app)

class Log:
    def __init__(self):
        self.lines = []
    def add(self, line):
        self.lines.append(line)
        return len(self.lines)

lines = shared.object("log", Log)
"""
FACTORY = """
import flask
from counter_server import SharedState

shared = SharedState()

def create_app(name="shop"):
    app = flask.Flask(__name__)
    app.config.update(COUNTER_SERVER_IDLE_TIMEOUT=0.2, COUNTER_SERVER_DEADLINE=30)
    shared.init_app(app)
    return app
"""
PLAIN = "from flask import Flask\napp = Flask(__name__)\n"


def flask(
    *arguments: str | Path, cwd: Path, app: str | Path = "", said: str = "", path: Path = ROOT
) -> tuple[int, str, str]:
    """Run the `flask` command as a program; return its exit status, output and errors.

    :param app: for FLASK_APP.
    :param said: its standard input.
    :param path: where it finds modules.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COUNTER_", "FLASK_"))}
    environment |= {"FLASK_APP": str(app)} if app else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(path), str(ROOT)])
    command = [sys.executable, "-m", "flask", *map(str, arguments)]
    done = subprocess.run(
        command, input=said, cwd=cwd, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE, check=False
    )
    return done.returncode, done.stdout, done.stderr


def make_app(url: str = "memory://") -> Flask:
    app = Flask(__name__)
    app.config.update(COUNTER_SERVER_STORE=url, COUNTER_SERVER_DEADLINE=PATIENCE)
    return app


def invoke(app: Flask, *arguments: str) -> tuple[int, str, str]:
    """Run `flask counters` in this process."""
    result = app.test_cli_runner().invoke(counters, arguments)
    return result.exit_code, result.stdout, result.stderr


@slow
def test_flask_counters_uses_the_apps_own_directory_from_any_working_directory(tmp_path: Path, on_demand: str) -> None:
    """Module-level and factory apps, named by --app and by FLASK_APP. The app's manager ends when it is idle."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv" / "one.py").write_text(MODULE)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "factory.py").write_text(FACTORY)
    apps: list[tuple[Path, list[str | Path], str]] = [
        (tmp_path / "srv", ["--app", tmp_path / "srv" / "one.py"], "one"),
        (tmp_path / "two", ["--app", "factory:create_app('x')"], "factory"),
    ]
    for directory, by_option, by_variable in apps:
        data = directory / "instance" / "counter-server"
        runs: list[tuple[list[str | Path], str, tuple[str, ...], tuple[int, str, str]]] = [
            (by_option, "", ("get", "x"), (1, "", f"Error: there is no state in {data}")),
            (by_option, "", ("increment", "x", "--by", "5"), (0, "5\n", "")),
            ([], by_variable, ("increment", "x"), (0, "6\n", "")),
            (by_option, "", ("set", "y", "-3"), (0, "-3\n", "")),
            ([], by_variable, ("list",), (0, "x\t6\ny\t-3\n", "")),
            ([], by_variable, ("increment", "x", "--maximum", "6"), (1, "", "Error: 'x' is 6 and +1 would")),
            (by_option, "", ("delete", "y"), (0, "", "")),
        ]
        for options, variable, arguments, (status, output, error) in runs:
            done = flask(*options, "counters", *arguments, cwd=elsewhere, app=variable, path=directory)
            assert done[:2] == (status, output), done
            assert (done[2].count("\n"), done[2][: len(error)]) == (status, error), done
        assert counted_by_command(data, "x") == "6\n"
        eventually(lambda data=data: holder(data) is None, "the end of the app's manager")  # type: ignore[misc]
    assert list(elsewhere.iterdir()) == []


def counted_by_command(data: Path, name: str) -> str:
    command = [sys.executable, "-m", "counter_server", "get", name, "--data-dir", str(data)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@slow
def test_a_project_without_shared_state_loses_no_command_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    status, output, _ = flask("--app", "plain", "routes", cwd=tmp_path, path=tmp_path)
    assert (status, "static" in output) == (0, True)
    status, output, error = flask("--app", "plain", "counters", "list", cwd=tmp_path, path=tmp_path)
    assert (status, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("Error: this app has no SharedState: add SharedState(app) to it, or name a store")
    status, output, _ = flask("counters", "--help", cwd=tmp_path, path=tmp_path)  # without an app
    assert (status, "increment" in output) == (0, True)
    assert {path.name for path in tmp_path.iterdir()} <= {"plain.py", "__pycache__"}


@slow
def test_flask_shell_has_the_apps_counters_at_hand(tmp_path: Path, on_demand: str) -> None:
    (tmp_path / "one.py").write_text(MODULE)
    said = "print([counter('x').increment(), shared.counter('x').increment(), shared.counters().counters])\n"
    status, output, error = flask("--app", "one", "shell", cwd=tmp_path, path=tmp_path, said=said)
    assert (status, "[1, 2, [('x', 2)]]" in output) == (0, True), error


def test_the_names_of_the_app_go_before_ours_in_its_shell() -> None:
    before, after = make_app(), make_app()
    before.shell_context_processor(lambda: {"counter": "the app's"})
    shared = SharedState()
    for app in (before, after):
        shared.init_app(app)
    for app, counter in ((before, "the app's"), (after, shared.counter)):
        names = app.make_shell_context()
        assert (names["shared"], names["counter"], names["app"]) == (shared, counter, app)


def test_loading_the_command_imports_no_more_than_it_is() -> None:
    (found,) = entry_points(group="flask.commands", name="counters")
    assert found.load() is counters
    code = "import sys, flask.cli; before = {*sys.modules}; import counter_server.flask_commands"
    told = f"{code}; print(*sorted({{*sys.modules}} - before))"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = ["", ".commands", ".errors", ".flask_commands"]
    assert done.stdout.split() == [*(f"counter_server{module}" for module in ours), "signal"]


def test_both_command_lines_have_the_same_commands_and_options() -> None:
    for name, command in counters.commands.items():
        other = main.commands[name]
        theirs = {parameter.name for parameter in other.params} - {"data_dir", "store", "start"}
        assert {parameter.name for parameter in command.params} == theirs
        assert command.help == other.help
    assert {"list", "get", "increment", "set", "delete", "export"} == counters.commands.keys()


def test_each_command_works_in_the_apps_store_and_reports_in_one_line(tmp_path: Path) -> None:
    app = make_app(f"sqlite:///{tmp_path}/counters.db")
    shared = SharedState(app)
    for arguments, (status, output, error) in [
        (("list",), (1, "", f"Error: there is no state in sqlite:///{tmp_path}/counters.db")),
        (("increment", "x"), (0, "1\n", "")),
        (("get", "x"), (0, "1\n", "")),
        (("get", "y"), (1, "", "Error: there is no counter 'y'")),
        (("set", "x", str(2**63)), (1, "", "Error: value must lie within 64 bits")),
        (("increment", "x", "--key", "k", "--by", "4"), (0, "5\n", "")),
        (("increment", "x", "--key", "k"), (1, "", "Error: this idempotency key was used")),
        (("list", "--json"), (0, '{"counter":"x","value":5}\n', "")),
        (("delete", "x"), (0, "", "")),
    ]:
        told = invoke(app, *arguments)
        assert (told[:2], told[2][: len(error)], told[2].count("\n")) == ((status, output), error, status)
    with app.app_context():
        assert shared.counters().counters == []  # the state serves on after the commands have closed it


def test_an_app_whose_state_no_command_can_use_is_told_so_in_one_line() -> None:
    app = make_app()
    assert "this app has no SharedState" in invoke(app, "list")[2]
    SharedState(app)
    status, output, error = invoke(app, "increment", "x")
    assert (status, output, "memory://, which each process has for itself" in error) == (1, "", True)

    def create_app(*_arguments: object) -> Flask:
        app = make_app("nonsense://")
        SharedState(app)
        return app

    result = Flask(__name__).test_cli_runner().invoke(counters, ["list"], obj=ScriptInfo(create_app=create_app))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("Error: COUNTER_SERVER_STORE: no store is called 'nonsense://'")
