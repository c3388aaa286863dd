"""The web application: pages for people, and a JSON API for the counters."""

import logging
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from flask import Flask, Response, g, redirect, request
from werkzeug.exceptions import ServiceUnavailable
from werkzeug.wrappers import Response as AnyResponse

from ...extension import SharedState
from ...manager.client import StateProxy
from . import api, badge, dashboard, health, lab, pages, problems, rate_limit, security
from .site import Site

__all__ = ["blueprint", "create_app", "create_dashboard"]

log = logging.getLogger(f"{__name__}.request_log")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a proxy: it can neither break a line nor fill a disk
_NO_MANAGER = "no manager is running: the app starts one at its next use"


def blueprint(allow: Callable[[], bool] | None = None) -> Site:
    """Make the blueprint for another app; see `SharedState.blueprint`."""
    site = Site(allow=allow, is_closed=True, url_prefix="/-/counters")
    problems.protect(site)
    security.close(site)
    _fill(site)
    site.add_url_rule("/", "root", _go_to_counters)
    return site


def _fill(site: Site, *, probe_writes: bool = True) -> None:
    """Add the parts that every site has."""
    for part in (api.api, api.documentation, dashboard.dashboard, security.sign_in):
        site.register_blueprint(part)
    site.register_blueprint(health.blueprint(writes=probe_writes))


def _go_to_counters() -> AnyResponse:
    return redirect("counters")  # beside this page, wherever that is


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the application.

    :param config: Flask configuration; see also `SharedState`.

        - ``COUNTER_SERVER_HOST``: the address that the server is bound to; by default one that other machines reach.
        - ``COUNTER_SERVER_TOKEN``: the token of operators, who may set and delete; by default from the environment.
        - ``TRUSTED_HOSTS``: names of this server besides the loopback names; ``".example.org"`` for all names in it.
        - ``COUNTER_SERVER_TRUSTED_PROXIES``: the number of proxies whose X-Forwarded headers are trusted.
        - ``COUNTER_SERVER_BADGES``: the names of counters whose badges may count.
        - ``COUNTER_SERVER_METRICS_COUNTERS``: patterns of the counters in `/metrics`, such as ``["orders.*"]``.
        - ``COUNTER_SERVER_RATE_LIMIT``: a limit for each address, such as ``"100/minute"``; by default none.
        - ``COUNTER_SERVER_LAB``: whether the lab is on; by default if only this machine can connect.
        - ``COUNTER_SERVER_REQUEST_LOG``: whether to log every request.
        - ``SECRET_KEY``: signs cookies; by default a key that the data directory keeps.
    :raises StartupError: if the configuration is invalid, or the data directory cannot be used.
    """
    app = _make_app(config or {})
    health.check_metrics(app, "the server")
    shared = SharedState(app)
    site = Site()
    if app.config["COUNTER_SERVER_TOKEN"]:
        security.count_together(site, shared)
    if not app.config["SECRET_KEY"]:
        store, data_dir = app.config["COUNTER_SERVER_STORE"], app.config["COUNTER_SERVER_DATA_DIR"]
        app.config["SECRET_KEY"] = security.signing_key(store, data_dir)
    rate_limit.init_app(app, shared)
    _fill(site)
    badge.init_app(app, site)
    pages.init_app(app, site, shared)
    lab.init_app(app, site, shared)
    app.register_blueprint(site)
    return app


def create_dashboard(config: Mapping[str, Any]) -> Flask:
    """Make the application that only looks at a store: it declares, counts and starts nothing.

    :param config: as for `create_app`.
    :raises StartupError: if the configuration is invalid.
    """
    app = _make_app({"COUNTER_SERVER_START": False, "SECRET_KEY": secrets.token_bytes(32), **config})
    health.check_metrics(app, "the dashboard")
    shared = SharedState(app)
    site = Site(keeps_sign_outs=False)
    _fill(site, probe_writes=False)
    site.add_url_rule("/", "root", _go_to_counters)
    app.register_blueprint(site)
    with app.app_context():
        store = shared.state.store
    if isinstance(store, StateProxy):
        directory = store.directory

        @app.before_request
        def say_that_there_is_no_manager() -> str | None:
            _, _, endpoint = (request.endpoint or "").partition(".")
            asks_it = endpoint.startswith(("api.", "dashboard.")) or endpoint == "health.readyz"
            if not asks_it or not directory.has_no_manager():
                return None
            if endpoint in ("dashboard.page", "dashboard.detail"):
                return dashboard.waiting(_NO_MANAGER)
            raise ServiceUnavailable(_NO_MANAGER)

        @app.teardown_request
        def disconnect(_error: BaseException | None) -> None:
            """Do not keep a manager that nobody else uses, nor one that ends in order and waits for its clients."""
            for state in (shared.state, health.probes_of(app).state):
                state.close()

    return app


def _make_app(config: Mapping[str, Any]) -> Flask:
    app = Flask(__name__, static_folder=None, template_folder=None)
    # A page that asks every second must not bring back the cookie of a session that was just deleted.
    app.config.update(SESSION_COOKIE_SAMESITE="Lax", SESSION_REFRESH_EACH_REQUEST=False)
    app.config.update(config)
    app.url_map.merge_slashes = False  # a path has one spelling
    if app.config.setdefault("COUNTER_SERVER_REQUEST_LOG", False):
        app.before_request(_begin_request)  # the first, so that refused requests are logged too
        app.after_request(_log_request)
    security.protect_app(app)
    problems.protect(app)
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
