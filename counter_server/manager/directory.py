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
from math import inf
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote_to_bytes

from ..errors import DirectoryHeld, InvalidRequest, StartupError
from ..os_errors import ELSEWHERE, explain, not_ours

_KEY_BYTES = 32
_CONNECT_SECONDS = 1.0  # a stopped manager accepts no connection when its queue is full
_RETRY_SECONDS = 0.01
_LONGEST_ADDRESS = 107  # bytes of an AF_UNIX path on Linux

_own: set[int] = set()  # descriptors that a child of a fork must not keep: its copy would hold a lock or a pipe
_finders: list[Callable[[], Iterable[int]]] = []  # of more such descriptors
forking = threading.RLock()  # held while a descriptor is opened that is not yet in `_own`


def keep_from_children(descriptor: int) -> None:
    """Close this descriptor in every child that this process forks from now on."""
    _own.add(descriptor)


def _after_fork_in_child() -> None:
    # Replace them by one that can be neither written to nor locked: the copy of SQLite in this memory would write to
    # the next file of that number, or believe that it holds the journal's lock.
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
    """The names in a data directory, and the rules for making and holding it. Constructing one touches no file.

    :raises InvalidRequest: if `path` cannot be the name of a directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise InvalidRequest(f"{path!r} cannot be the name of a data directory: give another with --data-dir")
        self.path = Path(os.path.abspath(path))
        self.journal = self.path / "journal.sqlite3"
        self.socket = self.path / "manager.sock"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def url(self) -> str:
        """The store URL of the manager of this directory."""
        return "manager://" + quote(os.fsencode(self.path))

    @classmethod
    def from_url(cls, url: str, default: str) -> Self:
        """Return the directory in a `manager://` URL, or `default`; raise `InvalidRequest` for anything else in it."""
        rest = url.removeprefix("manager://")
        if rest == url or rest[:1] not in ("", "/") or "?" in rest or "#" in rest:
            raise InvalidRequest(
                f"{url!r} is not the URL of a manager: write three slashes, manager:///absolute/data/directory"
            )
        return cls(os.fsdecode(unquote_to_bytes(rest)) or default)

    def make(self) -> None:
        """Make the directory for this user alone, or check an existing one.

        :raises StartupError: if that fails, another user owns it or a file of ours in it, or others can write to it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.path.stat()
            found = list(self.path.iterdir()) if status.st_uid == os.geteuid() else []
        except OSError as error:
            raise explain(error, f"the data directory {self} cannot be made", self.path) from error
        if status.st_uid != os.geteuid():
            raise StartupError(f"the data directory {not_ours(status.st_uid, self.path)}")
        if status.st_mode & 0o022:
            raise StartupError(f"the data directory {self} can be written by others: give it mode 0700, or {ELSEWHERE}")
        for path in found:  # refuse files from the time when others could write here
            if path.suffix == ".key" or path.name.startswith(("journal.sqlite3", "manager.", "starter.", ".")):
                with suppress(FileNotFoundError):  # removed meanwhile
                    _check_file(path)

    @contextmanager
    def hold(self) -> Iterator[Callable[[], bool]]:
        """Be the only manager of this directory while the block runs; raise `DirectoryHeld` if there is another.

        Yield a function that returns whether this is still so: the directory may be removed or replaced.
        """
        with self._lock_file("manager.lock") as file:
            if not self._lock(file):
                raise DirectoryHeld(f"another manager ({self.holder}) already serves {self}")

            def is_held() -> bool:
                try:
                    return os.path.samestat(os.fstat(file), os.stat(self.path / "manager.lock"))
                except OSError:
                    return False

            _finders.append(self._opened)
            try:
                yield is_held
            finally:
                _finders.remove(self._opened)

    @contextmanager
    def starting(self, seconds: float = 0.0) -> Iterator[bool]:
        """Yield whether this process may start a manager now, waiting `seconds` for another process that starts one."""
        with self._lock_file("starter.lock") as file:
            yield self._lock(file, deadline=time.monotonic() + seconds)

    @contextmanager
    def _lock_file(self, name: str) -> Iterator[int]:
        with forking:
            try:
                file = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise explain(error, f"the data directory {self} cannot be written to", self.path, name) from error
            keep_from_children(file)
        try:
            yield file
        finally:
            _own.discard(file)
            os.close(file)

    def _lock(self, file: int, kind: int = fcntl.LOCK_EX, deadline: float = -inf) -> bool:
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_RETRY_SECONDS)
            except OSError as error:
                raise explain(error, f"the data directory {self} cannot be locked", self.path) from error

    def _opened(self) -> Iterator[int]:
        """Find the manager's descriptors here: files, the listening socket, and connections that came through it."""
        place = os.path.join(os.path.realpath(self.path), "")
        for number in [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]:
            with suppress(OSError):  # the descriptor of the listing itself is closed by now
                link = os.readlink(f"/proc/self/fd/{number}")
                if link.startswith(place) or (link.startswith("socket:") and self._is_ours(number)):
                    yield number

    def _is_ours(self, descriptor: int) -> bool:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            return sock.family == socket.AF_UNIX and str(sock.getsockname()).endswith(f"/{self.socket.name}")

    def is_held(self) -> bool:
        """Return whether a manager holds this directory; raise `StartupError` if its lock cannot be read."""
        try:
            with open(self.path / "manager.lock", "rb") as file:
                return not self._lock(file.fileno(), fcntl.LOCK_SH)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain(error, f"the lock of {self} cannot be read", self.path, "manager.lock") from error

    def manager_pid(self) -> int | None:
        """Return the pid of the process that listens here, from the kernel; None without one.

        It is 0 for a process in a pid namespace that cannot be seen from here.
        """
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError), short_address(str(self.socket)) as short:
            sock.settimeout(_CONNECT_SECONDS)
            sock.connect(short)
            return peer(sock)[0]
        return None

    @property
    def holder(self) -> str:
        """The manager of this directory, for a message."""
        pid = self.manager_pid()
        if pid is None:
            return "starting or ending"
        return f"pid {pid}" if pid else "in another pid namespace"

    def key(self, name: str) -> bytes:
        """Return the secret of that name: 256 random bits, made by the first call.

        :raises StartupError: if its file is damaged, can be read by others, or cannot be made.
        """
        try:
            with suppress(FileNotFoundError):
                return self.existing_key(name)
            # Write it under another name first, so that no reader sees half a key, and the first of two makers wins.
            draft = self.path / f".{name}.{secrets.token_hex(8)}"
            file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, secrets.token_hex(_KEY_BYTES).encode())
                os.fsync(file)
                with suppress(FileExistsError):
                    os.link(draft, self.path / f"{name}.key")
            finally:
                os.close(file)
                draft.unlink()
            return self.existing_key(name)
        except OSError as error:
            failure = f"the key {self.path}/{name}.key cannot be made or read"
            raise explain(error, failure, self.path, f"{name}.key") from error

    def existing_key(self, name: str) -> bytes:
        """Return the secret of that name if it was made before; raise `OSError` if not, and otherwise as `key` does."""
        path = self.path / f"{name}.key"
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
        """Make way for a new socket, as the holder of the lock; raise `StartupError` for any other kind of file."""
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self.socket.lstat().st_mode):
                raise StartupError(f"{self.socket} is in the way and is not a socket; it was not changed")
            self.socket.unlink()


def _check_file(path: Path) -> None:
    status = path.lstat()
    # A key has a second name for an instant, while it is made; it is only ever read.
    is_linked = stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and path.suffix in (".sqlite3", ".lock", ".log")
    if is_linked:
        raise StartupError(f"{path} has another name elsewhere: nothing was read or written; remove it, or {ELSEWHERE}")
    if status.st_uid not in (os.geteuid(), 0):
        raise StartupError(not_ours(status.st_uid, path))


@contextmanager
def short_address(path: str) -> Iterator[str]:
    """Yield a name for the socket `path` that fits into an AF_UNIX address, valid while the block runs.

    A longer path becomes `/proc/self/fd/N/name`, through an open descriptor of its directory.
    """
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield path
        return
    directory, name = os.path.split(path)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Return the pid and uid of the other end of an AF_UNIX connection, from the kernel."""
    pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
