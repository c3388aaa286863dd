"""A file system that takes no writes: it is full, its user's quota is, or it has become read-only.

Writes are refused, reads continue, it heals by itself, and what was refused is never found committed.
"""

import errno
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from counter_server import Counter, State, open_state
from counter_server.errors import StartupError, StorageFull
from counter_server.history import assert_exactly_once
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.manager.directory import DataDirectory
from counter_server.settings import StoreOptions
from tests.hosted_classes import SomeObj
from tests.load import HttpLoad, open_client
from tests.processes import PATIENCE, Manager, Program, Server, end_manager, eventually, fill, holder
from tests.strace import failing, faulty
from tests.test_server import ask, increment

pytestmark = pytest.mark.slow


def refused(call: Callable[[], object], reason: str) -> None:
    with pytest.raises(StorageFull, match=reason) as error:
        call()
    assert error.value.outcome == "not_applied"


@pytest.mark.parametrize(("error", "options"), [("EROFS", {}), ("EDQUOT", {}), ("ENOSPC", {"durability": "process"})])
def test_writes_that_the_file_system_refuses_for_a_while_are_refused_and_reads_go_on(
    on_demand: str, data_dir: Path, error: str, options: dict[str, Any]
) -> None:
    with open_state(on_demand, deadline=PATIENCE, options=StoreOptions(**options)) as state:
        counter, obj = state.counter("c"), state.object("obj", SomeObj, 0, durable=True)
        reason = "its disk is full" if error == "ENOSPC" else os.strerror(getattr(errno, error))
        for expected in (1, 2):
            assert (counter.increment(), obj.query()) == (expected, expected)
            with failing(holder(data_dir) or 0, "pwrite64", error):
                for call in (counter.increment, obj.query, counter.increment):
                    refused(call, f"{reason}.*reads continue")
                assert counter.value == expected
                if expected == 2:
                    end_manager(data_dir / "manager.lock")
        assert (counter.increment(), obj.query()) == (3, 3)
        assert not list(data_dir.glob(".*"))  # nothing is left of what was tried


# Each child makes its own number of idle writes first, because strace counts the writes of each process.
_REFUSED_WRITERS = """
import os, pathlib, signal, sys
from counter_server.errors import StartupError
from counter_server.history import assert_exactly_once
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.operations import Batch, Increment

def write(path):
    yield "tried"
    try:
        journal = Journal(path)
    except StartupError:
        return
    journal.count_start()
    ledger = Ledger(journal.load(), journal)
    yield "began"
    for sequence in range(1, 4):
        counters = [Increment(f"{number:0200}", key=f"{sequence}-{number}") for number in range(30)]  # several pages
        (results,) = ledger.perform([Batch(b"w" * 16, sequence, counters)])
        yield "answered" if isinstance(results[0], int) else "refused"

directory, most = pathlib.Path(sys.argv[1]), int(sys.argv[2])
idle = os.open(os.devnull, os.O_WRONLY)
for number in range(1, most):
    if not os.fork():
        for _ in range(most - number):
            os.pwrite(idle, b"x", 0)
        for word in write(directory / str(number)):
            os.write(1, f"{number} {word}\\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
"""


@pytest.mark.parametrize("lasting", [True, False])
def test_a_commit_refused_at_any_write_is_never_found_committed(tmp_path: Path, *, lasting: bool) -> None:
    """From the creation of the file on: at each write, and all after it, or the one alone that finds out why."""
    most = 90
    fault = f"error=EDQUOT:when={most}{'+' if lasting else f'..{most + 1}'}"
    with faulty("pwrite64", fault, "-c", _REFUSED_WRITERS, tmp_path, str(most)) as writers:
        eventually(lambda: not writers.running, "all writers", 4 * PATIENCE)
        assert writers.wait() == 0, writers.errors
    told: dict[str, list[str]] = {}
    for number, word in map(str.split, writers.output):
        told.setdefault(number, []).append(word)
    assert len(told) == most - 1
    for number, words in told.items():
        with closing(Journal(tmp_path / number)) as journal:
            contents = journal.load()
            assert set(contents.counters.values()) == {words.count("answered")} - {0}
            assert len(contents.keys) == 30 * words.count("answered")
            Ledger(contents, journal).show(journal.check)
    refusals = [words.count("refused") for words in told.values()]
    assert set(refusals) == ({0, 1, 2, 3} if lasting else {0, 1})
    assert refusals.count(1) >= 8  # the writes of one commit
    assert told["1"] == ["tried"]
    assert told[str(most - 1)] == ["tried", "began", *["answered"] * 3]  # so each write was tried


def test_a_server_that_can_write_nothing_for_a_while_miscounts_nothing(
    start_server: Callable[..., Server], tmp_path: Path, data_dir: Path
) -> None:
    server = start_server("--workers", "2")
    load = HttpLoad(server.url, "hot", 4)
    load.progress(100)
    for error in ("EROFS", "EDQUOT"):
        (manager,) = server.children("manager")
        with failing(manager, "pwrite64", error):
            status, _, text = ask(server.url, "POST", "/api/v1/counters/cold/increment")
            assert (status, "StorageFull" in text, "not_applied" in text) == (503, True, True), text
            for path, expected in (("/readyz", 503), ("/livez", 200), ("/api/v1/counters/hot", 200)):
                assert ask(server.url, "GET", path)[0] == expected
            if error == "EDQUOT":
                os.kill(manager, signal.SIGKILL)
        eventually(lambda: ask(server.url, "GET", "/readyz")[0] == 200, "readiness")
        load.progress(100)
    history = load.finish()
    with open_client(DataDirectory(data_dir).url) as state:
        assert_exactly_once(history, state.counter("hot").value, tmp_path / "history.json")
        assert state.counter("cold").value == 0


# A start where there is no room


@contextmanager
def no_room(disk: Path, of: str) -> Iterator[None]:
    """While the block runs, the file system takes no more bytes, or no more files, or is mounted read-only."""

    def remount(option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)

    if of == "bytes":
        fill(disk / "filler")
        yield
        (disk / "filler").unlink()
        return
    status = os.statvfs(disk)
    remount("ro" if of == "read-only" else f"nr_inodes={status.f_files - status.f_ffree}")
    yield
    remount("rw" if of == "read-only" else "nr_inodes=0")  # without a limit


def count_until_refused(state: State, reason: str = "its disk is full") -> int:
    """Use up the room that is left in the blocks of the log; return how many were counted."""
    before = state.counter("c").value
    refused(lambda: [state.counter("c").increment() for _ in count()], reason)
    return state.counter("c").value - before


@pytest.mark.parametrize(("of", "supervised"), [("bytes", False), ("files", True)])
def test_killed_on_a_full_disk_it_starts_reads_refuses_and_heals(
    stack: ExitStack, small_disk: Path, of: str, *, supervised: bool
) -> None:
    data_dir = small_disk / "data"
    stack.callback(end_manager, data_dir / "manager.lock")
    server = stack.enter_context(Server("--workers", "1", "--data-dir", data_dir)) if supervised else None
    options = StoreOptions(start=not supervised)
    state = stack.enter_context(open_state(DataDirectory(data_dir).url, deadline=PATIENCE, options=options))
    given = state.counter("c").increment()
    with no_room(small_disk, of):
        for _ in range(2):
            if of == "bytes":
                given += count_until_refused(state)
            end_manager(data_dir / "manager.lock")
            assert state.counter("c").value == given
    assert state.counter("c").increment() == given + 1
    assert server is None or server.running


def says_no_room(disk: Path, *program: str, place: str = "data") -> None:
    """Check that a program that starts in a directory of the disk ends, and says which path has no room."""
    with Program(*program, "--data-dir", disk / place) as started:
        assert started.wait() == 1
        assert re.match(f"Error: .*{disk}/{place}.*(its disk is full|No space left on device)", started.errors[0])


@pytest.mark.parametrize("of", ["bytes", "files"])
def test_stopped_in_order_it_starts_on_a_full_disk_or_says_why_not(stack: ExitStack, small_disk: Path, of: str) -> None:
    """Each start makes a socket and a log: where there can be no file there can be no start."""
    with Manager(small_disk / "data") as manager, open_client(manager.url) as state:
        assert state.counter("c").increment() == 1
        assert manager.stop() == 0
    with no_room(small_disk, of):
        if of == "bytes":
            with Manager(small_disk / "data") as manager, open_client(manager.url, deadline=PATIENCE) as state:
                assert state.counter("c").value == 1
                count_until_refused(state)
        else:
            says_no_room(small_disk, "manager_process.py")
            says_no_room(small_disk, "run.py", "--port", "0")
            with pytest.raises(StartupError, match="No space left on device"):
                stack.enter_context(open_state(manager.url)).counter("c").increment()
        for program in ("manager_process.py", "run.py"):
            says_no_room(small_disk, program, place="first")
            assert not [*small_disk.rglob("first/*.sqlite3*"), *small_disk.rglob("first/*.key")]
    for place in ("data", "first"):
        with Manager(small_disk / place) as manager, open_client(manager.url, deadline=PATIENCE) as state:
            assert state.counter("c").increment() == state.counter("c").value


def test_a_manager_without_room_to_start_is_tried_again_until_there_is(stack: ExitStack, small_disk: Path) -> None:
    """A supervisor gives up sooner on a manager that fails for another reason."""
    data_dir, moved = small_disk / "data", small_disk / "moved"
    server = stack.enter_context(Server("--workers", "1", "--data-dir", data_dir))
    state = stack.enter_context(open_client(DataDirectory(data_dir).url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    with no_room(small_disk, "files"):
        data_dir.rename(moved)  # which ends the manager, and the next one has to make another
        error = f"Error: the data directory {data_dir} cannot be made: No space left on device"
        eventually(lambda: sum(line.startswith(error) for line in server.errors) > 2, "the tries to start")
        moved.rename(data_dir)
    assert state.counter("c").increment() == 2
    tries = [line[:23].replace(",", ".") for line in server.errors if "ended with status 73; starting another" in line]
    first, second, third, *_ = map(datetime.fromisoformat, tries)
    assert min(second - first, third - second).total_seconds() > 2.5


def test_a_limit_of_the_size_of_files_is_a_full_disk(stack: ExitStack, data_dir: Path) -> None:
    server = stack.enter_context(Server("--workers", "1", "--data-dir", data_dir))
    state = stack.enter_context(open_client(DataDirectory(data_dir).url, deadline=PATIENCE))
    given = state.counter("c").increment()
    hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]

    def limit(size: int) -> None:
        for pid in (server.pid, *server.children("manager")):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    limit(50_001)
    given += count_until_refused(state, os.strerror(errno.EFBIG))
    end_manager(data_dir / "manager.lock")
    given += count_until_refused(state, os.strerror(errno.EFBIG))
    limit(hard)
    assert state.counter("c").increment() == given + 1


def test_writes_to_a_sqlite_file_that_are_refused_are_not_applied(stack: ExitStack, tmp_path: Path) -> None:
    server = stack.enter_context(Server("--workers", "1", "--store", f"sqlite:///{tmp_path}/counters.db"))
    path, keyed = "/api/v1/counters/x/increment", {"Idempotency-Key": "k"}
    first = ask(server.url, "POST", path, headers=keyed)[2]
    assert '"value":1' in first
    (worker,) = server.children("worker")
    for expected, error in enumerate(["ENOSPC", "EROFS", "EFBIG"], 2):
        with failing(worker, "pwrite64", error):
            for _ in range(2):
                status, _, text = ask(server.url, "POST", path)
                assert (status, "StorageFull" in text, "not_applied" in text) == (503, True, True), text
            assert '"value":' in ask(server.url, "GET", "/api/v1/counters/x")[2]
            assert ask(server.url, "POST", path, headers=keyed)[2] == first
        assert increment(server.url) == expected


@pytest.mark.parametrize("reason", ["bytes", "files", "read-only"])
def test_a_sqlite_file_that_is_opened_where_no_write_is_taken(stack: ExitStack, small_disk: Path, reason: str) -> None:
    """SQLite makes files beside it even to read it, unless another process has them."""
    url = f"sqlite:///{small_disk}/counters.db"
    with open_state(url) as state:
        assert state.counter("c").increment() == 1
    calls: list[Callable[[Counter], int]] = [Counter.increment, lambda counter: counter.value]
    with no_room(small_disk, reason):
        for call in calls:
            state = stack.enter_context(open_state(url))
            refused(lambda: call(state.counter("c")), "cannot be written to")
    assert state.counter("c").increment() == 2


def test_a_file_system_turned_read_only_refuses_until_mounted_again(stack: ExitStack, tmp_path: Path) -> None:
    """A real one: ext4 with `errors=remount-ro`, its usual setting, when it finds a fault of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    place, image = tmp_path / "mounted", tmp_path / "image"
    place.mkdir()
    image.write_bytes(bytes(16 << 20))

    def run(*command: str | Path) -> None:
        subprocess.run(command, check=True)

    mount = ("mount", "-o", "loop,errors=remount-ro", image, place)
    try:
        run("mkfs.ext4", "-q", image)
        run(*mount)
    except subprocess.CalledProcessError as error:  # and nothing that could be installed would change that
        pytest.xfail(f"this kernel makes no disk of a file: {error}")
    stack.callback(run, "umount", place)
    with Manager(place / "data") as manager, open_client(manager.url) as state:
        assert state.counter("c").increment() == 1
        device = place.stat().st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("for a test")
        for _ in range(2):
            refused(state.counter("c").increment, "Read-only file system")
        assert state.counter("c").value == 1
        manager.kill()
    run("umount", place)
    run(*mount)
    with Manager(place / "data") as manager, open_client(manager.url) as state:
        assert state.counter("c").increment() == 2
