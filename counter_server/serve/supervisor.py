"""The supervisor: binds the port once, starts the manager and the workers, and keeps them running.

Signal handlers only note what came; one loop acts on it. Whatever ends the supervisor, its children see the end of
a pipe and end too.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from ..errors import CounterServerError, StartupError
from ..extension import SharedState
from ..manager.directory import DataDirectory
from ..objects import Declaration
from ..settings import Durability, ServerSettings, default_data_dir
from ..stores import open_store
from ..web import create_app
from ..web.signing import signing_key
from .processes import Processes
from .worker import BACKLOG, DRAIN_SECONDS, work

log = logging.getLogger(__name__)

_BOOT_SECONDS = 30.0
_STABLE_SECONDS = 1.0  # one that lived this long after it was ready was not in a crash loop
_FIRST_PAUSE = 0.1  # seconds before the second restart in a crash loop; doubles
_LONGEST_PAUSE = 3.0
_MOST_FAILURES = 10  # in a row, of one child; then the server gives up

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_spawn = multiprocessing.get_context("spawn")


@dataclass
class _Child:
    """One place among the children: the process that fills it now, and how its predecessors fared."""

    name: str
    target: Callable[..., None]
    arguments: tuple[Any, ...]
    processes: Processes  # where its beginning and its end are noted
    process: SpawnProcess | None = None
    lifeline: Connection | None = None  # on which it says that it is ready; closing it ends a manager
    ready_since: float | None = None
    failures: int = 0  # deaths in a row before it was stable
    restart_at: float = 0.0

    def start(self) -> None:
        self.lifeline, theirs = _spawn.Pipe()
        self.ready_since = None
        self.process = _spawn.Process(target=_child_main, args=(self.target, *self.arguments, theirs), name=self.name)
        # A signal to the whole process group, as a terminal or a service manager sends it, is for the supervisor to
        # act on: the children inherit that these are blocked.
        resource_tracker.ensure_running()  # the first start would do it, and unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        assert self.process.pid is not None
        self.processes.began(self.name, self.process.pid)

    def hear(self) -> None:
        """Take note that it is ready. An end of file is followed by its death, which is seen elsewhere."""
        assert self.lifeline is not None
        try:
            self.lifeline.recv()
            self.ready_since = time.monotonic()
        except (EOFError, OSError):
            self.let_go()

    def let_go(self) -> None:
        """Close the lifeline."""
        if self.lifeline is not None:
            self.lifeline.close()
            self.lifeline = None

    def bury(self) -> int:
        """Count the death of its process, set when to start the next, and return the exit code."""
        assert self.process is not None
        self.let_go()
        self.processes.ended(self.name)
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.process = None
        now = time.monotonic()
        stable = self.ready_since is not None and now - self.ready_since > _STABLE_SECONDS
        self.failures = 1 if stable else self.failures + 1
        self.restart_at = now + (
            0.0 if self.failures == 1 else min(_FIRST_PAUSE * 2 ** (self.failures - 2), _LONGEST_PAUSE)
        )
        return code or 0


@dataclass
class Supervisor:
    """Runs one server, as `settings` say."""

    settings: ServerSettings
    _signals: deque[int] = field(default_factory=deque)

    def run(self) -> int:
        """Serve until a signal; return the exit status.

        :raises StartupError: if the port, the data directory or the application cannot be had.
        """
        logging.basicConfig(level=logging.INFO, format="%(asctime)s supervisor %(levelname)s %(message)s")
        self._wakeup, wake = os.pipe()
        for descriptor in (self._wakeup, wake):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            signal.signal(number, self._note)
        sock = self._bind()
        manager, workers = self._children(sock)
        children = [*manager, *workers]
        try:
            for group in (manager, workers):
                self._boot(group)
            if not self._signals:
                print(f"Serving on {_url(sock)}", flush=True)
            self._watch(children)
            sock.close()  # nobody new is let in; the workers have copies, which they close when they are told
            return self._stop(manager, workers)
        finally:
            for child in children:
                if child.process is not None and child.process.is_alive():
                    child.process.kill()
            sock.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            os._exit(128 + number)  # the second time they mean it; the children see the pipe's end

    def _bind(self) -> socket.socket:
        host, port = self.settings.host, self.settings.port
        if not host:
            raise StartupError("--host is empty: name an address, 127.0.0.1 for this machine, 0.0.0.0 for all")
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = socket.socket(family, kind, protocol)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except (OSError, ValueError) as error:  # ValueError: what cannot be a host's name at all
            reason = getattr(error, "strerror", None) or error
            raise StartupError(
                f"cannot listen on {host!r} port {port}: {reason}; choose another with --host or --port"
            ) from error
        return sock

    def _children(self, sock: socket.socket) -> tuple[list[_Child], list[_Child]]:
        settings = self.settings
        store = settings.store
        open_store(store).close()  # a URL that names none is told here, in one line
        config: dict[str, Any] = {**settings.web, "COUNTER_SERVER_HOST": settings.host}
        with_manager = store.startswith("manager:")
        names = [f"worker-{n}" for n in range(1, settings.workers + 1)]
        processes = Processes(["manager", *names] if with_manager else names)
        managers = []
        app = create_app({**config, "COUNTER_SERVER_STORE": "memory://"})  # to know what it declares
        with app.app_context():
            declarations = list(SharedState().state.declarations.values())
        if with_manager:
            directory = DataDirectory.from_url(store, default_data_dir())
            directory.make()
            store = directory.url
            arguments = (directory, settings.durability, declarations)
            managers.append(_Child("manager", manage, arguments, processes))
        if store == "memory://" and settings.workers > 1:
            log.warning("memory:// is not shared: each of the %d workers counts on its own", settings.workers)
        config["SECRET_KEY"] = signing_key(store, default_data_dir())
        config["COUNTER_SERVER_STORE"] = store
        config["COUNTER_SERVER_START"] = False  # that is this process's to do
        config["COUNTER_SERVER_PROCESSES"] = processes
        workers = [_Child(name, work, (sock, settings.threads, config), processes) for name in names]
        return managers, workers

    def _boot(self, group: list[_Child]) -> None:
        """Start the group and wait until all of it is ready. One that cannot boot stops the server."""
        deadline = time.monotonic() + _BOOT_SECONDS
        for child in group:
            child.start()
        while not self._signals and any(child.ready_since is None for child in group):
            self._wait(group, deadline)
            for child in group:
                if child.process is not None and not child.process.is_alive() and not self._signals:
                    raise StartupError(f"the {child.name} process could not start; its own message stands above")
            if time.monotonic() > deadline:
                raise StartupError(f"not ready after {_BOOT_SECONDS:g} seconds; the processes' messages stand above")

    def _watch(self, children: list[_Child]) -> None:
        """Restart what dies, until a signal comes."""
        while not self._signals:
            pending = [child.restart_at for child in children if child.process is None]
            self._wait(children, min(pending, default=time.monotonic() + 60))
            for child in children:
                if child.process is not None and not child.process.is_alive():
                    pid = child.process.pid
                    code = child.bury()
                    if child.failures >= _MOST_FAILURES:
                        raise StartupError(f"the {child.name} process died {child.failures} times in a row; giving up")
                    log.warning("%s (pid %s) ended with %s; starting another", child.name, pid, _describe(code))
                if child.process is None and time.monotonic() >= child.restart_at and not self._signals:
                    child.start()

    def _wait(self, children: list[_Child], until: float) -> None:
        """Until something happens to a child, a signal comes, or the time does."""
        lifelines = {child.lifeline: child for child in children if child.lifeline is not None}
        ends = [child.process.sentinel for child in children if child.process is not None]
        happened = wait([*lifelines, *ends, self._wakeup], max(until - time.monotonic(), 0))
        for source in happened:
            if isinstance(source, Connection):
                lifelines[source].hear()
        with suppress(BlockingIOError):
            os.read(self._wakeup, 4096)

    def _stop(self, manager: list[_Child], workers: list[_Child]) -> int:
        """Workers first, so that their last requests are still counted; then the manager."""
        for child in workers:
            if child.process is not None:
                child.process.terminate()
        _await_end(workers)
        for child in manager:
            child.let_go()
        _await_end(manager)
        return 0


def _await_end(children: list[_Child]) -> None:
    """Wait until they have ended, but not for ever."""
    deadline = time.monotonic() + DRAIN_SECONDS + 1
    for child in children:
        if child.process is not None:
            child.process.join(max(deadline - time.monotonic(), 0))


def manage(
    directory: DataDirectory, durability: Durability, declarations: list[Declaration], lifeline: Connection
) -> None:
    """The life of a manager process under a supervisor."""
    from ..manager.server import serve

    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s manager {os.getpid()} %(levelname)s %(message)s")

    serve(directory, durability, ready=lambda: lifeline.send(None), lifeline=lifeline, declarations=declarations)


def _child_main(target: Callable[..., None], *arguments: Any) -> None:
    """What a child process runs: `target`, its errors told in one line."""
    try:
        target(*arguments)
    except CounterServerError as error:
        sys.exit(f"Error: {error}")


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"status {code}"
