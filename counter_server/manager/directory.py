"""The data directory: journal, socket, keys and lock of one manager, in one place."""

import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote_to_bytes

from msgspec import MsgspecError, Struct, json, structs

from ..errors import DirectoryHeld, InvalidRequest, StartupError
from ..ledger import has_ended
from ..os_errors import ELSEWHERE, explain, is_absent, not_ours
from ..settings import RUNTIME_DIR_VARIABLE
from ..system import give_name

log = logging.getLogger(__name__)

_KEY_BYTES = 32
_CONNECT_SECONDS = 1.0  # a stopped manager accepts no connection when its queue is full
_RETRY_SECONDS = 0.01
_SECONDS_TO_WRITE = 1.0  # in which a manager has written into its lock
_COPY = ".copy"  # a directory for a copy of the journal while it is read
_LONGEST_ADDRESS = 107  # bytes of an AF_UNIX path on Linux

_own: set[int] = set()  # descriptors that a child of a fork must not keep: its copy would hold a lock or a pipe
_finders: list[Callable[[], Iterable[int]]] = []  # of more such descriptors
forking = threading.RLock()  # held while a descriptor is opened that is not yet in `_own`


def keep_from_children(descriptor: int) -> None:
    """Close this descriptor in every child that this process forks from now on."""
    _own.add(descriptor)


def release(descriptor: int) -> None:
    """Undo `keep_from_children`, as the descriptor is closed."""
    _own.discard(descriptor)


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


_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Return what identifies this start of this machine; an empty string where the kernel's file is hidden.

    systemd hides it by ``ProcSubset=pid``.
    """
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


class _Holder(Struct):
    """What a manager writes into its lock, for a process that finds that locked."""

    host: str
    boot: str  # differs on another machine; empty if it is not known
    runtime: bytes  # the path of the directory of its socket
    device: int = 0  # of that directory, if it is apart from the data: each container has its own
    pid: int = 0
    namespace: int = 0  # in which the pid means this process

    @classmethod
    def of(cls, directory: "DataDirectory") -> Self:
        device = 0
        if directory.runtime != directory.path:
            with suppress(OSError):
                device = os.stat(directory.runtime).st_dev
        namespace = os.stat("/proc/self/ns/pid").st_ino
        runtime = os.fsencode(directory.runtime)
        return cls(os.uname().nodename, boot_id(), runtime, device, os.getpid(), namespace)


class DataDirectory:
    """The names in a data directory, and the rules for making and holding it. Constructing one changes no file.

    With ``COUNTER_SERVER_RUNTIME_DIR``, the socket, its key and the starters' lock lie there, in a subdirectory.

    :raises InvalidRequest: if `path` cannot be the name of a directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise InvalidRequest(f"{path!r} cannot be the name of a data directory: give another with --data-dir")
        self.given = Path(os.path.abspath(path))
        # Links are resolved once: a deployment moves them while its manager runs. One that leads nowhere stays.
        parent, name = os.path.split(os.path.realpath(self.given) if os.path.exists(self.given) else self.given)
        self.path = Path(os.path.realpath(parent), name)
        self.journal = self.path / "journal.sqlite3"
        self.snapshot = self.path / "manager.snapshot"
        self.runtime = self.path
        if runtime := os.environ.get(RUNTIME_DIR_VARIABLE):
            self.runtime = Path(os.path.realpath(runtime), hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16])
        self.socket = self.runtime / "manager.sock"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def url(self) -> str:
        """The store URL of the manager of this directory."""
        return "manager://" + quote(os.fsencode(self.path))

    @property
    def given_url(self) -> str:
        """The URL of the path with its links, which show whether it lies in a release."""
        return "manager://" + quote(os.fsencode(self.given))

    @classmethod
    def from_url(cls, url: str, default: str) -> Self:
        """Return the directory in a `manager://` URL, or `default`; raise `InvalidRequest` for anything else in it."""
        rest = url.removeprefix("manager://")
        if rest == url or rest[:1] not in ("", "/") or "?" in rest or "#" in rest:
            named = "manager://" if "@" in rest else url  # the rest may hold a password
            raise InvalidRequest(
                f"{named!r} is not the URL of a manager: write three slashes, manager:///absolute/data/directory"
            )
        return cls(os.fsdecode(unquote_to_bytes(rest)) or default)

    def make(self) -> None:
        """Make the directory for this user alone, or check an existing one.

        :raises StartupError: if that fails, another user owns it or a file of ours in it, or others can write to it.
        """
        are_open = [self._make(path) for path in dict.fromkeys((self.path, self.runtime))]
        if any(are_open):
            self._take_back()

    def _make(self, path: Path) -> bool:
        """Make one of the directories, or check it; return whether a group can write to it."""
        try:
            _make_directory(path)
            status = path.stat()
            found = [file for file in path.iterdir() if _is_known(file)] if status.st_uid == os.geteuid() else []
        except OSError as error:
            raise explain(error, f"the data directory {path} cannot be made", path) from error
        if status.st_uid != os.geteuid():
            below = f"name a directory below it, such as {path}/counter-server" if os.path.ismount(path) else ""
            raise StartupError(f"the data directory {not_ours(status.st_uid, path, below)}")
        is_made = any(file.name.endswith(".lock") for file in found)  # and so had our modes
        if status.st_mode & 0o022 and not (is_made and _is_for_group(status)):
            raise StartupError(f"the data directory {path} can be written by others: give it mode 0700, or {ELSEWHERE}")
        for file in found:  # refuse files from the time when others could write here
            with suppress(FileNotFoundError):  # removed meanwhile
                _check_file(file)
        return bool(status.st_mode & 0o020)

    def _take_back(self) -> None:
        """Put our own modes back where a volume's files were given to a group, as Kubernetes does at each mount."""
        for path in {self.path, self.runtime}:
            for place in (*filter(_is_known, path.iterdir()), path):
                status = place.lstat()
                if status.st_uid == os.geteuid() and _is_for_group(status) and not place.is_symlink():
                    place.chmod(0o700 if place.is_dir() else 0o600)
        log.warning(
            "%s could be read and written by a group, as Kubernetes' fsGroup sets it at each mount: its modes are 0700"
            " and 0600 again, and nothing was lost",
            self,
        )

    @contextmanager
    def hold(self) -> Iterator[Callable[[], bool]]:
        """Be the only manager of this directory while the block runs; raise `DirectoryHeld` if there is another.

        Yield a function that returns whether this is still so: the directory may be removed or replaced.
        """
        with self._lock_file(self.path / "manager.lock") as file:
            if not self._lock(file):
                raise self._held_elsewhere(file) or DirectoryHeld(
                    f"another manager ({self.holder}) already serves {self}"
                )
            with suppress(OSError):  # without room for it, the next manager knows less
                os.ftruncate(file, os.pwrite(file, json.encode(_Holder.of(self)), 0))

            def is_held() -> bool:
                try:
                    return os.path.samestat(os.fstat(file), os.stat(self.path / "manager.lock"))
                except OSError:
                    return False

            _finders.append(self._opened)
            try:
                with self._kept_from_cleaners():
                    yield is_held
            finally:
                _finders.remove(self._opened)

    def _held_elsewhere(self, file: int) -> StartupError | None:
        """Return why processes like this one cannot reach the manager that holds the lock; None if they can."""
        here = _Holder.of(self)
        try:
            holder = json.decode(os.pread(file, 2**16, 0), type=_Holder)
        except (MsgspecError, OSError):
            is_new = time.time() - os.fstat(file).st_mtime < _SECONDS_TO_WRITE
            holder = structs.replace(here, pid=here.pid if is_new else 0)
        if holder.boot != here.boot and holder.boot and here.boot:
            return StartupError(
                f"a manager on another machine ({holder.host}) serves {self}, and this machine cannot reach it;"
                f" nothing was counted or lost; {ELSEWHERE}, or share the state through Redis or a database"
            )
        if holder.runtime == here.runtime and holder.device and here.device and holder.device != here.device:
            return StartupError(
                f"another manager already serves {self}, in another container: {self.runtime} is not the same directory"
                " there; nothing was counted or lost; run one container on this directory, or share the state through"
                " Redis or a database"
            )
        if holder.runtime != here.runtime:
            there = os.fsdecode(holder.runtime)
            return StartupError(
                f"another manager already serves {self}: its socket is in {there}, and not in {self.runtime};"
                f" nothing was counted or lost; start both with the same {RUNTIME_DIR_VARIABLE}, or with none"
            )
        is_gone = holder.namespace == here.namespace and (not holder.pid or has_ended(holder.pid))
        if is_gone and self.manager_pid() is None:
            return StartupError(
                f"a process that is not a manager holds the lock {self.path}/manager.lock, perhaps on another machine;"
                f" nothing was counted or lost; end that process (`lslocks` may name it), or {ELSEWHERE}"
            )
        return None

    @contextmanager
    def _kept_from_cleaners(self) -> Iterator[None]:
        """Hold a lock on the directories themselves, which systemd-tmpfiles then does not clean."""
        with ExitStack() as opened:
            for path in {self.path, self.runtime}:
                with forking, suppress(OSError):  # it helps, but nothing depends on it
                    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    opened.callback(os.close, descriptor)
                    opened.callback(release, descriptor)
                    keep_from_children(descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield

    @contextmanager
    def starting(self, seconds: float = 0.0) -> Iterator[int | None]:
        """Hold the lock of those who start a manager, and yield its descriptor.

        Yield None if another process still has it after `seconds`.
        """
        with self._lock_file(self.runtime / "starter.lock") as file:
            yield file if self._lock(file, deadline=time.monotonic() + seconds) else None

    @contextmanager
    def place_for_copy(self, deadline: float) -> Iterator[Path]:
        """Lend an empty directory, for a copy of the journal, to one process at a time; remove it after the block.

        What a process left there that was killed is removed first.

        :param deadline: in `time.monotonic` seconds.
        :raises StartupError: if it cannot be made, or another process has it until then.
        """
        place = self.path / _COPY
        with self._lock_file(self.path / f"{_COPY}.lock") as file:
            if not self._lock(file, deadline=deadline):
                raise StartupError(f"another process reads everything in {self}; nothing was changed: try again later")
            shutil.rmtree(place, ignore_errors=True)
            try:
                place.mkdir(mode=0o700)
                yield place
            except OSError as error:
                raise explain(error, f"the contents of {self} cannot be copied", self.path, place.name) from error
            finally:
                shutil.rmtree(place, ignore_errors=True)

    def remove_stale_copy(self) -> None:
        """Remove what a process left in its place for a copy, unless one is at work there."""
        if (self.path / _COPY).exists():
            with suppress(StartupError), self.place_for_copy(-inf):
                pass

    @contextmanager
    def _lock_file(self, path: Path) -> Iterator[int]:
        with forking:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                keep_from_children(file)
            except OSError as error:
                failure = f"the data directory {path.parent} cannot be written to"
                raise explain(error, failure, path.parent, path.name) from error
        try:
            with suppress(OSError):  # it is root's
                os.fchmod(file, 0o600)  # whatever the umask
            yield file
        finally:
            release(file)
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
        place = os.path.join(self.path, "")
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
                is_held = not self._lock(file.fileno(), fcntl.LOCK_SH)
                if is_held and (error := self._held_elsewhere(file.fileno())):
                    raise error
                return is_held
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain(error, f"the lock of {self} cannot be read", self.path, "manager.lock") from error

    def manager_pid(self) -> int | None:
        """Return the pid of the process that listens here, from the kernel; None without one.

        It is 0 for a process in a pid namespace that cannot be seen from here.
        """
        with suppress(OSError):
            return self._listener()
        return None

    def has_no_manager(self) -> bool:
        """Return whether no process listens here. (One that does not answer, or is another user's, does listen.)"""
        try:
            self._listener()
        except OSError as error:
            return is_absent(error)
        return False

    def _listener(self) -> int:
        with socket.socket(socket.AF_UNIX) as sock, short_address(str(self.socket)) as short:
            sock.settimeout(_CONNECT_SECONDS)
            sock.connect(short)
            return peer(sock)[0]

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
            self._write_key(name, secrets.token_bytes(_KEY_BYTES))
            return self.existing_key(name)
        except OSError as error:
            path = self._key_path(name)
            raise explain(error, f"the key {path} cannot be made or read", path.parent, path.name) from error

    def restore_key(self, name: str, key: bytes) -> bool:
        """Put a key back whose file was removed; return whether that was so."""
        if self._key_path(name).exists():
            return False
        self.make()
        self._write_key(name, key)
        return True

    def _key_path(self, name: str) -> Path:
        return (self.runtime if name == "manager" else self.path) / f"{name}.key"

    def _write_key(self, name: str, key: bytes) -> None:
        # Write it under another name first, so that no reader sees half a key, and the first of two makers wins.
        path = self._key_path(name)
        draft = path.with_name(f".{name}.{secrets.token_hex(8)}")
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(file, 0o600)  # whatever the umask
            os.write(file, key.hex().encode())
            os.fsync(file)
            with suppress(FileExistsError):
                give_name(draft, path)
        finally:
            os.close(file)
            draft.unlink(missing_ok=True)

    def existing_key(self, name: str) -> bytes:
        """Return the secret of that name if it was made before; raise `OSError` if not, and otherwise as `key` does."""
        path = self._key_path(name)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o022 and _is_for_group(status) and status.st_uid == os.geteuid():
                self._take_back()
            elif status.st_mode & 0o077:
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
            if (pid := self.manager_pid()) is not None:
                raise DirectoryHeld(
                    f"a process (pid {pid}) answers at {self.socket}, although its lock was removed: it was not"
                    " disturbed; end it, and start again"
                )
            self.socket.unlink()


def _make_directory(path: Path, mode: int = 0o700, *, with_parents: bool = True) -> None:
    """Make a directory, and those above it that are missing; this user can use them all, whatever the umask."""
    try:
        path.mkdir(mode)
    except FileNotFoundError:
        if not with_parents:  # they are there, and its file system makes none
            raise
        _make_directory(path.parent, 0o777)
        _make_directory(path, mode, with_parents=False)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        if mode == 0o700:
            with suppress(OSError):  # there is none
                os.removexattr(path, "system.posix_acl_default")  # which the files in it would inherit
            path.chmod(mode)
        elif not os.access(path, os.W_OK | os.X_OK):
            path.chmod(0o700)


def _is_known(path: Path) -> bool:
    names = ("journal.sqlite3", "in-use.", "manager.", "starter.", ".")
    return path.suffix == ".key" or path.name.startswith(names)


def _is_for_group(status: os.stat_result) -> bool:
    """Return whether a group can use a file, and no one else."""
    return bool(status.st_mode & 0o070) and not status.st_mode & 0o007


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
