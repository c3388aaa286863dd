"""The data directory: journal, socket, keys and lock of one manager, in one place."""

import fcntl
import os
import secrets
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote_to_bytes

from ..errors import DirectoryHeld, InvalidRequest, StartupError

_KEY_BYTES = 32
_CONNECT_SECONDS = 1.0  # there is no place in the queue of one that is stopped
_LOOK_SECONDS = 0.01
_LONGEST_ADDRESS = 107  # bytes that Linux takes for an AF_UNIX path

_own: set[int] = set()  # descriptors that no child of a fork may keep: a copy would hold a lock, or keep a pipe open
_finders: list[Callable[[], Iterable[int]]] = []  # of more of them
forking = threading.RLock()  # held while a descriptor is opened that is not yet in `_own`


def keep_from_children(*descriptors: int) -> None:
    """Have these descriptors closed in every child that this process forks from now on."""
    _own.update(descriptors)


def release(*descriptors: int) -> None:
    """Have children inherit these descriptors again, as they are closed or about to be."""
    _own.difference_update(descriptors)


def _after_fork_in_child() -> None:
    # Their numbers stay taken, by what can be neither written to nor locked. SQLite in the copied memory knows them by
    # number: else it would write into what takes their place, or believe that it is alone with the journal.
    try:
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for descriptor in {*_own, *(found for find in _finders for found in find())}:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _own.clear()
        _finders.clear()
    finally:
        forking.release()


os.register_at_fork(before=forking.acquire, after_in_parent=forking.release, after_in_child=_after_fork_in_child)


class DataDirectory:
    """Names of what is in a data directory, and the rules by which it is made and held.

    :param path: is made absolute. Nothing is touched until a method is called.
    :raises InvalidRequest: if no directory can have that name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise InvalidRequest(f"{path!r} cannot be a data directory's name: give another with --data-dir")
        self.path = Path(os.path.abspath(path))
        self.journal = self.path / "journal.sqlite3"
        self.socket = self.path / "manager.sock"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def url(self) -> str:
        """The store's URL of the manager that serves this directory."""
        return "manager://" + quote(os.fsencode(self.path))

    @classmethod
    def from_url(cls, url: str, default: str) -> Self:
        """The directory that a `manager://` URL names; `default` where it names none.

        :raises InvalidRequest: if it names a host or anything else that is not a directory's absolute path.
        """
        rest = url.removeprefix("manager://")
        if rest == url or rest[:1] not in ("", "/") or "?" in rest or "#" in rest:
            raise InvalidRequest(
                f"{url!r} is not a manager's URL: it has three slashes, manager:///absolute/data/directory"
            )
        return cls(os.fsdecode(unquote_to_bytes(rest)) or default)

    def make(self) -> None:
        """Make the directory, for this user alone, or check the one that is there.

        :raises StartupError: if it cannot be made, it or a file of ours in it is another user's, or others can write.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.stat()
        except OSError as error:
            raise StartupError(f"the data directory {self} cannot be made: {error.strerror}") from error
        if status.st_uid != os.geteuid():
            raise StartupError(f"the data directory {self} belongs to another user (uid {status.st_uid})")
        if status.st_mode & 0o022:
            raise StartupError(
                f"the data directory {self} can be written by others: give it mode 0700, or name another"
            )
        self._check_files()

    def _check_files(self) -> None:
        """Refuse what others put here while they could: from now on nobody else can add to it.

        :raises StartupError: naming it; it is left alone.
        """
        for path in self.path.iterdir():
            if not path.name.startswith(("journal.sqlite3", "manager.", "starter.", ".")) and path.suffix != ".key":
                continue
            try:
                status = path.lstat()
            except FileNotFoundError:  # it went meanwhile
                continue
            # A key has a second name for an instant, while it is made; it is only ever read.
            linked = (
                stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and path.suffix in (".sqlite3", ".lock", ".log")
            )
            if status.st_uid not in (os.geteuid(), 0) or linked:
                whose = "has another name elsewhere" if linked else f"belongs to another user (uid {status.st_uid})"
                raise StartupError(f"{path} {whose}: nothing was read or written; remove it, or name another directory")

    @contextmanager
    def hold(self) -> Iterator[Callable[[], bool]]:
        """Be the one manager of this directory until the block ends, or this process does.

        Gives a function that tells whether it is still so: not when the directory was removed, or replaced.

        :raises DirectoryHeld: naming the other one, if there is one.
        :raises StartupError: if the directory cannot be written to.
        """
        with forking:
            file = self._open_lock("manager.lock")
            keep_from_children(file)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DirectoryHeld(f"another manager ({self.holder}) already serves {self}") from None
            _finders.append(self._opened)
            try:
                yield lambda: self._is_lock(file)
            finally:
                _finders.remove(self._opened)
        finally:
            release(file)
            os.close(file)

    def _open_lock(self, name: str) -> int:
        try:
            return os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"the data directory {self} cannot be written to: {error.strerror}") from error

    def _is_lock(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path / "manager.lock"))
        except OSError:
            return False

    def _opened(self) -> Iterator[int]:
        """Find what the manager has open here: files, the listening socket, and connections that came through it."""
        place = os.path.join(os.path.realpath(self.path), "")
        for number in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
            with suppress(OSError):  # the list's own is closed by now
                link = os.readlink(f"/proc/self/fd/{number}")
                if link.startswith(place) or (link.startswith("socket:") and self._is_ours(number)):
                    yield number

    def _is_ours(self, descriptor: int) -> bool:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            name = sock.getsockname()
            return sock.family == socket.AF_UNIX and str(name).endswith(f"/{self.socket.name}")

    def is_held(self) -> bool:
        """Whether a manager holds this directory.

        :raises StartupError: if it may not be looked at.
        """
        try:
            with open(self.path / "manager.lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StartupError(f"the lock of {self} cannot be read: {error}") from error
        return False

    def manager_pid(self) -> int | None:
        """Return the pid of the process that listens here, as the kernel tells it; None where there is none.

        A number in a file may be a stranger's. It is 0 for a process in a pid namespace that cannot be seen from here.
        """
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError), short_address(str(self.socket)) as short:
            sock.settimeout(_CONNECT_SECONDS)
            sock.connect(short)
            return _peer(sock)[0]
        return None

    @property
    def holder(self) -> str:
        """Name the manager of this directory, for a message."""
        pid = self.manager_pid()
        if pid is None:
            return "coming or going"
        return f"pid {pid}" if pid else "in another pid namespace"

    @contextmanager
    def starting(self, seconds: float = 0.0) -> Iterator[bool]:
        """Whether this process is the one to start a manager now: one at a time, while the block runs.

        :param seconds: to wait for another process that is starting one.
        :raises StartupError: if the directory cannot be written to.
        """
        with forking:
            file = self._open_lock("starter.lock")
            keep_from_children(file)
        try:
            yield self._is_mine(file, time.monotonic() + seconds)
        finally:
            release(file)
            os.close(file)

    @staticmethod
    def _is_mine(file: int, deadline: float) -> bool:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOOK_SECONDS)
            else:
                return True

    def key(self, name: str) -> bytes:
        """The secret of that name, 256 random bits, made at the first call and the same ever after.

        :raises StartupError: if the file that holds it is not whole, can be read by others, or cannot be made.
        """
        try:
            try:
                return self.existing_key(name)
            except FileNotFoundError:
                self._make_key(name)
                return self.existing_key(name)
        except OSError as error:
            raise StartupError(f"the key {self._key_path(name)} cannot be had: {error.strerror}") from error

    def _make_key(self, name: str) -> None:
        # Written whole under another name first: no reader ever sees half a key, and one maker wins.
        draft = self.path / f".{name}.{secrets.token_hex(8)}"
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, secrets.token_hex(_KEY_BYTES).encode())
            os.fsync(file)
            with suppress(FileExistsError):  # another process made it first; its key is the key
                os.link(draft, self._key_path(name))
        finally:
            os.close(file)
            draft.unlink()

    def _key_path(self, name: str) -> Path:
        return self.path / f"{name}.key"

    def existing_key(self, name: str) -> bytes:
        """The secret of that name, if it was made before.

        :raises OSError: if there is none, or it may not be read.
        :raises StartupError: as `key` does.
        """
        path = self._key_path(name)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise StartupError(
                    f"the key {path} can be read by others: give it mode 0600, or remove it and start again"
                )
            text = file.read(2 * _KEY_BYTES + 1)
        try:
            key = bytes.fromhex(text.decode("ascii"))
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise StartupError(f"the key {path} is damaged: remove it and start again")
        return key

    def remove_stale_socket(self) -> None:
        """Make way for a new socket. Only the holder of the lock may call this.

        :raises StartupError: if something that is not a socket stands there; it is left alone.
        """
        try:
            mode = self.socket.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise StartupError(f"{self.socket} is in the way and is not a socket; it was left as it is")
        self.socket.unlink()


@contextmanager
def short_address(path: str) -> Iterator[str]:
    """A name for the socket `path` that fits into an AF_UNIX address, for as long as the block runs.

    A longer path is named through an open descriptor of its directory, as `/proc/self/fd/N/name`.

    :raises StartupError: for a longer path where there is no `/proc`.
    """
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield path
        return
    directory, name = os.path.split(path)
    if not os.path.isdir("/proc/self/fd"):
        raise StartupError(f"the data directory's path is too long for a socket on this system: {directory}")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of an AF_UNIX connection."""
    return _peer(sock)[1]


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    """Return the pid, uid and gid of the other end, as the kernel tells them."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid
