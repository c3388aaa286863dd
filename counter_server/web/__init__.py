"""The web application: the seed's page, and a JSON API for the counters."""

import secrets
from collections.abc import Mapping
from typing import Any

from flask import Flask

from ..extension import SharedState
from . import api, dashboard, navigation, pages, problems

__all__ = ["create_app"]

_LARGEST_BODY = 16 * 1024  # bytes; the largest valid one has under 200


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The application.

    :param config: Flask configuration. All workers need the same ``SECRET_KEY``; without one it is random.
    """
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=secrets.token_bytes(32), MAX_CONTENT_LENGTH=_LARGEST_BODY, SESSION_COOKIE_SAMESITE="Lax"
    )
    app.config.update(config or {})
    app.url_map.merge_slashes = False  # "a//b" is a name of its own, not a way to write "a/b"
    shared = SharedState(app)
    problems.init_app(app)
    navigation.init_app(app)
    app.register_blueprint(api.blueprint(shared))
    app.register_blueprint(pages.blueprint(shared))
    app.register_blueprint(dashboard.blueprint(shared))
    return app
