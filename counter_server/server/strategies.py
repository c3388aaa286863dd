"""The ways to share a number among the requests of a Flask app, for the lab, the demonstration and the tests.

The wrong ones race for real: each reads the number, pauses, and writes it. Without the pause a switch of threads at
that moment has the same effect, only less often.

`python -m counter_server.server.strategies CLASS` is the server process of the textbook recipe.
"""

import multiprocessing
import os
import secrets
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from functools import partial
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from flask import Flask, Response, after_this_request, request
from flask.sessions import SecureCookieSessionInterface

from ..extension import SharedState

YIELD_SECONDS = 0.02  # much longer than the time between two requests that a browser sends together
RECIPE = "COUNTER_SERVER_DEMORECIPE"  # the environment variable with the port and key of the textbook recipe
_BOOT_SECONDS = 10.0


class Strategy(msgspec.Struct, frozen=True):
    """One way to count."""

    title: str  # a noun
    memory: bool = False  # each process keeps the number in its memory
    about: str = ""  # for the lab, which shows only strategies that have it
    place: str = ""  # for the lab: where the number is, as in "reads 4 from …"
    wrong: str = ""  # for the lab: why the result is wrong
    right: str = ""  # for the lab: why it is right
    needs: tuple[str, ...] = ()  # packages beyond ours
    newer: str = ""  # a module that only newer versions of the first package have
    recipe: str = ""  # the class of the object that the textbook recipe's process holds
    gunicorn: tuple[str, ...] = ()  # options that gunicorn needs
    killed: bool = False  # the demonstration kills the process that holds the number


RACE = tomllib.loads(Path(__file__).with_name("race.toml").read_text(encoding="utf-8"))
STRATEGIES = msgspec.convert(RACE["strategies"], dict[str, Strategy])


class Taken(msgspec.Struct, frozen=True):
    """One number, and how a client got it. Times are in seconds, of one clock for all processes of a machine."""

    number: int
    worker: int  # the process that answered
    read: int | None  # the number it read before; None where reading and writing are one step
    began: float  # when it had read, or asked
    ended: float  # when it began to write, or had its answer


Take = Callable[[], Taken]


def pause() -> None:
    """Let other threads run, as every wait for a file or a socket does."""
    time.sleep(YIELD_SECONDS)


def race(read: Callable[[], int], write: Callable[[int], object]) -> Taken:
    """Count in two steps."""
    found = read()
    began = time.monotonic()
    pause()
    ended = time.monotonic()
    write(found + 1)
    return Taken(found + 1, os.getpid(), found, began, ended)


def one_step(increment: Callable[[], int]) -> Taken:
    """Count in one step."""
    began = time.monotonic()
    number = increment()
    return Taken(number, os.getpid(), None, began, time.monotonic())


class SomeObj:
    """The object of the question. Each of its answers depends on all requests before."""

    def __init__(self, param: int = 0) -> None:
        self.param = param

    def take(self) -> Taken:
        return race(lambda: self.param, partial(setattr, self, "param"))

    def query(self) -> int:
        """Do what `self.param += 1; return self.param` does, with the pause that `race` makes."""
        return self.take().number


class LockedObj(SomeObj):
    """The same with a lock for threads, held from the read to the write."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def take(self) -> Taken:
        with self._lock:
            return super().take()


class Run(NamedTuple):
    """One run of a strategy, which all processes of an app share."""

    name: str
    app: Flask
    shared: SharedState
    directory: Path  # for files
    path: str = "/"  # of cookies


def _file(run: Run) -> Take:
    file = run.directory / "param"

    def write(number: int) -> None:
        draft = file.with_name(secrets.token_hex(8))  # renamed when it is complete: no client reads half a number
        draft.write_text(str(number))
        draft.replace(file)

    return partial(race, lambda: int(file.read_text()) if file.exists() else 0, write)


class _Cookies(SecureCookieSessionInterface):
    """Sessions in a cookie of another name, so that a visitor's real session loses nothing in a race."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get_cookie_name(self, app: Flask) -> str:
        return f"{super().get_cookie_name(app)}_lab"

    def get_cookie_path(self, app: Flask) -> str:  # noqa: ARG002
        return self._path

    def get_cookie_secure(self, app: Flask) -> bool:
        return super().get_cookie_secure(app) or request.is_secure


def _session(run: Run) -> Take:
    cookies = _Cookies(run.path)

    def take() -> Taken:
        session = cookies.open_session(run.app, request)
        assert session is not None  # the app has a secret key

        @after_this_request
        def save(response: Response) -> Response:
            cookies.save_session(run.app, session, response)
            return response

        return race(
            lambda: session["param"] if session.get("run") == run.name else 0,
            lambda number: session.update(run=run.name, param=number),
        )

    return take


def _value(_run: Run) -> Take:
    # As up to Python 3.13. The other ways to start processes make a process that tracks the lock.
    number = multiprocessing.get_context("fork").Value("q", 0)

    def take() -> Taken:
        with number.get_lock():
            return race(lambda: number.value, partial(setattr, number, "value"))

    return take


class _RecipeManager(BaseManager):
    """The recipe of the documentation: one process holds the object, the others reach it over a port."""


def _recipe(_run: Run) -> Take:
    _RecipeManager.register("get_object")
    port, key = os.environ[RECIPE].split()
    manager: Any = _RecipeManager(("127.0.0.1", int(port)), bytes.fromhex(key))
    manager.connect()
    return partial(one_step, manager.get_object().query)


def hold(kind: str) -> None:
    """Serve the recipe's object until this process is killed; print port and key first."""
    global_obj = {"SomeObj": SomeObj, "LockedObj": LockedObj}[kind]()
    _RecipeManager.register("get_object", callable=lambda: global_obj)
    key = os.urandom(16)
    server: Any = _RecipeManager(("127.0.0.1", 0), key).get_server()
    print(f"{RECIPE}={server.address[1]} {key.hex()}", flush=True)
    server.serve_forever()


def _cachelib(run: Run) -> Take:
    from cachelib import FileSystemCache

    class SlowDisk(FileSystemCache):
        def get(self, key: str) -> object:  # which its `inc` calls before it writes
            value = super().get(key)
            pause()
            return value

    cache: Any = SlowDisk(str(run.directory / "cache"))
    return partial(one_step, partial(cache.inc, "number"))


def _flask_caching(run: Run) -> Take:
    from flask_caching import Cache

    cache = Cache(run.app, config={"CACHE_TYPE": "FileSystemCache", "CACHE_DIR": str(run.directory / "cache")})
    return partial(race, lambda: cache.get("number") or 0, partial(cache.set, "number"))


def _stash(_run: Run) -> Take:
    from gunicorn.dirty import stash

    def read() -> int:  # `exists` first: for a missing key gunicorn 27.0 raises an error instead of a default
        return stash.get("demo", "number") if stash.exists("demo", "number") else 0

    deadline = time.monotonic() + _BOOT_SECONDS
    while True:  # the process that holds it may start later than the workers
        try:
            stash.ensure("demo")
            return partial(race, read, partial(stash.put, "demo", "number"))
        except stash.StashError:
            if time.monotonic() > deadline:
                raise
            pause()


# Each function prepares a process for a run; the run's clients get their numbers from the function that it returns.
JOIN: dict[str, Callable[[Run], Take]] = {
    "global": lambda _: SomeObj().take,
    "lock": lambda _: LockedObj().take,
    "file": _file,
    "session": _session,
    "store": lambda run: partial(one_step, run.shared.counter(run.name).increment),
    "value": _value,
    "textbook": _recipe,
    "textbook-lock": _recipe,
    "textbook-killed": _recipe,
    "cachelib": _cachelib,
    "flask-caching": _flask_caching,
    "stash": _stash,
    "ours": lambda run: partial(one_step, run.shared.object("global_obj", SomeObj, 0).query),
}

if __name__ == "__main__":
    hold(*sys.argv[1:])
