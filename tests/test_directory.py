"""The data directory: which errors are told at once, whose files are used, and where they may lie."""

import errno
import fcntl
import os
import re
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from pathlib import Path

import pytest
from flask import Flask

from counter_server import SharedState, State, StoreOptions, errors, open_state
from counter_server.caching import ManagerCache
from counter_server.cli.upkeep import diagnose
from counter_server.limiting import ManagerStorage
from counter_server.manager import location
from counter_server.manager.directory import DataDirectory
from counter_server.os_errors import can_pass, is_absent
from counter_server.stores import open_store
from counter_server.stores.databases import SqliteStore
from tests.processes import PATIENCE, Manager, end_manager

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_user(uid: int, work: Callable[[], str]) -> str:
    """Work in a child that is another user; return its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(writer, work().encode())
        except (AssertionError, pytest.fail.Exception) as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def client(directory: Path, *, deadline: float = PATIENCE, start: bool = True) -> State:
    return open_state(DataDirectory(directory).url, deadline=deadline, options=StoreOptions(start=start))


def refusal(directory: Path, *, start: bool = True) -> str:
    """Return the error of a first increment, which must come before its deadline, and be in one line."""
    with client(directory, start=start) as state, pytest.raises(errors.CounterServerError) as error:
        state.counter("c").increment()
    assert not isinstance(error.value, errors.DeadlineExceeded)
    assert (error.value.outcome, str(error.value).count("\n")) == ("not_applied", 0)
    return str(error.value)


def open_to_all(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode | 0o011)


# Which error is temporary


def test_each_error_means_one_thing() -> None:
    for number in (errno.ENOENT, errno.ECONNREFUSED):
        assert is_absent(OSError(number, ""))
    for number in (errno.EAGAIN, errno.EMFILE, errno.ENOMEM, errno.ECONNRESET, errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
        assert can_pass(OSError(number, ""))
        assert not is_absent(OSError(number, ""))
    assert can_pass(TimeoutError("no answer in time"))
    for number in (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS, errno.ENOLCK, errno.EIO):
        assert not can_pass(OSError(number, ""))
    assert not can_pass(None)


@pytest.mark.parametrize("start", [True, False])
def test_what_does_not_heal_is_told_at_once_with_the_cure(tmp_path: Path, *, start: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("file/d", "Not a dir"),
        ("loop/d", "symbolic links lead in a circle"),
        ("x" * 300, "shorter"),
    ):
        assert reason in refusal(tmp_path / name, start=start)


@pytest.mark.parametrize(
    ("step", "number"),
    [("existing_key", errno.EACCES), ("existing_key", errno.EIO), ("make", errno.EROFS), ("starting", errno.ENOLCK)],
)
def test_an_error_that_stays_ends_the_search_for_a_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    path = {"existing_key": "pathlib.Path.open", "make": "os.mkdir", "starting": "fcntl.flock"}[step]
    with monkeypatch.context() as patch:
        patch.setattr(path, fail)
        said = refusal(tmp_path / "data")
    assert os.strerror(number) in said
    assert str(tmp_path / "data") in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM])
def test_an_error_that_can_pass_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.mkdir", fail)
    with (
        client(tmp_path / "data", deadline=0.2) as state,
        pytest.raises(errors.DeadlineExceeded, match=os.strerror(number)),
    ):
        state.counter("c").increment()


@needs_root
@pytest.mark.parametrize("closed", ["data", "above"])
@pytest.mark.parametrize("start", [True, False])
def test_a_directory_of_another_user_is_told_at_once_with_both_users(
    tmp_path: Path, closed: str, *, start: bool
) -> None:
    open_to_all(tmp_path)
    directory = tmp_path / "above" / "data"
    DataDirectory(directory).make()
    DataDirectory(directory).key("manager")
    if closed == "above":
        (tmp_path / "above").chmod(0o700)
    said = as_user(12345, lambda: refusal(directory, start=start))
    place = directory if closed == "data" else directory.parent
    assert f"{place} belongs to another user (root, uid 0)" in said
    assert "(uid 12345)" in said
    assert ("chown -R" in said) == (closed == "data")


@needs_root
def test_root_is_told_at_once_whose_manager_it_asks(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)
    assert "uid 12345" in refusal(directory, start=True)
    assert "sudo -u '#12345'" in refusal(directory, start=True)


@needs_root
def test_the_managers_listener_says_why_it_refuses_a_stranger(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all(tmp_path)
    manager = stack.enter_context(Manager(tmp_path / "data"))
    key = DataDirectory(tmp_path / "data").existing_key("manager")
    (tmp_path / "data").chmod(0o711)
    (tmp_path / "data" / "manager.sock").chmod(0o666)
    monkeypatch.setattr(DataDirectory, "existing_key", lambda *_: key)
    said = as_user(12345, lambda: refusal(tmp_path / "data", start=False))
    assert f"the manager of {tmp_path / 'data'} belongs to another user (root, uid 0)" in said
    assert "(uid 12345)" in said
    assert manager.running


# Modes


@needs_root
@pytest.mark.parametrize("umask", [0, 0o777, 0o027])
def test_what_is_made_is_for_its_user_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    open_to_all(tmp_path)
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 12345, 12345)
    (tmp_path / "home").chmod(0o2775)
    directory = DataDirectory(tmp_path / "home" / "instance" / "data")

    def make() -> str:
        os.umask(umask)
        for _ in range(2):
            directory.make()
            directory.key("session")
            with directory.starting(), directory.hold():
                pass
        return "made"

    assert as_user(12345, make) == "made"
    assert directory.path.stat().st_mode & 0o7777 == 0o700
    names = {path.name: path.stat().st_mode & 0o777 for path in directory.path.iterdir()}
    assert names == dict.fromkeys(["session.key", "starter.lock", "manager.lock"], 0o600)


def test_a_default_acl_of_the_parent_gives_nobody_access(tmp_path: Path) -> None:
    entries = [
        (1, 7, -1),
        (2, 7, 12345),
        (4, 7, -1),
        (16, 7, -1),
        (32, 7, -1),
    ]  # u::rwx,u:12345:rwx,g::rwx,m::rwx,o::rwx
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("this file system has no access control lists")
    DataDirectory(tmp_path / "data").make()
    (tmp_path / "data" / "file").touch()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    assert "system.posix_acl_default" not in os.listxattr(tmp_path / "data")
    assert (tmp_path / "data" / "file").stat().st_mode & 0o022 == 0


def test_a_file_system_that_makes_no_directory_is_an_error_in_one_line() -> None:
    with pytest.raises(errors.StartupError, match=r"^the data directory /proc/x/y cannot be made: No such file"):
        DataDirectory("/proc/x/y").make()


@needs_root
def test_a_sqlite_file_that_this_user_may_not_see_is_not_said_to_be_missing(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    (tmp_path / "private").mkdir(mode=0o700)
    url = f"sqlite:///{tmp_path}/private/counters.db"
    with open_state(url) as state:
        state.counter("c").increment()

    def look() -> str:
        store = open_store(url)
        assert isinstance(store, SqliteStore)
        said = []
        for ask in (store.exists, store.contents, store.findings):
            with pytest.raises(errors.AccessDenied, match="does not let this process in: Permission denied") as error:
                ask(inf)
            said.append(str(error.value))
        return said[0] if len(set(said)) == 1 else repr(said)

    assert as_user(12345, look).startswith(f"{url} does not let this process in")


def as_fsgroup_does(directory: Path) -> None:
    for path in (directory, *directory.iterdir()):
        path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))


def test_files_that_a_mount_gave_to_a_group_are_taken_back_with_one_warning(
    on_demand: str, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with client(data_dir) as state:
        assert state.counter("c").increment() == 1
    end_manager(data_dir / "manager.lock")
    as_fsgroup_does(data_dir)
    with client(data_dir) as state:
        assert state.counter("c").increment() == 2
    assert data_dir.stat().st_mode & 0o7777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in data_dir.iterdir()} == {0}
    assert [record.message.count("fsGroup") for record in caplog.records] == [1]


def test_files_that_a_mount_gave_to_a_group_are_taken_back_though_the_runtime_directory_is_new(
    on_demand: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new pod has an empty directory for sockets."""
    for number in (1, 2):
        monkeypatch.setenv("COUNTER_SERVER_RUNTIME_DIR", str(tmp_path / f"run-{number}"))
        with client(data_dir) as state:
            assert state.counter("c").increment() == number
        end_manager(data_dir / "manager.lock")
        as_fsgroup_does(data_dir)


@needs_root
def test_a_volume_of_another_user_at_the_directory_itself_names_one_below(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all(tmp_path)
    (tmp_path / "volume").mkdir(mode=0o755)
    (tmp_path / "volume" / "lost+found").mkdir(mode=0o700)
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "volume")
    said = as_user(12345, lambda: refusal(tmp_path / "volume"))
    assert f"name a directory below it, such as {tmp_path / 'volume'}/counter-server" in said
    os.chown(tmp_path / "volume", 12345, 12345)
    assert as_user(12345, lambda: DataDirectory(tmp_path / "volume").key("session").hex()[:0] + "made") == "made"


# Where the data lie


def test_a_link_is_followed_once(on_demand: str, tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name / "data").mkdir(parents=True, mode=0o700)
    (tmp_path / "current").symlink_to("1")
    with client(tmp_path / "current" / "data") as state:
        assert state.counter("c").increment() == 1
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").rename(tmp_path / "current")
        assert state.counter("c").increment() == 2
        state.close()
        assert state.counter("c").increment() == 3
    assert list((tmp_path / "2" / "data").iterdir()) == []


def test_a_link_that_leads_nowhere_makes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to("nowhere")
    assert "File exists" in refusal(tmp_path / "data")
    assert not (tmp_path / "nowhere").exists()


def test_a_removed_key_is_put_back_and_new_clients_wait_for_it(tmp_path: Path, stack: ExitStack) -> None:
    manager = stack.enter_context(Manager(tmp_path / "data"))
    key = (tmp_path / "data" / "manager.key").read_bytes()
    for number in (1, 2):
        (tmp_path / "data" / "manager.key").unlink()
        with client(tmp_path / "data", start=False) as state:
            assert state.counter("c").increment() == number
        assert (tmp_path / "data" / "manager.key").read_bytes() == key
    assert any("key" in line and "was removed" in line for line in manager.errors)
    assert manager.stop() == 0


@pytest.mark.usefixtures("no_hard_links")
def test_a_key_can_be_made_without_hard_links(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path)
    assert directory.key("session") == directory.key("session")
    assert [path.name for path in tmp_path.iterdir()] == ["session.key"]


def test_a_process_that_answers_at_the_socket_is_left_alone(tmp_path: Path) -> None:
    directory = DataDirectory(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.socket))
        listener.listen()
        with pytest.raises(errors.DirectoryHeld, match=f"pid {os.getpid()}"):
            directory.remove_stale_socket()
        assert directory.socket.is_socket()
    directory.remove_stale_socket()
    assert not directory.socket.exists()


def test_a_directory_that_is_held_is_locked_against_cleaners(tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        with DataDirectory(tmp_path).hold(), pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with DataDirectory(tmp_path).hold():  # a cleaner at work stops no manager
            pass
    finally:
        os.close(file)


def test_a_manager_of_another_machine_is_told_at_once(tmp_path: Path) -> None:
    with DataDirectory(tmp_path).hold():
        lock = tmp_path / "manager.lock"
        lock.write_bytes(re.sub(rb'"boot":"[^"]*"', b'"boot":"x"', lock.read_bytes()))
        with pytest.raises(errors.StartupError, match=f"on another machine .{os.uname().nodename}. serves") as error:
            DataDirectory(tmp_path).hold().__enter__()
        assert not isinstance(error.value, errors.DirectoryHeld)
        with pytest.raises(errors.StartupError, match="on another machine"):
            DataDirectory(tmp_path).is_held()
        lock.write_bytes(b"")  # of a manager that has just begun, or on a full disk
        with pytest.raises(errors.DirectoryHeld):
            DataDirectory(tmp_path).hold().__enter__()


@pytest.mark.parametrize("is_new", [False, True])
def test_a_lock_that_no_manager_holds_is_told_at_once(
    on_demand: str,
    data_dir: Path,
    is_new: bool,  # noqa: FBT001 - a parameter
) -> None:
    """As where another machine holds it, whose locks are seen here but not its processes."""
    if not is_new:
        with open_state(on_demand, deadline=PATIENCE) as state:
            assert state.counter("c").increment() == 1
        end_manager(data_dir / "manager.lock")
    DataDirectory(data_dir).make()
    with open(data_dir / "manager.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.fileno(), (0, 0))
        with (
            open_state(on_demand, deadline=PATIENCE) as state,
            pytest.raises(errors.StartupError, match="is not a manager holds the lock") as error,
        ):
            state.counter("c").increment()
        assert (error.value.outcome, "\n" in str(error.value)) == ("not_applied", False)
    with open_state(on_demand, deadline=PATIENCE) as state:
        assert state.counter("c").increment() == (1 if is_new else 2)


def test_a_manager_of_another_container_on_the_same_volume_is_told_at_once(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directories of their sockets have one name, but lie on two file systems."""
    monkeypatch.setenv("COUNTER_SERVER_RUNTIME_DIR", str(tmp_path / "run"))
    directory = DataDirectory(data_dir)
    directory.make()
    with directory.hold():
        with pytest.raises(errors.DirectoryHeld):  # this one's socket could be there
            DataDirectory(data_dir).hold().__enter__()
        lock = data_dir / "manager.lock"
        lock.write_bytes(re.sub(rb'"device":\d+', b'"device":1', lock.read_bytes()))
        with pytest.raises(errors.StartupError, match="in another container") as error:
            DataDirectory(data_dir).hold().__enter__()
        assert not isinstance(error.value, errors.DirectoryHeld)


def test_socket_key_and_lock_may_lie_apart_from_the_journal(
    on_demand: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "run"
    monkeypatch.setenv("COUNTER_SERVER_RUNTIME_DIR", str(runtime))
    with client(data_dir) as state:
        assert state.counter("c").increment() == 1
    (own,) = runtime.iterdir()
    assert {path.name for path in own.iterdir()} == {"manager.sock", "manager.key", "starter.lock"}
    assert own.stat().st_mode & 0o777 == 0o700
    assert not {"manager.sock", "manager.key"} & {path.name for path in data_dir.iterdir()}
    assert DataDirectory(tmp_path / "other").runtime.parent == runtime
    assert DataDirectory(tmp_path / "other").runtime != own
    monkeypatch.delenv("COUNTER_SERVER_RUNTIME_DIR")  # one manager for each data directory all the same
    said = refusal(data_dir)
    assert f"its socket is in {own}" in said
    assert "COUNTER_SERVER_RUNTIME_DIR" in said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("current/instance/counter-server", "current leads there"),
        ("current/data", "current leads there"),
        ("away/instance/counter-server", "away leads there"),
        ("releases/1/data", "below .*/releases"),
        ("shared/data", ""),
        ("link/data", ""),  # a link for the data alone
        ("current/shared/data", ""),  # leads out of the release again
        ("data", ""),
        ("volume", ""),
    ],
)
def test_a_directory_in_a_release_is_warned_of(tmp_path: Path, given: str, expected: str) -> None:
    for name in ("app/builds/1", "app/releases/1", "shared", "elsewhere/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "app" / "current").symlink_to("builds/1")
    (tmp_path / "app" / "builds" / "1" / "shared").symlink_to(tmp_path / "shared")
    (tmp_path / "app" / "away").symlink_to(tmp_path / "elsewhere" / "1")
    (tmp_path / "app" / "link").symlink_to(tmp_path / "shared")
    (tmp_path / "app" / "volume").symlink_to(tmp_path / "shared")
    found = [finding.sentence for finding in location.findings(DataDirectory(tmp_path / "app" / given))]
    assert len(found) == bool(expected)
    assert all(re.search(expected, sentence) for sentence in found)


def test_a_release_is_known_by_the_shells_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "current").symlink_to("1")
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("PWD", str(tmp_path / "1"))
    assert location.findings(DataDirectory("instance/data")) == []
    monkeypatch.setenv("PWD", str(tmp_path / "current"))
    assert [finding.level for finding in location.findings(DataDirectory("instance/data"))] == ["may lose"]
    assert location.findings(DataDirectory(tmp_path / "data")) == []


@pytest.mark.parametrize(
    ("kind", "options", "level"),
    [
        ("ext4", "rw", None),
        ("overlay", "rw", "may lose"),
        ("nfs4", "rw,local_lock=none", "may lose"),
        ("nfs", "rw,nolock", "problem"),
        ("nfs", "rw,local_lock=flock", "problem"),
        ("lustre", "rw,localflock", "problem"),
        ("cifs", "rw,nobrl", "problem"),
        ("fuse.sshfs", "rw", "problem"),
        ("9p", "rw", "may lose"),
    ],
)
def test_a_file_system_that_can_lose_numbers_is_warned_of_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, level: str | None
) -> None:
    place = str(tmp_path / "a b").replace(" ", r"\040")
    mounts = f"1 0 8:1 / / rw - ext4 /dev/x rw\n2 1 0:5 / {place} rw shared:1 - {kind} x {options}"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: mounts)
    found = location.findings(DataDirectory(tmp_path / "a b" / "data"))
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(kind in finding.sentence for finding in found)
    assert location.findings(DataDirectory(tmp_path / "a")) == []


@needs_root
@pytest.mark.slow
def test_a_containers_layer_is_warned_of_at_the_start_and_by_doctor(tmp_path: Path, stack: ExitStack) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(tmp_path / "merged")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("overlayfs cannot be mounted here")
    stack.callback(subprocess.run, ["umount", "--lazy", str(tmp_path / "merged")])
    manager = stack.enter_context(Manager(tmp_path / "merged" / "data"))
    assert any("container's own layer" in line for line in manager.errors)
    found = diagnose(manager.url, PATIENCE)[1]
    assert [finding.level for finding in found] == ["ok", "ok", "may lose"]
    assert manager.stop() == 0
    found = diagnose(manager.url, 0.1)[1]
    assert [finding.level for finding in found] == ["problem", "may lose"]


def test_an_apps_state_cache_and_limiter_share_a_directory_wherever_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COUNTER_SERVER_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    cache, storage = ManagerCache(), ManagerStorage("manager://")
    app = Flask(__name__, instance_path=str(tmp_path / "home" / "instance"))
    shared = SharedState(app)
    with app.app_context():
        stores = {str(found.store) for found in (shared.state, cache._state, vars(storage.storage)["_shared"])}
    assert stores == {f"manager://{tmp_path}/home/instance/counter-server"}
    assert str(ManagerCache()._state.store) == f"manager://{tmp_path}/instance/counter-server"  # no app uses it
