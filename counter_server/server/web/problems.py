"""Every error as a problem document (RFC 9457), with the outcome."""

import logging

import msgspec
from flask import Flask, Response, g, request
from msgspec import Struct
from werkzeug.exceptions import BadRequest, HTTPException

from ...errors import (
    AccessDenied,
    CounterServerError,
    DeadlineExceeded,
    InvalidRequest,
    KeyReused,
    LimitReached,
    NotHosted,
    Outcome,
    OutcomeUnknown,
    StartupError,
    StateLost,
    StorageFull,
    Unsupported,
)

log = logging.getLogger(__name__)

_RETRY_AFTER = "1"  # second; a manager is back within two

_STATUS: dict[type[CounterServerError], int] = {
    InvalidRequest: 400,
    LimitReached: 409,
    KeyReused: 422,
    Unsupported: 501,
    AccessDenied: 503,
    StartupError: 503,
    DeadlineExceeded: 503,
    OutcomeUnknown: 503,
    StateLost: 503,
    NotHosted: 503,
    StorageFull: 503,
}

_DETAIL: dict[Outcome, str] = {
    "not_applied": "the counters could not be reached or written; nothing was counted or changed, so try again",
    "unknown": "no answer came in time; it may be applied, once at most: ask again with the same Idempotency-Key",
}


def init_app(app: Flask) -> None:
    app.before_request(_refuse_what_is_no_text)
    app.after_request(_never_cached)
    app.register_error_handler(CounterServerError, refuse)
    app.register_error_handler(HTTPException, _of_http)
    app.register_error_handler(Exception, _unexpected)


def _refuse_what_is_no_text() -> None:
    try:
        request.environ["PATH_INFO"].encode("latin-1").decode()
    except UnicodeDecodeError:
        raise BadRequest("the path is not valid UTF-8") from None


def _never_cached(response: Response) -> Response:
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    return response


class Problem(Struct, frozen=True):
    """Why a request was refused, or failed (RFC 9457); `outcome` says whether something may have been counted."""

    type: str
    title: str
    status: int
    detail: str
    outcome: Outcome


def problem(status: int, title: str, detail: str, outcome: Outcome) -> Response:
    """A problem document. `outcome` says whether something may have been counted."""
    g.outcome = outcome  # for the log
    body = Problem("about:blank", title, status, detail, outcome)
    response = Response(msgspec.json.encode(body), status, content_type="application/problem+json")
    if status == 503:
        response.headers["Retry-After"] = _RETRY_AFTER
    return response


def refuse(error: CounterServerError) -> Response:
    """The problem document of one of our errors, with what may be told to anybody; the log has the rest."""
    status = _STATUS.get(type(error), 500)
    detail = str(error)
    if status >= 500:
        # The message is for the operator: it names directories and commands.
        log.warning("%s %s: %s (%s)", request.method, request.path, error, error.outcome)
        if status != 501:  # what a store cannot do is said by name
            detail = _DETAIL[error.outcome]
    return problem(status, type(error).__name__, detail, error.outcome)


def _of_http(error: HTTPException) -> Response:
    made = error.get_response()
    if error.code is None or error.code < 400:  # a redirect is an HTTPException too
        return Response(made.get_data(), made.status, made.headers)
    response = problem(error.code, error.name, error.description or error.name, "not_applied")
    for name in ("Allow", "Location", "Retry-After", "WWW-Authenticate"):
        if name in made.headers:
            response.headers[name] = made.headers[name]
    return response


def _unexpected(error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return problem(500, "Internal Server Error", "something failed here; the log says what", "unknown")
