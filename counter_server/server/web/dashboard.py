"""The dashboard: all counters, live, with forms to change them; the manager and the processes of the server."""

import re
import unicodedata
from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Response, current_app, flash, redirect, render_template, request, url_for
from jinja2.filters import do_filesizeformat

from ...errors import CounterServerError, InvalidRequest, Unsupported
from ...extension import SharedState
from ...operations import LARGEST, SMALLEST, Get
from ...status import FIGURES, Process, Status
from .problems import problem, refuse
from .security import operators_only, wants_page

_MOST_ROWS = 500  # counters on a page
_TOTALS = ("epoch", "pid", "batches", "operations", "commits", "commit_seconds")  # the page shows their rates

shared = SharedState()  # of the current app
dashboard = Blueprint("dashboard", __name__)
dashboard.register_error_handler(CounterServerError, lambda error: _for_people(refuse(error)))


class Listing(NamedTuple):
    """A page of counters; `next` is its last name if others follow, and `refusal` says why the store lists none."""

    counters: list[tuple[str, int]]
    next: str | None = None
    refusal: str | None = None


@dashboard.get("/counters")
def page() -> str:
    listing = _listing()
    return render_template(
        "dashboard.html",
        listing=listing,
        here=_here(),
        next=url_for(".page", **{**_here(), "after": listing.next}),
        status=shared.state.status(),
        figures=figures,
        processes=_processes(),
        scheme=str(shared.state.store).partition("://")[0],
    )


@dashboard.get("/counters.json")
def live() -> Response:
    """Return everything that can change on the page, or 304. Values are text: JavaScript is exact up to 2^53."""
    listing = _listing()
    status = shared.state.status()
    found = {
        "counters": [{"name": name, "value": str(value)} for name, value in listing.counters],
        "next": listing.next,
        "manager": None if status is None else figures(status),
        "processes": _processes(),
    }
    response = Response(msgspec.json.encode(found), content_type="application/json")
    response.add_etag()
    return response.make_conditional(request)  # type: ignore[return-value]


@dashboard.post("/counters/increment")
def increment() -> Response:
    counter = shared.counter(request.form.get("name", ""))
    return _say(counter.name, f"gave {counter.increment()}")


@dashboard.post("/counters/set")
@operators_only
def set_() -> Response:
    counter = shared.counter(request.form.get("name", ""))
    value = _integer("value", request.form.get("value", ""), SMALLEST, LARGEST)
    return _say(counter.name, f"is {counter.set(value)} now")


@dashboard.get("/counters/delete")
@operators_only
def confirm() -> str | Response:
    name = request.args.get("name", "")
    value = shared.submit(Get(name))
    if value is None:
        return _for_people(problem(404, "Not Found", f"there is no counter {name!r}", "not_applied"))
    return render_template("dashboard_delete.html", name=name, value=value, here=_here())


@dashboard.post("/counters/delete")
@operators_only
def delete() -> Response:
    counter = shared.counter(request.form.get("name", ""))
    return _say(counter.name, "is deleted" if counter.delete() else "was not there")


def _listing() -> Listing:
    here = {"q": "", "after": "", "limit": "50", **_here()}
    return find(beginning=here["q"], after=here["after"], limit=_integer("limit", here["limit"], 1, _MOST_ROWS))


def find(*, beginning: str, after: str, limit: int) -> Listing:
    """List counters whose names begin with `beginning`, in order, after the name `after`."""
    found: list[tuple[str, int]] = []
    if after < beginning:  # a scan begins after a name, but the first name may be the text itself
        after = beginning
        value = shared.submit(Get(beginning))
        if isinstance(value, int):
            found.append((beginning, value))
    try:
        page = shared.counters(after=after, limit=limit + 1)
    except Unsupported as error:
        return Listing(found, refusal=str(error))
    found += takewhile(lambda counter: counter[0].startswith(beginning), page.counters)
    return Listing(found[:limit], found[limit - 1][0] if len(found) > limit else None)


def _here() -> dict[str, Any]:
    """Return the parameters of a URL for this place in the list, without the empty ones."""
    given = {name: request.args.get(name, "") for name in ("q", "after", "limit")}
    return {name: unicodedata.normalize("NFC", text) for name, text in given.items() if text}


def _integer(name: str, text: str, least: int, most: int) -> int:
    if not re.fullmatch(r"\s*-?[0-9]{1,19}\s*", text) or not least <= int(text) <= most:
        raise InvalidRequest(f"{name} must be an integer from {least} to {most}")
    return int(text)


def _say(name: str, result: str) -> Response:
    """Answer the page's script with a sentence, and show it to people on the page that they came from."""
    # The isolated name has its own writing direction, as in `<bdi>`.
    sentence = f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE} {result}."
    if request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json":
        return Response(msgspec.json.encode({"sentence": sentence}), content_type="application/json")
    flash(sentence)
    return redirect(url_for(".page", **_here()), 303)  # type: ignore[return-value]


def _for_people(answer: Response) -> Response:
    """Turn a problem document into a page if the client is a browser."""
    if wants_page():
        answer.set_data(render_template("dashboard_refused.html", problem=answer.get_json(), here=_here()))
        answer.content_type = "text/html; charset=utf-8"
    return answer


def figures(status: Status) -> dict[str, dict[str, Any]]:
    """Return a manager's figures by their labels, and totals. Only uptime changes if nothing happens."""
    show: dict[str, Callable[[Any], str]] = {"number": "{:,}".format, "seconds": duration, "bytes": do_filesizeformat}
    now = {
        figure.label: show.get(figure.unit, str)(getattr(status, name))
        for name, figure in FIGURES.items()
        if figure.label
    }
    now[FIGURES["slow_calls"].label] = ", ".join(f"{call.object}.{call.method}" for call in status.slow_calls) or "none"
    return {"now": now, "totals": {name: getattr(status, name) for name in _TOTALS}}


def _processes() -> list[dict[str, str]] | None:
    """Return the supervisor's processes as rows for people, or None without a supervisor."""
    found: Callable[[], list[Process]] | None = current_app.config.get("COUNTER_SERVER_PROCESSES")
    if found is None:
        return None
    return [
        {
            "name": process.name,
            "pid": "being started" if process.pid is None else str(process.pid),
            "uptime": "" if process.pid is None else duration(process.uptime),
            "restarts": f"{process.restarts:,}",
        }
        for process in found()
    ]


def duration(seconds: float) -> str:
    """Return a time in its largest unit: as people say it, and the same text for a while."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        number = int(seconds // length)
        if number:
            return f"{number} {unit}{'' if number == 1 else 's'}"
    return "under a minute"
