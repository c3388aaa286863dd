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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path

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
REFUSING = ["ENOSPC", "EDQUOT", "EROFS"]


@pytest.mark.parametrize(("error", "durability"), [*((error, "commit") for error in REFUSING), ("ENOSPC", "process")])
def test_writes_that_the_file_system_refuses_for_a_while_are_refused_and_reads_go_on(
    start_manager: Callable[..., Manager], stack: ExitStack, data_dir: Path, error: str, durability: str
) -> None:
    manager = start_manager("--durability", durability)
    state = stack.enter_context(open_client(manager.url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    with failing(manager.pid, "pwrite64", error):
        reason = "its disk is full" if error == "ENOSPC" else os.strerror(getattr(errno, error))
        for _ in range(2):
            with pytest.raises(StorageFull, match=f"{reason}.*; nothing was counted, and reads continue") as refused:
                state.counter("c").increment()
            assert refused.value.outcome == "not_applied"
        assert state.counter("c").value == 1
    assert state.counter("c").increment() == 2
    with failing(manager.pid, "pwrite64", error):
        with pytest.raises(StorageFull):
            state.counter("c").increment()
        manager.kill()
    start_manager()
    assert state.counter("c").increment() == 3
    assert not list(data_dir.glob(".*"))  # nothing is left of what was tried


def test_calls_of_a_durable_object_are_refused_with_the_writes_and_leave_it_as_it_was(
    on_demand: str, data_dir: Path
) -> None:
    with open_state(on_demand, deadline=PATIENCE) as state:
        obj = state.object("obj", SomeObj, 0, durable=True)
        for expected, error in enumerate(REFUSING, 1):
            assert obj.query() == expected
            with failing(holder(data_dir) or 0, "pwrite64", error):
                for _ in range(2):
                    with pytest.raises(StorageFull) as refused:
                        obj.query()
                    assert refused.value.outcome == "not_applied"
                if error != "EDQUOT":
                    end_manager(data_dir / "manager.lock")
        assert obj.query() == 4


_REFUSED_WRITER = """
import os, pathlib, signal, sys
from counter_server.journal import Journal
from counter_server.ledger import Ledger
from counter_server.operations import Batch, Increment

journal = Journal(pathlib.Path(sys.argv[1]))
journal.count_start()
ledger = Ledger(journal.load(), journal)
print("began", flush=True)
for sequence in range(1, 4):
    counters = [Increment(f"{number:0200}", key=f"{sequence}-{number}") for number in range(30)]  # on several pages
    (results,) = ledger.perform([Batch(b"w" * 16, sequence, counters)])
    print("answered" if isinstance(results[0], int) else "refused", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def stays_refused(path: Path, fault: str) -> list[str]:
    """What a writer with that fault was told, which has to be what it leaves when it is killed."""
    with faulty("pwrite64", fault, "-c", _REFUSED_WRITER, path) as writer:
        status = writer.wait()
    told = list(writer.output)
    assert status == (-signal.SIGKILL if "began" in told else 1), writer.errors
    with closing(Journal(path)) as journal:
        contents = journal.load()
        assert set(contents.counters.values()) == {told.count("answered")} - {0}
        assert len(contents.keys) == 30 * told.count("answered")
        ledger = Ledger(contents, journal)
        ledger.show(journal.check)
    return told


@pytest.mark.parametrize("lasting", [True, False])
def test_what_is_refused_at_any_write_of_a_commit_is_never_found_committed(tmp_path: Path, *, lasting: bool) -> None:
    """From the making of the file on: at each write, and all after it, or the one alone that finds out why."""
    told: list[list[str]] = []
    with ThreadPoolExecutor(4) as several:
        while not told or "refused" in told[-1] or "began" not in told[-1]:
            moments = range(len(told) + 1, len(told) + 17)
            faults = [f"error=EDQUOT:when={when}{'+' if lasting else f'..{when + 1}'}" for when in moments]
            told += several.map(lambda fault: stays_refused(tmp_path / fault, fault), faults)
    refused = [words.count("refused") for words in told]
    assert set(refused) == ({0, 1, 2, 3} if lasting else {0, 1})
    assert refused.count(1) >= 8  # the writes of one commit


def test_a_server_whose_file_system_takes_no_writes_for_a_while_miscounts_nothing(
    start_server: Callable[..., Server], tmp_path: Path, data_dir: Path
) -> None:
    server = start_server("--workers", "2")
    load = HttpLoad(server.url, "hot", 4)
    load.progress(100)
    for error in ("EROFS", "EDQUOT", "EROFS"):
        (manager,) = server.children("manager")
        with failing(manager, "pwrite64", error):
            status, _, text = ask(server.url, "POST", "/api/v1/counters/cold/increment")
            assert (status, "StorageFull" in text, "not_applied" in text) == (503, True, True), text
            assert ask(server.url, "GET", "/readyz")[0] == 503
            assert ask(server.url, "GET", "/livez")[0] == 200
            assert ask(server.url, "GET", "/api/v1/counters/hot")[0] == 200
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
    if of == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        return
    if of == "bytes":
        fill(disk / "filler")
        yield
        (disk / "filler").unlink()
        return
    status = os.statvfs(disk)
    subprocess.run(["mount", "-o", f"remount,nr_inodes={status.f_files - status.f_ffree}", disk], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,nr_inodes=0", disk], check=True)  # without a limit


def count_until_refused(state: State, reason: str = "its disk is full") -> int:
    """Take the room that is left in the blocks of the log; how many were counted."""
    before = state.counter("c").value

    def fill_the_rest() -> None:
        while True:
            state.counter("c").increment()

    with pytest.raises(StorageFull, match=f"{reason}.*; nothing was counted, and reads continue") as refused:
        fill_the_rest()
    assert refused.value.outcome == "not_applied"
    return state.counter("c").value - before


@pytest.mark.parametrize("of", ["bytes", "files"])
@pytest.mark.parametrize("supervised", [True, False])
def test_killed_on_a_full_disk_it_starts_reads_refuses_and_heals(
    stack: ExitStack, small_disk: Path, of: str, *, supervised: bool
) -> None:
    data_dir = small_disk / "data"
    stack.callback(end_manager, data_dir / "manager.lock")
    server = stack.enter_context(Server("--workers", "1", "--data-dir", data_dir)) if supervised else None
    options = StoreOptions(start=not supervised)
    state = stack.enter_context(open_state(DataDirectory(data_dir).url, deadline=PATIENCE, options=options))
    assert state.counter("c").increment() == 1
    given = 1
    with no_room(small_disk, of):
        for _ in range(2):
            if of == "bytes":
                given += count_until_refused(state)
            end_manager(data_dir / "manager.lock")
            assert state.counter("c").value == given
    assert state.counter("c").increment() == given + 1
    assert server is None or server.running


@pytest.mark.parametrize("of", ["bytes", "files"])
def test_stopped_in_order_it_starts_on_a_full_disk_or_says_why_not(stack: ExitStack, small_disk: Path, of: str) -> None:
    """Its socket and its log are made at each start: where there can be no file there can be no start."""
    with Manager(small_disk / "data") as manager, open_client(manager.url) as state:
        assert state.counter("c").increment() == 1
        assert manager.stop() == 0
    with no_room(small_disk, of):
        if of == "bytes":
            with Manager(small_disk / "data") as manager, open_client(manager.url, deadline=PATIENCE) as state:
                assert state.counter("c").value == 1
                count_until_refused(state)
        else:
            for program in (["manager_process.py"], ["run.py", "--port", "0"]):
                with Program(*program, "--data-dir", small_disk / "data") as refused:
                    assert refused.wait() == 1
                (line, *_) = refused.errors
                assert re.match(f"Error: .*{small_disk}/data.*No space left on device", line)
            with pytest.raises(StartupError, match="No space left on device"):
                stack.enter_context(open_state(manager.url)).counter("c").increment()
    with Manager(small_disk / "data") as manager, open_client(manager.url, deadline=PATIENCE) as state:
        assert state.counter("c").increment() == state.counter("c").value


@pytest.mark.parametrize("of", ["bytes", "files"])
def test_a_first_start_on_a_full_disk_says_so_and_leaves_nothing(small_disk: Path, of: str) -> None:
    with no_room(small_disk, of):
        for program in ("run.py", "manager_process.py"):
            with Program(program, "--data-dir", small_disk / "data") as refused:
                assert refused.wait() == 1
                (line, *_) = refused.errors
            assert re.match(f"Error: .*{small_disk}/data.*(its disk is full|No space left on device)", line)
            assert not [*small_disk.rglob("*.sqlite3*"), *small_disk.rglob("*.key")]
    Manager(small_disk / "data").__exit__(None, None, None)


def test_a_manager_without_room_to_start_is_tried_again_until_there_is(stack: ExitStack, small_disk: Path) -> None:
    """Longer than a supervisor bears a manager that fails for another reason."""
    data_dir, moved = small_disk / "data", small_disk / "moved"
    server = stack.enter_context(Server("--workers", "1", "--data-dir", data_dir))
    state = stack.enter_context(open_client(DataDirectory(data_dir).url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    with no_room(small_disk, "files"):
        data_dir.rename(moved)  # which ends the manager, and the next one has to make another
        refused = f"Error: the data directory {data_dir} cannot be made: No space left on device"
        eventually(lambda: server.errors.count(refused) > 2, "the tries to start")
        moved.rename(data_dir)
    assert state.counter("c").increment() == 2
    ends = [line for line in server.errors if "ended with status 73; starting another" in line]
    moments = [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") for line in ends]
    assert len(moments) > 2
    assert all((later - earlier).total_seconds() > 2.5 for earlier, later in pairwise(moments))


def test_a_limit_of_the_size_of_files_is_a_full_disk(stack: ExitStack, data_dir: Path) -> None:
    server = stack.enter_context(Server("--workers", "1", "--data-dir", data_dir))
    state = stack.enter_context(open_client(DataDirectory(data_dir).url, deadline=PATIENCE))
    assert state.counter("c").increment() == 1
    given = 1
    hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
    for limit in (40_000, 50_001):
        for pid in (server.pid, *server.children("manager")):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))
        given += count_until_refused(state, os.strerror(errno.EFBIG))
        end_manager(data_dir / "manager.lock")
        given += count_until_refused(state, os.strerror(errno.EFBIG))
        assert state.counter("c").value == given
    for pid in (server.pid, *server.children("manager")):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert state.counter("c").increment() == given + 1


def test_writes_to_a_sqlite_file_that_are_refused_are_not_applied(stack: ExitStack, tmp_path: Path) -> None:
    server = stack.enter_context(Server("--workers", "1", "--store", f"sqlite:///{tmp_path}/counters.db"))
    keyed = {"Idempotency-Key": "k"}
    first = ask(server.url, "POST", "/api/v1/counters/x/increment", headers=keyed)[2]
    assert '"value":1' in first
    (worker,) = server.children("worker")
    for expected, error in enumerate([*REFUSING, "EFBIG"], 2):
        with failing(worker, "pwrite64", error):
            for _ in range(2):
                status, _, text = ask(server.url, "POST", "/api/v1/counters/x/increment")
                assert (status, "StorageFull" in text, "not_applied" in text) == (503, True, True), text
            assert '"value":' in ask(server.url, "GET", "/api/v1/counters/x")[2]
            assert ask(server.url, "POST", "/api/v1/counters/x/increment", headers=keyed)[2] == first
        assert increment(server.url) == expected


@pytest.mark.parametrize("reason", ["bytes", "files", "read-only"])
def test_a_sqlite_file_that_is_opened_where_no_write_is_taken(stack: ExitStack, small_disk: Path, reason: str) -> None:
    """To read it, too, SQLite makes files beside it, unless another process has them."""
    url = f"sqlite:///{small_disk}/counters.db"
    with open_state(url) as state:
        assert state.counter("c").increment() == 1
    with no_room(small_disk, reason):
        calls: list[Callable[[Counter], int]] = [Counter.increment, lambda counter: counter.value]
        for call in calls:
            state = stack.enter_context(open_state(url))
            with pytest.raises(StorageFull, match=r"cannot be written to: .*; nothing was counted") as refused:
                call(state.counter("c"))
            assert refused.value.outcome == "not_applied"
    assert state.counter("c").increment() == 2


class Ext4:
    """A file system of 16 MB, on a disk that is a file. Only root can have it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "mounted"
        self.path.mkdir()
        self._image = directory / "image"
        with self._image.open("wb") as image:
            image.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", self._image], check=True)
        self._mount()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", self._image, self.path], check=True)

    def make_itself_read_only(self) -> None:
        """Have it find an error."""
        device = self.path.stat().st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("for a test")

    def mount_anew(self) -> None:
        self.unmount()
        self._mount()

    def unmount(self) -> None:
        subprocess.run(["umount", self.path], check=True)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Ext4]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    try:
        made = Ext4(tmp_path)
    except subprocess.CalledProcessError as error:  # and nothing that could be installed would change that
        pytest.xfail(f"this kernel makes no disk of a file: {error}")
    yield made
    made.unmount()


def test_a_file_system_that_makes_itself_read_only_is_a_refusal_until_it_is_mounted_anew(
    ext4: Ext4, stack: ExitStack
) -> None:
    """A real one: what `errors=remount-ro`, the usual setting of ext4, does when it finds a fault of its own."""
    with Manager(ext4.path / "data") as manager, open_client(manager.url) as state:
        for number in range(1, 10):
            assert state.counter("c").increment() == number
        ext4.make_itself_read_only()
        for _ in range(2):
            with pytest.raises(StorageFull, match="Read-only file system"):
                state.counter("c").increment()
        assert state.counter("c").value == 9
        manager.kill()
    ext4.mount_anew()
    state = stack.enter_context(open_client(stack.enter_context(Manager(ext4.path / "data")).url))
    assert state.counter("c").increment() == 10
