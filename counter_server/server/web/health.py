"""What machines ask: whether this process lives, whether the store is ready, and for the figures."""

import logging

from flask import Blueprint, Response, current_app, request

from ...errors import CounterServerError
from ...operations import Get
from ...state import State
from ...status import Process, Status
from .described import Answer, described
from .problems import problem
from .readiness import SECONDS, Readiness

log = logging.getLogger(__name__)

LIVEZ = "/livez"  # our own server answers it in a thread of its own


def blueprint(state: State) -> Blueprint:
    """The three routes, for GET and HEAD.

    :param state: of the application's store, for nothing but this: what probes ask neither waits behind the
        application's calls nor holds them up.
    """
    health = Blueprint("health", __name__)
    readiness = Readiness(state)

    @health.get(LIVEZ)
    @described("Is this process alive?", answers={200: Answer("It is", "alive\n", "text/plain")}, stored=False)
    def livez() -> Response:
        """This process answers. No store is asked: to start a process again would not mend one."""
        return Response("alive\n", content_type="text/plain; charset=utf-8")

    @health.get("/readyz")
    @described("Is the store ready?", answers={200: Answer("It can be written to", "ready\n", "text/plain")})
    def readyz() -> Response:
        """The store can be written to; or why not."""
        reason = readiness.reason_against()
        if reason is not None:
            return problem(503, "Not Ready", reason, "not_applied")
        return Response("ready\n", content_type="text/plain; charset=utf-8")

    @health.get("/metrics")
    @described(
        "The figures", answers={200: Answer("For Prometheus", "counter_server_up 1.0\n", "text/plain")}, stored=False
    )
    def metrics() -> Response:
        """The manager's figures, and the supervisor's, for Prometheus: the same ones from every worker."""
        from .metrics import exposition  # when it is asked for: not every worker needs all that this imports

        up, status = _ask(state)
        body, content_type = exposition(request.headers.get("Accept", ""), up=up, status=status, processes=_processes())
        return Response(body, content_type=content_type)

    return health


def _ask(state: State) -> tuple[bool, Status | None]:
    """Whether the store answers, and with which figures; None from one that has none to tell."""
    try:
        status = state.status(within=SECONDS)
        if status is None:
            state.submit(Get("any"), within=SECONDS)
    except CounterServerError as error:
        log.warning("no figures: %s", error)
        return False, None
    return True, status


def _processes() -> list[Process]:
    """The supervisor's children; none under another launcher."""
    processes = current_app.config.get("COUNTER_SERVER_PROCESSES")
    return processes() if processes is not None else []
