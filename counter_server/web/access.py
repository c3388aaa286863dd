"""Who may what: everybody may read and count; operators may set and delete.

An operator is who has the server's token. A server without one that only this machine reaches trusts whoever asks; one
that others reach sets and deletes nothing.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from flask import Flask, current_app, redirect, request, url_for
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, Unauthorized
from werkzeug.wrappers import Response

from . import operators
from .hosts import is_loopback
from .origin import own_origin

__all__ = ["init_app", "is_loopback", "may_operate", "operators_only", "wants_page", "why_not", "wrong_token"]

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

_REALM: dict[str, str | None] = {"realm": "counter_server"}


def init_app(app: Flask) -> None:
    """Take the token, and give the templates `has_token`, `may_operate` and `why_not`.

    :raises StartupError: if the token cannot be one.
    """
    operators.init_app(app)
    app.context_processor(lambda: {"has_token": operators.has_token, "may_operate": may_operate, "why_not": why_not})


def may_operate() -> bool:
    """Whether who sent this request may set and delete."""
    if not operators.has_token():
        return is_loopback(current_app)
    given = operators.bearer()
    return operators.is_signed_in() if given is None else operators.is_token(given)


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
