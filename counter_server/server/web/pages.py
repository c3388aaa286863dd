"""The pages that people see."""

import os
from collections.abc import Callable
from typing import NoReturn

from flask import Blueprint, Response, flash, render_template, request
from werkzeug.exceptions import ServiceUnavailable

from ...errors import Unsupported
from ...extension import SharedState, VisitorCounter
from .forms import is_prefetch
from .visits import LastVisits


def blueprint(shared: SharedState) -> Blueprint:
    pages = Blueprint("pages", __name__)
    visits = shared.counter("visits")
    last_visits = LastVisits(shared)
    yours = _visitor_counter(shared)

    @pages.get("/")
    def home() -> str:
        """Count this visit and show its number."""
        if is_prefetch():
            # A page fetched ahead might be shown later, or never: refused, so the browser asks again for a real visit.
            raise ServiceUnavailable("a visit is counted when it is made, not ahead of it")
        if request.method == "HEAD":
            return ""
        number = visits.increment()
        flash(f"You are visitor number {number}.")
        return render_template("index.html", number=number, visits=last_visits.add(number, os.getpid()))

    @pages.get("/session")
    def session() -> str:
        """The visitor's own counter, and the buttons that change it."""
        return render_template("session.html", sentence=f"counter is {yours().value}")

    @pages.post("/session/inc")
    def session_inc() -> Response:
        return _told(f"counter is {yours().increment()}")

    @pages.post("/session/dec")
    def session_dec() -> Response:
        return _told(f"counter is {yours().decrement()}")

    @pages.post("/session/reset")
    def session_reset() -> Response:
        yours().reset()
        return _told("counter was reset")

    return pages


def _visitor_counter(shared: SharedState) -> Callable[[], VisitorCounter]:
    """The visitor's own counter; on a store that hosts none, its refusal at each use: the others count all the same."""
    try:
        counter = shared.visitor_counter("session")
    except Unsupported as error:
        refusal = str(error)

        def refuse() -> NoReturn:
            raise Unsupported(refusal)

        return refuse
    return lambda: counter


def _told(sentence: str) -> Response:
    """The sentence: on the page, buttons and all, for a browser, and alone for everybody else."""
    if request.accept_mimetypes.best_match(["text/plain", "text/html"]) == "text/html":
        return Response(render_template("session.html", sentence=sentence))
    return Response(sentence, mimetype="text/plain")
