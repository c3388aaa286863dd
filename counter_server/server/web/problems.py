"""Every error as a problem document (RFC 9457), with the outcome; in a browser as a page."""

import logging

import msgspec
from flask import Response, g, request
from flask.sansio.scaffold import Scaffold
from msgspec import Struct
from werkzeug.exceptions import HTTPException, default_exceptions

from ...errors import CounterServerError, InvalidRequest, KeyReused, LimitReached, Outcome, Unsupported
from .security import prefix_leads_here, wants_page
from .site import part, render_template

log = logging.getLogger(__name__)

_STATUS = {InvalidRequest: 400, LimitReached: 409, KeyReused: 422, Unsupported: 501}  # others: 503
_DETAIL: dict[Outcome, str] = {
    "not_applied": "the counters could not be reached or written; nothing was counted or changed, so try again",
    "unknown": "no answer came in time; the request may have been applied, once at most: send it again with the same"
    " Idempotency-Key",
}

_AGAIN = 3  # seconds until a browser asks again by itself


def protect(scaffold: Scaffold) -> None:
    """Answer every error of an app, or of a blueprint's routes, with a problem document or a page."""
    scaffold.register_error_handler(CounterServerError, refuse)
    scaffold.register_error_handler(HTTPException, _refuse_http)
    for code in default_exceptions:  # or an app's own handler of 404 comes first
        scaffold.register_error_handler(code, _refuse_http)
    scaffold.register_error_handler(Exception, _fail)


class Problem(Struct, frozen=True):
    """The body of an error; `outcome` says whether something may have been counted."""

    type: str
    title: str
    status: int
    detail: str
    outcome: Outcome


def problem(status: int, title: str, detail: str, outcome: Outcome) -> Response:
    g.outcome = outcome  # for the log
    found = Problem("about:blank", title, status, detail, outcome)
    response = _page(found) if wants_page() and not _is_for_programs() else None
    if response is None:
        response = Response(msgspec.json.encode(found), status, content_type="application/problem+json")
    if status == 503:
        response.headers["Retry-After"] = "1"  # second; a manager is back within two
    return response


def _is_for_programs() -> bool:
    """Return whether this is a request to the API, which answers browsers like anyone else."""
    return part() == "api" or f"{request.path}/".startswith("/api/")


def _page(found: Problem) -> Response | None:
    """Make the page of an error, or return None if that fails too."""
    # Under another server's name, or below a prefix that leads elsewhere, even our style sheet would be refused.
    has_links = found.status != 421 and prefix_leads_here(request.script_root)
    asks_again = found.status == 503 and request.method == "GET"
    try:
        text = render_template("error.html", problem=found, has_links=has_links, seconds=_AGAIN if asks_again else 0)
    except Exception:
        log.exception("the page of an error failed")
        return None
    return Response(text, found.status, {"Refresh": str(_AGAIN)} if asks_again else None)


def refuse(error: CounterServerError) -> Response:
    """Answer one of our errors. Messages for operators only go to the log."""
    status = _STATUS.get(type(error), 503)
    if status >= 500:
        log.warning("%s %s: %s (%s)", request.method, request.path, error, error.outcome)
    detail = _DETAIL[error.outcome] if status == 503 else str(error)  # a 503's message names directories and commands
    return problem(status, type(error).__name__, detail, error.outcome)


def _refuse_http(error: HTTPException) -> Response:
    original = error.get_response()
    if error.code is None or error.code < 400:  # a redirect is an HTTPException too
        return Response(original.get_data(), original.status, original.headers)
    response = problem(error.code, error.name, error.description or error.name, "not_applied")
    kept = ("Allow", "Location", "Retry-After", "WWW-Authenticate")
    response.headers.update({name: original.headers[name] for name in kept if name in original.headers})
    return response


def _fail(error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return problem(500, "Internal Server Error", "something failed here; the log says what", "unknown")
