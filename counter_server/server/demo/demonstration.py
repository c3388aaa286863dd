"""The demonstration: each pair on its stage, and what came back."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...errors import StartupError
from .clients import visit_at_once
from .outcome import Outcome, Round
from .plan import Pair
from .servers import SERVERS
from .stage import Stage, close, listen
from .strategies import STRATEGIES

_BOOT_SECONDS = 30.0
_PROBES = 16  # requests at once, to see all processes of a server

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """How it is done.

    :param clients: that ask at once.
    :param rounds: for each pair, each with a server of its own.
    :param port: of all the servers; 0: free ones.
    """

    clients: int = 100
    rounds: int = 1
    port: int = 0

    def run(self, pairs: list[Pair], tell: Tell) -> Iterator[Outcome]:
        """The outcome of each pair, as it comes.

        :param tell: is told what happens, in a few words.
        :raises StartupError: if the port cannot be had.
        """
        close(listen(self.port))
        for pair in pairs:
            yield self._outcome(pair, tell)

    def _outcome(self, pair: Pair, tell: Tell) -> Outcome:
        if missing := pair.missing():
            return Outcome(pair, left_out=missing)
        rounds = []
        for _ in range(self.rounds):
            try:
                rounds.append(self._round(pair, tell))
            except StartupError as error:
                return Outcome(pair, rounds, left_out=f"it could not be shown: {error}")
        return Outcome(pair, rounds)

    def _round(self, pair: Pair, tell: Tell) -> Round:
        tell(f"starting: {pair.title}")
        with Stage(pair.server, pair.strategy, port=self.port) as stage:
            _await_processes(stage, SERVERS[pair.server].processes)
            kill = STRATEGIES[pair.strategy].killed
            killed_after: int | None = None

            def told(answered: int) -> None:
                nonlocal killed_after
                if kill and killed_after is None and answered >= self.clients // 4 and (manager := stage.manager()):
                    os.kill(manager, signal.SIGKILL)
                    killed_after = answered
                    tell(f"killed after {answered} answers: {pair.title}")

            tell(f"{self.clients} clients: {pair.title}")
            answers = visit_at_once(stage.port, self.clients, told=told)
        if kill and killed_after is None:
            raise StartupError("there was no manager to be killed")
        return Round(answers, killed_after)


def _await_processes(stage: Stage, count: int) -> None:
    """Return when so many processes of the server have answered.

    :raises StartupError: if they do not.
    """
    seen: set[int] = set()
    deadline = time.monotonic() + _BOOT_SECONDS
    while len(seen) < count:
        stage.check()
        if time.monotonic() > deadline:
            raise StartupError(f"{len(seen)} of {count} processes answered in {_BOOT_SECONDS:g} seconds")
        seen |= {
            answer.number
            for answer in visit_at_once(stage.port, 1 if count == 1 else _PROBES, "/ready", patience=1)
            if answer.number is not None
        }
