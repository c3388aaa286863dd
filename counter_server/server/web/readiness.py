"""Whether the store can be written to, found out by doing so."""

import logging
import threading
from contextlib import suppress

from ...errors import (
    AccessDenied,
    CounterServerError,
    DeadlineExceeded,
    LimitReached,
    StateLost,
    StorageFull,
    Unsupported,
)
from ...operations import SMALLEST, Get, Increment
from ...state import State

log = logging.getLogger(__name__)

SECONDS = 1.0  # that a probe may take: who probes asks again soon
# A write that changes nothing: no result is below the smallest number, so this is always refused. But a transactional
# store commits the refusal, as the answer to be given again should the batch come again, and so it has to write.
_WRITE = Increment("ready?", maximum=SMALLEST)

_REASONS: dict[type[CounterServerError], str] = {
    StorageFull: "the store cannot write for now; reads go on, and writes are refused until it can",
    DeadlineExceeded: f"the store has not answered within {SECONDS:g} s; nothing of what it holds is lost by that",
    AccessDenied: "the store does not let this server in; its log says more",
}
_OTHER_REASON = "the store cannot be used as it is; the server's log says why"


class Readiness:
    """Probes of the store that are made at the same time share round trips, and do not pile up.

    :param state: one for nothing but this: a probe neither waits behind the application's calls nor holds them up.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._failure: CounterServerError | None = None  # of the last probe
        self._trying = threading.Lock()  # held by the one that finds out whether that has passed

    def reason_against(self) -> str | None:
        """Why the store is not ready, in words for anybody; None where it is."""
        failure = self._failure
        if failure is not None and not self._trying.acquire(blocking=False):
            return _explain(failure)  # somebody waits for it already: no thread more
        try:
            self._probe()
        except CounterServerError as error:
            if type(error) is not type(failure):
                log.warning("not ready: %s", error)
            self._failure = error
            return _explain(error)
        finally:
            if failure is not None:
                self._trying.release()
        self._failure = None
        return None

    def _probe(self) -> None:
        """Write to the store, or where no such write exists, read.

        :raises CounterServerError: where that cannot be done.
        """
        try:
            self._write()
        except StateLost:  # told once, to each client; what begins anew can be written to
            self._write()
        except Unsupported:
            self._state.submit(Get(_WRITE.name), within=SECONDS)

    def _write(self) -> None:
        with suppress(LimitReached):
            self._state.submit(_WRITE, within=SECONDS)


def _explain(failure: CounterServerError) -> str:
    return _REASONS.get(type(failure), _OTHER_REASON)
