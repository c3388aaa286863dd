"""The pages that people see: the home page, the visitor's own counter, and what every page shows."""

import logging
import os
import time
from typing import Any, cast

from flask import Blueprint, Flask, Response, current_app, flash, render_template, request
from werkzeug.exceptions import ServiceUnavailable

from ...errors import CounterServerError, Unsupported
from ...extension import SharedState, VisitorCounter
from ...state import forgetful
from ...windows import Recent

log = logging.getLogger(__name__)

shared = SharedState()  # of the current app
pages = Blueprint("pages", __name__)

_VISITS_SHOWN = 5
_RECENT, _SHARED = "counter_server.last_visits", "counter_server.pages"  # in an app's extensions
_TITLES = {
    "pages.home": "Home",
    "lab.page": "Lab",
    "dashboard.page": "Counters",
    "pages.session": "Your own",
    "documentation.docs": "API",
}


def _navigation() -> dict[str, Any]:
    """Return the variables of every template: links to the app's pages with their titles, and this process's pid."""
    links = {endpoint: title for endpoint, title in _TITLES.items() if endpoint in current_app.view_functions}
    return {"links": links, "pid": os.getpid()}


def init_app(app: Flask, declaring: SharedState) -> None:
    """Add the home page and the pages of the visitor's own counter; declare their objects before the first request."""
    app.context_processor(_navigation)
    app.register_blueprint(pages)
    app.extensions[_SHARED] = declaring
    try:
        app.extensions[_RECENT] = forgetful(declaring.object("last visits", Recent, _VISITS_SHOWN, durable=False))
        declaring.visitor_counter("session")  # without shared objects, each use raises the error again
    except Unsupported as error:
        log.info("the home page shows no last visits: %s", error)


@pages.get("/")
def home() -> str:
    """Count this visit and show its number."""
    if is_prefetch():  # the browser asks again when the visit is real
        raise ServiceUnavailable("a visit is counted when it is made, not ahead of it")
    if request.method == "HEAD":
        return ""
    number = shared.counter("visits").increment()
    flash(f"You are visitor number {number}.")
    visits = []
    if recent := current_app.extensions.get(_RECENT):
        try:
            visits = recent.add([number, os.getpid(), time.strftime("%H:%M:%S", time.gmtime())])
        except CounterServerError as error:  # the visit counts even so
            log.warning("visit %s was counted, but the last visits are unavailable: %s", number, error)
    return render_template("index.html", number=number, visits=visits)


@pages.get("/session")
def session() -> str:
    return render_template("session.html", sentence=f"counter is {_yours().value}")


@pages.post("/session/<any(inc, dec, reset):step>")
def session_step(step: str) -> Response:
    if step == "reset":
        _yours().reset()
        sentence = "counter was reset"
    else:
        sentence = f"counter is {_yours().increment(1 if step == 'inc' else -1)}"
    if request.accept_mimetypes.best_match(["text/plain", "text/html"]) == "text/html":
        return Response(render_template("session.html", sentence=sentence))
    return Response(sentence, mimetype="text/plain")


def _yours() -> VisitorCounter:
    return cast(SharedState, current_app.extensions[_SHARED]).visitor_counter("session")


def is_prefetch() -> bool:
    """Return whether a browser asks ahead for something that it may show later or never."""
    purposes = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"))
    return any("prefetch" in purpose.lower() or "preview" in purpose.lower() for purpose in purposes)
