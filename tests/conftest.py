"""Fixtures: real managers and servers, started for a test and gone after it."""

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from flask import Flask
from flask.testing import FlaskClient

from counter_server import State
from counter_server.manager.directory import DataDirectory
from tests.cutter import Cutter
from tests.processes import PATIENCE, Manager, Server, end_manager

if TYPE_CHECKING:  # the fast tier does without these packages
    from playwright.sync_api import Browser as Chromium

    from tests.browser import Browser
    from tests.engines import PostgresServer

# The programs that tests start cache their bytecode; otherwise each of hundreds would compile everything again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell that runs the tests in the background makes them ignore Ctrl-C, and the programs that they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of an example depends on the other work of the machine.
hypothesis.settings.register_profile("counter_server", deadline=None)
hypothesis.settings.load_profile("counter_server")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="Run the slow tests too: engines, browsers, launchers, faults.")


def is_full(config: pytest.Config) -> bool:
    """Return whether every test runs, or only the fast tier. COUNTER_SERVER_TEST_ALL is for CI."""
    return bool(config.getoption("all") or os.environ.get("COUNTER_SERVER_TEST_ALL"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run four files at a time if all tests run, as the slow ones mostly wait for other processes."""
    return 4 if is_full(config) else 2


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of slow tests without importing them: only the group `test-all` has all that they import."""
    if is_full(config) or collection_path.suffix != ".py":
        return None
    return True if "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests of the other files, and sort so that the slowest files begin first.

    Tracing opcodes with `sys.settrace` crashes CPython 3.12, so those tests are deselected there.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    left_out = {"slow"} if not is_full(config) else set()
    if sys.version_info[:2] == (3, 12):
        left_out.add("traces_opcodes")
    deselected = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tier ran, and how to run the other."""
    if is_full(config):
        terminalreporter.write_line(
            "All tests ran. Without --all (and COUNTER_SERVER_TEST_ALL), only the fast tier runs."
        )
    else:
        terminalreporter.write_line(
            "Only the fast tier ran. For all: pip install -c requirements.lock -e . --group test-all, then pytest --all"
        )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Return a stack that is closed at the end of the test, even if it fails."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Return a path for a data directory, which does not exist yet."""
    return tmp_path / "data"


@pytest.fixture
def on_demand(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a manager on `data_dir` that its first client starts. All such managers end with the test."""
    monkeypatch.setenv("COUNTER_SERVER_DEADLINE", str(PATIENCE))  # as a busy machine is slow to start one
    yield DataDirectory(data_dir).url
    for lock in data_dir.parent.rglob("manager.lock"):
        end_manager(lock)


@pytest.fixture
def start_manager(stack: ExitStack, data_dir: Path) -> Callable[..., Manager]:
    """Start a manager on `data_dir`, with options. A test may call it again after the manager ended."""
    return lambda *options: stack.enter_context(Manager(data_dir, *options))


@pytest.fixture
def start_server(stack: ExitStack, data_dir: Path) -> Callable[..., Server]:
    """Start a server on `data_dir`, with options."""
    return lambda *options: stack.enter_context(Server("--data-dir", data_dir, *options))


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """Return a client of the test file's `app`."""
    return app.test_client()


@pytest.fixture
def state(app: Flask) -> Iterator[State]:
    """Return the state of the test file's `app`."""
    found = app.extensions["counter_server"]
    assert isinstance(found, State)
    yield found
    found.close()


@pytest.fixture
def cut(stack: ExitStack) -> Callable[[Path], Cutter]:
    def start(target: Path) -> Cutter:
        cutter = Cutter(target)
        stack.callback(cutter.close)
        return cutter

    return start


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse them, as some file systems do."""

    def fail(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", fail)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator["PostgresServer"]:
    """Run one server for all tests that do not kill it."""
    from tests.engines import PostgresServer

    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def browser_process() -> Iterator["Chromium"]:
    """Run Chromium for the tests of one file. While it runs, this thread has an event loop."""
    from tests.browser import chromium

    with chromium() as process:
        yield process


@pytest.fixture
def browser(browser_process: "Chromium", stack: ExitStack) -> Iterator["Browser"]:
    """Return a browser without pages. The test fails if one of its pages logs an error.

    It closes before the contents of `stack`, because a polling page would report the end of its server.
    """
    from tests.browser import Browser

    browser = Browser(browser_process)
    yield browser
    browser.close()
    assert browser.complaints == []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failure if COUNTER_SERVER_TEST_ALL promises that every tool is installed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("COUNTER_SERVER_TEST_ALL"):
        report.outcome = "failed"
        report.longrepr = f"skipped although COUNTER_SERVER_TEST_ALL is set: {report.longreprtext}"
    return report
