"""Every error as a problem document (RFC 9457), with the outcome."""

import logging

import msgspec
from flask import Flask, Response, g, request
from msgspec import Struct
from werkzeug.exceptions import BadRequest, HTTPException

from ...errors import CounterServerError, InvalidRequest, KeyReused, LimitReached, Outcome, Unsupported

log = logging.getLogger(__name__)

_STATUS = {InvalidRequest: 400, LimitReached: 409, KeyReused: 422, Unsupported: 501}  # others: 503
_DETAIL: dict[Outcome, str] = {
    "not_applied": "the counters could not be reached or written; nothing was counted or changed, so try again",
    "unknown": "no answer came in time; it may be applied, once at most: ask again with the same Idempotency-Key",
}


def init_app(app: Flask) -> None:
    """Answer every error of `app` with a problem document."""
    app.before_request(_refuse_malformed_path)
    app.register_error_handler(CounterServerError, refuse)
    app.register_error_handler(HTTPException, _refuse_http)
    app.register_error_handler(Exception, _fail)


def _refuse_malformed_path() -> None:
    try:
        request.environ["PATH_INFO"].encode("latin-1").decode()
    except UnicodeDecodeError:
        raise BadRequest("the path is not valid UTF-8") from None


class Problem(Struct, frozen=True):
    """The body of an error; `outcome` says whether something may have been counted."""

    type: str
    title: str
    status: int
    detail: str
    outcome: Outcome


def problem(status: int, title: str, detail: str, outcome: Outcome) -> Response:
    g.outcome = outcome  # for the log
    body = msgspec.json.encode(Problem("about:blank", title, status, detail, outcome))
    response = Response(body, status, content_type="application/problem+json")
    if status == 503:
        response.headers["Retry-After"] = "1"  # second; a manager is back within two
    return response


def refuse(error: CounterServerError) -> Response:
    """Make the problem document of one of our errors. Messages for operators only go to the log."""
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
