"""What machines ask for: whether this process lives, whether the store is ready, and metrics."""

import logging
import threading
from collections.abc import Iterable
from contextlib import suppress

from flask import Blueprint, Response, current_app, request

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
from ...status import FIGURES, Process, Status
from .problems import problem

log = logging.getLogger(__name__)

LIVEZ = "/livez"  # our own server answers it in a thread of its own
_SECONDS = 1.0  # that a probe may take: a monitor asks again soon
# A write that changes nothing: no number is below the smallest, so the store refuses it. A transactional store still
# has to write the refusal, as the answer to the same batch if it comes again.
_WRITE = Increment("ready?", maximum=SMALLEST)

_REASONS: dict[type[CounterServerError], str] = {
    StorageFull: "the store cannot write for now; reads go on, and writes are refused until it can",
    DeadlineExceeded: f"the store has not answered within {_SECONDS:g} s; nothing of what it holds is lost by that",
    AccessDenied: "the store does not let this server in; its log says more",
}
_OTHER_REASON = "the store cannot be used as it is; the server's log says why"


def blueprint(state: State) -> Blueprint:
    """Make the three routes, for GET and HEAD.

    :param state: a state of the application's store for probes only: neither probes nor calls of the application wait
        for each other.
    """
    health = Blueprint("health", __name__)
    readiness = _Readiness(state)

    @health.get(LIVEZ)
    def livez() -> Response:
        return Response("alive\n", content_type="text/plain; charset=utf-8")

    @health.get("/readyz")
    def readyz() -> Response:
        reason = readiness.reason_against()
        if reason is not None:
            return problem(503, "Not Ready", reason, "not_applied")
        return Response("ready\n", content_type="text/plain; charset=utf-8")

    @health.get("/metrics")
    def metrics() -> Response:
        up, status = _ask(state)
        processes = current_app.config.get("COUNTER_SERVER_PROCESSES") or list
        text, content_type = _exposition(request.headers.get("Accept", ""), up=up, status=status, processes=processes())
        return Response(text, content_type=content_type)

    return health


class _Readiness:
    """Finds out by a write whether the store can be written to. Probes at the same time do not pile up."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._failure: CounterServerError | None = None  # of the last probe
        self._trying = threading.Lock()  # held by the thread that finds out whether the failure has passed

    def reason_against(self) -> str | None:
        """Return why the store is not ready, in words for the public; None if it is ready."""
        failure = self._failure
        if failure is not None and not self._trying.acquire(blocking=False):
            return _explain(failure)  # another thread waits for the store already
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
        try:
            self._write()
        except StateLost:  # raised once per client; the new epoch can be written to
            self._write()
        except Unsupported:
            self._state.submit(Get(_WRITE.name), within=_SECONDS)

    def _write(self) -> None:
        with suppress(LimitReached):
            self._state.submit(_WRITE, within=_SECONDS)


def _explain(failure: CounterServerError) -> str:
    return _REASONS.get(type(failure), _OTHER_REASON)


def _ask(state: State) -> tuple[bool, Status | None]:
    """Return whether the store answers, and its figures if it has any."""
    try:
        status = state.status(within=_SECONDS)
        if status is None:
            state.submit(Get("any"), within=_SECONDS)
    except CounterServerError as error:
        log.warning("no figures: %s", error)
        return False, None
    return True, status


def _exposition(accept: str, *, up: bool, status: Status | None, processes: list[Process]) -> tuple[bytes, str]:
    """Return the metrics as text, and its content type: OpenMetrics or Prometheus' own, as `accept` prefers.

    The names follow https://prometheus.io/docs/practices/naming/. The families are in no registry, as this describes
    the whole server, and a registry holds the metrics of one process.
    """
    # Imported at the first use: most workers never need it.
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

    def family(name: str, help_text: str, value: float | None = None, *labels: str, grows: bool = False) -> Metric:
        kind = CounterMetricFamily if grows else GaugeMetricFamily
        return kind(f"counter_server_{name}", help_text, value, labels or None)

    families = [family("up", "Whether the store answered.", up)]
    if status is not None:
        epoch = {"durability": status.durability, "epoch": status.epoch}
        families.append(InfoMetricFamily("counter_server_manager", "The manager, and the epoch of its counters.", epoch))
        for field, figure in FIGURES.items():
            if figure.metric:
                families.append(family(figure.metric, figure.help, getattr(status, field), grows=figure.grows))
        slow = family("slow_call_seconds", "Seconds that a running call has taken so far.", None, "object", "method")
        for call in status.slow_calls:
            slow.add_metric([call.object, call.method], call.seconds)
        families.append(slow)
    if processes:
        places = [
            family("process_up", "Whether a process fills this place.", None, "process"),
            family("process_uptime_seconds", "Seconds since that process was started.", None, "process"),
            family("process_restarts", "How often another process was started there.", None, "process", grows=True),
        ]
        for process in processes:
            for place, value in zip(places, (process.pid is not None, process.uptime, process.restarts), strict=True):
                place.add_metric([process.name], value)
        families += places

    class Families(Collector):
        def collect(self) -> Iterable[Metric]:
            return families

    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # the header asks for a version that is not a number
        encode, content_type = choose_encoder("")
    return encode(Families()), content_type
