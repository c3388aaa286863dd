"""The pages that people see."""

import os

from flask import Blueprint, flash, render_template, request
from werkzeug.exceptions import ServiceUnavailable

from ..extension import SharedState


def blueprint(shared: SharedState) -> Blueprint:
    pages = Blueprint("pages", __name__)
    visits = shared.counter("visits")

    @pages.get("/")
    def home() -> str:
        """Count this visit and show its number."""
        if _is_prefetch():
            # A page fetched ahead might be shown later, or never: refused, so the browser asks again for a real visit.
            raise ServiceUnavailable("a visit is counted when it is made, not ahead of it")
        if request.method == "HEAD":
            return ""
        number = visits.increment()
        flash(f"You are visitor number {number}.")
        return render_template("index.html", number=number, pid=os.getpid())

    return pages


def _is_prefetch() -> bool:
    purposes = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"))
    return any("prefetch" in purpose.lower() or "preview" in purpose.lower() for purpose in purposes)
