"""What machines ask for: whether this process lives, whether the store is ready, and metrics."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import cast

from flask import Blueprint, Response, current_app, request

from ... import errors
from ...errors import CounterServerError, StartupError
from ...operations import SMALLEST, Get, Increment
from ...state import State
from ...status import FIGURES, Process, Status
from .problems import problem

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector
except ImportError as error:
    raise StartupError("the server needs prometheus-client: pip install 'counter-server[server]'") from error

log = logging.getLogger(__name__)

LIVEZ = "/livez"  # our own server answers it in a thread of its own
_SECONDS = 1.0  # that a probe may take: a monitor asks again soon
# A write that changes nothing, as no number is below the smallest. A transactional store still writes the refusal,
# which answers the same batch if it comes again.
_WRITE = Increment("ready?", maximum=SMALLEST)

_REASONS: dict[type[CounterServerError], str] = {
    errors.StorageFull: "the store cannot write for now; reads continue, and writes are refused until it can",
    errors.DeadlineExceeded: f"the store has not answered within {_SECONDS:g} s; nothing that it holds is lost by that",
    errors.AccessDenied: "the store does not let this server in; its log says more",
}
_OTHER_REASON = "the store cannot be used; the server's log says why"


def blueprint(state: State) -> Blueprint:
    """Make the three routes.

    :param state: a state of the application's store for probes only, so that probes and other calls do not wait for
        each other.
    """
    health = Blueprint("health", __name__)
    readiness = _Readiness(state)

    @health.get(LIVEZ)
    def livez() -> Response:
        return Response("alive\n", mimetype="text/plain")

    @health.get("/readyz")
    def readyz() -> Response:
        failure = readiness.failure()
        if failure is not None:
            return problem(503, "Not Ready", _REASONS.get(type(failure), _OTHER_REASON), "not_applied")
        return Response("ready\n", mimetype="text/plain")

    @health.get("/metrics")
    def metrics() -> Response:
        up, status = True, None
        try:
            status = state.status(within=_SECONDS)
            if status is None:  # the store has no figures, but does it answer?
                state.submit(Get("any"), within=_SECONDS)
        except CounterServerError as error:
            log.warning("no figures: %s", error)
            up = False
        families = list(_metrics(up, status, current_app.config.get("COUNTER_SERVER_PROCESSES", list)()))
        try:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        except TypeError:  # the header asks for a version that is not a number
            encode, content_type = choose_encoder("")
        # In no registry, which holds the metrics of one process.
        return Response(encode(cast(Collector, SimpleNamespace(collect=lambda: families))), content_type=content_type)

    return health


class _Readiness:
    """Finds out by a write whether the store can be written to. Probes at the same time do not pile up."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._failure: CounterServerError | None = None  # of the last probe
        self._trying = threading.Lock()  # held by the thread that finds out whether the failure has passed

    def failure(self) -> CounterServerError | None:
        """Return why the store is not ready, or None."""
        before = self._failure
        if before is not None and not self._trying.acquire(blocking=False):
            return before  # another thread waits for the store already
        try:
            self._probe()
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

    def _probe(self) -> None:
        with suppress(errors.LimitReached):
            try:
                self._state.submit(_WRITE, within=_SECONDS)
            except errors.StateLost:  # raised once per client; the new epoch can be written to
                self._state.submit(_WRITE, within=_SECONDS)
            except errors.Unsupported:
                self._state.submit(Get(_WRITE.name), within=_SECONDS)


def _metrics(up: bool, status: Status | None, processes: Sequence[Process]) -> Iterator[Metric]:  # noqa: FBT001
    """Describe the whole server, with names by https://prometheus.io/docs/practices/naming/."""
    yield GaugeMetricFamily("counter_server_up", "Whether the store answered.", up)
    if status is not None:
        epoch = {"durability": status.durability, "epoch": status.epoch}
        yield InfoMetricFamily("counter_server_manager", "The manager, and the epoch of its counters.", epoch)
        for name, figure in FIGURES.items():
            if figure.metric:
                kind = CounterMetricFamily if figure.grows else GaugeMetricFamily
                yield kind(f"counter_server_{figure.metric}", figure.help, getattr(status, name))
        slow = GaugeMetricFamily("counter_server_slow_call_seconds", "Seconds so far.", labels=["object", "method"])
        for call in status.slow_calls:
            slow.add_metric([call.object, call.method], call.seconds)
        yield slow
    if processes:
        up_now = GaugeMetricFamily("counter_server_process_up", "Whether the process runs.", labels=["process"])
        uptime = GaugeMetricFamily("counter_server_process_uptime_seconds", "Seconds of its life.", labels=["process"])
        restarts = CounterMetricFamily("counter_server_process_restarts", "Starts after the first.", labels=["process"])
        for process in processes:
            up_now.add_metric([process.name], process.pid is not None)
            uptime.add_metric([process.name], process.uptime)
            restarts.add_metric([process.name], process.restarts)
        yield from (up_now, uptime, restarts)
