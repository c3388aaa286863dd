"""The pages that people see: the home page, the visitor's own counter, and what every page shows."""

import logging
import os
import time
from typing import Any

from flask import Blueprint, Response, current_app, flash, render_template, request
from werkzeug.exceptions import ServiceUnavailable

from ...errors import CounterServerError, Unsupported
from ...extension import SharedState, VisitorCounter
from ...state import forgetful
from ...windows import Recent

log = logging.getLogger(__name__)

_VISITS_SHOWN = 5
_TITLES = {
    "pages.home": "Home",
    "lab.page": "Lab",
    "dashboard.page": "Counters",
    "pages.session": "Your own",
    "documentation.docs": "API",
}


def navigation() -> dict[str, Any]:
    """Return the variables of every template: links to the app's pages with their titles, and this process's pid."""
    links = {endpoint: title for endpoint, title in _TITLES.items() if endpoint in current_app.view_functions}
    return {"links": links, "pid": os.getpid()}


def blueprint(shared: SharedState) -> Blueprint:
    """Make the home page and the pages of the visitor's own counter."""
    pages = Blueprint("pages", __name__)
    visits = shared.counter("visits")

    def yours() -> VisitorCounter:
        return shared.visitor_counter("session")

    recent: Recent | None = None
    try:  # declare them before the first request
        recent = forgetful(shared.object("last visits", Recent, _VISITS_SHOWN))
        yours()
    except Unsupported as error:  # `yours` will raise it again
        log.info("the home page shows no last visits: %s", error)

    @pages.get("/")
    def home() -> str:
        """Count this visit and show its number."""
        if is_prefetch():
            # A prefetched page may be shown later or never. The browser asks again when the visit is real.
            raise ServiceUnavailable("a visit is counted when it is made, not ahead of it")
        if request.method == "HEAD":
            return ""
        number = visits.increment()
        flash(f"You are visitor number {number}.")
        last_visits = []
        if recent is not None:
            try:
                last_visits = recent.add([number, os.getpid(), time.strftime("%H:%M:%S", time.gmtime())])
            except CounterServerError as error:  # the visit counts even so
                log.warning("visit %s was counted, but the last visits are unavailable: %s", number, error)
        return render_template("index.html", number=number, visits=last_visits)

    @pages.get("/session")
    def session() -> str:
        return render_template("session.html", sentence=f"counter is {yours().value}")

    @pages.post("/session/<any(inc, dec, reset):step>")
    def session_step(step: str) -> Response:
        if step == "reset":
            yours().reset()
            return _say("counter was reset")
        return _say(f"counter is {yours().increment(1 if step == 'inc' else -1)}")

    return pages


def is_prefetch() -> bool:
    """Return whether a browser asks ahead for something that it may show later or never."""
    purposes = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"))
    return any("prefetch" in purpose.lower() or "preview" in purpose.lower() for purpose in purposes)


def _say(sentence: str) -> Response:
    if request.accept_mimetypes.best_match(["text/plain", "text/html"]) == "text/html":
        return Response(render_template("session.html", sentence=sentence))
    return Response(sentence, mimetype="text/plain")
