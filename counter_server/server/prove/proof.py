"""One proof from its first increment to its verdict: load, kills, and the check of every answer."""

import http.client
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...errors import StartupError
from ...history import Operation
from ...manager.directory import DataDirectory
from ...manager.starter import python_command
from ..guard import Guarded, guarded
from ..progress import Progress
from ..supervisor import STABLE_SECONDS
from .load import PATIENCE, Client, Load, described, path_of, value_in
from .verdict import Kill, Verdict, judge

_BOOT_SECONDS = 60.0
_GRACE = 10.0  # seconds in which open increments may be answered when the load has ended
_ASKED_AGAIN = 100  # keys, at most
_TICK = 0.05  # seconds
_DATA = "data"  # the directory of the manager, among the files of the server
# The supervisor counts the death of a younger process as part of a crash loop, and replaces it later.
_SETTLED_SECONDS = STABLE_SECONDS + 0.2


def group_members(group: int) -> list[int]:
    """Return the processes of a process group that are not zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


@contextmanager
def own_server() -> Iterator[tuple[Guarded, str]]:
    """Run `counter-server run` as its users do, on a free port and a new data directory, and yield its URL too.

    :raises StartupError: if it does not start.
    """
    with guarded(python_command("counter_server", "run", "--port", "0", "--data-dir", _DATA)) as server:
        try:
            url = server.expect("Serving on ", _BOOT_SECONDS)
        except StartupError as error:
            raise StartupError(f"the server did not start: {error}") from error
        yield server, url


@dataclass
class Proof:
    """One proof, on a running server."""

    url: str
    clients: int
    seconds: float  # of load
    show: Progress
    server: Guarded | None  # if it was started for this proof
    kills: dict[str, int]  # how many of "manager" and "worker", of that server

    def __post_init__(self) -> None:
        self._client = Client(self.url)
        self._counter = f"prove-{os.urandom(6).hex()}"
        self._history: list[Operation] = []  # of this client; the load has its own
        self._killed: list[Kill] = []
        self._plan = sorted((random.uniform(0, self.seconds), kind) for kind, n in self.kills.items() for _ in range(n))
        self._settled = dict.fromkeys(self.kills, 0.0)  # when the last victim of each kind was replaced

    def run(self) -> tuple[Verdict, list[Operation]]:
        """Prove, and return the history too. Ctrl-C ends the load early; a second one ends everything.

        :raises StartupError: if the server cannot be reached, or does not count.
        """
        with closing(self._client):
            self._increment_first()
            early = False
            seen: list[str] = []
            load = Load(self.url, self._counter, self.clients)
            try:
                self.show.say(f"{self.clients} clients increment {self._counter} on {self.url} for {self.seconds:g} s")
                self._wait_and_kill(load)
            except KeyboardInterrupt:
                early = True
                self.show.say("Stopped early: the history until now will be checked")
            except StartupError as error:
                seen.append(str(error))
            load.stop(self._grace())
            seconds = time.monotonic() - load.began
            seen += dict.fromkeys(str(error) or repr(error) for error in load.failures)  # each once
            in_load = load.operations()
            history = self._asked_again([*self._history, *in_load])
            verdict = msgspec.structs.replace(
                judge(history, self._read_final_value(seen), self._killed, seen),
                url=self.url,
                counter=self._counter,
                clients=self.clients,
                seconds=seconds,
                per_second=len([operation for operation in in_load if operation.answers]) / seconds,
                stopped_early=early,
                stays=None if self.server else self._delete_or_say_why_not(),
            )
            return verdict, history

    def _increment_first(self) -> None:
        key = f"{self._counter}-first"
        invoked = time.monotonic()
        try:
            value = self._client.increment_once(self._counter, key)
        except http.client.HTTPException as error:
            raise StartupError(f"{self.url} is not a web server: {error!r}") from error
        except OSError as error:
            reason = error.strerror or error
            raise StartupError(f"no server can be reached at {self.url}: {reason}; is it running there?") from error
        except StartupError as error:
            raise StartupError(f"{self.url} is not a counter-server: {error}") from error
        answer = () if value is None else (value,)
        self._history.append(Operation(key, invoked, time.monotonic() if answer else None, answer))

    def _wait_and_kill(self, load: Load) -> None:
        while not load.failures:
            now = time.monotonic()
            elapsed = now - load.began
            self.show.show(elapsed, f"{elapsed:.1f} s: {len(load.history):,} increments answered")
            if self._plan:
                moment, victim = self._plan[0]
                if elapsed >= moment and now >= max(load.began, self._settled[victim]) + _SETTLED_SECONDS:
                    del self._plan[0]
                    if not self._kill_and_wait(victim, load.began):
                        return
            elif elapsed >= self.seconds:
                return
            if self.server and not self.server.running:
                raise StartupError(f"the server ended; its last line: {self.server.last_line}")
            time.sleep(_TICK)

    def _kill_and_wait(self, victim: str, began: float) -> bool:
        assert self.server
        before = self._victims(victim)
        if not before:
            raise StartupError(f"the server has no {victim} to kill; its last line: {self.server.last_line}")
        pid = random.choice(before)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        deadline = killed + PATIENCE
        while pid in group_members(self.server.pid):  # until it has ended it may answer
            time.sleep(0.001)
        if victim == "manager":
            key = f"{self._counter}-{len(self._history)}"
            self._history.append(operation := self._client.increment(self._counter, key, deadline))
            back = bool(operation.answers)
        else:
            back = self._replaced(before, deadline)
        self._settled[victim] = time.monotonic()
        recovery = self._settled[victim] - killed if back else None
        self._killed.append(Kill(victim=victim, pid=pid, moment=killed - began, recovery=recovery))
        result = "not back" if recovery is None else f"back after {recovery:.2f} s"
        self.show.say(f"{killed - began:.1f} s: kill -9 of the {victim} (pid {pid}): {result}")
        return back

    def _victims(self, kind: str) -> list[int]:
        assert self.server
        manager = DataDirectory(self.server.directory / _DATA).manager_pid()
        if kind == "manager":
            return [manager] if manager else []
        return [pid for pid in group_members(self.server.pid) if pid not in (self.server.pid, manager)]

    def _replaced(self, before: list[int], deadline: float) -> bool:
        """Wait until a new worker has answered: the home page contains the process id of its worker."""

        def answered() -> int | None:
            with closing(Client(self.url)) as client:  # any worker may accept a new connection
                numbers = set(map(int, re.findall(r"\d+", str(client.request("GET", "/")[1]))))
            return next((pid for pid in self._victims("worker") if pid in numbers and pid not in before), None)

        return self._client.retry(answered, deadline, longest_pause=0.01) is not None

    def _asked_again(self, history: list[Operation]) -> list[Operation]:
        """Send a sample of the answered increments again: the answers must be the same."""
        answered = [index for index, operation in enumerate(history) if operation.answers]
        deadline = time.monotonic() + self._grace()
        for index in random.sample(answered, min(_ASKED_AGAIN, len(answered))):
            again = self._client.increment(self._counter, history[index].key, deadline)
            history[index] = msgspec.structs.replace(history[index], answers=history[index].answers + again.answers)
        return history

    def _grace(self) -> float:
        """Return the seconds that an answer may still take: none if the server has ended."""
        return _GRACE if self.server is None or self.server.running else 0.0

    def _read_final_value(self, seen: list[str]) -> int | None:
        reason = "no answer"

        def read() -> int | None:
            nonlocal reason
            status, content = self._client.request("GET", path_of(self._counter))
            reason = f"answered {described(status, content)}"
            return 0 if status == 404 else value_in(status, content)

        final = self._client.retry(read, time.monotonic() + self._grace())
        if final is None:
            seen.append(f"the counter could not be read in the end: {reason}")
        return final

    def _delete_or_say_why_not(self) -> str | None:
        token = os.environ.get("COUNTER_SERVER_TOKEN")
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        with suppress(OSError, http.client.HTTPException):
            status, content = self._client.request("DELETE", path_of(self._counter), **authorization)
            return None if status in (200, 204, 404) else f"deleting it was answered {described(status, content)}"
        return "the server could not be reached to delete it"
