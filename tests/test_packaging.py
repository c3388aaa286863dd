"""The package that people install: what is in it, and what works from it, outside of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import click
import pytest

from counter_server.cli import main
from tests.processes import ROOT

pytestmark = pytest.mark.slow

# What a person's app may look like to a type checker.
USERS_APP = """
from typing import assert_type

from counter_server import Counter, SharedState, State, open_state
from counter_server.caching import ManagerCache
from counter_server.dicts import SharedDict
from counter_server.limiting import ManagerStorage
from counter_server.testing import in_memory
from flask import Flask


class Basket:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def add(self, item: str) -> list[str]:
        return [item]


app = Flask(__name__)
shared = SharedState(app)
visits = assert_type(shared.counter("visits"), Counter)
basket = assert_type(shared.object("basket", Basket, 3), Basket)
carts = assert_type(shared.dict("carts", ttl=60), SharedDict)
session = shared.visitor_counter("session")
cache = ManagerCache(name="pages")
storage = ManagerStorage("manager://")


@app.get("/")
def index() -> str:
    assert_type(visits.increment(maximum=5), int)
    assert_type(basket.add("tea"), list[str])
    assert_type(session.value, int)
    assert_type(storage.incr("a", 60), int)
    carts["b"] = [cache.get("a")]
    basket.remove("tea")  # wrong: no such method
    said: str = visits.increment()  # wrong: an int
    return "counted"


@in_memory()
def test_it() -> None:
    shared.reset()
    with open_state("memory://") as state:
        assert_type(state, State)
        assert_type(state.counter("x").value, int)
"""


def run(*command: object, cwd: Path, status: int = 0) -> str:
    """Return what a command prints. It sees nothing of the checkout, and must exit with `status`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COUNTER_", "PYTHON"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def tracked() -> set[str]:
    """Return the paths of the checkout's own files."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in found.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from the checkout, and the wheel from that; return their directory."""
    place = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", place, ROOT, cwd=place)
    return place


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as contents:
        (name,) = (name for name in contents.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(contents.read(name).decode())


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a bare environment, with what its examples use; return its interpreter."""
    place = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    beside = ("flask-caching", "flask-limiter", "flask-session", "hypothesis", "pytest-xdist")
    lock = ("-c", ROOT / "requirements.lock")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile")
    run(*install, *lock, f"{wheel}[cache,server]", *beside, cwd=place)
    return python


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as contents:
        names = {name for name in contents.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked() if name.startswith("counter_server/")}
    endings = {Path(name).suffix for name in names}
    assert endings >= {".py", ".lua", ".html", ".css", ".js", ".svg", ".json", ".toml", ".typed"}


def test_the_sdist_has_the_checkout(built: Path) -> None:
    """Its tests and documents too, so that it can be tested; and the wheel was built from it."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    assert names == tracked() | {"PKG-INFO"}


def test_the_metadata_is_what_an_index_and_a_reader_need(metadata: Message, built: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert metadata["Author"] == "the counter_server authors"
    assert metadata["Keywords"]
    kinds = metadata.get_all("Classifier", [])
    assert {"Framework :: Flask", "Framework :: Pytest", "Typing :: Typed"} <= set(kinds)
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 16)} <= set(kinds)
    assert {kind.partition(" ::")[0] for kind in kinds} >= {"Development Status", "Intended Audience", "Topic"}
    text = str(metadata.get_payload())
    targets = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith(("https://", "http://"))] == []
    pictures = [target for target in targets if target.endswith(".png")]
    assert pictures
    assert all("/docs/pictures/" in picture and "raw" in picture for picture in pictures)


def test_only_the_extras_of_users_are_in_the_metadata(metadata: Message) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == set(declared["project"]["optional-dependencies"])
    assert extras == {"server", "cache", "redis", "memcached", "sql", "mysql", "limits", "top", "demo"}
    assert set(declared["dependency-groups"]) == {"test", "test-all", "benchmark", "dev"}


def test_the_documents_examples_run_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """Those of README, docs/any-app.md and docs/testing.md, without the package's sources at hand."""
    assert "site-packages" in run(python, "-c", "import counter_server as c; print(c.__file__)", cwd=tmp_path)
    assert "version" in run(python.with_name("counter-server"), "--version", cwd=tmp_path)
    for name in (name for name in tracked() if not name.startswith(("counter_server/", ".ci/"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    files = ("tests/test_documentation.py", "tests/test_testing.py")
    wanted = "lines_for_any_app or examples_for_any_app or page_about_tests or plugin_costs"
    options = ("-q", "--all", "-o", "addopts=", "-p", "no:cacheprovider", "-k", wanted)
    assert "5 passed" in run(python, "-m", "pytest", *options, *files, cwd=tmp_path)


def test_a_type_checker_sees_the_types_of_the_installed_package(python: Path, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache")
    app.write_text(USERS_APP)
    found = run(*mypy, app, cwd=tmp_path, status=1).splitlines()
    assert [line.partition("error: ")[2] for line in found[:-1]] == [
        '"Basket" has no attribute "remove"  [attr-defined]',
        'Incompatible types in assignment (expression has type "int", variable has type "str")  [assignment]',
    ]
    app.write_text("\n".join(line for line in USERS_APP.split("\n") if "# wrong: " not in line))
    assert "Success" in run(*mypy, app, cwd=tmp_path)


@pytest.mark.skipif(shutil.which("man") is None, reason="no man: install the Debian package man-db")
def test_the_man_pages_render_and_name_every_command(tmp_path: Path) -> None:
    """By the command of docs/server.md."""
    document = (ROOT / "docs" / "server.md").read_text()
    assert "\n    click-man counter-server --target ~/.local/share/man/man1\n" in document
    run(Path(sys.executable).with_name("click-man"), "counter-server", "--target", tmp_path, cwd=tmp_path)
    man = ("env", "MANWIDTH=1000", "man", "-l")  # no word is broken
    page = run(*man, tmp_path / "counter-server.1", cwd=tmp_path)
    context = click.Context(main)
    for name in main.list_commands(context):
        assert f"counter-server-{name}(1)" in page
        text = run(*man, tmp_path / f"counter-server-{name}.1", cwd=tmp_path)
        command = main.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[0] in text, (name, parameter)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_in_our_documents_completes_a_command(shell: str, tmp_path: Path) -> None:
    """In bash itself. The other shells may be missing, so theirs is asked as their scripts ask."""
    lines = (ROOT / "docs" / "server.md").read_text().splitlines()
    (line,) = (line.strip() for line in lines if f"_COUNTER_SERVER_COMPLETE={shell}_source" in line)
    path = f"export PATH={Path(sys.executable).parent}:$PATH\n"
    script = run("bash", "-c", f"{path}_COUNTER_SERVER_COMPLETE={shell}_source counter-server", cwd=tmp_path)
    assert f"_COUNTER_SERVER_COMPLETE={shell}_complete" in script
    if shell == "bash":
        ask = "COMP_WORDS=(counter-server incr); COMP_CWORD=1; _counter_server_completion counter-server"
        assert run("bash", "-c", f'{path}{line}\n{ask}; echo "${{COMPREPLY[@]}}"', cwd=tmp_path) == "increment\n"
    word = "incr" if shell == "fish" else "1"
    ask = f"COMP_WORDS='counter-server incr' COMP_CWORD={word} _COUNTER_SERVER_COMPLETE={shell}_complete counter-server"
    assert "increment" in run("bash", "-c", f"{path}{ask}", cwd=tmp_path)
