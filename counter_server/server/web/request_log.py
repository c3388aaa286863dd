"""A line in the log for each request: its id, who answered what, how long it took, and whether anything was counted."""

import logging
import re
import time
import uuid

from flask import Flask, Response, g, request

log = logging.getLogger(__name__)

_ACCEPTABLE = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a proxy's id: what cannot break a line or fill a disk


def init_app(app: Flask) -> None:
    """Log every request of `app`, and answer it with its id in ``X-Request-ID``: the client's own, or a new one."""
    app.before_request_funcs.setdefault(None, []).insert(0, _begin)  # before what may refuse it
    app.after_request(_end)


def _begin() -> None:
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if _ACCEPTABLE.fullmatch(given) else uuid.uuid4().hex
    g.request_began = time.monotonic()


def _end(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    fields = {
        "request_id": g.request_id,
        "client": request.remote_addr,
        "method": request.method,
        "path": request.path,
        "status": response.status_code,
        "seconds": round(time.monotonic() - g.request_began, 6),
        "outcome": g.get("outcome", "answered"),
    }
    log.info("%s %s %s", request.method, request.path, response.status_code, extra=fields)
    return response
