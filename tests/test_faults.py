"""The manager under faults that are really injected: of the disk, of its files, of descriptors and of the clock."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from itertools import pairwise
from pathlib import Path
from select import poll

import pytest
from limits import RateLimitItemPerSecond, RateLimitItemPerYear
from limits.strategies import STRATEGIES

from counter_server import State
from counter_server.errors import DeadlineExceeded, StartupError, StateLost
from counter_server.history import assert_exactly_once
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.limiting import ManagerStorage
from counter_server.manager.directory import DataDirectory
from counter_server.operations import Batch, Increment
from tests.journals import written
from tests.load import HttpLoad, impatient, open_client
from tests.processes import PATIENCE, Manager, Program, Server, eventually
from tests.strace import failing, faulty, injected, killed_at
from tests.test_manager import greeted, raw
from tests.test_server import ask

pytestmark = pytest.mark.slow

StartManager = Callable[..., Manager]


@pytest.fixture
def manager(start_manager: StartManager) -> Manager:
    return start_manager()


@pytest.fixture
def state(manager: Manager, stack: ExitStack) -> State:
    """Return the state of the manager and its successors, with a counter at 1."""
    state = stack.enter_context(open_client(manager.url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    return state


# Kills at every step of a commit

_WRITER = """
import pathlib, sys
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.operations import Batch, Increment

journal = Journal(pathlib.Path(sys.argv[1]))
ledger = Ledger(journal.load(), journal)
for sequence in range(1, 3):
    ((value,),) = ledger.perform([Batch(b"w" * 16, sequence, [Increment("a", key=f"k{sequence}")])])
    print(f"answered {value}", flush=True)
journal.close()
"""


def survives_a_kill(path: Path, call: str, when: int, backup: Path | None) -> bool:
    """Kill a writer at this call and check the files it leaves; return whether it came that far."""
    path.mkdir()
    if backup is not None:
        shutil.copy(backup, path / "journal")
    with killed_at(call, when, "-c", _WRITER, path / "journal") as writer:
        status = writer.wait()
    assert status in (0, -signal.SIGKILL), writer.errors
    answered = len(writer.output)
    with closing(Journal(path / "journal")) as journal:
        contents = journal.load()
        value = contents.counters.get("a", 0)
        assert value in (answered, answered + 1)
        assert [known.value for known in contents.keys.values()] == list(range(1, value + 1))
        # A batch that was never answered is sent again, and counted once.
        ledger = Ledger(contents, journal)
        again = Batch(b"w" * 16, answered + 1, [Increment("a", key=f"k{answered + 1}")])
        assert ledger.perform([again]) == [[answered + 1]]
        ledger.show(journal.check)
    return status != 0


def moments(check: Callable[[int], bool], step: int = 1) -> int:
    """Return for how many moments, every `step`th from the first, a check returns True; False ends them."""
    found: list[bool] = []
    with ThreadPoolExecutor(4) as several:
        while all(found):
            first = 1 + len(found) * step
            found += several.map(check, range(first, first + 4 * step, step))
    assert found == sorted(found, reverse=True)
    return sum(found)


@pytest.mark.parametrize(
    ("call", "step", "fewest", "put_back"),
    [("fdatasync", 1, 6, False), ("fdatasync", 1, 6, True), ("pwrite64", 3, 10, False), ("ftruncate", 1, 2, False)],
)
def test_a_writer_killed_at_any_step_of_a_commit_loses_nothing(
    tmp_path: Path, call: str, step: int, fewest: int, *, put_back: bool
) -> None:
    """From creating the file, or opening a backup, to closing it: at every sync, and at every third write."""
    backup = tmp_path / "backup" if put_back else None
    if backup is not None:
        with closing(Journal(tmp_path / "original")) as journal:
            journal.back_up(backup)
    assert moments(lambda when: survives_a_kill(tmp_path / f"{when}", call, when, backup), step) >= fewest


def test_a_journal_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    maker = (
        "import pathlib, sys; from counter_server.journal import Journal; Journal(pathlib.Path(sys.argv[1])).close()"
    )

    def is_refused(when: int) -> bool:
        path = tmp_path / f"{when}"
        path.mkdir()
        with faulty("pwrite64", f"error=ENOSPC:when={when}+", "-c", maker, path / "journal") as made:
            if made.wait() == 0:
                return False
        assert str(path) in made.errors[-1]
        assert list(path.iterdir()) == []
        return True

    assert moments(is_refused, 4) >= 5


# A disk that fails


# With openat, the journal cannot find out the reason, which does not matter. With write, the log fails too.
@pytest.mark.parametrize(
    ("call", "error"), [("fdatasync,openat", "EROFS"), ("pwrite64", "EIO"), ("fdatasync,write", "EIO")]
)
def test_a_manager_whose_disk_fails_stops_at_once_and_the_next_one_counts_on(
    manager: Manager, state: State, start_manager: StartManager, call: str, error: str
) -> None:
    with ThreadPoolExecutor(1) as caller:
        with failing(manager.pid, call, error):
            answer = caller.submit(state.counter("c").increment)
            assert manager.wait() == 74
        if call != "fdatasync,write":
            (line,) = manager.errors
            assert re.search("journal.sqlite3 failed.*unknown", line)
        assert not answer.done()
        start_manager()
        assert answer.result() == 2  # whether it had been written or not
    assert state.counter("c").increment() == 3


def test_a_read_only_file_system_is_named_and_nothing_is_lost(small_disk: Path, stack: ExitStack) -> None:
    with Manager(small_disk / "data") as manager, open_client(manager.url) as state:
        assert state.counter("c").increment() == 1
        manager.kill()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with Program("manager_process.py", "--data-dir", small_disk / "data") as refused:
        assert refused.wait() == 1
        (line,) = refused.errors
    assert re.search(f"{small_disk}/data.*Read-only file system", line)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    state = stack.enter_context(open_client(stack.enter_context(Manager(small_disk / "data")).url))
    assert state.counter("c").increment() == 2


# A torn journal


@pytest.mark.parametrize("name", ["journal", "journal-wal"])
def test_a_damaged_journal_is_refused_or_is_as_it_was_at_one_commit(tmp_path: Path, name: str) -> None:
    """In the log, everything after the damage counts as never written. A file without a log is whole or refused."""
    copies, states = written(tmp_path / "original")
    if name == "journal":
        copies = {name: (tmp_path / "original" / name).read_bytes()}  # alone: closed, the log is folded in
        states = states[-1:]
    good = copies[name]
    assert len(good) > 20_000
    refused = 0
    for turn, offset in enumerate(range(0, len(good), len(good) // 120)):
        flipped = bytes([good[offset] ^ 1 << offset % 8])
        end = [flipped + good[offset + 1 :], os.urandom(16) + good[offset + 16 :], b""][turn % 3]
        path = tmp_path / f"{turn}" / "journal"
        path.parent.mkdir()
        for file, content in {**copies, name: good[:offset] + end}.items():
            path.with_name(file).write_bytes(content)
        try:
            with closing(Journal(path)) as journal:
                assert journal.load() in states, (turn % 3, offset)
        except StartupError as error:
            if str(path) not in str(error):
                raise
            refused += 1
    if name == "journal":
        assert refused > 40


# Removed files


def new_client_counts(url: str) -> int:
    with open_client(url, deadline=PATIENCE) as fresh:
        return fresh.counter("c").increment()


def test_a_socket_that_was_removed_is_bound_again(manager: Manager, state: State, data_dir: Path) -> None:
    path, place = DataDirectory(data_dir).socket, data_dir.with_name("foreign")
    for number in (2, 4):
        path.unlink()
        assert state.counter("c").increment() == number
        assert new_client_counts(manager.url) == number + 1
        assert path.is_socket()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(place))  # without a listener
        place.rename(path)  # in one step: the manager may be faster than two
        assert new_client_counts(manager.url) == 6
    before = list(manager.errors)
    with injected(manager.pid, "?unlink,unlinkat", "delay_exit=800000"):  # longer than the interval of its checks
        assert manager.stop() == 0
    assert manager.errors == before  # it does not take its own removal for another
    assert not path.exists()


def test_what_takes_the_place_of_the_socket_is_left_alone_and_named(
    manager: Manager, state: State, data_dir: Path
) -> None:
    path = DataDirectory(data_dir).socket
    notes = data_dir.with_name("notes")
    notes.write_text("notes")
    notes.rename(path)  # in one step: the manager may be faster than two
    eventually(lambda: any(str(path) in line and "not a socket" in line for line in manager.errors), "its name")
    assert state.counter("c").increment() == 2
    assert manager.stop() == 0
    assert path.read_text() == "notes"


def test_a_manager_whose_directory_or_journal_was_moved_ends_and_says_so(
    manager: Manager, state: State, data_dir: Path, start_manager: StartManager
) -> None:
    moved, journal = data_dir.with_name("moved"), DataDirectory(data_dir).journal
    data_dir.rename(moved)
    assert manager.wait() == 74
    assert f"{data_dir} was removed, or replaced" in manager.errors[0]
    moved.rename(data_dir)
    manager = start_manager()
    assert state.counter("c").increment() == 2
    journal.rename(moved)
    assert manager.wait() == 74
    with pytest.raises(AssertionError, match="put back the journal that it was written for"):  # its log is there
        start_manager()
    moved.rename(journal)
    start_manager()
    assert state.counter("c").increment() == 3


@pytest.mark.parametrize(
    ("damage", "notices"),
    [
        *(("both removed", "at a commit"), ("log removed", "at a commit"), ("log cut", "at a commit")),
        *(("log removed", "by itself"), ("log emptied", "by itself")),
        *(("both removed", "never"), ("log removed", "never"), ("log cut", "never")),
    ],
)
def test_a_manager_whose_journal_is_gone_ends_and_repeats_nothing(
    manager: Manager, state: State, start_manager: StartManager, data_dir: Path, damage: str, notices: str
) -> None:
    for number in range(2, 60):
        assert state.counter("c").increment() == number
    if notices == "never":
        manager.kill()
    journal = DataDirectory(data_dir).journal
    log = journal.with_name(f"{journal.name}-wal")
    if damage in ("log cut", "log emptied"):
        os.truncate(log, log.stat().st_size - 10_000 if damage == "log cut" else 0)
    if damage.endswith("removed"):
        log.unlink()
    if damage == "both removed":
        journal.unlink()
    if notices == "at a commit":
        with impatient(state), pytest.raises(DeadlineExceeded):
            state.counter("c").increment()
    if notices != "never":
        assert manager.wait() == 74
        (line,) = manager.errors
        assert re.search("journal.sqlite3.* while it was in use.*; stopping to start again", line)
        assert ("nothing is lost, all is in" in line) == (damage == "log removed")
    successor = start_manager()
    if damage == "log removed" and notices != "never":
        assert state.counter("c").increment() in (60, 61)
        assert successor.errors == []
        return
    with pytest.raises(StateLost) as lost:
        state.counter("c").increment()
    assert lost.value.outcome == "not_applied"
    assert state.counter("c").increment() == (58 if damage == "log cut" else 1)
    (line,) = eventually(lambda: successor.errors, "the line in the log")
    assert f"{journal} or its log was removed, replaced or cut" in line


# Descriptors and peers


def test_a_manager_without_descriptors_does_not_spin_and_serves_again_when_there_are_some(
    manager: Manager, state: State, data_dir: Path
) -> None:
    used, clock = len(list(Path(f"/proc/{manager.pid}/fd").iterdir())), ~manager.pid << 3 | 2  # its processor time
    before = resource.prlimit(manager.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(manager.pid, resource.RLIMIT_NOFILE, (used, before[1]))
    try:
        with ExitStack() as waiting:
            for _ in range(20):
                waiting.enter_context(raw(data_dir))
            began = time.clock_gettime(clock)
            for number in range(2, 12):
                assert state.counter("c").increment() == number
                time.sleep(0.1)  # pauses: this measures the manager's own use of time, not the load
            assert time.clock_gettime(clock) - began < 0.4
    finally:
        resource.prlimit(manager.pid, resource.RLIMIT_NOFILE, before)
    with open_client(manager.url, deadline=PATIENCE) as fresh:
        assert fresh.counter("d").increment() == 1


def test_half_open_peers_are_gone_after_the_handshakes_time(
    manager: Manager, state: State, data_dir: Path, stack: ExitStack
) -> None:
    threads = Path(f"/proc/{manager.pid}/task")
    before = len(list(threads.iterdir()))
    silent = [stack.enter_context(raw(data_dir)) for _ in range(200)]
    assert state.counter("c").increment() == 2
    for peer in silent:
        with suppress(ConnectionResetError):
            while peer.recv(1000):
                pass
    # One more may be there: it writes the log if the log's reader is slow.
    eventually(lambda: len(list(threads.iterdir())) <= before + 1, "the end of their threads")
    assert state.counter("c").increment() == 3


def test_peers_that_never_read_are_cut_off_and_hold_up_nobody(
    manager: Manager, state: State, data_dir: Path, stack: ExitStack
) -> None:
    names = [f"{number:04}" + "x" * 240 for number in range(1000)]
    state.store.apply(Batch(os.urandom(16), 1, [Increment(name) for name in names]), time.monotonic() + PATIENCE)
    ends = poll()  # without an event it reports only closed connections
    for _ in range(20):
        peer, kind, _ = greeted(data_dir)
        stack.callback(peer.close)
        assert kind == "#RETURN"
        ends.register(peer, 0)
        with suppress(BrokenPipeError, ConnectionResetError):  # it was cut off between two messages
            for _ in range(5):  # each answer is as large as a socket's buffer
                peer.send(("ledger", "apply", ((os.urandom(16), 0, [("scan", "", 1000)]),), {}))
    assert state.counter("c").increment() == 2
    eventually(lambda: len(ends.poll(0)) == 20, "the end of all peers")
    assert state.counter("c").increment() == 3


def test_a_peer_with_the_key_gets_no_further_with_malformed_messages(stack: ExitStack, data_dir: Path) -> None:
    manager = stack.enter_context(Program("-O", "manager_process.py", "--data-dir", data_dir))
    state = stack.enter_context(open_client(manager.expect("Manager ready:")))
    assert state.counter("c").increment() == 1
    proof = data_dir / "proof"
    payload = f"cbuiltins\nopen\n(V{proof}\nVw\ntR.".encode()  # a pickle that makes it
    for message in (
        *(b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"),
        *(len(payload).to_bytes(4, "big") + payload, b"\x00\x00\x00\x03\xc1\xc1\xc1"),
        *(b"\x00\x00\x10\x00" + b"\x91" * 4096, b"\x00\x00\x00\x05\xdd\xff\xff\xff\xff"),  # deep, and long, arrays
    ):
        peer, kind, _ = greeted(data_dir)
        with closing(peer), socket.socket(fileno=os.dup(peer.fileno())) as sock:
            assert kind == "#RETURN"
            sock.settimeout(PATIENCE)  # its timer is still the handshake's
            sock.sendall(message)
            with suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    assert not proof.exists()
    assert state.counters().counters == [("c", 1)]
    assert manager.running


# A kill of everything


def test_a_whole_server_killed_under_load_miscounts_nothing(stack: ExitStack, data_dir: Path, tmp_path: Path) -> None:
    with Server("--workers", "2", "--data-dir", data_dir) as server:
        port = server.url.rpartition(":")[2]
        load = HttpLoad(server.url, "hot", 4)
        load.progress(100)
        # At once: the supervisor, the manager and the workers.
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    stack.enter_context(Program("run.py", "--port", port, "--workers", "2", "--data-dir", data_dir))
    load.progress(100)
    history = load.finish()
    with open_client(DataDirectory(data_dir).url) as state:
        assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")


# The clock


@pytest.fixture
def jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that shifts the wall clock of all programs started from then on by some seconds."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed (Debian package faketime)")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
    for name in ("FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "DONT_FAKE_MONOTONIC"):
        monkeypatch.setenv(name, "1")  # setting a clock does not change the monotonic one

    def jump(seconds: str) -> None:
        draft = clock.with_name("draft")
        draft.write_text(seconds)
        draft.rename(clock)
        program = "import time; print(time.time(), time.monotonic())"
        told = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, check=True).stdout.split()
        assert abs(float(told[0]) - time.time() - float(seconds)) < 60
        assert abs(float(told[1]) - time.monotonic()) < 60

    memory = Path("/dev/shm")
    before = set(memory.glob("*faketime*"))
    yield jump
    for left in set(memory.glob("*faketime*")) - before:  # by killed programs
        left.unlink()


def test_clocks_that_jump_an_hour_either_way_revive_and_repeat_nothing(
    jump: Callable[[str], None], start_server: Callable[..., Server]
) -> None:
    def increment(key: str) -> int:
        status, _, text = ask(server.url, "POST", "/api/v1/counters/c/increment", None, {"Idempotency-Key": key})
        assert status == 200, text
        return int(json.loads(text)["value"])

    server = start_server("--workers", "2")
    children = {*server.children("worker"), *server.children("manager")}
    assert increment("first") == 1
    for number, seconds in enumerate(("+3600", "-3600", "-90000", "+90000"), 2):
        jump(seconds)
        assert [increment(key) for key in (seconds, seconds, "first")] == [number, number, 1]
    assert {*server.children("worker"), *server.children("manager")} == children
    assert server.stop() == 0
    jump("-3600")
    server = start_server("--workers", "1")
    assert [increment("first"), increment("last")] == [1, 6]


def test_a_clock_that_jumps_ends_no_limit_and_prolongs_none(jump: Callable[[str], None], on_demand: str) -> None:
    """The manager's clock jumps, and the clock of this process does not."""
    storage = ManagerStorage(on_demand, deadline=PATIENCE)
    limiters = {name: kind(storage) for name, kind in STRATEGIES.items()}  # each has a user of its name
    second, year = RateLimitItemPerSecond(1), RateLimitItemPerYear(1)
    for name, limiter in limiters.items():
        assert limiter.hit(year, name)
    for before, after in pairwise((0, -3600, 10**8, 0)):
        resets = {}
        for name, limiter in limiters.items():
            eventually(lambda: limiter.hit(second, name), "the end of a second")
            resets[name] = limiter.get_window_stats(year, name).reset_time
        jump(f"{after:+}")
        for name, limiter in limiters.items():
            eventually(lambda: limiter.hit(second, name), "the end of a second")
            stats = limiter.get_window_stats(year, name)
            assert not limiter.hit(year, name)
            assert stats.remaining == 0
            if name != "sliding-window-counter":  # this process computes its end, by its own clock
                assert abs(stats.reset_time - resets[name] - (after - before)) < PATIENCE


def test_a_clock_that_is_set_back_locks_no_address_out(
    jump: Callable[[str], None], start_server: Callable[..., Server]
) -> None:
    server = start_server("--workers", "2", "--rate-limit", "1/second")

    def refused_for() -> str | None:
        status, headers, _ = ask(server.url, "GET", "/api/v1/counters")
        return headers["Retry-After"] if status == 429 else None

    for seconds in ("-3600", "+3600"):
        eventually(refused_for, "the limit")
        jump(seconds)
        assert {refused_for(), refused_for()} <= {"1", None}
        eventually(lambda: refused_for() is None, "another second")
