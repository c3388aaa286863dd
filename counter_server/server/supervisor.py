"""The supervisor: it binds the port once, starts the manager and the workers, and keeps them running.

Signal handlers only take a note, and one loop acts on it. If the supervisor ends, its children see the end of a pipe
and exit too. They are forked, to start with everything imported. Their successors in a rolling replacement are new
interpreters, which run the code that is installed by then.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from ..errors import CounterServerError, StartupError
from ..extension import SharedState
from ..journal import REFUSALS
from ..manager.directory import DataDirectory
from ..manager.hosting import Hosting
from ..manager.process import serve
from ..objects import Declaration
from ..output import configure
from ..settings import default_data_dir
from ..status import Process
from ..stores import open_store
from .settings import ServerSettings
from .systemd import inherited_socket, notify
from .web import create_app
from .web.security import signing_key
from .worker import BEAT_SECONDS, DRAIN_SECONDS, LINGER_SECONDS, announce, listen, work

log = logging.getLogger(__name__)

STABLE_SECONDS = 1.0  # a child that lived this long after it was ready was not in a crash loop
_BOOT_SECONDS = 30.0
_MAX_FAILURES = 10  # of one child in a row; then the server gives up
_FIRST_PAUSE = 0.1  # seconds before the second restart in a crash loop; doubles
_LONGEST_PAUSE = 3.0
_EXIT_NO_ROOM = 73  # EX_CANTCREAT of sysexits.h: the file system takes no writes for now
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_fork, _spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


@dataclass(eq=False)
class Child:
    """A place among the children, and its current process."""

    name: str
    target: Callable[..., None]
    arguments: tuple[Any, ...]
    fresh: bool = False  # runs in a new interpreter
    process: BaseProcess | None = None
    pid: int | None = None
    lifeline: Connection | None = None  # the child reports on it; closing it ends a manager
    ready_since: float | None = None
    heard_at: float = 0.0
    failures: int = 0  # deaths in a row before it was stable
    restart_at: float = 0.0

    def start(self) -> None:
        """Start a process, or plan another attempt if the system has no room for one."""
        context = _spawn if self.fresh else _fork
        before: set[int] = set()
        try:
            if self.fresh:
                resource_tracker.ensure_running()  # started later it would inherit blocked signals, and unblock them
            before = _descriptors()
            self.lifeline, theirs = context.Pipe()
            with theirs:
                arguments = (*self.arguments, theirs)
                kept = {0, 1, 2, *(each.fileno() for each in arguments if hasattr(each, "fileno"))}
                to_close = set() if self.fresh else {self.lifeline.fileno(), *before} - kept
                process = context.Process(target=_main, args=(to_close, self.target, *arguments), name=self.name)
                # Only the supervisor acts on signals to the process group: children inherit a mask that blocks them.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                try:
                    process.start()
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.process, self.pid = process, process.pid
        except OSError as error:
            log.error("%s cannot be started for now: %s", self.name, error)
            self.close_lifeline()
            self.restart_at = time.monotonic() + _LONGEST_PAUSE
            for left_open in _descriptors() - before if before else ():
                os.close(left_open)

    def hear(self) -> None:
        """Read its signs of life; the first means that it is ready. At the end of the pipe its death follows."""
        try:
            while self.lifeline is not None and self.lifeline.poll():
                self.lifeline.recv()
                self.heard_at = time.monotonic()
                self.ready_since = self.ready_since or self.heard_at
        except (EOFError, OSError):
            self.close_lifeline()

    @property
    def ended(self) -> bool:
        """Whether its process has died but was not reaped."""
        return self.process is not None and not self.process.is_alive()

    def close_lifeline(self) -> None:
        if self.lifeline is not None:
            self.lifeline.close()
            self.lifeline = None

    def end(self) -> int:
        """Kill its process if it lives, reap it, plan the next start, and return the exit code."""
        if self.process is None:
            return 0
        self.close_lifeline()
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        self.process.close()
        self.process = self.pid = None
        pause = _LONGEST_PAUSE
        if code != _EXIT_NO_ROOM:  # a full disk is not the child's failure
            stable = self.ready_since is not None and time.monotonic() - self.ready_since > STABLE_SECONDS
            self.failures = 1 if stable else self.failures + 1
            pause = 0.0 if self.failures == 1 else min(_FIRST_PAUSE * 2 ** (self.failures - 2), _LONGEST_PAUSE)
        self.ready_since = None
        self.restart_at = time.monotonic() + pause
        return code


def _main(to_close: Iterable[int], target: Callable[..., None], *arguments: Any) -> None:
    """Run `target` in a child process and report its errors in one line."""
    signal.set_wakeup_fd(-1)  # a fork inherits the supervisor's, and its handlers
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for descriptor in to_close:  # inherited by a fork, as are their Python objects, which the frames below keep alive
        os.close(descriptor)
    multiprocessing.set_start_method("spawn", force=True)  # a child has threads, so it must not fork
    try:
        target(*arguments)
    except CounterServerError as error:
        print(f"Error: {error}", file=sys.stderr)
        is_refusal = isinstance(error.__cause__, OSError) and error.__cause__.errno in REFUSALS
        sys.exit(_EXIT_NO_ROOM if is_refusal else 1)


def _manage(directory: DataDirectory, settings: ServerSettings, hosted: list[Declaration], pipe: Connection) -> None:
    configure("manager", settings.log_format)
    ready, hosting = partial(pipe.send, None), Hosting.of_this_process(hosted)
    serve(directory, settings.durability, ready=ready, lifeline=pipe, hosting=hosting, caps=settings.caps)


def _descriptors() -> set[int]:
    found = set()
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # `listdir` has closed its own by now
            os.fstat(number)
            found.add(number)
    return found


class Processes:
    """A table of the manager and the workers, in memory that the workers share. Only the supervisor writes it.

    Reading needs no other process. The application calls it by its configuration, ``COUNTER_SERVER_PROCESSES``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # Each is the pid, 0 during a change and without a process; the `time.monotonic` of its start; and all starts.
        self._rows = {name: _spawn.RawArray("d", 3) for name in names}

    def note(self, name: str, pid: int | None) -> None:
        row = self._rows[name]
        if row[0] != (pid or 0):
            row[0] = 0
            if pid is not None:
                row[1] = time.monotonic()
                row[2] += 1
                row[0] = pid

    def __call__(self) -> list[Process]:
        found = []
        for name, row in self._rows.items():
            # Without a lock, whose holder might be killed. The writer clears the pid first and sets it last, so the
            # values between two reads of the same pid belong to it.
            pid, began, starts = row
            while row[0] != pid:
                pid, began, starts = row
            uptime = time.monotonic() - began if pid else 0.0
            found.append(Process(name=name, pid=int(pid) or None, uptime=uptime, restarts=max(int(starts) - 1, 0)))
        return found


class Supervisor:
    """Runs one server."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._stopping = self._hangup = False  # signals that arrived
        self._managers: list[Child] = []  # one, or none if the store needs none of ours
        self._workers: list[Child] = []
        self._starting: list[Child] = []  # the successor of a worker
        self._retired: dict[Child, float] = {}  # replaced workers, and when each must have ended

    @property
    def _children(self) -> list[Child]:
        return [*self._managers, *self._workers, *self._starting, *self._retired]

    def run(self) -> int:
        """Serve until a signal arrives, and return the exit status. `StartupError` says what prevents it."""
        configure("supervisor", self._settings.log_format)
        self._wakeup, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._note_signal)
        sock = inherited_socket() or listen(self._settings)
        self._make_children(sock)
        try:
            for group in (self._managers, self._workers):
                self._boot(group)
            if not self._stopping:
                announce(sock)
                notify("READY=1")
            self._watch()
            notify("STOPPING=1")
            sock.close()  # the workers have copies, which they close as they stop
            self._stop()
            return 0
        finally:
            for child in self._children:
                child.end()
            sock.close()

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hangup = True
            return
        if self._stopping:
            os._exit(128 + number)  # the second signal ends everything: the children see the end of the pipe
        self._stopping = True

    def _make_children(self, sock: socket.socket) -> None:
        settings, store = self._settings, self._settings.store
        open_store(store).close()  # reports an invalid URL
        directory = DataDirectory.from_url(store, default_data_dir()) if store.startswith("manager:") else None
        managers = ["manager"] if directory and not settings.attach else []
        workers = [f"worker-{n}" for n in range(1, settings.workers + 1)]
        self._processes = Processes([*managers, *workers])
        config: dict[str, Any] = {
            **settings.web,
            "COUNTER_SERVER_HOST": sock.getsockname()[0],
            "COUNTER_SERVER_REQUEST_LOG": settings.log_format == "json",
            "COUNTER_SERVER_DATA_DIR": str(directory or DataDirectory(default_data_dir())),
            "COUNTER_SERVER_STORE": directory.url if directory else store,
            "COUNTER_SERVER_DURABILITY": settings.durability,  # a page says it
            "COUNTER_SERVER_START": False,  # this process starts the manager
            "COUNTER_SERVER_PROCESSES": self._processes,
            "SECRET_KEY": "not yet",  # the application comes first: if it fails, no data directory is left behind
        }
        app = create_app(config)
        if directory and managers:
            directory.make()
            with app.app_context():
                declarations = list(SharedState().state.declarations.values())
            self._managers = [Child("manager", _manage, (directory, settings, declarations))]
        if store == "memory://" and settings.workers > 1:
            log.warning("memory:// is not shared: each of the %d workers counts on its own", settings.workers)
        app.secret_key = config["SECRET_KEY"] = signing_key(config["COUNTER_SERVER_STORE"], default_data_dir())
        connections = _spawn.RawArray("i", len(workers))
        self._workers = [
            Child(name, work, (sock, settings, config, connections, place, app)) for place, name in enumerate(workers)
        ]

    def _boot(self, group: list[Child]) -> None:
        """Start the group and wait until all of it is ready."""
        deadline = time.monotonic() + _BOOT_SECONDS
        for child in group:
            child.start()
            self._processes.note(child.name, child.pid)
        while not self._stopping and any(child.ready_since is None for child in group):
            for child in group:
                if (child.process is None or child.ended) and not self._stopping:
                    raise StartupError(f"the {child.name} process could not start; its message stands above")
            if time.monotonic() > deadline:
                raise StartupError(f"not ready after {_BOOT_SECONDS:g} seconds; the processes' messages stand above")
            self._wait(deadline)

    def _watch(self) -> None:
        """Restart children that die or freeze, and replace the workers on SIGHUP, until a signal to stop arrives."""
        replacement: Iterator[None] | None = None
        while not self._stopping:
            starts = [child.restart_at for child in [*self._managers, *self._workers] if child.process is None]
            self._wait(min([*starts, time.monotonic() + BEAT_SECONDS]))
            if self._hangup and replacement is None:
                self._hangup = False
                notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
                replacement = self._replace_workers()
            if replacement and next(replacement, "done") == "done":
                replacement = None
                notify("READY=1")
                for child in self._managers:  # the next one matches the workers
                    child.fresh = all(worker.fresh for worker in self._workers)
            for child, deadline in list(self._retired.items()):
                if child.ended or time.monotonic() > deadline:
                    child.end()
                    del self._retired[child]
            for child in [*self._managers, *self._workers]:
                self._keep_running(child)
            self._reap_strangers()

    def _replace_workers(self) -> Iterator[None]:
        """Replace the workers one by one, each when its successor is ready; yield while waiting for that."""
        for place, old in enumerate(self._workers):
            shared = old.arguments[:-1]  # without the application, which a new interpreter makes itself
            new = Child(old.name, work, (*shared, None), fresh=True)
            self._starting = [new]
            deadline = time.monotonic() + _BOOT_SECONDS
            new.start()
            while new.ready_since is None:
                if new.process is None or new.ended or time.monotonic() > deadline:
                    log.error("a new %s does not start; the old ones go on", new.name)
                    new.end()
                    self._starting = []
                    return
                yield
            log.info("%s: pid %s takes the place of pid %s", new.name, new.pid, old.pid)
            self._workers[place], self._starting = new, []
            if old.pid is not None:
                if not old.ended:
                    os.kill(old.pid, signal.SIGHUP)
                self._retired[old] = time.monotonic() + LINGER_SECONDS + DRAIN_SECONDS + 1

    def _keep_running(self, child: Child) -> None:
        silent_for = time.monotonic() - child.heard_at
        frozen = child in self._workers and child.ready_since is not None and silent_for > self._settings.frozen_after
        if frozen:
            log.warning("%s (pid %s) gives no sign of life; ending it", child.name, child.pid)
        if frozen or child.ended:
            pid, code = child.pid, child.end()
            if child.failures >= _MAX_FAILURES:
                raise StartupError(f"the {child.name} process died {child.failures} times in a row; giving up")
            status = f"signal {-code}" if code < 0 else f"status {code}"
            log.warning("%s (pid %s) ended with %s; starting another", child.name, pid, status)
        if child.process is None and time.monotonic() >= child.restart_at and not self._stopping:
            child.start()
        self._processes.note(child.name, child.pid)

    def _wait(self, until: float) -> None:
        """Wait until a child reports or ends, a signal arrives, or the time comes."""
        ends = [child.process.sentinel for child in self._children if child.process is not None]
        lifelines = [child.lifeline for child in self._children if child.lifeline is not None]
        began = time.monotonic()
        wait([*lifelines, *ends, self._wakeup], max(until - began, 0))
        late = time.monotonic() - max(until, began)
        for child in self._children:
            if late > BEAT_SECONDS:  # this process or the whole machine was stopped: no child is to blame
                child.heard_at += late
            child.hear()
        with suppress(BlockingIOError):
            os.read(self._wakeup, 4096)

    def _stop(self) -> None:
        """End the workers first, so that their last requests are still counted, and then the manager."""
        workers = [child for child in self._children if child not in self._managers]
        for child in workers:
            if child.process is not None:
                child.process.terminate()
        for group in (workers, self._managers):
            deadline = time.monotonic() + DRAIN_SECONDS + 1
            for child in group:
                if group is self._managers:
                    child.close_lifeline()
                if child.process is not None:
                    child.process.join(max(deadline - time.monotonic(), 0))

    def _reap_strangers(self) -> None:
        """Reap orphans that the kernel gave to this process, as it does to the first process of a container."""
        ours = {child.pid for child in self._children}
        with suppress(ChildProcessError):  # it stops at a dead child of ours, which is reaped elsewhere first
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ours:
                os.waitpid(ended.si_pid, 0)
