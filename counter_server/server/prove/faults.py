"""A server to do harm to: started for that alone, its processes killed, and what that costs measured."""

import http.client
import os
import random
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

from ...errors import StartupError
from ...manager.starter import python_command, python_environment
from ..supervisor import STABLE_SECONDS
from .load import PATIENCE, Client
from .processes import children, group_members

_BOOT_SECONDS = 60.0
_SERVING = "Serving on "
# One that is killed while it is young counts to its supervisor as part of a crash loop, and is replaced the later.
_SETTLED_SECONDS = STABLE_SECONDS + 0.2


@dataclass
class OwnServer:
    """A server that ends, with all that is its own, when this process does.

    :param pid: of its supervisor.
    """

    url: str
    pid: int
    said: deque[str]  # the last lines that it printed
    _reader: Thread = field(repr=False)

    @property
    def running(self) -> bool:
        return self._reader.is_alive()


@contextmanager
def own_server() -> Iterator[OwnServer]:
    """`counter-server run` as users run it, on a free port and on a new data directory, while the block runs.

    :raises StartupError: if it does not start.
    """
    command = python_command("counter_server", "run", "--port", "0", "--data-dir", "data")
    # A server like every other, whatever this user has set for their own.
    environment = {name: value for name, value in python_environment().items() if name[:15] != "COUNTER_SERVER_"}
    process = subprocess.Popen(
        python_command("counter_server.server.prove.guard", *command),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C at a terminal is not for them
    )
    assert process.stdin
    assert process.stdout
    said: deque[str] = deque(maxlen=20)
    lines: SimpleQueue[str | None] = SimpleQueue()
    reader = Thread(target=_read, args=(process.stdout, said, lines), daemon=True)
    reader.start()
    try:
        yield _when_it_serves(said, lines, reader)
    finally:
        process.stdin.close()  # which ends the guard, when it has put an end to all else
        process.wait()
        reader.join()
        process.stdout.close()


def _read(stream: Iterable[str], said: deque[str], lines: SimpleQueue[str | None]) -> None:
    for line in stream:
        said.append(line.rstrip())
        lines.put(line.rstrip())
    lines.put(None)


def _when_it_serves(said: deque[str], lines: SimpleQueue[str | None], reader: Thread) -> OwnServer:
    pid = 0
    while True:
        try:
            line = lines.get(timeout=_BOOT_SECONDS)
        except Empty:
            raise StartupError(f"the server did not start: nothing was heard of it for {_BOOT_SECONDS:g} s") from None
        if line is None:
            reason = said[-1].removeprefix("Error: ") if said else "it ended without a word"
            raise StartupError(f"the server did not start: {reason}")
        if not pid:
            pid = int(line) if line.isdigit() else 0
        elif line.startswith(_SERVING):
            return OwnServer(line.removeprefix(_SERVING), pid, said, reader)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One `kill -9`, and what came of it."""

    victim: str  # "manager" or "worker"
    pid: int
    moment: float  # seconds after the load began
    recovery: float | None  # seconds until service was back; none: it was not, in `PATIENCE`


class Faults:
    """A plan of kills, and their history.

    :param victims: how many of each are to be killed, at moments within `seconds`.
    :param increment: one more increment of the load's counter, which returns when it is answered.
    """

    def __init__(
        self, server: OwnServer, victims: dict[str, int], seconds: float, increment: Callable[[float], bool]
    ) -> None:
        self.kills: list[Kill] = []
        self._server = server
        self._increment = increment
        self._plan = sorted((random.uniform(0, seconds), victim) for victim, n in victims.items() for _ in range(n))
        self._plan.reverse()
        self._began = time.monotonic()
        self._settled = dict.fromkeys(victims, self._began)

    def due(self) -> float | None:
        """When the next kill is, in `time.monotonic` seconds; none if there is no more."""
        if not self._plan:
            return None
        moment, kind = self._plan[-1]
        return max(self._began + moment, self._settled[kind] + _SETTLED_SECONDS)

    def strike(self) -> Kill:
        """Make the next kill, and return when service is back from it, or has not come back.

        :raises StartupError: if there is none left to kill.
        """
        _, kind = self._plan.pop()
        before = children(self._server.pid, kind)
        if not before:
            raise StartupError(f"the server has no {kind} to kill; the last that it said: {self._server.said[-1]}")
        pid = random.choice(before)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        deadline = killed + PATIENCE
        while pid in group_members(self._server.pid):  # until it has ended it might answer
            time.sleep(0.001)
        back = self._increment(deadline) if kind == "manager" else self._replaced(set(before), deadline)
        now = time.monotonic()
        self._settled[kind] = now
        kill = Kill(victim=kind, pid=pid, moment=killed - self._began, recovery=now - killed if back else None)
        self.kills.append(kill)
        return kill

    def _replaced(self, before: set[int], deadline: float) -> bool:
        """Whether, in time, a worker that was not there before has answered: a page names the one that made it."""
        while time.monotonic() < deadline:
            client = Client(self._server.url)  # a new connection is anybody's to take
            with closing(client), suppress(OSError, http.client.HTTPException):
                _, page = client.request("GET", "/")
                new = {str(pid) for pid in children(self._server.pid, "worker") if pid not in before}
                if new & set(re.findall(r"\d+", str(page))):
                    return True
            time.sleep(0.01)
        return False
