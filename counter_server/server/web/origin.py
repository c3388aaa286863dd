"""The same-origin rule: a page of another site changes nothing here in its visitor's name.

The rule is that of Go's `net/http.CrossOriginProtection`: browsers tell by one of two headers where a request comes
from, and what is no browser, as curl, sends neither.
"""

from flask import Flask, request
from werkzeug.exceptions import Forbidden

_SAFE = ("GET", "HEAD", "OPTIONS")


def init_app(app: Flask) -> None:
    app.before_request(_refuse_other_sites)


def own_origin() -> str:
    """The origin that the request was sent to, as browsers write it."""
    return f"{request.scheme}://{request.host}".lower()


def _refuse_other_sites() -> None:
    if request.method not in _SAFE and _is_from_elsewhere():
        raise Forbidden("requests from other sites' pages change nothing here")


def _is_from_elsewhere() -> bool:
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:  # the browser has compared the origins itself, so a proxy that hides ours does no harm
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is not None and origin.lower() != own_origin()
