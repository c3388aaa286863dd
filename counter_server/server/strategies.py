"""The ways to share a number among the requests of a Flask app: one list for the lab, the demonstration and the tests.

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
from collections.abc import Callable
from functools import partial
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, NamedTuple

from flask import Flask, Response, after_this_request, request
from flask.sessions import SecureCookieSessionInterface
from msgspec import Struct

from ..dicts import SharedDict
from ..extension import SharedState

YIELD_SECONDS = 0.02  # much longer than the time between two requests that a browser sends together
LAB_COUNTERS = "lab/"  # the prefix of the counters of runs
RECIPE = "COUNTER_SERVER_DEMORECIPE"  # the environment variable with the port and key of the textbook recipe
_BOOT_SECONDS = 10.0


class Taken(Struct, frozen=True):
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

    def __init__(self, param: int = 0) -> None:
        super().__init__(param)
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
    numbers: SharedDict | None = None


class Strategy(NamedTuple):
    """One way to count."""

    join: Callable[[Run], Take]  # prepares a process for a run; its clients get their numbers from the result
    title: str  # a noun
    memory: bool = False  # each process keeps the number in its memory
    end: Callable[[Run], object] = lambda _: None  # deletes the number of a run from the store
    about: str = ""  # for the lab, which shows only strategies that have it
    place: str = ""  # for the lab: where the number is, as in "reads 4 from …"
    wrong: str = ""  # for the lab: why the result is wrong
    right: str = ""  # for the lab: why it is right
    needs: tuple[str, ...] = ()  # packages beyond ours
    newer: str = ""  # a module that only newer versions of the first package have
    recipe: str = ""  # the class of the object that the textbook recipe's process holds
    gunicorn: tuple[str, ...] = ()  # options that gunicorn needs
    killed: bool = False  # the demonstration kills the process that holds the number


def _file(run: Run) -> Take:
    file = run.directory / "param"

    def read() -> int:
        return int(file.read_text()) if file.exists() else 0

    def write(number: int) -> None:
        draft = file.with_name(secrets.token_hex(8))  # renamed when it is complete: no client reads half a number
        draft.write_text(str(number))
        draft.replace(file)

    return partial(race, read, write)


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


def _manager(run: Run) -> Take:
    assert run.numbers is not None
    return partial(one_step, partial(run.numbers.incr, run.name))


def _store(run: Run) -> Take:
    return partial(one_step, run.shared.counter(LAB_COUNTERS + run.name).increment)


def _value(_run: Run) -> Take:
    number = multiprocessing.Value("q", 0)

    def take() -> Taken:
        with number.get_lock():
            return race(lambda: number.value, partial(setattr, number, "value"))

    return take


class _RecipeManager(BaseManager):
    """The recipe of the documentation: one process holds the object, the others reach it over a port."""


_RecipeManager.register("get_object")


def _recipe(_run: Run) -> Take:
    port, key = os.environ[RECIPE].split()
    manager: Any = _RecipeManager(("127.0.0.1", int(port)), bytes.fromhex(key))
    manager.connect()
    return partial(one_step, manager.get_object().query)


def hold(kind: str) -> None:
    """Serve the recipe's object until this process is killed; print port and key first."""
    global_obj = {"SomeObj": SomeObj, "LockedObj": LockedObj}[kind]()
    _RecipeManager.register("get_object", callable=lambda: global_obj)
    key = os.urandom(16)
    server = _RecipeManager(("127.0.0.1", 0), key).get_server()
    assert isinstance(server.address, tuple)
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

    deadline = time.monotonic() + _BOOT_SECONDS
    while True:  # the process that holds it may start later than the workers
        try:
            stash.ensure("demo")
            break
        except stash.StashError:
            if time.monotonic() > deadline:
                raise
            pause()
    # `exists` first: for a key that is not there gunicorn 27.0 raises an error instead of returning the default.
    return partial(
        race,
        lambda: stash.get("demo", "number") if stash.exists("demo", "number") else 0,
        partial(stash.put, "demo", "number"),
    )


_NEVER = "This must never happen. Please report what you did to the authors of counter_server."
_ONE_STEP = "No client can come between: each number is given once, whichever worker answers a client."

STRATEGIES = {
    "global": Strategy(
        lambda _: SomeObj().take,
        "a global",
        memory=True,
        about="global_obj.param += 1, as in the question: an object in the memory of each worker process.",
        place="its own global",
        wrong="A global is safe in no way. Threads of one worker read the same number before either has written the"
        " next, and each worker process has a global of its own, which begins at 0.",
        right="It went well this time, by luck: no two clients met in one worker, and only one worker answered. More"
        " clients, threads or workers end that.",
    ),
    "lock": Strategy(
        lambda _: LockedObj().take,
        "a global with a lock",
        memory=True,
        about="The same global, with a threading.Lock around its read and its write: safe for threads, not processes.",
        place="its own global",
        wrong="The lock did its work: in each worker no number came twice. But each worker process has a lock of its"
        " own, and a global of its own, which begins at 0.",
        right="One worker process answered every client, and its lock let them in one by one. A second worker would"
        " have a lock and a global of its own, and give the same numbers again.",
    ),
    "file": Strategy(
        _file,
        "a file, read then written",
        about="number = int(file.read_text()), then file.write_text(…): one file for all workers, two steps.",
        place="the file",
        wrong="All workers share the file, but reading and writing are two steps, like get and set of a cache. A client"
        " that reads between them gets the old number, and overwrites the new one.",
        right="It went well this time, by luck: no client read between the reading and the writing of another.",
    ),
    "session": Strategy(
        _session,
        "a Flask session",
        about='session["param"] += 1: a signed cookie, which each answer sends to your browser.',
        place="the cookie",
        wrong="A session is a cookie in your browser. Simultaneous requests bring the same cookie, and the last answer"
        " to arrive replaces it. The session is also yours alone: another visitor has another.",
        right="It went well this time: the browser sent one request at a time. But a session is yours alone: another"
        " visitor would have got the same numbers.",
    ),
    "manager": Strategy(
        _manager,
        "the manager",
        end=lambda run: run.numbers is not None and run.numbers.pop(run.name, None),
        about='numbers.incr("param"): a Python object in the manager process, shared by all workers.',
        place="the manager",
        wrong=_NEVER,
        right=f"The manager holds one object for all workers, and adds in one step, under its lock. {_ONE_STEP}",
    ),
    "store": Strategy(
        _store,
        "the configured store",
        end=lambda run: run.shared.counter(LAB_COUNTERS + run.name).delete(),
        about="counter.increment(), as the home page does it for each visit.",
        place="the store",
        wrong=_NEVER,
        right=f"An increment is one step of the store, under its lock or in its transaction. {_ONE_STEP}",
    ),
    "value": Strategy(_value, "multiprocessing.Value"),
    "textbook": Strategy(_recipe, "BaseManager, the textbook recipe", recipe="SomeObj"),
    "textbook-lock": Strategy(_recipe, "BaseManager with a lock", recipe="LockedObj"),
    "textbook-killed": Strategy(_recipe, "BaseManager with a lock, killed", recipe="LockedObj", killed=True),
    "cachelib": Strategy(_cachelib, "cachelib's file cache", needs=("cachelib",)),
    "flask-caching": Strategy(_flask_caching, "Flask-Caching, get and set", needs=("flask_caching",)),
    "stash": Strategy(
        _stash,
        "gunicorn's Dirty Stash",
        needs=("gunicorn",),
        newer="gunicorn.dirty",
        gunicorn=("--dirty-workers", "1", "--dirty-app", "gunicorn.dirty:DirtyApp"),
    ),
    "ours": Strategy(
        lambda run: partial(one_step, run.shared.object("global_obj", SomeObj, 0, durable=True).query),
        "counter-server, its manager killed",
        killed=True,
    ),
}

if __name__ == "__main__":
    hold(*sys.argv[1:])
