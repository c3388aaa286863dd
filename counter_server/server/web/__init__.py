"""The web application: the seed's page, and a JSON API for the counters."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from flask import Flask

from ...errors import StartupError
from ...extension import SharedState, state_of
from . import (
    access,
    api,
    badge,
    dashboard,
    documentation,
    headers,
    health,
    hosts,
    lab,
    navigation,
    origin,
    pages,
    problems,
    rate_limit,
    request_log,
    sign_in,
    signing,
)
from .names import CounterNameConverter

__all__ = ["create_app"]

_LARGEST_BODY = 16 * 1024  # bytes; the largest valid one has under 200


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The application.

    :param config: Flask configuration; besides that of `SharedState`:

        - ``COUNTER_SERVER_HOST``: the address that the server is bound to; without it, one that others reach.
        - ``COUNTER_SERVER_TOKEN``: what operators sign in with, who set and delete; default the environment variable.
        - ``COUNTER_SERVER_ALLOWED_HOSTS``: names besides loopback's that the server goes by.
        - ``COUNTER_SERVER_TRUSTED_PROXIES``: how many proxies stand before it, whose X-Forwarded headers hold.
        - ``COUNTER_SERVER_BADGES``: the names of the counters whose badges count.
        - ``COUNTER_SERVER_RATE_LIMIT``: how often an address may ask, such as ``"100/minute"``; without it, at will.
        - ``COUNTER_SERVER_LAB``: whether the lab is on; without it, where only this machine can connect.
        - ``COUNTER_SERVER_REQUEST_LOG``: whether every request is logged.
        - ``SECRET_KEY``: signs cookies; without it, one that is kept in the data directory.
    :raises StartupError: if one of these cannot be, or the data directory cannot be had.
    """
    if find_spec("prometheus_client") is None:
        raise StartupError("the server needs prometheus-client: pip install 'counter-server[server]'")
    app = Flask(__name__)
    app.config.update(MAX_CONTENT_LENGTH=_LARGEST_BODY, SESSION_COOKIE_SAMESITE="Lax")
    app.config.update(config or {})
    app.url_map.merge_slashes = False  # "a//b" is a name of its own, not a way to write "a/b"
    app.url_map.converters["counter"] = CounterNameConverter
    shared = SharedState(app)
    signing.init_app(app)
    hosts.init_app(app)
    origin.init_app(app)
    access.init_app(app, shared)
    headers.init_app(app)
    problems.init_app(app)
    navigation.init_app(app)
    if app.config.setdefault("COUNTER_SERVER_REQUEST_LOG", False):
        request_log.init_app(app)
    rate_limit.init_app(app, shared)
    app.register_blueprint(api.blueprint(shared))
    app.register_blueprint(badge.blueprint(shared, app.config.setdefault("COUNTER_SERVER_BADGES", ())))
    app.register_blueprint(pages.blueprint(shared))
    app.register_blueprint(dashboard.blueprint(shared))
    app.register_blueprint(health.blueprint(state_of(app)))
    app.register_blueprint(sign_in.blueprint())
    app.register_blueprint(documentation.blueprint())
    lab.init_app(app, shared)
    return app
