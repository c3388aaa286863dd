"""Fixtures: real managers and servers, started for a test and gone after it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
from flask import Flask
from flask.testing import FlaskClient
from playwright.sync_api import Browser as Chromium

from counter_server import State
from counter_server.manager.directory import DataDirectory
from tests.browser import Browser, chromium
from tests.cutter import Cutter
from tests.engines import PostgresServer
from tests.processes import Manager, Server, end_manager

# The programs that tests start cache their bytecode; otherwise each of hundreds would compile everything again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell that runs the tests in the background makes them ignore Ctrl-C, and the programs that they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of an example depends on the other work of the machine.
hypothesis.settings.register_profile("counter_server", deadline=None)
hypothesis.settings.load_profile("counter_server")


# These tests do not depend on Python's version: pages, messages, faults of disks and engines, other programs.
ONCE = {
    *("test_access", "test_access_of_servers", "test_architecture", "test_bad_requests", "test_badge"),
    *("test_benchmarks", "test_cli", "test_dashboard", "test_demo", "test_doctor", "test_documentation", "test_faults"),
    *("test_lab", "test_leaks", "test_memcached", "test_openapi", "test_prove", "test_rate_limit", "test_redis"),
    *("test_refused_writes", "test_sql", "test_two_machines", "test_upkeep"),
}

# The slowest files begin first, so that no worker runs one of them alone at the end.
LONGEST = [
    *("test_sql", "test_faults", "test_demo", "test_browser_dashboard", "test_stores", "test_supervision"),
    *("test_seed_programs", "test_browser_lab", "test_cli", "test_objects", "test_health", "test_exactly_once"),
    *("test_prove", "test_refused_writes", "test_server", "test_browser_home", "test_on_demand", "test_limiting"),
]


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
def on_demand(data_dir: Path) -> Iterator[str]:
    """Return the URL of a manager on `data_dir` that its first client starts. All such managers end with the test."""
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
def postgres() -> Iterator[PostgresServer]:
    """Run one server for all tests that do not kill it."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def browser_process() -> Iterator[Chromium]:
    """Run Chromium for the tests of one file. While it runs, this thread has an event loop."""
    with chromium() as process:
        yield process


@pytest.fixture
def browser(browser_process: Chromium, stack: ExitStack) -> Iterator[Browser]:
    """Return a browser without pages. The test fails if one of its pages logs an error.

    It closes before the contents of `stack`, because a polling page would report the end of its server.
    """
    browser = Browser(browser_process)
    yield browser
    browser.close()
    assert browser.complaints == []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the slowest files first, and mark the tests that need only one version of Python.

    Tracing opcodes with `sys.settrace` crashes CPython 3.12, so those tests are deselected there.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()) or item.path.stem in ONCE:
            item.add_marker(pytest.mark.once)
    if sys.version_info[:2] == (3, 12):
        tracing = [item for item in items if item.get_closest_marker("traces_opcodes")]
        config.hook.pytest_deselected(items=tracing)
        items[:] = [item for item in items if item not in tracing]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test into a failure if COUNTER_SERVER_TEST_ALL promises that every tool is installed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("COUNTER_SERVER_TEST_ALL"):
        report.outcome = "failed"
        report.longrepr = f"skipped although COUNTER_SERVER_TEST_ALL is set: {report.longreprtext}"
    return report
