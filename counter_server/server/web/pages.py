"""The pages of our own application alone: the home page, and the visitor's own counter."""

import logging
import os
import time
from typing import Any, NamedTuple, cast

import msgspec
from flask import Blueprint, Flask, Response, current_app, redirect, request
from werkzeug.exceptions import ServiceUnavailable
from werkzeug.wrappers import Response as AnyResponse

from ...errors import CounterServerError, Unsupported
from ...extension import SharedState, VisitorCounter
from ...operations import Get
from ...state import forgetful
from ...status import Process
from ...windows import Recent
from .security import is_loopback, keep_sentence, kept_sentence, may_operate
from .site import Site, link, render_template

log = logging.getLogger(__name__)

shared = SharedState()  # of the current app
pages = Blueprint("pages", __name__)

_VISITS = "visits"  # the counter
_VISITS_SHOWN = 5
_RECENT, _SHARED = "counter_server.last_visits", "counter_server.pages"  # in an app's extensions


class _Worker(NamedTuple):
    """A worker as a page shows it; `shade` is the class of its colour."""

    shade: str
    letter: str
    pid: int


def init_app(app: Flask, site: Site, declaring: SharedState) -> None:
    """Add the home page and the pages of the visitor's own counter; declare their objects before the first request."""
    site.register_blueprint(pages)
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
    number = shared.counter(_VISITS).increment()
    visits: list[tuple[int, int, str]] = []
    if recent := current_app.extensions.get(_RECENT):
        try:
            visits = recent.add([number, os.getpid(), time.strftime("%H:%M:%S", time.gmtime())])
        except CounterServerError as error:  # the visit counts even so
            log.warning("visit %s was counted, but the last visits are unavailable: %s", number, error)
    return render_template(
        "index.html",
        number=number,
        scheme=str(shared.state.store).partition("://")[0],
        **_seen(visits),
    )


@pages.get("/visits.json")
def live() -> Response:
    """Return what the home page shows now, or 204 if its number and its pids are `after`; count nothing.

    The number is text, because JavaScript is exact up to 2^53.
    """
    number = str(shared.submit(Get(_VISITS)) or 0)
    after = request.args.get("after", "").split()
    recent = current_app.extensions.get(_RECENT)
    if after == [number, *_pids(_processes()).split()]:
        return Response(status=204)
    seen = _seen(recent.items() if recent else [])
    news = {"number": number, "pids": seen["pids"], "rows": render_template("visits.html", **seen)}
    if seen["pids"]:
        news["kill"] = render_template("kill.html", **seen)
    return Response(msgspec.json.encode(news), content_type="application/json")


def _processes() -> list[Process] | None:
    """Return the server's processes, or None if another launcher started them."""
    processes: list[Process] | None = current_app.config.get("COUNTER_SERVER_PROCESSES", lambda: None)()
    return processes


def _pids(processes: list[Process] | None) -> str:
    """Return the pids of the server's processes, for people on this machine and operators; empty for others."""
    is_shown = is_loopback(current_app) or may_operate()
    return " ".join(str(process.pid) for process in processes or () if process.pid) if is_shown else ""


def _seen(visits: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Return the last visits, and the commands that kill the server's processes, if it knows them.

    The same worker has the same letter and colour in both.
    """
    processes = _processes()
    pids = [process.pid for process in processes or () if process.name != "manager"]
    pids += sorted({pid for _, pid, _ in visits}.difference(pids))
    workers = {pid: _Worker(f"w{n % 8}", chr(ord("A") + n % 26), pid) for n, pid in enumerate(pids) if pid}
    serving = pids if processes is None else [process.pid for process in processes]
    return {
        "visits": [(f"{number:,}", workers[pid], pid in serving, time) for number, pid, time in visits],
        "pids": _pids(processes),
        "durability": current_app.config["COUNTER_SERVER_DURABILITY"],
        "processes": None if processes is None else [(one.pid, workers.get(one.pid)) for one in processes if one.pid],
    }


@pages.get("/session")
def session() -> AnyResponse:
    value, said = _yours().value, kept_sentence()
    answer = Response(render_template("session.html", value=value, sentence=said or f"counter is {value}"))
    return keep_sentence(answer, "") if said else answer


@pages.post("/session/<any(inc, dec, reset):step>")
def session_step(step: str) -> AnyResponse:
    if step == "reset":
        _yours().reset()
        sentence = "counter was reset"
    else:
        sentence = f"counter is {_yours().increment(1 if step == 'inc' else -1)}"
    if request.accept_mimetypes.best_match(["text/plain", "text/html"]) == "text/html":
        return keep_sentence(redirect(link("pages.session"), 303), sentence)  # a reload must not count again
    return Response(sentence, mimetype="text/plain")


def _yours() -> VisitorCounter:
    return cast(SharedState, current_app.extensions[_SHARED]).visitor_counter("session")


def is_prefetch() -> bool:
    """Return whether a browser asks ahead for something that it may show later or never."""
    purposes = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Purpose", "X-Moz"))
    return any("prefetch" in purpose.lower() or "preview" in purpose.lower() for purpose in purposes)
