"""How the app takes the next number, in each of the ways."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

from flask import Flask, session

from ...extension import SharedState
from ...manager.directory import DataDirectory
from .some_obj import LockedObj, SomeObj, pause
from .strategies import DATA
from .textbook import ObjectManager, address_file

Take = Callable[[], int]

GLOBAL_OBJ = SomeObj(0)
LOCKED_OBJ = LockedObj(0)
_PATIENCE = 30.0  # seconds that a request may wait for shared state on a busy machine, its restart included
_BOOT_SECONDS = 10.0


def _global(_app: Flask, _directory: Path) -> Take:
    return GLOBAL_OBJ.query


def _lock(_app: Flask, _directory: Path) -> Take:
    return LOCKED_OBJ.query


def _value(_app: Flask, _directory: Path) -> Take:
    number = multiprocessing.Value("q", 0)

    def take() -> int:
        with number.get_lock():
            number.value += 1
            pause()
            return int(number.value)

    return take


def _textbook(_app: Flask, directory: Path) -> Take:
    port, key = address_file(directory).read_text().split()
    manager = ObjectManager(address=("127.0.0.1", int(port)), authkey=bytes.fromhex(key))
    manager.connect()
    take: Take = manager.get_object().query  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
    return take


def _cachelib(_app: Flask, directory: Path) -> Take:
    from cachelib import FileSystemCache

    class SlowDisk(FileSystemCache):
        """Its `inc` reads and then writes; here the reading takes its time."""

        def get(self, key: str) -> object:
            value = super().get(key)
            pause()
            return value

    cache = SlowDisk(str(directory / "cache"))

    def take() -> int:
        number = cache.inc("number")
        if number is None:
            raise OSError("the cache could not write its file")
        return number

    return take


def _flask_caching(app: Flask, directory: Path) -> Take:
    from flask_caching import Cache

    cache = Cache(app, config={"CACHE_TYPE": "FileSystemCache", "CACHE_DIR": str(directory / "cache")})

    def take() -> int:
        number: int = (cache.get("number") or 0) + 1
        pause()
        cache.set("number", number)
        return number

    return take


def _session(_app: Flask, _directory: Path) -> Take:
    def take() -> int:
        number: int = session.get("number", 0) + 1
        pause()
        session["number"] = number
        return number

    return take


def _stash(_app: Flask, _directory: Path) -> Take:
    from gunicorn.dirty import stash

    until = time.monotonic() + _BOOT_SECONDS
    while True:  # the process that holds it may start later than the workers
        try:
            stash.ensure("demo")
            break
        except stash.StashError:
            if time.monotonic() > until:
                raise
            pause()

    def take() -> int:
        # Where the table is there and the key is not, gunicorn 27.0 does not take the default, but raises an error.
        number: int = (stash.get("demo", "number") if stash.exists("demo", "number") else 0) + 1
        pause()
        stash.put("demo", "number", number)
        return number

    return take


def _ours(app: Flask, directory: Path) -> Take:
    app.config["COUNTER_SERVER_STORE"] = DataDirectory(directory / DATA).url
    app.config["COUNTER_SERVER_DEADLINE"] = _PATIENCE
    shared = SharedState(app)
    return shared.object("global_obj", SomeObj, 0, durable=True).query


# Each makes a strategy ready in a process that serves the app, given a directory for files; what it returns is called
# by every request.
BEGIN: dict[str, Callable[[Flask, Path], Take]] = {
    "global": _global,
    "lock": _lock,
    "value": _value,
    "textbook": _textbook,
    "textbook-lock": _textbook,
    "textbook-killed": _textbook,
    "cachelib": _cachelib,
    "flask-caching": _flask_caching,
    "session": _session,
    "stash": _stash,
    "ours": _ours,
}
