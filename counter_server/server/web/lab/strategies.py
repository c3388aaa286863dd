"""Ways to give each client a number: those that the seed question warns of, and their cure.

The racy ones really are: each reads, lets other threads run for a moment, and writes. A switch of threads at the wrong
instant does the same without being asked, only not each time that somebody looks.
"""

import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from flask import Flask, Response, after_this_request, current_app, request, url_for
from werkzeug.exceptions import Gone

from ....errors import StartupError, Unsupported
from ....extension import SharedState
from ....manager.directory import DataDirectory
from ....stores import HostsObjects, Store
from ..security import Sessions
from .runs import FORGOTTEN, PerRun, Run, is_over

YIELD_SECONDS = 0.02  # much longer than requests that a browser sends together are apart
_COUNTERS = "lab/"  # before the name of a run: its counter
_NEVER = "This must never be. Please tell the makers of counter_server what you did."


class Answer(msgspec.Struct, frozen=True):
    """What one client is told, and how it came to that. Times are of one clock for all processes of a machine."""

    number: int
    worker: int  # the process that answered
    read: int | None  # what it read before; None where reading and writing are one step
    began: float  # seconds: when it had read, or asked
    ended: float  # seconds: when it began to write, or was answered


class Strategy:
    """One way to count, and words for people: what it is, and why its numbers are wrong, or right."""

    name: str
    title: str
    about: str
    place: str  # where the number is, as in "reads 4 from …"
    wrong: str
    right: str
    missing: str = ""  # why it cannot be used here; empty if it can

    def begin(self, run: Run) -> None:
        """Make what the run's clients share, where that is not made by the first of them."""

    def count(self, run: Run) -> Answer:
        """Serve one client."""
        raise NotImplementedError

    def end(self, run: Run) -> None:
        """Keep nothing of the run any longer."""

    def tidy(self) -> None:
        """Remove what is left of runs that nobody ended."""


def _race(read: Callable[[], int], write: Callable[[int], object]) -> Answer:
    """The seed's bug, step by step."""
    found = read()
    began = time.monotonic()
    time.sleep(YIELD_SECONDS)  # the thread switches over to another client
    ended = time.monotonic()
    write(found + 1)
    return Answer(found + 1, os.getpid(), found, began, ended)


def _one_step(increment: Callable[[], int]) -> Answer:
    began = time.monotonic()
    number = increment()
    return Answer(number, os.getpid(), None, began, time.monotonic())


class SomeObj:
    """The seed's object, with its two halves apart."""

    def __init__(self, param: int = 0) -> None:
        self.param = param
        self.lock = threading.Lock()  # for the strategy that has one: held from the read to the write

    def read(self) -> int:
        return self.param

    def write(self, number: int) -> None:
        self.param = number


class PlainGlobal(Strategy):
    name = "global"
    title = "A plain global"
    about = "global_obj.param += 1, as in the question: an object in the memory of each worker process."
    place = "its own global"
    wrong = (
        "A global is safe in no way. Threads of one worker read the same number before either has written the next, and"
        " each worker process has a global of its own, which begins at 0."
    )
    right = (
        "It went well this time, by luck: no two clients met in one worker, and no other worker answered. More clients,"
        " threads or workers end that."
    )

    def __init__(self) -> None:
        self._objects = PerRun(SomeObj)

    def count(self, run: Run) -> Answer:
        global_obj = self._objects.of(run)
        return _race(global_obj.read, global_obj.write)

    def end(self, run: Run) -> None:
        self._objects.forget(run)


class LockedGlobal(PlainGlobal):
    name = "lock"
    title = "A global with threading.Lock"
    about = "The same global, with a lock around its read and its write: thread safe, and not process safe."
    wrong = (
        "The lock did its work: in each worker no number came twice. But each worker process has a lock of its own, and"
        " a global of its own, which begins at 0."
    )
    right = (
        "One worker process answered every client, and its lock let them in one by one. A second worker would have a"
        " lock and a global of its own, and the same numbers again."
    )

    def count(self, run: Run) -> Answer:
        global_obj = self._objects.of(run)
        with global_obj.lock:
            return _race(global_obj.read, global_obj.write)


class PlainFile(Strategy):
    name = "file"
    title = "A file, read then written"
    about = "number = int(file.read_text()), then file.write_text(…): one file for all workers, two steps."
    place = "the file"
    wrong = (
        "All workers share the file, but reading and writing are two steps, like get and set of a cache: a client"
        " that reads between them gets the old number, and what was written between them is lost."
    )
    right = "It went well this time, by luck: no client read between another one's reading and its writing."

    def begin(self, run: Run) -> None:
        """Make the run's directory: one that is there already was not made for this run, and is refused."""
        (self._made() / run.name).mkdir(0o700)

    def count(self, run: Run) -> Answer:
        file = self._directory(run.name) / "param"

        def write(number: int) -> None:
            draft = file.with_name(secrets.token_hex(8))  # renamed when it is whole: no client reads half a number
            draft.write_text(str(number))
            draft.replace(file)

        try:
            return _race(lambda: int(file.read_text()) if file.exists() else 0, write)
        except FileNotFoundError:
            raise Gone("this run has ended: start another") from None

    def end(self, run: Run) -> None:
        # A client that is late may be writing there: `tidy` removes what is left then.
        shutil.rmtree(self._directory(run.name), ignore_errors=True)

    def tidy(self) -> None:
        for directory in self._made().iterdir():
            if is_over(directory.name):
                shutil.rmtree(directory, ignore_errors=True)

    @staticmethod
    def _directory(name: str) -> Path:
        return _data_directory().path / "lab" / name

    @classmethod
    def _made(cls) -> Path:
        """Make the directory for all runs in the data directory, or check that only this user can write to it."""
        _data_directory().make()
        path = cls._directory("")
        path.mkdir(0o700, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise StartupError(f"{path} is not a directory of this user alone: nothing was read there; remove it")
        return path


class _LabCookies(Sessions):
    """Flask's sessions in a cookie of another name: a visitor's real session loses nothing in the lab's race."""

    def get_cookie_name(self, app: Flask) -> str:
        return f"{super().get_cookie_name(app)}_lab"

    def get_cookie_path(self, app: Flask) -> str:  # noqa: ARG002 - as it is there
        return url_for("lab.page")


class YourSession(Strategy):
    name = "session"
    title = "Your session"
    about = 'session["param"] += 1: a signed cookie, which each answer sends to your browser.'
    place = "the cookie"
    wrong = (
        "A session is a cookie in your browser. Requests that are under way together bring the same cookie, and the"
        " last answer to arrive replaces it. It is yours alone, too: another visitor has another."
    )
    right = (
        "It went well this time: the browser had one request under way at a time. And a session is yours alone: another"
        " visitor would have had the same numbers."
    )
    _cookies = _LabCookies()

    def count(self, run: Run) -> Answer:
        app = current_app
        session = self._cookies.open_session(app, request)
        assert session is not None  # there is a secret key

        def write(number: int) -> None:
            session.update(run=run.name, param=number)

        @after_this_request
        def save(response: Response) -> Response:
            self._cookies.save_session(app, session, response)
            return response

        return _race(lambda: session["param"] if session.get("run") == run.name else 0, write)


class TheManager(Strategy):
    name = "manager"
    title = "The manager"
    about = 'numbers.incr("param"): a Python object in the manager process, one for all workers.'
    place = "the manager"
    wrong = _NEVER
    right = (
        "The manager holds one object for all workers, and reads, adds and writes in one step, under its lock. Nobody"
        " can come between: each number is given once, whichever worker a client comes to."
    )

    def __init__(self, shared: SharedState, store: Store) -> None:
        self._numbers = shared.dict("lab", max_entries=1000, ttl=FORGOTTEN) if isinstance(store, HostsObjects) else None
        if _scheme(store) != "manager":  # one that is to be hosted was declared all the same
            self.missing = f"the configured store is {_scheme(store)}://, and that has none"

    def count(self, run: Run) -> Answer:
        numbers = self._numbers
        assert numbers is not None  # as nothing is missing
        return _one_step(lambda: numbers.incr(run.name))

    def end(self, run: Run) -> None:
        assert self._numbers is not None
        self._numbers.pop(run.name, None)


class ConfiguredStore(Strategy):
    name = "store"
    about = "counter.increment(), as the home page does it for each visit."
    place = "the store"
    wrong = _NEVER
    right = (
        "An increment is one step of the store, under its lock or in its transaction. Nobody can come between: each"
        " number is given once, whichever worker a client comes to."
    )

    def __init__(self, shared: SharedState, store: Store) -> None:
        self.title = f"The configured store, {_scheme(store)}://"
        self._shared = shared
        if _scheme(store) == "memory":
            self.wrong = "memory:// is each worker process's own: in none did a number come twice, but each began at 0."

    def count(self, run: Run) -> Answer:
        return _one_step(self._shared.counter(_COUNTERS + run.name).increment)

    def end(self, run: Run) -> None:
        self._shared.counter(_COUNTERS + run.name).delete()

    def tidy(self) -> None:
        with suppress(Unsupported):  # memcached lists nothing: what was left there goes when it needs the room
            for name, _ in self._shared.counters(after=_COUNTERS).counters:  # the oldest first
                if name.startswith(_COUNTERS) and is_over(name.removeprefix(_COUNTERS)):
                    self._shared.counter(name).delete()


def strategies(shared: SharedState, store: Store) -> dict[str, Strategy]:
    """All of them, by name, in the order in which they are shown.

    :param store: where the state of the app is.
    """
    found = (
        PlainGlobal(),
        LockedGlobal(),
        PlainFile(),
        YourSession(),
        TheManager(shared, store),
        ConfiguredStore(shared, store),
    )
    return {strategy.name: strategy for strategy in found}


def _scheme(store: Store) -> str:
    """What pages tell of a store: the whole URL is for operators."""
    return str(store).partition("://")[0]


def _data_directory() -> DataDirectory:
    """Find the app's data directory: the manager's, or the one that holds the app's keys beside another store."""
    config = current_app.config
    store, default = config["COUNTER_SERVER_STORE"], config["COUNTER_SERVER_DATA_DIR"]
    return DataDirectory.from_url(store, default) if store.startswith("manager:") else DataDirectory(default)
