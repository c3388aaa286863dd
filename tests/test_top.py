"""`counter-server top`: a snapshot for scripts, and a live screen that outlives the manager."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from msgspec.structs import replace

from counter_server import open_state
from counter_server.cli.top import Sample, Samples
from tests.hosted_classes import Toolbox
from tests.load import open_client
from tests.processes import PATIENCE, ROOT, Manager, eventually
from tests.test_dashboard import STATUS

slow = pytest.mark.slow


def sample(seconds: float, value: int, **changes: Any) -> Sample:
    return Sample(seconds, replace(STATUS, **changes), {"a": value}, {})


def test_a_rate_is_of_the_last_seconds_of_one_manager() -> None:
    samples = Samples()
    for second in range(20):
        samples.add(sample(second, second**2))
    assert samples.rate(lambda at: at.counters["a"]) == (19**2 - 14**2) / 5
    samples.add(sample(20.0, 0, pid=8))
    assert samples.rate(lambda at: at.counters["a"]) is None
    samples.add(sample(22.0, 4, pid=8))
    assert samples.rate(lambda at: at.counters["a"]) == 2.0
    samples.add(sample(23.0, 0, pid=8)._replace(counters={}, problem="no answer"))
    samples.add(sample(24.0, 4, pid=8))
    assert samples.rate(lambda at: at.counters["a"]) is None, "what was not read did not change"


# One snapshot


def once(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "counter_server", "top", "--once", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@slow
def test_a_snapshot_shows_counters_objects_entries_and_processes_and_counts_nothing(
    on_demand: str, data_dir: Path
) -> None:
    with open_state(on_demand, deadline=2 * PATIENCE) as state:
        box, carts = state.object("box", Toolbox), state.dict("carts [bold]", max_entries=2)
        for number in range(3):
            carts.set(number, number)
        with pytest.raises(KeyError):
            box.fail()
        state.counter("größe [red]").set(1234567)
        before = state.status()
        done = once("--data-dir", data_dir)
        after = state.status()
        assert before is not None
        assert after is not None
        assert (after.operations, after.counters, after.starts) == (before.operations, before.counters, 1)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["größe", "[red]", "1,234,567", "0.0"] in lines
    assert any(line[:6] == ["box", "Toolbox", "1", "0.0", "0", "1"] and line[-1] == "KeyError" for line in lines)
    assert ["carts", "[bold]", "2", "2", "0", "0", "1", "0"] in lines
    assert any(line[:2] == [str(os.getpid()), "3"] for line in lines)
    assert f"manager {after.pid}, up " in done.stdout
    assert "\x1b" not in done.stdout


@slow
def test_without_a_manager_it_says_so_and_starts_none(data_dir: Path) -> None:
    done = once("--data-dir", data_dir)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*no manager is running in .*\n", done.stderr)
    assert not data_dir.exists()


@slow
def test_a_store_without_figures_shows_its_counters(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/counters.db"
    with open_state(url) as state:
        for name in ("a", "b1", "b2"):
            state.counter(name).increment(5)
    done = once("--store", url, "--prefix", "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.endswith("0.0 ")] == [
        ["b1", "5"],
        ["b2", "5"],
    ]
    assert "Shared objects" not in done.stdout
    assert "manager" not in done.stdout


# Live


class Terminal:
    """`counter-server top` at a terminal of its own, which keeps everything that was written to it."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self._slave = slave
        self.settings = termios.tcgetattr(slave)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "counter_server", "top", *arguments],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.written = ""
        self._read_until = 0

    def shows(self, text: str) -> None:
        """Wait until a text is drawn that was not there at the last call."""

        def is_there() -> bool:
            self.read()
            return text in self.written[self._read_until :]

        eventually(is_there, f"{text!r} on the screen")
        self._read_until = len(self.written)

    def read(self) -> None:
        while select.select([self._master], [], [], 0)[0]:
            self.written += os.read(self._master, 65536).decode(errors="replace")

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def ended_cleanly(self) -> bool:
        """Wait for the end; return whether it was in order and left the terminal as it was."""

        def is_over() -> bool:
            self.read()
            return self._process.poll() is not None

        eventually(is_over, "the end of top")
        self.read()
        is_main_screen = self.written.rindex("\x1b[?1049l") > self.written.rindex("\x1b[?1049h")
        is_cursor_shown = self.written.rindex("\x1b[?25h") > self.written.rindex("\x1b[?25l")
        is_same = termios.tcgetattr(self._slave) == self.settings
        said = "Traceback" in self.written or "Aborted" in self.written
        return self._process.returncode == 0 and is_main_screen and is_cursor_shown and is_same and not said

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        for descriptor in (self._master, self._slave):
            os.close(descriptor)


@pytest.fixture
def terminal(data_dir: Path) -> Iterator[Terminal]:
    with Terminal("--data-dir", str(data_dir)) as terminal:
        yield terminal


@slow
def test_the_screen_outlives_a_killed_manager_and_q_ends_it(
    start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    manager = start_manager()
    with open_client(manager.url, deadline=PATIENCE) as state, Terminal("--data-dir", str(data_dir)) as terminal:
        state.counter("tickets").set(41)
        terminal.shows("tickets")
        terminal.shows(f"manager {manager.pid}, up")
        state.counter("tickets").increment()
        terminal.shows(" 42")
        os.kill(manager.pid, signal.SIGKILL)
        terminal.shows("no manager is running")
        terminal.shows("no manager is running")  # again: it goes on asking
        other = start_manager()
        terminal.shows(f"manager {other.pid}, up")
        assert state.counter("tickets").increment() == 43
        terminal.shows(" 43")
        terminal.press(b"xq")
        assert terminal.ended_cleanly()


@slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_every_end_leaves_the_terminal_as_it_was(terminal: Terminal, how: str) -> None:
    terminal.shows("no manager is running")
    if how == "Ctrl-C":
        terminal.press(b"\x03")
    else:
        terminal.send_signal(signal.SIGTERM)
    assert terminal.ended_cleanly()


@slow
def test_a_manager_that_is_killed_during_a_snapshot_ends_it_with_one_line(
    start_manager: Callable[..., Manager], data_dir: Path
) -> None:
    manager = start_manager()
    command = [sys.executable, "-m", "counter_server", "top", "--once", "--data-dir", str(data_dir)]
    with open_client(manager.url) as state:
        program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        def is_asking() -> bool:
            status = state.status()
            return status is not None and program.pid in {each.pid for each in status.processes}

        eventually(is_asking, "its first sample")
        manager.kill()
        output, errors = program.communicate(timeout=PATIENCE)
    assert (program.returncode, output) == (1, "")
    assert re.fullmatch(r"Error: .*manager.*\n", errors)  # it may have been killed in the middle of an answer


def test_ten_thousand_counters_are_drawn_in_a_moment() -> None:
    from counter_server.cli.top import _screen

    samples = Samples()
    for second in range(2):
        counters = {f"counter {number}": number * second for number in range(10_000)}
        samples.add(Sample(float(second), None, counters, {}, is_whole=False))
    with open_state("memory://") as state:
        drawn = _screen(state, samples, 20)
    table: Any = drawn.renderables[-1]
    assert (table.row_count, next(iter(table.columns[0].cells)).plain) == (15, "counter 9999")
    assert "of the first 10,000 by name" in table.title
