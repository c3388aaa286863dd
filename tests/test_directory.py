"""The data directory: which errors are told at once, whose files are used, and where they may lie."""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from counter_server import State, StoreOptions, errors, open_state
from counter_server.manager.directory import DataDirectory
from counter_server.os_errors import can_pass, is_absent
from tests.processes import PATIENCE, Manager

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
