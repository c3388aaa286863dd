"""The faults of a soak: each kind is injected once per call, and the recovery is timed."""

import errno
import os
import random
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from counter_server.server.prove.load import Client, path_of
from counter_server.server.prove.proof import group_members
from tests.processes import PATIENCE, Server, eventually, frozen
from tests.test_manager import raw
from tests.test_server import visit

DISK_FULL = "disk full"
WORKERS = 2

SLOW_CLIENTS, DEAF_CLIENTS, HALF_OPEN, FLOOD, STRANGERS = 10, 4, 30, 300, 50
MOST_HELD = SLOW_CLIENTS + DEAF_CLIENTS + HALF_OPEN  # connections that stay open for some time

_INCREMENT = f"POST {path_of('by-faults')}/increment HTTP/1.1\r\nHost: localhost\r\n"
_LONGEST_FREEZE = 2.0  # seconds; less than a call waits for its manager


@dataclass(frozen=True, kw_only=True)
class Injury:
    """One fault and its recovery."""

    kind: str
    moment: float  # seconds after the load began
    recovery: float | None  # seconds until all was replaced and an increment was answered; None if too late
    why: str = ""  # the reason if it did not recover in time


class Faults:
    """A server, and the faults injected into it.

    :param start: starts the server, at first and after it was killed.
    :param disk: mount point of the small file system with the data directory; None if it is on a large one.
    :param increment: makes an increment, and returns whether it was answered before the deadline.
    """

    def __init__(
        self,
        start: Callable[[], Server],
        data_dir: Path,
        disk: Path | None,
        increment: Callable[[float], bool],
        chance: random.Random,
    ) -> None:
        self.server = start()
        self._start = start
        self._data_dir = data_dir
        self._disk = disk
        self._increment = increment
        self._chance = chance
        self._held = {kind: ExitStack() for kind in ("slow", "half-open", "deaf")}

    @property
    def passing_here(self) -> list[str]:
        """Return the faults that kill nothing and are possible here."""
        return [kind for kind in self.passing if kind != DISK_FULL or self._disk is not None]

    def strike(self, kind: str, moment: float) -> Injury:
        """Inject a fault, and return when the server has recovered, or has not recovered in time."""
        harm = {**self.replacing, **self.passing}[kind]
        try:
            eventually(lambda: len(self.server.children("worker")) == WORKERS, "the workers")
            eventually(lambda: self.server.children("manager"), "the manager")
            since = harm(self)
        except (AssertionError, OSError, HTTPException) as error:  # an expected event or a valid answer is missing
            return Injury(kind=kind, moment=moment, recovery=None, why=repr(error))
        if not self._increment(time.monotonic() + PATIENCE):
            return Injury(kind=kind, moment=moment, recovery=None, why="no increment was answered")
        return Injury(kind=kind, moment=moment, recovery=time.monotonic() - since)

    def close(self) -> None:
        for stack in self._held.values():
            stack.close()

    # Each of these returns the moment at which the server could begin to recover.

    def _kill(self, *pids: int) -> float:
        began = time.monotonic()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not set(pids) & set(group_members(self.server.pid)), "the end of what was killed")
        return began

    def _kill_manager(self) -> float:
        return self._kill(*self.server.children("manager"))

    def _kill_worker(self) -> float:
        before = self.server.children("worker")
        return self._answered_by_another_than(before, self._kill(self._chance.choice(before)))

    def _kill_all(self) -> float:
        before = self.server.children("worker")
        return self._answered_by_another_than(before, self._kill(*self.server.children("manager"), *before))

    def _kill_supervisor(self) -> float:
        """Check that no child remains, and start another server, as a service manager would."""
        began = time.monotonic()
        self.server.kill()
        eventually(lambda: not group_members(self.server.pid), "the end of all that it started", seconds=5)
        self.server = self._start()
        return began

    def _freeze_worker(self) -> float:
        """Freeze a worker until it is replaced."""
        before = self.server.children("worker")
        victim = self._chance.choice(before)
        began = time.monotonic()
        with frozen(victim):
            eventually(lambda: victim not in group_members(self.server.pid), "the end of a frozen worker")
        return self._answered_by_another_than(before, began)

    def _replace_workers(self) -> float:
        before = set(self.server.children("worker"))
        began = time.monotonic()
        self.server.send_signal(signal.SIGHUP)
        eventually(
            lambda: len(now := set(self.server.children("worker"))) == len(before) and not now & before, "other workers"
        )
        return began

    def _freeze_manager(self) -> float:
        (manager,) = self.server.children("manager")
        with frozen(manager):
            time.sleep(self._chance.uniform(0.1, _LONGEST_FREEZE))  # the fault itself
        return time.monotonic()

    def _slow_clients(self) -> float:
        """Begin requests and never complete them; the server cuts them off."""
        held = self._new("slow")
        for number in range(SLOW_CLIENTS):
            begun = _INCREMENT[:20] if number % 2 else f"{_INCREMENT}Content-Length: 100\r\n\r\n"
            self._connect(held).sendall(begun.encode())
        return time.monotonic()

    def _deaf_clients(self) -> float:
        """Request more than a socket's buffer holds, and read nothing."""
        held = self._new("deaf")
        for _ in range(DEAF_CLIENTS):
            self._connect(held, receive=4096).sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
        return time.monotonic()

    def _half_open_clients(self) -> float:
        held = self._new("half-open")
        for _ in range(HALF_OPEN):
            self._connect(held)
        return time.monotonic()

    def _flood(self) -> float:
        """Open many connections. Half are closed, half are reset; a third send a request whose answer is never read."""
        with ExitStack() as connections:
            for number in range(FLOOD):
                connection = self._connect(connections)
                if number % 3 == 0:
                    connection.sendall(f"{_INCREMENT}\r\n".encode())
                if number % 2:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return time.monotonic()

    def _strangers(self) -> float:
        """Connect to the manager without the key: some send nothing, some nonsense, some announce two gibibytes."""
        words = (b"", os.urandom(200), (2**31 - 1).to_bytes(4, "big"), (2**32 - 1).to_bytes(4, "big"), b"\0\0\0\x05a")
        with ExitStack() as peers:
            for number in range(STRANGERS):
                with suppress(OSError):  # the manager may close them
                    peers.enter_context(raw(self._data_dir)).sendall(words[number % len(words)])
        return time.monotonic()

    def _fill_disk(self) -> float:
        """Fill the disk, and check that writes are refused and reads are not."""
        assert self._disk is not None
        filler = self._disk / "filler"
        try:
            with closing(Client(self.server.url)) as client:
                eventually(lambda: self._fill(filler) and self._refuses(client), "the refusal of a write")
                eventually(lambda: client.request("GET", path_of("by-faults"))[0] == 200, "an answer to a reader")
        finally:
            filler.unlink(missing_ok=True)
        return time.monotonic()

    @staticmethod
    def _fill(filler: Path) -> bool:
        """Fill the remaining space, including space that was released meanwhile."""
        with filler.open("ab", buffering=0) as file:
            try:
                while left := shutil.disk_usage(filler.parent).free:
                    os.posix_fallocate(file.fileno(), file.tell(), min(left, 2**26))
                    file.seek(0, os.SEEK_END)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        return True

    @staticmethod
    def _refuses(client: Client) -> bool:
        try:
            status, content = client.request("POST", f"{path_of('by-faults')}/increment")
        except (OSError, HTTPException):
            return False
        return status == 503 and content["outcome"] == "not_applied"

    def _answered_by_another_than(self, before: list[int], began: float) -> float:
        def another_answers() -> bool:
            new = set(self.server.children("worker")) - set(before)
            with suppress(OSError, HTTPException, AssertionError):
                return visit(self.server.url)[1] in new
            return False

        eventually(another_answers, "an answer of a new worker")
        return began

    def _new(self, kind: str) -> ExitStack:
        """Return a stack for connections that stay open until the next of the same kind."""
        self._held[kind].close()
        return self._held[kind]

    def _connect(self, stack: ExitStack, receive: int | None = None) -> socket.socket:
        connection = stack.enter_context(socket.socket())
        if receive is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        connection.settimeout(PATIENCE)
        parts = urlsplit(self.server.url)
        connection.connect((parts.hostname, parts.port))
        return connection

    replacing: ClassVar[dict[str, Callable[["Faults"], float]]] = {
        "manager killed": _kill_manager,
        "worker killed": _kill_worker,
        "manager and workers killed": _kill_all,
        "supervisor killed": _kill_supervisor,
        "worker frozen": _freeze_worker,
        "workers replaced (SIGHUP)": _replace_workers,
    }
    passing: ClassVar[dict[str, Callable[["Faults"], float]]] = {
        "manager frozen for a moment": _freeze_manager,
        "slow clients": _slow_clients,
        "clients that never read": _deaf_clients,
        "half-open clients": _half_open_clients,
        "flood of connections": _flood,
        "strangers at the manager's socket": _strangers,
        DISK_FULL: _fill_disk,
    }
