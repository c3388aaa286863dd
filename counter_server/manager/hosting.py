"""What a manager hosts: the classes that programs declare, imported here as those programs import them."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

from msgspec import Struct, msgpack

from ..errors import StartupError, Stopped
from ..modules import quick_imports
from ..objects import Declaration, described, import_class
from ..plain import largest_value
from ..settings import LARGEST_VALUE

_hosts = False  # whether this process hosts the objects of modules that it imports
_importing = 0  # the process that imports such modules now


def in_manager() -> bool:
    """Return whether this process is a manager, which imports an app's module for the classes of its shared objects.

    An app can ask this at import, to start schedulers, threads and servers in its own processes only.
    """
    return _hosts


class Hosting(Struct, array_like=True):
    """What the programs of a directory declare, and what a process needs to import their classes as they do."""

    declarations: list[Declaration]
    path: list[bytes]  # Paths and arguments may hold bytes that are not UTF-8.
    argv: list[bytes]
    largest_value: int = LARGEST_VALUE
    releases: int = 0  # that have taken over from each other
    is_used: bool = False  # whether clients have connections to objects

    @classmethod
    def of_this_process(cls, declarations: list[Declaration]) -> "Hosting":
        path, argv = (list(map(os.fsencode, texts)) for texts in (import_path(), sys.argv))
        return cls(declarations, path, argv, largest_value())

    def encode(self) -> bytes:
        return msgpack.encode(self)

    def joined(self, other: "Hosting") -> "Hosting":
        """Return both: of two declarations with one name the newer one, and the path of the newer program first."""
        declarations = {each.name: each for each in sorted(other.declarations + self.declarations, key=_declared)}
        older, newer = sorted((other, self), key=lambda each: max(map(_declared, each.declarations), default=0.0))
        path = list(dict.fromkeys(newer.path + older.path))
        largest = max(self.largest_value, other.largest_value)
        files = {each.name: each.file for each in other.declarations}
        is_release = any(files.get(name, each.file) != each.file for name, each in declarations.items())
        return Hosting(list(declarations.values()), path, newer.argv, largest, other.releases + is_release)


NOTHING = Hosting([], [], [])


def _declared(declaration: Declaration) -> float:
    return declaration.declared


decode_hosting = msgpack.Decoder(Hosting).decode


def import_path() -> list[str]:
    """Return this process's import path, for a process in any directory."""
    path = []
    for entry in sys.path:
        if isinstance(entry, str) and "\0" not in entry:
            with suppress(FileNotFoundError):  # of the working directory: nothing can be imported from there
                # An entry that is not a file may be the mark of an import hook, which knows it by its name.
                path.append(os.path.abspath(entry) if not entry or os.path.exists(entry) else entry)
    return path


def import_classes(hosting: Hosting) -> dict[str, str]:
    """Import the class of each declaration; return the reasons of those that cannot be imported, by object."""
    if not hosting.declarations:
        return {}
    path = list(map(os.fsdecode, hosting.path))
    sys.path[:] = path + [entry for entry in sys.path if entry not in path]
    sys.argv[:] = map(os.fsdecode, hosting.argv)
    reasons = {}
    with importing(), quick_imports():
        for declaration in hosting.declarations:
            try:
                import_class(declaration)
            except Stopped:
                raise
            except BaseException as error:  # noqa: BLE001 - the module's own code may raise anything, such as SystemExit
                advice = "; do that unless counter_server.in_manager()" if isinstance(error, SystemExit) else ""
                reason = f"{declaration} cannot be imported in the manager: {described(error)}{advice}"
                reasons[declaration.name] = reason
    return reasons


@contextmanager
def importing() -> Iterator[None]:
    """Turn this process into one that hosts the objects of modules that are imported while the block runs.

    It starts no manager. The modules patch nothing in it, and open no server. Call this before the process has threads
    and sockets of its own, in the program's working directory.
    """
    global _hosts, _importing
    if not _hosts:  # a successor imports twice
        sys.meta_path.insert(0, _PatchingNothing)
        sys.addaudithook(_refuse_server)
    _hosts, _importing = True, os.getpid()
    os.environ[_RUNS_NOTHING] = "true"
    try:
        yield
    finally:
        _importing = 0
        os.environ.pop(_RUNS_NOTHING, None)  # a module may have removed it


_RUNS_NOTHING = "FLASK_RUN_FROM_CLI"  # makes `app.run()` do nothing, as when the `flask` command imports an app


def _refuse_server(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.bind" and _importing == os.getpid():
        bound: socket.socket = arguments[0]
        if bound.family != socket.AF_UNIX and bound.type == socket.SOCK_STREAM:
            raise StartupError(
                f"a module that the manager imports for its shared objects opens a server at {arguments[1]!r}: do that"
                ' under if __name__ == "__main__", or unless counter_server.in_manager()'
            )


class _PatchingNothing(SourceFileLoader):
    """Imports gevent's and eventlet's patching modules without effect: a manager needs real threads."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ("gevent.monkey", "eventlet.patcher"):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _PatchingNothing(name, spec.origin)
        return spec

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name in vars(module):
            if name.startswith(("patch_", "monkey_patch")):
                setattr(module, name, lambda *_arguments, **_keywords: None)


class _Version(NamedTuple):
    modified: int  # nanoseconds since the epoch
    size: int
    inode: int


class Sources:
    """The files of all modules of this process, as they were when it began."""

    def __init__(self) -> None:
        self._began = time.time_ns()
        self._versions: dict[str, _Version | None] = {}

    def note(self) -> None:
        """Note the files of what is imported by now."""
        found = ((file, status) for file in _files() if (status := _status(file)))
        # Of a file that changed after this process began, an earlier version may have been imported.
        self._versions = {file: _version(each) if each.st_ctime_ns < self._began else None for file, each in found}

    def are_older(self, seconds: float) -> bool:
        """Return whether a file has changed since it was noted, and before this time.

        A file that was imported later is compared with when this process began.
        """
        for file in _files():
            status = _status(file)
            if status is not None and status.st_ctime <= seconds:
                is_late = file not in self._versions
                if status.st_ctime_ns >= self._began if is_late else _version(status) != self._versions[file]:
                    return True
        return False


def _files() -> list[str]:
    return [file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))]


def _status(file: str) -> os.stat_result | None:
    try:
        return os.stat(file)
    except NotADirectoryError:
        return _status(os.path.dirname(file))  # of the archive that it is in
    except OSError:  # it is being replaced, or is gone: then no other process can import it
        return None


def _version(status: os.stat_result) -> _Version:
    return _Version(status.st_mtime_ns, status.st_size, status.st_ino)
