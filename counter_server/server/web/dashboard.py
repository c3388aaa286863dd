"""The dashboard: all counters, live, and what can be done to them; the workers and the manager."""

import unicodedata
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import msgspec
from flask import Blueprint, Response, current_app, flash, redirect, render_template, request, url_for
from msgspec import Struct

from ...errors import CounterServerError, InvalidRequest
from ...extension import SharedState
from ...operations import Get
from ...status import Process
from .access import operators_only, wants_page
from .figures import Figures, ProcessRow, figures, means, processes
from .listing import LARGEST_LISTING, Listing, find
from .problems import problem, refuse

_ROWS = "50"  # counters on a page, where nobody asks for more or fewer

_encode = msgspec.json.Encoder().encode


class CounterRow(Struct, frozen=True):
    """A counter. Its value is text: a script's numbers are exact up to 2^53 only."""

    name: str
    value: str


class Live(Struct, frozen=True):
    """What the page's script asks for again and again: all that can change on the page."""

    counters: list[CounterRow]
    next: str | None
    manager: Figures | None
    processes: list[ProcessRow] | None


def blueprint(shared: SharedState) -> Blueprint:
    dashboard = Blueprint("dashboard", __name__)
    dashboard.register_error_handler(CounterServerError, lambda error: _for_people(refuse(error)))

    @dashboard.get("/counters")
    def page() -> str:
        """Counters whose names begin with `q`, in order, `limit` of them from the one after `after`."""
        listing = _listing(shared)
        status = shared.state.status()
        return render_template(
            "dashboard.html",
            listing=listing,
            here=_here(),
            next=None if listing.next is None else url_for(".page", **{**_here(), "after": listing.next}),
            manager=None if status is None else figures(status),
            means=None if status is None else means(status),
            processes=_processes(),
            scheme=str(shared.state.store).partition("://")[0],
        )

    @dashboard.get("/counters.json")
    def live() -> Response:
        """The same as data; 304 where it is what the asker has."""
        listing = _listing(shared)
        status = shared.state.status()
        found = Live(
            [CounterRow(name, str(value)) for name, value in listing.counters],
            listing.next,
            None if status is None else figures(status),
            _processes(),
        )
        content = _encode(found)
        response = Response(content, content_type="application/json")
        response.set_etag(blake2b(content, digest_size=16).hexdigest())
        return response.make_conditional(request)  # type: ignore[return-value]

    @dashboard.post("/counters/increment")
    def increment() -> Response:
        counter = shared.counter(_name())
        return _told(f"{_isolated(counter.name)} gave {counter.increment()}.")

    @dashboard.post("/counters/set")
    @operators_only
    def set_() -> Response:
        counter = shared.counter(_name())
        value = counter.set(_number(request.form.get("value", "")))
        return _told(f"{_isolated(counter.name)} is {value} now.")

    @dashboard.get("/counters/delete")
    @operators_only
    def confirm() -> str | Response:
        """Ask whether the counter is to go."""
        name = request.args.get("name", "")
        value = shared.submit(Get(name))
        if value is None:
            return _for_people(problem(404, "Not Found", f"there is no counter {name!r}", "not_applied"))
        return render_template("dashboard_delete.html", name=name, value=value, here=_here())

    @dashboard.post("/counters/delete")
    @operators_only
    def delete() -> Response:
        counter = shared.counter(_name())
        told = "is deleted" if counter.delete() else "was not there"
        return _told(f"{_isolated(counter.name)} {told}.")

    return dashboard


def _listing(shared: SharedState) -> Listing:
    here = _here()
    limit = here.get("limit", _ROWS)
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10):
        raise InvalidRequest(f"limit must be 1 to {LARGEST_LISTING}")
    return find(shared, beginning=here.get("q", ""), after=here.get("after", ""), limit=int(limit))


def _processes() -> list[ProcessRow] | None:
    """Those of the server, where our own supervisor started it."""
    found: Callable[[], list[Process]] | None = current_app.config.get("COUNTER_SERVER_PROCESSES")
    return None if found is None else processes(found())


def _here() -> dict[str, Any]:
    """Where in the list this request is, as the parameters of a URL: what is said, and no more."""
    said = {name: request.args.get(name, "") for name in ("q", "after", "limit")}
    return {name: unicodedata.normalize("NFC", text) for name, text in said.items() if text}


def _name() -> str:
    return request.form.get("name", "")


def _number(text: str) -> int:
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise InvalidRequest("a value is a whole number within 64 bits")
    return int(text)


def _isolated(name: str) -> str:
    """A name in a sentence, whose order of writing is its own: what `<bdi>` is elsewhere."""
    return f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE}"


def _told(sentence: str) -> Response:
    """The sentence: alone for the page's script, and on the page, where they were, for people."""
    if request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json":
        return Response(_encode({"sentence": sentence}), content_type="application/json")
    flash(sentence)
    return redirect(url_for(".page", **_here()), 303)  # type: ignore[return-value]


def _for_people(answer: Response) -> Response:
    """A problem document, as a page for who asks for pages."""
    if wants_page():
        answer.set_data(render_template("dashboard_refused.html", problem=answer.get_json(), here=_here()))
        answer.content_type = "text/html; charset=utf-8"
    return answer
