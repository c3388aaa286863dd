"""Who may what: everybody may read and count; operators may set and delete.

An operator is who has the server's token. A server without one that only this machine reaches trusts whoever asks; one
that others reach sets and deletes nothing.
"""

import logging
import threading
from collections.abc import Callable
from functools import wraps
from math import ceil
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from flask import Flask, current_app, redirect, request, url_for
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, TooManyRequests, Unauthorized
from werkzeug.wrappers import Response

from ...errors import NotHosted, Unsupported
from ...extension import SharedState
from ...state import forgetful
from ...windows import Attempts
from . import operators
from .hosts import is_loopback
from .origin import own_origin
from .rate_limit import client

__all__ = [
    "init_app",
    "is_loopback",
    "is_right_token",
    "may_operate",
    "operators_only",
    "wants_page",
    "why_not",
    "wrong_token",
]

log = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

_REALM: dict[str, str | None] = {"realm": "counter_server"}
_ATTEMPTS = "counter_server.wrong_tokens"  # in an app's `extensions`
_VERDICT = "counter_server.right_token"  # in a request's environment


class _Attempts:
    """Counts wrong tokens: in the manager for all workers, else in each process."""

    def __init__(self, shared: SharedState) -> None:
        self._own = Attempts()
        self._lock = threading.Lock()  # of the process's own
        self._shared: Attempts | None = None
        try:
            self._shared = forgetful(shared.object("wrong tokens", Attempts))
        except Unsupported as error:
            log.info("wrong tokens are counted in each process: %s", error)

    def note(self, address: str, *, right: bool) -> float:
        """See `Attempts.note`."""
        if self._shared is not None:
            try:
                return self._shared.note(address, right)
            except NotHosted as error:
                log.warning("wrong tokens are counted in each process: %s", error)
        with self._lock:
            return self._own.note(address, right)


def init_app(app: Flask, shared: SharedState) -> None:
    """Take the token, and give the templates `has_token`, `may_operate` and `why_not`.

    :raises StartupError: if the token cannot be one.
    """
    operators.init_app(app)
    if operators.configured(app):
        app.extensions[_ATTEMPTS] = _Attempts(shared)
    app.context_processor(lambda: {"has_token": operators.has_token, "may_operate": may_operate, "why_not": why_not})


def may_operate() -> bool:
    """Whether who sent this request may set and delete."""
    if not operators.has_token():
        return is_loopback(current_app)
    given = operators.bearer()
    if given is None:
        return operators.is_signed_in()
    if _VERDICT not in request.environ:  # a request is one attempt, however often it is asked about
        request.environ[_VERDICT] = False  # also where the attempt is refused
        request.environ[_VERDICT] = is_right_token(given)
    return bool(request.environ[_VERDICT])


def is_right_token(given: str) -> bool:
    """Return whether that is the server's token. Wrong ones are limited, for each address and over all.

    :raises TooManyRequests: if there were too many wrong ones, whether this one is right or not.
    """
    right = operators.is_token(given)
    attempts: _Attempts = current_app.extensions[_ATTEMPTS]
    if seconds := ceil(attempts.note(client(), right=right)):
        raise TooManyRequests(f"too many wrong tokens: try again in {seconds} s", retry_after=seconds)
    return right


def why_not() -> str:
    """Why who sent this request may not set and delete, and what to do; empty, if that is not so."""
    if may_operate():
        return ""
    if operators.has_token():
        return "set and delete are for operators: sign in, or send the server's token as Authorization: Bearer"
    return (
        "set and delete are off: others than this machine may reach this server, and it has no token;"
        " start it with a token in the environment variable COUNTER_SERVER_TOKEN, or bound to 127.0.0.1"
    )


def operators_only(view: Callable[Parameters, Answer]) -> Callable[Parameters, Answer | Response]:
    """Have a view answer operators only: others get a problem document, or in a browser the form to sign in."""

    @wraps(view)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer | Response:
        if may_operate():
            return view(*args, **kwargs)
        if not operators.has_token():
            raise Forbidden(why_not())
        if operators.bearer() is not None:
            raise wrong_token()
        if wants_page():
            return redirect(url_for("sign_in.page", next=_way_back()), 303)
        raise Unauthorized(why_not(), www_authenticate=WWWAuthenticate("bearer", _REALM.copy()))

    return guarded


def wrong_token() -> Unauthorized:
    """The error of one who gave a token that is not this server's."""
    challenge = WWWAuthenticate("bearer", {**_REALM, "error": "invalid_token"})
    return Unauthorized("that is not this server's token", www_authenticate=challenge)


def wants_page() -> bool:
    """Whether the answer is for a person in a browser, who asks for HTML by name."""
    return request.accept_mimetypes.best_match(["application/problem+json", "text/html"]) == "text/html"


def _way_back() -> str | None:
    """The path of the page that the browser is to show, or of the one that it shows, with a form on it."""
    if request.method == "GET":
        query = quote(request.query_string, safe="&=+%/")
        return quote(request.script_root + request.path) + (f"?{query}" if query else "")
    path = (request.referrer or "").removeprefix(own_origin())
    return path if path.startswith("/") else None
