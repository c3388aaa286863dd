"""The web application: pages for people, and a JSON API for the counters."""

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, g, request

from ...extension import SharedState, state_of
from . import api, badge, dashboard, health, lab, pages, problems, rate_limit, security

__all__ = ["create_app"]

log = logging.getLogger(f"{__name__}.request_log")

_LARGEST_BODY = 16 * 1024  # bytes; the largest valid body has under 200
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a proxy: it can neither break a line nor fill a disk


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the application.

    :param config: Flask configuration; see also `SharedState`.

        - ``COUNTER_SERVER_HOST``: the address that the server is bound to; by default one that other machines reach.
        - ``COUNTER_SERVER_TOKEN``: the token of operators, who may set and delete; by default from the environment.
        - ``TRUSTED_HOSTS``: names of this server besides the loopback names; ``".example.org"`` for all names in it.
        - ``COUNTER_SERVER_TRUSTED_PROXIES``: the number of proxies whose X-Forwarded headers are trusted.
        - ``COUNTER_SERVER_BADGES``: the names of counters whose badges may count.
        - ``COUNTER_SERVER_RATE_LIMIT``: a limit for each address, such as ``"100/minute"``; by default none.
        - ``COUNTER_SERVER_LAB``: whether the lab is on; by default if only this machine can connect.
        - ``COUNTER_SERVER_REQUEST_LOG``: whether to log every request.
        - ``SECRET_KEY``: signs cookies; by default a key that the data directory keeps.
    :raises StartupError: if the configuration is invalid, or the data directory cannot be used.
    """
    app = Flask(__name__)
    # A page that asks every second must not bring back the cookie of a session that was just signed out.
    app.config.update(SESSION_COOKIE_SAMESITE="Lax", SESSION_REFRESH_EACH_REQUEST=False)
    app.config.update(MAX_CONTENT_LENGTH=_LARGEST_BODY)
    app.config.update(config or {})
    app.url_map.merge_slashes = False  # "a//b" is a counter's name, not another spelling of "a/b"
    app.url_map.converters["counter"] = api.CounterNameConverter
    if app.config.setdefault("COUNTER_SERVER_REQUEST_LOG", False):
        app.before_request(_begin_request)  # the first, so that refused requests are logged too
        app.after_request(_log_request)
    shared = SharedState(app)
    security.init_app(app, shared)
    problems.init_app(app)
    rate_limit.init_app(app, shared)
    for blueprint in (api.api, api.documentation, dashboard.dashboard, security.sign_in):
        app.register_blueprint(blueprint)
    badge.init_app(app)
    pages.init_app(app, shared)
    app.register_blueprint(health.blueprint(state_of(app)))
    lab.init_app(app, shared)
    return app


def _begin_request() -> None:
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    g.request_began = time.monotonic()


def _log_request(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    fields = {
        "method": request.method,
        "path": request.path,
        "status": response.status_code,
        "request_id": g.request_id,
        "client": request.remote_addr,
        "seconds": round(time.monotonic() - g.request_began, 6),
        "outcome": g.get("outcome", "answered"),
    }
    log.info("%(method)s %(path)s %(status)s", fields, extra=fields)
    return response
