"""What machines ask for: whether this process lives, whether the store is ready, and metrics."""

import logging
import threading
from contextlib import suppress
from types import ModuleType
from typing import cast

from flask import Blueprint, Flask, Response, current_app, request
from werkzeug.exceptions import NotImplemented as NotInstalled

from ... import errors
from ...errors import CounterServerError, StartupError
from ...extension import SharedState, state_of
from ...operations import SMALLEST, Get, Increment
from ...state import State
from .problems import problem

log = logging.getLogger(__name__)

shared = SharedState()  # of the current app
_PROBES = "counter_server.probes"  # in an app's extensions
LIVEZ = "/livez"  # our own server answers it in a thread of its own
_SECONDS = 1.0  # that a probe may take: a monitor asks again soon
# A write that changes nothing, as no number is below the smallest. A transactional store still writes the refusal,
# which answers the same batch if it comes again.
_WRITE = Increment("ready?", maximum=SMALLEST)
_READ = Get(_WRITE.name)

_REASONS: dict[type[CounterServerError], str] = {
    errors.StorageFull: "the store cannot write for now; reads continue, and writes are refused until it can",
    errors.DeadlineExceeded: f"the store has not answered within {_SECONDS:g} s; nothing that it holds is lost by that",
    errors.AccessDenied: "the store does not let this server in; its log says more",
}
_OTHER_REASON = "the store cannot be used; the server's log says why"


def check_metrics(app: Flask, needed_by: str) -> None:
    """Raise `StartupError` if the package that writes metrics is not installed, or their configuration is invalid."""
    _import_metrics(needed_by).patterns_of(app)


def _import_metrics(needed_by: str) -> ModuleType:
    try:
        from . import metrics
    except ImportError as error:
        raise StartupError(f"{needed_by} needs prometheus-client: pip install 'counter-server[server]'") from error
    return metrics


def probes_of(app: Flask) -> "_Readiness":
    """Return the current app's probes, whose state is their own: probes and other calls do not wait for each other."""
    if _PROBES not in app.extensions:
        is_in_memory = str(shared.state.store).startswith("memory:")  # then another state has other counters
        app.extensions.setdefault(_PROBES, _Readiness(shared.state if is_in_memory else state_of(app)))
    return cast(_Readiness, app.extensions[_PROBES])


def blueprint(*, writes: bool = True) -> Blueprint:
    """Make the three routes.

    :param writes: whether to find out if the store can be written to, which is a write that changes no counter.
    """
    health = Blueprint("health", __name__)

    @health.get(LIVEZ)
    def livez() -> Response:
        return Response("alive\n", mimetype="text/plain")

    @health.get("/readyz")
    def readyz() -> Response:
        failure = probes_of(current_app).failure(writes=writes)
        if failure is not None:
            return problem(503, "Not Ready", _REASONS.get(type(failure), _OTHER_REASON), "not_applied")
        return Response("ready\n", mimetype="text/plain")

    @health.get("/metrics")
    def metrics() -> Response:
        try:
            module = _import_metrics("this page")
            patterns = module.patterns_of(current_app)
        except StartupError as error:
            raise NotInstalled(str(error)) from None
        processes = current_app.config.get("COUNTER_SERVER_PROCESSES", list)()
        answer = module.page(
            probes_of(current_app).state, patterns, processes, _SECONDS, request.headers.get("Accept", "")
        )
        return cast(Response, answer)

    return health


class _Readiness:
    """Finds out whether the store answers, and can be written to. Probes at the same time do not pile up."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._failure: CounterServerError | None = None  # of the last probe
        self._trying = threading.Lock()  # held by the thread that finds out whether the failure has passed

    def failure(self, *, writes: bool) -> CounterServerError | None:
        """Return why the store is not ready, or None."""
        before = self._failure
        if before is not None and not self._trying.acquire(blocking=False):
            return before  # another thread waits for the store already
        try:
            self._probe(_WRITE if writes else _READ)
            self._failure = None
        except CounterServerError as error:
            if type(error) is not type(before):
                log.warning("not ready: %s", error)
            self._failure = error
            return error
        finally:
            if before is not None:
                self._trying.release()
        return None

    def _probe(self, operation: Increment | Get) -> None:
        with suppress(errors.LimitReached):
            try:
                self.state.submit(operation, within=_SECONDS)
            except errors.StateLost:  # raised once per client; the new epoch can be written to
                self.state.submit(operation, within=_SECONDS)
            except errors.Unsupported:
                self.state.submit(_READ, within=_SECONDS)
