"""The supervisor: binds the port once, starts the manager and the workers, and keeps them running.

Signal handlers only note what came; one loop acts on it. Whatever ends the supervisor, its children see the end of
a pipe and end too.
"""

import logging
import os
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from ..errors import StartupError
from ..extension import SharedState
from ..manager.directory import DataDirectory
from ..settings import ServerSettings, default_data_dir
from ..stores import open_store
from .application import Application
from .child import BOOT_SECONDS, SIGNALS, Child
from .logs import configure
from .managing import manage
from .processes import Processes
from .replacement import Replacement
from .service_manager import inherited_socket, notify, notify_reloading
from .web.security import signing_key
from .worker import BACKLOG, BEAT_SECONDS, DRAIN_SECONDS, work

log = logging.getLogger(__name__)

_MOST_FAILURES = 10  # in a row, of one child; then the server gives up


@dataclass
class Supervisor:
    """Runs one server, as `settings` say."""

    settings: ServerSettings
    _signals: deque[int] = field(default_factory=deque)  # to stop
    _hangup: bool = False  # to replace the workers

    def run(self) -> int:
        """Serve until a signal; return the exit status.

        :raises StartupError: if the port, the data directory or the application cannot be had.
        """
        configure("supervisor", self.settings.log_format)
        self._wakeup, wake = socket.socketpair()
        for end in (self._wakeup, wake):
            end.settimeout(0)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._note)
        sock = inherited_socket() or self._bind()
        manager, workers = self._children(sock)
        replacement = Replacement(workers)
        try:
            for group in (manager, workers):
                self._boot(group)
            self._note_processes([*manager, *workers])
            if not self._signals:
                print(f"Serving on {_url(sock)}", flush=True)
                notify("READY=1")
            self._watch(manager, workers, replacement)
            notify("STOPPING=1")
            sock.close()  # nobody new is let in; the workers have copies, which they close when they are told
            return self._stop(manager, [*workers, *replacement.children])
        finally:
            for child in [*manager, *workers, *replacement.children]:
                if child.process is not None and child.process.is_alive():
                    child.process.kill()
            sock.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hangup = True
            return
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

    def _children(self, sock: socket.socket) -> tuple[list[Child], list[Child]]:
        settings = self.settings
        store = settings.store
        open_store(store).close()  # a URL that names none is told here, in one line
        directory = DataDirectory.from_url(store, default_data_dir()) if store.startswith("manager:") else None
        names = [f"worker-{n}" for n in range(1, settings.workers + 1)]
        starts_manager = directory is not None and not settings.attach
        self._processes = Processes([*(["manager"] if starts_manager else []), *names])
        config: dict[str, Any] = {
            **settings.web,
            "COUNTER_SERVER_HOST": sock.getsockname()[0],
            "COUNTER_SERVER_REQUEST_LOG": settings.log_format == "json",
            "COUNTER_SERVER_DATA_DIR": str(directory or DataDirectory(default_data_dir())),
            "COUNTER_SERVER_STORE": directory.url if directory else store,
            "COUNTER_SERVER_START": False,  # that is this process's to do
            "COUNTER_SERVER_PROCESSES": self._processes,
            "SECRET_KEY": "not yet",  # the application comes first: what it refuses leaves no data directory behind
        }
        application = Application(config)
        app = application.app
        managers = []
        if directory and starts_manager:
            directory.make()
            with app.app_context():
                declarations = list(SharedState().state.declarations.values())
            managers.append(Child("manager", manage, (directory, settings, declarations)))
        if store == "memory://" and settings.workers > 1:
            log.warning("memory:// is not shared: each of the %d workers counts on its own", settings.workers)
        app.secret_key = config["SECRET_KEY"] = signing_key(config["COUNTER_SERVER_STORE"], default_data_dir())
        workers = [Child(name, work, (sock, settings, application), beats=True) for name in names]
        return managers, workers

    def _boot(self, group: list[Child]) -> None:
        """Start the group and wait until all of it is ready. One that cannot boot stops the server."""
        deadline = time.monotonic() + BOOT_SECONDS
        for child in group:
            if not child.start():
                raise StartupError(f"the {child.name} process could not be started; why not stands above")
        while not self._signals and any(child.ready_since is None for child in group):
            self._wait(group, deadline)
            for child in group:
                if child.ended and not self._signals:
                    raise StartupError(f"the {child.name} process could not start; its own message stands above")
            if time.monotonic() > deadline:
                raise StartupError(f"not ready after {BOOT_SECONDS:g} seconds; the processes' messages stand above")

    def _watch(self, manager: list[Child], workers: list[Child], replacement: Replacement) -> None:
        """Restart what dies or freezes, and replace the workers when asked to, until a signal comes."""
        while not self._signals:
            self._wait([*manager, *workers, *replacement.children], self._next_event([*manager, *workers]))
            if self._hangup:
                self._hangup = False
                notify_reloading()
                replacement.begin()
            if replacement.go_on():
                notify("READY=1")
                for child in manager:  # if it has to be started again, it is to match the workers
                    child.anew = all(worker.anew for worker in workers)
            for child in [*manager, *workers]:
                self._keep_running(child)
            self._note_processes([*manager, *workers])
            _reap_strangers({child.pid for child in [*manager, *workers, *replacement.children]})

    def _note_processes(self, children: list[Child]) -> None:
        for child in children:
            self._processes.note(child.name, child.pid)

    def _next_event(self, children: list[Child]) -> float:
        pending = [child.restart_at for child in children if child.process is None]
        return min([*pending, time.monotonic() + BEAT_SECONDS])

    def _keep_running(self, child: Child) -> None:
        if child.silent_for(time.monotonic()) > self.settings.frozen_after and child.process is not None:
            log.warning("%s (pid %s) gives no sign of life; ending it", child.name, child.process.pid)
            child.process.kill()
            child.process.join()
        if child.ended:
            pid, code = child.pid, child.bury()
            if child.failures >= _MOST_FAILURES:
                raise StartupError(f"the {child.name} process died {child.failures} times in a row; giving up")
            log.warning("%s (pid %s) ended with %s; starting another", child.name, pid, _describe(code))
        if child.process is None and time.monotonic() >= child.restart_at and not self._signals:
            child.start()

    def _wait(self, children: list[Child], until: float) -> None:
        """Until something happens to a child, a signal comes, or the time does."""
        lifelines = {child.lifeline: child for child in children if child.lifeline is not None}
        ends = [child.process.sentinel for child in children if child.process is not None]
        began = time.monotonic()
        happened = wait([*lifelines, *ends, self._wakeup], max(until - began, 0))
        late = time.monotonic() - max(until, began)
        if late > BEAT_SECONDS:  # this process was stopped itself, or the whole machine: nobody can be blamed
            for child in lifelines.values():
                child.heard_at += late
        for source in happened:
            if isinstance(source, Connection):
                lifelines[source].hear()
        with suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def _stop(self, manager: list[Child], workers: list[Child]) -> int:
        """Workers first, so that their last requests are still counted; then the manager."""
        for child in workers:
            if child.process is not None:
                child.process.terminate()
        _await_end(workers)
        for child in manager:
            child.let_go()
        _await_end(manager)
        return 0


def _await_end(children: list[Child]) -> None:
    """Wait until they have ended, but not for ever."""
    deadline = time.monotonic() + DRAIN_SECONDS + 1
    for child in children:
        if child.process is not None:
            child.process.join(max(deadline - time.monotonic(), 0))


def _reap_strangers(ours: set[int | None]) -> None:
    """Reap processes that were left to this one when their parents died, as it may be the first of a container.

    One of ours that has died is seen by its own place, and the strangers behind it at the next look.
    """
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ours:
            os.waitpid(ended.si_pid, 0)


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"status {code}"
