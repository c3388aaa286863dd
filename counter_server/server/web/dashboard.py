"""The dashboard: all counters, live, with forms to change them; the manager, its shared objects and its processes."""

import os.path
import shlex
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
from flask import Blueprint, Response, current_app, g, redirect, request, url_for
from jinja2.filters import do_filesizeformat
from werkzeug.exceptions import NotFound
from werkzeug.wrappers import Response as AnyResponse

from ...errors import Unsupported
from ...extension import SharedState
from ...manager.client import StateProxy
from ...operations import LARGEST, SMALLEST, Get, Increment, Replayed, expect
from ...scan import beginning_with
from ...status import FIGURES, ConnectedProcess, ObjectStatus, Process, Status
from .api import read_integer
from .security import keep_sentence, kept_sentence, may_operate, operators_only, token_of, wants_page
from .site import has_page, link, render_template, site

_ROWS = "25"  # counters on a page: all that it loads stays below 60 kB
_MOST_ROWS = 500
_TOTALS = ("epoch", "pid", "batches", "operations")  # the page shows their rates

shared = SharedState()  # of the current app
dashboard = Blueprint("dashboard", __name__)


class Listing(NamedTuple):
    """A page of counters; `next` is its last name if others follow, and `refusal` says why the store lists none."""

    counters: list[tuple[str, int]]
    next: str | None = None
    refusal: str | None = None


class Ways(NamedTuple):
    """Lines to copy that count from elsewhere; an empty one does not fit this site. A directory is for operators."""

    command: str
    curl: str
    python: str


@dashboard.get("/counters")
def page() -> AnyResponse:
    listing, status = _listing(), shared.state.status()
    here = _here()
    return _with_sentence(
        "dashboard.html",
        listing=listing,
        here=here,
        next=url_for(".page", **{**here, "after": listing.next}),
        ways=ways(here.get("q", "visits")),
        row_id=_row_id,
        status=status,
        figures=figures,
        tables=None if status is None else tables(status),
        processes=_processes(),
        scheme=_scheme(),
    )


@dashboard.get("/counters.json")
def live() -> Response:
    """Return everything that can change on the page, or 304. Values are text: JavaScript is exact up to 2^53."""
    listing = _listing()
    status = shared.state.status()
    return _unless_known(
        {
            "counters": [{"name": name, "value": str(value)} for name, value in listing.counters],
            "next": listing.next,
            "ways": None if listing.counters else ways(_here().get("q", "visits"))._asdict(),
            "manager": None if status is None else figures(status),
            "tables": None if status is None else tables(status),
            "processes": _processes(),
        }
    )


@dashboard.get("/counters/detail")
def detail() -> AnyResponse:
    """Show one counter. Its name is in the query, which holds any name, such as ``..`` or ``a//b``."""
    name = request.args.get("name", "")
    value = shared.submit(Get(name))
    if value is None:
        return _missing(name)
    badge = has_page("badge.picture") and request.host_url.rstrip("/") + link("badge.picture", name=name)
    return _with_sentence(
        "dashboard_detail.html", name=name, value=value, here=_here(), row=_row_id(name), ways=ways(name), badge=badge
    )


@dashboard.get("/counters/detail.json")
def detail_live() -> Response:
    """Return one counter's value as text, null if there is no such counter, or 304."""
    value = shared.submit(Get(request.args.get("name", "")))
    return _unless_known({"value": None if value is None else str(value)})


@dashboard.post("/counters/increment")
def increment() -> AnyResponse:
    name, key = request.form.get("name", ""), request.form.get("key")
    by = read_integer("by", request.form.get("by", "1"), SMALLEST, LARGEST)
    result = shared.submit(Increment(name, by, key=key or None))
    if isinstance(result, Replayed):
        return _say(name, f"became {result.value} with this key before, so nothing was added now")
    return _say(name, f"is now {expect(int, result)}")


@dashboard.post("/counters/set")
@operators_only
def set_() -> AnyResponse:
    counter = shared.counter(request.form.get("name", ""))
    value = read_integer("value", request.form.get("value", ""), SMALLEST, LARGEST)
    return _say(counter.name, f"is {counter.set(value)} now")


@dashboard.get("/counters/delete")
@operators_only
def confirm() -> str | Response:
    name = request.args.get("name", "")
    value = shared.submit(Get(name))
    if value is None:
        return _missing(name)
    return render_template("dashboard_delete.html", name=name, value=value, here=_here())


@dashboard.post("/counters/delete")
@operators_only
def delete() -> AnyResponse:
    counter = shared.counter(request.form.get("name", ""))
    return _say(counter.name, "is deleted" if counter.delete() else "was not there")


def waiting(reason: str) -> str:
    """Make the page of a store that has no manager now."""
    return render_template("dashboard_waiting.html", reason=reason, ways=ways("visits"))


def ways(name: str) -> Ways:
    """Return how to add to a counter from elsewhere."""
    store, name_in_shell = shared.state.store, shlex.quote(name)
    has_directory = isinstance(store, StateProxy) and may_operate()
    directory = shlex.quote(str(store.directory.path)) if isinstance(store, StateProxy) and has_directory else ""
    path = link("api.increment", name=name)
    options = " --path-as-is" if {".", ".."} & set(name.split("/")) else ""  # curl resolves them otherwise
    if site().is_closed and token_of(current_app.config):
        options += ' -H "Authorization: Bearer $COUNTER_SERVER_TOKEN"'
    if site().is_closed:  # in another app, which has a `shared` of its own
        python = f"shared.counter({name!r}).increment()"
    elif _scheme() == "memory":
        python = ""
    else:
        url = str(store) if has_directory else f"{_scheme()}://…"
        python = (
            "from counter_server import open_state\n\n"
            f"with open_state({url!r}) as state:\n    print(state.counter({name!r}).increment())"
        )
    end_of_options = "-- " if name.startswith("-") else ""
    return Ways(
        f"counter-server increment --data-dir {directory} {end_of_options}{name_in_shell}" if directory else "",
        f"curl -X POST{options} {shlex.quote(request.host_url.rstrip('/') + path)}",
        python,
    )


def _scheme() -> str:
    return str(shared.state.store).partition("://")[0]


def _with_sentence(template: str, **values: Any) -> AnyResponse:
    """Render a page that says the sentence that was kept for it."""
    said = kept_sentence()
    answer = Response(render_template(template, said=said, **values))
    return keep_sentence(answer, "") if said else answer


def _unless_known(found: dict[str, Any]) -> Response:
    """Answer a script with JSON, or 304 if it has it already."""
    response = Response(msgspec.json.encode(found), content_type="application/json")
    response.add_etag()
    return response.make_conditional(request)  # type: ignore[return-value]


def _missing(name: str) -> Response:
    """Answer that there is no such counter; to a browser with a page that can make it."""
    if not wants_page():
        raise NotFound(f"there is no counter {name!r}")
    g.outcome = "not_applied"  # for the log
    return Response(render_template("dashboard_missing.html", name=name, here=_here(), ways=ways(name)), 404)


def _row_id(name: str) -> str:
    """Return the id of a counter's row. The script makes the same, with `encodeURIComponent`."""
    return "row-" + quote(name, safe="!*'()")


def _listing() -> Listing:
    here = {"q": "", "after": "", "limit": _ROWS, **_here()}
    return find(beginning=here["q"], after=here["after"], limit=read_integer("limit", here["limit"], 1, _MOST_ROWS))


def find(*, beginning: str, after: str, limit: int) -> Listing:
    """List counters whose names begin with `beginning`, in order, after the name `after`."""
    found: list[tuple[str, int]] = []
    try:
        for counter in islice(beginning_with(beginning, shared.submit, after=after, at_once=limit + 1), limit + 1):
            found.append(counter)  # noqa: PERF402 - one was found before a store says that it lists none
    except Unsupported as error:
        return Listing(found, refusal=str(error))
    return Listing(found[:limit], found[limit - 1][0] if len(found) > limit else None)


def _here() -> dict[str, Any]:
    """Return the parameters of a URL for this place in the list, without the empty ones."""
    given = {name: request.args.get(name, "") for name in ("q", "after", "limit")}
    return {name: unicodedata.normalize("NFC", text) for name, text in given.items() if text}


def _say(name: str, result: str) -> AnyResponse:
    """Answer the page's script with a sentence, and show it to people on the page that they came from."""
    # The isolated name has its own writing direction, as in `<bdi>`.
    sentence = f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE} {result}."
    if request.accept_mimetypes.best_match(["text/html", "application/json"]) == "application/json":
        return Response(msgspec.json.encode({"sentence": sentence}), content_type="application/json")
    if "detail" in request.args:
        back = url_for(".detail", name=name, **_here())
    else:
        back = url_for(".page", **_here(), _anchor=_row_id(name))
    return keep_sentence(redirect(back, 303), sentence)


def figures(status: Status) -> dict[str, dict[str, Any]]:
    """Return a manager's figures by their labels, and totals. Only uptime changes if nothing happens."""
    show: dict[str, Callable[[Any], str]] = {"number": "{:,}".format, "seconds": duration, "bytes": do_filesizeformat}
    now = {
        figure.label: show.get(figure.unit, str)(getattr(status, name))
        for name, figure in FIGURES.items()
        if figure.label
    }
    now[FIGURES["slow_calls"].label] = ", ".join(f"{call.object}.{call.method}" for call in status.slow_calls) or "none"
    now["Connected processes"] = f"{status.connected_processes:,}"
    totals = {name: getattr(status, name) for name in _TOTALS}
    return {
        "now": now,
        "totals": {**totals, "commits": status.journal_commits, "commit_seconds": status.commit_seconds},
    }


def tables(status: Status) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the shared objects, of those with entries, and of the connected processes.

    An argument or a value of a call never appears. What may hold one, or a secret, is for operators: the text of an
    error, the reason why an object could not be made, and a command line beyond the program.
    """
    is_operator = may_operate()
    return {
        "objects": [_object_row(each, is_operator=is_operator) for each in status.hosted],
        "entries": [_entries_row(each) for each in status.hosted if each.entries],
        "connected": [_connected_row(each, is_operator=is_operator) for each in status.processes],
    }


def _object_row(each: ObjectStatus, *, is_operator: bool) -> dict[str, str]:
    error = ""
    if each.not_made:
        error = each.not_made if is_operator else "it could not be made"
    elif each.last_error:
        text = f": {each.last_error.text}" if is_operator and each.last_error.text else ""
        error = f"{each.last_error.kind}{text} ({_moment(each.last_error.time)})"
    return {
        "name": each.name,
        "class": each.cls,
        "durable": "yes" if each.durable else "no",
        "calls": f"{each.calls:,}",
        "running": f"{each.running:,}",
        "errors": f"{each.errors:,}",
        "slowest": f"{each.slowest_method}, {brief(each.slowest_seconds)}" if each.slowest_method else "",
        "error": error,
    }


def _entries_row(each: ObjectStatus) -> dict[str, str]:
    assert each.entries is not None
    names = ("now", "most", "hits", "misses", "evictions", "expired")
    values = {name: getattr(each.entries, name) for name in names}
    return {"name": each.name, **{name: "" if value is None else f"{value:,}" for name, value in values.items()}}


def _connected_row(each: ConnectedProcess, *, is_operator: bool) -> dict[str, str]:
    program = each.command if is_operator else os.path.basename(each.command.partition(" ")[0])
    return {
        "name": str(each.pid) if each.pid else "not visible",
        "command": program,
        "connections": f"{each.connections:,}",
        "since": _moment(each.since),
    }


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def brief(seconds: float) -> str:
    """Return a duration with three significant digits, in its own unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


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
