"""One proof from its first increment to its verdict."""

import http.client
import os
import random
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from ...errors import StartupError
from .faults import Faults, OwnServer, own_server
from .history import Operation
from .load import Client, Load, described, path_of
from .verdict import Verdict, judge

_GRACE = 10.0  # seconds in which open increments may still be answered when the load ends
_ASKED_AGAIN = 100  # keys, at most
_TICK = 0.05  # seconds


class Audience(Protocol):
    """Who is told how it goes."""

    def tell(self, line: str) -> None:
        """Say what happened."""

    def show(self, elapsed: float, answered: int) -> None:
        """Say how far it is; called often."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a proof is to do."""

    clients: int
    seconds: float
    url: str | None = None  # of a server that runs; none: one of its own
    kills: dict[str, int] | None = None  # of "manager" and "worker", for a server of its own
    token: str | None = None  # which lets it delete its counter on another's server


def prove(plan: Plan, audience: Audience) -> tuple[Verdict, list[Operation]]:
    """Do as planned. Ctrl-C ends the load early; a second one ends everything.

    :raises StartupError: if there is no server to be had, or it does not count.
    """
    if plan.url is not None:
        return _Proof(plan, plan.url, None, audience).run()
    audience.tell("Starting a server")
    with own_server() as server:
        return _Proof(plan, server.url, server, audience).run()


class _Proof:
    def __init__(self, plan: Plan, url: str, server: OwnServer | None, audience: Audience) -> None:
        self._plan = plan
        self._url = url
        self._server = server
        self._audience = audience
        self._counter = f"prove-{os.urandom(6).hex()}"
        self._client = Client(url)
        self._history: list[Operation] = []  # of this client; the load has its own

    def run(self) -> tuple[Verdict, list[Operation]]:
        with closing(self._client):
            self._begin()
            early = False
            seen: list[str] = []
            clients, planned = self._plan.clients, self._plan.seconds
            load = Load(self._url, self._counter, clients)
            faults = self._faults()
            try:
                self._audience.tell(f"{clients} clients increment {self._counter} on {self._url} for {planned:g} s")
                self._watch(load, faults)
            except KeyboardInterrupt:
                early = True
                self._audience.tell("Stopped early: what there is will be checked")
            except StartupError as error:
                seen.append(str(error))
            load.stop(self._grace())
            seconds = time.monotonic() - load.began
            seen += dict.fromkeys(str(error) or repr(error) for error in load.failures)  # each once
            in_load = load.operations()
            history = self._asked_again([*self._history, *in_load])
            final = self._final(seen)
            verdict = judge(history, final, faults.kills if faults else (), seen)
            verdict = msgspec.structs.replace(
                verdict,
                url=self._url,
                counter=self._counter,
                clients=clients,
                seconds=seconds,
                per_second=sum(1 for operation in in_load if operation.answers) / seconds,
                stopped_early=early,
                stays=None if self._server else self._delete(),
            )
            return verdict, history

    def _begin(self) -> None:
        """Make the first increment, which shows whether this is a server that counts."""
        key = f"{self._counter}-first"
        invoked = time.monotonic()
        try:
            value = self._client.increment_once(self._counter, key)
        except http.client.HTTPException as error:
            raise StartupError(f"what answers at {self._url} is no web server: {error!r}") from error
        except OSError as error:
            reason = error.strerror or error
            raise StartupError(f"no server can be reached at {self._url}: {reason}; is it running there?") from error
        except StartupError as error:
            raise StartupError(f"{self._url} is no server that counts: {error}") from error
        if value is None:  # not now, it says: the load will ask until it is answered
            self._history.append(Operation(key, invoked))
        else:
            self._history.append(Operation(key, invoked, time.monotonic(), (value,)))

    def _faults(self) -> Faults | None:
        if self._server is None:
            return None
        return Faults(self._server, self._plan.kills or {}, self._plan.seconds, self._increment)

    def _increment(self, deadline: float) -> bool:
        key = f"{self._counter}-{len(self._history)}"
        self._history.append(operation := self._client.increment(self._counter, key, deadline))
        return bool(operation.answers)

    def _watch(self, load: Load, faults: Faults | None) -> None:
        """Let the load go on for its time, and until the last kill was survived."""
        while not load.failures:
            elapsed = time.monotonic() - load.began
            self._audience.show(elapsed, len(load.history))
            due = faults.due() if faults else None
            if faults and due is not None and time.monotonic() >= due:
                kill = faults.strike()
                back = "not back" if kill.recovery is None else f"back after {kill.recovery:.2f} s"
                self._audience.tell(f"{kill.moment:.1f} s: kill -9 of the {kill.victim} (pid {kill.pid}): {back}")
                if kill.recovery is None:
                    return
                continue
            if due is None and elapsed >= self._plan.seconds:
                return
            if self._server and not self._server.running:
                raise StartupError(f"the server ended; the last that it said: {self._server.said[-1]}")
            time.sleep(_TICK)

    def _asked_again(self, history: list[Operation]) -> list[Operation]:
        """The history, with a sample of what was answered asked for again: the answers must be the same."""
        answered = [index for index, operation in enumerate(history) if operation.answers]
        deadline = time.monotonic() + self._grace()
        for index in random.sample(answered, min(_ASKED_AGAIN, len(answered))):
            operation = history[index]
            again = self._client.increment(self._counter, operation.key, deadline)
            history[index] = replace(operation, answers=operation.answers + again.answers)
        return history

    def _grace(self) -> float:
        """The seconds that an answer may still take: none, if nobody is there to give it."""
        return _GRACE if self._server is None or self._server.running else 0.0

    def _final(self, seen: list[str]) -> int | None:
        """What the counter came to; none, with a reason in `seen`, if that cannot be read."""
        deadline = time.monotonic() + self._grace()
        while True:
            try:
                status, content = self._client.request("GET", path_of(self._counter))
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            else:
                if status == 200 and isinstance(content, dict) and type(value := content.get("value")) is int:
                    return value
                if status == 404:
                    return 0
                reason = f"answered {described(status, content)}"
            if time.monotonic() > deadline:
                seen.append(f"the counter could not be read in the end: {reason}")
                return None
            time.sleep(_TICK)

    def _delete(self) -> str | None:
        """Remove the counter from another's server, or say why it stays."""
        authorization = {"Authorization": f"Bearer {self._plan.token}"} if self._plan.token else {}
        with suppress(OSError, http.client.HTTPException):
            status, content = self._client.request("DELETE", path_of(self._counter), **authorization)
            return None if status in (200, 204, 404) else f"deleting it was answered {described(status, content)}"
        return "the server could not be reached to delete it"
